"""Levelling: the worst class gains, the whole loses nothing, and nothing but the head's bias moves."""

from __future__ import annotations

import copy
import logging
import sys
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import nss
from nss.errors import ModelError
from nss.level import FEWEST, STEP, STEPS, level_offsets
from nss.mask import ChannelMask
from nss.model import Classifier

Images = list[tuple[Tensor, Tensor]]


def plainly(logits: np.ndarray[Any, Any], labels: list[int]) -> list[float]:
    """What levelling is, image by image: raise the worst class, and keep the best that costs no answer."""
    classes = range(logits.shape[1])

    def answered(raised: list[float]) -> tuple[int, list[float]]:
        right = [0 for _ in classes]
        for row, label in zip(logits, labels, strict=True):
            scores = [row[each] + raised[each] for each in classes]
            right[label] += scores.index(max(scores)) == label
        return sum(right), [right[each] / labels.count(each) for each in classes]

    gaps = sorted(sorted(row)[-1] - sorted(row)[-2] for row in logits.tolist())
    step = gaps[(len(gaps) - 1) // 2] / 128
    best = raised = [0.0 for _ in classes]
    start, shares = answered(raised)
    worst = min(shares)
    for _ in range(STEPS):
        lowest = shares.index(min(shares))
        raised = [value + step * (each == lowest) for each, value in enumerate(raised)]
        total, shares = answered(raised)
        if total < 0.98 * start:
            return best
        if total >= start and min(shares) > worst:
            worst, best = min(shares), raised
    return best


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 5), st.integers(1, 30))
def test_offsets_are_those_found_image_by_image(seed: int, classes: int, each: int) -> None:
    generator = np.random.default_rng(seed)
    labels = [label for label in range(classes) for _ in range(each)]
    # Sixteenths, and steps of a 2048th part of one: ties occur, and no sum is rounded.
    logits = generator.integers(-24, 24, (len(labels), classes)) / 16 + np.eye(classes)[labels]
    found = level_offsets(torch.tensor(logits, dtype=torch.float32), torch.tensor(labels))
    assert found.tolist() == plainly(logits, labels)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([2.0**-9, 0.125, 64.0]))
def test_offsets_grow_with_the_logits(seed: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(3).repeat(30)
    logits = torch.randn(90, 3, generator=generator) + nn.functional.one_hot(labels, 3) * torch.tensor([2, 2, 0.5])
    assert torch.equal(level_offsets(scale * logits, labels), scale * level_offsets(logits, labels))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000))
def test_the_worst_class_never_loses_and_neither_does_the_whole(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(4).repeat(25)
    logits = torch.randn(100, 4, generator=generator) + nn.functional.one_hot(labels, 4) * torch.tensor([2, 2, 2, 0.5])

    def scored(raised: Tensor) -> tuple[float, float]:
        right = (raised.argmax(1) == labels).double()
        return float(right.mean()), min(float(right[labels == each].mean()) for each in range(4))

    offsets = level_offsets(logits, labels)
    (accuracy, worst), (levelled, raised) = scored(logits), scored(logits + offsets)
    assert levelled >= accuracy
    assert raised > worst if offsets.any() else raised == worst
    assert bool((offsets >= 0).all())


def test_an_image_near_the_border_is_won_by_as_many_steps_as_it_takes() -> None:
    # The median gap is 2, so a step is a 64th: 0.05 is passed by the fourth.
    logits, labels = torch.tensor([[1.0, 0.95], [2.0, 0.0], [0.0, 2.0]]), torch.tensor([1, 0, 1])
    assert level_offsets(logits, labels).tolist() == [0.0, 4 * 2 * STEP]


def test_a_single_image_lost_on_the_way_does_not_end_the_search() -> None:
    # First class 1 wins one of class 0, then two of its own; 98 more that nobody doubts make up half of each class.
    doubted = [[1.0, 0.9], [1.0, 0.7], [1.0, 0.7]]
    logits = torch.tensor(doubted + [[4.0, 0.0]] * 49 + [[0.0, 4.0]] * 49)
    labels = torch.tensor([0, 1, 1] + [0] * 49 + [1] * 49)
    offsets = level_offsets(logits, labels)
    assert 0.3 < float(offsets[1]) <= 0.3 + 4 * STEP
    answers = (logits + offsets).argmax(1)
    assert (answers != labels).nonzero().flatten().tolist() == [0]


def test_what_would_cost_an_answer_is_not_taken() -> None:
    # The step that wins an image of class 1 loses two of class 0.
    logits = torch.tensor([[1.0, 0.97], [1.0, 0.97], [1.0, 0.97], [3.0, 0.0], [0.0, 3.0]])
    labels = torch.tensor([1, 0, 0, 0, 1])
    assert level_offsets(logits, labels).tolist() == [0.0, 0.0]


def test_equal_classes_are_left_alone_and_the_search_ends() -> None:
    logits, labels = torch.eye(3) * 100, torch.arange(3)
    assert level_offsets(logits, labels).tolist() == [0.0, 0.0, 0.0]


def test_logits_that_are_not_finite_are_left_alone() -> None:
    logits, labels = torch.tensor([[1.0, 0.95], [2.0, float("nan")], [0.0, 2.0]]), torch.tensor([1, 0, 1])
    assert level_offsets(logits, labels).tolist() == [0.0, 0.0]


class Lopsided(nn.Module):
    """Answers by two pixels of an image; the second class is answered too rarely."""

    def __init__(self, num_classes: int, *, bias: bool = True) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 1)
        self.head = nn.Linear(8, num_classes, bias=bias)
        with torch.no_grad():
            self.conv.weight.copy_(torch.tensor([1.0, 0.0]).view(2, 1, 1, 1))
            assert self.conv.bias is not None
            self.conv.bias.zero_()
            self.head.weight.zero_()
            self.head.weight[0, 0] = self.head.weight[1, 1] = 1.0
            if bias:
                self.head.bias.copy_(torch.tensor([0.3, 0.0]))

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.conv(images).relu().flatten(1))
        return logits


class Shouting(Lopsided):
    """Something comes after the head."""

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images) * 2


class Twice(Lopsided):
    """The head is called twice."""

    def forward(self, images: Tensor) -> Tensor:
        features = self.conv(images).relu().flatten(1)
        logits: Tensor = self.head(features + self.head(features).mean())
        return logits


def built(network: type[nn.Module] = Lopsided, **arguments: Any) -> Classifier:
    factory = f"{__name__}:{network.__name__}"
    return nss.build_model(factory, ["a", "b"], (1, 2, 2), seed=0, arguments=arguments, allow=["tests"])


def held_out(each: int = FEWEST) -> list[tuple[Tensor, Tensor]]:
    """Images of two classes, alike but for the place of the brighter pixel, some of which are nearly even."""
    labels = torch.arange(2).repeat(each)
    gap = torch.linspace(20, 200, each).repeat_interleave(2)
    images = torch.zeros(2 * each, 1, 2, 2)
    images.view(2 * each, 4)[torch.arange(2 * each), labels] = gap
    return [(images.to(torch.uint8), labels)]


def test_only_the_bias_of_the_head_moves_and_the_worst_class_gains() -> None:
    model, images = built(), held_out()
    before, start = copy.deepcopy(model), nss.evaluate(model, images)
    offsets = nss.level_classes(model, images)
    after = nss.evaluate(model, images)
    assert list(offsets) == ["b"]
    assert start.worst_class == "b"
    assert after.per_class["b"] > start.per_class["b"]
    assert after.accuracy >= start.accuracy
    moved = [name for name, value in model.state_dict().items() if not torch.equal(value, before.state_dict()[name])]
    assert moved == ["network.head.bias"]
    difference = model(images[0][0]) - before(images[0][0])
    expected = torch.tensor([0.0, offsets["b"]]).expand_as(difference)
    torch.testing.assert_close(difference, expected, rtol=0, atol=1e-5)


def unmoved(model: Classifier, caplog: pytest.LogCaptureFixture, images: Images, **settings: Any) -> str:
    """Level, see that nothing came of it, and return what the log says."""
    before = copy.deepcopy(model.state_dict())
    with caplog.at_level(logging.WARNING):
        assert nss.level_classes(model, images, **settings) == {}
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    return caplog.text


def test_a_class_with_few_held_out_images_keeps_all_as_they_are(caplog: pytest.LogCaptureFixture) -> None:
    images, labels = held_out()[0]
    assert "'b' has 49 held-out images, fewer than 50" in unmoved(built(), caplog, [(images[:-1], labels[:-1])])
    assert nss.level_classes(built(), [(images[:-1], labels[:-1])], least=FEWEST - 1)


@pytest.mark.parametrize(
    ("network", "arguments", "why"),
    [
        (Lopsided, {"bias": False}, "'head', which makes the logits, has no bias"),
        (Shouting, {}, "the logits are not those of one layer that is called once"),
        (Twice, {}, "the logits are not those of one layer that is called once"),
    ],
)
def test_logits_that_are_not_of_a_layer_with_a_bias_stay(
    network: type[nn.Module], arguments: dict[str, Any], why: str, caplog: pytest.LogCaptureFixture
) -> None:
    assert why in unmoved(built(network, **arguments), caplog, held_out())


def test_what_the_bias_cannot_hold_is_not_claimed(caplog: pytest.LogCaptureFixture) -> None:
    model = built()
    with torch.no_grad():
        model.network.head.bias += 1e8  # its next number is 8 further
    assert "no offset raises the worst class" in unmoved(model, caplog, held_out())


def test_nothing_to_gain_is_said(caplog: pytest.LogCaptureFixture) -> None:
    model, images = built(), held_out()
    nss.level_classes(model, images)
    while nss.level_classes(model, images):
        pass
    assert "no offset raises the worst class at the same accuracy" in unmoved(model, caplog, images)


def test_unknown_labels_are_refused() -> None:
    images, labels = held_out()[0]
    for moved, said in ((labels + 1, "labels up to 2, from 1,"), (labels - 1, "labels up to 0, from -1,")):
        with pytest.raises(ModelError, match=said) as caught:
            nss.level_classes(built(), [(images, moved)])
        assert caught.value.allowed == "0 to 1: a, b"


def test_what_is_no_model_of_nss_is_refused_and_so_is_a_view_of_another() -> None:
    plain: Any = nn.Linear(2, 2)
    with pytest.raises(ModelError, match="Linear is no model of nss"):
        nss.level_classes(plain, held_out())
    with pytest.raises(ModelError, match="least is 0"):
        nss.level_classes(built(), held_out(), least=0)
    model = built()
    model.network.add_module("mask", ChannelMask(torch.tensor([True, False]), dim=1))
    with pytest.raises(ModelError, match="a masked view has the weights of the model that it is of"):
        nss.level_classes(model, held_out())
    shared = built()
    shared.network.head.bias = shared.network.conv.bias
    with pytest.raises(ModelError, match="'conv' and 'head' share a weight"):
        nss.level_classes(shared, held_out())


def test_images_may_come_once_only_and_in_another_order_each_time() -> None:
    images, labels = held_out()[0]
    once, shuffled = built(), built()
    wanted = nss.level_classes(built(), [(images, labels)])
    assert wanted
    assert nss.level_classes(once, iter([(images, labels)])) == wanted
    loader = DataLoader(TensorDataset(images, labels), batch_size=20, shuffle=True)
    assert nss.level_classes(shuffled, loader) == wanted


def known(model: Classifier, images: Images) -> tuple[nss.SemanticSlices, nss.Profile]:
    found = nss.profile(model, images, ("taylor",))
    return nss.semantic_slices(nss.critical_neurons(found, "taylor"), found), found


def test_levelling_can_be_told_to_restructure() -> None:
    model, images = built(), held_out()
    slices, found = known(model, images)
    smaller = nss.restructure(model, slices, images, found, params=0.9, held_out=images, level=True)
    assert [point.name for point in smaller.report] == ["original", "refitted", "levelled"]
    refitted, levelled = smaller.report[1:]
    assert list(smaller.offsets) == ["b"]
    assert smaller.to_dict()["offsets"] == smaller.offsets
    assert levelled.accuracy is not None
    assert levelled.accuracy == nss.evaluate(smaller.model, images).accuracy >= (refitted.accuracy or 0)


def ruined(model: Classifier, _: object) -> dict[str, float]:
    with torch.no_grad():
        model.network.head.bias[1] += 100
    return {"b": 100.0}


def test_a_budget_of_accuracy_is_judged_before_levelling(monkeypatch: pytest.MonkeyPatch) -> None:
    """Offsets are chosen by the very images that are judged on."""
    model, images = built(), held_out()
    slices, found = known(model, images)
    module = sys.modules["nss.restructure"]
    budget: Any = {"max_accuracy_drop": 0.0, "held_out": images}
    plain = nss.restructure(model, slices, images, found, **budget)
    monkeypatch.setattr(module, "level_classes", ruined)
    levelled = nss.restructure(model, slices, images, found, level=True, **budget)
    assert levelled.plan == plain.plan
    assert [point.name for point in levelled.report] == ["original", "refitted", "levelled"]


def test_levelling_comes_after_fine_tuning_and_without_held_out_images_nothing_moves(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model, images = built(), held_out()
    slices, found = known(model, images)
    tuned: Any = {"params": 0.9, "fine_tune_steps": 1, "learning_rate": 1e-9, "level": True}
    smaller = nss.restructure(model, slices, images, found, held_out=images, **tuned)
    assert [point.name for point in smaller.report] == ["original", "refitted", "fine-tuned", "levelled"]
    with caplog.at_level(logging.WARNING):
        unseen = nss.restructure(model, slices, images, found, **tuned)
    assert unseen.offsets == {}
    assert "not levelled: there are no held-out images" in caplog.text
