"""The runs of stages, made from outputs that were written by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from nss.files import write_json
from nss.model import build_model, save_model
from nss.slice import SemanticSlice, SemanticSlices
from tasks import journal
from tasks.champion import unpin_champion
from tasks.params import STAGES, load_params
from tasks.pipeline import StageKey
from tasks.tables import write_csv
from tasks.tracking import Tracker
from tasks.workspace import Workspace

KEY = StageKey("a" * 32, "d" * 32, "c" * 32, "p" * 32)
MODEL = build_model("nss.zoo:lenet", ("a", "b", "c"), (1, 8, 8), seed=0)
PARAMS = load_params(Path(__file__).resolve().parents[2] / "params.yaml")


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    """Outputs of all stages, nothing to restructure or follow: three classes, two slices, one layer of four neurons."""
    workspace = Workspace(tmp_path / "workspace")
    base, profile, cut, triage, restructure, readapt, extend, evaluate, gate = (workspace.out(verb) for verb in STAGES)
    unpin_champion(workspace)
    write_json(base / "metrics.json", {"loss": 0.1, "val_accuracy": 0.75})
    write_csv(
        base / "history.csv",
        ["epoch", "loss", "train_accuracy", "val_accuracy"],
        [(1, 1.0, 0.5, 0.5), (2, 0.1, 1, 0.75)],
    )
    save_model(MODEL, base / "model")
    write_json(profile / "metrics.json", {"neurons": 4})
    write_json(triage / "metrics.json", {"restructure": 1, "readapt": 0, "extend": 0})
    over = {"macs": {"found": 12, "allowed": 10}}
    write_json(triage / "restructure.json", {"needed": True, "why": "macs 12 (10 allowed)", "evidence": over})
    for verb in ("readapt", "extend"):
        write_json(triage / f"{verb}.json", {"needed": False, "why": "no new images", "evidence": {}})
    for folder in (restructure, readapt, extend):
        write_json(folder / "metrics.json", {"done": 0})
    masks = [torch.tensor([True, True, False, False]), torch.tensor([False, True, True, True])]
    parts = (
        SemanticSlice("slice-0", ("a", "c"), (0, 2), {"conv": masks[0]}),
        SemanticSlice("slice-1", ("b",), (1,), {"conv": masks[1]}),
    )
    tree = np.array([[0, 2, 0.2, 2], [1, 3, 0.6, 3]])
    SemanticSlices(("a", "b", "c"), parts, np.full((3, 3), 0.5), tree).save(cut / "slices.json")
    write_csv(
        cut / "neurons.csv", ["slice", "layer", "kept", "total"], [("slice-0", "conv", 2, 4), ("slice-1", "conv", 3, 4)]
    )
    scores = [
        {"name": "slice-0", "categories": ["a", "c"], "recall": 0.9, "false_positive_rate": 0.2, "parameters": 7},
        {"name": "slice-1", "categories": ["b"], "recall": 0.8, "false_positive_rate": 0.1, "parameters": 9},
    ]
    write_json(cut / "slices_val.json", {"vote_accuracy": 0.7, "told_accuracy": 0.9, "slices": scores})
    write_json(cut / "metrics.json", {"slices": 2})
    for part in parts:
        save_model(MODEL, cut / "models" / part.name)
    write_json(evaluate / "metrics.json", {"accuracy": 0.5, "worst_accuracy": 0.0})
    write_csv(evaluate / "per_class.csv", ["class", "accuracy"], [("a", 1.0), ("b", 0.0), ("c", 0.5)])
    write_csv(evaluate / "confusion.csv", ["actual", "predicted"], [("a", "a"), ("b", "c"), ("c", "c"), ("c", "a")])
    write_csv(evaluate / "differences.csv", ["candidate", "difference", "low", "high", "p_value", "images"], [])
    write_json(evaluate / "candidates.json", [])
    write_json(gate / "metrics.json", {"promoted": 0, "candidates": 0})
    write_json(gate / "gate.json", {"verdict": "HOLD", "promoted": None, "judgements": [], "candidates": {}})
    return workspace


def fill(tracker: Tracker, workspace: Workspace, verb: str, parent: str | None = None) -> str:
    return journal.backfill(tracker, workspace, PARAMS, verb, KEY, parent)


def runs(tracker: Tracker) -> list:
    return list(tracker.client.search_runs([tracker.experiment_id]))


def test_a_stages_run_is_made_up_from_disk_with_parameters_metrics_tags_and_tables(tracker, workspace) -> None:
    run = tracker.client.get_run(fill(tracker, workspace, "base", "cycle-id"))
    assert run.info.status == "FINISHED"
    assert (run.data.params["seed"], run.data.params["factory"]) == ("0", "nss.zoo:vgg_small")
    assert run.data.metrics["val_accuracy"] == 0.75
    expected = {
        "mlflow.parentRunId": "cycle-id",
        "nss.kind": "stage",
        "nss.stage": "base",
        "nss.stage_key": KEY.digest,
        "nss.params_digest": KEY.params,
        "nss.code_digest": KEY.code,
        "nss.data_md5": "unknown",
        "nss.git_sha": "unknown",
    }
    assert expected.items() <= run.data.tags.items()
    losses = tracker.client.get_metric_history(run.info.run_id, "epoch_loss")
    assert [(each.step, each.value) for each in losses] == [(1, 1.0), (2, 0.1)]
    files = {file.path for file in tracker.client.list_artifacts(run.info.run_id)}
    assert files == {"metrics.json", "history.csv", "training.png"}


@pytest.mark.parametrize("verb", STAGES)
def test_making_a_run_up_twice_makes_one(tracker, workspace, verb: str) -> None:
    first = fill(tracker, workspace, verb)
    count = len(runs(tracker))
    assert fill(tracker, workspace, verb) == first
    assert len(runs(tracker)) == count == (3 if verb == "slice" else 1)


def test_each_slice_has_a_run_under_the_stages_with_its_figures_and_its_model(tracker, workspace) -> None:
    parent = fill(tracker, workspace, "slice")
    run = tracker.find(slice="slice-0", parent_key=KEY.digest)
    assert run.info.run_name == "slice-0"
    assert run.data.tags["mlflow.parentRunId"] == parent
    assert run.data.params == {"categories": "a, c"}
    assert run.data.metrics == {
        "neurons_kept": 2,
        "neurons_total": 4,
        "kept/conv": 2,
        "recall": 0.9,
        "false_positive_rate": 0.2,
        "parameters": 7,
    }
    (output,) = run.outputs.model_outputs
    model = tracker.client.get_logged_model(output.model_id)
    assert (model.name, str(model.status), model.params["categories"]) == ("slice-0", "READY", "a, c")


def test_a_slices_run_is_never_taken_for_its_stages(tracker, workspace) -> None:
    parent = fill(tracker, workspace, "slice")
    assert tracker.find(stage="slice", stage_key=KEY.digest).info.run_id == parent


def test_logging_that_broke_off_is_completed_without_a_second_run(tracker, workspace, monkeypatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(tracker, "log_model", full)
        with pytest.raises(OSError, match="full"):
            fill(tracker, workspace, "slice")
    assert sorted(run.info.status for run in runs(tracker)) == ["RUNNING", "RUNNING"]
    fill(tracker, workspace, "slice")
    assert [run.info.status for run in runs(tracker)] == ["FINISHED"] * 3


@pytest.fixture
def followed(workspace: Workspace) -> Workspace:
    """Two epochs of following, the first kept; class c has no new images."""
    folder = workspace.out("readapt")
    write_json(folder / "metrics.json", {"done": 1, "moved_share": 0.1, "new_accuracy": None, "kept_epoch": 1})
    write_json(folder / "result.json", {"done": True, "why": "all epochs done"})
    save_model(MODEL, folder / "model")
    write_csv(folder / "curve.csv", ["epoch", "new", "old"], [(0, 0.25, 0.75), (1, 0.5, 0.625), (2, 0.5, 0.5)])
    write_csv(folder / "tuned.csv", ["layer", "tuned", "total"], [("conv", 2, 4), ("head", 0, 3)])
    rows = [("a", 1.0, 0.75, 0.0, 0.5), ("b", 0.5, 0.5, 0.25, 0.125), ("c", 0.5, 1.0, None, None)]
    write_csv(folder / "change.csv", ["class", "old_before", "old_after", "new_before", "new_after"], rows)
    return workspace


def test_following_is_logged_over_steps_from_the_original_on(tracker, followed) -> None:
    run = tracker.client.get_run(fill(tracker, followed, "readapt"))
    for name, values in (("epoch_new", [0.25, 0.5, 0.5]), ("epoch_old", [0.75, 0.625, 0.5])):
        points = tracker.client.get_metric_history(run.info.run_id, name)
        assert [(each.step, each.value) for each in points] == list(enumerate(values))
    assert (run.data.metrics["moved_share"], run.data.params["guard"]) == (0.1, "1.0")
    assert "new_accuracy" not in run.data.metrics


def test_following_has_the_change_of_each_class_that_has_images_and_the_tuned_neurons(tracker, followed) -> None:
    run = tracker.client.get_run(fill(tracker, followed, "readapt"))
    found = {name: value for name, value in run.data.metrics.items() if "/" in name}
    assert found == {
        "val_class_change_old/a": -0.25,
        "val_class_change_old/b": 0,
        "val_class_change_old/c": 0.5,
        "val_class_change_new/a": 0.5,
        "val_class_change_new/b": -0.125,
        "tuned/conv": 2,
        "tuned/head": 0,
    }


def test_following_has_its_model_pictures_and_tables(tracker, followed) -> None:
    run = tracker.client.get_run(fill(tracker, followed, "readapt"))
    (output,) = run.outputs.model_outputs
    assert tracker.client.get_logged_model(output.model_id).name == "readapted"
    files = {file.path for file in tracker.client.list_artifacts(run.info.run_id)}
    pictures = {"learning_curve.png", "tuned_neurons.png", "class_change_old.png", "class_change_new.png"}
    assert files >= pictures | {"curve.csv", "tuned.csv", "change.csv", "result.json", "metrics.json"}


def test_without_held_out_images_following_is_logged_all_the_same(tracker, followed) -> None:
    folder = followed.out("readapt")
    write_csv(folder / "curve.csv", ["epoch", "new", "old"], [(0, None, None), (1, None, None)])
    rows = [(name, None, None, None, None) for name in "abc"]
    write_csv(folder / "change.csv", ["class", "old_before", "old_after", "new_before", "new_after"], rows)
    run = tracker.client.get_run(fill(tracker, followed, "readapt"))
    assert run.info.status == "FINISHED"
    files = {file.path for file in tracker.client.list_artifacts(run.info.run_id)}
    assert {name for name in files if name.endswith(".png")} == {"learning_curve.png", "tuned_neurons.png"}


@pytest.fixture
def grown(workspace: Workspace) -> Workspace:
    """Two epochs of learning a class d; class c has no held-out images."""
    folder = workspace.out("extend")
    write_json(folder / "metrics.json", {"done": 1, "new_accuracy": 0.5, "old_accuracy": None})
    write_json(folder / "result.json", {"done": True, "why": "new classes have arrived: d"})
    save_model(MODEL, folder / "model")
    write_csv(folder / "curve.csv", ["epoch", "loss", "new"], [(1, 0.75, 0.25), (2, 0.5, 0.5)])
    rows = [("a", 1.0, 0.75), ("b", 0.5, 0.625), ("c", None, None), ("d", None, 0.5)]
    write_csv(folder / "change.csv", ["class", "before", "after"], rows)
    room = [("conv", 4, 2, 1, 1, 0), ("head", 8, 6, 4, 0, 2)]
    write_csv(folder / "capacity.csv", ["layer", "total", "old", "new", "free", "widened"], room)
    for when, answer in (("before", "a"), ("after", "d")):
        write_csv(folder / f"confusion_{when}.csv", ["actual", "predicted"], [("a", "a"), ("d", answer)])
    return workspace


def test_learning_is_logged_over_steps(tracker, grown) -> None:
    run = tracker.client.get_run(fill(tracker, grown, "extend"))
    for name, values in (("epoch_loss", [0.75, 0.5]), ("epoch_new", [0.25, 0.5])):
        points = tracker.client.get_metric_history(run.info.run_id, name)
        assert [(each.step, each.value) for each in points] == list(enumerate(values, 1))
    assert (run.data.metrics["new_accuracy"], run.data.params["replay"]) == (0.5, "0.0")
    assert "old_accuracy" not in run.data.metrics


def test_learning_has_what_was_forgotten_by_class_and_the_room_by_layer(tracker, grown) -> None:
    run = tracker.client.get_run(fill(tracker, grown, "extend"))
    assert {name: value for name, value in run.data.metrics.items() if "/" in name} == {
        "val_class_change/a": -0.25,
        "val_class_change/b": 0.125,
        "val_class/a": 0.75,
        "val_class/b": 0.625,
        "val_class/d": 0.5,
        "used/conv": 3,
        "used/head": 10,
        "free/conv": 1,
        "free/head": 0,
    }


def test_learning_has_its_model_pictures_and_tables(tracker, grown) -> None:
    run = tracker.client.get_run(fill(tracker, grown, "extend"))
    (output,) = run.outputs.model_outputs
    assert tracker.client.get_logged_model(output.model_id).name == "extended"
    files = {file.path for file in tracker.client.list_artifacts(run.info.run_id)}
    pictures = {"learning_curve", "capacity", "class_change", "confusion_before", "confusion_after"}
    assert {name for name in files if name.endswith(".png")} == {f"{name}.png" for name in pictures}
    assert files >= {"curve.csv", "change.csv", "capacity.csv", "confusion_before.csv", "confusion_after.csv"}


def test_without_held_out_images_learning_is_logged_all_the_same(tracker, grown) -> None:
    folder = grown.out("extend")
    write_csv(folder / "curve.csv", ["epoch", "loss", "new"], [(1, 0.75, None)])
    write_csv(folder / "change.csv", ["class", "before", "after"], [(name, None, None) for name in "abcd"])
    for when in ("before", "after"):
        write_csv(folder / f"confusion_{when}.csv", ["actual", "predicted"], [])
    run = tracker.client.get_run(fill(tracker, grown, "extend"))
    assert run.info.status == "FINISHED"
    files = {file.path for file in tracker.client.list_artifacts(run.info.run_id)}
    assert {name for name in files if name.endswith(".png")} == {"learning_curve.png", "capacity.png"}


@pytest.mark.parametrize("verb", ["readapt", "extend"])
def test_a_stage_that_had_nothing_to_do_has_no_model_and_no_pictures(tracker, workspace, verb: str) -> None:
    run = tracker.client.get_run(fill(tracker, workspace, verb))
    assert (run.info.status, run.data.metrics) == ("FINISHED", {"done": 0})
    assert not (run.outputs and run.outputs.model_outputs)
    assert {file.path for file in tracker.client.list_artifacts(run.info.run_id)} == {"metrics.json"}


@pytest.mark.parametrize("verb", ["restructure", "readapt", "extend"])
def test_what_a_stage_measured_on_other_images_than_the_gate_has_another_name(tracker, workspace, verb: str) -> None:
    write_json(workspace.out(verb) / "metrics.json", {"done": 0, "accuracy": 0.5, "images": 40, "macs": 7})
    metrics = tracker.client.get_run(fill(tracker, workspace, verb)).data.metrics
    assert metrics == {"done": 0, "val_accuracy": 0.5, "train_images": 40, "macs": 7}


def test_runs_are_described_in_words(tracker, workspace) -> None:
    write_json(workspace.out("extend") / "result.json", {"done": False, "why": "no new classes"})
    notes = {
        verb: tracker.client.get_run(fill(tracker, workspace, verb)).data.tags["mlflow.note.content"].split("\n\n")
        for verb in STAGES
    }
    assert notes["extend"] == ["The model extended by new classes.", "Nothing to do: no new classes"]
    assert notes["triage"][1:] == [
        "restructure: macs 12 (10 allowed)",
        "readapt: not needed: no new images",
        "extend: not needed: no new images",
    ]
    assert notes["gate"][1:] == ["**HOLD**: no candidate is promoted"]
    assert len({lines[0] for lines in notes.values()}) == len(STAGES)


def test_the_run_of_a_pinned_base_model_names_the_champion(tracker, workspace) -> None:
    write_json(workspace.pin, {"name": "digits", "version": 3, "model": "m", "batches": ["b"]})
    run = tracker.client.get_run(fill(tracker, workspace, "base"))
    assert run.data.tags["nss.champion"] == "digits version 3"


def test_confusion_and_class_accuracies_of_the_evaluation_are_logged(tracker, workspace) -> None:
    run = tracker.client.get_run(fill(tracker, workspace, "evaluate"))
    assert {name: run.data.metrics[f"class/{name}"] for name in "abc"} == {"a": 1, "b": 0, "c": 0.5}
    files = {file.path for file in tracker.client.list_artifacts(run.info.run_id)}
    assert {"confusion.png", "class_accuracy.png", "per_class.csv"} <= files
    assert "differences.png" not in files


def test_candidates_are_drawn_against_the_champion(tracker, workspace) -> None:
    header = ["candidate", "difference", "low", "high", "p_value", "images"]
    rows = [("readapt, known images", -0.01, -0.03, 0.01, 0.5, 100), ("readapt, new images", 0.3, 0.2, 0.4, 1e-9, 50)]
    write_csv(workspace.out("evaluate") / "differences.csv", header, rows)
    run_id = fill(tracker, workspace, "evaluate")
    assert "differences.png" in {file.path for file in tracker.client.list_artifacts(run_id)}


def test_triage_is_logged_with_what_is_needed_and_every_number_that_says_so(tracker, workspace) -> None:
    drift = {"found": True, "effect": 0.25, "p_value": 0.001}
    evidence = {"new_images": 40, "drift": drift, "accuracy": {"drop": None, "found_lower": False}}
    finding = {"needed": True, "why": "features of the new images have drifted", "evidence": evidence}
    write_json(workspace.out("triage") / "readapt.json", finding)
    run = tracker.client.get_run(fill(tracker, workspace, "triage"))
    assert run.data.tags["nss.needed"] == "readapt, restructure"
    assert run.data.metrics == {
        "restructure": 1,
        "readapt": 0,
        "extend": 0,
        "restructure/macs/found": 12,
        "restructure/macs/allowed": 10,
        "readapt/new_images": 40,
        "readapt/drift/found": 1,
        "readapt/drift/effect": 0.25,
        "readapt/drift/p_value": 0.001,
        "readapt/accuracy/found_lower": 0,
    }
    settings = {name: run.data.params[name] for name in ("alpha", "budgets.macs", "budgets.bytes")}
    assert settings == {"alpha": "0.05", "budgets.macs": "1500000.0", "budgets.bytes": "None"}
    files = {file.path for file in tracker.client.list_artifacts(run.info.run_id)}
    assert {"restructure.json", "readapt.json", "extend.json"} <= files


def test_that_nothing_is_needed_is_said(tracker, workspace) -> None:
    finding = {"needed": False, "why": "within its budgets", "evidence": {}}
    write_json(workspace.out("triage") / "restructure.json", finding)
    assert tracker.client.get_run(fill(tracker, workspace, "triage")).data.tags["nss.needed"] == "nothing"


def test_the_gate_is_logged_with_verdicts_figures_and_reasons_in_words(tracker, workspace) -> None:
    reasons = [
        {"check": "accuracy", "verdict": "PROMOTE", "text": "accuracy 0.900 (0.5 asked for)"},
        {"check": "size", "verdict": "REJECT", "text": "macs 100 -> 99 (a saving of 0.05 asked for)"},
    ]
    decision = {
        "verdict": "PROMOTE",
        "promoted": "base",
        "judgements": [
            {"verb": "restructure", "verdict": "REJECT", "reasons": reasons},
            {"verb": "base", "verdict": "PROMOTE", "reasons": reasons[:1]},
        ],
        "candidates": {
            "restructure": {"model": "m2", "parent": "m1", "batches": ["b"], "figures": {"accuracy": 0.9}},
            "base": {"model": "m1", "parent": None, "batches": ["b"], "figures": {"accuracy": 0.95, "macs": 100}},
        },
    }
    write_json(workspace.out("gate") / "gate.json", decision)
    judged = [{"verb": verb, "per_class": None, "champion_size": {}} for verb in ("restructure", "base")]
    write_json(workspace.out("evaluate") / "candidates.json", judged)
    run = tracker.client.get_run(fill(tracker, workspace, "gate"))
    assert {name: value for name, value in run.data.tags.items() if "verdict" in name or "promoted" in name} == {
        "nss.verdict": "PROMOTE",
        "nss.promoted": "base",
        "nss.verdict.restructure": "REJECT",
        "nss.verdict.base": "PROMOTE",
    }
    figures = {name: value for name, value in run.data.metrics.items() if "/" in name}
    assert figures == {"restructure/accuracy": 0.9, "base/accuracy": 0.95, "base/macs": 100}
    assert tracker.client.list_artifacts(run.info.run_id, "reasons.md") == []
    folder = tracker.client.download_artifacts(run.info.run_id, "reasons.md")
    assert "- REJECT, size: macs 100 -> 99" in Path(folder).read_text(encoding="utf-8")


def test_without_a_promotion_the_gates_run_says_nothing_was(tracker, workspace) -> None:
    tags = tracker.client.get_run(fill(tracker, workspace, "gate")).data.tags
    assert (tags["nss.verdict"], tags["nss.promoted"]) == ("HOLD", "nothing")
