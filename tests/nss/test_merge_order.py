"""The order in which units are kept: greedy, of what all readers compute from them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nss.merge import Reading, order_units

few = settings(max_examples=20, deadline=None)


def random_gram(size: int, seed: int, rank: int | None = None) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(rank or 2 * size, size, generator=generator, dtype=torch.float64)
    return rows.T @ rows / len(rows)


def reading(module: str, gram: Tensor, importance: Tensor | None = None, ids: Tensor | None = None) -> Reading:
    channels = torch.arange(len(gram)) if ids is None else ids
    return Reading(module, module, channels, gram, torch.eye(len(gram)).double() if importance is None else importance)


def lost(gram: Tensor, importance: Tensor, kept: list[int]) -> float:
    """Share of tr(H G) that the best linear reconstruction from `kept` channels leaves, by least squares on samples."""
    rows = torch.linalg.cholesky(gram + 1e-14 * torch.eye(len(gram)).double()).T
    rest = rows
    if kept:
        rest = rows - rows[:, kept] @ torch.linalg.lstsq(rows[:, kept], rows).solution
    return float(torch.trace(importance @ (rest.T @ rest)) / torch.trace(importance @ gram))


def greedy_by_hand(readers: list[Reading], size: int) -> tuple[list[int], list[float]]:
    """Try every unit at every step. Readers all read channel k of unit k."""
    order: list[int] = []
    missing = [1.0]
    for _ in range(size):
        trials = {
            unit: sum(lost(each.gram, each.importance, [*order, unit]) for each in readers) / len(readers)
            for unit in range(size)
            if unit not in order
        }
        order.append(min(trials, key=lambda unit: trials[unit]))
        missing.append(trials[order[-1]])
    return order, missing


@given(seed=st.integers(0, 10_000), count=st.integers(1, 3))
@few
def test_the_order_is_that_of_trying_every_unit_at_every_step(seed: int, count: int) -> None:
    size = 6
    readers = [reading(str(i), random_gram(size, seed + i), random_gram(size, seed + 50 + i)) for i in range(count)]
    expected, missing = greedy_by_hand(readers, size)
    found = order_units(torch.arange(size), torch.arange(size), readers, torch.ones(size).double())
    assert found.units.tolist() == expected
    assert found.missing.tolist() == pytest.approx(missing, abs=1e-9)


@given(seed=st.integers(0, 10_000), rank=st.integers(1, 9))
@few
def test_what_is_missing_falls_from_one_to_nothing_and_is_nothing_once_the_rank_is_reached(
    seed: int, rank: int
) -> None:
    gram, importance = random_gram(7, seed, rank), random_gram(7, seed + 1)
    found = order_units(torch.arange(7), torch.arange(7), [reading("a", gram, importance)], torch.ones(7).double())
    missing = found.missing.tolist()
    assert sorted(found.units.tolist()) == list(range(7))
    assert len(missing) == 8
    assert missing[0] == 1
    assert missing == sorted(missing, reverse=True)
    assert missing[min(7, rank)] == pytest.approx(0, abs=1e-8)
    if rank > 1:
        assert missing[1] > 1e-6


def test_of_two_equal_channels_one_is_needed_and_the_first_is_chosen() -> None:
    gram = torch.diag(torch.tensor([4.0, 9.0, 1.0])).double()[[0, 1, 0, 2]][:, [0, 1, 0, 2]]
    found = order_units(torch.arange(4), torch.arange(4), [reading("a", gram)], torch.ones(4).double())
    # Alone, channel 0 explains itself and its twin: 8 of 18; channel 1 explains 9.
    assert found.units.tolist() == [1, 0, 3, 2]
    assert found.missing.tolist() == pytest.approx([1, 9 / 18, 1 / 18, 0, 0])


def test_dead_channels_come_last_in_order_of_their_numbers() -> None:
    gram = torch.diag(torch.tensor([0.0, 3.0, 0.0, 1.0, 2.0, 0.0])).double()
    found = order_units(torch.arange(6), torch.arange(6), [reading("a", gram)], torch.ones(6).double())
    assert found.units.tolist() == [1, 4, 3, 0, 2, 5]
    assert found.missing.tolist() == pytest.approx([1, 3 / 6, 1 / 6, 0, 0, 0, 0])


def test_channels_that_are_read_with_weight_zero_come_behind_those_that_are_not() -> None:
    gram, importance = torch.diag(torch.tensor([9.0, 1.0, 8.0, 2.0])).double(), torch.diag(torch.tensor([0, 1, 0, 1.0]))
    found = order_units(torch.arange(4), torch.arange(4), [reading("a", gram, importance.double())], torch.ones(4))
    assert found.units.tolist() == [3, 1, 0, 2]


def test_ties_go_to_the_lower_number() -> None:
    found = order_units(
        torch.tensor([4, 7, 9]), torch.tensor([9, 4, 7]), [reading("a", torch.eye(3).double())], torch.ones(3)
    )
    assert found.units.tolist() == [4, 7, 9]
    assert found.missing.tolist() == pytest.approx([1, 2 / 3, 1 / 3, 0])


@pytest.mark.parametrize("seed", range(12))
def test_a_channel_that_one_reader_has_twice_and_another_has_not_does_no_harm(seed: int) -> None:
    """Once its twin is kept, nothing but rounding errors is left of the channel, and those must not be divided by."""
    generator = torch.Generator().manual_seed(seed)
    wide = 30 * torch.randn(50, 3, generator=generator, dtype=torch.float64)
    rows = torch.stack([wide[:, 0], 0.7 * wide[:, 0], wide[:, 1], wide[:, 2]], 1)
    first = reading("a", rows.T @ rows / 50)
    second = reading("b", random_gram(4, seed), torch.diag(torch.tensor([50.0, 45.0, 0.1, 0.1])).double())
    found = order_units(torch.arange(4), torch.arange(4), [first, second], torch.ones(4).double())
    kept = found.units.tolist()
    expected = [sum(best_left(each, kept[:k]) for each in (first, second)) / 2 for k in range(5)]
    assert found.missing.tolist() == pytest.approx(expected, abs=1e-9)


def best_left(each: Reading, kept: list[int]) -> float:
    """As `lost`, for singular second moments."""
    rest = each.gram.clone()
    if kept:
        rest = rest - each.gram[:, kept] @ torch.linalg.pinv(each.gram[kept][:, kept], hermitian=True) @ each.gram[kept]
    return float(torch.trace(each.importance @ rest) / torch.trace(each.importance @ each.gram))


def test_a_unit_of_several_channels_explains_with_all_of_them() -> None:
    """Unit 5 has channels 0 and 2, unit 8 channels 1 and 3: 3 + 1 against 2 + 2.5."""
    gram = torch.diag(torch.tensor([3.0, 2.0, 1.0, 2.5])).double()
    found = order_units(torch.tensor([5, 8]), torch.tensor([5, 8, 5, 8]), [reading("a", gram)], torch.ones(2))
    assert found.units.tolist() == [8, 5]
    assert found.missing.tolist() == pytest.approx([1, 4 / 8.5, 0])


def test_only_channels_of_the_group_count_in_a_reader_of_several() -> None:
    gram = torch.diag(torch.tensor([100.0, 2.0, 3.0, 50.0])).double()
    of = torch.tensor([0, 7, 6, 1, -1])
    each = reading("a", gram, ids=torch.tensor([0, 1, 2, -1]))
    found = order_units(torch.tensor([6, 7]), of, [each], torch.ones(2))
    assert found.units.tolist() == [6, 7]
    assert found.missing.tolist() == pytest.approx([1, 2 / 5, 0])


def test_scores_decide_where_nothing_reads_the_units() -> None:
    scores = torch.tensor([0.1, 0.4, 0.4, 0.1]).double()
    silent = reading("a", torch.zeros(4, 4).double())
    elsewhere = reading("b", torch.eye(2).double(), ids=torch.tensor([4, 5]))
    for readers in ([], [silent], [elsewhere]):
        of = torch.tensor([0, 1, 2, 3, 4, 5])
        found = order_units(torch.arange(4), of, readers, scores)
        assert found.units.tolist() == [1, 2, 0, 3]
        assert found.missing.tolist() == pytest.approx([1, 0.6, 0.2, 0.1, 0], abs=1e-12)


def test_units_that_nobody_reads_and_that_score_nothing_are_kept_in_their_order() -> None:
    found = order_units(torch.arange(3), torch.arange(3), [], torch.zeros(3).double())
    assert found.units.tolist() == [0, 1, 2]
    assert found.missing.tolist()[0] == 1
    assert bool(torch.isfinite(found.missing).all())


def test_no_units_have_an_order_too() -> None:
    found = order_units(torch.zeros(0).long(), torch.arange(3), [reading("a", torch.eye(3).double())], torch.zeros(0))
    assert found.units.tolist() == []
    assert found.missing.tolist() == [1]
