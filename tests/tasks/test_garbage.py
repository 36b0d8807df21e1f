from __future__ import annotations

import gc
import subprocess
import sys
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


def test_at_its_end_a_process_that_collects_rarely_does_not_look_through_what_it_has() -> None:
    # A finalizer of what is in a knot tells whether the last collection has found it.
    code = """
from tasks.garbage import collect_rarely
class Knot:
    def __del__(self):
        import os
        os.write(1, b"looked through")
{}
knot = Knot()
knot.itself = [knot]
del knot
"""
    found = [
        subprocess.run([sys.executable, "-c", code.format(first)], capture_output=True, text=True, check=True).stdout
        for first in ("", "collect_rarely()")
    ]
    assert found == ["looked through", ""]


class Knot:
    itself: Knot | None = None
