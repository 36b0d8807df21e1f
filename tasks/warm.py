"""Stages without the seconds in which they import PyTorch and MLflow: a process that has, and forks for each of them.

`nss run` starts one (tasks/warm_process.py) when the first stage has to be executed. `nss stage`, which DVC calls,
finds its address in the environment, has it work in its place and ends as that work does. Where there is none, in
`dvc repro` or on other systems than Linux since 5.3, a stage is executed in its own process.
"""

from __future__ import annotations

import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

ADDRESS = "NSS_WARM"
"""Environment variable naming the socket at which the process listens."""
SIZE_BYTES = 8
"""of what tells the length of a request"""
SIGNALLED = 128
"""What a shell adds to the number of the signal that ended a process."""
PATIENCE_S = 20
"""how long a process has to end after SIGTERM"""

_MODULE = "tasks.warm_process"


class Warm:
    """The process, for whom it works: begun when first needed, ended with this block or with who began it.

    >>> with Warm(Path.cwd(), {}) as warm:  # doctest: +SKIP
    ...     warm.begin()
    """

    def __init__(self, root: Path, env: Mapping[str, str]) -> None:
        """env: what is added to its environment, and so to that of all that it forks, as others see it."""
        self._root, self._env = root, env
        self._process: subprocess.Popen[bytes] | None = None
        self._folder, self._before = "", os.environ.get(ADDRESS)

    def __enter__(self) -> Warm:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is None:
            return
        import psutil

        from tasks.processes import stop

        os.environ.pop(ADDRESS, None)
        if self._before is not None:
            os.environ[ADDRESS] = self._before
        stop(psutil.Process(self._process.pid).children(recursive=True))
        self._process.kill()
        self._process.wait()
        if self._process.stdin is not None:
            self._process.stdin.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def begin(self) -> None:
        """Start it, unless it is there already. Whoever asks it for something before it is ready waits."""
        if self._process is not None or not _is_possible():
            return
        # Only its owner may enter a folder made like this, and so ask for anything.
        self._folder = tempfile.mkdtemp(prefix="nss-")
        address = os.path.join(self._folder, "warm")
        try:
            with socket.socket(socket.AF_UNIX) as listener:
                listener.bind(address)
                listener.listen()
                self._process = self._start(listener.fileno())
        except OSError:
            # The path of a socket has no more than 107 bytes; or there is no room for a process more.
            shutil.rmtree(self._folder)
        else:
            os.environ[ADDRESS] = address

    def _start(self, listener: int) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, "-P", "-m", _MODULE, str(listener), self._folder],
            cwd=self._root,
            env={**os.environ, **self._env},
            stdin=subprocess.PIPE,
            # What goes wrong in it goes wrong again, and is said, where the stage then has a process of its own.
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=[listener],
        )


def _is_possible() -> bool:
    """Say whether one process can wait for another and for a word of a third at once."""
    try:
        os.close(os.pidfd_open(os.getpid()))
        return True
    except (AttributeError, OSError):
        return False


def is_warm(command: Sequence[str]) -> bool:
    """Say whether this is the command line of such a process, or of one that it has forked.

    >>> is_warm(["/usr/bin/python3", "-P", "-m", "tasks.warm_process", "3", "/tmp/nss-x"])
    True
    """
    return _MODULE in command


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
            self._end()
        return int(code or SIGNALLED + signal.SIGTERM)

    def tell(self, number: int) -> None:
        """Send it a signal, while it lives."""
        try:
            os.kill(self.pid, number)
        except ProcessLookupError:
            return

    def _end(self) -> None:
        try:
            ended = os.pidfd_open(self.pid)
        except ProcessLookupError:
            return
        try:
            end(self.pid, ended)
        finally:
            os.close(ended)


def end(pid: int, ended: int) -> None:
    """Have a process end, politely, and after 20 seconds by force. ended: its pidfd."""
    os.kill(pid, signal.SIGTERM)
    if not select.select([ended], [], [], PATIENCE_S)[0]:
        os.kill(pid, signal.SIGKILL)
        select.select([ended], [], [])


def hand_over(module: str, function: str, *args: str) -> Begun | None:
    """Have the warm process call a function of ours, which returns an exit code; None when there is none that can.

    The function has the arguments, environment, current folder, input and outputs of this process.
    """
    if ADDRESS not in os.environ:
        return None
    request = json.dumps(
        {
            "call": [module, function, *args],
            "argv": sys.argv,
            "cwd": os.getcwd(),
            "env": dict(os.environ),
            "limits": limits(),
        }
    ).encode()
    line = socket.socket(socket.AF_UNIX)
    try:
        line.connect(os.environ[ADDRESS])
        socket.send_fds(line, [len(request).to_bytes(SIZE_BYTES)], [0, 1, 2])
        line.sendall(request)
        answers = line.makefile()
        pid = answers.readline()
    except OSError:
        pid = ""
    if not pid:
        line.close()
        return None
    return Begun(int(pid), line, answers)


def limits() -> list[object]:
    """Return on which processors this process may run, and how it gives way to others: taskset and nice set that."""
    return [sorted(os.sched_getaffinity(0)), os.getpriority(os.PRIO_PROCESS, 0)]


def hand_over_stage(verb: str) -> int | None:
    """Have the warm process run a stage as if it were this one; None when there is none that can."""
    begun = hand_over("tasks.stage", "main", verb)
    if begun is None:
        return None
    # A terminal interrupts all that it has started, so the stage hears of it without us.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, _: begun.tell(number))
    return begun.wait()
