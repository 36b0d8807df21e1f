"""A guard of old behaviour that needs no old data: what an update changes in what each layer computed (method.md 6)."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from nss.anatomy import Anatomy
from nss.model import network_of
from nss.moments import Groups, Moments, Whole, flat_rows, moments_of
from nss.profile import Profile
from nss.rows import FreeNorm, FreeRows
from nss.surgery import Layer


@dataclass(frozen=True)
class Term:
    """One layer: its free rows at the start, and what a change of them does to what it computed on old data."""

    layer: FreeRows
    start: Tensor
    """[rows, inputs + 1], with the norm behind the layer folded in; without the last where nothing is added; a copy"""
    moments: Moments
    outputs: int
    """of the whole layer, free or not"""

    @classmethod
    def of(cls, layer: FreeRows, moments: Moments, outputs: int) -> Term:
        """Begin at the rows as they are now."""
        return cls(layer, _flat(layer).clone(), moments, outputs)

    def value(self) -> Tensor:
        """Return the sum over the rows of x^T G x / outputs, x how far each is from the start."""
        moved = (_flat(self.layer) - self.start).float()
        return torch.dot(self.moments.times(moved).flatten(), moved.flatten()) / self.outputs


class Guard:
    """Sum over layers of tr(dW G dW^T) / outputs: dW the change of the free rows, G the second moment of what they see.

    Both are those of the layer with the norm behind it folded in, so that each output counts in units of its spread. G
    is taken over all inputs and positions of a kernel together, and a last input of ones for the bias, from the
    profile's `windows`. Of wide layers (`windows.is_wide`) it is the product of one of channels and one of positions,
    the bias by itself. A norm that has no layer of its own before it reads what it normed itself: on old data of mean 0
    and variance 1.
    Raises ProfileError when the profile has no windows, ReadaptError when its moments are not finite.

    >>> guard = Guard(frozen, anatomy, profile)
    >>> guard()
    0.0
    """

    def __init__(self, frozen: nn.Module, anatomy: Anatomy, profile: Profile) -> None:
        network = network_of(frozen)
        self.terms: list[Term] = []
        for name, outputs in {each.module: len(each.out_ids) for each in anatomy.producers}.items():
            layer = network.get_submodule(name)
            if isinstance(layer, FreeRows) and layer.free_weight is not None:
                mean, shifted = seen_by(anatomy, profile, name), layer.effective()[1] is not None
                moments = moments_of(mean, cast(Layer, layer.layer), layer.rows, shifted=shifted)
                self.terms.append(Term.of(layer, moments, outputs))
        for name, outputs in {each.module: len(each.ids) for each in anatomy.scalers}.items():
            norm = network.get_submodule(name)
            if isinstance(norm, FreeNorm) and not norm.folded and norm.free_weight is not None:
                self.terms.append(Term.of(norm, _of_normed(norm, outputs), outputs))

    @torch.no_grad()
    def __call__(self) -> float:
        """Return the guard of the free rows as they are now; zero at the start."""
        return float(sum(term.value() for term in self.terms))


def seen_by(anatomy: Anatomy, profile: Profile, module: str) -> Tensor:
    """Return `Profile.window` of what a layer reads. One that is called again reads all its inputs."""
    calls = [profile.window(each.name) for each in anatomy.producers if each.module == module]
    return functools.reduce(torch.add, calls)


def _of_normed(norm: FreeNorm, outputs: int) -> Moments:
    """Return the moments of what gain and shift of a norm by itself read."""
    entries = 1 if norm.free_bias is None else 2
    return Whole(torch.eye(entries, device=norm.rows.device)[None], Groups(norm.rows, outputs, 1))


def _flat(layer: FreeRows) -> Tensor:
    """Return the free rows as the layer computes with them, [rows, inputs + 1], float32 or float64."""
    weight, bias = layer.effective()
    rows = flat_rows(cast(Tensor, weight), bias).detach()
    return rows.to(torch.promote_types(rows.dtype, torch.float32))
