from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest

from flows import doctor, show
from flows import status as module
from flows.deployment import Deployment
from flows.maintain import CycleReport
from nss.files import write_json
from tasks.cycle import Cycle
from tasks.params import load_params
from tasks.tracking import open_tracker
from tasks.workspace import Workspace

ROOT = Path(__file__).resolve().parents[2]
CYCLE = {
    "run_id": "0b5e",
    "status": "FINISHED",
    "data_md5": "1234.dir",
    "outcomes": {"base": "cached", "gate": "cached"},
}


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workspace:
    monkeypatch.setattr(module, "_last_cycle", lambda _: CYCLE)
    monkeypatch.setattr(module, "has_server", lambda: False)
    (tmp_path / "data.dvc").write_text("outs:\n- md5: 1234.dir\n  path: data\n")
    (tmp_path / "inbox").mkdir()
    write_json(tmp_path / "champion.json", {"version": None})
    return Workspace(tmp_path)


def look(workspace: Workspace) -> dict[str, Any]:
    return module.status(workspace, workspace.root / "inbox", "digits")


def judge(workspace: Workspace, promoted: str | None) -> None:
    candidates = {"base": {"model": "aaaa"}, "restructure": {"model": "bbbb"}}
    decision = {"verdict": "PROMOTE" if promoted else "HOLD", "promoted": promoted, "candidates": candidates}
    write_json(workspace.out("gate") / "gate.json", decision)
    deps = "[{path: artifacts/base/model, md5: 5}, {path: data, md5: 1234.dir}]"
    (workspace.root / "dvc.lock").write_text(f"stages: {{evaluate: {{deps: {deps}}}}}\n")
    write_json(workspace.out("base") / "champion.json", None)


def pin(workspace: Workspace, model: str, judged: int = 3) -> None:
    write_json(workspace.pin, {"name": "digits", "version": 3, "model": model, "batches": ["cccc"]})
    write_json(workspace.out("base") / "champion.json", {"name": "digits", "version": judged})


def test_before_the_first_cycle_there_is_no_champion_and_no_verdict(workspace: Workspace) -> None:
    content = look(workspace)
    assert (content["champion"], content["verdict"], content["is_working"]) == (None, None, False)
    assert module.text(content).splitlines() == [
        "champion    none is pinned",
        "data        1234.dir",
        "last cycle  FINISHED, of this data (2 cached), MLflow run 0b5e",
        "verdict     none yet",
        "inbox       0 waiting",
        "at work     nobody",
        "Prefect     no server is named",
    ]


@pytest.mark.parametrize(
    ("promoted", "champion", "waits", "line"),
    [
        (None, None, False, "verdict     HOLD"),
        (
            "restructure",
            None,
            True,
            "verdict     PROMOTE of restructure; it waits, `nss promote` makes it the champion",
        ),
        (
            "restructure",
            "aaaa",
            True,
            "verdict     PROMOTE of restructure; it waits, `nss promote` makes it the champion",
        ),
        ("restructure", "bbbb", False, "verdict     PROMOTE of restructure"),
    ],
)
def test_a_candidate_that_is_promoted_waits_until_it_is_the_champion(
    workspace: Workspace, promoted: str | None, champion: str | None, waits: bool, line: str
) -> None:
    judge(workspace, promoted)
    if champion:
        pin(workspace, champion)
    content = look(workspace)
    assert content["verdict"]["waits"] is waits
    assert line in module.text(content).splitlines()


@pytest.mark.parametrize("what", ["other data", "another champion", "no dvc.lock", "no base"])
def test_what_promote_would_refuse_does_not_wait(workspace: Workspace, what: str) -> None:
    judge(workspace, "restructure")
    pin(workspace, "aaaa", judged=2 if what == "another champion" else 3)
    if what == "other data":
        (workspace.root / "data.dvc").write_text("outs:\n- md5: 5678.dir\n  path: data\n")
    if what == "no dvc.lock":
        (workspace.root / "dvc.lock").unlink()
    if what == "no base":
        (workspace.out("base") / "champion.json").unlink()
    content = look(workspace)
    assert (content["verdict"]["waits"], content["verdict"]["is_current"]) == (False, False)
    line = "verdict     PROMOTE of restructure, of other data or another champion: `nss run` judges anew"
    assert line in module.text(content).splitlines()


@pytest.mark.parametrize("uri", ["http://127.0.0.1:9", "postgresql://u:secret@127.0.0.1:9/db"])
def test_a_tracking_store_that_is_away_is_not_taken_for_one_without_cycles(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, uri: str
) -> None:
    monkeypatch.setattr(module, "has_server", lambda: False)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    write_json(tmp_path / "champion.json", {"version": None})
    content = look(Workspace(tmp_path))
    where = uri.replace("u:secret@", "").removesuffix("/db")
    words = f"the tracking store does not answer as it should (no answer from {where} within 5 seconds)"
    assert content["last_cycle"] == {"error": words}
    assert f"last cycle  {words}" in module.text(content).splitlines()


def test_whatever_is_wrong_with_the_tracking_store_the_rest_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: Workspace) -> None:
        raise ModuleNotFoundError("No module named 'psycopg2'")

    monkeypatch.setattr(module, "has_server", lambda: False)
    monkeypatch.setattr(module, "open_tracker", fail)
    write_json(tmp_path / "champion.json", {"version": None})
    content = look(Workspace(tmp_path))
    words = "the tracking store does not answer as it should (No module named 'psycopg2')"
    assert (content["last_cycle"], content["champion"]) == ({"error": words}, None)


def test_of_two_workspaces_on_one_store_each_shows_its_own_last_cycle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "has_server", lambda: False)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'tracking.db'}")
    one, two = Workspace(tmp_path / "one"), Workspace(tmp_path / "two")
    for each in (one, two):
        write_json(each.pin, {"version": None})
    tracker = open_tracker(one)
    # As it was logged before runs named their workspace.
    tracker.client.create_run(tracker.experiment_id, tags={"nss.kind": "cycle"})
    assert [look(each)["last_cycle"] for each in (one, two)] == [None, None]
    params = load_params(ROOT / "params.yaml")
    first = Cycle(one, params, print)
    first.open("")
    first.end("FINISHED")
    second = Cycle(two, params, print)
    second.open("")
    assert second.run_id != first.run_id != ""
    found = [look(each)["last_cycle"] for each in (one, two)]
    assert [(each["run_id"], each["status"]) for each in found] == [
        (first.run_id, "FINISHED"),
        (second.run_id, "RUNNING"),
    ]


@pytest.mark.parametrize(
    ("uri", "hint"),
    [
        ("postgresql://u:secret@host/db", "mlflow ui --backend-store-uri 'postgresql://u:***@host/db'"),
        ("http://u:secret@host:5000/", "http://u:***@host:5000/#/experiments/1/runs/0b5e"),
        ("sqlite:////w/tracking.db", "mlflow ui --backend-store-uri sqlite:////w/tracking.db"),
        ("sqlite:////my models/t.db", "mlflow ui --backend-store-uri 'sqlite:////my models/t.db'"),
    ],
)
def test_where_to_look_at_a_cycle_is_said_without_a_password(uri: str, hint: str) -> None:
    assert show._mlflow_hint(CycleReport((), "0b5e", uri, "1", "")) == hint


def test_what_is_in_the_inbox_is_named(workspace: Workspace) -> None:
    for name in ("b.npz", "a.npz", ".hidden"):
        (workspace.root / "inbox" / name).write_bytes(b"")
    assert "inbox       2 waiting: a.npz, b.npz" in module.text(look(workspace)).splitlines()


def test_a_name_in_the_inbox_that_is_no_text_can_be_printed(workspace: Workspace) -> None:
    (workspace.root / "inbox" / os.fsdecode(b"caf\xe9.npz")).write_bytes(b"")
    assert "inbox       1 waiting: caf\\udce9.npz" in module.text(look(workspace)).splitlines()


def test_doctor_tells_the_versions_of_the_packages() -> None:
    found = doctor._packages()
    assert re.search(r"\btorch 2\.\d+\.\d+", found)
    assert re.search(r"\bscikit-learn 1\.\d+", found)
    assert len(found.split(", ")) == 9


def test_the_server_is_asked_for_the_deployment_of_this_workspace(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, Path]] = []

    def find(deployment: Deployment) -> None:
        asked.append((deployment.name, deployment.root))

    monkeypatch.setattr(module, "has_server", lambda: True)
    monkeypatch.setattr(Deployment, "find", find)
    content = look(workspace)
    assert content["server"] == {"deployment": None, "schedules": [], "running": None}
    assert asked == [("digits", workspace.root)]
    assert module.text(content).splitlines()[-1] == "Prefect     the deployment is not known there"
