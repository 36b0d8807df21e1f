"""A workspace that is moved or copied with its tracking store, and one whose store is not its own."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from mlflow.artifacts import download_artifacts
from sqlalchemy import create_engine, text

import nss
from tasks import tracking
from tasks.registry import Registry
from tasks.tracking import Tracker, follow, open_tracker
from tasks.workspace import Workspace

COLUMNS = (
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("logged_models", "artifact_location"),
    ("model_versions", "source"),
    ("model_versions", "storage_location"),
)


@pytest.fixture
def old(template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workspace:
    """A workspace, in a folder with a name that addresses quote, with a run, its logged model and a version."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.delenv("DVC_ROOT", raising=False)
    workspace = Workspace(tmp_path / "my wörk_%")
    workspace.store.mkdir(parents=True)
    shutil.copy2(template, workspace.store)
    execute(workspace, "UPDATE experiments SET artifact_location = :new WHERE name = 'nss'", new=place(workspace))
    tracker = open_tracker(workspace)
    run = tracker.open("base", {"stage": "base", "stage_key": "k"}, {})
    nss.save_model(nss.build_model("nss.zoo:lenet", ["a", "b"], (1, 16, 16), seed=0), tmp_path / "model")
    model_id = tracker.log_model(run.info.run_id, "base", tmp_path / "model", {})
    Registry(tracker, "m").add("key", run.info.run_id, model_id, {})
    return workspace


def execute(workspace: Workspace, words: str, **values: str) -> list[tuple]:
    with create_engine(f"sqlite:///{workspace.store / 'tracking.db'}").begin() as connection:
        found = connection.execute(text(words), values)
        return [tuple(row) for row in found] if found.returns_rows else []


def place(workspace: Workspace) -> str:
    return (workspace.store / "artifacts").as_uri()


def places(workspace: Workspace) -> list[str]:
    return [row[0] for table, column in COLUMNS for row in execute(workspace, f"SELECT {column} FROM {table}")]


def below(workspace: Workspace) -> list[bool]:
    """Of each place, whether it lies in the workspace; MLflow's own experiment, `Default`, is elsewhere."""
    return [each.startswith(place(workspace) + "/") or each == place(workspace) for each in places(workspace)[1:]]


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_moved_workspace_finds_its_models_and_leaves_nothing_at_its_old_place(old: Workspace, tmp_path: Path) -> None:
    before = places(old)
    new = Workspace(tmp_path / "else where")
    old.root.rename(new.root)
    tracker = open_tracker(new)
    assert places(new) == [each.replace(place(old), place(new)) for each in before]
    assert below(new) == [True] * 5
    version = tracker.client.get_model_version("m", "1")
    model = download_artifacts(artifact_uri=version.source, dst_path=str(tmp_path / "got"))
    assert files(Path(model)).items() > files(tmp_path / "model").items()
    tracker.client.log_text(version.run_id, "new", "note.md")
    assert (new.store / "artifacts" / version.run_id / "artifacts" / "note.md").read_text() == "new"
    assert not old.root.exists()


def test_a_copied_workspace_writes_into_its_own_artifacts_only(old: Workspace, tmp_path: Path) -> None:
    before, held = places(old), files(old.store / "artifacts")
    new = Workspace(shutil.copytree(old.root, tmp_path / "copy"))
    tracker = open_tracker(new)
    assert below(new) == [True] * 5
    (run,) = tracker.client.search_runs([tracker.experiment_id])
    for run_id in (run.info.run_id, tracker.open("other", {"stage": "other", "stage_key": "k"}, {}).info.run_id):
        tracker.client.log_text(run_id, "new", "note.md")
        assert (new.store / "artifacts" / run_id / "artifacts" / "note.md").read_text() == "new"
    assert files(old.store / "artifacts") == held
    assert sorted(Path(name).name for name in held) == ["MLmodel", "model.json", "model.safetensors"]
    assert places(old) == before


def test_a_workspace_that_stays_is_not_written_to(old: Workspace) -> None:
    database = old.store / "tracking.db"
    before = (database.read_bytes(), database.stat().st_mtime_ns)
    follow(database, old.store / "artifacts")
    assert (database.read_bytes(), database.stat().st_mtime_ns) == before


def test_all_places_are_written_or_none(old: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    new, before = Workspace(tmp_path / "new"), places(old)
    old.root.rename(new.root)
    real = tracking._relocate

    def dying(*arguments: Any) -> None:
        real(*arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(tracking, "_relocate", dying)
        with pytest.raises(KeyboardInterrupt):
            open_tracker(new)
    assert places(new) == before
    open_tracker(new)
    assert below(new) == [True] * 5


def test_columns_that_another_mlflow_does_not_have_are_left_out(
    old: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    new = Workspace(tmp_path / "new")
    old.root.rename(new.root)
    monkeypatch.setattr(tracking, "_PLACES", {**tracking._PLACES, "runs": ("artifact_uri", "x"), "nowhere": ("y",)})
    open_tracker(new)
    assert below(new) == [True] * 5


def test_artifacts_that_somebody_keeps_elsewhere_stay_there(old: Workspace) -> None:
    execute(old, "UPDATE experiments SET artifact_location = 'file:///big/disk/models' WHERE name = 'nss'")
    open_tracker(old)
    assert places(old)[1] == "file:///big/disk/models"


def test_a_store_that_is_named_is_left_as_it_is(
    old: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    new = Workspace(shutil.copytree(old.root, tmp_path / "copy"))
    before = places(new)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{new.store / 'tracking.db'}")
    open_tracker(new)
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    Tracker(f"sqlite:///{new.store / 'tracking.db'}", new.store / "artifacts")
    assert places(new) == before


@pytest.mark.parametrize("content", [None, b""])
def test_without_a_database_or_with_an_empty_one_there_is_nothing_to_do(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "tracking.db"
    if content is not None:
        path.write_bytes(content)
    follow(path, tmp_path / "artifacts")
    assert path.exists() == (content is not None)
