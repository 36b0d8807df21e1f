"""A small workspace to be killed in, and what undisturbed cycles leave in one like it."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from flows.launch import Server
from tasks.layout import set_params


def _load(name: str, path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


_E2E = Path(__file__).resolve().parents[1] / "e2e"
# The copies of the repository that the tests in e2e/ work in.
_copies = _load("soak_copies", _E2E / "conftest.py")

# The whole pipeline with a small network and little of everything, which promotes the model that it trains.
_SMALL: dict[str, Any] = {
    "base.factory": "nss.zoo:lenet",
    "base.epochs": 4,
    "profile.metrics": ["avg", "taylor"],
    "profile.windows": 1,
    "slice.metric": "taylor",
    "triage.budgets.macs": 200_000,
    "restructure.fine_tune_steps": 5,
    "restructure.curve": [],
    "register.promote": "auto",
}


@dataclass(frozen=True)
class Undisturbed:
    """What cycles leave that nobody disturbs. Not to be changed by tests.

    first: after one cycle, `seconds` long. settled: when nothing is left to do.
    """

    first: Any
    settled: Any
    seconds: float


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prefect's home folder for all of these tests."""
    return tmp_path_factory.mktemp("prefect")


@pytest.fixture(scope="session")
def server(home: Path) -> Iterator[str]:
    """A Prefect server."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"PREFECT_HOME": str(home), "PREFECT_SERVER_ANALYTICS_ENABLED": "false"}.items():
            patch.setenv(name, value)
        started = Server.start()
    started.wait()
    yield started.url
    assert started.process.poll() is None, "the server has ended by itself"
    started.stop()


@pytest.fixture(scope="session")
def fresh(tmp_path_factory: pytest.TempPathFactory, home: Path) -> Any:
    """A clone with the demo data and small settings in which nothing has run. Not to be changed by tests."""
    copy = _copies.clone(tmp_path_factory.mktemp("fresh") / "repository", home)
    (copy.root / "dvc.lock").unlink(missing_ok=True)
    set_params(copy.root / "params.yaml", _SMALL)
    copy.run("nss", "data", "demo")
    return copy


def _copy_of(copy: Any, target: Path, home: Path, server: str) -> Any:
    root = shutil.copytree(copy.root, target, symlinks=True)
    return _copies.Copy(root, {**_copies.environment(root, home), "PREFECT_API_URL": server, "OMP_NUM_THREADS": "1"})


def _settle(copy: Any) -> None:
    """Run cycles until there is nothing left to do: the next one works on the champion that this one made."""
    for _ in range(5):
        if set(copy.nss_run().outcomes.values()) == {"cached"}:
            return
    raise AssertionError("there is always something left to do")


@pytest.fixture(scope="session")
def settle() -> Any:
    """Give the function that runs cycles until there is nothing left to do."""
    return _settle


@pytest.fixture(scope="session")
def undisturbed(fresh: Any, tmp_path_factory: pytest.TempPathFactory, home: Path, server: str) -> Undisturbed:
    """What the others are compared with."""
    folder = tmp_path_factory.mktemp("undisturbed")
    first = _copy_of(fresh, folder / "first", home, server)
    start = time.monotonic()
    first.nss_run()
    seconds = time.monotonic() - start
    settled = _copy_of(first, folder / "settled", home, server)
    _settle(settled)
    return Undisturbed(first, settled, seconds)


@pytest.fixture
def copy(fresh: Any, tmp_path: Path, home: Path, server: str) -> Any:
    """A copy in which nothing has run."""
    return _copy_of(fresh, tmp_path / "repository", home, server)


@pytest.fixture
def settled(undisturbed: Undisturbed, tmp_path: Path, home: Path, server: str) -> Any:
    """A copy in which there is nothing left to do."""
    return _copy_of(undisturbed.settled, tmp_path / "repository", home, server)


def _files(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def _results(copy: Any) -> dict[str, bytes]:
    """Everything that cycles make: outputs, the pinned champion, what DVC recorded, and the data set."""
    files = {name: data for folder in ("artifacts", "champion", "data") for name, data in _named(copy.root, folder)}
    return files | {name: (copy.root / name).read_bytes() for name in ("dvc.lock", "champion.json", "champion.dvc")}


def _named(root: Path, folder: str) -> Iterator[tuple[str, bytes]]:
    yield from ((f"{folder}/{name}", data) for name, data in _files(root / folder).items())


def _decisions(copy: Any) -> list[tuple[Any, ...]]:
    lines = (copy.root / "mlflow" / "ledger.jsonl").read_text().splitlines()
    names = ("kind", "verdict", "verb", "model", "version")
    return [tuple(json.loads(line)[name] for name in names) for line in lines]


def _versions(copy: Any) -> list[tuple[Any, ...]]:
    found = [(each.name, each.version, each.tags["nss.key"]) for each in copy.client.search_model_versions()]
    models = copy.client.search_registered_models()
    return [*sorted(found), *sorted((each.name, tuple(each.aliases.items())) for each in models)]


def _check_like(copy: Any, undisturbed: Any) -> None:
    """See that results are those of undisturbed cycles, byte for byte, and that nothing else is left."""
    mine, theirs = _results(copy), _results(undisturbed)
    assert sorted(mine) == sorted(theirs)
    assert [name for name in mine if mine[name] != theirs[name]] == []
    assert copy.git("status", "--porcelain") == undisturbed.git("status", "--porcelain")
    assert {path.name for path in copy.root.iterdir()} == {path.name for path in undisturbed.root.iterdir()}
    names = [sorted(run.info.run_name for run in each.runs("stage")) for each in (copy, undisturbed)]
    assert names[0] == names[1], "one run for each stage, however often it was begun"
    assert {run.info.status for run in copy.runs("stage")} == {"FINISHED"}
    assert "RUNNING" not in {run.info.status for run in copy.runs()}
    assert _versions(copy) == _versions(undisturbed)
    assert _decisions(copy) == _decisions(undisturbed)
    left = [each for each in psutil.process_iter(["cwd"]) if each.info["cwd"] == str(copy.root)]
    assert left == [], "nobody works on"


@pytest.fixture(scope="session")
def check_like() -> Any:
    """Give the function that compares a copy with an undisturbed one."""
    return _check_like


@pytest.fixture(scope="session", name="wait_for")
def wait_for_fixture() -> Any:
    """Give the function that waits for a condition."""
    return _copies.wait_for
