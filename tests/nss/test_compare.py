"""Paired comparison: hand-made answers, the binomial by hand, the bootstrap by all resamples and by scipy."""

from __future__ import annotations

import itertools
import json
import math
from types import ModuleType

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import bootstrap
from torch.utils.data import DataLoader, TensorDataset

from nss.compare import Comparison, Pairs, Score, compare, compare_answers
from nss.data import Batch, Dataset
from nss.errors import ModelError, NssError

counts = st.integers(0, 12)
some = st.builds(lambda a, b, c, d: Pairs(a + b + c + d, a, b, c), counts, counts, counts, counts)
LABELS = torch.tensor([0, 0, 0, 1, 1, 2])
CHAMPION = torch.tensor([0, 0, 1, 1, 0, 1])
CANDIDATE = torch.tensor([0, 1, 0, 1, 1, 2])


def test_counts_by_class_and_by_batch_of_hand_made_answers() -> None:
    found = compare_answers(
        CHAMPION, CANDIDATE, LABELS, ("a", "b", "c"), batches={"first": 2, "second": 4}, confidence=0.9
    )
    assert found.overall == Pairs(6, both=2, only_champion=1, only_candidate=3)
    assert found.per_class == {"a": Pairs(3, 1, 1, 1), "b": Pairs(2, 1, 0, 1), "c": Pairs(1, 0, 0, 1)}
    assert found.per_batch == {"first": Pairs(2, 1, 1, 0), "second": Pairs(4, 1, 0, 3)}
    assert found.new_classes == {}
    assert (found.overall.champion_accuracy, found.overall.candidate_accuracy) == (3 / 6, 5 / 6)
    assert found.overall.difference == 2 / 6
    assert found.interval == found.overall.interval(0.9)
    assert found.worst_champion == ("c", 0.0)
    assert found.worst_candidate == ("a", 2 / 3)
    assert found.worst_change == ("a", 0.0)


def test_classes_that_only_the_candidate_knows_are_reported_apart() -> None:
    labels = torch.tensor([0, 0, 1, 2, 2, 2])
    champion = torch.tensor([[2.0, 1], [2, 1], [0, 1], [1, 0], [1, 0], [0, 1]])
    candidate = torch.tensor([[2.0, 1, 0], [1, 0, 2], [0, 1, 0], [0, 0, 1], [0, 0, 1], [1, 0, 0]])
    found = compare_answers(champion, candidate, labels, ("a", "b", "new"), batches={"old": 3, "arrived": 3})
    # The second image is answered by the new class: an old image that the candidate has lost.
    assert found.overall == Pairs(3, both=2, only_champion=1, only_candidate=0)
    assert set(found.per_class) == {"a", "b"}
    assert found.per_batch == {"old": found.overall}
    assert found.new_classes == {"new": Score(images=3, right=2)}
    assert found.new_classes["new"].accuracy == 2 / 3
    by_number = compare_answers(champion.argmax(1), candidate.argmax(1), labels, ("a", "b", "new"), known=2)
    assert (by_number.overall, by_number.new_classes) == (found.overall, found.new_classes)


def test_images_of_new_classes_alone_say_nothing_about_the_champion() -> None:
    found = compare_answers(torch.tensor([0]), torch.tensor([1]), torch.tensor([1]), ("a", "b"), known=1)
    assert found.overall.images == 0
    assert math.isnan(found.overall.difference)
    assert (found.interval, found.overall.p_value) == ((-1.0, 1.0), 1.0)
    assert (found.per_class, found.per_batch, found.worst_change[0]) == ({}, {}, "")
    plain = found.to_dict()
    assert plain["overall"]["difference"] is plain["worst_change"] is None
    assert json.loads(json.dumps(plain, allow_nan=False)) == plain


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_logits_that_are_not_finite_are_a_wrong_answer(value: float) -> None:
    logits = torch.tensor([[5.0, value], [5.0, 1.0]])
    found = compare_answers(torch.tensor([0, 0]), logits, torch.tensor([0, 0]), ("a", "b"))
    assert found.overall == Pairs(2, both=1, only_champion=1, only_candidate=0)
    first = compare_answers(logits, torch.tensor([0, 0]), torch.tensor([0, 0]), ("a", "b"))
    assert first.overall == Pairs(2, both=1, only_champion=0, only_candidate=1)


@given(pairs=some)
def test_mcnemar_is_the_binomial_by_hand(pairs: Pairs) -> None:
    b, c = pairs.only_candidate, pairs.only_champion
    chances = [math.comb(b + c, k) / 2 ** (b + c) for k in range(b + c + 1)]
    assert pairs.p_better == pytest.approx(sum(chances[b:]), rel=1e-9)
    assert pairs.p_worse == pytest.approx(sum(chances[c:]), rel=1e-9)
    assert pairs.p_value == pytest.approx(min(1, 2 * sum(chances[max(b, c) :])), rel=1e-9)


def test_no_image_that_tells_them_apart_is_no_difference_for_sure() -> None:
    same = Pairs(50, 40, 0, 0)
    assert (same.p_value, same.p_better, same.interval(), same.difference) == (1.0, 1.0, (0.0, 0.0), 0.0)


@given(
    images=st.lists(st.sampled_from([-1, 0, 1]), min_size=1, max_size=5),
    confidence=st.sampled_from([0.5, 0.8, 0.95]),
)
@settings(max_examples=40, deadline=None)
def test_the_interval_is_that_of_all_resamples(images: list[int], confidence: float) -> None:
    pairs = Pairs(len(images), images.count(0), images.count(-1), images.count(1))
    sums = sorted(sum(each) for each in itertools.product(images, repeat=len(images)))
    level = (1 - confidence) / 2
    low = next(v for v in sums if sum(s <= v for s in sums) / len(sums) >= level - 1e-12)
    high = next(v for v in reversed(sums) if sum(s >= v for s in sums) / len(sums) >= level - 1e-12)
    assert pairs.interval(confidence) == (low / len(images), high / len(images))


@pytest.mark.parametrize(("only_champion", "only_candidate"), [(20, 45), (9, 2), (30, 30)])
def test_the_interval_is_what_scipy_draws(only_champion: int, only_candidate: int) -> None:
    count = 400
    values = np.zeros(count)
    values[:only_champion], values[-only_candidate:] = -1, 1
    drawn = bootstrap(
        (values,), np.mean, n_resamples=20_000, batch=500, method="percentile", rng=np.random.default_rng(0)
    ).confidence_interval
    exact = Pairs(count, 0, only_champion, only_candidate).interval()
    assert exact == pytest.approx((drawn.low, drawn.high), abs=1.01 / count)


def test_the_interval_of_many_images_is_that_of_the_normal_distribution() -> None:
    pairs = Pairs(100_000, 70_000, 10_000, 11_000)
    deviation = math.sqrt((0.21 - 0.01**2) / pairs.images)
    assert pairs.interval() == pytest.approx((0.01 - 1.96 * deviation, 0.01 + 1.96 * deviation), abs=2e-5)


@given(pairs=some, confidence=st.floats(0.05, 0.99))
@settings(max_examples=60, deadline=None)
def test_swapped_models_give_the_mirrored_comparison(pairs: Pairs, confidence: float) -> None:
    mirror = Pairs(pairs.images, pairs.both, pairs.only_candidate, pairs.only_champion)
    assert mirror.p_value == pairs.p_value
    assert (mirror.p_better, mirror.p_worse) == (pairs.p_worse, pairs.p_better)
    low, high = pairs.interval(confidence)
    assert mirror.interval(confidence) == (-high, -low)
    assert low <= high
    if pairs.images:
        assert mirror.difference == -pairs.difference
        assert mirror.candidate_accuracy == pairs.champion_accuracy


@given(
    rows=st.lists(st.tuples(*[st.integers(0, 3)] * 3), min_size=1, max_size=20),
    known=st.integers(1, 4),
)
@settings(max_examples=60, deadline=None)
def test_a_comparison_comes_back_from_its_plain_json(rows: list[tuple[int, int, int]], known: int) -> None:
    before, after, labels = torch.tensor(rows).T
    found = compare_answers(
        before, after, labels, ("a", "b", "c", "d"), known=known, batches={"x": 1, "y": len(rows) - 1}
    )
    assert Comparison.from_dict(json.loads(json.dumps(found.to_dict(), allow_nan=False))) == found
    assert found.overall.images + sum(each.images for each in found.new_classes.values()) == len(rows)
    for parts in (found.per_class, found.per_batch):
        for name in ("images", "both", "only_champion", "only_candidate"):
            assert sum(getattr(each, name) for each in parts.values()) == getattr(found.overall, name)


def test_models_are_compared_on_the_batches_of_a_data_set(networks: ModuleType) -> None:
    first, second = (networks.zoo_model("lenet", seed) for seed in (0, 1))
    images, labels, split = networks.pictures(12), torch.arange(12) % 4, torch.zeros(12, dtype=torch.uint8)
    batches = tuple(
        Batch(name * 32, images[a:b], labels[a:b], split[a:b]) for name, a, b in (("0", 0, 5), ("1", 5, 12))
    )
    found = compare(first, second, Dataset(networks.CLASSES, networks.SHAPE, batches), batch_size=4)
    with torch.no_grad():
        rights = [model(images).argmax(1) == labels for model in (first, second)]
    assert found.overall.both == int((rights[0] & rights[1]).sum())
    assert found.overall.only_champion == int((rights[0] & ~rights[1]).sum())
    assert {name: each.images for name, each in found.per_batch.items()} == {"0" * 32: 5, "1" * 32: 7}
    assert compare(first, second, (images, labels)).per_batch == {}
    assert compare(first, first, (images, labels)).interval == (0.0, 0.0)


def test_models_whose_classes_do_not_continue_each_other_are_refused(networks: ModuleType) -> None:
    model, other = networks.zoo_model("lenet"), networks.zoo_model("lenet", classes=("bee", "ant", "cow"))
    data = networks.pictures(3), torch.tensor([0, 1, 2])
    with pytest.raises(ModelError, match="candidate's classes are bee, ant, cow"):
        compare(model, other, data)
    fewer = networks.zoo_model("lenet", classes=networks.CLASSES[:3])
    with pytest.raises(ModelError, match="candidate's classes are ant, bee, cow"):
        compare(model, fewer, data)
    assert compare(fewer, model, data).overall.images == 3
    table = networks.Answers([[1.0, 0], [0, 1]])
    with pytest.raises(ModelError, match="Answers does not say which classes it knows"):
        compare(table, table, (networks.numbered(2), torch.tensor([0, 1])))
    assert compare(table, table, (networks.numbered(2), torch.tensor([0, 1])), classes="ab").overall.both == 2


def test_images_in_another_order_for_each_model_are_refused(networks: ModuleType) -> None:
    model, labels = networks.zoo_model("lenet"), torch.arange(8) % 4
    data = TensorDataset(networks.pictures(8), labels)
    assert compare(model, model, DataLoader(data, batch_size=4)).overall.images == 8
    shuffled = DataLoader(data, batch_size=4, shuffle=True, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ModelError, match="another order"):
        compare(model, model, shuffled)


ONES = torch.ones(3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("champion", "candidate", "labels", "options", "message"),
    [
        (ONES[:0], ONES[:0], ONES[:0], {}, "no images to compare on"),
        (ONES[:2], ONES, ONES, {}, "2 and 3 answers, 3 labels"),
        (ONES, ONES, ONES, {"batches": {"a": 2}}, "2 images in batches"),
        (torch.ones(3, 2), torch.ones(3, 3), ONES, {}, r"\[3, 3\]"),
        (torch.ones(3, 1), torch.ones(3, 2), ONES, {"known": 2}, r"\[3, 1\]"),
        (ONES, ONES, ONES * 2, {}, "labels from 2 to 2"),
        (ONES, ONES, -ONES, {}, "labels from -1"),
        (ONES, ONES, ONES, {"known": 3}, "knows 3 of the classes"),
        (ONES, ONES, ONES, {"known": 0}, "knows 0 of the classes"),
        (ONES, ONES, ONES, {"confidence": 1.0}, "confidence is 1.0"),
        (ONES, ONES, ONES, {"confidence": float("nan")}, "confidence is nan"),
    ],
)
def test_answers_that_do_not_fit_are_refused(
    champion: torch.Tensor, candidate: torch.Tensor, labels: torch.Tensor, options: dict, message: str
) -> None:
    with pytest.raises(ModelError, match=message):
        compare_answers(champion, candidate, labels, ("a", "b"), **options)


@pytest.mark.parametrize("key", ["overall", "interval", "per_class", "per_batch", "new_classes", "confidence"])
def test_a_description_that_lacks_something_is_refused(key: str) -> None:
    content = compare_answers(CHAMPION, CANDIDATE, LABELS, ("a", "b", "c")).to_dict()
    for broken in ({name: value for name, value in content.items() if name != key}, {**content, key: None}):
        if key != "confidence" or key not in broken:
            with pytest.raises(NssError, match="lacks or garbles"):
                Comparison.from_dict(broken)
