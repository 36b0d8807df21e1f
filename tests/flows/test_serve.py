from __future__ import annotations

import json
import os
import subprocess
import sys
from datetime import datetime, timedelta
from pathlib import Path
from zoneinfo import ZoneInfo

import pytest
from prefect.client.schemas.objects import ConcurrencyLimitStrategy
from prefect.settings import PREFECT_API_URL, temporary_settings
from ruamel.yaml import YAML

from flows.cli import main
from flows.serve import Serving, deployment_options
from flows.watch import Watching
from nss.errors import NssError
from tasks.workspace import Workspace

ROOT = Path(__file__).resolve().parents[2]
HERE = Workspace(Path("/repository"))


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


def test_serving_without_a_server_is_a_mistake_that_is_explained(folder: Path) -> None:
    done = nss("serve", cwd=folder)
    assert done.returncode == 2
    assert "needs a Prefect server" in done.stderr
    assert "prefect server start" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("command", [["serve"], ["watch", "--once", "--settle", "0"]])
def test_a_server_that_does_not_answer_is_a_mistake_that_is_explained(folder: Path, command: list[str]) -> None:
    (folder / "data.dvc").write_text("outs:\n- md5: one.dir\n  path: data\n")
    done = nss(*command, cwd=folder, PREFECT_API_URL="http://127.0.0.1:9/api", PREFECT_CLIENT_MAX_RETRIES="0")
    assert done.returncode == 2, done.stderr
    assert "no answer from the Prefect server" in done.stderr
    assert "Traceback" not in done.stderr


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
