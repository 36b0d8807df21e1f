"""Sites: the layers whose neurons can be measured, masked and removed, and the nodes where their activations end."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import fx, nn

from nss import operations as ops
from nss.anatomy import GROUP_NORM, Anatomy, dissect
from nss.coupling import any_in_class
from nss.errors import SiteError
from nss.mask import ChannelMask


@dataclass(frozen=True)
class Site:
    """One layer's neurons. `name` is the layer's path in the network, with #2, #3 .. for further calls of one layer."""

    name: str
    module: str
    node: fx.Node
    """where the activation ends: after the norm and the nonlinearity that follow the layer (method.md 1)"""
    dim: int
    ids: torch.Tensor
    """names of the neurons in the anatomy, int64 [neurons]"""

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class Coupled:
    """Kept neurons after coupling: `neurons` {site: bool [neurons]}, `added` {site: how many the union added}."""

    neurons: dict[str, torch.Tensor]
    added: dict[str, int]
    ids: torch.Tensor
    """bool [all channels of the anatomy]"""


@dataclass(frozen=True)
class Sites:
    """All sites of a network, in forward order, with the anatomy they come from."""

    anatomy: Anatomy
    sites: tuple[Site, ...]

    def __iter__(self) -> Iterator[Site]:
        return iter(self.sites)

    def __len__(self) -> int:
        return len(self.sites)

    def couple(self, neurons: Mapping[str, torch.Tensor]) -> Coupled:
        """Widen a choice of neurons to what can be kept or dropped together: a group is kept if any member is.

        neurons: {site name: bool [neurons], True = keep}; sites that are not named are kept whole, and so is what
        `bound` says.
        Raises SiteError for unknown sites, wrong lengths or types, and a layer that would be emptied.

        >>> coupled = find_sites(model).couple({"conv1": mask})
        >>> coupled.added["conv1"]
        0
        """
        self._check(neurons)
        asked = torch.ones(len(self.anatomy.classes), dtype=torch.bool)
        for site in self.sites:
            asked[site.ids] = neurons.get(site.name, torch.ones(len(site), dtype=torch.bool)).cpu()
        kept = any_in_class(asked, self.anatomy.classes.roots()) | self.bound()
        added = {site.name: int((kept[site.ids] & ~asked[site.ids]).sum()) for site in self.sites}
        return Coupled({site.name: kept[site.ids] for site in self.sites}, added, kept)

    def _check(self, neurons: Mapping[str, torch.Tensor]) -> None:
        sizes = {site.name: len(site) for site in self.sites}
        for name, mask in neurons.items():
            if name not in sizes:
                raise SiteError(f"there is no layer {name!r} with neurons", allowed=", ".join(sizes))
            if mask.dtype != torch.bool or tuple(mask.shape) != (sizes[name],):
                found = f"{str(mask.dtype).removeprefix('torch.')} {list(mask.shape)}"
                raise SiteError(
                    f"the neurons of {name!r} are {found}", where=name, allowed=f"bool [{sizes[name]}], True = keep"
                )
            if not bool(mask.any()):
                raise SiteError(f"no neuron of {name!r} is kept", where=name, allowed="at least one neuron a layer")

    def bound(self) -> torch.Tensor:
        """Return which channels always stay, bool [ids]: tied to what is no neuron, and not to be silenced either.

        Zero does not stay zero on their way, and no norm with weights of its own can see to that.
        """
        moved = torch.zeros(len(self.anatomy.classes), dtype=torch.bool)
        for node, ids, _ in self.anatomy.restless:
            if getattr(ops.module_of(node, self.anatomy.graph), "weight", None) is None:
                moved[ids[ids >= 0]] = True
        return any_in_class(moved, self.anatomy.classes.roots()) & self._flagged(self.anatomy.tied)

    def zeros(self, masked: torch.Tensor) -> torch.Tensor:
        """Of the masked channels, those that are zero wherever they are read: not added to what is no neuron."""
        return masked & ~self._flagged(self.anatomy.tied)

    def quiet(self, masked: torch.Tensor) -> torch.Tensor:
        """Of the masked channels, those that the layer making them may stop making: no GroupNorm averages over them."""
        return masked & ~self._flagged(member for member, why in self.anatomy.fixed.items() if why == GROUP_NORM)

    def _flagged(self, members: Iterable[int]) -> torch.Tensor:
        flags = torch.zeros(len(self.anatomy.classes), dtype=torch.bool)
        flags[list(members)] = True
        return any_in_class(flags, self.anatomy.classes.roots())

    def removable(self, kept: torch.Tensor) -> torch.Tensor:
        """Of the channels that are not kept, those that can leave physically. kept: bool [ids]. Returns bool [ids]."""
        blocked = kept.clone()
        blocked[list(self.anatomy.fixed | self.anatomy.mixed)] = True
        classes = self.anatomy.classes.copy()
        classes.tie(self.anatomy.removal)
        return ~any_in_class(blocked, classes.roots())


def find_sites(network: nn.Module, input_shape: tuple[int, ...]) -> Sites:
    """Find the neurons of `network`. input_shape: (channels, height, width).

    A layer is a site unless its channels are the class scores, or pass through a LayerNorm, an attention or an
    operation that is not known (method.md 1: in a transformer block the hidden units of the MLP are what remains).
    Raises SiteError when the network cannot be traced, does not take that shape, or has no neurons.
    """
    anatomy = dissect(network, input_shape)
    roots = anatomy.classes.roots()
    mixed = torch.zeros(len(roots), dtype=torch.bool)
    mixed[list(anatomy.mixed)] = True
    mixed = any_in_class(mixed, roots)
    sites = tuple(
        Site(each.name, each.module, _end(each.node, anatomy.graph), each.dim, each.out_ids)
        for each in anatomy.producers
        if not bool(mixed[each.out_ids].any())
    )
    if not sites:
        raise _without_neurons(network)
    return Sites(anatomy, sites)


def _without_neurons(network: nn.Module) -> SiteError:
    synced = [name for name, module in network.named_modules() if isinstance(module, nn.SyncBatchNorm)]
    names = f"{', '.join(synced[:3])}{' ..' if len(synced) > 3 else ''}"
    return SiteError(
        f"{type(network).__name__} has no neurons",
        where=f"{names}: SyncBatchNorm, whose channels are not followed" if synced else "",
        allowed="at least one convolution or linear layer before the class head",
        fix="build the network with BatchNorm2d instead and load the same state_dict" if synced else "",
    )


def _end(node: fx.Node, graph: fx.GraphModule) -> fx.Node:
    """Follow the only user through norms, pools and dropout up to the first nonlinearity."""
    end = node
    while len(node.users) == 1:
        node = next(iter(node.users))
        if ops.is_activation(node, graph):
            following = next(iter(node.users)) if len(node.users) == 1 else node
            return following if isinstance(ops.module_of(following, graph), ChannelMask) else node
        if ops.is_norm(node, graph):
            end = node
        elif not ops.is_passing(node, graph):
            break
    return end
