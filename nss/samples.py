"""Labelled images in memory: held out and drawn by class, the same every time."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nss.data import Data, Dataset, iter_batches, train_part, val_part
from nss.errors import NssError
from nss.pixels import joined_images

# Of each class so much is held out, where that makes at least so many images in all: fewer say too little.
HELD_OUT = 0.1
FEWEST = 20


@dataclass(frozen=True)
class Samples:
    """Images [n, c, h, w], wherever they are, and labels int64 [n] on the CPU."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def pick(self, rows: Tensor) -> Samples:
        """Return the rows of an index or a bool tensor."""
        return Samples(self.images[rows], self.labels[rows])


def whole(data: Data) -> Samples:
    """Return all images of the data; [0] and [0] when there are none. A pair of tensors is not copied."""
    if isinstance(data, Dataset):
        return Samples(data.images, data.labels)
    # Not the batches of a loader as they are: each holds a file open when another process made it.
    rows = list(iter_batches(data, sys.maxsize if isinstance(data, tuple) else 1024))
    if not rows:
        return Samples(torch.zeros(0), torch.zeros(0, dtype=torch.int64))
    if len(rows) == 1:
        return Samples(*rows[0])
    return Samples(joined_images([images for images, _ in rows]), torch.cat([labels for _, labels in rows]))


def parts(data: Data, seed: int) -> tuple[Samples, Samples]:
    """Return what to train on and what to hold out.

    A whole Dataset has splits for that, train and val; of anything else a tenth of each class is held out, drawn by the
    seed. The second part is empty when it would have fewer than 20 images.
    """
    samples, val = whole(train_part(data)), val_part(data)
    if val is not None and len(val) >= FEWEST:
        return samples, whole(val)
    held_out = drawn(samples.labels, HELD_OUT, seed)
    if int(held_out.sum()) < FEWEST:
        held_out = torch.zeros_like(held_out)
    return samples.pick(~held_out), samples.pick(held_out)


def old_parts(data: Data, classes: Sequence[str], seed: int, error: type[NssError]) -> tuple[Samples, Samples]:
    """Return `parts` of what a model of these classes was made for. Raises `error` for images of other classes."""
    known = tuple(classes)
    if isinstance(data, Dataset) and data.classes[: len(known)] != known[: len(data.classes)]:
        raise error(
            f"the classes of the old data are {list(data.classes)}",
            where="old_data",
            allowed=f"in order: {list(known)}",
        )
    found = parts(data, seed)
    if unknown := unknown_labels(found, len(known)):
        raise error(
            f"the old data has the label {', '.join(map(str, unknown))}: the model knows no such class",
            where="old_data",
            allowed=f"0 to {len(known) - 1}: {', '.join(known)}",
            fix="give images of the known classes only, of a Dataset data.of_classes(those classes)",
        )
    return found


def unknown_labels(samples: Sequence[Samples], known: int) -> list[int]:
    """Return the labels that are not from 0 to below `known`, each once, the smallest first."""
    labels = torch.cat([each.labels for each in samples])
    found: list[int] = labels[(labels < 0) | (labels >= known)].unique().tolist()
    return found


def joined(left: Samples, right: Samples) -> Samples:
    """Return the samples of both, where those of `left` are.

    uint8 images beside floats become floats 0..1, as a model would have read them.
    """
    if not len(left) or not len(right):
        return left if len(left) else right
    images = joined_images([left.images, right.images.to(left.images.device)])
    return Samples(images, torch.cat([left.labels, right.labels]))


def drawn(labels: Tensor, share: float, seed: int, least: int = 0) -> Tensor:
    """Draw a share of each class, rounded, but `least` if there are so many. labels: int64 [n]. Returns bool [n].

    >>> drawn(torch.tensor([0, 0, 1, 1, 1, 1]), 0.5, seed=0).sum()
    tensor(3)
    """
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    chosen = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique().tolist():
        own = order[labels[order] == label]
        chosen[own[: max(least, int(len(own) * share + 0.5))]] = True
    return chosen


def spread(labels: Tensor, count: int) -> Tensor:
    """Choose `count` of each class, or all it has, evenly over the order they are in. labels: int64 [n]. Bool [n].

    >>> spread(torch.tensor([0, 0, 1, 0, 0]), 2)
    tensor([False,  True,  True, False,  True])
    """
    rank, sizes = rank_in_class(labels), torch.bincount(labels)[labels]
    wanted = sizes.clamp_max(count)
    return (rank + 1) * wanted // sizes > rank * wanted // sizes


def rank_in_class(labels: Tensor) -> Tensor:
    """Return how many of the same label come before each. labels: int64 [n]. Returns int64 [n].

    >>> rank_in_class(torch.tensor([1, 0, 1, 1]))
    tensor([0, 0, 1, 2])
    """
    rank = torch.zeros_like(labels)
    for label in labels.unique().tolist():
        own = labels == label
        rank[own] = torch.arange(int(own.sum()))
    return rank
