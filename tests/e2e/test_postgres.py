"""MLflow and Prefect on PostgreSQL, which the test starts itself (tests/services/postgres.py)."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from mlflow import MlflowClient
from ruamel.yaml import YAML

from flows.launch import Server
from tasks.tracking import Tracker

SCRIPT = Path(__file__).resolve().parents[1] / "services" / "postgres.py"
IMPOSSIBLE = 77
# A model that is trained in a second; what follows is as small.
SMALL = {
    "base": {"factory": "nss.zoo:lenet", "epochs": 2},
    "profile": {"samples_per_class": 20},
    "restructure": {"fine_tune_steps": 5},
}
FOUR = """
    import sys
    import time
    from pathlib import Path
    from tasks.tracking import Tracker

    root, name, uri = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
    (root / f"ready-{name}").touch()
    while not (root / "go").exists():
        time.sleep(0.001)
    tracker = Tracker(uri, root / "artifacts")
    run = tracker.open("base", {"stage": "base", "stage_key": name}, {})
    for step in range(20):
        tracker.log(run, metrics={f"m{step}": step})
    tracker.end(run.info.run_id, "FINISHED")
"""


@pytest.fixture(scope="module")
def database() -> Iterator[Callable[[str], str]]:
    """Give a function that makes an empty database and returns its address."""
    psycopg = pytest.importorskip("psycopg")
    pytest.importorskip("asyncpg")
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, SCRIPT], stdin=pipe, stdout=pipe, stderr=pipe, text=True) as process:
        url = process.stdout.readline().strip()
        if not url:
            reason = process.communicate()[1].strip()
            assert process.returncode == IMPOSSIBLE, reason
            pytest.skip(reason)

        def create(name: str) -> str:
            with psycopg.connect(f"{url}/postgres", autocommit=True) as connection:
                connection.execute(f"CREATE DATABASE {name}")
            return f"{url}/{name}"

        yield create
        process.communicate()
        assert process.returncode == 0


@pytest.fixture
def prefect(database: Callable[[str], str], server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, str]]:
    """Start a Prefect server on a database of its own; give its address and the database's."""
    uri = database("prefect")
    connection = uri.replace("postgresql://", "postgresql+asyncpg://")
    monkeypatch.setenv("PREFECT_API_DATABASE_CONNECTION_URL", connection)
    own = Server.start()
    own.wait()
    yield own.url, uri
    own.stop()


def make_small(path: Path) -> None:
    """Set what SMALL says in a params.yaml."""
    yaml = YAML()
    content = yaml.load(path)
    for group, values in SMALL.items():
        assert values.keys() <= content[group].keys()
        content[group].update(values)
    yaml.dump(content, path)


def test_four_processes_at_once_on_an_empty_database_all_succeed(database, tmp_path: Path) -> None:
    uri = database("four")
    command = [sys.executable, "-c", textwrap.dedent(FOUR), str(tmp_path)]
    processes = [subprocess.Popen([*command, str(each), uri], stderr=subprocess.PIPE, text=True) for each in range(4)]
    while len(list(tmp_path.glob("ready-*"))) < 4:
        assert all(process.poll() is None for process in processes)
        time.sleep(0.05)
    (tmp_path / "go").touch()
    errors = [process.communicate()[1] for process in processes]
    assert [process.returncode for process in processes] == [0] * 4, errors
    tracker = Tracker(uri, tmp_path / "artifacts")
    runs = list(tracker.client.search_runs([tracker.experiment_id]))
    assert [(run.info.status, len(run.data.metrics)) for run in runs] == [("FINISHED", 20)] * 4


@pytest.mark.soak
def test_a_cycle_is_kept_in_postgresql_alone_and_the_second_finds_all_cached(copy, database, prefect) -> None:
    make_small(copy.root / "params.yaml")
    own_store = copy.root / "mlflow" / "tracking.db"
    before = own_store.read_bytes()
    uri = database("mlflow")
    env = {"MLFLOW_TRACKING_URI": uri, "PREFECT_API_URL": prefect[0]}
    first = copy.nss_run(**env)
    assert set(first.outcomes.values()) == {"executed"}
    assert "warning" not in first.err
    client = MlflowClient(uri)
    runs = runs_of(client)
    stages = {run.info.run_name: run for run in runs if run.data.tags["nss.kind"] == "stage"}
    assert stages.keys() == first.outcomes.keys()
    assert {run.info.status for run in runs} == {"FINISHED"}
    # What a stage says of itself, as text, numbers, steps, files and a model.
    base = stages["base"]
    assert base.data.params["factory"] == "nss.zoo:lenet"
    assert base.data.metrics["val_accuracy"] == copy.json("artifacts/base/metrics.json")["val_accuracy"]
    assert len(client.get_metric_history(base.info.run_id, "epoch_loss")) == 2
    assert "training.png" in {file.path for file in client.list_artifacts(base.info.run_id)}
    assert base.outputs.model_outputs
    assert set(copy.nss_run(**env).outcomes.values()) == {"cached"}
    assert len(runs_of(client)) == len(runs) + 1
    assert own_store.read_bytes() == before
    assert flow_runs(prefect[1]) == ["COMPLETED"] * 2


def runs_of(client: MlflowClient) -> list:
    """All runs of the experiment."""
    experiment = client.get_experiment_by_name("nss")
    return list(client.search_runs([experiment.experiment_id], max_results=1000))


def flow_runs(uri: str) -> list[str]:
    """How the flow runs in Prefect's database ended."""
    import psycopg

    with psycopg.connect(uri) as connection:
        return [state for (state,) in connection.execute("SELECT state_type::text FROM flow_run")]
