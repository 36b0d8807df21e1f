"""Pruning of single weights by magnitude: LAMP, Global, Uniform+ and ERK, in one step or iteratively (method.md 5).

Every scheme comes down to how many weights each layer keeps; within a layer the largest magnitudes stay. LAMP and
Global rank the weights of all layers together, Uniform+ and ERK give each layer a density. Numbers are exact: the
counts of the layers add up to what was asked.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nss.data import Data, val_part
from nss.errors import PruneError
from nss.finetune import fine_tune
from nss.model import model_digest, network_of, with_network
from nss.operations import LAYERS
from nss.predict import SLACK, accuracy
from nss.size import count_parameters
from nss.weight_masks import apply_masks, count_masked, count_prunable, refuse_unowned, weight_masks

_LOG = logging.getLogger(__name__)
LAST_SHARE = 0.2
"""of the last layer's weights that Uniform+ keeps at least"""


@dataclass(frozen=True)
class _Layer:
    name: str
    shape: tuple[int, ...]
    size: Tensor
    """magnitudes, float64 [weights]; masked ones are -1"""
    convolution: bool

    def __len__(self) -> int:
        return len(self.size)

    @property
    def alive(self) -> int:
        """How many weights are not masked yet."""
        return int((self.size >= 0).sum())


def prune_weights(model: nn.Module, method: str = "lamp", sparsity: float = 0.5, *, cap: float = 1.0) -> nn.Module:
    """Return a copy of `model` whose least important weights are masked: zero, and kept at zero by any training.

    method, what decides:
    lamp: w^2 over the sum of the squares of the layer's weights that are at least as large, compared over all layers;
    global: |w|, compared over all layers;
    uniform+: one density for all layers, but the first convolution stays dense and the last layer keeps at least 20 %;
    erk: a density proportional to sum(shape) / product(shape) of the layer's weight, at most 1.
    sparsity: share of ALL weights of convolutions and linear layers that is masked afterwards, to the nearest whole
    weight. What is masked already stays so and counts. cap: largest share of one layer that may be masked; at least one
    weight of a layer stays. First and last are taken in the order in which the layers are registered; of equal weights
    the one with the lower index stays. Biases and norms are left alone. Source: Lee et al. 2021 (LAMP),
    arXiv 2010.07611, section 3; ERK: Evci et al. 2020, arXiv 1911.11134.
    Raises PruneError for an unknown method, shares out of range or out of reach, weights that are not finite,
    computed from others or shared by layers, and a model without such layers.

    >>> pruned = nss.prune_weights(model, "lamp", sparsity=0.9)
    >>> nss.count_masked(pruned) / nss.count_prunable(model)
    0.9
    """
    if not 0 <= sparsity < 1:
        raise PruneError(f"the sparsity is {sparsity}", where="sparsity", allowed="from 0 to below 1")
    layers = _layers(network_of(model))
    total = sum(len(layer) for layer in layers)
    keep = total - round(sparsity * total)
    alive, least = sum(layer.alive for layer in layers), sum(_floors(layers, method, cap))
    if not least <= keep <= alive:
        raise PruneError(
            f"{method} cannot mask {total - keep} of {total} weights",
            where=f"sparsity {sparsity}",
            allowed=f"{(total - alive) / total:.6g} (masked already) to {(total - least) / total:.6g}, cap {cap}",
        )
    return _pruned(model, layers, method, keep, cap)


def _pruned(model: nn.Module, layers: Sequence[_Layer], method: str, keep: int, cap: float) -> nn.Module:
    counts = SCHEMES[method](layers, keep, _floors(layers, method, cap))
    network = copy.deepcopy(network_of(model))
    masks = {
        layer.name: _largest(layer.size, count).view(layer.shape) for layer, count in zip(layers, counts, strict=True)
    }
    apply_masks(network, {name: mask for name, mask in masks.items() if not bool(mask.all())})
    return with_network(model, network, parent=model_digest(model))


def _layers(network: nn.Module) -> list[_Layer]:
    refuse_unowned(network, "pruning", PruneError)
    masks, layers = weight_masks(network), []
    for name, module in network.named_modules():
        if not isinstance(module, LAYERS):
            continue
        size = module.weight.detach().cpu().double().abs()
        if not bool(torch.isfinite(size).all()):
            raise PruneError("there are weights that are not finite", where=name, fix="train the model again")
        if name in masks:
            size = torch.where(masks[name].cpu(), size, -1.0)
        convolution = not isinstance(module, nn.Linear)
        layers.append(_Layer(name, tuple(size.shape), size.reshape(-1), convolution))
    if not layers:
        raise PruneError(
            f"{type(network).__name__} has no weights to prune", allowed="a model with convolutions or linear layers"
        )
    return layers


def _floors(layers: Sequence[_Layer], method: str, cap: float) -> list[int]:
    """Return how many weights each layer keeps at least: what the cap and the scheme say, of those not masked yet."""
    if method not in SCHEMES:
        raise PruneError(f"the method is {method!r}", where="method", allowed=", ".join(SCHEMES))
    if not 0 < cap <= 1:
        raise PruneError(f"the cap is {cap}", where="cap", allowed="above 0, at most 1")
    floors = [max(1, len(layer) - math.floor(cap * len(layer) + SLACK)) for layer in layers]
    if method == "uniform+":
        floors[-1] = max(floors[-1], math.ceil(LAST_SHARE * len(layers[-1]) - SLACK))
        first = next((index for index, layer in enumerate(layers) if layer.convolution), None)
        if first is not None:
            floors[first] = len(layers[first])
    return [min(floor, layer.alive) for floor, layer in zip(floors, layers, strict=True)]


def _largest(size: Tensor, count: int) -> Tensor:
    """Return the `count` largest, bool; of equal ones those with lower indices."""
    kept = torch.zeros(len(size), dtype=torch.bool)
    kept[size.argsort(descending=True, stable=True)[:count]] = True
    return kept


# -- how many weights each layer keeps: (layers, of all, at least of each) -> of each ----------------------------------


def lamp_scores(size: Tensor) -> Tensor:
    """Return the LAMP score of each weight of a layer: 1 for the largest, 0 where the weight is 0.

    size: magnitudes, float64 [weights], masked ones below 0. Source: arXiv 2010.07611, equation 2.

    >>> lamp_scores(torch.tensor([1.0, 2.0], dtype=torch.float64))
    tensor([0.2000, 1.0000], dtype=torch.float64)
    """
    order = size.argsort(descending=True, stable=True)
    largest = size.max().clamp_min(0)
    if not largest:
        return torch.zeros_like(size)
    squares = (size[order].clamp_min(0) / largest).square()
    return torch.empty_like(size).index_copy_(0, order, squares / squares.cumsum(0))


def _by_lamp(layers: Sequence[_Layer], keep: int, floors: Sequence[int]) -> list[int]:
    return _ranked([lamp_scores(layer.size) for layer in layers], layers, keep, floors)


def _by_magnitude(layers: Sequence[_Layer], keep: int, floors: Sequence[int]) -> list[int]:
    return _ranked([layer.size for layer in layers], layers, keep, floors)


def _ranked(scores: Sequence[Tensor], layers: Sequence[_Layer], keep: int, floors: Sequence[int]) -> list[int]:
    """Count by layer the best of all layers together, the best of each layer first of all."""
    ranks = []
    for score, layer, floor in zip(scores, layers, floors, strict=True):
        rank = score.sort(descending=True).values
        rank[:floor], rank[layer.alive :] = math.inf, -math.inf
        ranks.append(rank)
    kept = _largest(torch.cat(ranks), keep).split([len(layer) for layer in layers])
    return [int(part.sum()) for part in kept]


def _uniformly(layers: Sequence[_Layer], keep: int, floors: Sequence[int]) -> list[int]:
    return _shared_out([len(layer) for layer in layers], [layer.alive for layer in layers], keep, floors)


def _by_shape(layers: Sequence[_Layer], keep: int, floors: Sequence[int]) -> list[int]:
    """A density proportional to sum / product of the shape is a number of weights proportional to its sum."""
    return _shared_out([sum(layer.shape) for layer in layers], [layer.alive for layer in layers], keep, floors)


def _shared_out(parts: Sequence[int], highest: Sequence[int], keep: int, floors: Sequence[int]) -> list[int]:
    """Share `keep` out in proportion to `parts`, within bounds: what a bound takes or leaves goes to the others."""
    low, high = 0.0, max(most / part for part, most in zip(parts, highest, strict=True))
    quotas: list[float] = []
    for _ in range(80):  # halvings: beyond the precision of a float
        rate = (low + high) / 2
        quotas = [min(max(rate * part, floor), most) for part, floor, most in zip(parts, floors, highest, strict=True)]
        low, high = (rate, high) if sum(quotas) < keep else (low, rate)
    counts = [math.floor(quota) for quota in quotas]
    by_rest = sorted(range(len(counts)), key=lambda index: counts[index] - quotas[index])
    open_ones = [index for index in by_rest if counts[index] < highest[index]]
    for index in open_ones[: keep - sum(counts)]:
        counts[index] += 1
    return counts


SCHEMES: dict[str, Callable[[Sequence[_Layer], int, Sequence[int]], list[int]]] = {
    "lamp": _by_lamp,
    "global": _by_magnitude,
    "uniform+": _uniformly,
    "erk": _by_shape,
}


# -- iteratively -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PruningStep:
    """One iteration: weights masked, then training within the budget. Shares of 1."""

    iteration: int
    remaining: int
    """weights that are not masked"""
    masked: float
    """share of the weights that is masked"""
    accuracy: float
    """on the held-out images, after training"""
    within: bool
    """the accuracy is within the tolerance"""


@dataclass(frozen=True)
class IterativelyPruned:
    """The smallest model within the tolerance, and the way there."""

    model: nn.Module
    method: str
    iterations: int
    """how many iterations the model has behind it (NI)"""
    accuracy: float
    """of the model on the held-out images (MA)"""
    reference: float
    """the accuracy that drops were counted from"""
    cr_masked: float
    """weights of convolutions and linear layers over those of them that are not masked"""
    cr_removed: float
    """parameters of the original over those of the model, masked ones counted: what was removed physically"""
    curve: tuple[PruningStep, ...]
    """every iteration; after the last one within the tolerance, one that is not, unless something else ended it"""

    def to_dict(self) -> dict[str, Any]:
        """Return everything but the model as plain numbers, lists and texts."""
        plain = {name: value for name, value in vars(self).items() if name not in ("model", "curve")}
        return {**plain, "curve": [asdict(step) for step in self.curve]}


def prune_weights_iteratively(
    model: nn.Module,
    data: Data,
    method: str = "lamp",
    *,
    step: float = 0.2,
    tolerance: float = 0.01,
    retrain_steps: int = 100,
    seed: int = 0,
    max_iterations: int = 30,
    learning_rate: float = 0.02,
    batch_size: int = 128,
    cap: float = 1.0,
    held_out: Data | None = None,
    reference: float | None = None,
    original_parameters: int | None = None,
) -> IterativelyPruned:
    """Mask a share `step` of the REMAINING weights, train, and again, while the accuracy drops by at most `tolerance`.

    method, cap: see `prune_weights`. data: a Dataset (trained on its train split, its val split is held out), or
    anything `iter_batches` takes, then with `held_out`. retrain_steps: SGD steps of each iteration, by `fine_tune`;
    0 for none. It ends with the first accuracy out of tolerance, after max_iterations, or when a step would mask
    nothing, which is no iteration; after none, `model` is a copy of the original. reference: the accuracy that the drop
    is counted from, default the model's own. original_parameters: of the model before channels were removed from it;
    default the model's own. Equal arguments give equal weights. Source: NeuSemSlice, arXiv 2407.20281, section 4;
    method.md 5.
    Raises PruneError for settings out of range, no held-out images, and what `prune_weights` refuses; ModelError for
    what `fine_tune` refuses.

    >>> found = nss.prune_weights_iteratively(model, nss.load_data("data"), "lamp", tolerance=0.01)
    >>> found.iterations, round(found.cr_masked, 1)
    (13, 18.2)
    """
    judge = val_part(data) if held_out is None else held_out
    if judge is None:
        raise PruneError("there are no held-out images to measure the accuracy on", fix="pass held_out")
    _check(step, tolerance, retrain_steps, max_iterations)
    before = original_parameters or count_parameters(model)
    base = accuracy(model, judge) if reference is None else reference
    best, best_accuracy, curve = model, accuracy(model, judge), list[PruningStep]()
    total = count_prunable(model)
    for iteration in range(1, max_iterations + 1):
        candidate = _step(best, method, step, cap)
        if candidate is None:
            break
        if retrain_steps:
            fine_tune(
                candidate, data, retrain_steps, seed + iteration, learning_rate=learning_rate, batch_size=batch_size
            )
        reached, remaining = accuracy(candidate, judge), total - count_masked(candidate)
        within = base - reached <= tolerance + SLACK
        curve.append(PruningStep(iteration, remaining, 1 - remaining / total, reached, within))
        _LOG.info("pruning, iteration %d: %d weights left, accuracy %.4f", iteration, remaining, reached)
        if not within:
            break
        best, best_accuracy = candidate, reached
    done = sum(each.within for each in curve)
    best = with_network(best, network_of(best), parent=model_digest(model)) if done else copy.deepcopy(model)
    remaining = total - count_masked(best)
    removed = before / count_parameters(best)
    return IterativelyPruned(best, method, done, best_accuracy, base, total / remaining, removed, tuple(curve))


def _step(model: nn.Module, method: str, step: float, cap: float) -> nn.Module | None:
    """Mask a share of the remaining weights, fewer where the scheme's bounds are met; None when that is nothing."""
    layers = _layers(network_of(model))
    alive = sum(layer.alive for layer in layers)
    keep = max(alive - round(step * alive), sum(_floors(layers, method, cap)))
    return None if keep == alive else _pruned(model, layers, method, keep, cap)


def _check(step: float, tolerance: float, retrain_steps: int, max_iterations: int) -> None:
    allowed = {
        "step, above 0 and below 1": 0 < step < 1,
        "tolerance, from 0 to 1": 0 <= tolerance <= 1,
        "retrain_steps, from 0": retrain_steps >= 0,
        "max_iterations, from 1": max_iterations >= 1,
    }
    wrong = [name for name, holds in allowed.items() if not holds]
    if wrong:
        given = f"step {step}, tolerance {tolerance}, retrain_steps {retrain_steps}, max_iterations {max_iterations}"
        raise PruneError(f"{given} cannot be followed", allowed="; ".join(wrong))
