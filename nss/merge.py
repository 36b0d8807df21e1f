"""Merging: what non-critical neurons carried is folded into the layers that read them (method.md 5).

Activations of a layer are largely linear combinations of one another, and the Gram matrix of a reader's input says
which: with K kept and R removed, B = (G_KK + ridge)^-1 G_KR rebuilds R from K, and the reader's weights become
W_K + W_R B^T. No sample is needed but the sums in the profile.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, fx, nn

from nss import operations as ops
from nss.anatomy import Producer
from nss.coupling import lookup
from nss.gather import readers
from nss.profile import Profile
from nss.sites import Sites
from nss.surgery import Layer
from nss.units import Units

RIDGE = 1e-3


@dataclass(frozen=True)
class Reading:
    """A layer that mixes the channels of some site: what it reads, how they move together, what it makes of them."""

    name: str
    module: str
    ids: Tensor
    """names of the channels it reads, int64 [channels]"""
    gram: Tensor
    """their second moment, float64 [channels, channels]"""
    importance: Tensor
    """how errors in them add up in what the layer computes, sum of W^T W over outputs (in units of their spread where a
    norm follows) and kernel positions, float64 [channels, channels]"""


def readings(network: nn.Module, sites: Sites, profile: Profile) -> Iterator[Reading]:
    """Yield every reader of `network` whose input's Gram matrix was gathered, in forward order."""
    for reader in readers(sites):
        if reader.name not in profile.grams:
            continue
        producer = next(each for each in sites.anatomy.producers if each.name == reader.name)
        layer = cast(Layer, network.get_submodule(producer.module))
        weight = spread_weight(layer, len(reader.ids)) * output_scale(producer, sites.anatomy.graph)[:, None, None]
        importance = torch.einsum("oip,ojp->ij", weight, weight)
        yield Reading(reader.name, producer.module, reader.ids, profile.gram(reader.name), importance)


def spread_weight(layer: Layer, channels: int) -> Tensor:
    """Return a layer's weights over all of its input channels, float64 [outputs, channels, positions] on the CPU.

    A grouped convolution reads zero of other groups' channels; a linear layer behind a flattened map reads each
    channel at several positions.
    """
    weight = layer.weight.detach().cpu().double()
    groups = int(getattr(layer, "groups", 1))
    if isinstance(layer, nn.Linear):
        return weight.reshape(len(weight), channels, -1)
    weight = weight.flatten(2)
    if groups == 1:
        return weight
    blocks = weight.view(groups, -1, *weight.shape[1:])
    wide = weight.new_zeros(groups, blocks.shape[1], groups, *weight.shape[1:])
    wide[range(groups), :, range(groups)] = blocks
    return wide.view(len(weight), channels, -1)


def output_scale(producer: Producer, graph: fx.GraphModule) -> Tensor:
    """Return what the norm behind a layer multiplies each of its outputs by; ones without a norm.

    Returns float64 [outputs] on the CPU.
    """
    norm = ops.norm_behind(producer.node, graph)
    if norm is None or norm.running_var is None:
        outputs = len(cast(Layer, graph.get_submodule(producer.module)).weight)
        return torch.ones(outputs, dtype=torch.float64)
    scale = (norm.running_var.cpu().double() + norm.eps).rsqrt()
    return scale * norm.weight.detach().cpu().double() if norm.affine else scale


@dataclass(frozen=True)
class Order:
    """The units of a group in the order in which they are kept, and what the readers miss without the rest."""

    units: Tensor
    """int64 [units], the most needed first"""
    missing: Tensor
    """float64 [units + 1]: share of what the readers compute that is lost when only the first k units are kept"""


def unit_scores(profile: Profile, sites: Sites, units: Units) -> Tensor:
    """Return how much each unit contributes to the category that needs it most, float64 [units].

    That decides between units where nothing reads a layer. By taylor, where the profile has it.
    """
    scores = torch.zeros(len(units.removable), dtype=torch.float64)
    by_layer = profile.scores("taylor" if "taylor" in profile.metrics else profile.metrics[0])
    for site in sites:
        scores.scatter_reduce_(0, units.of[site.ids], by_layer[site.name].max(0).values, "amax")
    return scores


def order_units(units: Tensor, of: Tensor, readers: Sequence[Reading], scores: Tensor) -> Order:
    """Order units by what they explain of what all readers compute from them, greedily (pivoted Cholesky).

    units: int64 [n], of: int64 [channels of the anatomy], the unit of each; scores: float64 [n], decides where no
    reader does. Ties go to the lower number.
    """
    place = {int(unit): row for row, unit in enumerate(units.tolist())}
    parts = [part for part in (_Part.of(each, of, place) for each in readers) if part is not None]
    if not parts:
        order = scores.argsort(descending=True, stable=True)
        rest = 1 - scores[order].cumsum(0) / scores.sum() if scores.sum() > 0 else torch.zeros(len(units))
        return Order(units[order], torch.cat([torch.ones(1), rest]).double().clamp_min(0))
    taken = torch.zeros(len(units), dtype=torch.bool)
    chosen, missing = [], [1.0]
    for _ in range(len(units)):
        gain = torch.stack([part.gains(len(units)) for part in parts]).mean(0)
        best = int(gain.masked_fill(taken, -1).argmax())
        taken[best] = True
        for part in parts:
            part.take(best)
        chosen.append(best)
        missing.append(sum(part.left() for part in parts) / len(parts))
    return Order(units[chosen], torch.tensor(missing, dtype=torch.float64).clamp(0, 1).cummin(0).values)


class _Part:
    """The channels of one group in one reader: what is left of their second moments after those already kept."""

    def __init__(self, rows: Tensor, residual: Tensor, importance: Tensor) -> None:
        self.rows, self.residual = rows, residual
        # Below this a channel is explained by others: what is left of it are rounding errors, maybe negative.
        self.floor = 1e-10 * residual.diagonal()
        self.weighted = importance @ residual
        self.total = float(self.weighted.diagonal().sum())

    @classmethod
    def of(cls, reading: Reading, of: Tensor, place: dict[int, int]) -> _Part | None:
        """Return the part of `reading` that these units are in; None when it reads none of them, or nothing at all."""
        unit = lookup(of, reading.ids, -1)
        rows = torch.tensor([place.get(each, -1) for each in unit.tolist()])
        own = rows >= 0
        part = cls(rows[own], reading.gram[own][:, own].clone(), reading.importance[own][:, own])
        return part if part.total > 0 else None

    def gains(self, count: int) -> Tensor:
        """Return the share of what is read that each unit would explain, float64 [count]."""
        each = (self.residual * self.weighted).sum(0) / self.residual.diagonal().clamp_min(1e-30)
        dead = self.residual.diagonal() <= self.floor
        return each.new_zeros(count).index_add_(0, self.rows, each.masked_fill(dead, 0)) / self.total

    def take(self, unit: int) -> None:
        """Explain what the unit's channels explain."""
        for channel in (self.rows == unit).nonzero()[:, 0].tolist():
            pivot = self.residual[channel, channel]
            if pivot <= self.floor[channel]:
                continue
            column = self.residual[:, channel] / pivot.sqrt()
            weighted = self.weighted[:, channel] / pivot.sqrt()
            self.residual = self.residual - torch.outer(column, column)
            self.weighted = self.weighted - torch.outer(weighted, column)

    def left(self) -> float:
        """Return the share of what is read that is not explained."""
        return float(self.weighted.diagonal().sum()) / self.total


def fold(network: nn.Module, reading: Reading, stay: Tensor, ridge: float = RIDGE) -> None:
    """Give a reader, in place, the weights that rebuild what it read from the channels that stay.

    stay: bool [channels of the anatomy]. The columns of channels that leave become zero. A layer that every position
    reads alike is folded alike at every position.
    """
    kept = lookup(stay, reading.ids, True)
    if bool(kept.all()):
        return
    layer = cast(Layer, network.get_submodule(reading.module))
    groups = int(getattr(layer, "groups", 1))
    size = len(kept) // groups
    with torch.no_grad():
        for group in range(groups):
            own = slice(group * size, (group + 1) * size)
            rows = slice(group * len(layer.weight) // groups, (group + 1) * len(layer.weight) // groups)
            weight = layer.weight[rows]
            folded = _folded(weight.reshape(len(weight), size, -1), reading.gram[own, own], kept[own], ridge)
            weight.copy_(folded.reshape(weight.shape))


def _folded(weight: Tensor, gram: Tensor, kept: Tensor, ridge: float) -> Tensor:
    """weight: [outputs, channels, positions]. Returns the same shape, zero where not kept."""
    inner = gram[kept][:, kept]
    inner = inner + ridge * inner.diagonal().mean().clamp_min(1e-30) * torch.eye(len(inner), dtype=inner.dtype)
    rebuild = torch.linalg.solve(inner, gram[kept][:, ~kept]).to(weight)
    result = weight.clone()
    result[:, kept] += torch.einsum("orp,kr->okp", weight[:, ~kept], rebuild)
    result[:, ~kept] = 0
    return result
