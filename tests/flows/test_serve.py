from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from uuid import uuid4
from zoneinfo import ZoneInfo

import pytest
from httpx import ConnectError, ReadTimeout
from prefect.client.schemas.objects import ConcurrencyLimitStrategy, FlowRun, StateType
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.states import Cancelled, Crashed, Failed, Scheduled, State
from ruamel.yaml import YAML

from flows import serve as module
from flows.cli import main
from flows.deployment import Deployment, Version
from flows.serve import Serving, deployment_options
from flows.watch import Watching
from nss.errors import NssError
from tasks.workspace import Workspace

ROOT = Path(__file__).resolve().parents[2]
HERE = Workspace(Path("/repository"))
NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)


def serving(**changes: object) -> Serving:
    return Serving("digits", Watching(Path("/repository/inbox")), **changes)


def nss(*arguments: str, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    code = "import sys; from flows.cli import main; sys.exit(main())"
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "MLFLOW_", "DVC_"))}
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=cwd,
        env=plain | {"PYTHONPATH": str(ROOT), "PREFECT_HOME": str(cwd / "prefect")} | env,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A workspace without data."""
    (tmp_path / ".dvc").mkdir()
    (tmp_path / "dvc.yaml").write_text("stages: {}\n")
    (tmp_path / "champion.json").write_text('{"version": null}')
    return tmp_path


def test_one_run_goes_at_a_time_and_a_newcomer_is_cancelled() -> None:
    options = deployment_options(HERE, serving(retries=2))
    limit = options["concurrency_limit"]
    assert (limit.limit, limit.collision_strategy) == (1, ConcurrencyLimitStrategy.CANCEL_NEW)
    assert options["parameters"] == {"root": "/repository", "retries": 2}


def test_the_trigger_listens_to_this_workspace_and_to_wanted_runs_only() -> None:
    (trigger,) = deployment_options(HERE, serving())["triggers"]
    assert trigger.expect == {"nss.data.arrived"}
    assert trigger.match.model_dump() == {"prefect.resource.id": "nss.data.digits", "nss.run": "wanted"}
    # One run for several events, after the last of them: facts of Prefect's triggers.
    assert (trigger.threshold, trigger.for_each) == (1, {"prefect.resource.id"})
    assert trigger.schedule_after == trigger.within > timedelta(0)


def test_the_hour_of_the_cron_is_local_time_all_year() -> None:
    from prefect.server.schemas.schedules import CronSchedule

    (schedule,) = deployment_options(HERE, serving(cron="0 3 * * *", timezone="Europe/Berlin"))["schedules"]
    # Run by the server's own class, over the change of clocks of 29 March 2026.
    server = CronSchedule(**schedule.model_dump())
    zone = ZoneInfo("Europe/Berlin")
    from prefect._internal.concurrency.api import create_call, from_sync

    start = datetime(2026, 3, 27, 12, tzinfo=zone)
    dates = from_sync.wait_for_call_in_loop_thread(create_call(server.get_dates, 4, start))
    local = [date.astimezone(zone) for date in dates]
    assert [date.hour for date in local] == [3, 3, 3, 3]
    assert [date.day for date in local] == [28, 29, 30, 31]
    assert len({date.utcoffset() for date in local}) == 2


def test_without_a_cron_there_is_no_schedule() -> None:
    assert deployment_options(HERE, serving())["schedules"] == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"cron": "0 3 * *", "timezone": "Europe/Berlin"}, "is no cron line"),
        ({"cron": "99 3 * * *"}, "is no cron line"),
        ({"cron": "0 3 * * *", "timezone": "Europe/Berlyn"}, "is no time zone"),
    ],
)
def test_a_wrong_schedule_is_said_before_anything_starts(changes: dict[str, str], words: str) -> None:
    with pytest.raises(NssError, match=words):
        deployment_options(HERE, serving(**changes))


class Stand:
    """A runner that ends as it is told."""

    def __init__(self, end: Exception | None) -> None:
        self.end = end

    async def start(self) -> None:
        if self.end:
            raise self.end


def test_a_server_that_is_away_for_long_is_asked_until_it_answers(monkeypatch) -> None:
    monkeypatch.setattr(module, "_AGAIN_S", 0)
    ends = [ConnectError("refused"), ConnectError("refused"), Stand(ReadTimeout("slow")), Stand(None)]
    said: list[str] = []

    def renew() -> Stand:
        found = ends.pop(0)
        if isinstance(found, Exception):
            raise found
        return found

    with handler_restored():
        first = Stand(ExceptionGroup("unhandled errors", [ConnectError("refused")]))
        module._run(first, renew, threading.Event(), said.append)
    assert ends == []
    assert said == [
        "error: the Prefect server does not answer (refused); asked again every 0 seconds",
        "error: the Prefect server does not answer (slow); asked again every 0 seconds",
    ]


def test_a_service_that_waits_for_its_server_ends_on_sigterm(monkeypatch) -> None:
    monkeypatch.setattr(module, "_AGAIN_S", 600)
    stop = threading.Event()

    def tell(_: str) -> None:
        threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()

    with handler_restored():
        module._run(Stand(ConnectError("refused")), lambda: pytest.fail("another runner"), stop, tell)
    assert stop.is_set()


def test_a_service_whose_log_is_full_serves_all_the_same(folder: Path, monkeypatch) -> None:
    ran: list[str] = []

    def full(_: str) -> None:
        raise OSError(28, "No space left on device")

    def runner(name: str, _: object) -> Stand:
        ran.append(name)
        return Stand(None)

    monkeypatch.setattr(module, "_runner", runner)
    monkeypatch.setattr(Deployment, "find", lambda _: None)
    monkeypatch.setattr(Deployment, "sweep", lambda _: ["a run that was left over"])
    with temporary_settings({PREFECT_API_URL: "http://prefect.example:4200/api"}):
        module.serve(Workspace(folder), Serving("digits", Watching(folder / "inbox")), full)
    assert ran == ["digits"]


@contextmanager
def handler_restored() -> Iterator[None]:
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def test_the_service_says_what_starts_the_next_cycle() -> None:
    assert module._what_next(serving(cron="0 3 * * *", timezone="Europe/Berlin")) == (
        'a cycle runs by the clock ("0 3 * * *", Europe/Berlin), when data settles in the inbox, '
        "and after `nss data add`"
    )
    assert "clock" not in module._what_next(serving())


class Server:
    """A Prefect server's answers about one deployment; runs by the keys that they were made with."""

    def __init__(self) -> None:
        self.runs: dict[str, FlowRun] = {}

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None: ...

    def read_deployment_by_name(self, name: str) -> SimpleNamespace:
        return SimpleNamespace(id=name, parameters={})

    def create_flow_run_from_deployment(self, _: str, idempotency_key: str) -> FlowRun:
        made = FlowRun(id=uuid4(), flow_id=uuid4(), state=Scheduled(), state_type=StateType.SCHEDULED)
        return self.runs.setdefault(idempotency_key, made)

    def end(self, state: State) -> None:
        key, last = list(self.runs.items())[-1]
        started = None if state.message == "limit" else NOON
        update = {"state": state, "state_type": state.type, "start_time": started}
        self.runs[key] = last.model_copy(update=update)


def test_one_run_is_made_for_a_commit_of_a_version_and_again_only_when_it_was_cut_off(monkeypatch) -> None:
    server, deployment = Server(), Deployment("digits", HERE.root)
    monkeypatch.setattr("flows.deployment.get_client", lambda **_: server)
    # An hour after the server's clock says that the run began.
    version = Version("one.dir", NOON + timedelta(hours=1))
    first = deployment.make_run(version)
    assert deployment.make_run(version) == first
    server.end(Cancelled(message="limit"))
    assert deployment.make_run(version).id != first.id
    server.end(Failed(message="Flow run encountered an exception: BusyError: process 7 is at work in this workspace"))
    assert deployment.make_run(version).state_type is StateType.SCHEDULED
    server.end(Failed())
    assert deployment.make_run(version).state_type is StateType.FAILED
    assert len(server.runs) == 3
    # It was left, and has come back.
    assert deployment.make_run(Version("one.dir", NOON + timedelta(hours=2))).state_type is StateType.SCHEDULED


def test_a_run_that_always_crashes_is_made_three_times(monkeypatch) -> None:
    server, deployment = Server(), Deployment("digits", HERE.root)
    monkeypatch.setattr("flows.deployment.get_client", lambda **_: server)
    for _ in range(3):
        assert deployment.make_run(Version("one.dir", NOON)) is not None
        server.end(Crashed())
    assert deployment.make_run(Version("one.dir", NOON)) is None
    assert len(server.runs) == 3


def test_serving_without_a_server_is_a_mistake_that_is_explained(folder: Path) -> None:
    done = nss("serve", cwd=folder)
    assert done.returncode == 2
    assert "needs a Prefect server" in done.stderr
    assert "prefect server start" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("command", [["serve"], ["watch", "--once", "--settle", "0"], ["run"], ["demo", "story"]])
def test_a_server_that_does_not_answer_is_a_mistake_that_is_explained(folder: Path, command: list[str]) -> None:
    (folder / "data.dvc").write_text("outs:\n- md5: one.dir\n  path: data\n")
    done = nss(*command, cwd=folder, PREFECT_API_URL="http://127.0.0.1:9/api", PREFECT_CLIENT_MAX_RETRIES="0")
    assert done.returncode == 2, done.stderr
    assert "no answer from the Prefect server" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (folder / "story").exists()


def here(*arguments: str, cwd: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    """Run a command in this process, without a Prefect server."""
    monkeypatch.chdir(cwd)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr(sys, "argv", ["nss", *arguments])
    with temporary_settings({PREFECT_API_URL: None}), pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0)


def test_a_wrong_size_is_a_mistake(folder: Path, monkeypatch, capsys) -> None:
    assert here("watch", "--resize", "32", cwd=folder, monkeypatch=monkeypatch) == 2
    assert "HEIGHTxWIDTH" in capsys.readouterr().err


def test_status_of_a_new_workspace_says_that_there_is_nothing_yet(folder: Path, monkeypatch, capsys) -> None:
    (folder / "inbox").mkdir()
    (folder / "inbox" / "monday.npz").write_bytes(b"")
    assert here("status", "--json", cwd=folder, monkeypatch=monkeypatch) == 0
    assert json.loads(capsys.readouterr().out) == {
        "champion": None,
        "data_md5": "unknown",
        "last_cycle": None,
        "verdict": None,
        "inbox": {"folder": str(folder / "inbox"), "pending": ["monday.npz"]},
        "is_working": False,
        "server": None,
    }
    assert here("status", cwd=folder, monkeypatch=monkeypatch) == 0
    text = capsys.readouterr().out
    assert "champion    none is pinned" in text
    assert "inbox       1 waiting: monday.npz" in text


def test_prefect_yaml_deploys_what_serve_serves() -> None:
    (deployment,) = YAML(typ="safe").load(ROOT / "prefect.yaml")["deployments"]
    served = deployment_options(HERE, serving())
    assert deployment["entrypoint"] == "flows.maintain.maintain"
    assert deployment["concurrency_limit"] == {"limit": 1, "collision_strategy": "CANCEL_NEW"}
    assert set(deployment["parameters"]) == set(served["parameters"])
    (trigger,), (own,) = deployment["triggers"], served["triggers"]
    assert set(trigger["expect"]) == own.expect
    assert trigger["match"] == {"prefect.resource.id": f"nss.data.{deployment['name']}", "nss.run": "wanted"}
    assert timedelta(seconds=trigger["within"]) == own.within
    assert timedelta(seconds=trigger["schedule_after"]) == own.schedule_after
    assert (set(trigger["for_each"]), trigger["threshold"]) == (own.for_each, own.threshold)
