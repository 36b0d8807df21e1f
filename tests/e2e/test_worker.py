"""prefect.yaml as docs/operate.md says it: a real server, a work pool, a deployment, a worker, and runs by name."""

from __future__ import annotations

import contextlib
import importlib.util
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import DeploymentFilter, DeploymentFilterName
from prefect.client.schemas.objects import FlowRun
from prefect.client.schemas.responses import DeploymentResponse
from prefect.client.schemas.sorting import FlowRunSort
from prefect.settings import PREFECT_API_URL, temporary_settings

from tasks.provenance import data_md5
from tasks.workspace import Workspace

pytestmark = pytest.mark.soak
CRON = '    schedules:\n      - cron: "0 3 * * *"\n        timezone: Europe/Berlin\n'
Wait = Callable[[Callable[[], bool], str], None]
# As long as there is a file named hold, the last stage waits.
HELD = "cmd: touch begun; while test -e hold; do sleep 0.1; done; nss stage gate"


@dataclass
class Site:
    """A copy of the repository, deployed, and the processes beside it."""

    copy: Any
    wait_for: Wait
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def name(self) -> str:
        return f"maintain/{self.copy.root.name}"

    def deploy(self) -> str:
        return self.copy.run("prefect", "--no-prompt", "deploy", "--all").out

    def start(self, *command: str) -> subprocess.Popen[bytes]:
        with (self.copy.root.parent / f"{command[0]}.log").open("ab") as log:
            process = subprocess.Popen(command, cwd=self.copy.root, env=self.copy.env, stdout=log, stderr=log)
        self.processes.append(process)
        return process

    def worker(self) -> subprocess.Popen[bytes]:
        return self.start("prefect", "worker", "start", "--pool", "nss")

    def deployment(self) -> DeploymentResponse:
        with self.client() as client:
            return client.read_deployment_by_name(self.name)

    def client(self) -> SyncPrefectClient:
        return get_client(sync_client=True)

    def runs(self) -> list[FlowRun]:
        """The runs that were due, the oldest first."""
        named = DeploymentFilter(name=DeploymentFilterName(any_=[self.copy.root.name]))
        with self.client() as client:
            found = client.read_flow_runs(deployment_filter=named, sort=FlowRunSort.EXPECTED_START_TIME_ASC)
        return [run for run in found if not run.auto_scheduled]

    def states(self) -> list[str]:
        return [run.state_name for run in self.runs()]

    def wait_for_states(self, *states: str) -> None:
        self.wait_for(lambda: self.states() == list(states), f"{states}")

    def stop(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.send_signal(signal.SIGINT)
        for process in self.processes:
            process.wait(60)


def _load(name: str, path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


# A server with all its services: workers and triggers need them.
url = _load("worker_service", Path(__file__).with_name("test_service.py")).url


@pytest.fixture(scope="module")
def server(url: str) -> Iterator[str]:
    """Let the copies use this server."""
    with temporary_settings({PREFECT_API_URL: url}):
        yield url


@pytest.fixture
def deployed(request: pytest.FixtureRequest, tmp_path: Path, copy, wait_for: Wait) -> Iterator[Site]:
    """A copy of the executed clone, under a name of its own, with the steps of the docs done but for the worker."""
    root = copy.root.rename(tmp_path / request.node.name[5:35].replace("_", "-"))
    copy.root, copy.env["PYTHONPATH"] = root, str(root)
    site = Site(copy, wait_for)
    with site.client() as client:
        pools = [pool.name for pool in client.read_work_pools()]
    if "nss" not in pools:
        copy.run("prefect", "work-pool", "create", "nss", "--type", "process")
    site.deploy()
    yield site
    site.stop()


def hold(site: Site) -> None:
    """Let the next run wait in its last stage."""
    site.copy.edit("dvc.yaml", "cmd: nss stage gate", HELD)
    (site.copy.root / "hold").touch()


def test_a_run_by_name_brings_the_stages_up_to_date(deployed: Site) -> None:
    copy = deployed.copy
    copy.edit("params.yaml", "min_images: 100 # held", "min_images: 99 # held")
    shutil.rmtree(copy.root / "artifacts" / "evaluate")
    before = len(copy.runs("cycle"))
    deployed.worker()
    copy.run("prefect", "deployment", "run", deployed.name, "--watch")
    assert deployed.states() == ["Completed"]
    (cycle, *others) = sorted(copy.runs("cycle"), key=lambda run: run.info.start_time, reverse=True)
    assert len(others) == before
    assert cycle.info.status == "FINISHED"
    outcomes = {name: cycle.data.tags[f"nss.stage.{name}.outcome"] for name in ("base", "evaluate", "gate")}
    assert outcomes == {"base": "cached", "evaluate": "restored", "gate": "executed"}
    assert "(99 asked for)" in (copy.root / "artifacts" / "gate" / "gate.json").read_text()
    assert (copy.root / "artifacts" / "evaluate" / "evaluation.json").is_file()
    assert copy.run("dvc", "status").out.strip() == "Data and pipelines are up to date."
    (run,) = deployed.runs()
    assert f"nss.data_md5={cycle.data.tags['nss.data_md5']}" in run.tags
    assert copy.git("status", "--porcelain", "prefect.yaml") == ""


def test_deployed_again_it_is_what_it_was(deployed: Site) -> None:
    """A schedule in the file is one schedule; without the key, what is on the server stays."""
    path = deployed.copy.root / "prefect.yaml"
    plain = path.read_text()
    assert schedules(deployed) == []
    path.write_text(plain.replace("    triggers:\n", f"{CRON}    triggers:\n"))
    for _ in range(2):
        assert "Warning" not in deployed.deploy()
        assert schedules(deployed) == [("0 3 * * *", "Europe/Berlin", True)]
    path.write_text(plain)
    deployed.deploy()
    assert schedules(deployed) == [("0 3 * * *", "Europe/Berlin", True)]
    found = deployed.deployment()
    root = str(deployed.copy.root)
    assert found.parameters == {"root": root, "retries": 0}
    assert found.pull_steps == [{"prefect.deployments.steps.set_working_directory": {"directory": root}}]
    assert found.global_concurrency_limit.limit == 1
    deployed.copy.run("prefect", "deployment", "schedule", "clear", deployed.name, "--accept-yes")
    assert schedules(deployed) == []


def schedules(site: Site) -> list[tuple[str, str, bool]]:
    return [(each.schedule.cron, each.schedule.timezone, each.active) for each in site.deployment().schedules]


def test_of_two_runs_at_once_the_second_is_cancelled(deployed: Site) -> None:
    hold(deployed)
    deployed.worker()
    deployed.copy.run("prefect", "deployment", "run", deployed.name)
    deployed.wait_for((deployed.copy.root / "begun").exists, "the stage")
    deployed.copy.run("prefect", "deployment", "run", deployed.name)
    deployed.wait_for_states("Running", "Cancelled")
    assert "concurrency limit" in deployed.runs()[1].state.message
    (deployed.copy.root / "hold").unlink()
    deployed.wait_for_states("Completed", "Cancelled")


def test_a_run_that_was_killed_with_its_worker_is_made_again_by_the_watcher(deployed: Site) -> None:
    hold(deployed)
    root = deployed.copy.root
    # No run has seen this version of the data.
    (root / "data.dvc").touch()
    watcher = deployed.start("nss", "watch", "--poll", "1")
    worker = deployed.worker()
    deployed.wait_for((root / "begun").exists, "the stage")
    for process in [*psutil.Process(worker.pid).children(recursive=True), psutil.Process(worker.pid)]:
        with contextlib.suppress(psutil.NoSuchProcess):  # it has ended by itself since
            process.kill()
    worker.wait(60)
    deployed.wait_for(lambda: deployed.states()[0] == "Crashed", "the watcher")
    (root / "hold").unlink()
    deployed.worker()
    deployed.wait_for_states("Crashed", "Completed")
    seen = {tag for run in deployed.runs() for tag in run.tags if tag.startswith("nss.data_md5=")}
    assert seen == {f"nss.data_md5={data_md5(Workspace(root))}"}
    assert watcher.poll() is None
    watcher.send_signal(signal.SIGTERM)
    assert watcher.wait(60) == 0
