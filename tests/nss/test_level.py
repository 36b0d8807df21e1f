"""Levelling: the worst class gains, the whole loses nothing, and nothing but the head's bias moves."""

from __future__ import annotations

import copy
import logging
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import nss
from nss.errors import ModelError
from nss.level import FEWEST, STEP, STEPS, level_offsets
from nss.model import Classifier


def plainly(logits: np.ndarray[Any, Any], labels: list[int]) -> list[float]:
    """What levelling is, image by image: raise the worst class until that costs an answer more than it brings."""
    classes = range(logits.shape[1])

    def answered(raised: list[float]) -> tuple[int, list[float]]:
        right = [0 for _ in classes]
        for row, label in zip(logits, labels, strict=True):
            scores = [row[each] + raised[each] for each in classes]
            right[label] += scores.index(max(scores)) == label
        return sum(right), [right[each] / labels.count(each) for each in classes]

    best = raised = [0.0 for _ in classes]
    start, shares = answered(raised)
    worst = min(shares)
    for _ in range(STEPS):
        lowest = shares.index(min(shares))
        raised = [value + STEP * (each == lowest) for each, value in enumerate(raised)]
        total, shares = answered(raised)
        if total < start:
            return best
        if min(shares) > worst:
            worst, best = min(shares), raised
    return best


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 5), st.integers(1, 12))
def test_offsets_are_those_found_image_by_image(seed: int, classes: int, each: int) -> None:
    generator = np.random.default_rng(seed)
    labels = [label for label in range(classes) for _ in range(each)]
    # Sixteenths, as the steps are: ties occur, and no sum is rounded.
    logits = generator.integers(-24, 24, (len(labels), classes)) / 16 + np.eye(classes)[labels]
    found = level_offsets(torch.tensor(logits, dtype=torch.float32), torch.tensor(labels))
    assert found.tolist() == plainly(logits, labels)


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


def test_one_image_at_the_border_is_won_by_one_step() -> None:
    logits, labels = torch.tensor([[1.0, 0.95], [2.0, 0.0], [0.0, 2.0]]), torch.tensor([1, 0, 1])
    assert level_offsets(logits, labels).tolist() == [0.0, STEP]


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
            self.conv.bias.zero_()  # type: ignore[union-attr]
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


def test_a_class_with_few_held_out_images_keeps_all_as_they_are(caplog: pytest.LogCaptureFixture) -> None:
    model = built()
    before = copy.deepcopy(model.state_dict())
    with caplog.at_level(logging.WARNING):
        assert nss.level_classes(model, held_out(FEWEST - 1)) == {}
    assert "fewer than 50 held-out images" in caplog.text
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert nss.level_classes(model, held_out(FEWEST - 1), least=FEWEST - 1)


@pytest.mark.parametrize("model", [built(bias=False), built(Shouting)], ids=["no bias", "something after the head"])
def test_logits_that_are_not_of_a_layer_with_a_bias_stay(model: Classifier, caplog: pytest.LogCaptureFixture) -> None:
    before = copy.deepcopy(model.state_dict())
    with caplog.at_level(logging.WARNING):
        assert nss.level_classes(model, held_out()) == {}
    assert "not those of one layer with a bias" in caplog.text
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_unknown_labels_are_refused() -> None:
    images, labels = held_out()[0]
    with pytest.raises(ModelError, match="labels up to 2") as caught:
        nss.level_classes(built(), [(images, labels + 1)])
    assert caught.value.allowed == "0 to 1: one a class"


def test_levelling_can_be_told_to_restructure() -> None:
    model, images = built(), held_out()
    found = nss.profile(model, images, ("taylor",))
    slices = nss.semantic_slices(nss.critical_neurons(found, "taylor"), found)
    smaller = nss.restructure(model, slices, images, found, params=0.9, held_out=images, level=True)
    assert [point.name for point in smaller.report] == ["original", "refitted", "levelled"]
    refitted, levelled = smaller.report[1:]
    assert list(smaller.offsets) == ["b"]
    assert smaller.to_dict()["offsets"] == smaller.offsets
    assert levelled.accuracy is not None
    assert levelled.accuracy == nss.evaluate(smaller.model, images).accuracy >= (refitted.accuracy or 0)
