from __future__ import annotations

import errno
from pathlib import Path

import pytest

from nss.errors import StageError
from tasks.dvc_errors import full_disk
from tasks.layout import CODE
from tasks.pipeline import Pipeline
from tasks.workspace import Workspace


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device", "artifacts/x"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        RuntimeError("(sqlite3.OperationalError) database or disk is full"),
    ],
)
def test_a_full_disk_is_known_however_it_is_told_and_wrapped(error: Exception, tmp_path: Path) -> None:
    try:
        try:
            raise error
        except Exception as cause:
            raise ValueError("something failed") from cause
    except ValueError as wrapped:
        found = full_disk(wrapped, tmp_path)
    assert "there is no room left on the disk" in str(found)
    assert str(getattr(error, "filename", None) or tmp_path) in str(found)


def test_errors_that_are_the_context_of_each_other_are_looked_through_once(tmp_path: Path) -> None:
    first, second = ValueError("one"), ValueError("two")
    first.__context__, second.__context__ = second, first
    assert full_disk(first, tmp_path) is None
    second.args = ("database or disk is full",)
    assert "no room left" in full_disk(first, tmp_path).what


def test_another_error_is_no_full_disk(tmp_path: Path) -> None:
    assert full_disk(OSError(errno.EACCES, "Permission denied"), tmp_path) is None


@pytest.mark.parametrize("name", ["dvc.lock", "dvc.yaml"])
def test_a_merge_conflict_is_said_with_the_way_out(toy: Workspace, name: str) -> None:
    Pipeline(toy).reproduce("first")
    text = (toy.root / name).read_text()
    (toy.root / name).write_text(f"<<<<<<< HEAD\n{text}=======\n{text}>>>>>>> theirs\n")
    with pytest.raises(StageError) as error:
        Pipeline(toy).look("first")
    assert f"a merge left conflicts in {name}" in str(error.value)
    assert f"git checkout --ours {name}" in str(error.value)


def test_a_merge_conflict_in_the_digests_of_code_is_said_with_the_way_out(toy: Workspace) -> None:
    stages, code = toy.root / "dvc.yaml", toy.root / CODE
    stages.write_text(stages.read_text().replace("params: [group]", f"params: [group, {{{CODE}: [first]}}]"))
    code.write_text("first: a\n")
    Pipeline(toy).reproduce("first")
    code.write_text("<<<<<<< HEAD\nfirst: a\n=======\nfirst: b\n>>>>>>> theirs\n")
    for look in (Pipeline(toy).stale, lambda: Pipeline(toy).reproduce("first")):
        with pytest.raises(StageError) as error:
            look()
        assert error.value.what == f"a merge left conflicts in {CODE}"
        assert f"`git add {CODE}` and `nss run`" in error.value.fix
