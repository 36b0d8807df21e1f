"""Which experiment is logged to."""

from __future__ import annotations

from pathlib import Path

import pytest

from tasks.tracking import open_tracker
from tasks.workspace import Workspace


@pytest.mark.parametrize(("name", "expected"), [(None, "nss"), ("", "nss"), ("pets-team", "pets-team")])
def test_the_experiment_is_that_of_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str | None, expected: str
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'store.db'}")
    monkeypatch.delenv("MLFLOW_EXPERIMENT_NAME", raising=False)
    if name is not None:
        monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", name)
    tracker = open_tracker(Workspace(tmp_path / "pets"))
    assert tracker.client.get_experiment(tracker.experiment_id).name == expected


def test_an_experiment_that_is_asked_for_is_the_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'store.db'}")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "pets-team")
    tracker = open_tracker(Workspace(tmp_path / "pets"), "bench")
    assert tracker.client.get_experiment(tracker.experiment_id).name == "bench"
