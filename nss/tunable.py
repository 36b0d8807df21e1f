"""Which neurons to tune: critical for what the new samples are, and pulled hardest by them (method.md 6)."""

from __future__ import annotations

import copy
import math
from collections import defaultdict
from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nss.anatomy import Anatomy
from nss.errors import ReadaptError
from nss.freeze import head_of
from nss.model import device_of, network_of
from nss.samples import spread
from nss.sites import find_sites
from nss.size import count_parameters
from nss.slice import SemanticSlices
from nss.surgery import Layer
from nss.told import tasks_apart, within_task
from nss.weight_masks import release_masks

# Of large images more at once would need more memory than training does.
BATCH = 50
# So many samples tell which neurons are pulled hardest: of 1000 they choose 94 to 97 % of the same ones. All of them
# would cost as much as an epoch of training.
TELLING = 250


def tunable_neurons(
    model: nn.Module,
    slices: SemanticSlices,
    images: Tensor,
    labels: Tensor,
    share: float,
    categories: Sequence[str] | None = None,
) -> dict[str, Tensor]:
    """Choose the neurons to tune on new samples, within a budget of weights over all layers.

    A neuron's score is |dL/dw| / |w|, the norm of the loss gradient on the new samples over the norm of its incoming
    weights, times the share of the new samples in whose slice it is critical: a neuron that is critical in no affected
    slice is never tuned, one that is critical in many comes first. A class score is critical in the slice of its class.
    Neurons are taken from the highest score down until the next does not fit; ties go to the earlier layer and index.
    The gradient is that of about 250 of the samples, as many of each class, which count as many as there are.
    images: as the model takes them [n, c, h, w]; labels: int64 [n]. share: of all weights of the model, 0 to 1.
    categories: those that are affected, default all that have samples. Returns {layer: bool [neurons]}, which
    `freeze` takes. Sources: NeuSemSlice, arXiv 2407.20281, section 3; relative gradient: arXiv 2210.11466.
    Raises ReadaptError when the slices are not of this model, or the budget is too small for a single neuron.

    >>> free = tunable_neurons(model, slices, images, labels, share=0.2)
    >>> int(free["conv1"].sum())
    7
    """
    anatomy = find_sites(network_of(model), tuple(images.shape[1:])).anatomy
    critical = _criticality(anatomy, slices, labels, categories)
    telling = spread(labels, math.ceil(TELLING / len(labels.unique())))
    counts = torch.bincount(labels) / torch.bincount(labels[telling]).clamp_min(1)
    relative = _relative_gradients(model, anatomy, images[telling], labels[telling], counts)
    cost = _costs(network_of(model), anatomy)
    scores = {name: relative[name] * weight for name, weight in critical.items() if name in relative}
    chosen = _within({name: (scores[name], cost[name]) for name in scores}, share * count_parameters(model))
    free = {each.name: chosen[each.module] for each in anatomy.producers if each.module in chosen}
    if not any(bool(mask.any()) for mask in free.values()):
        raise ReadaptError(
            f"a share of {share} of the weights is not enough for one neuron", where="share", fix="allow a larger share"
        )
    return free


def _criticality(
    anatomy: Anatomy, slices: SemanticSlices, labels: Tensor, categories: Sequence[str] | None
) -> dict[str, Tensor]:
    """Return for each neuron the share of the new samples in whose slice it is critical, {module: [rows]}."""
    counts = torch.bincount(labels, minlength=len(slices.classes)).double()
    if categories is not None:
        counts[[name not in categories for name in slices.classes]] = 0
    shares = counts / counts.sum()
    head = head_of(anatomy)
    found: dict[str, Tensor] = {}
    for each in slices:
        weight = shares[list(each.indices)].sum()
        masks = dict(each.neurons)
        if head is not None and len(head.out_ids) == len(slices.classes):
            masks[head.name] = torch.isin(torch.arange(len(slices.classes)), torch.tensor(each.indices))
        for producer in anatomy.producers:
            if producer.name in masks:
                if masks[producer.name].shape != producer.out_ids.shape:
                    raise _foreign(producer.name)
                own = weight * masks[producer.name]
                found[producer.module] = found[producer.module] + own if producer.module in found else own
    if not {name for each in slices for name in each.neurons} <= {each.name for each in anatomy.producers}:
        raise _foreign("a layer of the slices that the model does not have")
    return found


def _foreign(where: str) -> ReadaptError:
    return ReadaptError("the slices are not of this model", where=where, fix="profile and slice this model")


def _relative_gradients(
    model: nn.Module, anatomy: Anatomy, images: Tensor, labels: Tensor, counts: Tensor
) -> dict[str, Tensor]:
    """Return |dL/dw| / |w| of each row of each layer, {module: [rows]}. The model is left as it was.

    counts: as how many samples one of each class counts, float32 [classes].
    """
    twin, tasks = copy.deepcopy(model).eval().requires_grad_(False), tasks_apart(model)
    masks = release_masks(network_of(twin))
    weights = {
        each.module: cast(Layer, network_of(twin).get_submodule(each.module)).weight.requires_grad_()
        for each in anatomy.producers
    }
    sums: dict[str, Tensor] = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    for batch, target in zip(images.split(BATCH), labels.split(BATCH), strict=True):
        answers = within_task(twin(batch.to(device_of(twin))), target, tasks)
        losses = F.cross_entropy(answers, target.to(device_of(twin)), reduction="none")
        loss = losses @ counts[target].to(losses)
        found = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
        for name, gradient in zip(weights, found, strict=True):
            if gradient is not None:
                sums[name] += gradient
    for name, mask in masks.items():
        if name in sums:
            sums[name] *= mask
    total = float(counts[labels].sum())
    lengths = {name: weight.detach().flatten(1).norm(dim=1).clamp_min(1e-12) for name, weight in weights.items()}
    return {name: (each.flatten(1).norm(dim=1) / lengths[name] / total).cpu() for name, each in sums.items()}


def _costs(network: nn.Module, anatomy: Anatomy) -> dict[str, Tensor]:
    """Return how many entries each neuron brings: weights, bias, and those of the norms behind it; {module: [rows]}."""
    norms = torch.zeros(len(anatomy.classes), dtype=torch.int64)
    for scaler in {each.module: each for each in anatomy.scalers}.values():
        entries = len(list(network.get_submodule(scaler.module).parameters()))
        norms.index_add_(0, scaler.ids.clamp_min(0), torch.where(scaler.ids >= 0, entries, 0))
    costs: dict[str, Tensor] = defaultdict(lambda: torch.zeros(1, dtype=torch.int64))
    for producer in anatomy.producers:
        layer = cast(Layer, network.get_submodule(producer.module))
        own = layer.weight[0].numel() + int(layer.bias is not None)
        costs[producer.module] = torch.maximum(costs[producer.module], own + norms[producer.out_ids])
    return costs


def _within(candidates: dict[str, tuple[Tensor, Tensor]], budget: float) -> dict[str, Tensor]:
    """Take rows by score until the next does not fit. candidates: {module: (scores, costs)}."""
    scores = torch.cat([score for score, _ in candidates.values()])
    costs = torch.cat([cost for _, cost in candidates.values()])
    order = scores.argsort(descending=True, stable=True)
    taken = torch.zeros(len(scores), dtype=torch.bool)
    taken[order] = (costs[order].cumsum(0) <= budget) & (scores[order] > 0)
    return dict(zip(candidates, taken.split([len(score) for score, _ in candidates.values()]), strict=True))
