"""Parts of a data set, and their profiles."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nss.data import Batch, Dataset
from nss.errors import DataError
from nss.shards import first_of_each_class, shards


def dataset(labels: list[list[int]]) -> Dataset:
    """One batch a list; the only pixel of each image is its place."""
    batches, start = [], 0
    for rows in labels:
        images = torch.arange(start, start + len(rows), dtype=torch.uint8).view(-1, 1, 1, 1)
        batches.append(
            Batch("0" * 32, images, torch.tensor(rows, dtype=torch.int64), torch.zeros(len(rows), dtype=torch.uint8))
        )
        start += len(rows)
    return Dataset(("a", "b", "c"), (1, 1, 1), tuple(batches))


@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=20), min_size=1, max_size=4), st.integers(1, 9))
def test_shards_hold_every_image_once_in_order_and_differ_by_one_at_most(labels: list[list[int]], count: int) -> None:
    whole = dataset(labels)
    parts = shards(whole, count)
    assert torch.equal(torch.cat([part.images for part in parts]), whole.images)
    assert torch.equal(torch.cat([part.labels for part in parts]), whole.labels)
    sizes = [len(part) for part in parts]
    assert len(sizes) == count
    assert max(sizes) - min(sizes) <= 1


@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=20), min_size=1, max_size=4), st.integers(1, 6))
def test_the_first_of_each_class_are_those_that_arrived_first(labels: list[list[int]], count: int) -> None:
    flat = [label for rows in labels for label in rows]
    expected = [place for place, label in enumerate(flat) if flat[:place].count(label) < count]
    assert first_of_each_class(dataset(labels), count).images.flatten().tolist() == expected


@pytest.mark.parametrize("function", [shards, first_of_each_class])
def test_a_count_below_one_is_refused(function) -> None:
    with pytest.raises(DataError, match="at least 1"):
        function(dataset([[0, 1]]), 0)
