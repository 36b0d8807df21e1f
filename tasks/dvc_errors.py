"""What DVC's errors mean to a user."""

from __future__ import annotations

import errno
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
from dvc.exceptions import DvcException, NotDvcRepoError
from dvc.lock import LockError
from dvc.stage.exceptions import StageCmdFailedError

from nss.errors import BusyError, CrashError, NssError, StageError

_HOLDER = re.compile(r"\(PID (\d+)\): (.*)")
# Files that branches have in common and DVC reads.
_MERGED = ("dvc.yaml", "dvc.lock", "data.dvc", "champion.dvc", "nss-code.yaml")
_CONFLICT = "<<<<<<<"
# Exit codes of a stage that Ctrl-C ended: its own, and the signal itself.
_INTERRUPTED = ("130", "-2")
# Of a stage that said itself what is wrong: a mistake, or somebody else at work.
_SAID = ("2", "75")
_KILLED = ("137", "-9")
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FULL_WORDS = ("No space left on device", "Disk quota exceeded", "disk is full", "File too large")

# DVC's messages come back as exceptions; what is left would be progress bars between our lines.
logging.getLogger("dvc").setLevel(logging.CRITICAL)
_COPYING = logging.getLogger("dvc_data")
_COPYING.propagate = False
_COPYING.handlers.clear()


class _Listener(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.heard: list[BaseException] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info and record.exc_info[1]:
            self.heard.append(record.exc_info[1])


@contextmanager
def listening() -> Iterator[list[BaseException]]:
    """Gather the errors that DVC only logs when it fails to copy a file into its cache."""
    handler = _Listener()
    _COPYING.addHandler(handler)
    try:
        yield handler.heard
    finally:
        _COPYING.removeHandler(handler)


def full_disk(error: BaseException, root: Path) -> StageError | None:
    """Return what to tell a user whose disk is full, None when the error has another reason."""
    cause: BaseException | None = error
    seen: set[int] = set()
    # An exception that is raised again while it is handled may be its own context.
    while cause is not None and id(cause) not in seen:
        seen.add(id(cause))
        if getattr(cause, "errno", None) in _FULL or any(words in str(cause) for words in _FULL_WORDS):
            return StageError(
                f"there is no room left on the disk ({cause})",
                where=str(getattr(cause, "filename", None) or root),
                fix="free some, then run again; `dvc gc --workspace` removes what older versions left in DVC's cache",
            )
        cause = cause.__cause__ or cause.__context__
    return None


def translate(error: DvcException | OSError, root: Path) -> Exception:
    """Make DVC's error one of ours, by the deepest cause that says something."""
    causes: list[BaseException] = [error]
    while causes[-1].__cause__ is not None and causes[-1].__cause__ not in causes:
        causes.append(causes[-1].__cause__)
    for cause in causes:
        if isinstance(cause, NssError | StageCmdFailedError):
            return cause
        if isinstance(cause, LockError):
            return _busy(str(cause), root)
        if isinstance(cause, NotDvcRepoError):
            return StageError("this is no DVC repository", where=str(root), fix="dvc init")
    if isinstance(error, OSError):
        return error
    return conflict(root) or StageError(f"DVC: {causes[-1]}", where=str(root), fix="see `dvc status` and `dvc doctor`")


def conflict(root: Path) -> StageError | None:
    """Return what to tell a user whose merge left conflicts in a file that DVC reads, None where there are none."""
    present = [root / name for name in _MERGED if (root / name).is_file()]
    torn = [path.name for path in present if _CONFLICT in path.read_text(encoding="utf-8", errors="replace")]
    if not torn:
        return None
    return StageError(
        f"a merge left conflicts in {', '.join(torn)}",
        where=str(root / torn[0]),
        fix=f"take one side, `git checkout --ours {torn[0]}` or `--theirs`, then `git add {torn[0]}` and `nss run`; "
        "see docs/recovery.md, After a merge",
    )


def _busy(message: str, root: Path) -> BusyError:
    found = _HOLDER.search(message)
    holder = f"process {found[1]} ({found[2]})" if found else _lock_owner(root)
    return BusyError(
        f"the repository is in use by {holder}", where=str(root), fix="wait until it has ended, or stop it"
    )


def _lock_owner(root: Path) -> str:
    try:
        pid = int((root / ".dvc" / "tmp" / "lock").read_text().strip())
        return f"process {pid} ({' '.join(psutil.Process(pid).cmdline())})"
    except (OSError, ValueError, psutil.Error):
        return "another DVC process"


def failure(name: str, message: str, log: Path) -> BaseException:
    """Return what a stage's command that failed is to its user: the last lines that it printed, or an interruption."""
    code = message.rpartition(" ")[2]
    if code in _INTERRUPTED:
        return KeyboardInterrupt()
    printed = log.read_text(encoding="utf-8", errors="replace").strip() if log.exists() else ""
    tail = "\n".join(f"  | {line}" for line in printed.splitlines()[-30:])
    kind = StageError if code in _SAID else CrashError
    again = f"then run again; finished stages are kept (`dvc repro {name}` prints everything)"
    killed = f"it was killed, mostly for lack of memory: take smaller batches, {again}"
    ended = f"it was ended by a signal, {again}"
    return kind(
        f"the stage '{name}' failed with exit code {code}" + (f"\n{tail}" if tail else ""),
        where=f"dvc.yaml, stage {name}",
        fix=killed if code in _KILLED else ended if _is_signal(code) else f"mend what it says, {again}",
    )


def _is_signal(code: str) -> bool:
    """Say whether an exit code is that of a process, or of its shell, that a signal has ended."""
    return code.startswith("-") or (code.isdigit() and int(code) > 128)
