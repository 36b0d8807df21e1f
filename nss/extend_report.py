"""What an extended model answers on held-out images: told which task they are of, and not told."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nss.data import Data
from nss.model import Classifier
from nss.predict import answers_of, predict
from nss.samples import Samples
from nss.told import tasks_of, told_answers


@dataclass(frozen=True)
class Told:
    """Accuracies on held-out images, shares of 1; None where none were held out."""

    old: float | None
    """of classes known before, not told the task"""
    new: float | None
    overall: float | None
    """mean over all images, not told"""
    old_told: float | None
    """among the classes of the image's own task"""
    new_told: float | None
    per_class: dict[str, float]
    """not told; classes without a held-out image lack"""


NOBODY = Told(None, None, None, None, None, {})
"""no image was held out"""


def judge(model: Classifier, samples: Samples, known: int) -> Told:
    """Judge a model on held-out images; the first `known` classes are the old ones."""
    if not len(samples):
        return NOBODY
    return judge_answers(model, *predict(model, (samples.images, samples.labels)), known)


def judge_answers(model: Classifier, logits: Tensor, labels: Tensor, known: int) -> Told:
    """Judge what a model has answered. logits: [n, classes]; labels: int64 [n]."""
    free, told = answers_of(logits).eq(labels), told_answers(model, logits, labels).eq(labels)
    is_old = labels < known
    names = model.spec.classes
    return Told(
        old=_share(free[is_old]),
        new=_share(free[~is_old]),
        overall=_share(free),
        old_told=_share(told[is_old]),
        new_told=_share(told[~is_old]),
        per_class={names[label]: float(free[labels == label].double().mean()) for label in labels.unique().tolist()},
    )


def told_accuracy(model: Classifier, data: Data) -> dict[str, tuple[float, float]]:
    """Return accuracies by task, told which task an image is of and not told, {its first class: (told, not told)}.

    Images of all tasks are in "all". They are called task-incremental and class-incremental too.

    >>> nss.told_accuracy(extended, data.split("test"))["all"]
    (0.96, 0.91)
    """
    logits, labels = predict(model, data)
    free, told = answers_of(logits).eq(labels), told_answers(model, logits, labels).eq(labels)
    task = tasks_of(model)
    first = [model.spec.classes[int((task == each).nonzero()[0, 0])] for each in task.unique().tolist()]
    parts = {name: task[labels] == each for each, name in enumerate(first)} | {"all": torch.ones_like(free)}
    return {
        name: (float(told[part].double().mean()), float(free[part].double().mean()))
        for name, part in parts.items()
        if bool(part.any())
    }


def _share(flags: Tensor) -> float | None:
    return float(flags.double().mean()) if len(flags) else None
