"""A workspace that a cycle has just gone through, with outputs written by hand, and a tracking store of its own."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from dvc.repo import Repo

from nss.files import write_json
from nss.model import build_model, load_model, model_digest, save_model
from tasks import register
from tasks.champion import read_champion, unpin_champion
from tasks.ledger import read_ledger
from tasks.params import Params, load_params
from tasks.pipeline import Pipeline
from tasks.registry import Registry, Version
from tasks.tracking import Tracker, create_database, open_tracker
from tasks.workspace import Workspace

ROOT = Path(__file__).resolve().parents[2]
STAGES = """\
stages:
  base: {cmd: "true", deps: [champion.json, data], outs: [artifacts/base]}
  restructure: {cmd: "true", deps: [artifacts/base/model], outs: [artifacts/restructure]}
  readapt: {cmd: "true", deps: [artifacts/base/model], outs: [artifacts/readapt]}
  evaluate: {cmd: "true", deps: [artifacts/restructure, artifacts/readapt], outs: [artifacts/evaluate]}
  gate: {cmd: "true", deps: [artifacts/evaluate/candidates.json], outs: [artifacts/gate]}
"""
BATCH = "b" * 32


@dataclass
class Shop:
    """A workspace and its store; `cycle` is what the stages would have done."""

    workspace: Workspace
    params: Params
    tracker: Tracker

    def cycle(self, verdicts: Mapping[str, str] | None = None, accuracy: float = 0.9, seed: int = 1) -> None:
        """Leave a base model, two models made of it and the gate's verdicts on disk, with their MLflow runs.

        Without a champion the base model has the seed 0. seed: of the verb's model, from 1.
        """
        verdicts = {"restructure": "PROMOTE"} if verdicts is None else verdicts
        pin = read_champion(self.workspace)
        write_json(self._out("base") / "champion.json", pin and {"name": pin.name, "version": pin.version})
        if pin is None:
            save_model(_model(0), self._out("base") / "model")
        else:
            shutil.rmtree(self._out("base") / "model", ignore_errors=True)
            shutil.copytree(self.workspace.champion, self._out("base") / "model")
        parent = model_digest(load_model(self._out("base") / "model"))
        for place, verb in enumerate(("restructure", "readapt")):
            save_model(_model(seed + 10 * place), self._out(verb) / "model")
        self._judge(verdicts, parent, accuracy)
        with Repo(str(self.workspace.root)) as repo:
            repo.commit(force=True)
        for verb in ("base", "restructure", "readapt"):
            self.log(verb)

    def _judge(self, verdicts: Mapping[str, str], parent: str, accuracy: float) -> None:
        models = {verb: model_digest(load_model(self._out(verb) / "model")) for verb in verdicts}
        judgements = [
            {"verb": verb, "verdict": verdict, "reasons": [{"check": "c", "verdict": verdict, "text": f"{verb} is so"}]}
            for verb, verdict in verdicts.items()
        ]
        described = {
            verb: {"model": model, "parent": parent, "batches": [BATCH], "figures": {"accuracy": accuracy, "macs": 10}}
            for verb, model in models.items()
        }
        promoted = next((verb for verb, verdict in verdicts.items() if verdict == "PROMOTE"), None)
        verdict = "PROMOTE" if promoted else "HOLD" if "HOLD" in (set(verdicts.values()) or {"HOLD"}) else "REJECT"
        content = {"verdict": verdict, "promoted": promoted, "judgements": judgements, "candidates": described}
        write_json(self._out("gate") / "gate.json", content)
        per_class = [{"verb": verb, "per_class": {"t-shirt (top)": accuracy / 2}} for verb in verdicts]
        write_json(self._out("evaluate") / "candidates.json", per_class)

    def log(self, verb: str) -> str:
        """Make the finished MLflow run of a stage, with its model."""
        key = Pipeline(self.workspace).stage_key(verb)
        run = self.tracker.open(verb, {"stage": verb, "stage_key": key.digest}, {"nss.data_md5": "base's"})
        if run.info.status != "FINISHED":
            self.tracker.log_model(run.info.run_id, verb, self._out(verb) / "model", {})
            self.tracker.end(run.info.run_id, "FINISHED")
        return run.info.run_id

    def _out(self, verb: str) -> Path:
        return self.workspace.out(verb)

    def with_settings(self, **changes: object) -> Shop:
        """The same with other settings of `register`, in params.yaml too."""
        group = self.params.register.model_copy(update=changes)
        path = self.workspace.params
        text = path.read_text().split("\nregister:")[0]
        path.write_text(f"{text}\nregister: {json.dumps(group.model_dump())}\n")
        return Shop(self.workspace, self.params.model_copy(update={"register": group}), self.tracker)

    @property
    def registry(self) -> Registry:
        """The registered model."""
        return Registry(self.tracker, self.params.register.name)

    def versions(self) -> list[int]:
        """Numbers of all versions."""
        found = self.tracker.client.search_model_versions(f"name = '{self.params.register.name}'")
        return sorted(int(each.version) for each in found)

    def aliases(self) -> dict[str, int]:
        """{alias: version}."""
        found = {name: self.registry.by_alias(name) for name in ("champion", "previous", "candidate")}
        return {name: each.number for name, each in found.items() if each}

    def ledger(self, kind: str = "") -> list[dict[str, Any]]:
        """Entries of the ledger, of one kind or all."""
        return [entry for entry in read_ledger(self.workspace) if kind in ("", entry["kind"])]

    def git(self, *arguments: str) -> str:
        """Run git."""
        return git(self.workspace.root, *arguments)

    def is_settled(self, version: Version) -> bool:
        """Say whether pin, weights and champion.dvc are all about this version, and nothing is pending."""
        pin = read_champion(self.workspace)
        with Repo(str(self.workspace.root)) as repo:
            is_versioned = not repo.status(targets=["champion.dvc"])
        model = model_digest(load_model(self.workspace.champion))
        files = {path.name for path in self.workspace.store.iterdir()}
        assert not files & {"ledger.jsonl.pending", "ledger.jsonl.part"}, files
        return (pin.version, pin.model, pin.batches, model, is_versioned) == (
            version.number,
            version.model,
            (BATCH,),
            version.model,
            True,
        )


def _model(seed: int):
    return build_model("nss.zoo:lenet", ("ant", "bee"), (1, 8, 8), seed)


def git(root: Path, *arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=root, check=True, capture_output=True, text=True).stdout


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with data and an empty tracking store, and no cycle yet."""
    root = tmp_path_factory.mktemp("template") / "workspace"
    (root / ".dvc").mkdir(parents=True)
    (root / ".dvc" / "config").write_text("[core]\n    analytics = false\n    autostage = false\n")
    (root / ".gitignore").write_text("/data\n/champion\n/artifacts\n/mlflow\n")
    (root / "dvc.yaml").write_text(STAGES)
    shutil.copy2(ROOT / "params.yaml", root / "params.yaml")
    (root / "data").mkdir()
    (root / "data" / "dataset.json").write_text("{}")
    unpin_champion(Workspace(root))
    git(root, "init", "-q")
    for name, value in (("user.name", "t"), ("user.email", "t@example.org"), ("commit.gpgsign", "false")):
        git(root, "config", name, value)
    with Repo(str(root)) as repo:
        repo.add([str(root / "data")])
    git(root, "add", "-A")
    git(root, "commit", "-q", "-m", "start")
    create_database(root / "mlflow" / "tracking.db", root.parent / "artifacts")
    return root


@pytest.fixture(scope="session")
def template_of_two(template: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same after two cycles, each of which made a champion by itself."""
    root = shutil.copytree(template, tmp_path_factory.mktemp("two") / "workspace")
    with pytest.MonkeyPatch.context() as patch:
        found = _open(root, patch).with_settings(promote="auto")
        for seed, accuracy in ((1, 0.9), (2, 0.95)):
            found.cycle(seed=seed, accuracy=accuracy)
            register.record(found.workspace, "")
            register.register(found.workspace, found.params, found.tracker, "")
    return root


@pytest.fixture
def shop(template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Shop:
    """A copy of it for one test; artifacts of all stores lie beside the template, under their run."""
    return _open(shutil.copytree(template, tmp_path / "workspace"), monkeypatch)


@pytest.fixture
def auto(shop: Shop) -> Shop:
    """The same, where what the gate promotes becomes the champion by itself."""
    return shop.with_settings(promote="auto")


@pytest.fixture
def two(template_of_two: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Shop:
    """A copy after two cycles: version 2 is the champion, version 1 was it before."""
    return _open(shutil.copytree(template_of_two, tmp_path / "workspace"), monkeypatch)


def _open(root: Path, patch: pytest.MonkeyPatch) -> Shop:
    patch.delenv("MLFLOW_TRACKING_URI", raising=False)
    patch.delenv("DVC_ROOT", raising=False)
    # DVC reads names of stages relative to the current folder.
    patch.chdir(root)
    workspace = Workspace(root)
    return Shop(workspace, load_params(workspace.params), open_tracker(workspace))


@pytest.fixture(scope="session")
def batch() -> str:
    """The batch that all models know."""
    return BATCH


@pytest.fixture(scope="session")
def run_git() -> Callable[..., str]:
    """Give the function that runs git in a folder."""
    return git
