"""What a network would cost with fewer channels, from its anatomy alone: no network is built to find out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from nss.model import network_of, shape_of
from nss.operations import is_depthwise
from nss.sites import Sites, find_sites
from nss.size import count_macs, count_parameters


@dataclass(frozen=True)
class _Part:
    """A call of a layer: `places` multiply-adds for each pair of an input and an output channel."""

    in_ids: Tensor
    out_ids: Tensor
    places: int
    kernel: int
    """weights for each pair of channels; 0 for further calls of the same layer"""
    groups: int
    depthwise: bool
    bias: int


@dataclass(frozen=True)
class CostModel:
    """Multiply-adds for one image, and weights, as a function of the channels that stay."""

    parts: tuple[_Part, ...]
    norms: tuple[tuple[Tensor, int], ...]
    """(channels, weights for each) of norms"""
    other_macs: int
    other_parameters: int

    def macs(self, stay: Tensor) -> int:
        """Return the multiply-adds for one image. stay: bool [channels of the anatomy]."""
        stay = _with_unnamed(stay)
        return self.other_macs + sum(_pairs(part, stay) * part.places for part in self.parts)

    def parameters(self, stay: Tensor) -> int:
        """Return the number of weights. stay: bool [channels of the anatomy]."""
        stay = _with_unnamed(stay)
        weights = sum(_pairs(part, stay) * part.kernel + part.bias * _count(part.out_ids, stay) for part in self.parts)
        return self.other_parameters + weights + sum(each * _count(ids, stay) for ids, each in self.norms)


def _with_unnamed(stay: Tensor) -> Tensor:
    """Channels without a name, those below 0, always stay: theirs is the last place."""
    return torch.cat([stay, stay.new_ones(1)])


def _count(ids: Tensor, stay: Tensor) -> int:
    """Number of channels that stay, of those at the last place too."""
    return int(stay[ids.clamp_min(-1)].sum())


def _pairs(part: _Part, stay: Tensor) -> int:
    outputs = _count(part.out_ids, stay)
    return outputs if part.depthwise else outputs * _count(part.in_ids, stay) // part.groups


def cost_model(model: nn.Module, sites: Sites | None = None, input_shape: tuple[int, ...] | None = None) -> CostModel:
    """Read off what each channel of `model` costs. sites: of its network, found anew when not given.

    >>> cost = cost_model(model)
    >>> cost.macs(torch.ones(len(sites.anatomy.classes), dtype=torch.bool)) == nss.count_macs(model)
    True
    """
    network, shape = network_of(model), shape_of(model, input_shape)
    sites = sites or find_sites(network, shape)
    parts, seen = [], set()
    for producer in sites.anatomy.producers:
        layer = cast(nn.Conv2d | nn.Linear, network.get_submodule(producer.module))
        groups = int(getattr(layer, "groups", 1))
        kernel = layer.weight[0, 0].numel()
        first = producer.module not in seen
        seen.add(producer.module)
        parts.append(
            _Part(
                producer.in_ids,
                producer.out_ids,
                producer.places * kernel,
                kernel if first else 0,
                groups,
                is_depthwise(layer),
                int(first and layer.bias is not None),
            )
        )
    norms, done = [], set()
    for scaler in sites.anatomy.scalers:
        if scaler.module not in done:
            own = sum(1 for _ in network.get_submodule(scaler.module).parameters())
            norms.append((scaler.ids, own))
        done.add(scaler.module)
    bare = CostModel(tuple(parts), tuple(norms), 0, 0)
    whole = torch.ones(len(sites.anatomy.classes), dtype=torch.bool)
    macs, parameters = count_macs(model, shape), count_parameters(model)
    return CostModel(bare.parts, bare.norms, macs - bare.macs(whole), parameters - bare.parameters(whole))
