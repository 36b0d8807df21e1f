"""Who keeps the MLflow run of a cycle: this process, or one beside it that imports MLflow while we import Prefect.

Both imports take seconds of one processor, and neither needs the other: a run that finds nothing to do is done after
the longer of the two.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any, Literal, Protocol

from nss.errors import CrashError

if TYPE_CHECKING:
    from tasks.cycle import Cycle
    from tasks.params import Params
    from tasks.workspace import Workspace

_STDERR = 2
STOPPING = (signal.SIGINT, signal.SIGTERM)

Reply = Callable[[], Any]
"""Waits for the answer to a call and returns it, or raises what the call raised."""


@dataclass(frozen=True)
class Opened:
    """Ids of the cycle's MLflow run and its experiment; empty texts when the tracking store did not answer."""

    run_id: str
    experiment_id: str


@dataclass(frozen=True)
class RegisteredVersion:
    """A version in MLflow's model registry."""

    name: str
    number: int


@dataclass(frozen=True)
class Closed:
    """What came of a cycle in which all stages are done.

    run_ids: {stage: id of its MLflow run}. verdict: the gate's. promoted: verb of the candidate that it promotes.
    outcome: what `tasks.register` made of that, an empty text when the tracking store did not answer. version: of that
    candidate; made_by: (id of its run, verb), or nothing. is_silent: whether the tracking store did not answer.
    """

    run_ids: dict[str, str]
    verdict: str
    promoted: str | None
    outcome: str
    version: RegisteredVersion | None
    made_by: tuple[str, ...]
    is_silent: bool


class Recorder(Protocol):
    """Does what a cycle has to do with MLflow, one call after another."""

    def start(self, workspace: Workspace, params: Params) -> None:
        """Begin a cycle."""

    def call(self, name: str, *args: object) -> Reply:
        """Have the method `name` of `tasks.cycle.Cycle` called; go on until its answer is needed."""

    def end(self, status: Literal["FINISHED", "FAILED", "KILLED"]) -> None:
        """End the cycle's run, whatever happened."""


class Here:
    """In this process: a call has been answered when it returns."""

    cycle: Cycle

    def start(self, workspace: Workspace, params: Params) -> None:
        """Begin a cycle."""
        from tasks.cycle import Cycle

        self.cycle = Cycle(workspace, params, _say)

    def call(self, name: str, *args: object) -> Reply:
        """Call a method of the cycle. Raises what it raises."""
        value = getattr(self.cycle, name)(*args)
        return lambda: value

    def end(self, status: str) -> None:
        """End the cycle's run."""
        self.call("end", status)


class Beside:
    """In a process of its own, tasks/recorder_process.py, which ends with this block or, in whatever way, with us.

    >>> with Beside() as recorder:  # doctest: +SKIP
    ...     run_cycle(workspace, recorder=recorder)
    """

    def __init__(self) -> None:
        self._begin()

    def _begin(self) -> None:
        ours, theirs = socket.socketpair()
        with theirs, _held_back():
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "tasks.recorder_process", str(theirs.fileno()), str(os.getpid())],
                stdin=subprocess.DEVNULL,
                # Ours may be what --json prints.
                stdout=_STDERR,
                pass_fds=[theirs.fileno()],
            )
        self._line = Connection(ours.detach())
        self._asked, self._answers = 0, list[Any]()
        self._failed: list[Exception] = []
        self._is_cut = False

    def __enter__(self) -> Beside:
        return self

    def __exit__(self, *_: object) -> None:
        self._line.close()
        self._process.kill()
        self._process.wait()

    def start(self, workspace: Workspace, params: Params) -> None:
        """Begin a cycle, with a process anew when the one before has ended: Prefect may try a flow again."""
        if self._line.closed:
            self._begin()
        self.call("start", workspace, params)

    def call(self, name: str, *args: object) -> Reply:
        """Have a method called. Its reply raises what this call or one before it raised, CrashError without process."""
        try:
            # What was answered meanwhile may hold a warning, which is not to wait for the end of a long cycle.
            while not self._is_cut and self._line.poll():
                self._receive()
            self._line.send((name, args))
        except OSError:
            raise _gone() from None
        except BaseException:
            self._is_cut = True
            raise
        self._asked += 1
        number = self._asked
        return lambda: self._answer(number)

    def _answer(self, number: int) -> Any:
        self._wait(number)
        if self._failed:
            error = self._failed[0]
            self._failed.clear()
            raise error
        return self._answers[number - 1]

    def _wait(self, number: int) -> None:
        while len(self._answers) < number:
            self._receive()

    def _receive(self) -> None:
        try:
            lines, value, error = self._line.recv()
        except (EOFError, OSError):
            raise _gone() from None
        except BaseException:
            # A signal, maybe in the middle of an answer: nothing can be read from here on.
            self._is_cut = True
            raise
        self._answers.append(value)
        self._failed += [error] if error else []
        for line in lines:
            _say(line)

    def end(self, status: str) -> None:
        """End the cycle's run and the process."""
        try:
            self.call("end", status)
            if not self._is_cut:
                self._wait(self._asked)
            self._line.close()
            self._process.wait()
        except CrashError:
            # Its runs are ended by the next cycle, as those of any process that died.
            return
        except BaseException:
            # It must not work on when we let go of the locks.
            self._process.kill()
            self._process.wait()
            raise


@contextmanager
def _held_back() -> Iterator[None]:
    """Have a process that begins here learn of no signal before it lets them through, as ours does when it is ready."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _gone() -> CrashError:
    return CrashError(
        "the process that keeps the cycle's MLflow run has ended",
        where="tasks.recorder_process",
        fix="nss run; what it says on standard error tells why, unless it was killed, as for lack of memory",
    )


def beside() -> Beside | None:
    """Return a recorder that works in a process of its own, begun now; None where such a process could outlive us.

    Only Linux ends a process with the one that started it.
    """
    return Beside() if sys.platform == "linux" else None


def _say(line: str) -> None:
    sys.stderr.write(f"{line}\n")
