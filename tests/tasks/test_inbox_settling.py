"""When an entry of the inbox has settled: told by a clock that passes when told."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from nss.errors import DataError
from tasks.inbox import Inbox


class Clock:
    """Time that passes when told."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def images(path: Path, seed: int) -> Path:
    """Write 20 images whose pixels are drawn with that seed."""
    path.parent.mkdir(exist_ok=True)
    np.savez(path, x=np.random.default_rng(seed).integers(0, 255, (20, 8, 8), dtype=np.uint8), y=np.arange(20) % 2)
    return path


def look(inbox: Inbox) -> list[str]:
    return [entry.name for entry in inbox.settled()]


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def box(tmp_path: Path, clock: Clock) -> Inbox:
    """An empty inbox whose entries settle in 5 seconds."""
    (tmp_path / "inbox").mkdir()
    return Inbox(tmp_path / "inbox", 5, clock)


def test_an_entry_settles_when_nothing_changed_for_that_long(box: Inbox, clock: Clock) -> None:
    images(box.folder / "a.npz", 1)
    assert look(box) == []
    clock.now = 4.9
    assert look(box) == []
    clock.now = 5.0
    assert look(box) == ["a.npz"]


@pytest.mark.parametrize(
    "change",
    [
        lambda folder: (folder / "cat" / "2.png").write_bytes(b"new"),
        lambda folder: (folder / "cat" / "1.png").write_bytes(b"longer"),
        lambda folder: (folder / "cat" / "1.png").rename(folder / "cat" / "9.png"),
        lambda folder: (folder / "cat" / "1.png").unlink(),
        lambda folder: os.utime(folder / "cat" / "1.png", (1, 1)),
        # What `cp --preserve` and rsync do: same size, and the old time of change put back.
        lambda folder: rewritten(folder / "cat" / "1.png", b"two"),
    ],
    ids=["a new file", "another size", "another name", "a file less", "another time", "other bytes under the old time"],
)
def test_any_change_below_an_entry_starts_the_waiting_again(box: Inbox, clock: Clock, change) -> None:
    (box.folder / "batch" / "cat").mkdir(parents=True)
    (box.folder / "batch" / "cat" / "0.png").write_bytes(b"one")
    (box.folder / "batch" / "cat" / "1.png").write_bytes(b"one")
    look(box)
    clock.now = 4
    change(box.folder / "batch")
    assert look(box) == []
    clock.now = 8
    assert look(box) == []
    clock.now = 9
    assert look(box) == ["batch"]


def rewritten(path: Path, content: bytes) -> None:
    before = path.stat()
    path.write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_a_folder_without_a_file_is_waited_for_and_holds_up_nothing(box: Inbox, clock: Clock) -> None:
    (box.folder / "to come" / "cat").mkdir(parents=True)
    images(box.folder / "a.npz", 1)
    look(box)
    clock.now = 100
    assert look(box) == ["a.npz"]
    assert box.pending() == ("a.npz", "to come")


def test_what_is_still_copied_is_waited_for_but_not_for_ever(box: Inbox, clock: Clock) -> None:
    images(box.folder / "a.npz", 1)
    look(box)
    for now in range(5, 50, 4):
        clock.now = now
        images(box.folder / "slow.npz", now)
        assert look(box) == []
    clock.now = 50
    images(box.folder / "slow.npz", 50)
    assert look(box) == ["a.npz"]


def test_hidden_entries_and_a_missing_inbox_are_no_entries(box: Inbox, clock: Clock, tmp_path: Path) -> None:
    (box.folder / ".done").mkdir()
    images(box.folder / ".uploading.npz", 1)
    look(box)
    clock.now = 10
    assert look(box) == []
    assert Inbox(tmp_path / "nowhere").settled() == ()


def link_folder(folder: Path) -> None:
    (folder / "batch" / "new").symlink_to(folder / "batch" / "cat")


def link_in_a_circle(folder: Path) -> None:
    (folder / "batch" / "cat" / "again").symlink_to(folder / "batch")
    (folder / "batch" / "cat" / "once more").symlink_to(folder / "batch")


def link_out(folder: Path) -> None:
    (folder.parent / "elsewhere").mkdir()
    (folder / "batch" / "out").symlink_to(folder.parent / "elsewhere")


@pytest.mark.parametrize("make", [link_folder, link_in_a_circle, link_out])
def test_links_of_every_kind_settle(box: Inbox, clock: Clock, make) -> None:
    (box.folder / "batch" / "cat").mkdir(parents=True)
    (box.folder / "batch" / "cat" / "0.png").write_bytes(b"one")
    make(box.folder)
    look(box)
    clock.now = 5
    assert look(box) == ["batch"]


def test_what_a_link_leads_to_is_waited_for(box: Inbox, clock: Clock, tmp_path: Path) -> None:
    target = images(tmp_path / "elsewhere" / "a.npz", 1)
    (box.folder / "a.npz").symlink_to(target)
    look(box)
    clock.now = 4
    with target.open("ab") as file:
        file.write(b"more")
    assert look(box) == []
    clock.now = 8
    assert look(box) == []
    clock.now = 9
    assert look(box) == ["a.npz"]


def test_a_folder_that_cannot_be_looked_into_is_not_waited_for_in_silence(
    box: Inbox, clock: Clock, monkeypatch
) -> None:
    (box.folder / "closed").mkdir()
    walk = os.walk

    def closed(top: Path, onerror=None, **options: object):
        onerror(PermissionError(13, "Permission denied", str(top)))
        return walk(top / "nothing", **options)

    monkeypatch.setattr("os.walk", closed)
    look(box)
    clock.now = 5
    assert look(box) == ["closed"]


def test_an_inbox_that_is_no_folder_is_said(tmp_path: Path) -> None:
    (tmp_path / "inbox").write_text("x")
    with pytest.raises(DataError, match=r"the inbox cannot be read \(Not a directory\)"):
        Inbox(tmp_path / "inbox").settled()
