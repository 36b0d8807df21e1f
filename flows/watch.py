"""Watching for data: what settles in the inbox is taken, and each new version of data/ gets one run.

Only what lies on the disk and on the Prefect server counts, so nothing is lost while nobody watches.
"""

from __future__ import annotations

import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Protocol

from prefect.client.schemas.objects import TERMINAL_STATES, FlowRun
from prefect.exceptions import TerminationSignal

from flows.deployment import MADE, TRIES, Cover, Deployment, Version, cover, is_going
from nss.errors import BusyError, DataError, NssError
from tasks.inbox import Inbox, Taken, printable, take
from tasks.lock import exclusive, is_held
from tasks.pipeline import Pipeline
from tasks.provenance import data_md5
from tasks.workspace import Workspace

Tell = Callable[[str], None]
# What data_md5 says when there is no data.dvc.
UNKNOWN = "unknown"
_NEVER = threading.Event()


def undisturbed(tell: Tell) -> Tell:
    """Make a way to tell that never fails: a log on a full disk, or one that is closed, must not end what it is about.

    >>> undisturbed(print)("a line")
    a line
    """

    def tell_if_possible(line: str) -> None:
        # A closed stream raises ValueError, and a letter that it does not take is one.
        with suppress(OSError, ValueError):
            tell(printable(line))

    return tell_if_possible


@dataclass(frozen=True)
class Watching:
    """What to watch, how often, and how to take what arrives. Seconds."""

    inbox: Path
    poll: float = 5
    settle: float = 5
    new_classes: bool = False
    resize: tuple[int, int] | None = None


class Trigger(Protocol):
    """What starts a cycle."""

    def is_free(self) -> bool:
        """Say whether data/ may change now: no cycle runs."""

    def fire(self, md5: str, *, is_own: bool) -> bool:
        """See to it that a cycle sees this data version. is_own: whether the watcher made it.

        Returns whether that is settled; else the watcher asks again.
        """


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """Let SIGTERM end by TerminationSignal what runs inside, as Prefect does once its flow has begun."""

    def end(number: int, _: object) -> None:
        raise TerminationSignal(signal=number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class Here:
    """Cycles in this process, for whoever has no Prefect server."""

    def __init__(self, workspace: Workspace, retries: int, tell: Tell) -> None:
        self.workspace, self.retries, self.tell = workspace, retries, undisturbed(tell)
        self._tried = ""

    def is_free(self) -> bool:
        """Say yes: this process runs one thing after another, and the workspace's lock keeps others out."""
        return True

    @_ended_by_sigterm()
    def fire(self, md5: str, *, is_own: bool) -> bool:
        """Run a cycle if a stage is out of date. One that fails is not run again for the same version."""
        if md5 == self._tried or is_up_to_date(self.workspace):
            return True
        self._tried = md5
        try:
            self._run(md5)
        except BusyError:
            self._tried = ""
            raise
        except Exception:
            self.tell(f"data {md5}: the cycle failed; not run again before the data changes, `nss run` does it")
            raise
        return True

    def _run(self, md5: str) -> None:
        from flows.launch import Server

        server = Server.prepare()
        from flows import show
        from flows.maintain import run_cycle

        server.wait()
        self.tell(f"data {md5}: a cycle starts")
        report = run_cycle(self.workspace, retries=self.retries, tell=lambda stage: self.tell(show.stage_line(stage)))
        run = report.run_id or "not logged"
        self.tell(f"data {md5}: the cycle has ended, MLflow run {run}; the next one comes with new data")


class There:
    """Runs of the deployment on a Prefect server.

    grace: seconds that a version which somebody else committed waits for the run of their event.
    """

    def __init__(self, workspace: Workspace, deployment: Deployment, tell: Tell, grace: float = 20) -> None:
        self.workspace, self.deployment, self.tell = workspace, deployment, undisturbed(tell)
        self.grace = timedelta(seconds=grace)

    def is_free(self) -> bool:
        """Say whether no run of the deployment is going."""
        return not any(is_going(run) for run in self._runs())

    def fire(self, md5: str, *, is_own: bool) -> bool:
        """Make a run unless one covers the version or all stages are up to date."""
        version = version_of(self.workspace, md5)
        found = cover(version, self._runs())
        is_early = not is_own and datetime.now(UTC) - version.committed < self.grace
        if found is not Cover.WANTED or is_early:
            return found is Cover.DONE
        return is_up_to_date(self.workspace) or self._make_run(version)

    def _runs(self) -> list[FlowRun]:
        """Return the deployment's runs; first, those of processes that have died give up their place."""
        runs = self.deployment.runs()
        # A cycle that lives holds the workspace: nobody asks after the process of one, which may be in a container.
        if any(is_going(run) for run in runs) and not is_held(self.workspace) and (dead := self.deployment.reap()):
            for line in dead:
                self.tell(line)
            runs = self.deployment.runs()
        return runs

    def _make_run(self, version: Version) -> bool:
        run = self.deployment.make_run(version)
        if run is None:
            self.tell(f"data {version.md5}: {TRIES} runs crashed; not tried again before the data changes")
            return True
        if run.state_type in TERMINAL_STATES:
            # Made before, and it has done its work: the clocks of the server and of this machine differ.
            return True
        self.tell(f"data {version.md5}: flow run {run.id} is made; it starts when the service or a worker takes it")
        self.deployment.emit(version, MADE)
        # Asked again: a run that another one cancelled, or that crashed, is made again.
        return False


def version_of(workspace: Workspace, md5: str) -> Version:
    """Return the version of data/ and when data.dvc came to name it."""
    changed = (workspace.root / "data.dvc").stat().st_mtime
    return Version(md5, datetime.fromtimestamp(changed, UTC))


def is_up_to_date(workspace: Workspace) -> bool:
    """Say whether no stage has anything to do. Raises BusyError while a cycle runs."""
    with exclusive(workspace):
        return not Pipeline(workspace).stale()


class Watcher:
    """One look after another.

    >>> Watcher(workspace, Watching(Path("inbox")), Here(workspace, 0, print), print).step()  # doctest: +SKIP
    """

    def __init__(self, workspace: Workspace, watching: Watching, trigger: Trigger, tell: Tell) -> None:
        self.workspace, self.watching, self.trigger, self.tell = workspace, watching, trigger, undisturbed(tell)
        self.inbox = Inbox(watching.inbox, watching.settle)
        self._settled, self._own = UNKNOWN, ""
        self._said, self._waiting = "", ""

    def step(self, stop: threading.Event = _NEVER) -> Taken | None:
        """Take what has settled, and see to it that a new version of data/ gets its run. Returns what was taken.

        Once told to stop it begins neither. Raises DataError, with all that done, when an entry cannot leave the inbox.
        """
        taken = self._take(stop)
        md5 = data_md5(self.workspace)
        is_open = not stop.is_set() and md5 not in (self._settled, UNKNOWN)
        if is_open and self.trigger.fire(md5, is_own=md5 == self._own):
            self._settled = md5
        self._require_moved(taken)
        return taken

    def once(self) -> Taken | None:
        """Look, wait until what is there has settled, and look again."""
        self.inbox.settled()
        time.sleep(self.watching.settle)
        return self.step()

    def run(self, stop: threading.Event) -> None:
        """Look every `poll` seconds until told to stop. What goes wrong is told and does not end it."""
        while not stop.is_set():
            try:
                self.step(stop)
                self._said = ""
            except NssError as error:
                self._complain(str(error))
            except Exception as error:
                self._complain("".join(traceback.format_exception(error)).strip())
            stop.wait(self.watching.poll)

    def _take(self, stop: threading.Event) -> Taken | None:
        entries = self.inbox.settled()
        if not entries:
            return None
        if not self.trigger.is_free():
            self._say_waiting(entries)
            return None
        if stop.is_set():
            return None
        before = data_md5(self.workspace)
        taken = take(self.workspace, entries, new_classes=self.watching.new_classes, resize=self.watching.resize)
        if taken.data_md5 != before:
            self._own = taken.data_md5
        for line in taken_lines(taken):
            self.tell(line)
        return taken

    def _require_moved(self, taken: Taken | None) -> None:
        if taken and taken.stuck:
            raise DataError(
                "what was taken cannot be moved out of the inbox",
                taken.stuck,
                where=str(self.inbox.folder),
                fix="let nss move entries within it; until then they are found again, and not added twice",
            )

    def _say_waiting(self, entries: Sequence[Path]) -> None:
        names = ", ".join(entry.name for entry in entries)
        if names != self._waiting:
            self.tell(f"settled in the inbox: {names}; taken when the run that is going has ended")
        self._waiting = names

    def _complain(self, text: str) -> None:
        """Say what is wrong, once as long as it stays the same."""
        if text != self._said:
            self.tell(f"error: {text}\nstill looking every {self.watching.poll:g} seconds")
        self._said = text


def taken_lines(taken: Taken) -> list[str]:
    """Return a line for each entry of the inbox that was taken, and those of its problems."""
    lines = []
    for each in taken.arrived:
        what = "nothing new, the batch was there" if each.already_present else f"{each.images} images"
        follows = "" if each.already_present else "; a cycle follows"
        lines.append(f"arrived {each.name}: {what}, batch {each.digest}{follows}")
    for refused in taken.refused:
        lines += [
            f"refused {refused.name}, now {refused.place}; mended, move it back into the inbox",
            *(f"  - {problem}" for problem in refused.problems),
        ]
    return lines
