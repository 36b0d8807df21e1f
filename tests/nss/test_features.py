"""Penultimate features: what the class head reads, as a hook sees it."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

from nss.features import penultimate_features
from nss.model import Classifier, ModelSpec


def last_linear(network: nn.Module) -> nn.Linear:
    return [module for module in network.modules() if isinstance(module, nn.Linear)][-1]


def hooked(model: nn.Module, head: nn.Module, images: Tensor) -> Tensor:
    seen: list[Tensor] = []
    handle = head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        model(images)
    handle.remove()
    return seen[0]


def without_head() -> nn.Module:
    """Its scores are means of maps."""
    return nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())


@pytest.mark.parametrize("name", ["lenet", "vgg_small", "resnet20"])
def test_features_are_what_the_head_reads(networks: ModuleType, name: str) -> None:
    model, images = networks.zoo_model(name), networks.pictures(7)
    found = penultimate_features(model, images, batch_size=3)
    assert torch.allclose(found, hooked(model, last_linear(model.network), images), atol=1e-5)
    assert found.dtype == torch.float32
    assert not found.requires_grad


def test_a_plain_module_has_features_too_and_is_left_in_its_mode(networks: ModuleType) -> None:
    network = networks.DropThenAdd().train()
    images = networks.floats(5, (1, 8, 8))
    found = penultimate_features(network, images, input_shape=(1, 8, 8))
    assert network.training
    assert torch.allclose(found, hooked(network.eval(), network.head, images), atol=1e-6)


def test_where_no_single_layer_makes_the_scores_they_are_the_features(networks: ModuleType) -> None:
    images = networks.floats(5, (3, 8, 8))
    for network in (without_head(), networks.Branching()):
        with torch.no_grad():
            expected = network(images[:2]), network(images[2:4]), network(images[4:])
        found = penultimate_features(network, images, input_shape=(3, 8, 8), batch_size=2)
        assert torch.allclose(found, torch.cat(expected), atol=1e-6)


def test_scores_that_stand_in_are_those_of_normalised_images(networks: ModuleType) -> None:
    spec = ModelSpec("tiny:network", networks.CLASSES, (3, 8, 8), (0.5,) * 3, (0.25,) * 3)
    images = networks.pictures(5, (3, 8, 8))
    for network in (networks.Branching(), without_head()):
        model = Classifier(network, spec).eval()
        with torch.no_grad():
            assert torch.equal(penultimate_features(model, images), model(images))


def test_no_images_have_no_features(networks: ModuleType) -> None:
    assert len(penultimate_features(networks.zoo_model("lenet"), networks.pictures(0))) == 0
