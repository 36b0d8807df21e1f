"""Parts of a data set that can be profiled apart, anywhere, and whose profiles merge into that of the whole."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from nss.data import Batch, Dataset
from nss.errors import DataError
from nss.samples import rank_in_class


def first_of_each_class(data: Dataset, count: int) -> Dataset:
    """Return a view of the first `count` images of each class, in order of arrival. Raises DataError below 1.

    >>> len(first_of_each_class(data.split("train"), 100))  # doctest: +SKIP
    1000
    """
    if count < 1:
        raise DataError(f"{count} images of each class are asked for", allowed="at least 1")
    return select(data, rank_in_class(data.labels) < count)


def shards(data: Dataset, count: int) -> tuple[Dataset, ...]:
    """Cut a data set into `count` views of neighbouring images, of sizes that differ by one at most.

    Raises DataError for a count below 1; more shards than images leave some empty.

    >>> [len(shard) for shard in shards(data, 4)]  # doctest: +SKIP
    [450, 449, 449, 449]
    """
    if count < 1:
        raise DataError(f"{count} shards are asked for", allowed="at least 1")
    place = torch.arange(len(data))
    edges = [len(data) * number // count for number in range(count + 1)]
    return tuple(select(data, (place >= low) & (place < high)) for low, high in itertools.pairwise(edges))


def select(data: Dataset, wanted: Tensor) -> Dataset:
    """Return a view of the images that are wanted, bool [n], in the same order; no image is read."""
    parts = wanted.split([len(batch) for batch in data.batches])
    batches: list[Batch] = [batch.pick(part) for batch, part in zip(data.batches, parts, strict=True)]
    return Dataset(data.classes, data.image_shape, tuple(batches), data.part)
