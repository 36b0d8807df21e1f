"""Masked view of a model: the same network, with neurons held at zero (method.md 1 and 4)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import fx, nn

from nss.coupling import lookup
from nss.mask import ChannelMask
from nss.model import device_of, network_of, shape_of, with_network
from nss.sites import Coupled, Sites, find_sites
from nss.taps import with_modules


def sliced(
    model: nn.Module, neurons: Mapping[str, torch.Tensor], input_shape: Sequence[int] | None = None
) -> nn.Module:
    """Return a view of `model` in which the neurons that are not kept are zero behind norm and nonlinearity.

    neurons: {layer: bool [neurons], True = keep}, layers that are not named are kept whole; coupled neurons are kept
    if any of their group is, as are those that `remove` can neither cut nor silence (see `plan_removal`). input_shape:
    (channels, height, width), needed for models not made by `build_model`. Weights are shared with `model`.
    Raises SiteError for unknown layers, wrong masks, or an emptied layer.

    >>> view = nss.sliced(model, {"conv1": torch.arange(16) < 8})
    >>> view(images).shape
    torch.Size([2, 10])
    """
    network = network_of(model)
    sites = find_sites(network, shape_of(model, input_shape))
    return with_network(model, mask_graph(sites, sites.couple(neurons), network))


def mask_graph(sites: Sites, coupled: Coupled, network: nn.Module) -> fx.GraphModule:
    """Return the traced network with masks behind every site, and again wherever zero would not stay zero."""
    device = device_of(network)
    masks: dict[fx.Node, ChannelMask] = {}
    for node, ids, dim in sites.anatomy.restless:
        keep = lookup(coupled.ids, ids, True)
        masks[node] = ChannelMask(keep.to(device), dim)
    for site in sites:
        masks[site.node] = ChannelMask(coupled.neurons[site.name].to(device), site.dim)
    needed = {node: mask for node, mask in masks.items() if not bool(mask.mask.all())}
    modes = {name: module.training for name, module in network.named_modules()}
    view = with_modules(sites.anatomy.graph, needed, "mask")
    for name, module in view.named_modules():
        module.training = modes.get(name, network.training)
    return view
