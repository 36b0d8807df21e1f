"""The guard: the squared change of what layers computed on old inputs, from second moments alone."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from nss.freeze import freeze, thaw
from nss.guard import Guard
from nss.profile import profile
from nss.sites import find_sites

few = settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def guarded(network: nn.Module, free: dict[str, Tensor], images: Tensor, classes: int) -> tuple[nn.Module, Guard]:
    shape = tuple(images.shape[1:])
    names = [str(label) for label in range(classes)]
    found = profile(network, (images, torch.arange(len(images)) % classes), ("avg",), classes=names, input_shape=shape)
    frozen = freeze(network, free, shape)
    return frozen, Guard(frozen, find_sites(network, shape).anatomy, found)


def disturb(frozen: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in frozen.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)


@given(seed=st.integers(0, 999))
@few
def test_for_one_by_one_convolutions_and_linear_layers_it_is_the_change_on_the_very_images(
    networks: ModuleType, seed: int
) -> None:
    network, images = networks.Plain(), networks.floats(9, (1, 3, 3), seed)
    free = {"hidden": torch.tensor([True, False, True])}
    frozen, guard = guarded(network, free, images, 2)
    assert float(guard().detach()) == 0
    disturb(frozen, seed)
    with torch.no_grad():
        read = torch.relu(network.conv(images)).mean((2, 3))
        moved = thaw(frozen).hidden.weight - network.hidden.weight
        shifted = (thaw(frozen).hidden.bias - network.hidden.bias).square().sum()
        expected = (read @ moved.T).square().mean(0).sum() + shifted
    assert float(guard().detach()) == pytest.approx(float(expected) / 3, rel=1e-4)


def test_norms_scale_it_and_positions_add_up(networks: ModuleType) -> None:
    """Written out as loops: positions of a kernel count apart, each output in units of its spread."""
    model = networks.zoo_model("vgg_small")
    network, images = model.network, networks.floats(6, networks.SHAPE)
    free = {"features.10": torch.arange(64) % 3 == 0, "hidden": torch.arange(256) < 5}
    frozen, guard = guarded(network, free, images, 4)
    disturb(frozen, 1)
    plain, expected = thaw(frozen), 0.0
    with torch.no_grad():
        for layer, norm in (("features.10", "features.11"), ("hidden", None)):
            reader = network.get_submodule(layer)
            seen: list[Tensor] = []
            handle = reader.register_forward_pre_hook(lambda _m, given, seen=seen: seen.append(given[0].double()))
            network(images)
            handle.remove()
            channels = seen[0].shape[1] if seen[0].dim() == 4 else 128
            rows = seen[0].reshape(len(images), channels, -1).transpose(1, 2).reshape(-1, channels)
            gram = rows.T @ rows / len(rows)
            weights = []
            for net in (network, plain):
                weight = net.get_submodule(layer).weight.double()
                if norm:
                    bn = net.get_submodule(norm)
                    scale = bn.weight.double() / (bn.running_var.double() + bn.eps).sqrt()
                    weight = weight * scale.view(-1, 1, 1, 1)
                    weights.append((weight, bn.bias.double() - bn.running_mean.double() * scale))
                else:
                    weights.append((weight, net.get_submodule(layer).bias.double()))
            (before, old_bias), (after, new_bias) = weights
            moved = (after - before).reshape(len(before), channels, -1)
            total = sum(
                float((moved[:, :, at] @ gram * moved[:, :, at]).sum()) for at in range(moved.shape[2])
            ) + float((new_bias - old_bias).square().sum())
            expected += total / len(before)
    assert float(guard().detach()) == pytest.approx(expected, rel=1e-4)


def test_a_grouped_convolution_reads_its_own_group_and_an_unmeasured_input_counts_as_ones(
    networks: ModuleType,
) -> None:
    network, images = networks.Grouped(), networks.floats(6, (3, 5, 5))
    free = {"grouped": torch.arange(16) % 2 == 0, "conv": torch.arange(16) == 3}
    frozen, guard = guarded(network, free, images, 4)
    disturb(frozen, 0)
    plain = thaw(frozen)
    with torch.no_grad():
        read = torch.relu(network.conv(images)).permute(0, 2, 3, 1).reshape(-1, 16)
        total = (plain.conv.weight - network.conv.weight).square().sum()
        total = total + (plain.conv.bias - network.conv.bias).square().sum()
        moved = plain.grouped.weight - network.grouped.weight
        for row in range(16):
            own = read[:, :8] if row < 8 else read[:, 8:]
            for at in range(9):
                total = total + (own @ moved[row].flatten(1)[:, at]).square().mean()
        total = total + (plain.grouped.bias - network.grouped.bias).square().sum()
    assert float(guard().detach()) == pytest.approx(float(total) / 16, rel=1e-4)


def test_its_gradient_leads_back(networks: ModuleType) -> None:
    model = networks.zoo_model("lenet")
    free = networks.random_masks(model.network, networks.SHAPE, 0, 0.4)
    frozen, guard = guarded(model.network, free, networks.floats(6, networks.SHAPE), 4)
    disturb(frozen, 0)
    optimizer = torch.optim.SGD(frozen.parameters(), 0.01)
    values = []
    for _ in range(8):
        optimizer.zero_grad()
        value = guard()
        value.backward()
        optimizer.step()
        values.append(float(value.detach()))
    assert values == sorted(values, reverse=True)
    assert values[-1] < values[0]


def test_more_old_data_with_the_same_second_moment_is_the_same_guard(networks: ModuleType) -> None:
    network, images = networks.Plain(), networks.floats(6, (1, 3, 3))
    values = []
    for data in (images, torch.cat([images, images])):
        frozen, guard = guarded(network, {"head": torch.tensor([True, False])}, data, 2)
        disturb(frozen, 0)
        values.append(float(guard().detach()))
    assert values[0] == pytest.approx(values[1])
