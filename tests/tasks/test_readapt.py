"""The stage `readapt`: what has arrived is followed, and what there is nothing to do for says so."""

from __future__ import annotations

import csv
import shutil
from dataclasses import replace

import pytest
import torch

from nss.data import load_data, write_description
from nss.errors import DataError, StageError
from nss.evaluate import evaluate
from nss.model import load_model, model_digest, save_model
from nss.profile import Profile
from nss.readapt import readapt
from nss.slice import SemanticSlices
from tasks.workspace import Workspace

TABLES = {
    "curve.csv": "epoch,new,old",
    "tuned.csv": "layer,tuned,total",
    "change.csv": "class,old_before,old_after,new_before,new_after",
}


@pytest.fixture(scope="module")
def followed(sliced, tmp_path_factory: pytest.TempPathFactory):
    """A batch has arrived in which bright is dark, and was followed; its digest."""
    root = shutil.copytree(sliced.workspace.root, tmp_path_factory.mktemp("followed") / "small")
    found = replace(sliced, workspace=Workspace(root))
    digest = found.add([0, 1, 2] * 60, 1, negative=True)
    found.run("readapt")
    return found, digest


def rows(small, name: str) -> list[dict[str, str]]:
    return list(csv.DictReader(small.read("readapt", name)))


def has_nothing_to_do(small, why: str) -> None:
    assert small.read("readapt", "metrics.json") == {"done": 0}
    assert small.read("readapt", "result.json") == {"done": False, "why": why}
    assert {name: small.read("readapt", name) for name in TABLES} == {name: [head] for name, head in TABLES.items()}
    assert not (small.workspace.out("readapt") / "model").exists()
    known = small.read("base", "source.json")["batches"]
    assert small.read("readapt", "source.json")["batches"] == known


def test_without_a_new_batch_there_is_nothing_to_do(small) -> None:
    small.run("readapt")
    has_nothing_to_do(small, "no batch has arrived since the model was made")


def test_never_is_never(small) -> None:
    small.add([0, 1, 2] * 60, 1, negative=True)
    small.run("readapt", when="never")
    has_nothing_to_do(small, "readapt.when is never")


def test_images_of_unknown_classes_alone_are_left_to_extend(small) -> None:
    small.add([3] * 24, 1, new_classes=("dog",))
    small.run("readapt")
    has_nothing_to_do(small, "the new images are all of classes that the model does not know: dog")


def test_new_images_that_are_all_held_out_are_not_trained_on(small) -> None:
    # A known image in the last two turns of six, unknown ones in the others.
    small.add([3] * 16 + [0, 1, 2, 0] * 2, 1, new_classes=("dog",))
    small.run("readapt")
    has_nothing_to_do(small, "the new batches have no image to train on, all are held out")


def test_what_arrived_is_followed_and_the_figures_are_those_of_the_written_model(followed) -> None:
    small, _ = followed
    metrics = small.read("readapt", "metrics.json")
    before = load_model(small.workspace.out("base") / "model")
    after = load_model(small.workspace.out("readapt") / "model")
    old, new = load_data(small.workspace.data).known_and_new(small.read("base", "source.json")["batches"])
    expected = {
        "original_new_accuracy": evaluate(before, new.split("val")).accuracy,
        "new_accuracy": evaluate(after, new.split("val")).accuracy,
        "original_old_accuracy": evaluate(before, old.split("val")).accuracy,
        "old_accuracy": evaluate(after, old.split("val")).accuracy,
    }
    assert {name: metrics[name] for name in expected} == pytest.approx(expected)
    assert metrics["new_accuracy"] > metrics["original_new_accuracy"] + 0.3
    assert metrics["old_accuracy"] > metrics["original_old_accuracy"] - 0.05
    assert metrics["done"] == 1
    assert metrics["images"] == len(new.split("train")) == 124


def test_shares_are_of_the_weights_that_differ(followed) -> None:
    small, _ = followed
    metrics = small.read("readapt", "metrics.json")
    models = [load_model(small.workspace.out(verb) / "model") for verb in ("base", "readapt")]
    pairs = [torch.cat([each.detach().flatten() for each in model.parameters()]) for model in models]
    assert metrics["moved_share"] == pytest.approx(float((pairs[0] != pairs[1]).double().mean()))
    assert 0 < metrics["moved_share"] <= metrics["trained_share"] <= small.params.readapt.share


def test_the_source_says_what_was_read_and_which_batches_the_new_model_knows(followed) -> None:
    small, digest = followed
    data, base = load_data(small.workspace.data), small.read("base", "source.json")
    assert small.read("readapt", "source.json") == {
        "data": base["data"],
        "model": model_digest(load_model(small.workspace.out("base") / "model")),
        "new": data.known_and_new(base["batches"])[1].digest,
        "batches": [*base["batches"], digest],
    }


def test_tables_hold_the_curve_the_tuned_neurons_and_the_change_of_each_class(followed) -> None:
    small, _ = followed
    result, metrics = small.read("readapt", "result.json"), small.read("readapt", "metrics.json")
    curve = rows(small, "curve.csv")
    assert [int(row["epoch"]) for row in curve] == list(range(len(curve)))
    assert float(curve[metrics["kept_epoch"]]["new"]) == pytest.approx(metrics["new_accuracy"])
    assert float(curve[0]["old"]) == pytest.approx(metrics["original_old_accuracy"])
    tuned = {row["layer"]: [int(row["tuned"]), int(row["total"])] for row in rows(small, "tuned.csv")}
    assert tuned == result["neurons"]
    change = rows(small, "change.csv")
    assert [row["class"] for row in change] == ["ant", "bee", "cow"]
    after = evaluate(
        load_model(small.workspace.out("readapt") / "model"),
        load_data(small.workspace.data).known_and_new(small.read("base", "source.json")["batches"])[1].split("val"),
    )
    assert {row["class"]: float(row["new_after"]) for row in change} == pytest.approx(after.per_class)


def test_the_result_says_why_it_stopped_and_holds_no_duration(followed) -> None:
    small, _ = followed
    result = small.read("readapt", "result.json")
    assert result["done"] is True
    assert "held-out new samples" in result["why"]
    assert result["left_to_extend"] == {}
    assert "seconds" not in result
    assert len(result["curve"]) == len(rows(small, "curve.csv"))


def test_the_same_inputs_give_the_same_bytes(followed) -> None:
    small, _ = followed
    before = small.files("readapt")
    small.run("readapt")
    assert small.files("readapt") == before


def test_the_stage_does_what_the_library_does_with_its_settings(followed) -> None:
    small, _ = followed
    out, settings = small.workspace.out, {"share": 0.1, "guard": 1.0, "epochs": 2, "replay": 0.5, "distil": 0.25}
    old, new = load_data(small.workspace.data).known_and_new(small.read("base", "source.json")["batches"])
    rest = {"learning_rate": 0.01, "batch_size": 32, "patience": 2, "seed": 5}
    expected = readapt(
        load_model(out("base") / "model"),
        SemanticSlices.load(out("slice") / "slices.json"),
        new,
        old,
        profile=Profile.load(out("profile") / "profile.safetensors"),
        **settings,
        **rest,
    )
    small.run("readapt", **settings, **rest)
    assert model_digest(load_model(out("readapt") / "model")) == model_digest(expected.model)
    small.run("readapt")


def test_a_batch_with_an_unknown_class_is_followed_in_part_and_stays_new(small) -> None:
    mixed = small.add([0, 1, 2, 3] * 45, 1, negative=True, new_classes=("dog",))
    plain = small.add([0, 1, 2] * 20, 2, negative=True)
    metrics = small.run("readapt", epochs=2)
    # Turns for training: 31 of 45, with three images of known classes each, and 11 of 15 with four.
    assert metrics["images"] == 31 * 3 + 11 * 4
    assert small.read("readapt", "result.json")["left_to_extend"] == {"dog": 45}
    known = small.read("base", "source.json")["batches"]
    assert small.read("readapt", "source.json")["batches"] == [*known, plain]
    assert mixed not in known
    assert load_model(small.workspace.out("readapt") / "model").spec.classes == ("ant", "bee", "cow")


def test_a_new_batch_without_validation_images_has_no_accuracy(small) -> None:
    small.add([0, 1, 2] * 5, 1, negative=True)
    metrics = small.run("readapt", epochs=1)
    assert metrics["images"] == 15
    assert metrics["new_accuracy"] is metrics["original_new_accuracy"] is None
    assert metrics["old_accuracy"] is not None
    assert {row["new_after"] for row in rows(small, "change.csv")} == {""}


def test_a_single_new_sample_is_followed_without_losing_the_old(small) -> None:
    small.add([1], 1, negative=True)
    metrics = small.run("readapt")
    assert metrics["images"] == 1
    assert metrics["old_accuracy"] > metrics["original_old_accuracy"] - 0.1


def test_slices_of_another_model_are_refused_and_nothing_is_written(small) -> None:
    model = load_model(small.workspace.out("base") / "model")
    with torch.no_grad():
        next(model.parameters()).add_(1)
    save_model(model, small.workspace.out("base") / "model")
    with pytest.raises(StageError, match=r"the stage 'slice' read another model .*\n(.*\n)*  fix: dvc repro"):
        small.run("readapt")
    assert not small.workspace.out("readapt").exists()


def test_a_known_batch_that_is_gone_is_named(small) -> None:
    digest = small.read("base", "source.json")["batches"][0]
    small.add([0, 1, 2], 1)
    data = load_data(small.workspace.data)
    write_description(small.workspace.data, data.known_and_new([digest])[1])
    with pytest.raises(DataError, match=f"lacks batches that are known\n  - {digest}"):
        small.run("readapt")
