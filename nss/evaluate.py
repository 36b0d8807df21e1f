"""Scoring a model, and the figures of semantic slices that nobody has to be told a category for (method.md 4)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nss.data import Data
from nss.errors import ModelError
from nss.model import Classifier
from nss.predict import answers_of, predict
from nss.size import count_parameters
from nss.slice import SemanticSlice, SemanticSlices


@dataclass(frozen=True)
class Evaluation:
    """How a model answers held-out images. Accuracies are shares of 1."""

    classes: tuple[str, ...]
    confusion: Tensor
    """images by actual and by answered class, int64 [classes, classes]"""

    @property
    def images(self) -> int:
        """Number of images."""
        return int(self.confusion.sum())

    @property
    def accuracy(self) -> float:
        """Share of images answered right."""
        return float(self.confusion.diagonal().sum()) / max(1, self.images)

    @property
    def per_class(self) -> dict[str, float]:
        """Share answered right of each class that has images."""
        rows = zip(self.classes, self.confusion.diagonal().tolist(), self.confusion.sum(1).tolist(), strict=True)
        return {name: right / total for name, right, total in rows if total}

    @property
    def worst_class(self) -> str:
        """The class with the smallest share answered right; the first of several."""
        return min(self.per_class, key=self.per_class.__getitem__)

    @property
    def worst_accuracy(self) -> float:
        """The share answered right of the worst class."""
        return self.per_class[self.worst_class]

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain numbers and lists."""
        return {
            "images": self.images,
            "accuracy": self.accuracy,
            "worst_class": self.worst_class,
            "worst_accuracy": self.worst_accuracy,
            "per_class": self.per_class,
            "confusion": self.confusion.tolist(),
        }


def evaluate(
    model: nn.Module, data: Data, *, classes: Sequence[str] | None = None, batch_size: int = 500
) -> Evaluation:
    """Score `model` on held-out images. classes: needed for models not made by `build_model`.

    What is not finite in the logits of an image makes its answer a wrong one (see `confusion_of`).
    Raises ModelError when there are no images, or labels that the model does not know.

    >>> nss.evaluate(model, nss.load_data("data").split("test")).worst_class
    '8'
    """
    names = tuple(classes) if classes is not None else _classes_of(model)
    logits, labels = predict(model, data, batch_size)
    check_fit(logits, labels, names)
    return Evaluation(names, confusion_of(answers_of(logits), labels, len(names)))


def check_fit(logits: Tensor, labels: Tensor, classes: Sequence[str]) -> None:
    """Raise ModelError unless logits [n, classes] and labels int64 [n] are of these classes."""
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= len(classes) or logits.shape[1] != len(classes):
        raise ModelError(
            f"labels up to {high}, from {low}, and {logits.shape[1]} logits do not fit {len(classes)} classes",
            allowed=f"0 to {len(classes) - 1}: {', '.join(classes)}",
        )


def confusion_of(answers: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Count images by actual and by answered class. answers, labels: int64 [n]. Returns int64 [classes, classes].

    An answer of -1 is a wrong one: it counts as the class after the actual one, after the last as the first.
    """
    counted = torch.where(answers < 0, (labels + 1) % classes, answers)
    return torch.bincount(labels * classes + counted, minlength=classes * classes).view(classes, classes)


def _classes_of(model: nn.Module) -> tuple[str, ...]:
    if not isinstance(model, Classifier):
        raise ModelError(f"{type(model).__name__} does not say which classes it knows", fix="pass classes=[...]")
    return model.spec.classes


@dataclass(frozen=True)
class SliceFigures:
    """One slice on held-out images of ALL categories. Shares of 1."""

    name: str
    categories: tuple[str, ...]
    recall: float
    """share of the images of its own categories that it answers with their own category"""
    recognised: float
    """share of those that it answers with any of its categories"""
    false_positive_rate: float
    """share of the images of other categories that it answers with one of its own"""
    parameters: int

    @property
    def balanced_accuracy(self) -> float:
        """One slice against the rest: mean of recognised own and rejected other images."""
        return (self.recognised + 1 - self.false_positive_rate) / 2


@dataclass(frozen=True)
class SlicesEvaluation:
    """All slices together. Shares of 1."""

    slices: tuple[SliceFigures, ...]
    vote_accuracy: float
    """every image goes to every slice, the most certain of all categories wins: nobody tells the category"""
    told_accuracy: float
    """every image goes to the slice of its own category: shown beside the other, never instead of it"""

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain numbers and lists."""
        rows = [{**each.__dict__, "balanced_accuracy": each.balanced_accuracy} for each in self.slices]
        return {"vote_accuracy": self.vote_accuracy, "told_accuracy": self.told_accuracy, "slices": rows}


def evaluate_slices(
    slices: SemanticSlices, models: Sequence[nn.Module], data: Data, batch_size: int = 500
) -> SlicesEvaluation:
    """Score the sliced models of `slices` on images of all categories.

    models: one for each slice, in order, each with logits for all classes. In the vote a category's score is the
    probability that the slice it belongs to gives it. What is not finite in a slice's logits of an image makes its
    answer a wrong one, and that of the vote. Raises ModelError when there are no images, and when `data` is shuffled on
    each reading.

    >>> models = [nss.remove(model, slice.neurons) for slice in slices]
    >>> nss.evaluate_slices(slices, models, data.split("test")).vote_accuracy
    0.93
    """
    if len(models) != len(slices):
        raise ModelError(f"{len(models)} models for {len(slices)} slices", allowed="one model for each slice")
    figures, told = [], 0
    votes = first = torch.zeros(0)
    for number, (each, model) in enumerate(zip(slices, models, strict=True)):
        logits, labels = predict(model, data, batch_size)
        if not number:
            votes, first = torch.zeros(logits.shape, dtype=torch.float64), labels
        _check_order(labels, first)
        answers, columns = answers_of(logits), list(each.indices)
        votes[:, columns] = logits.double().softmax(1).masked_fill((answers < 0)[:, None], math.nan)[:, columns]
        own = torch.isin(labels, torch.tensor(columns))
        figures.append(_figures(each, answers, labels, own, count_parameters(model)))
        told += int((answers == labels)[own].sum())
    vote = float((answers_of(votes) == first).double().mean())
    return SlicesEvaluation(tuple(figures), vote, told / len(first))


def _check_order(labels: Tensor, first: Tensor) -> None:
    if not torch.equal(labels, first):
        raise ModelError(
            "the images come in another order each time they are read", where="data", fix="do not shuffle them"
        )


def _figures(each: SemanticSlice, answers: Tensor, labels: Tensor, own: Tensor, parameters: int) -> SliceFigures:
    inside = torch.isin(answers, torch.tensor(each.indices))
    return SliceFigures(
        name=each.name,
        categories=each.categories,
        recall=_share((answers == labels)[own]),
        recognised=_share(inside[own]),
        false_positive_rate=_share(inside[~own]),
        parameters=parameters,
    )


def _share(flags: Tensor) -> float:
    return float(flags.double().mean()) if len(flags) else 0.0
