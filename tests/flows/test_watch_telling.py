"""What cannot be moved, or cannot be told, keeps no cycle from running and does not end the watcher."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from flows.watch import Here, There, Watcher, Watching, undisturbed
from nss.errors import DataError, NssError
from tasks.data import add
from tasks.provenance import data_md5
from tasks.workspace import Workspace

ODD = os.fsdecode(b"caf\xe9.npz")


@dataclass
class Recorder:
    """A trigger that writes down what it is asked; `error` is raised each time."""

    error: Exception | None = None
    asked: list[tuple[str, bool]] = field(default_factory=list)

    def is_free(self) -> bool:
        return True

    def fire(self, md5: str, *, is_own: bool) -> bool:
        self.asked.append((md5, is_own))
        if self.error:
            raise self.error
        return True


@pytest.fixture
def workspace(repository: Path, tmp_path: Path) -> Workspace:
    """A repository with one batch, and an inbox."""
    (repository / "inbox").mkdir()
    add(Workspace(repository), str(images(tmp_path / "first.npz", 0)), new_classes=True)
    return Workspace(repository)


def images(path: Path, seed: int) -> Path:
    pixels = np.random.default_rng(seed).integers(0, 255, (20, 8, 8), dtype=np.uint8)
    with path.open("wb") as file:
        np.savez(file, x=pixels, y=np.arange(20) % 2)
    return path


def watcher(workspace: Workspace, trigger: Recorder, tell: Callable[[str], None]) -> Watcher:
    return Watcher(workspace, Watching(workspace.root / "inbox", poll=0.01, settle=0), trigger, tell)


def full(_: str) -> None:
    raise OSError(28, "No space left on device")


def test_a_cycle_runs_for_what_was_added_and_cannot_be_moved(workspace: Workspace, monkeypatch) -> None:
    images(workspace.root / "inbox" / "a.npz", 1)

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.rename", refuse)
    before, trigger, said = data_md5(workspace), Recorder(), []
    found = watcher(workspace, trigger, said.append)
    for _ in range(2):
        with pytest.raises(DataError) as caught:
            found.step()
    assert str(caught.value) == (
        "what was taken cannot be moved out of the inbox\n"
        "  - a.npz: Permission denied\n"
        f"  where: {workspace.root / 'inbox'}\n"
        "  fix: let nss move entries within it; until then they are found again, and not added twice"
    )
    assert data_md5(workspace) != before
    assert trigger.asked == [(data_md5(workspace), True)]
    assert [line.split(",")[0] for line in said] == ["arrived a.npz: 20 images"]


def test_a_name_of_the_greatest_length_is_taken_as_any_other(workspace: Workspace) -> None:
    name = f"{'ä' * 125}x.npz"
    images(workspace.root / "inbox" / name, 1)
    trigger, said = Recorder(), []
    taken = watcher(workspace, trigger, said.append).step()
    assert [each.name for each in taken.arrived] == [name]
    assert (trigger.asked, said[0].startswith(f"arrived {name}: 20 images")) == ([(data_md5(workspace), True)], True)


def test_a_name_that_is_no_text_is_told_in_letters_that_any_log_takes(workspace: Workspace, tmp_path: Path) -> None:
    images(workspace.root / "inbox" / ODD, 1)
    trigger = Recorder()
    with (tmp_path / "log").open("w", encoding="utf-8") as log:
        watcher(workspace, trigger, log.write).step()
    assert (tmp_path / "log").read_text(encoding="utf-8").startswith("arrived caf\\udce9.npz: 20 images, batch ")
    assert trigger.asked == [(data_md5(workspace), True)]


def test_a_watcher_whose_log_is_full_goes_on_looking(tmp_path: Path) -> None:
    (tmp_path / "data.dvc").write_text("outs:\n- md5: one.dir\n  path: data\n")
    trigger, stop = Recorder(NssError("away")), threading.Event()
    thread = threading.Thread(target=watcher(Workspace(tmp_path), trigger, full).run, args=(stop,))
    thread.start()
    while len(trigger.asked) < 3 and thread.is_alive():
        stop.wait(0.01)
    is_alive = thread.is_alive()
    stop.set()
    thread.join(30)
    assert is_alive
    assert trigger.asked[:3] == [("one.dir", False)] * 3


def test_no_one_who_tells_of_a_cycle_fails_for_it(tmp_path: Path) -> None:
    for each in (Here(Workspace(tmp_path), 0, full), There(Workspace(tmp_path), None, full)):
        each.tell("a cycle starts")


def test_a_stream_that_takes_no_such_letter_ends_nothing_and_other_mistakes_are_seen() -> None:
    told: list[str] = []
    undisturbed(lambda line: told.append(line.encode("ascii").decode()))("größe")
    undisturbed(told.append)("a line")
    assert told == ["a line"]
    with pytest.raises(ZeroDivisionError):
        undisturbed(lambda _: 1 / 0)("a line")
