"""Layers of which only some rows are parameters: forward over all rows, weight gradients for the free ones alone."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nss.row_gradients import ConvolutionRows, How, LinearRows

# A row whose norm multiplies it by less than this share of what it does to the others is as good as not there.
FAINT = 1e-4


@dataclass(frozen=True)
class Movable:
    """Entries of the free rows of a layer, and what each row computes more of for one more of them."""

    weight: nn.Parameter
    """[rows, ..]"""
    weight_unit: Tensor
    """[rows]"""
    shift: nn.Parameter | None
    """[rows]; None where nothing is added"""
    shift_unit: Tensor
    """[rows]"""
    unmasked: Tensor | None
    """bool of the shape of `weight`: the others stay zero"""


class FreeRows(nn.Module):
    """A layer that holds all its numbers as buffers, and those rows that may move as parameters.

    To the network around it, which may ask for `in_features` or the type of `weight`, it is the layer.
    """

    rows: Tensor
    free_weight: nn.Parameter | None
    free_bias: nn.Parameter | None
    unmasked: Tensor | None
    """bool of the shape of `free_weight`: the others are zero and stay so"""

    def __init__(self, layer: nn.Module, rows: Tensor) -> None:
        super().__init__()
        self.layer = layer
        self.training = layer.training
        for name in ("weight", "bias"):
            held = getattr(layer, name)
            rows = rows if held is None else rows.to(held.device)
            free = nn.Parameter(held[rows].clone()) if held is not None and len(rows) else None
            self.register_parameter(f"free_{name}", free)
        self.register_buffer("rows", rows)
        self.register_buffer("unmasked", None)

    def __getattr__(self, name: str) -> Any:
        """Return what the layer has; of `weight` and `bias` all rows as they are now, without gradients."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in ("weight", "bias"):
                return self.whole(name)
            return getattr(super().__getattr__("layer"), name)

    @property
    def is_free(self) -> bool:
        """Whether some rows may move."""
        return self.free_weight is not None or self.free_bias is not None

    def mask(self, unmasked: Tensor) -> None:
        """Let no gradient reach weights that are masked. unmasked: bool of the shape of the layer's weight."""
        self.unmasked = unmasked[self.rows]

    def whole(self, name: str) -> Tensor | None:
        """Return all rows of `weight` or `bias`, the free ones as they are now; gradients do not pass."""
        held, free = getattr(self.layer, name), getattr(self, f"free_{name}")
        if held is None or free is None:
            return cast("Tensor | None", held)
        return cast(Tensor, held.clone().index_copy_(0, self.rows, free.detach()))

    def effective(self) -> tuple[Tensor | None, Tensor | None]:
        """Return weight and bias of the free rows as the forward uses them, with gradients."""
        return self._masked(), self.free_bias

    def movable(self) -> Movable:
        """Return the entries of the free rows, and what a unit of each changes in what the rows compute."""
        one = torch.ones(len(self.rows)).to(cast(Tensor, self.free_weight))
        return Movable(cast(nn.Parameter, self.free_weight), one, self.free_bias, one, self.unmasked)

    def _masked(self) -> Tensor | None:
        if self.unmasked is None or self.free_weight is None:
            return self.free_weight
        return torch.where(self.unmasked, self.free_weight, 0)

    def settled(self) -> nn.Module:
        """Return the layer with the free rows in their places; they must not be used here afterwards."""
        for name in ("weight", "bias"):
            whole = self.whole(name)
            if whole is not None:
                getattr(self.layer, name).copy_(whole)
        return self.layer


class FreeNorm(FreeRows):
    """A norm by channel: BatchNorm always with its running statistics, which never move, or GroupNorm."""

    folded = False
    """the convolution before it does its work"""
    held: tuple[Tensor, Tensor] | None = None
    """mean and scale of the free rows, where their gain does not move"""

    def forward(self, x: Tensor) -> Tensor:
        """x: [n, channels, ..]. Returns the same shape."""
        if self.folded:
            return x
        weight, bias = self._spread("weight"), self._spread("bias")
        if isinstance(self.layer, nn.GroupNorm):
            return F.group_norm(x, self.layer.num_groups, weight, bias, self.layer.eps)
        norm = cast(nn.BatchNorm2d, self.layer)
        own = norm.running_mean is None
        return F.batch_norm(x, norm.running_mean, norm.running_var, weight, bias, training=own, eps=norm.eps)

    def effective(self) -> tuple[Tensor | None, Tensor | None]:
        """Return gain and shift of the free rows, the gain as the weight of one input: what is normed already."""
        return None if self.free_weight is None else self.free_weight[:, None], self.free_bias

    def _spread(self, name: str) -> Tensor | None:
        held, free = getattr(self.layer, name), getattr(self, f"free_{name}")
        return cast("Tensor | None", held if free is None else held.index_copy(0, self.rows, free))

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return weight and bias, of all rows, of the layer before it with this norm behind it; without gradients."""
        norm = cast(nn.BatchNorm2d, self.layer)
        scale = _scale(cast(Tensor, norm.running_var), norm.eps, self.whole("weight"))
        return _fold(weight, bias, cast(Tensor, norm.running_mean), scale, self.whole("bias"))

    def fold_rows(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the same of the free rows, with gradients."""
        mean, scale = self._mean_and_scale() if self.held is None else self.held
        return _fold(weight, bias, mean, scale, self.free_bias)

    def hold_gain(self) -> Tensor:
        """Let the gain of the free rows stay as it is, without a gradient. Returns what they are multiplied by."""
        if self.free_weight is not None:
            self.free_weight.requires_grad_(False)
        self.held = self._mean_and_scale()
        return self.held[1]

    def _mean_and_scale(self) -> tuple[Tensor, Tensor]:
        """Return what is taken from each free row, and what it is multiplied by then."""
        norm = cast(nn.BatchNorm2d, self.layer)
        mean, var = (cast(Tensor, each)[self.rows] for each in (norm.running_mean, norm.running_var))
        return mean, _scale(var, norm.eps, self.free_weight)


def _scale(var: Tensor, eps: float, gain: Tensor | None) -> Tensor:
    return (var + eps).rsqrt() if gain is None else (var + eps).rsqrt() * gain


def norm_scale(norm: nn.Module) -> Tensor:
    """Return what a BatchNorm with running statistics multiplies each channel by, [channels]."""
    gain = cast("Tensor | None", norm.weight)
    return _scale(cast(Tensor, norm.running_var), cast(float, norm.eps), None if gain is None else gain.detach())


def over(rows: Tensor, units: Tensor) -> Tensor:
    """Divide each row by its unit. One of which next to nothing is handed on moves nothing: it would go anywhere.

    rows: [rows, ..]; units: [rows].
    """
    faint = units.abs() <= FAINT * units.abs().median()
    spread, faint = (each.view(-1, *[1] * (rows.dim() - 1)) for each in (units, faint))
    return torch.where(faint, 0, rows / spread)


def _fold(
    weight: Tensor, bias: Tensor | None, mean: Tensor, scale: Tensor, shift: Tensor | None
) -> tuple[Tensor, Tensor]:
    moved = (-mean if bias is None else bias - mean) * scale
    return weight * scale.view(-1, *[1] * (weight.dim() - 1)), moved if shift is None else moved + shift


class FreeLayer(FreeRows):
    """A layer with weights; a BatchNorm right behind it is part of it."""

    folded_weight: Tensor
    """all rows with the norm folded in, as they were when frozen"""
    folded_bias: Tensor | None

    def __init__(self, layer: nn.Module, rows: Tensor, norm: FreeNorm | None) -> None:
        super().__init__(layer, rows)
        self.norm = norm
        weight, bias = cast(Tensor, layer.weight), cast("Tensor | None", layer.bias)
        if norm is not None:
            norm.folded = True
            weight, bias = norm.fold(weight, bias)
        self.register_buffer("folded_weight", weight, persistent=False)
        self.register_buffer("folded_bias", bias, persistent=False)

    def effective(self) -> tuple[Tensor | None, Tensor | None]:
        """Return weight and bias of the free rows with the norm folded in, with gradients."""
        weight = self._masked()
        if self.norm is None or weight is None:
            return weight, self.free_bias
        return self.norm.fold_rows(weight, self.free_bias)

    def movable(self) -> Movable:
        """Return weight and shift of the free rows; the gain of the norm, which multiplies what they do, stays."""
        own = super().movable()
        if self.norm is None:
            return own
        scale = self.norm.hold_gain()
        if self.norm.free_bias is None:
            return replace(own, weight_unit=scale, shift_unit=scale)
        return replace(own, weight_unit=scale, shift=self.norm.free_bias)


class FreeLinear(FreeLayer):
    """A linear layer; a BatchNorm right behind it is part of it."""

    def forward(self, x: Tensor) -> Tensor:
        """x: [.., inputs]. Returns [.., outputs]."""
        free, free_bias = self.effective()
        weight, bias = _with(self.folded_weight, self.rows, free), _with(self.folded_bias, self.rows, free_bias)
        return cast(Tensor, LinearRows.apply(x, free, free_bias, weight, bias, self.rows))


class FreeConvolution(FreeLayer):
    """A convolution over one, two or three axes, with groups; a BatchNorm and a ReLU right behind it are part of it."""

    def __init__(self, layer: nn.Module, rows: Tensor, norm: FreeNorm | None, rectified: bool) -> None:
        super().__init__(layer, rows, norm)
        self.rectified = rectified

    def forward(self, x: Tensor) -> Tensor:
        """x: [n, inputs, ..]. Returns [n, outputs, ..]."""
        layer, used = cast(nn.Conv2d, self.layer), getattr(x.grad_fn, "used", None)
        padding = list(layer.padding) if not isinstance(layer.padding, str) else [0] * len(layer.stride)
        if layer.padding == "same" or layer.padding_mode != "zeros":
            mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
            x, padding = F.pad(x, layer._reversed_padding_repeated_twice, mode=mode), [0] * len(padding)
        how = How(list(layer.stride), padding, list(layer.dilation), layer.groups)
        free, free_bias = self.effective()
        weight, bias = _with(self.folded_weight, self.rows, free), _with(self.folded_bias, self.rows, free_bias)
        args = (x, free, free_bias, weight, bias, self.rows, used, how, self.rectified)
        return cast(Tensor, ConvolutionRows.apply(*args))


class FoldedActivation(nn.Module):
    """A ReLU whose work the convolution before it does, or the pool behind it."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.training = layer.training

    def forward(self, x: Tensor) -> Tensor:
        """Return x."""
        return x

    def settled(self) -> nn.Module:
        """Return the ReLU, or the pool."""
        return self.layer


class RectifiedPool(FoldedActivation):
    """A max pool with the ReLU before it: the largest of all that are positive is the largest, if it is positive.

    So the ReLU and its gradient pass over the pooled maps alone, a quarter of the numbers.
    """

    def forward(self, x: Tensor) -> Tensor:
        """x: [n, channels, ..]. Returns it pooled and rectified."""
        return F.relu(self.layer(x), inplace=True)


def _with(held: Tensor | None, rows: Tensor, free: Tensor | None) -> Tensor | None:
    """Return a copy of what is held with the free rows as they are now; gradients do not pass."""
    return held if held is None or free is None else held.clone().index_copy_(0, rows, free.detach())
