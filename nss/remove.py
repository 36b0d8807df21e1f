"""Physical removal of neurons: the outputs of the masked view from smaller tensors (method.md 1)."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import nn

from nss.anatomy import TIED
from nss.errors import SiteError
from nss.model import Classifier, model_digest, network_of, shape_of, with_network
from nss.sites import Sites, find_sites
from nss.surgery import cut
from nss.weight_masks import refuse_unowned

BOUND = f"{TIED}, and zero does not stay zero on the way there, so they are kept"


@dataclass(frozen=True)
class LayerRemoval:
    """What happens to the neurons of one layer."""

    total: int
    asked: int
    """how many were to be kept"""
    added: int
    """how many more are kept: by the union over its coupled group, or because they can be neither cut nor masked"""
    masked: int
    """how many cannot leave, and get zero weights instead"""
    reason: str
    """why they cannot, or can be neither cut nor masked; empty when there are none"""

    @property
    def kept(self) -> int:
        """How many the layer still has, those with zero weights not counted."""
        return self.asked + self.added

    @property
    def removed(self) -> int:
        """How many leave physically."""
        return self.total - self.kept - self.masked


@dataclass(frozen=True)
class RemovalPlan:
    """What `remove` will do, layer by layer."""

    layers: Mapping[str, LayerRemoval]

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain numbers and texts."""
        return {
            name: {**asdict(each), "kept": each.kept, "removed": each.removed} for name, each in self.layers.items()
        }


def plan_removal(
    model: nn.Module, neurons: Mapping[str, torch.Tensor], input_shape: Sequence[int] | None = None
) -> RemovalPlan:
    """Say what `remove(model, neurons)` would keep, add by coupling, remove, and only mask, and why.

    The arguments and the errors are those of `remove`.

    >>> nss.plan_removal(model, {"conv1": torch.arange(16) < 8}).layers["conv1"].removed
    8
    """
    refuse_unowned(network_of(model), "removing", SiteError)
    sites = find_sites(network_of(model), shape_of(model, input_shape))
    coupled = sites.couple(neurons)
    masked, bound = ~coupled.ids & ~sites.removable(coupled.ids), sites.bound()
    layers = {}
    for site in sites:
        kept, added = int(coupled.neurons[site.name].sum()), coupled.added[site.name]
        stuck = site.ids[masked[site.ids]]
        unasked = site.name in neurons and bool((bound[site.ids] & ~neurons[site.name].cpu()).any())
        reasons = [_reason(sites, stuck)] * bool(len(stuck)) + [BOUND] * unasked
        layers[site.name] = LayerRemoval(len(site), kept - added, added, len(stuck), "; ".join(reasons))
    return RemovalPlan(layers)


def _reason(sites: Sites, stuck: torch.Tensor) -> str:
    roots = sites.anatomy.classes.roots()
    own = set(roots[stuck].tolist())
    reasons = {reason for channel, reason in sites.anatomy.fixed.items() if int(roots[channel]) in own}
    return "; ".join(sorted(reasons)) or "the groups of a grouped convolution would lose unequal numbers"


def remove(
    model: nn.Module, neurons: Mapping[str, torch.Tensor], input_shape: Sequence[int] | None = None
) -> nn.Module:
    """Return a smaller copy of `model` with the outputs of `sliced(model, neurons)`, ready to train on.

    neurons: {layer: bool [neurons], True = keep}; layers that are not named are kept whole, coupled neurons stay if
    any of their group does. Neurons that cannot leave (fixed by a chunk, unequal groups of a grouped convolution) get
    zero weights instead, or are kept, as in `sliced`, where that would not silence them; `plan_removal` says why.
    input_shape: needed for models not made by `build_model`. Use a fresh optimizer afterwards.
    Raises SiteError for unknown layers, wrong masks, an emptied layer, and weights that are computed from others or
    shared by layers.

    >>> smaller = nss.remove(model, {"conv1": torch.arange(16) < 8})
    >>> smaller.network.conv1.out_channels
    8
    """
    refuse_unowned(network_of(model), "removing", SiteError)
    whole = copy.deepcopy(model)
    smaller = cut_out(whole, find_sites(network_of(whole), shape_of(model, input_shape)), neurons)
    if isinstance(smaller, Classifier):
        smaller.spec = replace(smaller.spec, parent=model_digest(model))
    return smaller


def cut_out(model: nn.Module, sites: Sites, neurons: Mapping[str, torch.Tensor]) -> nn.Module:
    """Remove neurons from a model in place, and return it; a Classifier as a new one, whose spec says what is left.

    sites: of the model, or of one that it is a copy of: they need not be found again for each of many copies.
    """
    network = network_of(model)
    left = cut(network, sites, sites.couple(neurons).ids)
    return with_network(model, network, kept=_composed(model, sites, left)) if isinstance(model, Classifier) else model


def _composed(model: Classifier, sites: Sites, left: Mapping[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    """Which channels of the factory's network are left, also after several removals."""
    kept = dict(model.spec.kept)
    for site in sites:
        indices = left[site.name].nonzero()[:, 0].tolist()
        before = kept.get(site.module, range(len(site)))
        if site.name == site.module and (site.module in kept or len(indices) < len(site)):
            kept[site.module] = tuple(before[index] for index in indices)
    return kept
