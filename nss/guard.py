"""A guard of old behaviour that needs no old data: what an update changes in what each layer computed (method.md 6)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from nss.anatomy import Anatomy
from nss.model import network_of
from nss.profile import Profile
from nss.rows import FreeNorm, FreeRows
from nss.surgery import Layer
from nss.windows import window_moment


@dataclass(frozen=True)
class _Term:
    """One layer: its free rows at the start, and the second moment of what each of them reads."""

    layer: FreeRows
    start: Tensor
    moment: Tensor
    """[inputs + 1, inputs + 1], or [rows, inputs + 1, inputs + 1] where each row reads channels of its own"""
    outputs: int

    @classmethod
    def of(cls, layer: FreeRows, moment: Tensor, outputs: int) -> _Term:
        start = _rows(layer.effective(), moment.shape[-1] - 1).detach().clone()
        return cls(layer, start, moment, outputs)


class Guard:
    """Sum over layers of tr(dW G dW^T) / outputs: dW the change of the free rows, G the second moment of what they see.

    Both are those of the layer with the norm behind it folded in, so that each output counts in units of its spread. G
    is taken over all inputs and positions of a kernel together, and a last input of ones for the bias, from the
    profile's `windows`. In a wide linear layer behind a flattened map, positions and the bias count apart. A norm that
    has no layer of its own before it reads what it normed itself: on old data of mean 0 and variance 1.
    Raises ProfileError when the profile has no windows.

    >>> guard = Guard(frozen, anatomy, profile)
    >>> float(guard())
    0.0
    """

    def __init__(self, frozen: nn.Module, anatomy: Anatomy, profile: Profile) -> None:
        network = network_of(frozen)
        self._terms = []
        for producer in anatomy.producers:
            layer = network.get_submodule(producer.module)
            if isinstance(layer, FreeRows) and layer.free_weight is not None:
                moment = _read_by(layer, profile.window(producer.name)).to(layer.free_weight)
                self._terms.append(_Term.of(layer, moment, len(producer.out_ids)))
        for name, outputs in {each.module: len(each.ids) for each in anatomy.scalers}.items():
            norm = network.get_submodule(name)
            if isinstance(norm, FreeNorm) and not norm.folded and norm.free_weight is not None:
                self._terms.append(_Term.of(norm, torch.eye(2).to(norm.free_weight), outputs))

    def __call__(self) -> Tensor:
        """Return the guard of the free rows as they are now, with gradients; zero at the start."""
        return cast(
            Tensor, _Change.apply(self._terms, *(each for term in self._terms for each in term.layer.effective()))
        )


class _Change(torch.autograd.Function):
    """Sum over terms of x_i^T G x_i / outputs, x_i the change of a row. Its gradient is 2 G x_i / outputs.

    The product that the value needs serves the gradient too, and with one function for all layers there is little else.
    """

    @staticmethod
    def forward(ctx: Any, terms: Sequence[_Term], *effective: Tensor | None) -> Tensor:
        """effective: weight and bias of each term."""
        products, values = [], []
        for term, weight, bias in zip(terms, effective[::2], effective[1::2], strict=True):
            moved = _rows((weight, bias), term.moment.shape[-1] - 1).sub_(term.start)
            product = moved @ term.moment if term.moment.dim() == 2 else (moved[:, None] @ term.moment)[:, 0]
            values.append(torch.dot(product.flatten(), moved.flatten()) / term.outputs)
            products.append(product.mul_(2 / term.outputs))
        ctx.save_for_backward(*products)
        ctx.shapes = [cast(Tensor, weight).shape for weight in effective[::2]]
        return torch.stack(values).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of all weights and biases."""
        found: list[Tensor | None] = [None]
        for product, shape in zip(ctx.saved_tensors, ctx.shapes, strict=True):
            of_weight, of_bias = _weight_and_bias(product * gradient, shape)
            found += [of_weight, of_bias if ctx.needs_input_grad[len(found) + 1] else None]
        return tuple(found)


def _rows(effective: tuple[Tensor | None, Tensor | None], inputs: int) -> Tensor:
    """Return the rows with the bias as a last input [rows, inputs + 1], or where inputs count apart, with it apart.

    In that case [rows, positions + 1, inputs + 1]: the last position has nothing but the bias.
    """
    weight, bias = cast(Tensor, effective[0]).flatten(1), effective[1]
    last = weight.new_zeros(len(weight), 1) if bias is None else bias[:, None]
    if weight.shape[1] == inputs:
        return torch.cat([weight, last], 1)
    apart = weight.unflatten(1, (inputs, -1)).mT
    lone = torch.cat([apart.new_zeros(len(apart), 1, inputs), last[:, None]], 2)
    return torch.cat([torch.cat([apart, torch.zeros_like(apart[:, :, :1])], 2), lone], 1)


def _weight_and_bias(rows: Tensor, shape: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Undo `_rows`: return a weight of that shape and a bias."""
    if rows.dim() == 2:
        return rows[:, :-1].reshape(shape), rows[:, -1]
    return rows[:, :-1, :-1].mT.reshape(shape), rows[:, -1, -1]


def _read_by(layer: FreeRows, mean: Tensor) -> Tensor:
    """Return the second moment of what the rows read: of their own group's channels in a grouped convolution."""
    plain = cast(Layer, layer.layer)
    moment = window_moment(mean, plain)
    return moment[0] if len(moment) == 1 else moment[layer.rows.cpu() // (len(plain.weight) // len(moment))]
