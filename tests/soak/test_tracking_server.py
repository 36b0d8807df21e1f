"""MLflow's server goes away while a cycle runs, in two ways: results are not lost, and the journal is made up for."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from mlflow import MlflowClient

pytestmark = pytest.mark.soak


class TrackingServer:
    """An MLflow server process on a folder, which can be ended, frozen and started again."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self.port = probe.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it and wait until it answers."""
        self.folder.mkdir(exist_ok=True)
        store = ["--backend-store-uri", f"sqlite:///{self.folder / 'server.db'}"]
        files = ["--artifacts-destination", str(self.folder / "files"), "--workers", "1"]
        command = [sys.executable, "-m", "mlflow", "server", *store, *files, "--port", str(self.port)]
        env = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
        self.process = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 120
        while not self._answers():
            assert time.monotonic() < deadline
            time.sleep(0.2)

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.uri}/health", timeout=2):
                return True
        except (OSError, urllib.error.URLError):
            return False

    def signal(self, number: int) -> None:
        """Send a signal to it and its workers."""
        family = psutil.Process(self.process.pid)
        for process in [*family.children(recursive=True), family]:
            process.send_signal(number)

    def stop(self) -> None:
        """End it at once."""
        self.signal(signal.SIGKILL)
        self.process.wait()


@pytest.fixture
def tracking(tmp_path: Path) -> Iterator[TrackingServer]:
    server = TrackingServer(tmp_path / "tracking")
    server.start()
    yield server
    server.stop()


def end(server: TrackingServer) -> None:
    server.stop()


def freeze(server: TrackingServer) -> None:
    server.signal(signal.SIGSTOP)


def thaw(server: TrackingServer) -> None:
    server.signal(signal.SIGCONT)


# With MLflow's own patience the test would take minutes.
PATIENCE = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "5"}


# A server that does not answer is asked again by each stage: the fewer are left, the sooner the test ends.
@pytest.mark.parametrize(
    ("away", "back", "after"),
    [(end, TrackingServer.start, "profile"), (freeze, thaw, "readapt")],
    ids=["ended", "frozen"],
)
def test_a_server_that_goes_away_in_the_middle_costs_no_result_and_no_run(
    copy, undisturbed, tracking: TrackingServer, wait_for, away, back, after: str
) -> None:
    process = copy.start("nss", "run", "--json", MLFLOW_TRACKING_URI=tracking.uri, **PATIENCE)
    wait_for((copy.root / "artifacts" / after / "metrics.json").exists, after)
    away(tracking)
    err = process.communicate(timeout=600)[1]
    assert process.returncode == 0, err
    assert err.count("not logged to MLflow") == 1, err
    assert not (copy.root / "champion.dvc").exists(), "nothing is pinned that is not registered"
    back(tracking)
    ended = copy.nss_run(MLFLOW_TRACKING_URI=tracking.uri)
    assert set(ended.outcomes.values()) == {"cached"}
    assert "Downloading" not in ended.err, "no bar of MLflow's where the model is fetched to be pinned"
    assert results(copy.root) == results(undisturbed.first.root)
    client = MlflowClient(tracking.uri)
    assert finished_stages(client) == sorted(run.info.run_name for run in undisturbed.first.runs("stage"))
    (version,) = client.search_model_versions()
    assert client.get_model_version_by_alias(version.name, "champion").version == version.version
    assert copy.json("champion.json")["version"] == int(version.version)


def finished_stages(client: MlflowClient) -> list[str]:
    """Names of the runs of stages; they have all finished, and nothing runs."""
    runs = client.search_runs([client.get_experiment_by_name("nss").experiment_id])
    assert "RUNNING" not in {run.info.status for run in runs}
    stages = [run for run in runs if run.data.tags["nss.kind"] == "stage"]
    assert {run.info.status for run in stages} == {"FINISHED"}
    return sorted(run.info.run_name for run in stages)


def results(root: Path) -> dict[str, bytes]:
    """Outputs of the stages, byte for byte."""
    folder = root / "artifacts"
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
