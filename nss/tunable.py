"""Which neurons to tune: critical for what the new samples are, and worth most for each weight (method.md 6)."""

from __future__ import annotations

import copy
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nss.anatomy import Anatomy, head_of
from nss.errors import ReadaptError
from nss.freeze import followed_by_norm
from nss.guard import seen_by
from nss.model import device_of, network_of
from nss.moments import flat_rows, gains, moments_of
from nss.profile import Profile
from nss.rows import norm_scale, over
from nss.samples import spread
from nss.sites import find_sites
from nss.size import count_parameters
from nss.slice import SemanticSlices
from nss.strides import sound_gradients
from nss.surgery import Layer
from nss.told import tasks_apart, within_task
from nss.weight_masks import release_masks

# Of large images more at once would need more memory than training does.
BATCH = 50
# So many samples tell which neurons are worth most: of 1000 they choose 88 to 96 % of the same ones. All of them would
# cost as much as an epoch of training.
TELLING = 250


def tunable_neurons(
    model: nn.Module,
    slices: SemanticSlices,
    images: Tensor,
    labels: Tensor,
    share: float,
    profile: Profile,
    categories: Sequence[str] | None = None,
) -> dict[str, Tensor]:
    """Choose the neurons to tune on new samples, within a budget of weights over all layers.

    A neuron's score is what the loss on the new samples can fall by where the guard of old behaviour allows it, for
    each weight that tuning it takes (`nss.moments.gains`), times the share of the new samples in whose slice it is
    critical: a neuron that is critical in no affected slice is never tuned, one that is critical in many comes first. A
    class score is critical in the slice of its class.
    Neurons are taken from the highest score down until the next does not fit; ties go to the earlier layer and index.
    The gradient is that of about 250 of the samples, as many of each class, which count as many as there are.
    images: as the model takes them [n, c, h, w]; labels: int64 [n]. share: of all weights of the model, 0 to 1.
    profile: of this model on old data, with `windows`. categories: those that are affected, default all that have
    samples. Returns {layer: bool [neurons]}, which `freeze` takes.
    Source: NeuSemSlice, arXiv 2407.20281, section 3; the gains are ours (docs/readapt.md).
    Raises ReadaptError when the slices are not of this model, the moments are not finite, or the budget is too small
    for a single neuron, ProfileError when the profile has no windows.

    >>> free = tunable_neurons(model, slices, images, labels, share=0.2, profile=profile)
    >>> int(free["conv1"].sum())
    7
    """
    anatomy = find_sites(network_of(model), tuple(images.shape[1:])).anatomy
    critical = _criticality(anatomy, slices, labels, categories)
    telling = spread(labels, math.ceil(TELLING / len(labels.unique())))
    counts = torch.bincount(labels) / torch.bincount(labels[telling]).clamp_min(1)
    gradients = _gradients(model, anatomy, images[telling], labels[telling], counts)
    cost = _costs(network_of(model), anatomy)
    worth = _gains(anatomy, {name: gradients[name] for name in critical}, profile)
    scores = {name: worth[name] / cost[name] * weight for name, weight in critical.items()}
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


@dataclass(frozen=True)
class _Gradient:
    """The gradient of the mean loss for the rows of a layer."""

    weight: Tensor
    """of its own weight, float32 of that shape"""
    scale: Tensor
    """[rows], what the norm behind it multiplies a row by; ones without one"""
    shift: Tensor | None
    """[rows], of what is added to a row behind that; None where nothing is"""

    def folded(self) -> Tensor:
        """Return that of the rows with the norm folded in, and of what is added, if anything: [rows, inputs + 1]."""
        return flat_rows(over(self.weight, self.scale), self.shift)


def _gradients(
    model: nn.Module, anatomy: Anatomy, images: Tensor, labels: Tensor, counts: Tensor
) -> dict[str, _Gradient]:
    """Return the gradient of each layer, {module: ..}. The model is left as it was.

    counts: as how many samples one of each class counts, float32 [classes].
    """
    twin = copy.deepcopy(model).eval().requires_grad_(False)
    network, norms = network_of(twin), followed_by_norm(anatomy)
    masks = release_masks(network)
    pairs = {
        name: (cast(Layer, network.get_submodule(name)), network.get_submodule(norms[name]) if name in norms else None)
        for name in dict.fromkeys(each.module for each in anatomy.producers)
    }
    entries = [
        each for layer, norm in pairs.values() for each in (layer.weight, _shift(layer, norm)) if each is not None
    ]
    sums = _means(twin, entries, images, labels, counts)
    found = {}
    for name, (layer, norm) in pairs.items():
        weight, shift, scale = sums[id(layer.weight)], sums.get(id(_shift(layer, norm))), _scale(layer, norm)
        if norm is not None and norm.bias is None and shift is not None:
            shift = over(shift, scale)
        found[name] = _Gradient(weight * masks[name].cpu() if name in masks else weight, scale, shift)
    return found


def _shift(layer: Layer, norm: nn.Module | None) -> Tensor | None:
    """Return what is added to the rows of a layer: by the norm behind it, if that adds anything."""
    return layer.bias if norm is None or norm.bias is None else cast(Tensor, norm.bias)


def _scale(layer: Layer, norm: nn.Module | None) -> Tensor:
    """Return what the norm behind a layer, if there is one, multiplies its rows by, float32 [rows]."""
    return torch.ones(len(layer.weight)) if norm is None else norm_scale(norm).float().cpu()


def _means(
    model: nn.Module, entries: Sequence[Tensor], images: Tensor, labels: Tensor, counts: Tensor
) -> dict[int, Tensor]:
    """Return the gradient for entries of a model of the mean loss, each counting as `counts` of its class, by id."""
    tasks, device = tasks_apart(model), device_of(model)
    sums = [torch.zeros_like(each.requires_grad_()) for each in entries]
    for batch, target in zip(images.split(BATCH), labels.split(BATCH), strict=True):
        with sound_gradients(model):
            answers = within_task(model(batch.to(device)), target, tasks)
        losses = F.cross_entropy(answers, target.to(device), reduction="none")
        found = torch.autograd.grad(losses @ counts[target].to(losses), entries, allow_unused=True)
        for total, gradient in zip(sums, found, strict=True):
            if gradient is not None:
                total += gradient
    # Divided at the end: in half precision smaller gradients would vanish on their way.
    whole = float(counts[labels].sum())
    return {id(entry): total.float().cpu() / whole for entry, total in zip(entries, sums, strict=True)}


def _gains(anatomy: Anatomy, gradients: Mapping[str, _Gradient], profile: Profile) -> dict[str, Tensor]:
    """Return `moments.gains` of each row of each layer, {module: [rows]}."""
    found = {}
    for name, gradient in gradients.items():
        layer, rows = cast(Layer, anatomy.graph.get_submodule(name)), torch.arange(len(gradient.weight))
        shifted = gradient.shift is not None
        moments = moments_of(seen_by(anatomy, profile, name), layer, rows, shifted=shifted)
        found[name] = torch.nan_to_num(gains(gradient.folded(), moments, len(rows)))
    return found


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
