"""Attacks: signed gradient steps within eps of the clean pixels, on images of 0..1 (cases.md 17)."""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from nss.attacks import BY_FOOLBOX, fgsm, foolbox_attack, pgd
from nss.base import train
from nss.errors import DataError, ModelError
from nss.evaluate import evaluate
from nss.model import Classifier, build_model

few = settings(max_examples=8, deadline=None)
MISSING = importlib.util.find_spec("foolbox") is None


class Linear(nn.Module):
    """Logits are two fixed sums of the pixels: the gradient of the loss is known."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([[1.0, -1.0, 2.0, 0.0], [0.0, 1.0, 1.0, 0.0]]))

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1) @ self.weight.T


IMAGES = torch.tensor([[0.5, 0.5, 0.05, 0.5], [0.98, 0.5, 0.5, 0.5]]).view(2, 1, 2, 2)


def test_fgsm_moves_every_pixel_by_eps_against_the_true_class_and_clips() -> None:
    # The loss of class 0 rises along the weights of class 1 minus its own, (-1, 2, -1, 0); that of class 1 falls.
    attacked = fgsm(Linear(), IMAGES, torch.tensor([0, 1]), 0.1)
    expected = torch.tensor([[0.4, 0.6, 0.0, 0.5], [1.0, 0.4, 0.6, 0.5]]).view(2, 1, 2, 2)
    torch.testing.assert_close(attacked, expected)


def test_pgd_without_a_random_start_is_repeated_small_steps_that_stop_at_eps() -> None:
    labels = torch.tensor([0, 1])
    two = pgd(Linear(), IMAGES, labels, 0.1, 2, 0.03, None)
    torch.testing.assert_close(two, fgsm(Linear(), IMAGES, labels, 0.06))
    torch.testing.assert_close(pgd(Linear(), IMAGES, labels, 0.1, 9, 0.03, None), fgsm(Linear(), IMAGES, labels, 0.1))


@given(eps=st.floats(0, 0.5), step=st.floats(0, 1), seed=st.integers(0, 99))
@few
def test_pgd_stays_within_eps_and_within_the_pixels(networks: ModuleType, eps: float, step: float, seed: int) -> None:
    model, images = networks.zoo_model("lenet"), networks.pictures(5, seed=seed)
    attacked = pgd(model, images, torch.arange(5) % 4, eps, 2, step, seed)
    assert float((attacked - images.float() / 255).abs().max()) <= eps + 1e-6
    assert 0 <= float(attacked.min()) <= float(attacked.max()) <= 1


@pytest.fixture(scope="module")
def trained(networks: ModuleType) -> Classifier:
    data = networks.coloured_data(240)
    model = build_model("nss.zoo:lenet", data.classes, data.image_shape, 0)
    train(model, data, 10, 0, batch_size=16)
    return model


def test_no_room_to_move_is_clean_accuracy_and_the_clean_images_exactly(
    networks: ModuleType, trained: Classifier
) -> None:
    data = networks.coloured_data(seed=1)
    for attacked in (
        fgsm(trained, data.images, data.labels, 0.0),
        pgd(trained, data.images, data.labels, 0.0, 3, 0.1, 0),
    ):
        assert torch.equal(attacked, data.images.float() / 255)
        clean = evaluate(trained, data)
        assert evaluate(trained, (attacked, data.labels)).confusion.equal(clean.confusion)


def test_more_room_and_more_steps_are_answered_worse(networks: ModuleType, trained: Classifier) -> None:
    data = networks.coloured_data(seed=1)
    loss = []
    for attacked in (
        data.images,
        fgsm(trained, data.images, data.labels, 0.1),
        pgd(trained, data.images, data.labels, 0.1, 10, 0.03, 0),
        pgd(trained, data.images, data.labels, 0.4, 10, 0.1, 0),
    ):
        with torch.no_grad():
            loss.append(float(F.cross_entropy(trained(attacked), data.labels)))
    assert loss == sorted(loss)
    assert evaluate(trained, data).accuracy == 1
    assert evaluate(trained, (pgd(trained, data.images, data.labels, 0.4, 10, 0.1, 0), data.labels)).accuracy < 0.5


def test_batches_make_no_difference_and_the_seed_decides_the_start(networks: ModuleType, trained: Classifier) -> None:
    data = networks.coloured_data(30)
    whole, again = (pgd(trained, data.images, data.labels, 0.2, 1, 0.0, 0, batch_size=size) for size in (30, 7))
    assert torch.equal(whole, again)
    assert not torch.equal(whole, pgd(trained, data.images, data.labels, 0.2, 1, 0.0, 1))
    assert float((whole - data.images.float() / 255).abs().max()) > 0.15


def test_the_model_is_left_as_it_was(networks: ModuleType) -> None:
    model = networks.zoo_model("vgg_small").train()
    model.network.features.eval()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    with torch.no_grad():
        attacked = fgsm(model, networks.pictures(3), torch.tensor([0, 1, 2]), 0.1)
    assert not attacked.requires_grad
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(parameter.grad, torch.ones_like(parameter)) for parameter in model.parameters())
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_no_images_stay_no_images(networks: ModuleType) -> None:
    none = networks.pictures(0)
    assert fgsm(networks.zoo_model("lenet"), none, torch.zeros(0, dtype=torch.int64), 0.1).shape == none.shape


def test_settings_and_images_out_of_range_are_refused(networks: ModuleType) -> None:
    model, labels = networks.zoo_model("lenet"), torch.tensor([0, 1])
    images = networks.pictures(2)
    for eps, steps, size in ((-0.1, 1, 0.1), (1.1, 1, 0.1), (0.1, 0, 0.1), (0.1, 1, 2.0), (float("nan"), 1, 0.1)):
        with pytest.raises(ModelError, match="eps"):
            pgd(model, images, labels, eps, steps, size, 0)
    for wrong in (images[:1], images.float(), -images.float() / 255, images.float() / 0, images[0]):
        with pytest.raises(DataError):
            fgsm(model, wrong, labels, 0.1)


def test_without_foolbox_the_error_says_how_to_get_it(networks: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "foolbox", None)
    with pytest.raises(ModelError, match="pip install foolbox, or use fgsm or pgd"):
        foolbox_attack(networks.zoo_model("lenet"), networks.pictures(2), torch.tensor([0, 1]), "deepfool")
    with pytest.raises(ModelError, match="'jsma'"):
        foolbox_attack(networks.zoo_model("lenet"), networks.pictures(2), torch.tensor([0, 1]), "jsma")


@pytest.mark.skipif(MISSING, reason="foolbox is not installed")
@pytest.mark.parametrize("name", BY_FOOLBOX)
def test_foolbox_finds_near_images_that_are_answered_wrong(
    networks: ModuleType, trained: Classifier, name: str
) -> None:
    data = networks.coloured_data(8, seed=1)
    attacked = foolbox_attack(trained, data.images, data.labels, name, batch_size=10)
    assert attacked.shape == data.images.shape
    assert 0 <= float(attacked.min()) <= float(attacked.max()) <= 1
    assert evaluate(trained, (attacked, data.labels)).accuracy < 0.3
    far = pgd(trained, data.images, data.labels, 1.0, 1, 1.0, None)
    clean = data.images.float() / 255
    assert float((attacked - clean).square().sum()) < 0.5 * float((far - clean).square().sum())
