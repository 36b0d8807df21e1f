"""The process beside `nss run`, see tasks/recorder.py: `python -m tasks.recorder_process LINE PARENT`."""

from __future__ import annotations

import ctypes
import importlib
import os
import signal
import sys
import traceback
from collections import deque
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

from nss.errors import CrashError, NssError, first_line
from tasks.garbage import collect_as_usual, collect_rarely
from tasks.recorder import STOPPING

if TYPE_CHECKING:
    from tasks.cycle import Cycle
    from tasks.params import Params
    from tasks.workspace import Workspace

# MLflow imports it only when it is used.
_DATABASES = "mlflow.store.tracking.sqlalchemy_store"
_PR_SET_PDEATHSIG = 1
KILLED = ("end", ("KILLED",))
"""the request that makes those before it needless, but for those without which there is no run to end"""
_ALWAYS = ("start", "open", "end")


def serve(line: Connection) -> None:
    """Answer one call after another until nobody is left who could ask: (lines to tell, value, error)."""
    lines: list[str] = []
    cycle: Cycle | None = None
    waiting: deque[Any] = deque()
    while (request := _next(line, waiting)) is not None:
        name, args = request
        value, error = None, None
        try:
            if name not in _ALWAYS and KILLED in waiting:
                # Whoever was interrupted wants no more than the run ended.
                pass
            elif name == "start":
                cycle = _cycle(lines, *args)
            else:
                value = getattr(cycle, name)(*args)
        except Exception as raised:
            error = _carried(raised)
        _send(line, (lines.copy(), value, error))
        lines.clear()


def _next(line: Connection, waiting: deque[Any]) -> Any:
    """Return the next request, None at the end; all that has been sent waits in order."""
    try:
        while not waiting or line.poll():
            waiting.append(line.recv())
    except (EOFError, OSError):
        pass
    return waiting.popleft() if waiting else None


def _cycle(lines: list[str], workspace: Workspace, params: Params) -> Cycle:
    from tasks.cycle import Cycle

    return Cycle(workspace, params, lines.append)


def _send(line: Connection, answer: tuple[Any, ...]) -> None:
    try:
        line.send(answer)
    except OSError:
        # Nobody listens any more, but somebody may read.
        sys.stderr.writelines(f"{each}\n" for each in answer[0])


def _carried(error: Exception) -> Exception:
    """Return what can be raised in another process; a fault of ours is told here, where it comes from."""
    if isinstance(error, NssError):
        return error
    if isinstance(error, OSError):
        # A library's own may hold what can't be sent, such as an answer that it still reads.
        return error if type(error).__module__ == "builtins" else OSError(first_line(error))
    traceback.print_exception(error)
    return CrashError(first_line(error), where="tasks.recorder_process")


def _end_with(parent: int) -> None:
    """End at once when that process ends: what we do is its work, under locks that it holds."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


if __name__ == "__main__":
    _end_with(int(sys.argv[2]))
    # Whoever asks is told, and ends what we do.
    for each in STOPPING:
        # Not ignored, which git and what it starts would inherit.
        signal.signal(each, lambda *_: None)
    # Until here they waited: whoever began us holds them back.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)
    collect_rarely()
    importlib.import_module("tasks.cycle")
    importlib.import_module(_DATABASES)
    collect_as_usual()
    serve(Connection(int(sys.argv[1])))
    sys.stderr.flush()
    # Nothing here needs to be taken to pieces, which takes long.
    os._exit(0)
