"""Gradients of linear layers and convolutions for some of their rows, and for their input, nothing else."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from nss.strides import picked, skips

# Convolution kernels work on blocks of channels: the weight gradient of 51 rows takes longer than that of 64.
BLOCK = 16
# With more rows or channels than this share, one kernel for all of them is faster than picking some out.
MOST = 0.8
OF_INPUT, OF_ROWS = [True, False, False], [False, True, True]


@dataclass(frozen=True)
class How:
    """How a convolution passes over its input."""

    stride: list[int]
    padding: list[int]
    dilation: list[int]
    groups: int


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None, how: How) -> Tensor:
    none = [0] * len(how.stride)
    return torch.convolution(x, weight, bias, how.stride, how.padding, how.dilation, False, none, how.groups)


class LinearRows(torch.autograd.Function):
    """y = x W^T + b with gradients for x and for the free rows of W and b."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, free: Tensor, free_bias: Tensor | None, weight: Tensor, bias: Tensor | None, rows: Tensor
    ) -> Tensor:
        """x: [.., inputs]. free, free_bias: the free `rows` of weight and bias. Returns [.., outputs]."""
        ctx.save_for_backward(x, weight, rows)
        return F.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of x, the free rows and what is added to them."""
        x, weight, rows = ctx.saved_tensors
        to_input = grad @ weight if ctx.needs_input_grad[0] else None
        chosen = grad.index_select(-1, rows).flatten(0, -2)
        to_bias = chosen.sum(0) if ctx.needs_input_grad[2] else None
        return to_input, chosen.T @ x.flatten(0, -2), to_bias, None, None, None


class ConvolutionRows(torch.autograd.Function):
    """A convolution, and a ReLU, with gradients for its input and for the free rows of its weight and bias."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        free: Tensor | None,
        free_bias: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        rows: Tensor,
        used: Tensor | None,
        how: How,
        rectified: bool,
    ) -> Tensor:
        """x: [n, inputs, ..]. free, free_bias: the free `rows` of weight and bias. Returns [n, outputs, ..].

        used: channels of x whose gradient counts, where not all do. rectified: with the ReLU.
        """
        y = _convolve(x, weight, bias, how)
        if rectified:
            y.relu_()
        ctx.save_for_backward(x, weight, rows, used, y if rectified else None)
        ctx.how = how
        # Where nothing below moves, no more of the gradient is used than that of the free rows.
        ctx.used = None if ctx.needs_input_grad[0] else rows
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of x, the free rows and what is added to them."""
        x, weight, rows, used, y = ctx.saved_tensors
        if y is not None:
            grad = torch.ops.aten.threshold_backward(grad, y, 0)
        to_input = _to_input(grad, x, weight, used, ctx.how) if ctx.needs_input_grad[0] else None
        to_rows, to_bias = _of_rows(grad, x, weight, rows, ctx.how) if ctx.needs_input_grad[1] else (None, None)
        return to_input, to_rows, to_bias if ctx.needs_input_grad[2] else None, *[None] * 6


def _to_input(grad: Tensor, x: Tensor, weight: Tensor, used: Tensor | None, how: How) -> Tensor:
    """Gradient of the input; where only some channels of it are used, the others are zero."""
    if used is None or how.groups > 1 or _in_blocks(len(used)) > MOST * x.shape[1]:
        return _gradients(grad, x, weight, how, OF_INPUT)[0]
    some = _gradients(grad, torch.empty_like(x[:, : len(used)]), weight[:, used], how, OF_INPUT)[0]
    whole = torch.zeros_like(x)
    whole.movedim(1, -1).index_copy_(-1, used, some.movedim(1, -1))
    return whole


def _gradients(grad: Tensor, x: Tensor, weight: Tensor, how: How, wanted: list[bool]) -> tuple[Tensor, ...]:
    """Gradients of a convolution for its input, its weight and its bias, those that are wanted."""
    none, outputs = [0] * len(how.stride), [grad.shape[1]]
    geometry = how.stride, how.padding, how.dilation, False, none, how.groups
    found = torch.ops.aten.convolution_backward(grad, x, weight, outputs, *geometry, wanted)
    return cast("tuple[Tensor, ...]", found)


def _of_rows(grad: Tensor, x: Tensor, weight: Tensor, rows: Tensor, how: How) -> tuple[Tensor, Tensor]:
    """Gradients of some rows of the weight and of the bias, [rows, inputs / groups, ..] and [rows]."""
    if skips(weight.shape[2:], how.stride, how.padding, weight.shape[1]):
        x, how = picked(x, how.stride), replace(how, stride=[1] * len(how.stride))
    count, groups = len(weight), how.groups
    chosen = _filled(rows, count) if groups == 1 else rows
    if groups in (1, x.shape[1]) and len(chosen) <= MOST * count:
        if groups > 1:  # depthwise: a row reads one channel
            x, how = _channels(x, rows // (count // groups)), replace(how, groups=len(rows))
        # Of the weight its shape alone counts.
        _, of_weight, of_bias = _gradients(_channels(grad, chosen), x, weight[: len(chosen)], how, OF_ROWS)
        return of_weight[: len(rows)], of_bias[: len(rows)]
    _, of_weight, of_bias = _gradients(grad, x, weight, how, OF_ROWS)
    return of_weight[rows], of_bias[rows]


def _filled(rows: Tensor, count: int) -> Tensor:
    """The rows, then as many more as fill the last block."""
    missing = _in_blocks(len(rows)) - len(rows)
    return torch.cat([rows, rows.new_zeros(missing)]) if missing and len(rows) + missing <= count else rows


def _in_blocks(count: int) -> int:
    """Return how many channels the kernels compute for so many."""
    return -(-count // BLOCK) * BLOCK


def _channels(x: Tensor, chosen: Tensor) -> Tensor:
    """Return some channels of x [n, channels, ..]. With channels last, picking from a table is six times faster."""
    last = x.movedim(1, -1)
    if not last.is_contiguous():
        return x.index_select(1, chosen)
    table = last.flatten(0, -2).index_select(1, chosen)
    return table.view(*last.shape[:-1], -1).movedim(-1, 1)
