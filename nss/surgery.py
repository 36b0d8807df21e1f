"""Cutting channels out of a network in place: what `remove` and `load_model` share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
from torch import nn

from nss.coupling import lookup
from nss.errors import ModelError
from nss.operations import is_depthwise
from nss.sites import Sites, find_sites
from nss.weight_masks import apply_masks, refuse_unowned, release_masks

Layer = nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Linear


def shrink(network: nn.Module, input_shape: tuple[int, ...], kept: Mapping[str, tuple[int, ...]]) -> None:
    """Cut a freshly built network, in place, to the channels that a model folder names.

    kept: {layer: indices of its output channels that stay}. Raises ModelError if the layers do not exist or do not fit.
    """
    refuse_unowned(network, "cutting", ModelError)
    sites = find_sites(network, input_shape)
    sizes = {site.module: len(site) for site in sites}
    unknown = [
        layer
        for layer, indices in kept.items()
        if layer not in sizes or not indices or not 0 <= min(indices) <= max(indices) < sizes[layer]
    ]
    if unknown:
        raise ModelError(f"model.json keeps channels of {unknown[0]!r} that the factory's network does not have")
    neurons = {site.name: _mask(len(site), kept[site.module]) for site in sites if site.module in kept}
    cut(network, sites, sites.couple(neurons).ids)


def _mask(size: int, indices: tuple[int, ...]) -> torch.Tensor:
    mask = torch.zeros(size, dtype=torch.bool)
    mask[list(indices)] = True
    return mask


def cut(network: nn.Module, sites: Sites, kept: torch.Tensor) -> dict[str, torch.Tensor]:
    """Remove from `network`, in place, every channel that is not kept and can leave; set the others to zero.

    Masks of weights are cut with their weights. kept: bool [channels of the anatomy].
    Returns {layer: bool [neurons], True = still there}.
    """
    gone = sites.removable(kept)
    masked = ~kept & ~gone
    quiet, zeros = sites.quiet(masked), sites.zeros(masked)
    masks = release_masks(network)
    done: set[str] = set()
    for producer in sites.anatomy.producers:
        layer = cast(Layer, network.get_submodule(producer.module))
        if producer.module not in done:
            _silence(layer, lookup(quiet, producer.out_ids, False))
            _unread(layer, lookup(zeros, producer.in_ids, False))
            stay_out, stay_in = (~lookup(gone, ids, False) for ids in (producer.out_ids, producer.in_ids))
            if producer.module in masks:
                masks[producer.module] = _cut_weight(masks[producer.module], layer, stay_out, stay_in)
            _cut_layer(layer, stay_out, stay_in)
        done.add(producer.module)
    for scaler in sites.anatomy.scalers:
        if scaler.module not in done:
            norm = cast(nn.BatchNorm2d, network.get_submodule(scaler.module))
            _silence(norm, lookup(masked, scaler.ids, False))
            _cut_scaler(norm, ~lookup(gone, scaler.ids, False))
        done.add(scaler.module)
    apply_masks(network, masks)
    return {site.name: ~gone[site.ids] for site in sites}


def _silence(layer: Layer | nn.BatchNorm2d, rows: torch.Tensor) -> None:
    """A channel that is masked but cannot leave gets zero weights."""
    with torch.no_grad():
        for parameter in (layer.weight, layer.bias):
            if parameter is not None:
                parameter[rows.to(parameter.device)] = 0


def _unread(layer: Layer, columns: torch.Tensor) -> None:
    """Behind a sigmoid a silent channel is not zero: whoever reads it reads it with weight zero."""
    groups = int(getattr(layer, "groups", 1))
    if 1 < groups == len(columns):
        return  # depthwise: its own output channel is silent
    with torch.no_grad():
        rows = layer.weight.view(groups, -1, *layer.weight.shape[1:])
        for row, flags in zip(rows, columns.view(groups, -1), strict=True):
            row[:, flags.to(row.device)] = 0


def _cut_layer(layer: Layer, stay_out: torch.Tensor, stay_in: torch.Tensor) -> None:
    weight = _cut_weight(layer.weight, layer, stay_out, stay_in)
    groups = int(getattr(layer, "groups", 1))
    layer.weight = nn.Parameter(weight.detach().clone(), layer.weight.requires_grad)
    if layer.bias is not None:
        bias = layer.bias[stay_out.to(layer.bias.device)]
        layer.bias = nn.Parameter(bias.detach().clone(), layer.bias.requires_grad)
    _set_sizes(layer, int(stay_in.sum()), int(stay_out.sum()), depthwise=1 < groups == len(stay_in))


def _cut_weight(weight: torch.Tensor, layer: Layer, stay_out: torch.Tensor, stay_in: torch.Tensor) -> torch.Tensor:
    """weight: of the shape of the layer's, the weight itself or its mask."""
    groups = int(getattr(layer, "groups", 1))
    weight = weight[stay_out.to(weight.device)]
    if groups == 1:
        return weight[:, stay_in.to(weight.device)]
    if groups < len(stay_in):  # every group loses the same number: a table of what each group's outputs read
        return _cut_grouped(weight, stay_in.view(groups, -1).to(weight.device))
    return weight


def _cut_grouped(weight: torch.Tensor, stay: torch.Tensor) -> torch.Tensor:
    """weight: [out, in / groups, ...], stay: bool [groups, in / groups] with equal counts in each row."""
    rows = weight.view(len(stay), -1, *weight.shape[1:])
    return torch.cat([row[:, keep] for row, keep in zip(rows, stay, strict=True)])


def filters_by_channel(layer: nn.Module) -> bool:
    """Say whether a layer is depthwise, or was until it was cut to one channel: torch tells that from no other."""
    return is_depthwise(layer) or bool(vars(layer).get("depthwise", False))


def _set_sizes(layer: Layer, inputs: int, outputs: int, *, depthwise: bool) -> None:
    if isinstance(layer, nn.Linear):
        layer.in_features, layer.out_features = inputs, outputs
        return
    layer.in_channels, layer.out_channels = inputs, outputs
    if depthwise:
        layer.groups = inputs
        vars(layer)["depthwise"] = True


def _cut_scaler(norm: nn.BatchNorm2d, stay: torch.Tensor) -> None:
    if bool(stay.all()):
        return
    for name in ("weight", "bias", "running_mean", "running_var"):
        tensor = getattr(norm, name)
        if tensor is not None:
            smaller = tensor.detach()[stay.to(tensor.device)].clone()
            setattr(
                norm, name, nn.Parameter(smaller, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else smaller
            )
    norm.num_features = int(stay.sum())
