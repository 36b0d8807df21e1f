"""Structural freezing: a copy of a model whose only parameters are the entries that may move (method.md 6).

Masking gradients does not freeze: weight decay, momentum and norm statistics move what has no gradient. Here a frozen
number is no parameter at all. Each layer keeps all its numbers as buffers and its free rows as parameters; the forward
puts them together, and the backward computes weight gradients for the free rows alone. A BatchNorm whose statistics do
not move is a fixed scale and shift: it is folded into the convolution before it, which saves its two passes. Any other
norm with running statistics stays in evaluation mode.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Self, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from nss.anatomy import Anatomy
from nss.contexts import evaluating
from nss.coupling import lookup
from nss.errors import SiteError
from nss.model import network_of, shape_of
from nss.operations import CHANNEL_NORMS, CONVOLUTIONS, is_max_pool, module_calls, module_of, norm_behind
from nss.rows import FoldedActivation, FreeConvolution, FreeLinear, FreeNorm, FreeRows, RectifiedPool
from nss.sites import find_sites
from nss.weight_masks import apply_masks, refuse_unowned, release_masks


class StillNorm(nn.Module):
    """A norm that uses its running statistics, and leaves them as they are, in training too."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.training = layer.training
        self.layer = layer.eval()

    def train(self, mode: bool = True) -> Self:
        """Note the mode; the norm stays in evaluation mode."""
        self.training = mode
        return self

    def forward(self, x: Tensor) -> Tensor:
        """x: [n, channels, ..]. Returns the same shape."""
        normed: Tensor = self.layer(x)
        return normed

    def settled(self) -> nn.Module:
        """Return the norm, in the mode that this is in."""
        return self.layer.train(self.training)


def freeze(model: nn.Module, free: Mapping[str, Tensor], input_shape: Sequence[int] | None = None) -> nn.Module:
    """Return a copy of `model` whose only parameters are the free neurons' incoming weights, biases and norm entries.

    free: {layer: bool [neurons], True = may move}, layers as in a profile, or the class head; layers that are not named
    are frozen. In a layer that is called several times a neuron moves if every call that is named lets it. A norm with
    running statistics uses them, and they stay as they are, whatever mode the model is in; masked weights stay zero.
    Train the copy with any optimizer over its `parameters()`, then `thaw` it. input_shape: needed for models not made
    by `build_model`.
    Source: NeuSemSlice, arXiv 2407.20281, section 3 (critical neurons tuned, the rest frozen).
    Raises SiteError for unknown layers, masks of a wrong length or type, weights that are computed from others or
    shared by layers, and a network of which a frozen copy answers otherwise, or that calls layers that are not
    registered where it calls them from.

    >>> frozen = freeze(model, {"conv1": torch.arange(16) < 4})
    >>> [tuple(parameter.shape) for parameter in frozen.parameters()]
    [(4, 1, 5, 5), (4,)]
    """
    refuse_unowned(network_of(model), "freezing", SiteError)
    twin = copy.deepcopy(model)
    network = network_of(twin)
    masks = release_masks(network)
    anatomy = find_sites(network, shape_of(model, input_shape)).anatomy
    rows = free_entries(anatomy, free)
    for module in list(twin.modules()):
        _hold(module)
    norms = followed_by_norm(anatomy)
    relus = _followed_by_relu(anatomy, norms)
    wrapped = _wrapped(network, rows, norms, relus, _followed_by_pool(anatomy, relus))
    for name, mask in masks.items():
        layer = wrapped.get(id(network.get_submodule(name)))
        if isinstance(layer, FreeRows):
            layer.mask(mask)
    _replace(network, wrapped)
    vars(network)["masks"] = masks
    _check_alike(network_of(model), network, shape_of(model, input_shape))
    return twin


def thaw(model: nn.Module) -> nn.Module:
    """Return a plain model of the class and layout that was frozen, with the entries that moved in their places.

    >>> nss.save_model(thaw(frozen), "folder")
    """
    twin = copy.deepcopy(model)
    wrappers = FreeRows | FoldedActivation | StillNorm
    plain = {id(module): module.settled() for module in twin.modules() if isinstance(module, wrappers)}
    _replace(twin, plain)
    for module in twin.modules():
        _release(module)
    apply_masks(network_of(twin), vars(network_of(twin)).pop("masks"))
    return twin


def free_entries(anatomy: Anatomy, free: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return which rows of which modules a choice of neurons lets move, {module: bool [rows]}, norms included.

    Raises SiteError for unknown layers and masks of a wrong length or type.
    """
    _check(anatomy, free)
    rows: dict[str, Tensor] = {}
    for producer in anatomy.producers:
        if producer.name in free:
            mask = free[producer.name].cpu()
            rows[producer.module] = rows[producer.module] & mask if producer.module in rows else mask
    flags = torch.zeros(len(anatomy.classes), dtype=torch.bool)
    for producer in anatomy.producers:
        if producer.module in rows:
            flags[producer.out_ids] = rows[producer.module]
    for scaler in anatomy.scalers:
        own = lookup(flags, scaler.ids, False)
        rows[scaler.module] = rows[scaler.module] & own if scaler.module in rows else own
    return rows


def _check(anatomy: Anatomy, free: Mapping[str, Tensor]) -> None:
    sizes = {each.name: len(each.out_ids) for each in anatomy.producers}
    for name, mask in free.items():
        if name not in sizes:
            raise SiteError(f"there is no layer {name!r} with neurons", allowed=", ".join(sizes))
        if mask.dtype != torch.bool or tuple(mask.shape) != (sizes[name],):
            found = f"{str(mask.dtype).removeprefix('torch.')} {list(mask.shape)}"
            raise SiteError(
                f"the neurons of {name!r} are {found}", where=name, allowed=f"bool [{sizes[name]}], True = may move"
            )


def _hold(module: nn.Module) -> None:
    """Turn the parameters of a module itself into buffers, and note which they were."""
    held = {name: each.requires_grad for name, each in module.named_parameters(recurse=False)}
    for name in held:
        tensor = getattr(module, name).detach()
        delattr(module, name)
        module.register_buffer(name, tensor)
    vars(module)["held"] = held


def _release(module: nn.Module) -> None:
    for name, requires_grad in vars(module).pop("held", {}).items():
        tensor = getattr(module, name)
        delattr(module, name)
        module.register_parameter(name, nn.Parameter(tensor, requires_grad))


def _replace(root: nn.Module, by: Mapping[int, nn.Module]) -> None:
    """Put `by[id(module)]` wherever that module is registered."""
    for parent in list(root.modules()):
        if id(parent) in by:
            continue
        for name, child in parent._modules.items():
            if id(child) in by:
                parent._modules[name] = by[id(child)]


def _check_alike(model: nn.Module, frozen: nn.Module, shape: Sequence[int]) -> None:
    """Refuse a copy that does not answer as the model does, or goes past a layer that may move."""
    like = next(iter(model.parameters()))
    images = torch.rand(2, *shape, generator=torch.Generator().manual_seed(0)).to(like)
    free = {name: each for name, each in frozen.named_modules() if isinstance(each, FreeRows) and each.is_free}
    called: list[nn.Module] = []
    hooks = [each.register_forward_hook(lambda module, *_: called.append(module)) for each in free.values()]
    with evaluating(model), evaluating(frozen), torch.no_grad():
        expected, found = model(images), frozen(images)
    for hook in hooks:
        hook.remove()
    if missed := [name for name, each in free.items() if each not in called]:
        raise SiteError(
            "the network calls it from elsewhere than where it is registered",
            where=", ".join(missed),
            fix="call the registered module, not one that a list or an attribute of another kind holds",
        )
    if not isinstance(expected, Tensor):
        raise SiteError(
            f"the network answers a {type(expected).__name__}",
            where=type(model).__name__,
            allowed="one tensor",
            fix="return the logits alone from its forward",
        )
    slack = 10 * torch.finfo(like.dtype).eps ** 0.5 * (1 + float(expected.abs().max()))
    if not bool(((found - expected).abs() <= slack).all()):
        raise SiteError(
            "frozen, the network answers otherwise",
            where=type(model).__name__,
            fix="compute with layers by calling them, not from their weights, and with norms of PyTorch's own classes",
        )


def followed_by_norm(anatomy: Anatomy) -> dict[str, str]:
    """Return {layer: BatchNorm} of those pairs whose only business is with each other."""
    calls = module_calls(anatomy.graph)
    pairs = {}
    for producer in anatomy.producers:
        norm = norm_behind(producer.node, anatomy.graph)
        layer = anatomy.graph.get_submodule(producer.module)
        # Behind positions of a linear layer a BatchNorm takes the positions for channels.
        apart = isinstance(layer, nn.Linear) and producer.places > 1
        if norm is None or norm.running_mean is None or apart:
            continue
        name = str(next(iter(producer.node.users)).target)
        if calls[producer.module] == calls[name] == 1:
            pairs[producer.module] = name
    return pairs


def _followed_by_relu(anatomy: Anatomy, norms: Mapping[str, str]) -> dict[str, str]:
    """Return {convolution: ReLU} of those pairs, a norm of `norms` between them or not, with no other business."""
    graph = anatomy.graph
    calls = module_calls(graph)
    pairs = {}
    for producer in anatomy.producers:
        node = producer.node if producer.module not in norms else next(iter(producer.node.users))
        after = next(iter(node.users)) if len(node.users) == 1 else None
        if after is None or not isinstance(module_of(after, graph), nn.ReLU):
            continue
        is_convolution = isinstance(graph.get_submodule(producer.module), CONVOLUTIONS)
        if is_convolution and calls[producer.module] == calls[str(after.target)] == 1:
            pairs[producer.module] = str(after.target)
    return pairs


def _followed_by_pool(anatomy: Anatomy, relus: Mapping[str, str]) -> dict[str, str]:
    """Return {ReLU: max pool} of those of `relus` whose only business is with a pool right behind them."""
    graph, calls, pairs = anatomy.graph, module_calls(anatomy.graph), {}
    for node in graph.graph.nodes:
        if str(node.target) not in relus.values() or len(node.users) != 1:
            continue
        after = next(iter(node.users))
        if module_of(after, graph) is not None and is_max_pool(after, graph) and calls[str(after.target)] == 1:
            pairs[str(node.target)] = str(after.target)
    return pairs


def _wrapped(
    network: nn.Module,
    rows: Mapping[str, Tensor],
    norms: Mapping[str, str],
    relus: Mapping[str, str],
    pools: Mapping[str, str],
) -> dict[int, nn.Module]:
    """Return what takes the place of each layer that has free rows or moves in training, by id."""
    wrapped: dict[int, nn.Module] = {}
    modules = dict(network.named_modules())
    chosen = {name: flags.nonzero()[:, 0] for name, flags in rows.items()}
    for name, module in modules.items():
        own = chosen.get(name, torch.zeros(0, dtype=torch.int64))
        if name in rows and (isinstance(module, CHANNEL_NORMS) or (isinstance(module, nn.GroupNorm) and len(own))):
            wrapped[id(module)] = FreeNorm(module, own)
        elif isinstance(module, _NormBase) and module.running_mean is not None:
            wrapped[id(module)] = StillNorm(module)
    for name, module in modules.items():
        own = chosen.get(name, torch.zeros(0, dtype=torch.int64))
        norm = cast("FreeNorm | None", wrapped[id(modules[norms[name]])] if name in norms else None)
        if isinstance(module, nn.Linear) and len(own):
            wrapped[id(module)] = FreeLinear(module, own, norm)
        if isinstance(module, CONVOLUTIONS) and (len(own) or norm is not None):
            relu = relus.get(name, "")
            rectified = relu != "" and relu not in pools
            wrapped[id(module)] = FreeConvolution(module, own, norm, rectified)
            if relu:
                wrapped[id(modules[relu])] = FoldedActivation(modules[relu])
            if relu in pools:
                wrapped[id(modules[pools[relu]])] = RectifiedPool(modules[pools[relu]])
    return wrapped
