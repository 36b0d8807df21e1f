"""Units of removal: the channels that can only leave together, and which units compete for the same places."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from nss.anatomy import NONE
from nss.coupling import lookup
from nss.sites import Sites


@dataclass(frozen=True)
class Group:
    """Sites whose neurons are tied (a residual stream, a depthwise chain), or a single one, and their units."""

    name: str
    """of the first site"""
    sites: tuple[str, ...]
    units: Tensor
    """numbers of the units that can leave, int64 [units]"""
    stuck: int
    """number of units that cannot"""
    members: tuple[Tensor, ...]
    """for each site, the numbers of all its units, int64"""


@dataclass(frozen=True)
class Units:
    """Which unit each channel of the anatomy belongs to."""

    of: Tensor
    """int64 [channels of the anatomy]; NONE where a channel is no neuron"""
    groups: tuple[Group, ...]
    removable: Tensor
    """bool [units]"""

    def channels(self, kept: Tensor) -> Tensor:
        """Return the channels that stay when `kept` units do, those that are no neurons included.

        kept: bool [units]. Returns bool [channels of the anatomy].
        """
        return lookup(kept, self.of, True)

    def kept(self, neurons: Mapping[str, Tensor], sites: Sites) -> Tensor:
        """Return the units that a choice of neurons keeps: those with any kept neuron. Returns bool [units]."""
        channels = sites.couple(neurons).ids
        kept = torch.zeros(len(self.removable), dtype=torch.bool)
        own = self.of >= 0
        kept[self.of[own & channels]] = True
        return kept | ~self.removable


def find_units(sites: Sites) -> Units:
    """Group the neurons of a network by what can only leave together.

    >>> find_units(find_sites(network, (3, 32, 32))).groups[0].sites
    ('stem.0', 'blocks.0.conv2', 'blocks.1.conv2', 'blocks.2.conv2')
    """
    classes = sites.anatomy.classes.copy()
    classes.tie(sites.anatomy.removal)
    roots = classes.roots()
    own = torch.zeros(len(roots), dtype=torch.bool)
    for site in sites:
        own[site.ids] = True
    labels, numbers = torch.unique(roots[own], return_inverse=True)
    of = torch.full((len(roots),), NONE)
    of[own] = numbers
    leaves = sites.removable(torch.zeros(len(roots), dtype=torch.bool))
    removable = torch.zeros(len(labels), dtype=torch.bool)
    removable[of[own & leaves]] = True
    return Units(of, _groups(sites, of, removable), removable)


def _groups(sites: Sites, of: Tensor, removable: Tensor) -> tuple[Group, ...]:
    """Join the sites that share units, in forward order."""
    members: list[tuple[set[int], list[str]]] = []
    for site in sites:
        units, names = set(of[site.ids].tolist()), [site.name]
        apart = []
        for other in members:
            if units & other[0]:
                units |= other[0]
                names = other[1] + names
            else:
                apart.append(other)
        members = [*apart, (units, names)]
    order = {site.name: place for place, site in enumerate(sites)}
    groups = []
    for units, names in members:
        numbers = torch.tensor(sorted(units))
        free = numbers[removable[numbers]]
        own = tuple(sorted(names, key=order.__getitem__))
        parts = tuple(of[site.ids].unique() for site in sites if site.name in names)
        groups.append(Group(own[0], own, free, len(numbers) - len(free), parts))
    return tuple(sorted(groups, key=lambda group: order[group.name]))
