"""Masks that hold weights at zero: through copies, folders, further training, tracing and removal of channels.

A mask is a buffer of a parametrisation of the layer's `weight` (`torch.nn.utils.parametrize`), so whoever reads the
weight reads zeros where it is masked, whatever an optimizer did to the numbers behind. In a model folder a masked layer
has its ordinary `weight`, zeros included, and a `weight_mask` beside it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from nss.errors import NssError
from nss.operations import CHANNEL_NORMS, LAYERS

MASK = "weight_mask"


class WeightMask(nn.Module):
    """Sets masked weights to zero.

    >>> WeightMask(torch.tensor([[True, False]]))(torch.ones(1, 2))
    tensor([[1., 0.]])
    """

    mask: Tensor

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, weight: Tensor) -> Tensor:
        """weight: of the shape of the mask. Returns the same shape."""
        return torch.where(self.mask, weight, 0)


def weight_masks(model: nn.Module) -> dict[str, Tensor]:
    """Return the masks of a model, {layer: bool of the shape of its weight, True = not masked}; unmasked layers lack.

    >>> weight_masks(nss.prune_weights(model, sparsity=0.5).network)["conv1"].shape
    torch.Size([16, 1, 5, 5])
    """
    return {name: mask.mask for name, _, mask in _masked(model)}


def count_masked(model: nn.Module) -> int:
    """Return how many weights are masked; `count_parameters` counts them all the same.

    >>> nss.count_masked(nss.prune_weights(model, sparsity=0.5)) / nss.count_prunable(model)
    0.5
    """
    return sum(int((~mask).sum()) for mask in weight_masks(model).values())


def count_prunable(model: nn.Module) -> int:
    """Return the number of weights of convolutions and linear layers, masked or not, without biases and norms.

    >>> nss.count_prunable(torch.nn.Linear(3, 2))
    6
    """
    return sum(module.weight.numel() for module in model.modules() if isinstance(module, LAYERS))


def without_masks(model: nn.Module) -> nn.Module:
    """Return a copy whose masked weights are ordinary weights that happen to be zero: training may move them again.

    >>> nss.count_masked(nss.without_masks(pruned))
    0
    """
    twin = copy.deepcopy(model)
    release_masks(twin)
    return twin


def refuse_masks(model: nn.Module, doing: str, error: type[NssError]) -> None:
    """Raise `error` for a model with masked weights, when `doing` it would write to weights that a mask hides.

    What `refuse_unowned` refuses is refused too. model: a Classifier, or a network.
    """
    refuse_unowned(cast(nn.Module, getattr(model, "network", model)), doing, error)
    if count_masked(model):
        raise error(
            f"{count_masked(model)} weights of the model are masked, and {doing} would not keep them so",
            fix="do it first and prune_weights afterwards; or pass without_masks(model), whose zeros are ordinary",
        )


def refuse_unowned(network: nn.Module, doing: str, error: type[NssError]) -> None:
    """Raise `error` for a layer whose numbers are computed from others, or are another layer's too.

    Whoever is `doing` it writes new numbers to layers: what is computed would overwrite them, and two layers with one
    weight would come apart.
    """
    owners: dict[int, str] = {}
    for name, module in network.named_modules():
        if isinstance(module, (*LAYERS, *CHANNEL_NORMS, nn.GroupNorm)) and _is_computed(module):
            raise error(
                f"the weight or bias of {name!r} is computed from others, so {doing} cannot write to it",
                where=name,
                fix="make it plain before: torch.nn.utils.parametrize.remove_parametrizations(layer, 'weight'), or, for"
                " the old torch.nn.utils.weight_norm and spectral_norm, remove_weight_norm or remove_spectral_norm",
            )
        for parameter in module._parameters.values():
            first = owners.setdefault(id(parameter), name) if parameter is not None else name
            if first != name:
                raise error(
                    f"{first!r} and {name!r} share a weight, and {doing} would part them",
                    where=name,
                    fix="call one layer twice instead, or give each its own: layer.weight = Parameter(weight.clone())",
                )


def _is_computed(layer: nn.Module) -> bool:
    lacking = [name for name in ("weight", "bias") if name not in layer._parameters and name not in layer._buffers]
    only_masked = (
        _mask_of(layer) is not None and len(cast(nn.ModuleList, layer.get_submodule("parametrizations.weight"))) == 1
    )
    return bool(lacking) and not (only_masked and lacking == ["weight"])


def apply_masks(model: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Mask weights in place; a layer that has a mask gets the new one. masks: as `weight_masks` returns them.

    The layers must exist and the shapes must fit: this is for callers that know both.
    """
    for name, mask in masks.items():
        module = model.get_submodule(name)
        if _mask_of(module) is not None:
            _release(module)
        # The layout of the weight, so that the product has one layout however the mask came here.
        weight = module.get_parameter("weight")
        kept = torch.empty_like(weight, dtype=torch.bool).copy_(mask)
        with torch.no_grad():
            weight.masked_fill_(~kept, 0)
        parametrize.register_parametrization(module, "weight", WeightMask(kept))


def release_masks(model: nn.Module) -> dict[str, Tensor]:
    """Make masked weights ordinary zeros, in place. Returns the masks."""
    masks = weight_masks(model)
    for _, module, _ in list(_masked(model)):
        _release(module)
    return masks


def plain_state(model: nn.Module) -> dict[str, Tensor]:
    """Return the state dict under the names of the unmasked model, each mask as `weight_mask` beside its weight."""
    state: dict[str, Tensor] = model.state_dict()
    first_names = dict(model.named_modules())
    for name, module in model.named_modules(remove_duplicate=False):
        mask = _mask_of(module)
        if mask is None:
            continue
        prefix = f"{name}." if name else ""
        del state[f"{prefix}parametrizations.weight.original"], state[f"{prefix}parametrizations.weight.0.mask"]
        state[f"{prefix}weight"] = cast(Tensor, module.weight).detach()
        if name in first_names:
            state[f"{prefix}{MASK}"] = mask.mask
    return state


def _masked(model: nn.Module) -> Iterator[tuple[str, nn.Module, WeightMask]]:
    for name, module in model.named_modules():
        mask = _mask_of(module)
        if mask is not None:
            yield name, module, mask


def _mask_of(module: nn.Module) -> WeightMask | None:
    if not parametrize.is_parametrized(module, "weight"):
        return None
    first = module.get_submodule("parametrizations.weight.0")
    return first if isinstance(first, WeightMask) else None


def _release(module: nn.Module) -> None:
    """Not by `remove_parametrizations`: that edits the class, which copies of the module share."""
    weight = module.get_parameter("parametrizations.weight.original")
    with torch.no_grad():
        weight.copy_(cast(Tensor, module.weight))
    plain = parametrize.type_before_parametrizations(module)
    del module.parametrizations
    module.__class__ = plain
    module.register_parameter("weight", weight)
