"""Training: the same every time, learning what can be learned, refusing what cannot work."""

from __future__ import annotations

import math
import random
from types import ModuleType

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nss.base import Epoch, require_logits, train
from nss.data import Dataset
from nss.errors import ModelError, NssError
from nss.model import Classifier, build_model, model_digest


def fresh(name: str = "lenet", seed: int = 0) -> Classifier:
    return build_model(f"nss.zoo:{name}", ("ant", "bee"), (1, 8, 8), seed)


def trained(data: Dataset, seed: int, name: str = "lenet") -> str:
    model = fresh(name)
    train(model, data, epochs=2, seed=seed, batch_size=8)
    return model_digest(model)


@pytest.mark.parametrize("name", ["lenet", "vgg_small"])
def test_the_same_seed_gives_bit_identical_weights_and_another_seed_does_not(networks: ModuleType, name: str) -> None:
    data = networks.coloured_data()
    first = trained(data, 1, name)
    torch.manual_seed(99)  # whatever happened before in this process
    torch.rand(5)
    assert trained(data, 1, name) == first
    assert trained(data, 2, name) != first


def test_each_epoch_is_a_line_of_the_log(networks: ModuleType, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "nss"):
        history = train(fresh(), networks.coloured_data(), epochs=2, seed=1, batch_size=8)
    assert [record.getMessage() for record in caplog.records] == [
        f"epoch {each.epoch} of 2: loss {each.loss:.4f}, validation accuracy {each.val_accuracy:.4f}"
        for each in history
    ]


def test_dropout_follows_the_seed_too(networks: ModuleType) -> None:
    def run(seed: int) -> str:
        torch.manual_seed(0)
        network = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 2))
        images, labels = networks.floats(32, (1, 8, 8)), torch.arange(32) % 2
        torch.manual_seed(seed)
        train(network, (images, labels), epochs=1, seed=5, batch_size=32)
        return model_digest(network)

    assert run(1) == run(2)


def test_the_state_of_all_random_generators_stays_as_it_was(networks: ModuleType) -> None:
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    trained(networks.coloured_data(), 3)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.random.get_state()[1].tolist() == before[1]
    assert random.getstate() == before[2]


def test_a_model_learns_what_can_be_learned_and_ends_in_evaluation_mode(networks: ModuleType) -> None:
    model = fresh()
    history = train(model, networks.coloured_data(120), epochs=4, seed=0, batch_size=16)
    assert [each.epoch for each in history] == [1, 2, 3, 4]
    assert history[-1].loss < history[0].loss
    assert history[-1].train_accuracy >= 0.95
    assert history[-1].val_accuracy >= 0.95
    assert not any(module.training for module in model.modules())


def test_only_the_train_split_is_trained_on_and_the_val_split_validates(networks: ModuleType) -> None:
    data = networks.coloured_data(60)
    train_part, val = data.split("train"), data.split("val")
    whole, part = fresh(), fresh()
    history = train(whole, data, epochs=1, seed=4, batch_size=8)
    blind = train(part, (train_part.images, train_part.labels), epochs=1, seed=4, batch_size=8)
    assert model_digest(whole) == model_digest(part)
    with torch.no_grad():
        right = (whole(val.images).argmax(1) == val.labels).double().mean()
    assert history[0].val_accuracy == pytest.approx(float(right))
    assert math.isnan(blind[0].val_accuracy)


def one_cycle(step: int, total: int, highest: float) -> float:
    """Smith 2018 in its usual form: 30 % of the steps up from 1/25, then down to 1/250,000, along half cosines."""
    turn, last = 0.3 * total - 1, total - 1
    low, high, share = highest / 25, highest, step / turn
    if step > turn:
        low, high, share = highest, highest / 25 / 1e4, (step - turn) / (last - turn)
    return high + (low - high) * (1 + math.cos(math.pi * share)) / 2


def test_training_is_sgd_with_nesterov_momentum_and_weight_decay_under_one_cycle() -> None:
    """Ten epochs of one batch each, so that the order of the images makes no difference."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(4, 2)).double()
    images, labels = torch.randn(6, 1, 2, 2).double(), torch.tensor([0, 1, 1, 0, 1, 0])
    weights = [parameter.detach().clone().requires_grad_() for parameter in network.parameters()]
    speeds: list[Tensor | None] = [None, None]
    losses = []
    for step in range(10):
        loss = F.cross_entropy(images.flatten(1) @ weights[0].T + weights[1], labels)
        losses.append(float(loss.detach()))
        gradients = torch.autograd.grad(loss, weights)
        for index, (weight, gradient) in enumerate(zip(weights, gradients, strict=True)):
            decayed = gradient + 0.01 * weight.detach()
            before = speeds[index]
            speed = decayed if before is None else 0.9 * before + decayed
            speeds[index] = speed
            with torch.no_grad():
                weight -= one_cycle(step, 10, 0.1) * (decayed + 0.9 * speed)
    history = train(network, (images, labels), epochs=10, seed=0, batch_size=6, learning_rate=0.1, weight_decay=0.01)
    assert [each.loss for each in history] == pytest.approx(losses, abs=1e-9)
    for expected, found in zip(weights, network.parameters(), strict=True):
        torch.testing.assert_close(found.detach(), expected.detach(), atol=1e-9, rtol=0)


def test_a_single_step_moves_the_weights_by_more_than_rounding(networks: ModuleType) -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 2))
    before = network[1].weight.detach().clone()
    train(network, (networks.floats(8, (1, 8, 8)), torch.arange(8) % 2), epochs=1, seed=0, learning_rate=0.1)
    assert float((network[1].weight.detach() - before).abs().max()) > 1e-4


def test_images_that_do_not_fill_the_last_batch_are_left_out_and_few_images_are_one_batch(
    networks: ModuleType,
) -> None:
    seen: list[int] = []
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 2))
    network.register_forward_pre_hook(lambda _m, inputs: seen.append(len(inputs[0])))
    data = networks.floats(11, (1, 8, 8)), torch.arange(11) % 2
    train(network, data, epochs=2, seed=0, batch_size=4)
    assert seen == [4, 4, 4, 4]
    seen.clear()
    train(network, data, epochs=1, seed=0, batch_size=64)
    assert seen == [11]


def test_every_epoch_visits_the_images_in_another_order(networks: ModuleType) -> None:
    orders: list[list[float]] = []
    network = nn.Sequential(nn.Flatten(), nn.Linear(1, 2))
    network.register_forward_pre_hook(lambda _m, inputs: orders.append(inputs[0].flatten().tolist()))
    train(network, (networks.numbered(9), torch.arange(9) % 2), epochs=2, seed=0, batch_size=9, learning_rate=1e-3)
    assert sorted(orders[0]) == sorted(orders[1]) == [float(i) for i in range(9)]
    assert orders[0] != orders[1]


def test_a_loss_that_is_not_finite_any_more_stops_training(networks: ModuleType) -> None:
    images, labels = networks.floats(8, (1, 8, 8)), torch.arange(8) % 2
    images[3] = float("nan")
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 2))
    with pytest.raises(ModelError, match="the loss is not finite any more") as caught:
        train(network, (images, labels), epochs=1, seed=0, batch_size=8)
    assert "learning rate" in caught.value.fix
    assert not network.training


@pytest.mark.parametrize(
    "wrong",
    [
        {"epochs": 0},
        {"epochs": -1},
        {"batch_size": 0},
        {"learning_rate": 0.0},
        {"learning_rate": float("nan")},
        {"weight_decay": -1e-4},
    ],
)
def test_settings_out_of_range_are_refused_before_anything_is_trained(
    networks: ModuleType, wrong: dict[str, float]
) -> None:
    model = fresh()
    before = model_digest(model)
    with pytest.raises(ModelError, match=next(iter(wrong))):
        train(model, networks.coloured_data(24), **{"epochs": 1, "seed": 0, "batch_size": 8, **wrong})
    assert model_digest(model) == before


def test_no_images_are_refused(networks: ModuleType) -> None:
    with pytest.raises(ModelError, match="no images to train on"):
        train(fresh(), (torch.zeros(0, 1, 8, 8), torch.zeros(0, dtype=torch.int64)), epochs=1, seed=0)
    with pytest.raises(ModelError, match="no images to train on"):
        train(fresh(), [], epochs=1, seed=0)


def test_labels_that_the_model_has_no_logit_for_are_refused(networks: ModuleType) -> None:
    with pytest.raises(NssError):
        train(fresh(), (networks.pictures(4, (1, 8, 8)), torch.tensor([0, 1, 2, 0])), epochs=1, seed=0)


def test_an_epoch_is_plain_numbers() -> None:
    assert Epoch(1, 0.5, 0.75, 1.0) == Epoch(epoch=1, loss=0.5, train_accuracy=0.75, val_accuracy=1.0)


class Answering(nn.Module):
    """Answers `outputs` numbers an image, as they are or wrapped."""

    def __init__(self, outputs: int, kind: type = Tensor) -> None:
        super().__init__()
        self.head, self.norm, self.kind = nn.Linear(64, outputs), nn.BatchNorm1d(outputs), kind

    def forward(self, images: Tensor) -> object:
        logits = self.norm(self.head(images.flatten(1)))
        if self.kind is Tensor:
            return logits
        return {"logits": logits} if self.kind is dict else (logits, logits)


@pytest.mark.parametrize(
    ("network", "what", "fix"),
    [
        (Answering(10), r"the network answers \[2, 10\], the data has 2 classes", "last layer `num_classes` outputs"),
        (Answering(1), r"the network answers \[2, 1\], the data has 2 classes", "last layer `num_classes` outputs"),
        (Answering(2, dict), "the network answers a dict", "return the logits alone"),
        (Answering(2, tuple), "the network answers a tuple", "return the logits alone"),
        (nn.Sequential(nn.Flatten(), nn.Linear(63, 2)), r"the network does not take a \(1, 8, 8\) image", "--resize"),
    ],
)
def test_a_network_that_does_not_answer_one_logit_a_class_is_refused(network: nn.Module, what: str, fix: str) -> None:
    model = Classifier(network, fresh().spec)
    with pytest.raises(ModelError, match=what) as caught:
        require_logits(model)
    assert (caught.value.where, fix in caught.value.fix) == ("nss.zoo:lenet", True)


class Auxiliary(Answering):
    """Answers with a second head's logits too, in training mode."""

    def forward(self, images: Tensor) -> object:
        logits = F.dropout(self.norm(self.head(images.flatten(1))), training=self.training)
        return (logits, logits) if self.training else logits


def test_a_network_that_answers_more_than_logits_in_training_is_refused_before_it_is_trained() -> None:
    model = Classifier(Auxiliary(2), fresh().spec).eval()
    before, state = model_digest(model), torch.get_rng_state()
    with pytest.raises(ModelError, match="Auxiliary answers a tuple in training mode"):
        require_logits(model)
    assert model_digest(model) == before
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(module.training for module in model.modules())


class Failing(Answering):
    """Takes no image of this size in training mode."""

    def forward(self, images: Tensor) -> object:
        if self.training:
            raise ValueError("too small to crop")
        return super().forward(images)


def test_what_a_network_raises_in_training_mode_is_said_in_words() -> None:
    model = Classifier(Failing(2), fresh().spec)
    with pytest.raises(ModelError, match=r"does not take a \(1, 8, 8\) image: too small to crop"):
        require_logits(model)


def test_looking_at_the_answer_of_a_network_leaves_it_as_it_was() -> None:
    model = Classifier(Answering(2), fresh().spec)
    before = model_digest(model)
    require_logits(model)
    assert model_digest(model) == before
    assert all(module.training for module in model.modules())
