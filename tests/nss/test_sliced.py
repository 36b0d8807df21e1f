"""The masked view: the user's network with neurons at zero, against masks held by plain forward hooks."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nss.errors import ModelError, SiteError
from nss.mask import ChannelMask
from nss.model import Classifier
from nss.sites import find_sites
from nss.sliced import sliced

VGG_ENDS = {
    "features.0": "features.2", "features.3": "features.5", "features.7": "features.9", "features.10": "features.12",
    "features.14": "features.16", "features.17": "features.19", "hidden": "relu",
}  # fmt: skip
LENET_ENDS = {"conv1": "relu1", "conv2": "relu2", "fc1": "relu3", "fc2": "relu4"}


@pytest.mark.parametrize(("name", "ends"), [("vgg_small", VGG_ENDS), ("lenet", LENET_ENDS)])
def test_a_view_equals_the_network_with_activations_multiplied_by_hooks(
    networks: ModuleType, name: str, ends: dict[str, str]
) -> None:
    model = networks.zoo_model(name, seed=3)
    masks = networks.random_masks(model.network, networks.SHAPE, seed=1)
    assert set(masks) == set(ends)
    images = networks.pictures(16)
    expected = networks.hooked(model.network, {ends[k]: m for k, m in masks.items()}, model.normalise(images))
    with torch.no_grad():
        assert torch.allclose(sliced(model, masks)(images), expected, atol=1e-6)
        assert not torch.allclose(model(images), expected, atol=1e-3)


def test_a_residual_view_masks_both_sides_by_the_union(networks: ModuleType) -> None:
    network = networks.Residual().eval()
    masks = {"conv_a": torch.arange(8) < 3, "conv_b": torch.arange(8) == 5}
    union = (masks["conv_a"] | masks["conv_b"]).float().view(-1, 1, 1)
    x = networks.floats(5, (3, 6, 6))
    with torch.no_grad():
        inner = F.relu(network.conv_a(x) * union + network.conv_b(x) * union)
        assert torch.allclose(sliced(network, masks, (3, 6, 6))(x), network.head(inner.mean((2, 3))), atol=1e-6)


@pytest.mark.parametrize("how", ["norm", "sigmoid", "plus", "minus", "clamp"])
def test_a_masked_channel_stays_at_zero_until_the_next_layer_reads_it(networks: ModuleType, how: str) -> None:
    torch.manual_seed(0)
    network = networks.randomise(networks.Shifted(how), 1).eval()
    keep = torch.tensor([True, False, True, True, False, True])
    x = networks.floats(5, (3, 6, 6))
    read: list[torch.Tensor] = []
    network.last.register_forward_pre_hook(lambda _m, inputs: read.append(inputs[0]))
    view = sliced(network, {"conv": keep}, (3, 6, 6))
    read.clear()
    with torch.no_grad():
        network(x)
        view(x)
    assert torch.equal(read[1][:, ~keep], torch.zeros_like(read[1][:, ~keep]))
    assert torch.allclose(read[1][:, keep], read[0][:, keep])


def test_concat_and_the_norm_behind_it_keep_the_offsets(networks: ModuleType) -> None:
    network = networks.randomise(networks.Concat(), 2).eval()
    one, two = torch.tensor([1, 0, 1, 0]).bool(), torch.tensor([0, 1, 1, 0, 0]).bool()
    x = networks.floats(5, (3, 6, 6))
    with torch.no_grad():
        a = F.relu(network.conv1(x)) * one.view(-1, 1, 1)
        b = F.relu(network.conv2(a)) * two.view(-1, 1, 1)
        joined = F.relu(network.bn(torch.cat([b, x, a], 1)))
        joined *= torch.cat([two, torch.ones(3, dtype=torch.bool), one]).view(-1, 1, 1)
        expected = network.head(F.relu(network.last(joined)).mean((2, 3)))
        found = sliced(network, {"conv1": one, "conv2": two}, (3, 6, 6))(x)
    assert torch.allclose(found, expected, atol=1e-6)


def test_masks_of_token_layers_lie_on_the_last_axis(networks: ModuleType) -> None:
    network = networks.Tokens().eval()
    mask = torch.arange(10) % 3 == 0
    x = networks.floats(4, (2, 3, 8))
    with torch.no_grad():
        inner = F.gelu(network.hidden(F.relu(network.embed(x.flatten(1, 2))))) * mask
        assert torch.allclose(sliced(network, {"hidden": mask}, (2, 3, 8))(x), network.head(inner.mean(1)), atol=1e-6)


def test_a_view_shares_its_weights_and_leaves_the_model_alone(networks: ModuleType) -> None:
    model = networks.zoo_model("lenet")
    images = networks.pictures(4)
    with torch.no_grad():
        before = model(images)
    view = sliced(model, {"conv1": torch.arange(16) < 8})
    with torch.no_grad():
        assert torch.equal(model(images), before)
    assert isinstance(view, Classifier)
    assert view.spec == model.spec
    assert view.network.get_parameter("conv1.weight") is model.network.conv1.weight


def test_making_a_view_leaves_the_mode_of_every_submodule(networks: ModuleType) -> None:
    model = networks.zoo_model("vgg_small").train()
    model.network.features[1].eval()  # a norm that somebody froze
    modes = {name: module.training for name, module in model.named_modules()}
    sliced(model, {"hidden": torch.arange(256) < 9})
    assert {name: module.training for name, module in model.named_modules()} == modes


def test_a_view_of_a_view_masks_both(networks: ModuleType) -> None:
    model = networks.zoo_model("lenet")
    first, second = torch.arange(16) < 8, torch.arange(16) % 2 == 0
    images = networks.pictures(6)
    with torch.no_grad():
        twice = sliced(sliced(model, {"conv1": first}), {"conv1": second})(images)
        assert torch.allclose(twice, sliced(model, {"conv1": first & second})(images), atol=1e-6)


def test_a_view_that_keeps_everything_holds_no_mask_and_gives_equal_logits(networks: ModuleType) -> None:
    model = networks.zoo_model("resnet20")
    everything = {site.name: torch.ones(len(site), dtype=torch.bool) for site in find_sites(model.network, (1, 16, 16))}
    view = sliced(model, everything)
    assert not [module for module in view.modules() if isinstance(module, ChannelMask)]
    with torch.no_grad():
        assert torch.equal(view(networks.pictures(4)), model(networks.pictures(4)))


def test_a_model_that_does_not_say_its_input_shape_needs_one() -> None:
    network = nn.Sequential(nn.Conv2d(1, 2, 1), nn.Flatten(), nn.Linear(8, 2))
    with pytest.raises(ModelError, match="does not say which images it takes"):
        sliced(network, {})
    assert sliced(network, {}, (1, 2, 2))(torch.zeros(1, 1, 2, 2)).shape == (1, 2)


def test_unknown_layers_and_emptied_layers_are_refused(networks: ModuleType) -> None:
    model = networks.zoo_model("lenet")
    with pytest.raises(SiteError, match="there is no layer 'head'"):
        sliced(model, {"head": torch.ones(4, dtype=torch.bool)})
    with pytest.raises(SiteError, match="no neuron of 'conv1' is kept"):
        sliced(model, {"conv1": torch.zeros(16, dtype=torch.bool)})


def test_a_mask_multiplies_one_axis_and_keeps_the_type() -> None:
    x = torch.arange(12, dtype=torch.float16).view(2, 3, 2)
    keep = torch.tensor([True, False, True])
    out = ChannelMask(keep, dim=1)(x)
    assert out.dtype == torch.float16
    assert out.tolist() == [[[0, 1], [0, 0], [4, 5]], [[6, 7], [0, 0], [10, 11]]]
    assert ChannelMask(torch.tensor([False, True]), dim=2)(x)[0].tolist() == [[0, 1], [0, 3], [0, 5]]
