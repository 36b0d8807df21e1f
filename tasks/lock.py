"""One at a time: a cycle, or a change of data/. A batch that came between two stages would make the next one fail."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
from filelock import FileLock, Timeout

from nss.errors import BusyError
from tasks.workspace import Workspace


@contextmanager
def exclusive(workspace: Workspace, *, wait_s: float = 0, what: str = "work") -> Iterator[None]:
    """Hold the workspace's lock of that name; it goes with the process, however that ends.

    what: "work", what cycles and arrivals hold; or another name.
    wait_s: how long to wait for somebody else.

    Raises BusyError when somebody else still holds it then.

    >>> with exclusive(find_workspace()):  # doctest: +SKIP
    ...     pass
    """
    path = workspace.root / ".dvc" / "tmp" / f"nss-{what}.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    holder = path.with_suffix(".pid")
    lock = FileLock(path, timeout=wait_s)
    try:
        lock.acquire()
    except Timeout:
        raise BusyError(
            f"{_name(holder)} is at work in this workspace",
            where=str(path),
            fix="wait until it has ended, or stop it; `nss status` says what runs",
        ) from None
    try:
        holder.write_text(str(os.getpid()), encoding="utf-8")
        yield
    finally:
        lock.release()


def is_held(workspace: Workspace, what: str = "work") -> bool:
    """Say whether somebody holds that lock."""
    try:
        with exclusive(workspace, what=what):
            return False
    except BusyError:
        return True


def _name(holder: Path) -> str:
    try:
        process = psutil.Process(int(holder.read_text(encoding="utf-8")))
        return f"process {process.pid} ({' '.join(process.cmdline())})"
    except (OSError, ValueError, psutil.Error):
        return "another process"
