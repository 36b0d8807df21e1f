"""What a smaller network would cost: equal to what the network that is really cut costs."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
import torchvision
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from nss.cost import cost_model
from nss.errors import ModelError
from nss.model import model_digest
from nss.remove import remove
from nss.sites import find_sites
from nss.size import count_macs, count_parameters
from nss.units import find_units

RGB = (3, 6, 6)
few = settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def choose(network: nn.Module, shape: tuple[int, ...], seed: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Keep units at random, a different share in each group and at least one in each layer.

    Returns the channels that stay and the neurons.
    """
    generator = torch.Generator().manual_seed(seed)
    sites = find_sites(network, shape)
    units = find_units(sites)
    kept = ~units.removable
    for group in units.groups:
        share = float(torch.rand((), generator=generator))
        kept[group.units] = torch.rand(len(group.units), generator=generator) < share
    for site in sites:
        if not bool(kept[units.of[site.ids]].any()):
            kept[units.of[site.ids[0]]] = True
    stay = units.channels(kept)
    return stay, {site.name: stay[site.ids] for site in sites}


def check(model: nn.Module, shape: tuple[int, ...], seed: int) -> None:
    """The cost of a random choice is that of the network that is cut to it."""
    stay, neurons = choose(getattr(model, "network", model), shape, seed)
    cost = cost_model(model, input_shape=shape)
    smaller = remove(model, neurons, shape)
    assert (cost.macs(stay), cost.parameters(stay)) == (count_macs(smaller, shape), count_parameters(smaller))
    assert cost.parameters(stay) < count_parameters(model)
    whole = torch.ones_like(stay)
    assert (cost.macs(whole), cost.parameters(whole)) == (count_macs(model, shape), count_parameters(model))


@pytest.mark.parametrize("name", ["lenet", "vgg_small", "resnet20", "mobilenet_small"])
@given(seed=st.integers(0, 10_000))
@few
def test_the_cost_is_that_of_the_network_that_is_cut(networks: ModuleType, name: str, seed: int) -> None:
    check(networks.zoo_model(name, 0), networks.SHAPE, seed)


@pytest.mark.parametrize("name", ["densenet121", "mobilenet_v3_small", "shufflenet_v2_x0_5"])
def test_the_cost_is_that_of_torchvision_models_that_are_cut(name: str) -> None:
    torch.manual_seed(0)
    check(getattr(torchvision.models, name)(num_classes=10), (3, 32, 32), 3)


@pytest.mark.parametrize("name", ["Grouped", "Squeeze", "Concat", "Residual", "OneRelu", "Three", "Stacked"])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_cost_is_that_of_tiny_networks_that_are_cut(networks: ModuleType, name: str, seed: int) -> None:
    shape = (1, 6, 6) if name in ("OneRelu", "Three") else RGB
    check(getattr(networks, name)(), shape, seed)


def test_groups_positions_and_biases_are_counted_as_by_hand(networks: ModuleType) -> None:
    """Conv1x1(3, 16), Conv3x3(16, 16, groups=2) and a head of 4, on 6x6."""
    network = networks.Grouped()
    sites = find_sites(network, RGB)
    cost = cost_model(network, sites, RGB)
    whole = torch.ones(len(sites.anatomy.classes), dtype=torch.bool)
    assert cost.macs(whole) == (16 * 3 + 16 * 16 * 9 // 2) * 36 + 16 * 4
    assert cost.parameters(whole) == (16 * 3 + 16) + (16 * 16 * 9 // 2 + 16) + (16 * 4 + 4)
    stay = whole.clone()
    stay[sites.sites[0].ids[[0, 1, 2, 8, 9, 10]]] = False  # of `conv`, three of each group
    assert cost.macs(stay) == (10 * 3 + 16 * 10 * 9 // 2) * 36 + 16 * 4
    assert cost.parameters(stay) == (10 * 3 + 10) + (16 * 10 * 9 // 2 + 16) + (16 * 4 + 4)


def test_a_layer_called_twice_works_twice_and_has_its_weights_once(networks: ModuleType) -> None:
    network = networks.Twice()
    sites = find_sites(network, (1, 6, 6))
    cost = cost_model(network, sites, (1, 6, 6))
    whole = torch.ones(len(sites.anatomy.classes), dtype=torch.bool)
    assert cost.macs(whole) == (4 * 9 + 2 * 4 * 4 * 9) * 36 + 4 * 2
    assert cost.parameters(whole) == (4 * 9 + 4) + (4 * 4 * 9 + 4) + (4 * 2 + 2)
    stay = whole.clone()
    for site in sites:
        stay[site.ids[1]] = False
    assert cost.macs(stay) == (3 * 9 + 2 * 3 * 3 * 9) * 36 + 3 * 2
    assert cost.parameters(stay) == (3 * 9 + 3) + (3 * 3 * 9 + 3) + (3 * 2 + 2)


class Multiplied(nn.Module):
    """A depthwise layer that makes two channels of each, norms with and without weights, a stride, no bias."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 3, bias=False)
        self.plain = nn.BatchNorm2d(5, affine=False)
        self.wide = nn.Conv2d(5, 10, 3, stride=2, groups=5, bias=False)
        self.norm = nn.BatchNorm2d(10)
        self.last = nn.Conv2d(10, 7, (1, 3), dilation=(1, 2), padding=(0, 2))
        self.head = nn.Linear(7, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.wide(self.plain(self.conv(x)))))
        return self.head(F.relu(self.last(x)).mean((2, 3)))


@pytest.mark.parametrize("seed", range(4))
def test_depthwise_layers_that_widen_and_norms_without_weights_are_counted(seed: int) -> None:
    check(Multiplied(), (3, 9, 8), seed)


def test_a_linear_layer_works_at_every_place_of_a_sequence(networks: ModuleType) -> None:
    """Six places of eight numbers: 8 to 6, 6 to 10 at each, then the mean, then 10 to 4."""
    network, shape = networks.Tokens(), (3, 2, 8)
    sites = find_sites(network, shape)
    cost = cost_model(network, sites, shape)
    stay = torch.ones(len(sites.anatomy.classes), dtype=torch.bool)
    assert cost.macs(stay) == 6 * (8 * 6 + 6 * 10) + 10 * 4
    hidden = next(site for site in sites if site.name == "hidden")
    stay[hidden.ids[:7]] = False
    assert cost.macs(stay) == 6 * (8 * 6 + 6 * 3) + 3 * 4
    assert cost.parameters(stay) == (8 * 6 + 6) + (6 * 3 + 3) + (3 * 4 + 4)


class Sequence1d(nn.Module):
    """Convolutions over a sequence, and a norm between them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv1d(3, 6, 3)
        self.norm = nn.BatchNorm1d(6)
        self.conv2 = nn.Conv1d(6, 5, 3, stride=2)
        self.head = nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.conv1(x.flatten(2))))
        return self.head(F.relu(self.conv2(x)).mean(2))


@pytest.mark.parametrize("seed", [0, 1])
def test_convolutions_over_sequences_are_counted(seed: int) -> None:
    check(Sequence1d(), (3, 4, 5), seed)


def test_weights_that_are_frozen_or_belong_to_no_channel_are_counted_all_the_same(networks: ModuleType) -> None:
    network = networks.Residual()
    network.conv_a.requires_grad_(False)
    network.register_parameter("scale", nn.Parameter(torch.ones(11)))
    sites = find_sites(network, RGB)
    cost = cost_model(network, sites, RGB)
    stay = torch.ones(len(sites.anatomy.classes), dtype=torch.bool)
    assert cost.parameters(stay) == 8 * 27 + 8 + 8 * 3 + 8 + 8 * 4 + 4 + 11
    for site in sites:
        stay[site.ids[:3]] = False
    assert cost.parameters(stay) == 5 * 27 + 5 + 5 * 3 + 5 + 5 * 4 + 4 + 11


def test_asking_for_the_cost_changes_nothing(networks: ModuleType) -> None:
    model = networks.zoo_model("resnet20")
    model.network.blocks[1].train()
    modes = [module.training for module in model.modules()]
    before = model_digest(model)
    stay, _ = choose(model.network, networks.SHAPE, 0)
    cost = cost_model(model)
    kept = stay.clone()
    assert cost.macs(stay) == cost.macs(stay)
    assert torch.equal(stay, kept)
    assert model_digest(model) == before
    assert [module.training for module in model.modules()] == modes


def test_a_module_that_does_not_say_its_image_shape_is_refused_without_one(networks: ModuleType) -> None:
    with pytest.raises(ModelError, match="input_shape"):
        cost_model(networks.Residual())
