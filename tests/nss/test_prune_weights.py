"""Which weights each scheme masks, counted exactly, and iterative pruning row by row."""

from __future__ import annotations

import math
from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_helpers import counts, kept, network_of_shapes
from torch import nn

from nss.errors import PruneError
from nss.model import Classifier, model_digest
from nss.prune_weights import lamp_scores, prune_weights
from nss.weight_masks import count_masked, weight_masks

METHODS = ("lamp", "global", "uniform+", "erk")
shapes = st.lists(
    st.one_of(
        st.tuples(st.integers(1, 6), st.integers(1, 6)),
        st.tuples(st.integers(1, 5), st.integers(1, 5), st.integers(1, 3), st.integers(1, 3)),
    ),
    min_size=1,
    max_size=5,
)


def of_rows(*rows: list[float]) -> nn.Sequential:
    """Linear layers with one output each."""
    layers = [nn.Linear(len(row), 1) for row in rows]
    with torch.no_grad():
        for layer, row in zip(layers, rows, strict=True):
            layer.weight.copy_(torch.tensor([row]))
    return nn.Sequential(*layers)


def naive_lamp(row: list[float]) -> list[float]:
    """Equation 2 of the paper, term by term; of equal weights the later ones come first in the order."""
    order = sorted(range(len(row)), key=lambda index: (abs(row[index]), -index))
    return [
        row[u] ** 2 / math.fsum(row[v] ** 2 for v in order[order.index(u) :]) if row[u] else 0.0
        for u in range(len(row))
    ]


def naive_ranking(rows: list[list[float]], scores: list[list[float]], keep: int) -> list[list[bool]]:
    """The best of each layer, then the best of all."""
    chosen = [[False] * len(row) for row in rows]
    for layer, row in enumerate(rows):
        chosen[layer][max(range(len(row)), key=lambda index: (abs(row[index]), -index))] = True
    rest = [(layer, index) for layer, row in enumerate(rows) for index in range(len(row)) if not chosen[layer][index]]
    rest.sort(key=lambda place: (-scores[place[0]][place[1]], place))
    for layer, index in rest[: keep - len(rows)]:
        chosen[layer][index] = True
    return chosen


# -- scores and densities ----------------------------------------------------------------------------------------------


def test_lamp_scores_of_a_layer_worked_out_by_hand() -> None:
    found = lamp_scores(torch.tensor([3.0, 1.0, 2.0, 0.0], dtype=torch.float64))
    torch.testing.assert_close(found, torch.tensor([1.0, 1 / 14, 4 / 13, 0.0], dtype=torch.float64))
    assert found[0] == 1.0


@given(st.lists(st.floats(-1e3, 1e3, width=32), min_size=1, max_size=30))
@settings(deadline=None)
def test_lamp_scores_are_those_of_the_paper(row: list[float]) -> None:
    found = lamp_scores(torch.tensor(row, dtype=torch.float64).abs()).tolist()
    assert found == pytest.approx(naive_lamp(row), abs=1e-12)
    assert max(found) == (1.0 if any(row) else 0.0)


def test_lamp_scores_of_tiny_and_huge_weights_neither_vanish_nor_overflow() -> None:
    for scale in (1e-200, 1e200):
        found = lamp_scores(torch.tensor([1.0, 2.0], dtype=torch.float64) * scale)
        torch.testing.assert_close(found, torch.tensor([0.2, 1.0], dtype=torch.float64))


def test_lamp_keeps_many_digits_in_a_large_layer() -> None:
    """float32 sums lose the last of a million weights; the largest still scores exactly 1."""
    size = torch.ones(1_000_000, dtype=torch.float64)
    scores = lamp_scores(size)
    assert scores[0] == 1.0
    assert scores[-1] == 1e-6
    assert bool((scores[1:] < scores[:-1]).all())


@given(shapes, st.integers(0, 1000), st.floats(0, 0.99), st.sampled_from(["lamp", "global"]))
@settings(deadline=None, max_examples=60)
def test_lamp_and_global_mask_what_a_plain_ranking_of_all_weights_masks(
    sizes: list[tuple[int, ...]], seed: int, sparsity: float, method: str
) -> None:
    network = network_of_shapes(sizes, seed)
    rows = [layer.weight.detach().flatten().tolist() for layer in network]
    total = sum(map(len, rows))
    keep = total - round(sparsity * total)
    if keep < len(rows):
        with pytest.raises(PruneError, match="cannot mask"):
            prune_weights(network, method, sparsity)
        return
    scores = [naive_lamp(row) if method == "lamp" else [abs(weight) for weight in row] for row in rows]
    assert kept(prune_weights(network, method, sparsity)) == naive_ranking(rows, scores, keep)


def test_global_and_lamp_differ_where_a_layer_is_small_all_over() -> None:
    network = of_rows([10.0, 11.0, 12.0, 13.0], [0.1, 0.2, 0.3, 0.4])
    assert kept(prune_weights(network, "global", 0.5)) == [[False, True, True, True], [False, False, False, True]]
    assert kept(prune_weights(network, "lamp", 0.5)) == [[False, False, True, True], [False, False, True, True]]


def rigl_densities(sizes: list[tuple[int, ...]], keep: int) -> list[float]:
    """The loop of the papers: scale the raw densities to the budget, make dense what exceeds 1, and again."""
    raw = [sum(shape) / math.prod(shape) for shape in sizes]
    dense: set[int] = set()
    while True:
        left = keep - sum(math.prod(sizes[layer]) for layer in dense)
        scale = left / sum(raw[layer] * math.prod(sizes[layer]) for layer in range(len(sizes)) if layer not in dense)
        over = {layer for layer in range(len(sizes)) if layer not in dense and scale * raw[layer] > 1}
        if not over:
            return [1.0 if layer in dense else scale * raw[layer] for layer in range(len(sizes))]
        dense |= {max(over, key=lambda layer: raw[layer])}


def test_erk_densities_are_those_of_the_papers_and_counts_add_up() -> None:
    sizes = [(8, 3, 3, 3), (16, 8, 3, 3), (32, 16, 3, 3), (32, 16, 1, 1), (20, 32), (10, 20)]
    total = sum(map(math.prod, sizes))
    capped = set()
    for sparsity in (0.3, 0.5, 0.8, 0.95):
        pruned = prune_weights(network_of_shapes(sizes, 0), "erk", sparsity)
        keep = total - round(sparsity * total)
        densities = rigl_densities(sizes, keep)
        capped.add(sum(density == 1 for density in densities))
        assert sum(counts(pruned)) == keep
        for count, density, shape in zip(counts(pruned), densities, sizes, strict=True):
            assert abs(count - density * math.prod(shape)) < 1, (sparsity, shape)
    assert len(capped) > 1, "the excess over 1 was never redistributed"


def test_erk_shares_out_in_proportion_to_the_sum_of_the_shape() -> None:
    network = nn.Sequential(nn.Conv2d(4, 6, 3), nn.Linear(30, 50))
    assert counts(prune_weights(network, "erk", 1 - 96 / (216 + 1500))) == [16, 80]


def test_uniform_plus_keeps_the_first_convolution_and_a_fifth_of_the_last_layer() -> None:
    network = nn.Sequential(nn.Conv2d(1, 4, 5), nn.Conv2d(4, 10, 5), nn.Linear(50, 10), nn.Linear(20, 5))
    total = 100 + 1000 + 500 + 100
    assert counts(prune_weights(network, "uniform+", 1 - 900 / total)) == [100, 500, 250, 50]
    assert counts(prune_weights(network, "uniform+", 1 - 195 / total)) == [100, 50, 25, 20]


def test_uniform_plus_takes_the_first_convolution_not_a_linear_layer_before_it() -> None:
    network = nn.Sequential(nn.Linear(10, 10), nn.Conv2d(1, 10, 5), nn.Conv2d(1, 4, 5), nn.Linear(10, 10))
    assert counts(prune_weights(network, "uniform+", 150 / 550)) == [50, 250, 50, 50]


@pytest.mark.parametrize("method", METHODS)
@given(shapes, st.integers(0, 1000), st.floats(0, 0.9), st.floats(0.5, 1))
@settings(deadline=None, max_examples=40)
def test_the_share_masked_is_exact_no_layer_is_emptied_and_the_cap_holds(
    method: str, sizes: list[tuple[int, ...]], seed: int, sparsity: float, cap: float
) -> None:
    network = network_of_shapes(sizes, seed)
    total = sum(map(math.prod, sizes))
    floors = [max(1, math.ceil((1 - cap) * math.prod(shape) - 1e-6)) for shape in sizes]
    if method == "uniform+":
        floors[-1] = max(floors[-1], -(-math.prod(sizes[-1]) // 5))
        for index in [index for index, shape in enumerate(sizes) if len(shape) == 4][:1]:
            floors[index] = math.prod(sizes[index])
    if round(sparsity * total) > total - sum(floors):
        with pytest.raises(PruneError, match="cannot mask"):
            prune_weights(network, method, sparsity, cap=cap)
        return
    pruned = prune_weights(network, method, sparsity, cap=cap)
    assert count_masked(pruned) == round(sparsity * total) == total - sum(counts(pruned))
    assert all(count >= floor for count, floor in zip(counts(pruned), floors, strict=True))


@pytest.mark.parametrize("method", METHODS)
def test_what_was_kept_is_as_it_was_and_within_a_layer_the_largest_stay(networks: ModuleType, method: str) -> None:
    model = networks.zoo_model("lenet")
    pruned = prune_weights(model, method, 0.7)
    before, after = (dict(each.named_modules()) for each in (model, pruned))
    for name, mask in weight_masks(pruned).items():
        old, new = before[name].weight.detach(), after[name].weight.detach()
        assert torch.equal(new, torch.where(mask, old, torch.zeros(())))
        assert float(old[mask].abs().min()) >= float(old[~mask].abs().max())
        assert torch.equal(before[name].bias, after[name].bias)


def test_the_original_is_left_as_it_was(networks: ModuleType) -> None:
    model = networks.zoo_model("resnet20")
    before = model_digest(model)
    pruned = prune_weights(model, "lamp", 0.5)
    assert model_digest(model) == before
    assert count_masked(model) == 0
    assert isinstance(pruned, Classifier)
    assert pruned.spec.parent == before
    assert not pruned.training


# -- cases from the field ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_a_layer_a_thousand_times_smaller_keeps_what_the_cap_says(networks: ModuleType, method: str) -> None:
    pruned = prune_weights(networks.Three(), method, 0.8, cap=0.9)
    shares = [sum(row) / len(row) for row in kept(pruned)]
    assert min(shares) >= 0.1 - 1e-9
    if method == "global":
        assert kept(pruned)[1].count(True) == 2304 - 2073


def test_without_a_cap_global_leaves_one_weight_of_a_layer_a_thousand_times_smaller(networks: ModuleType) -> None:
    assert counts(prune_weights(networks.Three(), "global", 0.8))[1] == 1


@pytest.mark.parametrize("method", METHODS)
def test_an_all_zero_layer_keeps_one_weight_at_least(method: str) -> None:
    network = network_of_shapes([(4, 4), (3, 6), (4, 4)], 0)
    with torch.no_grad():
        network[1].weight.zero_()
    pruned = prune_weights(network, method, 0.6)
    assert count_masked(pruned) == 30
    assert counts(pruned)[1] >= 1
    if method in ("lamp", "global"):
        assert kept(pruned)[1] == [True] + [False] * 17


@pytest.mark.parametrize("method", METHODS)
def test_of_equal_weights_those_with_lower_indices_stay(method: str) -> None:
    network = nn.Sequential(nn.Linear(10, 2, bias=False))
    nn.init.constant_(network[0].weight, -0.5)
    assert kept(prune_weights(network, method, 0.25)) == [[True] * 15 + [False] * 5]


def test_masked_weights_count_and_never_come_back() -> None:
    network = network_of_shapes([(6, 8), (10, 6), (3, 10)], 1)
    for first in METHODS:
        once = prune_weights(network, first, 0.3)
        for second in METHODS:
            twice = prune_weights(once, second, 0.6)
            assert count_masked(twice) == round(0.6 * 138)
            for before, after in zip(kept(once), kept(twice), strict=True):
                assert all(old or not new for old, new in zip(before, after, strict=True))
    same = prune_weights(once, "lamp", 41 / 138)
    assert kept(same) == kept(once)


def test_masked_weights_go_before_zeros_that_are_not_masked() -> None:
    network = prune_weights(of_rows([1.0, 0.5, 3.0, 4.0], [1.0, 2.0, 3.0, 4.0]), "global", 0.125)
    with torch.no_grad():
        network[0].parametrizations.weight.original.copy_(torch.tensor([[0.0, 9.0, 0.0, 0.0]]))
    assert kept(prune_weights(network, "lamp", 0.25)) == [[True, False, True, False], [True] * 4]


def test_nothing_to_mask_is_a_plain_copy(networks: ModuleType) -> None:
    model = networks.zoo_model("lenet")
    assert model_digest(prune_weights(model, "lamp", 0.0)) == model_digest(model)
    assert weight_masks(prune_weights(model, "lamp", 0.0)) == {}


# -- refused -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"method": "magnitude"}, "'magnitude'"),
        ({"sparsity": 1.0}, "sparsity is 1.0"),
        ({"sparsity": -0.1}, "sparsity is -0.1"),
        ({"sparsity": math.nan}, "sparsity is nan"),
        ({"cap": 0.0}, "cap is 0.0"),
        ({"cap": 1.5}, "cap is 1.5"),
        ({"sparsity": 0.95, "cap": 0.9}, "lamp cannot mask"),
        ({"method": "uniform+", "sparsity": 0.999}, r"uniform\+ cannot mask"),
    ],
)
def test_what_cannot_be_done_is_refused_with_what_can(
    networks: ModuleType, wrong: dict[str, object], message: str
) -> None:
    with pytest.raises(PruneError, match=message) as caught:
        prune_weights(networks.zoo_model("lenet"), **wrong)
    assert caught.value.allowed


def test_the_range_that_an_error_names_can_be_reached() -> None:
    network = network_of_shapes([(6, 8), (10, 6), (3, 10)], 1)
    with pytest.raises(PruneError) as caught:
        prune_weights(network, "lamp", 0.99)
    most = float(caught.value.allowed.split(" to ")[1].split(",")[0])
    assert counts(prune_weights(network, "lamp", most)) == [1, 1, 1]


def test_less_than_is_masked_already_is_refused(networks: ModuleType) -> None:
    once = prune_weights(networks.zoo_model("lenet"), "lamp", 0.5)
    with pytest.raises(PruneError, match="cannot mask") as caught:
        prune_weights(once, "lamp", 0.4)
    assert "0.5 (masked already)" in caught.value.allowed


def test_weights_that_are_not_finite_are_refused_by_layer(networks: ModuleType) -> None:
    model = networks.zoo_model("lenet")
    with torch.no_grad():
        model.network.conv2.weight[0, 0, 0, 0] = math.nan
    with pytest.raises(PruneError, match="not finite") as caught:
        prune_weights(model)
    assert caught.value.where == "conv2"


def test_a_model_without_such_layers_and_a_weight_computed_from_others_are_refused() -> None:
    with pytest.raises(PruneError, match="no weights to prune"):
        prune_weights(nn.Sequential(nn.Flatten(), nn.BatchNorm1d(3)))
    network = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 2)))
    with pytest.raises(PruneError, match="computed from others"):
        prune_weights(network)
