"""Damaged models to repair: weights replaced by random ones until enough accuracy is gone (method.md 6)."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from nss.data import Data
from nss.errors import ModelError
from nss.model import network_of
from nss.operations import LAYERS
from nss.predict import accuracy
from nss.steps import training_images
from nss.weight_masks import refuse_masks


def mutate(model: nn.Module, data: Data, drop: float, seed: int, *, images: int = 2000) -> nn.Module:
    """Return a copy whose accuracy on training images is at least `drop` lower, by as few replaced weights as needed.

    data: of a Dataset the train split is used, of anything else everything; `images` of them, drawn by the seed,
    decide. drop: share of 1, for example 0.1, 0.3 or 0.5. The weights of convolutions and linear layers are replaced in
    random order, each by a normal number with the mean and spread of its layer; how many is found by halving.
    The same model, data and seed give the same mutant, and a larger drop replaces the same weights and more.
    Source: the repair experiment of NeuSemSlice, arXiv 2407.20281.
    Raises ModelError for a drop that replacing every weight does not reach, and for a model with masked weights.

    >>> mutant = mutate(model, nss.load_data("data"), drop=0.3, seed=0)
    >>> nss.evaluate(mutant, data.split("test")).accuracy
    0.66
    """
    if not 0 < drop < 1:
        raise ModelError(f"the drop is {drop}", allowed="above 0 and below 1: a share of the images")
    refuse_masks(model, "mutating", ModelError)
    generator = torch.Generator().manual_seed(seed)
    judged = _drawn(training_images(data), images, generator)
    mutant = copy.deepcopy(model)
    weights = [m.weight for m in network_of(mutant).modules() if isinstance(m, LAYERS)]
    own = torch.cat([weight.detach().cpu().flatten() for weight in weights])
    other = torch.cat([_random(weight, generator) for weight in weights])
    order = torch.randperm(len(own), generator=generator)
    goal = accuracy(mutant, judged) - drop

    def left(count: int) -> float:
        mixed = own.clone()
        mixed[order[:count]] = other[order[:count]]
        _write(weights, mixed)
        return accuracy(mutant, judged)

    enough, few = len(own), 0
    if left(enough) > goal:
        raise ModelError(
            f"with all weights replaced the accuracy falls by less than {drop}", fix="ask for a smaller drop"
        )
    while enough - few > 1:
        middle = (few + enough) // 2
        few, enough = (few, middle) if left(middle) <= goal else (middle, enough)
    left(enough)
    return mutant


def _drawn(data: tuple[Tensor, Tensor], count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    rows = torch.randperm(len(data[1]), generator=generator)[:count]
    return data[0][rows], data[1][rows]


def _random(weight: Tensor, generator: torch.Generator) -> Tensor:
    values = weight.detach().cpu()
    return torch.randn(values.numel(), generator=generator) * values.std(correction=0) + values.mean()


def _write(weights: list[Tensor], values: Tensor) -> None:
    with torch.no_grad():
        for weight, part in zip(weights, values.split([weight.numel() for weight in weights]), strict=True):
            weight.copy_(part.view(weight.shape))
