"""Views of a data set by what a model knows: its batches, and its classes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nss.data import Batch, Dataset, batch_digest
from nss.errors import DataError

CLASSES = ("ant", "bee", "cow", "dog")


def batch(labels: list[int], seed: int) -> Batch:
    """Images of one pixel each; splits in turns."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (len(labels), 1, 1, 1), dtype=torch.uint8, generator=generator)
    split = (torch.arange(len(labels)) % 3).to(torch.uint8)
    given = torch.tensor(labels)
    return Batch(batch_digest(images, given, split, CLASSES), images, given, split)


def dataset(*labels: list[int]) -> Dataset:
    return Dataset(CLASSES, (1, 1, 1), tuple(batch(each, seed) for seed, each in enumerate(labels)))


@given(st.sets(st.integers(0, 4)))
def test_every_batch_is_either_known_or_new_in_order_of_arrival(chosen: set[int]) -> None:
    data = dataset([0], [1, 2], [3], [0, 1], [2])
    known, new = data.known_and_new(data.batches[at].digest for at in chosen)
    assert list(known.batches) == [data.batches[at] for at in range(5) if at in chosen]
    assert list(new.batches) == [data.batches[at] for at in range(5) if at not in chosen]
    assert len(known) + len(new) == len(data)


def test_a_known_batch_that_is_not_there_is_named() -> None:
    data = dataset([0], [1])
    with pytest.raises(DataError, match=f"lacks batches that are known\n  - {'0' * 32}\n  fix: restore"):
        data.known_and_new([data.batches[0].digest, "0" * 32])


def test_what_a_model_knows_has_the_same_digest_before_and_after_a_batch_with_a_new_class_arrived() -> None:
    whole = dataset([0, 1, 2], [0, 3, 1])
    before = Dataset(CLASSES[:3], (1, 1, 1), whole.batches[:1])
    known, _ = whole.known_and_new([whole.batches[0].digest])
    assert known.of_classes(CLASSES[:3]).digest == before.digest != known.digest


def test_images_of_classes_that_came_later_are_left_out() -> None:
    data = dataset([0, 3, 1, 2, 1, 3], [3, 3], [2])
    view = data.of_classes(("ant", "bee", "cow"))
    assert view.classes == ("ant", "bee", "cow")
    assert view.labels.tolist() == [0, 1, 2, 1, 2]
    first = data.batches[0].images
    assert torch.equal(view.images, torch.cat([first[[0, 2, 3, 4]], data.batches[2].images]))
    assert view.split("train").labels.tolist() == [0, 2, 2]
    assert view.per_class_counts() == {"ant": 1, "bee": 2, "cow": 2}


def test_with_all_classes_nothing_is_copied() -> None:
    data = dataset([0, 1, 2, 3])
    assert data.of_classes(CLASSES) is data


@pytest.mark.parametrize("classes", [("bee", "ant"), ("ant", "cow"), (*CLASSES, "eel")])
def test_classes_that_are_not_the_first_of_the_data_set_are_refused(classes: tuple[str, ...]) -> None:
    with pytest.raises(DataError, match="are not the first"):
        dataset([0]).of_classes(classes)


def test_without_new_batches_the_rest_is_empty_with_the_shape_of_the_data_set() -> None:
    data = dataset([0, 1], [2])
    _, new = data.known_and_new(each.digest for each in data.batches)
    assert (len(new), new.images.shape, new.split("val").labels.tolist()) == (0, (0, 1, 1, 1), [])
    assert len(new.of_classes(CLASSES[:2])) == 0
