"""A champion is pinned, and a batch arrives that it does not know."""

from __future__ import annotations

import shutil
from pathlib import Path

import mlflow
import numpy as np
import pytest

from nss.data import load_data
from nss.drift import shifted
from nss.model import load_model, model_digest
from tasks.champion import Champion, pin_champion
from tasks.workspace import Workspace

STAGES = ["base", "profile", "slice", "triage", "restructure", "readapt", "extend", "evaluate", "gate"]
CACHED = dict.fromkeys(STAGES, "cached")


def pin(root: Path) -> None:
    """Pin the model that was trained, with all the data that it was trained on."""
    folder = root / "artifacts" / "base" / "model"
    batches = tuple(batch.digest for batch in load_data(root / "data").batches)
    pin_champion(Workspace(root), Champion("digits", 1, model_digest(load_model(folder)), batches), folder)


def drifted_digits(root: Path, target: Path) -> Path:
    """Write digits under bad light; the model was trained on none of them."""
    unseen = load_data(root / "data").split("val")
    np.savez(target, x=shifted(unseen.images, "brightness", 4, seed=0).numpy(), y=unseen.labels.numpy())
    return target


def test_without_a_new_batch_the_stage_says_so_in_seconds(copy) -> None:
    ended = copy.run("nss", "stage", "readapt")
    assert copy.json("artifacts/readapt/metrics.json") == {"done": 0}
    why = copy.json("artifacts/readapt/result.json")["why"]
    assert why == "triage: no new images"
    assert ended.cpu < 20
    assert copy.run("dvc", "status").out.strip() == "Data and pipelines are up to date."


@pytest.mark.soak
def test_a_drifted_batch_is_followed_and_old_accuracy_holds(copy, tmp_path: Path, monkeypatch) -> None:
    pin(copy.root)
    copy.run("dvc", "add", "champion")
    copy.run("nss", "data", "add", str(drifted_digits(copy.root, tmp_path / "dark.npz")))
    ended = copy.nss_run()
    # Profile, slices and the smaller model are of what the champion knows, and that is what it was.
    again = ("base", "triage", "readapt", "extend", "evaluate", "gate")
    assert ended.outcomes == CACHED | dict.fromkeys(again, "executed")
    assert copy.json("artifacts/triage/metrics.json") == {"restructure": 1, "readapt": 1, "extend": 0}
    assert "features of the new images have drifted" in copy.json("artifacts/triage/readapt.json")["why"]
    decision = copy.json("artifacts/gate/gate.json")
    assert decision["promoted"] == "readapt", decision
    assert decision["candidates"]["readapt"]["batches"] == [
        each.digest for each in load_data(copy.root / "data").batches
    ]
    scores = copy.json("artifacts/evaluate/metrics.json")
    assert scores["readapted_new_accuracy"] > scores["new_accuracy"] + 0.3
    assert scores["readapted_accuracy"] > scores["accuracy"] - 0.02
    assert copy.json("artifacts/readapt/metrics.json")["moved_share"] <= 0.2
    check_runs(copy, monkeypatch)
    assert copy.run("dvc", "status").out.strip() == "Data and pipelines are up to date."
    copy.run("dvc", "plots", "show")
    shutil.rmtree(copy.root / "champion")
    text = copy.run("nss", "run").out
    assert (copy.root / "champion" / "model.json").is_file()
    assert [line.split()[1] for line in text.splitlines()[: len(STAGES)]] == ["Cached"] * len(STAGES)
    words = f"new images {scores['new_accuracy']:.2%} -> {scores['readapted_new_accuracy']:.2%}, old images"
    assert words in text


def check_runs(copy, monkeypatch: pytest.MonkeyPatch) -> None:
    """The newest runs name the champion, and hold the model that followed and its pictures."""
    newest = {}
    for run in sorted(copy.runs("stage"), key=lambda run: run.info.start_time):
        newest[run.info.run_name] = run
    assert newest["base"].data.tags["nss.champion"] == "digits version 1"
    files = {file.path for file in copy.client.list_artifacts(newest["readapt"].info.run_id)}
    assert {"learning_curve.png", "tuned_neurons.png", "class_change_old.png", "class_change_new.png"} <= files
    assert len(copy.client.get_metric_history(newest["readapt"].info.run_id, "epoch_old")) > 1
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{copy.root / 'mlflow' / 'tracking.db'}")
    (output,) = newest["readapt"].outputs.model_outputs
    logged = load_model(mlflow.artifacts.download_artifacts(f"models:/{output.model_id}"))
    assert model_digest(logged) == model_digest(load_model(copy.root / "artifacts" / "readapt" / "model"))
