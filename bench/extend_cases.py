"""What a model knows and what arrives: a data set's classes by task, and what is answered told the task and not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from bench import common
from bench.common import Row, base_model
from nss.data import SPLITS, Batch, Dataset, batch_digest
from nss.grow import condense
from nss.model import Classifier
from nss.predict import predict
from nss.profile import Profile
from nss.samples import Samples, rank_in_class, whole
from nss.slice import SemanticSlices

HALVES = (5, 5)
CHAIN = (2, 2, 2, 2, 2)
"""classes of each task"""
BASE = 12_000
"""training images of the first task that the base models see"""
SHARE = 0.85
"""of each layer's neurons that hold the old knowledge: extend's default"""
PER_CLASS = 500
"""training images of each class that the profile is of"""


@dataclass
class Subject(common.Subject):
    """One base model, of the first task's classes, and the tasks of its data."""

    sizes: tuple[int, ...]
    """classes of each task"""
    images: int
    """of each task, in each split"""

    @cached_property
    def data(self) -> Dataset:
        """The whole data set. Raises SystemExit when it has fewer classes than the tasks."""
        data = super().data
        if len(data.classes) < sum(self.sizes):
            raise SystemExit(
                f"bench: {self.name} has {len(data.classes)} classes, and tasks of {' + '.join(map(str, self.sizes))} "
                f"take {sum(self.sizes)}: pass --data with at least so many"
            )
        return data

    @cached_property
    def model(self) -> Classifier:
        """The base model, trained once for all sizes."""
        return base_model(task_data(self.data, self.sizes, 0, BASE), f"{self.name}-task", self.factory, self.seed)

    @cached_property
    def tasks(self) -> tuple[Dataset, ...]:
        """The images of each task."""
        return tuple(task_data(self.data, self.sizes, task, self.images) for task in range(len(self.sizes)))

    @cached_property
    def known(self) -> tuple[Profile, SemanticSlices]:
        """What condensing needs to know of the base model."""
        return common.knowledge(self.model, self.tasks[0].split("train"), PER_CLASS)

    @cached_property
    def condensed(self) -> Classifier:
        """The base model, ready to be extended."""
        found, slices = self.known
        return condense(self.model, slices, self.tasks[0], profile=found, share=SHARE, seed=self.seed)

    def seen(self, split: str, tasks: int) -> Samples:
        """Return the images of a split, of the first tasks."""
        return joined([whole(data.split(split)) for data in self.tasks[:tasks]])

    def names(self, task: int) -> tuple[str, ...]:
        """Return the classes that a task adds."""
        return self.tasks[task].classes[sum(self.sizes[:task]) :]


def task_data(data: Dataset, sizes: Sequence[int], task: int, images: int) -> Dataset:
    """Return one task's images, under the names of all classes up to its own.

    Of each split the first `images` are in it, as many of each class. Its digest is that of its content, so that a base
    model of it is kept as any other.
    """
    last = sum(sizes[: task + 1])
    labels, split = data.labels, torch.cat([batch.split for batch in data.batches])
    own = ((labels >= last - sizes[task]) & (labels < last)).nonzero()[:, 0]
    rank = rank_in_class(labels[own] * len(SPLITS) + split[own])
    own = own[rank < images // sizes[task]]
    part, classes = Samples(data.images, labels).pick(own), data.classes[:last]
    digest = batch_digest(part.images, part.labels, split[own], classes)
    return Dataset(classes, data.image_shape, (Batch(digest, part.images, part.labels, split[own]),))


def joined(samples: Sequence[Samples]) -> Samples:
    """Return all samples in one."""
    return Samples(torch.cat([each.images for each in samples]), torch.cat([each.labels for each in samples]))


def by_task(model: nn.Module, samples: Samples, sizes: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Return which images are answered right when told their task, and when not, bool [n]; and their tasks, int64 [n].

    sizes: classes of each task that the model knows.
    """
    logits, labels = predict(model, (samples.images, samples.labels))
    task = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    own = task[None] == task[labels][:, None]
    return logits.masked_fill(~own, float("-inf")).argmax(1) == labels, logits.argmax(1) == labels, task[labels]


def judged(model: nn.Module, samples: Samples, sizes: Sequence[int]) -> Row:
    """Return the accuracies on old and new images, told their task and not; the last task is the new one."""
    told, free, task = by_task(model, samples, sizes)
    new = task == len(sizes) - 1
    return {
        "told_old": share(told[~new]),
        "told_new": share(told[new]),
        "old_accuracy": share(free[~new]),
        "new_accuracy": share(free[new]),
        "accuracy": share(free),
    }


def matrix_row(model: nn.Module, samples: Samples, sizes: Sequence[int]) -> list[tuple[float, float]]:
    """Return (told, not told) accuracy on the images of each task that the model knows."""
    told, free, task = by_task(model, samples, sizes)
    return [(share(told[task == each]), share(free[task == each])) for each in range(len(sizes))]


def balanced(model: nn.Module, samples: Samples, sizes: Sequence[int]) -> float:
    """Return the mean of the tasks' accuracies, not told: what settings are chosen by."""
    row = matrix_row(model, samples, sizes)
    return sum(free for _, free in row) / len(row)


def forgetting(matrix: Sequence[Sequence[float]]) -> float:
    """Return how much was lost at the end of a task's best accuracy before, mean over all tasks but the last.

    matrix: after each task, the accuracies on it and on those before (Chaudhry et al. 2018, arXiv 1801.10112).
    """
    *earlier, end = matrix
    best = [max(row[task] for row in earlier if task < len(row)) for task in range(len(end) - 1)]
    return sum(each - now for each, now in zip(best, end, strict=False)) / len(best)


def share(flags: Tensor) -> float:
    """Return the share of what is true."""
    return float(flags.double().mean())
