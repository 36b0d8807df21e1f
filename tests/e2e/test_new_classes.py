"""A champion that knows the digits 0 to 7 is pinned, and a batch of 8 and 9 arrives."""

from __future__ import annotations

import shutil
from pathlib import Path

import mlflow
import numpy as np
import pytest
import torch

from nss.base import train
from nss.data import Batch, Dataset, batch_digest, load_data, write_batch, write_description
from nss.model import Classifier, build_model, load_model, model_digest, save_model
from tasks.champion import Champion, pin_champion
from tasks.workspace import Workspace

STAGES = ["base", "profile", "slice", "triage", "restructure", "readapt", "extend", "evaluate", "gate"]
KNOWN = 8


def forget(root: Path, target: Path) -> Dataset:
    """Take 8 and 9 out of data/, where nothing is left of them, and write them to `target`. Returns the rest."""
    data = load_data(root / "data")
    images, labels = data.images.clone(), data.labels.clone()
    split = torch.cat([batch.split for batch in data.batches])
    new, old, classes = labels >= KNOWN, labels < KNOWN, data.classes[:KNOWN]
    np.savez(target, x=images[new].numpy(), y=labels[new].numpy())
    batch = Batch(batch_digest(images[old], labels[old], split[old], classes), images[old], labels[old], split[old])
    shutil.rmtree(root / "data")
    write_batch(root / "data", batch)
    write_description(root / "data", Dataset(classes, data.image_shape, (batch,)))
    return load_data(root / "data")


def champion_of(data: Dataset, root: Path, folder: Path) -> Classifier:
    """Train a model on the data and pin it."""
    model = build_model("nss.zoo:vgg_small", data.classes, data.image_shape, seed=0)
    train(model, data, epochs=3, seed=0)
    save_model(model, folder)
    digests = tuple(batch.digest for batch in data.batches)
    pin_champion(Workspace(root), Champion("digits", 1, model_digest(model), digests), folder)
    return model


@pytest.mark.soak
def test_new_digits_are_learned_and_the_old_logits_stay_bit_for_bit(copy, tmp_path: Path, monkeypatch) -> None:
    old = forget(copy.root, tmp_path / "new.npz")
    champion = champion_of(old, copy.root, tmp_path / "champion")
    # With a share of one nothing is condensed: the logits are those of the champion itself.
    copy.edit("params.yaml", "share: 0.85 #", "share: 1.0 #")
    copy.edit("params.yaml", "when: triage # always, never, or triage", "when: never #")
    for name in ("data", "champion"):
        copy.run("dvc", "add", name)
    copy.run("nss", "data", "add", str(tmp_path / "new.npz"), "--new-classes")
    assert set(copy.nss_run().outcomes.values()) == {"executed"}
    extended = load_model(copy.root / "artifacts" / "extend" / "model")
    assert extended.spec.classes == tuple(map(str, range(10)))
    images = old.split("test").images
    with torch.no_grad():
        assert torch.equal(extended(images)[:, :KNOWN], champion(images))
    scores, found = copy.json("artifacts/evaluate/metrics.json"), copy.json("artifacts/extend/metrics.json")
    assert scores["extended_told_accuracy"] == pytest.approx(scores["accuracy"])
    assert scores["extended_accuracy"] > scores["accuracy"] - 0.1
    assert scores["extended_new_accuracy"] > 0.7
    assert found["old_told_accuracy"] == pytest.approx(found["original_old_accuracy"])
    assert copy.json("artifacts/triage/metrics.json")["extend"] == 1
    assert copy.json("artifacts/triage/extend.json")["why"].startswith("new classes: 8 (")
    judged = {each["verb"]: each for each in copy.json("artifacts/gate/gate.json")["judgements"]}
    assert list(judged) == ["extend"]
    assert judged["extend"]["reasons"][-1]["text"] == "new classes: 8, 9"
    check_run(copy, monkeypatch)
    text = copy.run("nss", "run").out
    assert [line.split()[:2] for line in text.splitlines()[: len(STAGES)]] == [[name, "Cached"] for name in STAGES]
    words = f"{scores['extended_new_accuracy']:.2%} ({scores['extended_new_told_accuracy']:.2%} told old or new)"
    assert f"extended    by 8, 9: new images {words}" in text


def check_run(copy, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stage's newest run holds the model that learned and its pictures."""
    run = max((run for run in copy.runs("stage") if run.info.run_name == "extend"), key=lambda run: run.info.start_time)
    files = {file.path for file in copy.client.list_artifacts(run.info.run_id)}
    assert {"capacity.png", "class_change.png", "confusion_before.png", "confusion_after.png"} <= files
    assert len(copy.client.get_metric_history(run.info.run_id, "epoch_loss")) == 3
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{copy.root / 'mlflow' / 'tracking.db'}")
    (output,) = run.outputs.model_outputs
    logged = load_model(mlflow.artifacts.download_artifacts(f"models:/{output.model_id}"))
    assert model_digest(logged) == model_digest(load_model(copy.root / "artifacts" / "extend" / "model"))
