"""Gradients of some rows of layers: those that autograd finds for all rows, at the rows that are free."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from nss.freeze import freeze
from nss.rows import FreeConvolution, FreeRows

SHAPE = (2, 6, 6)


def network(channels: int, outputs: int, groups: int) -> nn.Module:
    """Two convolutions with norms and ReLUs between, in evaluation mode, the norms with statistics of their own."""
    torch.manual_seed(0)
    first, second = nn.Conv2d(2, channels, 3, padding=1), nn.Conv2d(channels, outputs, 3, groups=groups, bias=False)
    norms = nn.BatchNorm2d(channels), nn.BatchNorm2d(outputs)
    model = nn.Sequential(first, norms[0], nn.ReLU(), second, norms[1], nn.ReLU(), nn.Flatten(), nn.LazyLinear(3))
    for _ in range(3):
        model(torch.randn(8, *SHAPE))
    with torch.no_grad():
        for norm in norms:
            norm.weight.uniform_(0.5, 1.5)
    return model.eval()


def some(count: int, total: int) -> Tensor:
    """Mask of so many channels, drawn."""
    return torch.zeros(total, dtype=torch.bool).index_fill_(0, torch.randperm(total)[:count], True)


def gradients(model: nn.Module, images: Tensor) -> None:
    """Leave the gradients of a loss that depends on every logit."""
    logits = model(images)
    (logits * torch.arange(1.0, 4.0)).sum().square().backward()


# 32 channels of which 3, 16, 20 or all move: kernels compute blocks of 16, and one for all where they are nearly all.
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["plain", "channels last"])
@pytest.mark.parametrize("moving", [3, 16, 20, 32])
@pytest.mark.parametrize(("outputs", "groups"), [(48, 1), (32, 32), (48, 2)], ids=["whole", "depthwise", "grouped"])
def test_free_rows_have_the_gradients_that_autograd_finds_for_all(
    moving: int, outputs: int, groups: int, layout: torch.memory_format
) -> None:
    model = network(32, outputs, groups).to(memory_format=layout)
    images = torch.randn(5, *SHAPE).contiguous(memory_format=layout)
    frozen = freeze(model, {"0": some(moving, 32), "3": some(moving, outputs)}, SHAPE)
    gradients(model.requires_grad_(), images)
    gradients(frozen, images)
    seen = 0
    for name in ("0", "1", "3", "4"):
        layer = frozen.get_submodule(name)
        assert isinstance(layer, FreeRows)
        for entry in ("weight", "bias"):
            free = getattr(layer, f"free_{entry}")
            if free is not None:
                whole = getattr(model.get_submodule(name), entry).grad
                near = 1e-5 * float(whole.abs().max())
                torch.testing.assert_close(free.grad, whole[layer.rows], rtol=1e-5, atol=near)
                seen += 1
    assert seen == 7


def test_a_gain_that_stays_gets_no_gradient_and_the_others_theirs_as_before() -> None:
    model, images = network(8, 6, 1), torch.randn(5, *SHAPE)
    moves = freeze(model, {"0": some(3, 8), "3": some(4, 6)}, SHAPE)
    stays = copy.deepcopy(moves)
    layers = [each for each in stays.modules() if isinstance(each, FreeConvolution)]
    for layer in layers:
        layer.movable()
    assert torch.equal(stays(images), moves(images))
    gradients(moves, images)
    gradients(stays, images)
    gains = [layer.norm.free_weight for layer in layers if layer.norm is not None]
    assert [gain.grad for gain in gains if gain is not None] == [None, None]
    before = {name: entry.grad for name, entry in moves.named_parameters() if entry.grad is not None}
    after = {name: entry.grad for name, entry in stays.named_parameters() if entry.grad is not None}
    assert len(before) == 7
    assert len(after) == 5
    assert all(torch.equal(grad, before[name]) for name, grad in after.items())
