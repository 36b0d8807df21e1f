"""A real `prefect server start` and a real `nss serve`. A stand-in of a second is the cycle."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import numpy as np
import psutil
import pytest

from nss.data import load_data
from tasks.data import add
from tasks.provenance import data_md5
from tasks.workspace import Workspace

pytestmark = pytest.mark.soak
ROOT = Path(__file__).resolve().parents[2]
CRON = ("--cron", "0 3 * * *", "--timezone", "Europe/Berlin")
# It writes down what it saw, and lasts as long as there is a file named hold.
CYCLE = """
import time
from pathlib import Path

from prefect import flow

from nss.data import load_data
from tasks.lock import exclusive
from tasks.provenance import data_md5
from tasks.workspace import Workspace


@flow(name="maintain", persist_result=False, validate_parameters=False)
def maintain(root: str, retries: int = 0) -> None:
    workspace = Workspace(Path(root))
    with exclusive(workspace, wait_s=60):
        with (workspace.root / "cycles.log").open("a") as log:
            log.write(f"{data_md5(workspace)} {len(load_data(workspace.data).batches)}\\n")
        while (workspace.root / "hold").exists():
            time.sleep(0.1)
"""


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A Prefect server with all its services: schedules and triggers need them."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    home = tmp_path_factory.mktemp("home")
    command = ["-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", port, "--no-ui"]
    process = subprocess.Popen([sys.executable, *command], env=environment(home), stdout=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}/api"
    try:
        wait(lambda: answers(url), "the server")
        yield url
    finally:
        process.terminate()
        process.wait(60)


def environment(home: Path) -> dict[str, str]:
    foreign = ("MLFLOW_", "PREFECT_", "DVC_", "NSS_")
    env = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
    quiet = {"DO_NOT_TRACK": "1", "PREFECT_SERVER_ANALYTICS_ENABLED": "false", "PREFECT_SERVER_LOGGING_LEVEL": "ERROR"}
    return {**env, **quiet, "PREFECT_HOME": str(home), "PYTHONDONTWRITEBYTECODE": "1"}


def answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", timeout=5).status_code == 200
    except httpx.HTTPError:
        return False


def wait(condition: Callable[[], object], what: str, seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(0.1)


@dataclass
class Place:
    """A workspace, and what serves it."""

    root: Path
    env: dict[str, str]
    url: str
    process: subprocess.Popen[str] | None = None

    @property
    def inbox(self) -> Path:
        return self.root / "inbox"

    @property
    def log(self) -> str:
        return (self.root / "serve.log").read_text()

    @property
    def cycles(self) -> list[str]:
        """A line for each cycle: version of data/ and number of batches that it saw."""
        path = self.root / "cycles.log"
        return path.read_text().splitlines() if path.exists() else []

    def serve(self, *options: str) -> None:
        """Start the service and wait until it serves."""
        with (self.root / "serve.log").open("w") as log:
            command = ["nss", "serve", "--settle", "2", "--poll", "0.5", *options]
            self.process = subprocess.Popen(command, cwd=self.root, env=self.env, stdout=log, stderr=subprocess.STDOUT)
        wait(lambda: "serving" in self.log or self.process.poll() is not None, "the service")
        assert self.process.poll() is None, self.log

    def stop(self) -> int:
        """Stop the service as systemd would."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)

    def nss(self, *arguments: str, code: int = 0) -> str:
        done = subprocess.run(
            ["nss", *arguments], cwd=self.root, env=self.env, capture_output=True, text=True, timeout=120, check=False
        )
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout + done.stderr

    def post(self, path: str, **content: object) -> list[dict]:
        return httpx.post(f"{self.url}/{path}/filter", json=content, timeout=60).raise_for_status().json()

    def runs(self) -> list[dict]:
        """All runs of the deployment that were due, the oldest first."""
        found = self.post(
            "flow_runs", deployments={"name": {"any_": [self.root.name]}}, sort="EXPECTED_START_TIME_DESC"
        )
        return [run for run in reversed(found) if run["state_name"] != "Scheduled"]

    def drop(self, name: str, seed: int, count: int = 20) -> None:
        images(self.root / f".{name}", seed, count).rename(self.inbox / name)

    def wait_for_cycle(self, number: int) -> str:
        """Wait for the end of cycle `number`, and return what it saw."""
        wait(
            lambda: len(self.cycles) >= number and all(ended(run) for run in self.runs()), f"cycle {number}\n{self.log}"
        )
        return self.cycles[number - 1]


def ended(run: dict) -> bool:
    return run["state_type"] in ("COMPLETED", "CANCELLED", "CRASHED", "FAILED")


def images(path: Path, seed: int, count: int = 20) -> Path:
    pixels = np.random.default_rng(seed).integers(0, 255, (count, 8, 8), dtype=np.uint8)
    with path.open("wb") as file:
        np.savez(file, x=pixels, y=np.arange(count) % 2)
    return path


@pytest.fixture
def place(url: str, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Place]:
    """A workspace with one batch, which no cycle has seen."""
    root, code = tmp_path / request.node.name[5:40].replace("_", "-"), tmp_path / "code"
    code.mkdir()
    for name in ("nss", "tasks"):
        (code / name).symlink_to(ROOT / name)
    shutil.copytree(ROOT / "flows", code / "flows", ignore=shutil.ignore_patterns("__pycache__"))
    (code / "flows" / "maintain.py").write_text(CYCLE)
    (root / ".dvc").mkdir(parents=True)
    (root / ".dvc" / "config").write_text("[core]\n    analytics = false\n")
    (root / "champion.json").write_text('{"version": null}')
    (root / "dvc.yaml").write_text(
        "stages:\n  toy:\n    cmd: cp data/dataset.json toy\n    deps: [data]\n    outs: [toy]\n"
    )
    subprocess.run(["git", "init", "-q"], cwd=root, check=True)
    add(Workspace(root), str(images(tmp_path / "first.npz", 0)), new_classes=True)
    env = {**environment(tmp_path / "prefect"), "PYTHONPATH": str(code), "PREFECT_API_URL": url}
    found = Place(root, env, url)
    yield found
    if found.process and found.process.poll() is None:
        found.stop()


def test_each_version_that_arrives_gets_one_run(place: Place) -> None:
    place.serve()
    # What was there before anybody served.
    assert place.wait_for_cycle(1).endswith(" 1")
    start = time.monotonic()
    place.drop("a.npz", 1)
    assert place.wait_for_cycle(2).endswith(" 2")
    assert time.monotonic() - start < 60
    # Three within a second are one version and one run.
    for seed in (2, 3, 4):
        place.drop(f"{seed}.npz", seed)
    assert place.wait_for_cycle(3).endswith(" 5")
    # The same batch again is no version: the next run is that of the next batch.
    place.drop("again.npz", 2)
    wait(lambda: not list(place.inbox.glob("*.npz")), "the batch that was there")
    # Three chunks, with pauses shorter than the settling time, are one batch.
    (place.inbox / "chunks").mkdir()
    for chunk in range(3):
        for label in (0, 1):
            folder = place.inbox / "chunks" / str(label)
            folder.mkdir(exist_ok=True)
            write_picture(folder / f"{chunk}.png", chunk * 2 + label)
        time.sleep(1)
    assert place.wait_for_cycle(4) == f"{data_md5(Workspace(place.root))} 6"
    assert len(load_data(place.root / "data").batches[-1]) == 6
    assert len({line.split()[0] for line in place.cycles}) == len(place.cycles) == 4
    assert [run["state_name"] for run in place.runs()] == ["Completed"] * 4
    check_event(place)


def write_picture(path: Path, seed: int) -> None:
    from PIL import Image

    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (8, 8), dtype=np.uint8)).save(path)


def check_event(place: Place) -> None:
    """`nss data add` tells the server, whose trigger makes the run; the watcher does not make another."""
    place.nss("data", "add", str(images(place.root / "more.npz", 9)))
    assert place.wait_for_cycle(5).endswith(" 7")
    place.drop("b.npz", 10)
    assert place.wait_for_cycle(6).endswith(" 8")
    assert len(place.cycles) == len(place.runs()) == 6
    # The server shows an event seconds after it took it: it writes them to its database every five.
    wait(lambda: len(events(place)) >= 6, "the last event")
    assert events(place) == ["made"] * 4 + ["wanted", "made"]


def events(place: Place) -> list[str]:
    """What the events about the data of this place say of their runs, the oldest first."""
    found = place.post("events", filter={"event": {"name": ["nss.data.arrived"]}, "order": "ASC"})["events"]
    about = f"nss.data.{place.root.name}"
    return [each["resource"]["nss.run"] for each in found if each["resource"]["prefect.resource.id"] == about]


def test_a_restart_keeps_the_schedule_and_makes_up_for_what_was_cut_off(place: Place) -> None:
    (place.root / "hold").touch()
    place.serve(*CRON)
    wait(lambda: len(place.cycles) == 1, "the first cycle")
    assert "is at work in this workspace" in place.nss("serve", code=75)
    assert place.stop() == 0
    assert [run["state_name"] for run in place.runs()] == ["Cancelled"]
    assert schedules(place) == [("0 3 * * *", "Europe/Berlin", True)]
    place.drop("a.npz", 1)
    place.serve(*CRON)
    # Killed without a word, the run seems to go on.
    wait(lambda: len(place.cycles) == 2, "the second cycle")
    for process in [place.process, *psutil.Process(place.process.pid).children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):  # it has ended by itself since
            process.kill()
    place.process.wait(60)
    assert place.runs()[-1]["state_name"] == "Running"
    (place.root / "hold").unlink()
    place.serve(*CRON)
    wait(lambda: len(place.cycles) > 2 and saw_all(place) and all(map(ended, place.runs())), "a cycle that saw all")
    states = [run["state_name"] for run in place.runs()]
    assert states[:2] == ["Cancelled", "Crashed"]
    assert set(states[2:]) == {"Completed"}
    assert len(states) == len(place.cycles)
    assert schedules(place) == [("0 3 * * *", "Europe/Berlin", True)]
    status = json.loads(place.nss("status", "--json"))
    assert status["server"] == {
        "deployment": place.root.name, "schedules": ["0 3 * * * Europe/Berlin"], "running": None,
    }  # fmt: skip
    assert place.stop() == 0


def saw_all(place: Place) -> bool:
    return place.cycles[-1] == f"{data_md5(Workspace(place.root))} 2"


def schedules(place: Place) -> list[tuple[str, str, bool]]:
    (found,) = place.post("deployments", deployments={"name": {"any_": [place.root.name]}})
    assert not found["paused"]
    return [(each["schedule"]["cron"], each["schedule"]["timezone"], each["active"]) for each in found["schedules"]]
