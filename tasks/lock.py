"""One at a time: a cycle, or a change of data/. A batch that came between two stages would make the next one fail."""

from __future__ import annotations

import fcntl
import os
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import psutil
from filelock import FileLock, Timeout

from nss.errors import BusyError, StageError, first_line
from tasks.workspace import Workspace


@contextmanager
def exclusive(workspace: Workspace, *, wait_s: float = 0, what: str = "work") -> Iterator[None]:
    """Hold the workspace's lock of that name; it goes with the process, however that ends.

    what: "work", what cycles and arrivals hold; or another name.
    wait_s: how long to wait for somebody else.

    Raises BusyError when somebody else still holds it then, StageError when this user may not write it, or DVC does not
    version this folder: a `.dvc/` that a lock had made would pass for a repository.

    >>> with exclusive(find_workspace()):  # doctest: +SKIP
    ...     pass
    """
    path = _path(workspace, what)
    lock = FileLock(path, timeout=wait_s)
    try:
        _acquire(lock, path)
        yield
    finally:
        lock.release()


def is_held(workspace: Workspace, what: str = "work") -> bool | Literal["unknown"]:
    """Say whether somebody holds that lock; "unknown", which counts as yes, where it cannot be read.

    Nothing is written, and nobody else who looks is in the way.
    """
    try:
        file = os.open(_path(workspace, what), os.O_RDONLY)
    except FileNotFoundError:
        return False
    except OSError:
        return "unknown"
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return True
    except OSError:
        return "unknown"
    finally:
        os.close(file)
    return False


def _path(workspace: Workspace, what: str) -> Path:
    return workspace.root / ".dvc" / "tmp" / f"nss-{what}.lock"


def _acquire(lock: FileLock, path: Path) -> None:
    holder, dvc = path.with_suffix(".pid"), path.parents[1]
    try:
        if not dvc.is_dir():
            fix = "dvc init, with --subdir in a folder of a larger repository"
            raise StageError("this is no DVC repository", where=str(dvc.parent), fix=fix)
        path.parent.mkdir(exist_ok=True)
        lock.acquire()
        holder.write_text(str(os.getpid()), encoding="utf-8")
    except Timeout:
        raise BusyError(
            f"{_name(holder)} is at work in this workspace",
            where=str(path),
            fix="wait until it has ended, or stop it; `nss status` says what runs",
        ) from None
    except OSError as error:
        raise StageError(
            f"the workspace cannot be locked ({error.strerror or first_line(error)})",
            where=str(error.filename or path),
            fix=f"let this user write to {path.parent}; what root left in the workspace is given back by "
            f'`sudo chown -R "$USER" {shlex.quote(str(path.parents[2]))}`',
        ) from error


def _name(holder: Path) -> str:
    try:
        process = psutil.Process(int(holder.read_text(encoding="utf-8")))
        return f"process {process.pid} ({' '.join(process.cmdline())})"
    except (OSError, ValueError, psutil.Error):
        return "another process"
