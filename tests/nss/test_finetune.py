"""Fine-tuning: exactly so many steps, the same every time, from labels and, when there is one, from a teacher."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from nss.base import train
from nss.errors import ModelError
from nss.finetune import batches, fine_tune
from nss.model import Classifier, build_model, model_digest
from nss.remove import remove


def fresh(name: str = "lenet", seed: int = 0) -> Classifier:
    return build_model(f"nss.zoo:{name}", ("ant", "bee"), (1, 8, 8), seed)


@pytest.fixture
def counted() -> Iterator[list[float]]:
    """The learning rate of every step that any optimizer takes."""
    rates: list[float] = []
    handle = register_optimizer_step_post_hook(lambda optimizer, *_: rates.append(optimizer.param_groups[0]["lr"]))
    yield rates
    handle.remove()


@pytest.mark.parametrize("steps", [1, 3, 7, 25])
def test_so_many_steps_are_taken_of_so_many_images(networks: ModuleType, counted: list[float], steps: int) -> None:
    sizes: list[int] = []
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 2))
    network.register_forward_pre_hook(lambda _m, inputs: sizes.append(len(inputs[0])))
    images, labels = networks.floats(20, (1, 8, 8)), torch.arange(20) % 2
    fine_tune(network, (images, labels), steps, 0, batch_size=6, learning_rate=0.1)
    assert len(counted) == steps
    assert sizes == [6] * steps
    assert counted[0] == pytest.approx(0.1 / 25)
    if steps == 25:
        assert max(counted) == pytest.approx(0.1, rel=0.05)
        assert counted[-1] < 1e-3


def test_batches_are_one_new_order_after_the_other_without_their_rests() -> None:
    generator = torch.Generator().manual_seed(3)
    rows = list(batches(10, 8, 3, generator))
    assert [len(each) for each in rows] == [3] * 8
    orders = [torch.cat(rows[start : start + 3]).tolist() for start in (0, 3)]
    for order in orders:
        assert len(set(order)) == 9
        assert set(order) <= set(range(10))
    assert orders[0] != orders[1]
    again = list(batches(10, 8, 3, torch.Generator().manual_seed(3)))
    assert all(torch.equal(left, right) for left, right in zip(rows, again, strict=True))
    assert [sorted(each.tolist()) for each in batches(4, 2, 100, generator)] == [[0, 1, 2, 3]] * 2


@pytest.mark.parametrize("name", ["lenet", "resnet20"])
def test_the_same_seed_gives_bit_identical_weights_and_another_seed_does_not(networks: ModuleType, name: str) -> None:
    data, teacher = networks.coloured_data(), fresh("lenet", 5)

    def run(seed: int) -> str:
        torch.rand(seed + 1)  # whatever happened before in this process
        model = fresh(name)
        fine_tune(model, data, 4, seed, batch_size=8, teacher=teacher)
        return model_digest(model)

    assert run(1) == run(1)
    assert run(1) != run(2)


def test_dropout_follows_the_seed_and_random_generators_stay_as_they_were(networks: ModuleType) -> None:
    def run(seed: int) -> str:
        torch.manual_seed(0)
        network = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.Dropout(0.5), nn.Linear(16, 2))
        torch.manual_seed(seed)
        state = torch.get_rng_state()
        fine_tune(network, (networks.floats(16, (1, 8, 8)), torch.arange(16) % 2), 2, 5)
        assert torch.equal(torch.get_rng_state(), state)
        return model_digest(network)

    assert run(1) == run(2)


def one_step(weight: Tensor, gradient: Tensor, rate: float, decay: float) -> Tensor:
    """Nesterov momentum .9 on the first step, at a 25th of the highest learning rate."""
    decayed = gradient + decay * weight
    return weight - rate / 25 * (decayed + 0.9 * decayed)


def head(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(4, 3, bias=False)).double()


@pytest.mark.parametrize("taught", ["by nobody", "by itself", "by another"])
def test_the_first_step_is_that_of_the_loss_by_hand(networks: ModuleType, taught: str) -> None:
    """Cross entropy of probabilities p with q has the gradient p - q: none when the teacher is the model itself."""
    network = head(0)
    teacher = {"by nobody": None, "by itself": copy.deepcopy(network), "by another": head(1)}[taught]
    images, labels = networks.floats(6, (1, 2, 2)).double(), torch.tensor([0, 1, 2, 2, 1, 0])
    x, weight = images.flatten(1), network[1].weight.detach().clone()
    p = (x @ weight.T).softmax(1)
    error = p - F.one_hot(labels, 3)
    if taught == "by itself":
        error = error / 2
    elif teacher is not None:
        error = (error + p - (x @ teacher[1].weight.detach().T).softmax(1)) / 2
    expected = one_step(weight, error.T @ x / 6, 0.5, 0.01)
    fine_tune(network, (images, labels), 1, 0, learning_rate=0.5, weight_decay=0.01, teacher=teacher)
    torch.testing.assert_close(network[1].weight.detach(), expected)


def test_a_teacher_answers_as_in_evaluation_and_is_left_as_it_was(networks: ModuleType) -> None:
    data = networks.coloured_data()
    teacher = fresh("resnet20", 3).train()
    teacher.network.blocks[2].eval()
    modes = [module.training for module in teacher.modules()]
    before = model_digest(teacher)
    model, other = fresh(), fresh()
    fine_tune(model, data, 3, 0, batch_size=8, teacher=teacher)
    assert model_digest(teacher) == before
    assert [module.training for module in teacher.modules()] == modes
    assert all(parameter.grad is None for parameter in teacher.parameters())
    fine_tune(other, data, 3, 0, batch_size=8, teacher=copy.deepcopy(teacher).eval())
    assert model_digest(model) == model_digest(other)


def test_a_model_learns_what_its_teacher_knows_though_labels_say_nothing(networks: ModuleType) -> None:
    data = networks.coloured_data(120)
    teacher = fresh(seed=1)
    fine_tune(teacher, data, 60, 0, batch_size=16, learning_rate=0.05)
    images = data.split("train").images
    with torch.no_grad():
        known = teacher(images).argmax(1)
    assert float((known == data.split("train").labels).double().mean()) > 0.95
    noise = torch.randint(0, 2, (len(images),), generator=torch.Generator().manual_seed(0))
    model = fresh(seed=2)
    fine_tune(model, (images, noise), 60, 0, batch_size=16, learning_rate=0.05, teacher=teacher)
    with torch.no_grad():
        assert float((model(images).argmax(1) == known).double().mean()) > 0.9


def test_a_model_ends_in_evaluation_mode_and_learned_from_the_train_split_alone(networks: ModuleType) -> None:
    data = networks.coloured_data(60)
    whole, part = fresh("resnet20"), fresh("resnet20")
    fine_tune(whole.train(), data, 3, 4, batch_size=8)
    train = data.split("train")
    fine_tune(part.eval(), (train.images, train.labels), 3, 4, batch_size=8)
    assert model_digest(whole) == model_digest(part)
    assert not any(module.training for module in whole.modules())
    assert not torch.equal(whole.network.stem[1].running_mean, fresh("resnet20").network.stem[1].running_mean)


def test_frozen_weights_stay(networks: ModuleType) -> None:
    model = fresh()
    model.network.conv1.requires_grad_(False)
    before = model.network.conv1.weight.clone()
    fine_tune(model, networks.coloured_data(), 3, 0, batch_size=8)
    assert torch.equal(model.network.conv1.weight, before)
    assert not torch.equal(model.network.fc1.weight, fresh().network.fc1.weight)


@pytest.mark.parametrize("verb", ["fine_tune", "train"])
def test_a_model_without_a_weight_to_train_is_refused_and_left_as_it_is(networks: ModuleType, verb: str) -> None:
    model = fresh("resnet20").eval().requires_grad_(False)
    before = model_digest(model)
    with pytest.raises(ModelError, match="no parameter requires a gradient") as caught:
        {"fine_tune": fine_tune, "train": train}[verb](model, networks.coloured_data(), 1, 0)
    assert caught.value.fix == "model.requires_grad_(True)"
    assert model_digest(model) == before
    assert not model.training


def test_a_network_that_was_cut_is_trained_on(networks: ModuleType) -> None:
    model = fresh("mobilenet_small")
    smaller = remove(model, networks.coupled_masks(model.network, (1, 8, 8), 1, 0.5))
    before = model_digest(smaller)
    fine_tune(smaller, networks.coloured_data(), 2, 0, batch_size=8, teacher=model)
    assert model_digest(smaller) != before


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("steps", 0),
        ("steps", -1),
        ("learning_rate", 0.0),
        ("learning_rate", -0.1),
        ("learning_rate", math.inf),
        ("learning_rate", math.nan),
        ("weight_decay", -1e-4),
        ("batch_size", 0),
        ("batch_size", -8),
    ],
)
def test_settings_out_of_range_are_refused_before_anything_is_trained(
    networks: ModuleType, name: str, value: float
) -> None:
    model = fresh().eval()
    before = model_digest(model)
    with pytest.raises(ModelError, match=name):
        fine_tune(model, networks.coloured_data(24), **{"steps": 1, "seed": 0, name: value})
    assert model_digest(model) == before
    assert not model.training


def test_labels_without_a_logit_and_no_images_are_refused_and_nothing_moves(networks: ModuleType) -> None:
    model = fresh()
    before = model_digest(model)
    with pytest.raises(ModelError, match="labels"):
        fine_tune(model, (networks.pictures(4, (1, 8, 8)), torch.tensor([0, 1, 2, 0])), 1, 0)
    assert not model.training
    with pytest.raises(ModelError, match="no images to train on"):
        fine_tune(model, [], 1, 0)
    assert model_digest(model) == before
