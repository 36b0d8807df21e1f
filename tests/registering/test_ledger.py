from __future__ import annotations

import multiprocessing
from pathlib import Path

import pytest

from nss.errors import BusyError, StageError
from tasks import ledger
from tasks.workspace import Workspace


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workspace:
    monkeypatch.delenv("DVC_ROOT", raising=False)
    return Workspace(tmp_path)


def test_entries_come_back_in_order_with_their_time(workspace: Workspace) -> None:
    assert ledger.read_ledger(workspace) == []
    ledger.append(workspace, "gate", {"verdict": "HOLD", "why": "ä\n"})
    ledger.append(workspace, "promote", {"version": 3})
    first, second = ledger.read_ledger(workspace)
    assert (first["kind"], first["why"], second["version"]) == ("gate", "ä\n", 3)
    assert first["time"].endswith("+00:00")
    assert len((workspace.store / "ledger.jsonl").read_text(encoding="utf-8").splitlines()) == 2


@pytest.mark.parametrize("torn", [b"{", b'{"kind": "gate"}', b"\x00\xc3"])
def test_a_last_line_that_was_cut_off_is_not_read_and_the_next_entry_takes_its_place(
    workspace: Workspace, torn: bytes
) -> None:
    ledger.append(workspace, "gate", {"id": 1})
    with (workspace.store / "ledger.jsonl").open("ab") as file:
        file.write(torn)
    assert [entry["id"] for entry in ledger.read_ledger(workspace)] == [1]
    ledger.append(workspace, "gate", {"id": 2})
    assert [entry["id"] for entry in ledger.read_ledger(workspace)] == [1, 2]
    assert torn not in (workspace.store / "ledger.jsonl").read_bytes().split(b"\n")


@pytest.mark.parametrize("line", ["{", "[]", "1"])
def test_a_damaged_line_before_the_last_is_named(workspace: Workspace, line: str) -> None:
    ledger.append(workspace, "gate", {})
    with (workspace.store / "ledger.jsonl").open("a") as file:
        file.write(f"{line}\n")
    with pytest.raises(StageError, match=r"line 2 of the ledger is damaged\n(.*\n)*  fix: remove this line"):
        ledger.read_ledger(workspace)


def _append(root: str, number: int) -> None:
    for each in range(25):
        ledger.append(Workspace(Path(root)), "gate", {"id": [number, each]})


def test_four_processes_at_once_lose_no_entry_and_mix_no_lines(workspace: Workspace) -> None:
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_append, args=(str(workspace.root), number)) for number in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(100)
    found = sorted(entry["id"] for entry in ledger.read_ledger(workspace))
    assert found == [[number, each] for number in range(4) for each in range(25)]


def test_who_holds_the_lock_may_take_it_again_and_others_are_told(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    def take(queue) -> None:
        monkeypatch.setattr(ledger, "_PATIENCE_S", 0.05)
        # A forked process inherits the lock's object, which believes that it holds it.
        ledger.FileLock = lambda path, **_: __import__("filelock").FileLock(path, timeout=0.05)
        try:
            with ledger.locked(workspace):
                queue.put("taken")
        except BusyError as error:
            queue.put(str(error))

    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    with ledger.locked(workspace), ledger.locked(workspace):
        process = context.Process(target=take, args=(queue,))
        process.start()
        assert "another process registers or promotes" in queue.get(timeout=60)
        process.join()
    with ledger.locked(workspace):
        pass
