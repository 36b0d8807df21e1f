"""Gradients of 1x1 convolutions that skip positions are right on every CPU, however few channels they read."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import nss
from nss import strides
from nss.freeze import freeze
from nss.strides import BLOCK, picked, skips, sound_gradients
from nss.wiring import _in_two

LAST = torch.channels_last
FEW = (1, 3, 5, 7, 8, 12, 15, 16, 27)


def plainly(x: Tensor, to_output: Tensor, stride: int) -> Tensor:
    """The weight gradient, summed over images and the positions that are read."""
    return torch.einsum("nohw,nihw->oi", to_output.double(), x[:, :, ::stride, ::stride].double())[:, :, None, None]


def maps(channels: int, seed: int, size: int = 16) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(64, channels, size, size, generator=generator).contiguous(memory_format=LAST)


@pytest.mark.parametrize("channels", FEW)
def test_weight_gradients_are_the_sums_over_what_is_read(channels: int) -> None:
    x, to_output = maps(channels, 1), maps(10, 2, size=8)
    layer = nn.Conv2d(channels, 10, 1, stride=2).to(memory_format=LAST)
    with sound_gradients(layer):
        y = layer(x)
    torch.testing.assert_close(y, layer(x))
    y.backward(to_output)
    assert layer.weight.grad is not None
    assert layer.bias is not None
    torch.testing.assert_close(layer.weight.grad.double(), plainly(x, to_output, 2), rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(layer.bias.grad, to_output.sum((0, 2, 3)), rtol=1e-4, atol=1e-3)


class Shortcut(nn.Module):
    """What a small residual network has."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.shortcut = nn.Conv2d(channels, 10, 1, stride=2, bias=False)
        self.head = nn.Linear(10, 2)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.shortcut(x).relu().mean((2, 3)))
        return logits


@pytest.mark.parametrize("channels", FEW)
@pytest.mark.parametrize("rows", [[0, 3], list(range(10))])
def test_gradients_of_free_rows_are_those_of_the_whole_layer(channels: int, rows: list[int]) -> None:
    network, x = Shortcut(channels).eval(), maps(channels, 1)
    mask = torch.isin(torch.arange(10), torch.tensor(rows))
    frozen = freeze(network, {"shortcut": mask}, input_shape=(channels, 16, 16))
    frozen(x).square().sum().backward()
    (found,) = (each.grad for each in frozen.parameters())
    twin = copy.deepcopy(network).double()
    twin(x.double().contiguous()).square().sum().backward()
    wanted = twin.shortcut.weight.grad
    assert found is not None
    assert wanted is not None
    torch.testing.assert_close(found.double().flatten(), wanted[mask].flatten(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("channels", FEW)
@pytest.mark.parametrize("earlier", [2, 20])
def test_a_new_column_reads_itself_and_the_earlier_ones_apart(channels: int, earlier: int) -> None:
    both, to_output = maps(earlier + channels, 1), maps(10, 2, size=8)
    layer = nn.Conv2d(earlier + channels, 10, 1, stride=2).to(memory_format=LAST)
    parts = (part.contiguous(memory_format=LAST) for part in both.split([earlier, channels], 1))
    y = _in_two(layer, *parts)
    torch.testing.assert_close(y, layer(both), rtol=1e-4, atol=1e-4)
    y.backward(to_output)
    assert layer.weight.grad is not None
    torch.testing.assert_close(layer.weight.grad.double(), plainly(both, to_output, 2), rtol=1e-4, atol=1e-3)


def test_only_what_the_kernels_get_wrong_is_run_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    class Own(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + 1

    layers = {
        "few": nn.Conv2d(3, 4, 1, stride=2),
        "border": nn.Conv2d(3, 4, 1, stride=2, padding=1),
        "wide": nn.Conv2d(3, 4, 3, stride=2),
        "every position": nn.Conv2d(3, 4, 1),
        "many": nn.Conv2d(BLOCK, 4, 1, stride=2),
        "many in few groups": nn.Conv2d(2 * BLOCK, 4, 1, stride=2, groups=4),
        "own": Own(3, 4, 1, stride=2),
    }
    run: list[nn.Module] = []
    monkeypatch.setattr(strides, "_forward", lambda layer, x: run.append(layer))
    network = nn.ModuleDict(layers)
    with sound_gradients(network):
        for layer in layers.values():
            layer(torch.zeros(1, layer.in_channels, 6, 6))
    assert run == [layers["few"], layers["many in few groups"]]
    assert not any("forward" in vars(layer) for layer in layers.values())


def test_an_error_within_leaves_the_model_as_it_was() -> None:
    layer = nn.Conv2d(3, 4, 1, stride=2)
    with pytest.raises(RuntimeError), sound_gradients(layer):
        layer(torch.zeros(1, 2, 6, 6))
    assert "forward" not in vars(layer)


def test_strides_of_each_axis_are_its_own() -> None:
    x, layer = maps(3, 1, size=7), nn.Conv2d(3, 4, 1, stride=(3, 2))
    torch.testing.assert_close(F.conv2d(picked(x, (3, 2)), layer.weight, layer.bias), layer(x))
    assert skips((1, 1), (3, 1), "valid", 3)
    assert not skips((1, 1), (3, 1), (0, 1), 3)


def test_training_tuning_and_extending_go_around_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a network whose shortcuts read few channels; with the kernel for them these steps end the process."""
    images, labels = maps(1, 1, size=8).sigmoid(), torch.arange(64) % 2
    data: Any = [(images, labels)]
    model = nss.build_model("nss.zoo:resnet20", ["a", "b"], (1, 8, 8), seed=0)
    found = nss.profile(model, data, ("taylor",))
    slices = nss.semantic_slices(nss.critical_neurons(found, "taylor"), found)
    small = nss.restructure(model, slices, data, found, macs=0.1).model
    ran: list[int] = []
    plain = strides._forward
    monkeypatch.setattr(strides, "_forward", lambda layer, x: (ran.append(layer.in_channels), plain(layer, x))[1])

    def count(act: Any) -> int:
        ran.clear()
        act()
        return len(ran)

    assert count(lambda: nss.train(small, data, epochs=1, seed=0, batch_size=32)) > 0
    assert count(lambda: nss.fine_tune(small, data, steps=2, seed=0)) > 0
    profiled = nss.profile(small, data, ("taylor",), windows=1)
    own = nss.semantic_slices(nss.critical_neurons(profiled, "taylor"), profiled)
    assert count(lambda: nss.readapt(small, own, data, data, profile=profiled, epochs=1, seed=0)) > 0
    new: Any = [(images, labels + 2)]
    assert count(lambda: nss.extend(small, own, new, old_data=data, classes=["c", "d"], epochs=1, seed=0)) > 0
