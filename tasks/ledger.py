"""The ledger: one line of JSON for each decision of the gate, promotion and rollback, appended and never changed.

It lies beside the tracking store and needs none: a decision is kept also when MLflow does not answer.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from nss.errors import BusyError, StageError
from tasks.workspace import Workspace

_PATIENCE_S = 120


def ledger_path(workspace: Workspace) -> Path:
    """Return the file of the ledger, which may not be there yet."""
    return workspace.store / "ledger.jsonl"


def plan_path(workspace: Workspace) -> Path:
    """Return the file that says which promotion or rollback has been begun; there is none when all have ended."""
    return ledger_path(workspace).with_suffix(".jsonl.pending")


@contextmanager
def locked(workspace: Workspace) -> Iterator[None]:
    """Let one process at a time decide which version is the champion; a thread that holds the lock may take it again.

    Raises BusyError when another process keeps it.
    """
    path = ledger_path(workspace)
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(f"{path}.lock", timeout=_PATIENCE_S, is_singleton=True)
    try:
        lock.acquire()
    except Timeout:
        raise BusyError(
            "another process registers or promotes a model", where=str(path), fix="wait until it has ended"
        ) from None
    try:
        yield
    finally:
        lock.release()


def read_ledger(workspace: Workspace) -> list[dict[str, Any]]:
    """Return the entries, oldest first; a last line that was cut off is left out.

    Raises StageError that names a damaged line.

    >>> [entry["kind"] for entry in read_ledger(find_workspace())]  # doctest: +SKIP
    ['gate', 'promote']
    """
    path = ledger_path(workspace)
    if not path.exists():
        return []
    # The last part is empty, or what a process that was killed had written of its line.
    *lines, _ = path.read_bytes().split(b"\n")
    return [_entry(line, number, path) for number, line in enumerate(lines, start=1)]


def _entry(line: bytes, number: int, path: Path) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise StageError(f"line {number} of the ledger is damaged", where=str(path), fix="remove this line")
    return found


def append(workspace: Workspace, kind: str, content: Mapping[str, Any]) -> None:
    """Append an entry with the time in UTC; when this returns, it is on disk. What was cut off before is removed."""
    path = ledger_path(workspace)
    now = datetime.now(UTC).isoformat(timespec="seconds")
    line = json.dumps({"time": now, "kind": kind, **content}, ensure_ascii=False)
    with locked(workspace), path.open("a+b") as file:
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)
        file.write(line.encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())
