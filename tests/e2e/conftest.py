"""Copies of the repository in which commands are run as a user would, each with a Prefect and an MLflow of its own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

from flows.launch import Server

ROOT = Path(__file__).resolve().parents[2]
_FOREIGN = ("MLFLOW_", "PREFECT_", "DVC_", "NSS_", "GIT_")


@dataclass
class Ended:
    """A command that has ended. `cpu` counts seconds of it and of all it waited for."""

    code: int
    out: str
    err: str
    cpu: float

    @property
    def outcomes(self) -> dict[str, str]:
        """{stage: outcome} of `nss run --json`."""
        return {stage["stage"]: stage["outcome"] for stage in json.loads(self.out)["stages"]}


@dataclass
class Copy:
    """A working copy of the repository."""

    root: Path
    env: dict[str, str] = field(default_factory=dict)

    def start(self, *command: str, **env: str) -> subprocess.Popen[str]:
        """Start a command; its program is looked up beside this interpreter first."""
        return subprocess.Popen(
            command,
            cwd=self.root,
            env={**self.env, **env},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *command: str, code: int = 0, **env: str) -> Ended:
        """Run a command that must end with `code`."""
        before = os.times()
        process = self.start(*command, **env)
        out, err = process.communicate(timeout=900)
        after = os.times()
        cpu = after.children_user + after.children_system - before.children_user - before.children_system
        assert process.returncode == code, f"{command} ended with {process.returncode}\n{out}\n{err}"
        return Ended(process.returncode, out, err, cpu)

    def nss_run(self, *options: str, code: int = 0, **env: str) -> Ended:
        """Run `nss run --json`."""
        return self.run("nss", "run", "--json", *options, code=code, **env)

    def git(self, *arguments: str) -> str:
        """Run git."""
        return self.run("git", *arguments).out

    @property
    def client(self) -> MlflowClient:
        """Client of the copy's own tracking store."""
        return MlflowClient(f"sqlite:///{self.root / 'mlflow' / 'tracking.db'}")

    def runs(self, kind: str = "") -> list[Run]:
        """All MLflow runs, or those of one kind: cycle, stage, slice."""
        experiment = self.client.get_experiment_by_name("nss")
        words = f"tags.`nss.kind` = '{kind}'" if kind else ""
        return list(self.client.search_runs([experiment.experiment_id], words, max_results=1000))

    def edit(self, path: str, old: str, new: str) -> None:
        """Replace one place in a file."""
        text = (self.root / path).read_text(encoding="utf-8")
        assert text.count(old) == 1, f"{old!r} is in {path} {text.count(old)} times"
        (self.root / path).write_text(text.replace(old, new), encoding="utf-8")

    def json(self, path: str) -> Any:
        """Read a JSON file."""
        return json.loads((self.root / path).read_text(encoding="utf-8"))


def wait_for(condition: Callable[[], bool], what: str) -> None:
    """Wait at most five minutes."""
    deadline = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(0.1)


def environment(root: Path, home: Path) -> dict[str, str]:
    """What a user's shell would have, with the copy's own sources first."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(_FOREIGN)}
    names = {"GIT_AUTHOR_NAME": "t", "GIT_AUTHOR_EMAIL": "t@example.org"}
    names |= {"GIT_COMMITTER_NAME": "t", "GIT_COMMITTER_EMAIL": "t@example.org"}
    return {
        **env,
        **names,
        "PYTHONPATH": str(root),
        "PYTHONDONTWRITEBYTECODE": "1",
        "PREFECT_HOME": str(home),
        "PREFECT_LOCAL_STORAGE_PATH": str(home / "storage"),
    }


def clone(target: Path, home: Path) -> Copy:
    """Commit what git tracks or would track here to a repository of its own."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    for name in filter(None, names):
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)
    copy = Copy(target, environment(target, home))
    for arguments in (["init", "-q"], ["add", "-A"], ["commit", "-q", "-m", "clone"]):
        copy.git(*arguments)
    return copy


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prefect's home folder for all of these tests."""
    return tmp_path_factory.mktemp("prefect")


@pytest.fixture(scope="session")
def server(home: Path) -> Iterator[str]:
    """A Prefect server that spares most tests the start of one."""
    names = {"PREFECT_HOME": str(home), "DO_NOT_TRACK": "1", "PREFECT_SERVER_ANALYTICS_ENABLED": "false"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in names.items():
            patch.setenv(name, value)
        server = Server.start()
    server.wait()
    yield server.url
    server.stop()


@pytest.fixture(scope="session")
def executed(tmp_path_factory: pytest.TempPathFactory, home: Path) -> tuple[Copy, Ended]:
    """A clone in which `nss data demo` and `nss run` were run, and how the run ended. Not to be changed by tests."""
    copy = clone(tmp_path_factory.mktemp("clone") / "repository", home)
    # The lock file of the committer's machine may name other bytes than this machine's: everything is run here.
    (copy.root / "dvc.lock").unlink(missing_ok=True)
    copy.run("nss", "data", "demo")
    return copy, copy.run("nss", "run")


@pytest.fixture
def copy(executed: tuple[Copy, Ended], tmp_path: Path, home: Path, server: str) -> Copy:
    """A copy of the executed clone, DVC's cache included, with a Prefect server running."""
    root = shutil.copytree(executed[0].root, tmp_path / "repository", symlinks=True)
    return Copy(root, {**environment(root, home), "PREFECT_API_URL": server})


@pytest.fixture
def laid_out(tmp_path: Path, home: Path, server: str) -> Copy:
    """A workspace that `nss init` laid out in a folder of its own, with a Prefect server running."""
    root = tmp_path / "own"
    root.mkdir()
    workspace = Copy(root, {**environment(ROOT, home), "PREFECT_API_URL": server})
    workspace.run("nss", "init", "--name", "digits")
    return workspace


@pytest.fixture(scope="session")
def clone_again(home: Path) -> Callable[[Copy, Path], Copy]:
    """Give the function that clones a copy's commit, without its data, results and caches."""

    def clone_of(copy: Copy, target: Path) -> Copy:
        copy.git("clone", "-q", str(copy.root), str(target))
        return Copy(target, environment(target, home))

    return clone_of


@pytest.fixture(scope="session", name="wait_for")
def wait_for_fixture() -> Callable[[Callable[[], bool], str], None]:
    """Give the function that waits for a condition."""
    return wait_for
