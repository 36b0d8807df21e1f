"""A guard of old behaviour that needs no old data: what an update changes in what each layer computed (method.md 6)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from nss.anatomy import Anatomy
from nss.errors import ReadaptError
from nss.model import network_of
from nss.profile import Profile
from nss.rows import FreeNorm, FreeRows
from nss.surgery import Layer
from nss.windows import window_moment

# Of the mean of the diagonal of the moments; ten times as much or as little chooses neurons that are as good.
DAMPING = 0.1


FAINTEST = 1e-12
"""mean moment of a layer that old images leave without input"""


@dataclass(frozen=True)
class Term:
    """One layer: its free rows at the start, and the second moment of what each of them reads."""

    layer: FreeRows
    start: Tensor
    moment: Tensor
    """[inputs + 1, inputs + 1], or [rows, inputs + 1, inputs + 1] where each row reads channels of its own"""
    outputs: int

    @classmethod
    def of(cls, layer: FreeRows, moment: Tensor, outputs: int) -> Term:
        """Begin at the rows as they are now. outputs: of the whole layer, free or not."""
        start = rows_with_bias(layer.effective(), moment.shape[-1] - 1).detach().clone()
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
        self.terms: list[Term] = []
        for producer in anatomy.producers:
            layer = network.get_submodule(producer.module)
            if isinstance(layer, FreeRows) and layer.free_weight is not None:
                moment = _read_by(layer, profile.window(producer.name)).to(layer.free_weight)
                self.terms.append(Term.of(layer, moment, len(producer.out_ids)))
        for name, outputs in {each.module: len(each.ids) for each in anatomy.scalers}.items():
            norm = network.get_submodule(name)
            if isinstance(norm, FreeNorm) and not norm.folded and norm.free_weight is not None:
                self.terms.append(Term.of(norm, torch.eye(2).to(norm.free_weight), outputs))

    def __call__(self) -> Tensor:
        """Return the guard of the free rows as they are now, with gradients; zero at the start."""
        return cast(
            Tensor, _Change.apply(self.terms, *(each for term in self.terms for each in term.layer.effective()))
        )


class _Change(torch.autograd.Function):
    """Sum over terms of x_i^T G x_i / outputs, x_i the change of a row. Its gradient is 2 G x_i / outputs.

    The product that the value needs serves the gradient too, and with one function for all layers there is little else.
    """

    @staticmethod
    def forward(ctx: Any, terms: Sequence[Term], *effective: Tensor | None) -> Tensor:
        """effective: weight and bias of each term."""
        products, values = [], []
        for term, weight, bias in zip(terms, effective[::2], effective[1::2], strict=True):
            moved = rows_with_bias((weight, bias), term.moment.shape[-1] - 1).sub_(term.start)
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
            of_weight, of_bias = weight_and_bias(product * gradient, shape)
            found += [of_weight, of_bias if ctx.needs_input_grad[len(found) + 1] else None]
        return tuple(found)


def rows_with_bias(effective: tuple[Tensor | None, Tensor | None], inputs: int) -> Tensor:
    """Return the rows with the bias as a last input [rows, inputs + 1], or where inputs count apart, with it apart.

    In that case [rows, positions + 1, inputs + 1]: the last position has nothing but the bias.
    """
    weight, bias = cast(Tensor, effective[0]), effective[1]
    weight = weight.reshape(len(weight), -1)
    last = weight.new_zeros(len(weight), 1) if bias is None else bias[:, None]
    if weight.shape[1] == inputs:
        return torch.cat([weight, last], 1)
    apart = weight.unflatten(1, (inputs, -1)).mT
    lone = torch.cat([apart.new_zeros(len(apart), 1, inputs), last[:, None]], 2)
    return torch.cat([torch.cat([apart, torch.zeros_like(apart[:, :, :1])], 2), lone], 1)


def weight_and_bias(rows: Tensor, shape: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Undo `rows_with_bias`: return a weight of that shape and a bias."""
    if rows.dim() == 2:
        return rows[:, :-1].reshape(shape), rows[:, -1]
    return rows[:, :-1, :-1].mT.reshape(shape), rows[:, -1, -1]


def _read_by(layer: FreeRows, mean: Tensor) -> Tensor:
    """Return the second moment of what the rows read: of their own group's channels in a grouped convolution."""
    plain = cast(Layer, layer.layer)
    moment = window_moment(mean, plain)
    return moment[0] if len(moment) == 1 else moment[layer.rows.cpu() // (len(plain.weight) // len(moment))]


def gains(weight: Tensor, bias: Tensor | None, moment: Tensor) -> Tensor:
    """Return for each row outputs * g^T (G + d I)^-1 g, g the gradient of the loss for it: what tuning it is worth.

    Of all changes x of a row, g.x less the guard's x^T G x / outputs is largest, 1/4 of that, at half of
    outputs * G^-1 g: so much does the loss fall, to first order, where the guard allows it. What old images show
    nothing of would be worth anything without d (`root_of`).
    weight: gradient for the weight of the layer with the norm behind it folded in [rows, ..]; bias: the same of what is
    added [rows], None where nothing is. moment: `windows.window_moment` of the layer, [groups, inputs + 1, inputs + 1].
    Returns the type of `weight`, [rows].
    """
    inputs = moment.shape[-1] - 1
    gradient, moment = rows_with_bias((weight, bias), inputs), metric_of(moment.to(weight), weight, bias)
    gradient = gradient[..., : moment.shape[-1]]
    columns = gradient.reshape(len(moment), -1, gradient.shape[-1]).mT
    solved: Tensor = torch.linalg.solve_triangular(root_of(moment), columns, upper=False)
    return len(weight) * solved.square().sum(-2).reshape(len(weight), -1).sum(1)


def metric_of(moment: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return the moment that rows of `rows_with_bias` are measured by, without what is added where nothing is.

    Where inputs count apart, no row has weights and a bias: the mean of the inputs, which ties both, is left out.
    """
    if bias is None:
        return moment[..., :-1, :-1]
    if weight[0].numel() == moment.shape[-1] - 1:
        return moment
    apart = moment.clone()
    apart[..., -1, :-1] = apart[..., :-1, -1] = 0
    return apart


def root_of(moment: Tensor) -> Tensor:
    """Return the lower triangle L with L L^T = G + d I, d DAMPING of the mean of the diagonal of G.

    moment: G [.., n, n]. Rounded, it may be none of second moments: then d is ten times as much, and again, until there
    is such an L. Returns the shape and type of `moment`. Raises ReadaptError when it is not finite.
    """
    if not bool(moment.isfinite().all()):
        raise ReadaptError(
            "what a layer reads is not finite",
            where="profile",
            fix="profile this model, in single precision, on images without NaN or infinite numbers",
        )
    one = torch.eye(moment.shape[-1]).to(moment)
    mean = moment.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None].clamp_min(FAINTEST)
    damping, failed = DAMPING * mean, True
    while failed:
        factor, info = torch.linalg.cholesky_ex(moment + damping * one)
        damping, failed = damping * 10, bool(info.any())
    return cast(Tensor, factor)
