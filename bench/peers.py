"""Torch-Pruning (DepGraph, Fang et al. 2023, arXiv 2301.12900) at its best: what restructuring is measured against.

Whole coupled groups of channels leave in one step, the least important first, within each layer or over all layers.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
import torch_pruning as tp
from torch import Tensor, nn

from nss.contexts import evaluating
from nss.model import Classifier, model_digest, with_network
from nss.size import count_macs
from nss.statistics import retake_statistics

# Method: (importance, ranked over all layers).
PEERS = {
    "tp-magnitude-local": ("magnitude", False),
    "tp-magnitude-global": ("magnitude", True),
    "tp-taylor-local": ("taylor", False),
    "tp-taylor-global": ("taylor", True),
}
CAP = 0.9
"""largest share of a layer that may leave, as for ours: ranked globally, whole layers would"""
TOLERANCE = 0.02
HALVINGS = 12

Importance = Callable[[Any], Tensor]


def prune(model: Classifier, method: str, macs: float, gradients: Mapping[str, Tensor], images: Tensor) -> Classifier:
    """Return `model` pruned to the share `macs` of its multiply-adds, with statistics taken again on `images`.

    The pruning ratio is found by bisection. gradients: see `taylor_gradients`; magnitude does not look at them.
    Raises ValueError when no ratio comes within TOLERANCE of what is asked.
    """
    whole, low, high = count_macs(model), 0.0, CAP
    found: list[tuple[float, Classifier]] = []
    for _ in range(HALVINGS):
        ratio = (low + high) / 2
        smaller = _pruned(model, method, ratio, gradients)
        share = count_macs(smaller) / whole
        found.append((share, smaller))
        low, high = (ratio, high) if share > macs else (low, ratio)
    share, nearest = min(found, key=lambda each: abs(each[0] - macs))
    if abs(share - macs) > TOLERANCE:
        raise ValueError(f"{method} comes no nearer to {macs:.3f} of the multiply-adds than {share:.3f}")
    retake_statistics(nearest, images)
    return nearest


def taylor_gradients(model: Classifier, images: Tensor, labels: Tensor, batch_size: int = 250) -> dict[str, Tensor]:
    """Return the gradient of the loss in every weight of the network, added up over batches; `model` stays as it is."""
    twin = copy.deepcopy(model).requires_grad_()
    with evaluating(twin):
        for batch, target in zip(images.split(batch_size), labels.split(batch_size), strict=True):
            F.cross_entropy(twin(batch), target).backward()
    return {name: weight.grad for name, weight in twin.network.named_parameters() if weight.grad is not None}


def _pruned(model: Classifier, method: str, ratio: float, gradients: Mapping[str, Tensor]) -> Classifier:
    kind, everywhere = PEERS[method]
    network = copy.deepcopy(model.network).requires_grad_().eval()
    for name, weight in network.named_parameters():
        weight.grad = gradients[name].clone() if kind == "taylor" else None
    importance = tp.importance.GroupTaylorImportance() if kind == "taylor" else tp.importance.GroupMagnitudeImportance()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pruner = tp.pruner.BasePruner(
            network,
            model.normalise(torch.zeros(2, *model.spec.input_shape)),
            _capped(importance),
            global_pruning=everywhere,
            pruning_ratio=ratio,
            ignored_layers=[_head(network)],
        )
        kept = _cut(network, pruner)
    network.zero_grad()
    smaller = with_network(model, network, kept=kept, parent=model_digest(model))
    assert isinstance(smaller, Classifier)
    return smaller.eval()


def _capped(importance: Importance) -> Importance:
    """Torch-Pruning leaves a layer whole that it would empty, and exceeds its own cap: let the best of each stay."""

    def scores(group: Any) -> Tensor:
        found = importance(group)
        stay = math.ceil((1 - CAP) * len(found))
        found[found.topk(stay).indices] = math.inf
        return found

    return scores


def _cut(network: nn.Module, pruner: Any) -> dict[str, tuple[int, ...]]:
    """Prune in place. Returns which output channels each layer that lost some still has, as model folders name them."""
    names = {module: name for name, module in network.named_modules()}
    kept: dict[str, tuple[int, ...]] = {}
    for group in pruner.step(interactive=True):
        for dependency, indices in group:
            layer = dependency.target.module
            if isinstance(layer, nn.Conv2d | nn.Linear) and pruner.DG.is_out_channel_pruning_fn(dependency.handler):
                kept[names[layer]] = tuple(sorted(set(range(layer.weight.shape[0])) - set(indices)))
        group.prune()
    return kept


def _head(network: nn.Module) -> nn.Module:
    return [module for module in network.modules() if isinstance(module, nn.Linear)][-1]
