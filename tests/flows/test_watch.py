from __future__ import annotations

import os
import signal
import threading
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from uuid import uuid4

import pytest
from prefect.client.schemas.objects import FlowRun
from prefect.exceptions import TerminationSignal
from prefect.states import (
    Cancelled,
    Cancelling,
    Completed,
    Crashed,
    Failed,
    Pending,
    Running,
    Scheduled,
    State,
)

from flows import watch as module
from flows.deployment import Cover, Version, cover
from flows.watch import Here, There, Watcher, Watching, taken_lines, version_of
from nss.errors import BusyError, NssError, StageError
from tasks.inbox import Arrived, Refused, Taken
from tasks.lock import exclusive
from tasks.workspace import Workspace

NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)
DATA = Version("one.dir", NOON)


def run(state: State, minutes: float | None = None, saw: str = "") -> FlowRun:
    """A run that started so many minutes after noon, or never; and says what it saw."""
    start = None if minutes is None else NOON + timedelta(minutes=minutes)
    tags = [f"nss.data_md5={saw}", "own"] if saw else ["own"]
    return FlowRun(id=uuid4(), flow_id=uuid4(), state=state, state_type=state.type, start_time=start, tags=tags)


@pytest.mark.parametrize("state", [Completed(), Failed(), Cancelled(message="by a person")])
def test_a_run_covers_the_version_that_was_there_when_it_started(state: State) -> None:
    assert cover(DATA, [run(state, 0)]) is Cover.DONE
    assert cover(DATA, [run(state, 1)]) is Cover.DONE
    assert cover(DATA, [run(state, -0.01)]) is not Cover.DONE


@pytest.mark.parametrize(
    "state",
    [
        Crashed(),
        Cancelled(message="Runner is shutting down."),
        Cancelled(message="Deployment concurrency limit reached."),
    ],
)
def test_what_crashed_was_shut_down_or_never_started_covers_nothing(state: State) -> None:
    started = None if "concurrency" in (state.message or "") else 1
    assert cover(DATA, [run(state, started)]) is Cover.WANTED


def test_a_run_that_says_what_it_saw_is_believed_rather_than_the_clock_of_the_server() -> None:
    assert cover(DATA, [run(Completed(), 5, saw="one.dir")]) is Cover.DONE
    assert cover(DATA, [run(Completed(), 5, saw="zero.dir")]) is Cover.WANTED
    # The same version, before it was left and came back.
    assert cover(DATA, [run(Completed(), -5, saw="one.dir")]) is Cover.WANTED


@pytest.mark.parametrize(
    ("state", "minutes"), [(Running(), -5), (Running(), 5), (Cancelling(), 5), (Pending(), None), (Scheduled(), None)]
)
def test_a_run_that_goes_or_is_about_to_is_waited_for(state: State, minutes: float | None) -> None:
    assert cover(DATA, [run(state, minutes)]) is Cover.WAIT


def test_no_run_or_an_old_one_asks_for_a_run() -> None:
    assert cover(DATA, []) is Cover.WANTED
    assert cover(DATA, [run(Completed(), -5), run(Failed(), -1)]) is Cover.WANTED


@dataclass
class Fake:
    """A deployment that keeps its runs in a list."""

    known: list[FlowRun] = field(default_factory=list)
    made: list[str] = field(default_factory=list)
    events: list[tuple[str, str]] = field(default_factory=list)
    is_broken: bool = False
    dead: list[FlowRun] = field(default_factory=list)

    def runs(self) -> list[FlowRun]:
        return self.known

    def reap(self) -> list[str]:
        found, self.dead = self.dead, []
        self.known = [run(Crashed(), 0) if each in found else each for each in self.known]
        return [f"{each.name}: Crashed" for each in found]

    def make_run(self, version: Version) -> FlowRun | None:
        if self.is_broken:
            return None
        self.made.append(version.md5)
        self.known.append(run(Scheduled()))
        return self.known[-1]

    def emit(self, version: Version, what: str) -> None:
        self.events.append((version.md5, what))


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    commit(tmp_path, "one.dir")
    for name in (".dvc", "inbox"):
        (tmp_path / name).mkdir()
    return Workspace(tmp_path)


def commit(root: Path, md5: str) -> None:
    (root / "data.dvc").write_text(f"outs:\n- md5: {md5}\n  path: data\n")


@pytest.fixture
def stale(monkeypatch) -> list[bool]:
    """Whether a stage is out of date, for all that ask; the last one counts."""
    answers = [True]
    monkeypatch.setattr(module, "is_up_to_date", lambda _: not answers[-1])
    return answers


def started(fake: Fake, state: State, at: datetime) -> None:
    old = fake.known.pop()
    fake.known.append(old.model_copy(update={"state": state, "state_type": state.type, "start_time": at}))


def test_a_version_gets_one_run_however_often_one_looks(workspace: Workspace, stale: list[bool]) -> None:
    fake, said = Fake(), []
    there = There(workspace, fake, said.append, grace=0)
    assert not there.fire("one.dir", is_own=True)
    assert not there.fire("one.dir", is_own=True)
    started(fake, Running(), datetime.now(UTC))
    assert not there.fire("one.dir", is_own=True)
    started(fake, Completed(), datetime.now(UTC))
    assert there.fire("one.dir", is_own=True)
    assert fake.made == ["one.dir"]
    assert fake.events == [("one.dir", "made")]
    assert len(said) == 1


def test_a_run_that_crashes_while_it_is_watched_is_made_again(workspace: Workspace, stale: list[bool]) -> None:
    fake = Fake()
    there = There(workspace, fake, print, grace=0)
    there.fire("one.dir", is_own=True)
    started(fake, Running(), datetime.now(UTC))
    assert not there.fire("one.dir", is_own=True)
    started(fake, Crashed(), datetime.now(UTC))
    assert not there.fire("one.dir", is_own=True)
    assert fake.made == ["one.dir", "one.dir"]


def test_a_run_whose_process_died_with_its_worker_gives_up_its_place(workspace: Workspace, stale: list[bool]) -> None:
    left = run(Running(), 1)
    fake, said = Fake([left], dead=[left]), []
    there = There(workspace, fake, said.append, grace=0)
    assert there.is_free()
    assert said == [f"{left.name}: Crashed"]
    fake.known, fake.dead = [left], [left]
    assert not there.fire("one.dir", is_own=True)
    assert fake.made == ["one.dir"]


def test_while_somebody_works_in_the_workspace_no_run_is_taken_for_dead(workspace: Workspace) -> None:
    going = run(Running(), 1)
    fake = Fake([going], dead=[going])
    with exclusive(workspace):
        assert not There(workspace, fake, print).is_free()
    assert fake.known == [going]


def test_a_run_that_has_done_its_work_is_not_made_again_whatever_the_clocks_say(
    workspace: Workspace, stale: list[bool], monkeypatch
) -> None:
    fake, said = Fake(), []
    monkeypatch.setattr(fake, "make_run", lambda _: run(Failed(), -60))
    assert There(workspace, fake, said.append, grace=0).fire("one.dir", is_own=True)
    assert (said, fake.events) == ([], [])


def test_a_run_that_was_cancelled_before_it_started_is_made_again(workspace: Workspace, stale: list[bool]) -> None:
    fake = Fake()
    there = There(workspace, fake, print, grace=0)
    there.fire("one.dir", is_own=True)
    fake.known[-1] = run(Cancelled(message="Deployment concurrency limit reached."))
    assert not there.fire("one.dir", is_own=True)
    assert fake.made == ["one.dir", "one.dir"]


def test_data_changes_only_while_no_run_goes(workspace: Workspace) -> None:
    fake = Fake([run(Scheduled()), run(Completed(), 1)])
    there = There(workspace, fake, print)
    assert there.is_free()
    for state in (Pending(), Running(), Cancelling()):
        fake.known = [run(state, -1)]
        assert not there.is_free()


def test_somebody_elses_version_waits_for_the_run_of_its_event(workspace: Workspace, stale: list[bool]) -> None:
    fake, pointer = Fake(), workspace.root / "data.dvc"
    there = There(workspace, fake, print, grace=20)
    for age, made in ((0, []), (15, []), (21, ["one.dir"])):
        then = datetime.now(UTC).timestamp() - age
        os.utime(pointer, (then, then))
        assert not there.fire("one.dir", is_own=False)
        assert fake.made == made


def test_nothing_is_made_where_all_stages_are_up_to_date(workspace: Workspace, stale: list[bool]) -> None:
    stale.append(False)
    fake = Fake()
    assert There(workspace, fake, print, grace=0).fire("one.dir", is_own=True)
    assert fake.made == []


def test_after_too_many_crashes_a_person_has_to_look(workspace: Workspace, stale: list[bool]) -> None:
    said: list[str] = []
    assert There(workspace, Fake(is_broken=True), said.append, grace=0).fire("one.dir", is_own=True)
    assert said == ["data one.dir: 3 runs crashed; not tried again before the data changes"]


def test_a_version_is_as_old_as_its_pointer(workspace: Workspace) -> None:
    os.utime(workspace.root / "data.dvc", (NOON.timestamp(), NOON.timestamp()))
    assert version_of(workspace, "one.dir") == DATA


@dataclass
class Recorder:
    """A trigger that writes down what it is asked; `errors` are raised first."""

    answer: bool = True
    is_busy: bool = False
    asked: list[tuple[str, bool]] = field(default_factory=list)
    errors: list[Exception] = field(default_factory=list)

    def is_free(self) -> bool:
        return not self.is_busy

    def fire(self, md5: str, *, is_own: bool) -> bool:
        self.asked.append((md5, is_own))
        if self.errors:
            raise self.errors.pop(0)
        return self.answer


def watcher(workspace: Workspace, trigger: Recorder, said: list[str] | None = None) -> Watcher:
    watching = Watching(workspace.root / "inbox", poll=0.01, settle=0)
    return Watcher(workspace, watching, trigger, (said if said is not None else []).append)


def take(workspace: Workspace, entries: tuple[Path, ...], **_: object) -> Taken:
    """Take them as the version two.dir."""
    commit(workspace.root, "two.dir")
    return Taken(tuple(Arrived(entry.name, "b1", 4, False) for entry in entries), (), "two.dir")


def test_each_version_is_asked_for_until_it_is_settled(workspace: Workspace) -> None:
    trigger = Recorder(answer=False)
    found = watcher(workspace, trigger)
    found.step()
    trigger.answer = True
    for _ in range(3):
        found.step()
    commit(workspace.root, "two.dir")
    for _ in range(3):
        found.step()
    assert trigger.asked == [("one.dir", False), ("one.dir", False), ("two.dir", False)]


def test_without_versioned_data_nothing_is_asked_for(tmp_path: Path) -> None:
    trigger = Recorder()
    watcher(Workspace(tmp_path), trigger).step()
    assert trigger.asked == []


def test_what_settles_is_taken_as_ones_own_version_and_told(workspace: Workspace, monkeypatch) -> None:
    monkeypatch.setattr(module, "take", take)
    (workspace.root / "inbox" / "a.npz").write_bytes(b"x")
    trigger, said = Recorder(is_busy=True), []
    found = watcher(workspace, trigger, said)
    assert found.step() is None
    assert found.step() is None
    trigger.is_busy = False
    found.step()
    assert trigger.asked == [("one.dir", False), ("two.dir", True)]
    assert said == [
        "settled in the inbox: a.npz; taken when the run that is going has ended",
        "arrived a.npz: 4 images, batch b1; a cycle follows",
    ]


def test_a_watcher_that_is_told_to_stop_takes_nothing_more(workspace: Workspace, monkeypatch) -> None:
    stop, trigger = threading.Event(), Recorder()
    monkeypatch.setattr(trigger, "is_free", lambda: stop.set() or True)
    monkeypatch.setattr(module, "take", lambda *_, **__: pytest.fail("taken"))
    (workspace.root / "inbox" / "a.npz").write_bytes(b"x")
    found = watcher(workspace, trigger)
    found.inbox.settled()
    assert found.step(stop) is None
    assert (stop.is_set(), trigger.asked) == (True, [])


def test_a_watcher_that_is_told_to_stop_while_it_takes_makes_no_run_of_it(workspace: Workspace, monkeypatch) -> None:
    stop, trigger = threading.Event(), Recorder()
    monkeypatch.setattr(module, "take", lambda *found, **_: stop.set() or take(*found))
    (workspace.root / "inbox" / "a.npz").write_bytes(b"x")
    found = watcher(workspace, trigger)
    found.inbox.settled()
    assert found.step(stop).data_md5 == "two.dir"
    assert trigger.asked == []
    # The next start finds it.
    watcher(workspace, trigger).step()
    assert trigger.asked == [("two.dir", False)]


def test_here_sigterm_ends_the_cycle_and_is_afterwards_heard_by_who_heard_it_before(
    workspace: Workspace, stale: list[bool], monkeypatch
) -> None:
    heard: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: heard.append(number))
    try:
        here = Here(workspace, 0, print)
        monkeypatch.setattr(here, "_run", lambda _: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(TerminationSignal):
            here.fire("one.dir", is_own=False)
        assert heard == []
        os.kill(os.getpid(), signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert heard == [signal.SIGTERM]


def test_errors_are_told_once_and_end_nothing(workspace: Workspace) -> None:
    stop, said = threading.Event(), []
    trigger = Recorder(errors=[NssError("away"), NssError("away"), ValueError("odd")])

    def tell(line: str) -> None:
        said.append(line)

    found = Watcher(workspace, Watching(workspace.root / "inbox", poll=0.01, settle=0), trigger, tell)
    thread = threading.Thread(target=found.run, args=(stop,))
    thread.start()
    while len(trigger.asked) < 4 and thread.is_alive():
        stop.wait(0.01)
    stop.set()
    thread.join(30)
    assert said[0] == "error: away\nstill looking every 0.01 seconds"
    assert said[1].startswith("error: Traceback")
    assert len(said) == 2


def test_here_a_cycle_runs_for_stale_stages_and_a_failing_one_once(workspace: Workspace, stale, monkeypatch) -> None:
    ran: list[str] = []
    said: list[str] = []
    here = Here(workspace, 0, said.append)

    def fail(md5: str) -> None:
        ran.append(md5)
        raise StageError("broken")

    monkeypatch.setattr(here, "_run", fail)
    with pytest.raises(StageError):
        here.fire("one.dir", is_own=False)
    assert here.fire("one.dir", is_own=False)
    monkeypatch.setattr(here, "_run", ran.append)
    assert here.fire("two.dir", is_own=False)
    stale.append(False)
    assert here.fire("three.dir", is_own=False)
    assert ran == ["one.dir", "two.dir"]
    assert said == ["data one.dir: the cycle failed; not run again before the data changes, `nss run` does it"]


def test_here_a_busy_workspace_is_asked_again(workspace: Workspace, stale, monkeypatch) -> None:
    errors: list[Exception] = [BusyError("somebody works")]
    here = Here(workspace, 0, print)
    monkeypatch.setattr(here, "_run", lambda _: errors and (_ for _ in ()).throw(errors.pop()))
    with pytest.raises(BusyError):
        here.fire("one.dir", is_own=False)
    assert here.fire("one.dir", is_own=False)
    assert errors == []


def test_lines_name_what_arrived_and_what_is_wrong() -> None:
    taken = Taken((Arrived("a", "b1", 4, True),), (Refused("c", ("one", "two"), "/x/.rejected/c"),), "m")
    assert taken_lines(taken) == [
        "arrived a: nothing new, the batch was there, batch b1",
        "refused c, now /x/.rejected/c; mended, move it back into the inbox",
        "  - one",
        "  - two",
    ]
