"""One gradient step and what it is taken on."""

from __future__ import annotations

import math
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

from nss.data import Dataset
from nss.errors import ModelError
from nss.steps import first_of_each, sgd, step, training_images


def linear() -> nn.Linear:
    layer = nn.Linear(2, 2).double()
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
        layer.bias.zero_()
    return layer


IMAGES = torch.tensor([[2.0, 0.0], [0.0, 1.0], [0.0, 3.0]]).double()
LABELS = torch.tensor([0, 0, 1])


def cross_entropy(logits: list[float], share: list[float]) -> float:
    total = sum(math.exp(each) for each in logits)
    return -sum(p * math.log(math.exp(each) / total) for p, each in zip(share, logits, strict=True))


def test_a_step_answers_with_the_loss_and_the_right_answers_before_it() -> None:
    layer = linear()
    loss, right = step(layer, IMAGES, LABELS, *sgd(layer.parameters(), 10, 0.1, 0.0))
    by_hand = [cross_entropy([2, 0], [1, 0]), cross_entropy([0, 1], [1, 0]), cross_entropy([0, 3], [0, 1])]
    assert loss == pytest.approx(sum(by_hand) / 3)
    assert right == 2
    assert not torch.equal(layer.weight, linear().weight)


def test_a_teacher_is_half_of_the_loss() -> None:
    layer = linear()
    soft = torch.tensor([[0.0, 0.0], [math.log(3), 0.0], [0.0, math.log(9)]]).double()
    shares = [[0.5, 0.5], [0.75, 0.25], [0.1, 0.9]]
    loss, _ = step(layer, IMAGES, LABELS, *sgd(layer.parameters(), 10, 0.1, 0.0), soft)
    hard = sum(cross_entropy(row, [1 - label, label]) for row, label in zip(IMAGES.tolist(), [0, 0, 1], strict=True))
    taught = sum(cross_entropy(row, share) for row, share in zip(IMAGES.tolist(), shares, strict=True))
    assert loss == pytest.approx((hard + taught) / 6)


def test_only_what_requires_a_gradient_is_optimised() -> None:
    layer = linear()
    layer.bias.requires_grad_(False)
    optimizer, _ = sgd(layer.parameters(), 1, 0.1, 0.0)
    assert [id(each) for group in optimizer.param_groups for each in group["params"]] == [id(layer.weight)]
    for nothing in (layer.requires_grad_(False), nn.ReLU()):
        with pytest.raises(ModelError, match="no parameter requires a gradient"):
            sgd(nothing.parameters(), 1, 0.1, 0.0)


class Auxiliary(nn.Module):
    """Answers with further logits in training mode, as GoogLeNet does."""

    def __init__(self) -> None:
        super().__init__()
        self.main = linear()

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        logits = self.main(x)
        return (logits, logits) if self.training else logits


def test_a_network_that_answers_more_than_logits_in_training_is_refused_before_anything_moves() -> None:
    network = Auxiliary()
    with pytest.raises(ModelError, match="Auxiliary answers a tuple in training mode") as caught:
        step(network, IMAGES, LABELS, *sgd(network.parameters(), 10, 0.1, 0.0))
    assert caught.value.allowed == "one tensor, logits [n, classes]"
    assert 'arguments={"aux_logits": False}' in caught.value.fix
    assert torch.equal(network.main.weight, linear().weight)
    step(network.eval(), IMAGES, LABELS, *sgd(network.parameters(), 10, 0.1, 0.0))


@pytest.mark.parametrize("labels", [[0, 1, 2], [0, -1, 1]])
def test_labels_without_a_logit_are_refused_before_anything_moves(labels: list[int]) -> None:
    layer = linear()
    with pytest.raises(ModelError, match="labels") as caught:
        step(layer, IMAGES, torch.tensor(labels), *sgd(layer.parameters(), 10, 0.1, 0.0))
    assert "0 to 1" in caught.value.allowed
    assert torch.equal(layer.weight, linear().weight)


def test_a_loss_that_is_not_finite_is_refused_before_anything_moves() -> None:
    layer = linear()
    with pytest.raises(ModelError, match="not finite"):
        step(layer, IMAGES * math.inf, LABELS, *sgd(layer.parameters(), 10, 0.1, 0.0))
    assert torch.equal(layer.weight, linear().weight)
    with pytest.raises(ModelError, match="not finite"):
        step(layer, IMAGES, LABELS, *sgd(layer.parameters(), 10, 0.1, 0.0), torch.full((3, 2), math.nan))
    assert torch.equal(layer.weight, linear().weight)


def test_gradients_of_earlier_steps_are_forgotten() -> None:
    fresh, used = linear(), linear()
    used(IMAGES).sum().backward()
    for layer in (fresh, used):
        step(layer, IMAGES, LABELS, *sgd(layer.parameters(), 10, 0.1, 0.0))
    assert torch.equal(fresh.weight, used.weight)


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5, 40])
def test_the_learning_rate_starts_at_a_25th_and_lasts_for_all_steps(steps: int) -> None:
    layer = linear()
    optimizer, schedule = sgd(layer.parameters(), steps, 0.5, 0.0)
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        step(layer, IMAGES, LABELS, optimizer, schedule)
    assert rates[0] == pytest.approx(0.02)
    assert all(0 < rate <= 0.5 for rate in rates)
    if steps >= 4:
        assert max(rates) > 0.25
        assert rates[-1] < 0.01


@pytest.mark.parametrize(
    ("steps", "rate", "decay"),
    [
        (0, 0.1, 0.0),
        (-3, 0.1, 0.0),
        (5, 0.0, 0.0),
        (5, -0.1, 0.0),
        (5, math.inf, 0.0),
        (5, math.nan, 0.0),
        (5, 0.1, -1e-9),
        (5, 0.1, math.nan),
        (5, 0.1, math.inf),
    ],
)
def test_settings_out_of_range_are_refused(steps: int, rate: float, decay: float) -> None:
    with pytest.raises(ModelError, match="learning_rate") as caught:
        sgd(linear().parameters(), steps, rate, decay)
    assert "steps from 1" in caught.value.allowed


def test_images_to_train_on_are_the_train_split_or_all_there_is(networks: ModuleType) -> None:
    data = networks.coloured_data(24)
    train = data.split("train")
    images, labels = training_images(data)
    assert torch.equal(images, train.images)
    assert torch.equal(labels, train.labels)
    images, labels = training_images((data.images, data.labels))
    assert torch.equal(images, data.images)
    batches = [(data.images[:10], data.labels[:10]), (data.images[10:], data.labels[10:])]
    for found, wanted in zip(training_images(batches), (data.images, data.labels), strict=True):
        assert torch.equal(found, wanted)
    assert images.dtype == torch.uint8
    assert labels.dtype == torch.int64


def test_no_images_are_refused(networks: ModuleType) -> None:
    data = networks.coloured_data(24)
    nothing: list[tuple[Tensor, Tensor]] = []
    untrained = Dataset(data.classes, data.image_shape, (data.batches[0].part("test"),))
    for empty in (nothing, (torch.zeros(0, 1, 8, 8), torch.zeros(0).long()), untrained):
        with pytest.raises(ModelError, match="no images to train on"):
            training_images(empty)


def test_the_first_images_of_each_category_are_chosen_in_their_order() -> None:
    labels = torch.tensor([2, 0, 2, 2, 0, 1, 2, 0])
    images = torch.arange(8)
    assert [each.tolist() for each in first_of_each(images, labels, 2)] == [[0, 1, 2, 4, 5], [2, 0, 2, 0, 1]]
    assert first_of_each(images, labels, 1)[0].tolist() == [0, 1, 5]
    assert first_of_each(images, labels, 100)[0].tolist() == list(range(8))
    assert first_of_each(images, labels, 0)[0].tolist() == []
    assert len(first_of_each(images[:0], labels[:0], 3)[0]) == 0
