"""A stage that says what is wrong, and one that ends without a word, are told apart."""

from __future__ import annotations

import pytest

from nss.errors import CrashError, StageError
from tasks.pipeline import Pipeline
from tasks.workspace import Workspace


def failure(toy: Workspace) -> StageError:
    with pytest.raises(StageError) as caught:
        Pipeline(toy).reproduce("first")
    return caught.value


@pytest.mark.parametrize("code", [2, 75])
def test_what_a_stage_says_itself_is_no_crash(toy: Workspace, command, code: int) -> None:
    command(toy.root, f"exit {code}")
    assert type(failure(toy)) is StageError


@pytest.mark.parametrize("end", ["exit 139", "exit 143", "kill -15 $$", "kill -11 $$"])
def test_a_stage_that_a_signal_ended_has_said_nothing(toy: Workspace, command, end: str) -> None:
    command(toy.root, end)
    error = failure(toy)
    assert type(error) is CrashError
    assert error.fix.startswith("it was ended by a signal, then run again")


@pytest.mark.parametrize("code", [1, 3])
def test_any_other_end_is_a_crash(toy: Workspace, command, code: int) -> None:
    command(toy.root, f"exit {code}")
    error = failure(toy)
    assert type(error) is CrashError
    assert error.fix.startswith("mend what it says, then run again")


@pytest.mark.parametrize("end", ["exit 137", "kill -9 $$"])
def test_a_stage_that_was_killed_is_mostly_out_of_memory(toy: Workspace, command, end: str) -> None:
    command(toy.root, end)
    error = failure(toy)
    assert type(error) is CrashError
    assert error.fix.startswith("it was killed, mostly for lack of memory: take smaller batches")
