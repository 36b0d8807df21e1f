"""The workspace's lock where this user may not write it, or not even read it."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from nss.errors import BusyError, StageError
from tasks.dvc_errors import full_disk
from tasks.lock import exclusive, is_held
from tasks.workspace import Workspace

NOBODY = 65534


@pytest.fixture
def workspace() -> Iterator[Workspace]:
    """A workspace, with its lock, in a folder that everybody may enter; pytest's own are closed to others."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        root.chmod(0o755)
        (root / ".dvc" / "tmp").mkdir(parents=True)
        for name in ("nss-work.lock", "nss-work.pid"):
            (root / ".dvc" / "tmp" / name).touch()
        yield Workspace(root)


@contextmanager
def unprivileged() -> Iterator[None]:
    """Be somebody whom permissions bind: root is nobody for a while."""
    before = os.geteuid()
    os.seteuid(before or NOBODY)
    try:
        yield
    finally:
        os.seteuid(before)


@pytest.mark.parametrize(
    ("closed", "mode"), [("nss-work.lock", 0o444), ("nss-work.lock", 0), ("nss-work.pid", 0o444), (".", 0)]
)
def test_a_lock_that_this_user_may_not_write_is_said_with_the_way_out(
    workspace: Workspace, closed: str, mode: int
) -> None:
    folder = workspace.root / ".dvc" / "tmp"
    for name in ("nss-work.lock", "nss-work.pid"):
        (folder / name).chmod(0o666)
    (folder / closed).chmod(mode)
    with unprivileged(), pytest.raises(StageError) as caught, exclusive(workspace):
        pytest.fail("locked")
    folder.chmod(0o755)
    assert caught.value.what == "the workspace cannot be locked (Permission denied)"
    assert caught.value.where == str(folder / ("nss-work.lock" if closed == "." else closed))
    assert caught.value.fix == (
        f"let this user write to {folder}; what root left in the workspace is given back by "
        f'`sudo chown -R "$USER" {workspace.root}`'
    )
    with exclusive(workspace):
        assert is_held(workspace) is True


def test_a_folder_that_this_user_may_not_make_is_said(workspace: Workspace) -> None:
    (workspace.root / ".dvc").chmod(0o555)
    (workspace.root / ".dvc" / "tmp").rename(workspace.root / "away")
    with unprivileged(), pytest.raises(StageError) as caught, exclusive(workspace):
        pytest.fail("locked")
    assert caught.value.what == "the workspace cannot be locked (Permission denied)"
    assert caught.value.where == str(workspace.root / ".dvc" / "tmp")


def test_a_folder_in_place_of_the_lock_is_said_and_held_by_nobody(tmp_path: Path) -> None:
    path = tmp_path / ".dvc" / "tmp" / "nss-work.lock"
    path.mkdir(parents=True)
    with pytest.raises(StageError) as caught, exclusive(Workspace(tmp_path)):
        pytest.fail("locked")
    assert caught.value.what == "the workspace cannot be locked (Is a directory)"
    assert caught.value.where == str(path)
    assert is_held(Workspace(tmp_path)) is False


def test_where_dvc_versions_nothing_there_is_no_lock_and_nothing_is_left(tmp_path: Path) -> None:
    with pytest.raises(StageError) as caught, exclusive(Workspace(tmp_path)):
        pytest.fail("locked")
    assert caught.value.what == "this is no DVC repository"
    assert caught.value.where == str(tmp_path)
    assert caught.value.fix == "dvc init, with --subdir in a folder of a larger repository"
    assert list(tmp_path.iterdir()) == []


def test_what_goes_wrong_under_the_lock_is_no_matter_of_the_lock(tmp_path: Path) -> None:
    (tmp_path / ".dvc").mkdir()
    with pytest.raises(PermissionError), exclusive(Workspace(tmp_path)):
        raise PermissionError(errno.EACCES, "Permission denied", "photo.png")
    assert is_held(Workspace(tmp_path)) is False


def test_a_disk_without_room_for_the_lock_is_said_as_a_full_disk(tmp_path: Path, monkeypatch) -> None:
    def refuse(self: Path, *_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(self))

    (tmp_path / ".dvc").mkdir()
    monkeypatch.setattr("pathlib.Path.mkdir", refuse)
    with pytest.raises(StageError) as caught, exclusive(Workspace(tmp_path)):
        pytest.fail("locked")
    assert "there is no room left on the disk" in str(full_disk(caught.value, tmp_path))


def test_who_may_only_read_the_lock_sees_whether_it_is_held(workspace: Workspace) -> None:
    (workspace.root / ".dvc" / "tmp" / "nss-work.lock").chmod(0o644)
    with unprivileged():
        assert is_held(workspace) is False
    with exclusive(workspace), unprivileged():
        assert is_held(workspace) is True
    with unprivileged():
        assert is_held(workspace) is False


@pytest.mark.parametrize("closed", [".dvc/tmp/nss-work.lock", ".dvc/tmp", ".dvc"])
def test_who_may_not_even_read_the_lock_cannot_tell(workspace: Workspace, closed: str) -> None:
    (workspace.root / closed).chmod(0)
    with unprivileged():
        assert is_held(workspace) == "unknown"
    (workspace.root / closed).chmod(0o755)
    assert is_held(workspace) is False


def test_a_look_leaves_nothing_behind(tmp_path: Path) -> None:
    assert is_held(Workspace(tmp_path)) is False
    assert list(tmp_path.iterdir()) == []


def test_a_holder_keeps_its_name_when_somebody_looks_or_tries(tmp_path: Path) -> None:
    (tmp_path / ".dvc").mkdir()
    workspace = Workspace(tmp_path)
    with exclusive(workspace):
        assert is_held(workspace) is True
        with pytest.raises(BusyError, match=rf"process {os.getpid()} \(.+\) is at work"), exclusive(workspace):
            pytest.fail("locked")
