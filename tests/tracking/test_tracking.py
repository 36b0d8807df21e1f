from __future__ import annotations

import os
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import mlflow
import pytest

import nss
from nss.errors import StageError
from nss.model import model_digest
from tasks.report import log_cycle
from tasks.store_address import shown_uri, tracking_uri
from tasks.tracking import Tracker, create_database, require_answer
from tasks.workspace import Workspace


def all_runs(tracker: Tracker) -> list:
    return list(tracker.client.search_runs([tracker.experiment_id]))


def test_four_processes_at_once_on_no_database_all_succeed(tmp_path: Path) -> None:
    script = """
        import sys
        import time
        from pathlib import Path
        from tasks.tracking import Tracker

        root = Path(sys.argv[1])
        (root / f"ready-{sys.argv[2]}").touch()
        while not (root / "go").exists():
            time.sleep(0.001)
        tracker = Tracker(f"sqlite:///{root / 'mlflow' / 'tracking.db'}", root / "artifacts")
        run = tracker.open("base", {"stage": "base", "stage_key": sys.argv[2]}, {})
        for step in range(20):
            tracker.log(run, metrics={f"m{step}": step})
        tracker.end(run.info.run_id, "FINISHED")
    """
    code = textwrap.dedent(script)
    processes = [
        subprocess.Popen([sys.executable, "-c", code, str(tmp_path), str(each)], stderr=subprocess.PIPE, text=True)
        for each in range(4)
    ]
    while len(list(tmp_path.glob("ready-*"))) < 4:
        assert all(process.poll() is None for process in processes)
        time.sleep(0.05)
    (tmp_path / "go").touch()
    errors = [process.communicate()[1] for process in processes]
    assert [process.returncode for process in processes] == [0] * 4, errors
    tracker = Tracker(f"sqlite:///{tmp_path / 'mlflow' / 'tracking.db'}", tmp_path / "artifacts")
    runs = all_runs(tracker)
    assert [(run.info.status, len(run.data.metrics)) for run in runs] == [("FINISHED", 20)] * 4


def test_a_database_that_exists_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "tracking.db"
    path.write_bytes(b"somebody's")
    create_database(path, tmp_path / "artifacts")
    assert path.read_bytes() == b"somebody's"


def test_a_database_appears_only_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("killed")

    monkeypatch.setattr("tasks.tracking._experiment", fail)
    with pytest.raises(RuntimeError, match="killed"):
        create_database(tmp_path / "tracking.db", tmp_path / "artifacts")
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_opening_twice_by_one_identity_gives_one_run(tracker: Tracker) -> None:
    identity = {"stage": "base", "stage_key": "k"}
    first = tracker.open("base", identity, {"a": "1"})
    second = tracker.open("base", identity, {"a": "2"})
    assert first.info.run_id == second.info.run_id
    assert second.data.tags["a"] == "2"
    assert len(all_runs(tracker)) == 1


@pytest.mark.parametrize("status", ["FAILED", "KILLED"])
def test_a_run_that_did_not_finish_is_running_again_under_its_new_parent(tracker: Tracker, status: str) -> None:
    identity = {"stage": "base", "stage_key": "k"}
    run = tracker.open("base", identity, {}, "first")
    tracker.end(run.info.run_id, status)
    again = tracker.open("base", identity, {}, "second")
    assert (again.info.run_id, again.info.status) == (run.info.run_id, "RUNNING")
    assert again.data.tags["mlflow.parentRunId"] == "second"


def test_a_finished_run_is_not_touched_by_opening_it(tracker: Tracker) -> None:
    identity = {"stage": "base", "stage_key": "k"}
    run = tracker.open("base", identity, {"a": "1"}, "first")
    tracker.end(run.info.run_id, "FINISHED")
    again = tracker.open("base", identity, {"a": "2"}, "second")
    assert (again.info.status, again.data.tags["a"]) == ("FINISHED", "1")
    assert again.data.tags["mlflow.parentRunId"] == "first"


def test_different_keys_are_different_runs(tracker: Tracker) -> None:
    runs = {tracker.open("base", {"stage": "base", "stage_key": key}, {}).info.run_id for key in "ab"}
    assert len(runs) == 2


def test_logging_the_same_again_adds_nothing(tracker: Tracker) -> None:
    run = tracker.open("base", {"stage_key": "k"}, {})
    for _ in range(2):
        tracker.log(run, params={"a": None}, metrics={"m": 2}, history=[{"loss": 0.2}, {"loss": 0.1}], tags={"t": "x"})
    history = tracker.client.get_metric_history(run.info.run_id, "loss")
    assert [(point.step, point.value) for point in history] == [(1, 0.2), (2, 0.1)]
    assert len(tracker.client.get_metric_history(run.info.run_id, "m")) == 1
    data = tracker.client.get_run(run.info.run_id).data
    assert (data.params, data.tags["t"]) == ({"a": "None"}, "x")


def test_more_values_than_one_request_takes_are_all_logged(tracker: Tracker) -> None:
    run = tracker.open("base", {"stage_key": "k"}, {})
    tracker.log(run, metrics={f"m{number}": number for number in range(1203)}, params={"long": "x" * 9000})
    data = tracker.client.get_run(run.info.run_id).data
    assert len(data.metrics) == 1203
    assert data.metrics["m1202"] == 1202
    assert data.params["long"] == "x" * 6000


def test_a_model_is_logged_once_and_comes_back(
    tracker: Tracker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "model"
    model = nss.build_model("nss.zoo:lenet", classes=["a", "b"], input_shape=(1, 16, 16), seed=0)
    nss.save_model(model, folder)
    run = tracker.open("slice-0", {"slice": "slice-0"}, {})
    ids = {tracker.log_model(run.info.run_id, "slice-0", folder, {"categories": "a, b"}) for _ in range(2)}
    assert len(ids) == 1
    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracker.uri)
    back = Path(mlflow.artifacts.download_artifacts(f"models:/{ids.pop()}"))
    assert model_digest(nss.load_model(back)) == model_digest(model)


def test_the_data_set_is_an_input_of_the_run_under_dvcs_hash(tracker: Tracker, tmp_path: Path) -> None:
    md5 = "07e02f9d9bfcd845457aa504a1035665.dir"
    run = tracker.open("base", {"stage_key": "k"}, {})
    for _ in range(2):
        tracker.log_data(run.info.run_id, "data", tmp_path, md5, "training")
    (used,) = tracker.client.get_run(run.info.run_id).inputs.dataset_inputs
    assert (used.dataset.name, used.dataset.digest, used.tags[0].value) == ("data", md5, "training")


def test_the_store_lies_in_the_workspace_or_where_the_user_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace = Workspace(tmp_path / "copy")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.delenv("DVC_ROOT", raising=False)
    assert tracking_uri(workspace) == f"sqlite:///{tmp_path}/copy/mlflow/tracking.db"
    # `dvc exp run --temp` works in a copy and names the main repository.
    monkeypatch.setenv("DVC_ROOT", str(tmp_path / "main"))
    assert tracking_uri(workspace) == f"sqlite:///{tmp_path}/main/mlflow/tracking.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow:5000")
    assert tracking_uri(workspace) == "http://mlflow:5000"


def test_runs_that_have_not_ended_are_found(tracker: Tracker) -> None:
    runs = {name: tracker.open(name, {"stage_key": name}, {}) for name in ("one", "two", "ended")}
    tracker.end(runs["ended"].info.run_id, "KILLED")
    assert {run.info.run_name for run in tracker.running()} == {"one", "two"}


@pytest.fixture
def silent() -> Iterator[int]:
    """The port of a server that takes connections and never says a word."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def test_a_server_that_does_not_answer_is_given_up_soon(
    silent: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tasks.tracking._PATIENCE_S", 1)
    start = time.monotonic()
    with pytest.raises(ConnectionError, match=f"no answer from http://127.0.0.1:{silent} within 1 second"):
        Tracker(f"http://127.0.0.1:{silent}", tmp_path)
    assert time.monotonic() - start < 20


@pytest.mark.parametrize("scheme", ["http", "https", "postgresql", "postgresql+psycopg", "mysql+pymysql"])
def test_where_nobody_listens_it_is_said_at_once_and_without_the_password(tmp_path: Path, scheme: str) -> None:
    start = time.monotonic()
    with pytest.raises(ConnectionError) as caught:
        Tracker(f"{scheme}://me:secret@127.0.0.1:9/x", tmp_path)
    assert time.monotonic() - start < 5
    assert str(caught.value).startswith(f"no answer from {scheme}://127.0.0.1:9 within")


@pytest.mark.parametrize(
    "uri", ["sqlite:////tmp/x.db", "databricks", "databricks://profile", "databricks://a:b", "file:///x"]
)
def test_stores_without_a_server_are_not_asked(uri: str) -> None:
    require_answer(uri)


@pytest.mark.parametrize("uri", ["http://localhost:abc", "https://[::1", "postgresql://u:se/cret@host/db"])
def test_an_address_that_cannot_be_read_is_refused_without_its_password(uri: str) -> None:
    with pytest.raises(StageError, match="this is no address of a tracking store") as caught:
        require_answer(uri)
    assert caught.value.where == shown_uri(uri)
    assert "cret" not in str(caught.value)


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        ("postgresql://u:secret@127.0.0.1:9/db", "postgresql://u:***@127.0.0.1:9/db"),
        ("mysql+pymysql://u:se@cr/et@host/db?ssl_ca=x", "mysql+pymysql://u:***@host/db?ssl_ca=x"),
        ("http://:secret@host:5000/", "http://:***@host:5000/"),
        ("postgresql://host/db?user=u&password=secret&a=1", "postgresql://host/db?user=u&password=***&a=1"),
        ("mssql+pyodbc://?odbc_connect=UID%3Du%3BPWD%3Dsecret", "mssql+pyodbc://?odbc_connect=***"),
        ("http://u@host:5000", "http://u@host:5000"),
        ("http://host:5000/a", "http://host:5000/a"),
        ("sqlite:////tmp/a:b@c/tracking.db", "sqlite:////tmp/a:b@c/tracking.db"),
        ("databricks", "databricks"),
    ],
)
def test_an_address_is_shown_without_its_password(uri: str, shown: str) -> None:
    assert shown_uri(uri) == shown
    assert shown_uri(shown) == shown


def test_the_users_own_limits_for_requests_win(silent: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tasks.tracking._PATIENCE_S", 0.2)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "77")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "")
    monkeypatch.delenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES")
    with pytest.raises(ConnectionError):
        require_answer(f"http://127.0.0.1:{silent}")
    assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "77"
    # MLflow's own seven tries would take minutes.
    assert int(os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"]) <= 2


def test_a_class_may_have_a_name_that_no_metric_can_have(tracker: Tracker) -> None:
    run = tracker.open("x", {"stage": "a"}, {})
    tracker.log(run, metrics={"class/t-shirt (top)": 0.5, "class/größe": 1.0}, history=[{"R&D": 2.0}])
    found = tracker.client.get_run(run.info.run_id).data.metrics
    assert found == {"class/t-shirt _top_": 0.5, "class/größe": 1.0, "R_D": 2.0}


def test_what_keeps_a_report_from_mlflow_is_one_line(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    assert log_cycle(str(tmp_path), "c1") == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: no report in MLflow (")
    assert line.endswith("); `nss report` writes it")
