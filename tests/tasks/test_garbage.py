from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

from tasks.garbage import collect_as_usual, collect_rarely


@pytest.fixture(autouse=True)
def usual() -> Iterator[tuple[int, int, int]]:
    # A command that a test before ran in this process has left its own.
    collect_as_usual()
    gc.unfreeze()
    yield gc.get_threshold()
    collect_as_usual()
    gc.unfreeze()


def test_garbage_is_looked_for_rarely_and_then_as_before(usual: tuple[int, int, int]) -> None:
    assert usual[0] < 10_000
    collect_rarely()
    assert gc.get_threshold() == (50_000, *usual[1:])
    assert gc.get_freeze_count() == 0
    collect_as_usual()
    assert gc.get_threshold() == usual
    assert gc.get_freeze_count() > 1000


def test_garbage_that_is_made_afterwards_is_still_found() -> None:
    collect_rarely()
    collect_as_usual()
    before = len([each for each in gc.get_objects() if isinstance(each, Knot)])
    for _ in range(10):
        knot = Knot()
        knot.itself = knot
    del knot
    gc.collect()
    assert len([each for each in gc.get_objects() if isinstance(each, Knot)]) == before


class Knot:
    itself: Knot | None = None
