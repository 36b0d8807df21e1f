"""Reading ahead keeps order and errors, and leaves no thread behind."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nss.errors import DataError
from nss.model import build_model
from nss.prefetch import read_ahead
from nss.profile import profile


def ours() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("read-ahead")]


@given(st.lists(st.integers(), max_size=20), st.integers(0, 5))
def test_items_come_once_and_in_order(items: list[int], depth: int) -> None:
    assert list(read_ahead(iter(items), depth)) == items
    assert ours() == []


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_an_error_comes_where_it_happened(depth: int) -> None:
    def failing() -> Iterator[int]:
        yield 1
        yield 2
        raise ValueError("torn page")

    items = read_ahead(failing(), depth)
    assert [next(items), next(items)] == [1, 2]
    with pytest.raises(ValueError, match="torn page"):
        next(items)
    assert ours() == []


def test_it_reads_no_further_ahead_than_asked_and_stops_when_nobody_listens() -> None:
    taken: list[int] = []

    def source() -> Iterator[int]:
        for number in range(100):
            taken.append(number)
            yield number

    items = read_ahead(source(), 2)
    assert [next(items), next(items)] == [0, 1]
    items.close()
    assert len(taken) <= 5
    assert ours() == []


def test_a_profile_that_fails_leaves_no_reader_behind_whoever_keeps_the_error() -> None:
    model = build_model("nss.zoo:lenet", ("a", "b"), (1, 8, 8), 0)
    with pytest.raises(DataError) as caught:
        profile(model, (torch.full((30, 1, 8, 8), 2.0), torch.arange(30) % 2), batch_size=1, prefetch=2)
    assert ours() == []
    assert caught.value.__traceback__ is not None
