"""Stages without the seconds in which they import PyTorch and MLflow: a process that has, and forks for each of them.

`nss run` starts one when the first stage has to be executed. `nss stage`, which DVC calls, finds its address in the
environment, has it work in its place and ends as that work does. Without it, on other systems than Linux or in
`dvc repro`, a stage is executed in its own process.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TextIO

ADDRESS = "NSS_WARM"
"""Environment variable naming the socket at which the process listens."""

_MODULE = "tasks.warm"
_OURS = ("nss", "tasks", "flows")
_INTERRUPTED, _SIGNALLED = 130, 128
# What every stage imports, and what MLflow imports only when it is used.
_FIRST = ("tasks.stage", "tasks.journal", "mlflow.store.tracking.sqlalchemy_store")
_REPORT = "tasks.report"
_SIZE_BYTES = 8


class Warm:
    """The process, for whom it works: begun when first needed, ended with this block or with who began it.

    >>> with Warm(Path.cwd(), {}) as warm:  # doctest: +SKIP
    ...     warm.begin()
    """

    def __init__(self, root: Path, env: dict[str, str]) -> None:
        """env: what is added to its environment, and so to that of all that it forks, as others see it."""
        self._root, self._env = root, env
        self._process: subprocess.Popen[bytes] | None = None
        self._folder = ""

    def __enter__(self) -> Warm:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            os.environ.pop(ADDRESS, None)
            self._process.terminate()
            self._process.wait()
            self._process.stdin.close()
            shutil.rmtree(self._folder, ignore_errors=True)

    def begin(self) -> None:
        """Start it, unless it is there already. Whoever asks it for something before it is ready waits."""
        if self._process is not None or not _is_possible():
            return
        # Only its owner may enter a folder made like this, and so ask for anything.
        self._folder = tempfile.mkdtemp(prefix="nss-")
        address = os.path.join(self._folder, "warm")
        with socket.socket(socket.AF_UNIX) as listener:
            try:
                listener.bind(address)
            except OSError:
                # The path of a socket has no more than 107 bytes.
                return shutil.rmtree(self._folder)
            listener.listen()
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", _MODULE, str(listener.fileno())],
                cwd=self._root,
                env={**os.environ, **self._env},
                stdin=subprocess.PIPE,
                # What goes wrong in it goes wrong again, and is said, where the stage then has a process of its own.
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=[listener.fileno()],
            )
        os.environ[ADDRESS] = address


def _is_possible() -> bool:
    """Say whether one process can wait for another and for a word of a third at once: on Linux since 5.3."""
    try:
        os.close(os.pidfd_open(os.getpid()))
        return True
    except (AttributeError, OSError):
        return False


@dataclass(frozen=True)
class Begun:
    """Work of ours that another process, `pid`, does."""

    pid: int
    line: socket.socket
    answers: TextIO

    def wait(self) -> int:
        """Return its exit code, 128 and the number of a signal that ended it."""
        with self.line, self.answers:
            code = self.answers.readline()
            if not code:
                # The process that it was forked from is gone.
                self.tell(signal.SIGTERM)
                return _SIGNALLED + signal.SIGTERM
            return int(code)

    def tell(self, number: int) -> None:
        """Send it a signal, while it lives."""
        try:
            os.kill(self.pid, number)
        except ProcessLookupError:
            return


def hand_over(module: str, function: str, *args: str) -> Begun | None:
    """Have the warm process call a function of ours, which returns an exit code; None when there is no such process.

    The function has the arguments, environment, current folder, input and outputs of this process.
    """
    if ADDRESS not in os.environ:
        return None
    call = {"call": [module, function, *args], "argv": sys.argv, "env": dict(os.environ), "cwd": os.getcwd()}
    request = json.dumps(call).encode()
    line = socket.socket(socket.AF_UNIX)
    try:
        line.connect(os.environ[ADDRESS])
        socket.send_fds(line, [len(request).to_bytes(_SIZE_BYTES)], [0, 1, 2])
        line.sendall(request)
        answers = line.makefile()
        pid = answers.readline()
    except OSError:
        pid = ""
    if not pid:
        line.close()
        return None
    return Begun(int(pid), line, answers)


def hand_over_stage(verb: str) -> int | None:
    """Have the warm process run a stage as if it were this one; None when there is no such process."""
    begun = hand_over("tasks.stage", "main", verb)
    if begun is None:
        return None
    # A terminal interrupts all that it has started, so the stage hears of it without us.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, _: begun.tell(number))
    return begun.wait()


def is_warm(command: Sequence[str]) -> bool:
    """Say whether this is the command line of such a process, or of one that it has forked.

    >>> is_warm(["/usr/bin/python3", "-P", "-m", "tasks.warm", "3"])
    True
    """
    return _MODULE in command


def _serve(listener: socket.socket) -> None:
    """Fork for whoever asks, one at a time, until the process that started us has ended, in whatever way."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _import(_FIRST)
    while listener in select.select([listener, sys.stdin], [], [])[0]:
        line, _ = listener.accept()
        with line:
            try:
                _answer(line, listener)
            except (OSError, ValueError):
                # Whoever asked is gone.
                continue


def _import(names: Iterable[str]) -> None:
    for name in names:
        importlib.import_module(name)
    # What is never looked at is not copied for those that are forked.
    gc.freeze()


def _answer(line: socket.socket, listener: socket.socket) -> None:
    size, fds, *_ = socket.recv_fds(line, _SIZE_BYTES, 3)
    try:
        with line.makefile("rb") as reader:
            request = json.loads(reader.read(int.from_bytes(size)))
        if (pid := os.fork()) == 0:
            listener.close()
            line.close()
            _become(request, fds)
    finally:
        for number in fds:
            os.close(number)
    try:
        line.sendall(f"{pid}\n".encode())
        # While that one works: what only some stages import.
        _import((*(f"tasks.{verb}" for verb in sys.modules["tasks.stage"].STAGES), _REPORT))
    finally:
        code = _wait(pid, line)
    line.sendall(f"{code}\n".encode())


def _wait(pid: int, line: socket.socket) -> int:
    """Return the exit code of a process of ours. It is asked to end when nobody waits for it any more."""
    ended = os.pidfd_open(pid)
    try:
        if ended not in select.select([ended, line, sys.stdin], [], [])[0]:
            os.kill(pid, signal.SIGTERM)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    finally:
        os.close(ended)
    return code if code >= 0 else _SIGNALLED - code


def _become(request: dict[str, Any], fds: list[int]) -> NoReturn:
    code = 1
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for target, number in enumerate(fds):
            os.dup2(number, target)
            os.close(number)
        os.chdir(request["cwd"])
        os.environ.clear()
        os.environ.update(request["env"])
        sys.argv = request["argv"]
        # Of ours, the code that is there now is the one that counts.
        for name in [each for each in sys.modules if each.partition(".")[0] in _OURS]:
            del sys.modules[name]
        module, function, *args = request["call"]
        code = getattr(importlib.import_module(module), function)(*args)
    except KeyboardInterrupt:
        code = _INTERRUPTED
    except BaseException:
        traceback.print_exc()
    _end(code)


def _end(code: int) -> NoReturn:
    """End as a process does that was forked: without taking to pieces what it was forked with, which takes long."""
    try:
        threading._shutdown()
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


if __name__ == "__main__":
    _serve(socket.socket(fileno=int(sys.argv[1])))
