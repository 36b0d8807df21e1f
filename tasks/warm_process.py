"""The process that forks for each stage, see tasks/warm.py: `python -m tasks.warm_process LISTENER FOLDER`.

Nothing of ours stays imported in what it forks: a stage sees the code that is there when it starts.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import gc
import importlib
import io
import json
import logging
import multiprocessing.util
import os
import select
import shutil
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Mapping
from typing import Any, NoReturn

from tasks.warm import SIGNALLED, SIZE_BYTES, end, limits

_OURS = ("nss", "tasks", "flows")
# What every stage imports, and what MLflow imports only when it is used.
FIRST = ("tasks.stage", "tasks.journal", "mlflow.store.tracking.sqlalchemy_store")
VERBS = ("base", "profile", "slice", "triage", "restructure", "readapt", "extend", "evaluate", "gate")
LATER = (*(f"tasks.{verb}" for verb in VERBS), "tasks.report")
_INTERRUPTED = 130
_PR_SET_PDEATHSIG = 1
# What may differ between an environment that something was imported in and that of who uses it: what DVC, its shell and
# we set for each stage, and we look up when it runs.
_FREE_NAMES = ("PATH", "PWD", "OLDPWD", "SHLVL", "_")
_FREE_PREFIXES = ("NSS_", "DVC_")


class Process:
    """Forks for whoever asks, one at a time, until the process that started it has ended, in whatever way.

    `later`: what is still to be imported, while nothing else is to be done.
    """

    def __init__(self, listener: socket.socket) -> None:
        self.listener, self.later = listener, list(LATER)
        # As it is before anything is imported that adds to it.
        self.env = dict(os.environ)
        self.interrupted = signal.getsignal(signal.SIGINT)
        # Whoever it works for ends it; a stage is to end first, and tell how.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)

    def serve(self) -> None:
        """Work until the process that started this one has ended."""
        for name in FIRST:
            importlib.import_module(name)
        gc.freeze()
        while sys.stdin not in select.select([self.listener, sys.stdin], [], [])[0]:
            line, _ = self.listener.accept()
            # Whoever asked may be gone.
            with line, contextlib.suppress(OSError, ValueError):
                self._answer(line)

    def _answer(self, line: socket.socket) -> None:
        size, fds, *_ = socket.recv_fds(line, SIZE_BYTES, 3)
        try:
            with line.makefile("rb") as reader:
                request = json.loads(reader.read(int.from_bytes(size)))
            if not is_alike(request, self.env):
                return
            pid = self._fork(request, fds, line)
        finally:
            for number in fds:
                os.close(number)
        with contextlib.suppress(OSError):
            line.sendall(f"{pid}\n".encode())
        line.sendall(f"{self._wait(pid, line)}\n".encode())

    def _fork(self, request: Mapping[str, Any], fds: list[int], line: socket.socket) -> int:
        pid = os.fork()
        if pid == 0:
            try:
                self.listener.close()
                line.close()
                signal.signal(signal.SIGINT, self.interrupted)
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
                become(request, self.env, fds)
            finally:
                # Whatever happened: only one process serves.
                os._exit(1)
        return pid

    def _wait(self, pid: int, line: socket.socket) -> int:
        """Return the exit code of a process of ours. It has to end when nobody waits for it any more."""
        ended = os.pidfd_open(pid)
        try:
            while not (ready := select.select([ended, line, sys.stdin], [], [], 0 if self.later else None)[0]):
                self._import_more()
            if ended not in ready:
                end(pid, ended)
            code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        finally:
            os.close(ended)
        return code if code >= 0 else SIGNALLED - code

    def _import_more(self) -> None:
        # What cannot be imported is missed by those that need it, and they say so.
        with contextlib.suppress(Exception):
            importlib.import_module(self.later.pop(0))
        # What is never looked at is not copied for those that are forked.
        gc.freeze()


def is_alike(request: Mapping[str, Any], env: Mapping[str, str]) -> bool:
    """Say whether libraries that were imported under these variables and here are what who asks would have got."""
    return bool(_fixed(request["env"]) == _fixed(env) and request["limits"] == limits())


def _fixed(env: Mapping[str, str]) -> dict[str, str]:
    return {
        name: value for name, value in env.items() if name not in _FREE_NAMES and not name.startswith(_FREE_PREFIXES)
    }


def become(request: Mapping[str, Any], env: Mapping[str, str], fds: list[int]) -> NoReturn:
    """Do what was asked for as if this process had been started for it, and end. env: what it was started with."""
    code = 1
    try:
        # Should the process that forked this one die, this one is to end too.
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        _forget_exits()
        _take_over(request, env, fds)
        module, function, *args = request["call"]
        code = getattr(importlib.import_module(module), function)(*args)
    except SystemExit as asked:
        code = asked.code if isinstance(asked.code, int) else 1
    except KeyboardInterrupt:
        code = _INTERRUPTED
    except BaseException:
        with contextlib.suppress(OSError):
            traceback.print_exc()
    finally:
        _end(code)


def _forget_exits() -> None:
    """What libraries do at the end is the forking process's business, but for what any process that was forked does."""
    atexit._clear()
    atexit.register(logging.shutdown)
    atexit.register(multiprocessing.util._exit_function)  # type: ignore[attr-defined]  # the stub leaves it out


def _take_over(request: Mapping[str, Any], env: Mapping[str, str], fds: list[int]) -> None:
    for target, number in enumerate(fds):
        os.dup2(number, target)
        os.close(number)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)
    os.chdir(request["cwd"])
    for name in env.keys() - request["env"].keys():
        os.environ.pop(name, None)
    os.environ.update(request["env"])
    sys.argv = request["argv"]
    for name in [each for each in sys.modules if each.partition(".")[0] in _OURS]:
        del sys.modules[name]


def _end(code: int) -> NoReturn:
    """End without taking to pieces what was there before the fork, which takes long."""
    try:
        threading._shutdown()  # type: ignore[attr-defined]  # the stub leaves it out
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


if __name__ == "__main__":
    Process(socket.socket(fileno=int(sys.argv[1]))).serve()
    shutil.rmtree(sys.argv[2], ignore_errors=True)
