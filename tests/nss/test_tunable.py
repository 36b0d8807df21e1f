"""Which neurons are tuned: critical in the slices of the new samples, worth most by weight, within one budget."""

from __future__ import annotations

import copy
from types import ModuleType

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nss.errors import ReadaptError
from nss.freeze import freeze
from nss.model import model_digest
from nss.moments import gains, moments_of
from nss.profile import Profile, profile
from nss.sites import find_sites
from nss.size import count_parameters
from nss.slice import SemanticSlice, SemanticSlices
from nss.tunable import tunable_neurons

LAYERS = (nn.Conv2d, nn.Linear)


def slices_of(
    classes: tuple[str, ...], groups: list[tuple[int, ...]], neurons: list[dict[str, Tensor]]
) -> SemanticSlices:
    """Slices made by hand."""
    made = [
        SemanticSlice(f"slice-{number}", tuple(classes[index] for index in group), group, masks)
        for number, (group, masks) in enumerate(zip(groups, neurons, strict=True))
    ]
    size = len(classes)
    return SemanticSlices(classes, tuple(made), np.zeros((size, size)), np.zeros((size - 1, 4)))


def all_critical(network: nn.Module, shape: tuple[int, ...], classes: tuple[str, ...]) -> SemanticSlices:
    whole = {site.name: torch.ones(len(site), dtype=torch.bool) for site in find_sites(network, shape)}
    return slices_of(classes, [tuple(range(len(classes)))], [whole])


def known(model: nn.Module, images: Tensor, shape: tuple[int, ...], classes: tuple[str, ...]) -> Profile:
    """What windows see together, of a model that is made by hand too."""
    data = (images, torch.arange(len(images)) % len(classes))
    return profile(model, data, ("avg",), classes=classes, input_shape=shape, gram=False, windows=1)


def worth(model: nn.Module, found: Profile, layers: list[str], images: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """What each row is worth by weight, of layers that no norm follows: one backward over all samples."""
    twin = copy.deepcopy(model).eval()
    F.cross_entropy(twin(images), labels).backward()
    values = {}
    for name in layers:
        layer = twin.network.get_submodule(name)
        count = len(layer.weight)
        moments = moments_of(found.window(name), layer, torch.arange(count), shifted=True)
        gradient = torch.cat([layer.weight.grad.flatten(1), layer.bias.grad[:, None]], 1)
        values[name] = gains(gradient, moments, count) / (layer.weight[0].numel() + 1)
    return values


@pytest.mark.parametrize("share", [0.05, 0.4])
@pytest.mark.parametrize("name", ["lenet", "vgg_small", "resnet20", "mobilenet_small"])
def test_no_more_weights_are_trained_than_the_share_and_not_a_neuron_fewer(
    networks: ModuleType, name: str, share: float
) -> None:
    model = networks.zoo_model(name, 1)
    slices = all_critical(model.network, networks.SHAPE, model.spec.classes)
    found = known(model, networks.pictures(16), networks.SHAPE, model.spec.classes)
    free = tunable_neurons(model, slices, networks.pictures(8), torch.arange(8) % 4, share, found)
    weights = count_parameters(model)
    largest = max(module.weight[0].numel() + 3 for module in model.modules() if isinstance(module, LAYERS))
    assert share * weights - largest < count_parameters(freeze(model, free)) <= share * weights


def test_a_neuron_that_is_critical_in_no_affected_slice_is_never_tuned(networks: ModuleType) -> None:
    model = networks.zoo_model("lenet")
    sizes = {"conv1": 16, "conv2": 32, "fc1": 120, "fc2": 84}
    first = {layer: torch.arange(size) < size // 2 for layer, size in sizes.items()}
    second = {layer: ~mask for layer, mask in first.items()}
    slices = slices_of(model.spec.classes, [(0, 1), (2, 3)], [first, second])
    images = networks.pictures(12)
    found = known(model, images, networks.SHAPE, model.spec.classes)
    only_first = tunable_neurons(model, slices, images, torch.arange(12) % 2, 1.0, found)
    for layer, mask in only_first.items():
        allowed = first.get(layer, torch.tensor([True, True, False, False]))
        assert not bool((mask & ~allowed).any())
        assert bool(mask.any())
    named = tunable_neurons(model, slices, images, torch.arange(12) % 4, 1.0, found, categories=["cow"])
    for layer, mask in named.items():
        assert not bool((mask & ~second.get(layer, torch.tensor([False, False, True, True]))).any())


def test_a_neuron_counts_by_the_share_of_the_samples_in_whose_slice_it_is_critical(networks: ModuleType) -> None:
    model = networks.zoo_model("lenet")
    sizes = {"conv1": 16, "conv2": 32, "fc1": 120, "fc2": 84}
    first = {layer: torch.arange(size) % 2 == 0 for layer, size in sizes.items()}
    both = {layer: torch.ones(size, dtype=torch.bool) for layer, size in sizes.items()}
    slices = slices_of(model.spec.classes, [(0,), (1, 2, 3)], [both, first])
    images, labels = networks.pictures(20), torch.tensor([0] * 4 + [1, 2, 3, 1] * 4)
    found = known(model, images, networks.SHAPE, model.spec.classes)
    free = tunable_neurons(model, slices, images, labels, 0.15, found)
    scores = worth(model, found, list(sizes), images, labels)
    weighted = {layer: score * torch.where(first[layer], 1.0, 0.2) for layer, score in scores.items()}
    taken = torch.cat([weighted[layer][free[layer]] for layer in sizes])
    left = torch.cat([weighted[layer][~free[layer]] for layer in sizes])
    assert float(taken.min()) >= float(left.max()) * (1 - 1e-5)


def test_of_many_samples_some_of_each_class_tell_and_count_as_many_as_there_are(networks: ModuleType) -> None:
    model = networks.zoo_model("lenet")
    slices = all_critical(model.network, networks.SHAPE, model.spec.classes)
    # 250 in all, of two classes 125 each: every fourth of the 500 of class 0, all 100 of class 3.
    labels = torch.cat([torch.zeros(400), torch.full((100,), 3), torch.zeros(100)]).long()
    images = networks.pictures(600)
    told = torch.cat([torch.arange(3, 400, 4), torch.arange(400, 500), torch.arange(503, 600, 4)])
    others = torch.ones(600, dtype=torch.bool)
    others[told] = False
    found = known(model, networks.pictures(20, seed=5), networks.SHAPE, model.spec.classes)
    free = tunable_neurons(model, slices, images, labels, 0.1, found)
    blank = torch.where(others[:, None, None, None], torch.zeros_like(images), images)
    again = tunable_neurons(model, slices, blank, labels, 0.1, found)
    assert all(torch.equal(mask, again[layer]) for layer, mask in free.items())
    written_out = torch.cat([told] + [told[labels[told] == 0]] * 3)
    scores = worth(model, found, list(free), images[written_out], labels[written_out])
    taken = torch.cat([scores[layer][mask] for layer, mask in free.items()])
    left = torch.cat([scores[layer][~mask] for layer, mask in free.items()])
    assert float(taken.min()) >= float(left.max()) * (1 - 1e-5)


def test_the_model_is_left_as_it_was(networks: ModuleType) -> None:
    model = networks.zoo_model("resnet20").train()
    model.network.head.requires_grad_(False)
    digest = model_digest(model)
    slices = all_critical(model.network, networks.SHAPE, model.spec.classes)
    found = known(model, networks.pictures(8), networks.SHAPE, model.spec.classes)
    tunable_neurons(model, slices, networks.pictures(4), torch.arange(4), 0.3, found)
    assert model_digest(model) == digest
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not model.network.head.weight.requires_grad


def test_a_layer_called_twice_is_chosen_once(networks: ModuleType) -> None:
    network = networks.Twice()
    slices = all_critical(network, (1, 6, 6), ("a", "b"))
    images = networks.floats(8, (1, 6, 6))
    found = known(network, images, (1, 6, 6), ("a", "b"))
    free = tunable_neurons(network, slices, images, torch.arange(8) % 2, 0.6, found)
    assert torch.equal(free["shared"], free["shared#2"])
    trained = count_parameters(freeze(network, free, (1, 6, 6)))
    assert trained <= 0.6 * count_parameters(network)


def test_slices_of_another_model_and_budgets_for_nothing_are_refused(networks: ModuleType) -> None:
    model = networks.zoo_model("lenet")
    images, labels = networks.pictures(4), torch.arange(4)
    found = known(model, images, networks.SHAPE, model.spec.classes)
    for other, message in (("vgg_small", "not of this model"), ("lenet", "not enough for one neuron")):
        slices = all_critical(networks.zoo_model(other).network, networks.SHAPE, model.spec.classes)
        with pytest.raises(ReadaptError, match=message):
            tunable_neurons(model, slices, images, labels, 1e-5, found)
    shorter = slices_of(model.spec.classes, [(0, 1, 2, 3)], [{"conv1": torch.ones(15, dtype=torch.bool)}])
    with pytest.raises(ReadaptError, match="not of this model"):
        tunable_neurons(model, shorter, images, labels, 0.5, found)
