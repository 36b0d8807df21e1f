"""What the gate adds to the runs of the models that it judged: same names for all, so that MLflow compares them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from nss.files import write_json
from tasks import journal
from tasks.journal_candidates import log_candidates
from tasks.params import load_params
from tasks.pipeline import Pipeline, StageKey
from tasks.tracking import Tracker
from tasks.workspace import Workspace

KEY = StageKey("a" * 32, "d" * 32, "c" * 32, "p" * 32)
NOTE = "mlflow.note.content"
PARAMS = load_params(Path(__file__).resolve().parents[2] / "params.yaml")
SIZE = {"parameters": 80, "macs": 800, "bytes": 8000}
HELD_OUT = {"confusion": [[3, 1], [0, 4]], "per_class": {"cat": 0.75, "dog": 1.0}}


@pytest.fixture(autouse=True)
def keys(monkeypatch: pytest.MonkeyPatch) -> dict[str, StageKey]:
    """Keys of the stages that have another one than KEY; the workspaces here are no DVC repositories."""
    others: dict[str, StageKey] = {}
    monkeypatch.setattr(Pipeline, "stage_key", lambda _, verb: others.get(verb, KEY))
    return others


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    """A cycle without a pinned champion: the base model and a smaller one are candidates."""
    workspace = Workspace(tmp_path / "workspace")
    write_json(workspace.out("base") / "model" / "model.json", {"classes": ["cat", "dog"]})
    write_json(workspace.out("evaluate") / "evaluation.json", {"model": HELD_OUT, "new": None})
    write_json(workspace.out("gate") / "metrics.json", {"promoted": 1, "candidates": 2})
    judge(workspace, {"restructure": 0.875, "base": 0.9375})
    return workspace


def judge(workspace: Workspace, accuracy: dict[str, float], verdict: str = "PROMOTE") -> None:
    """Write what evaluate and gate would: candidates of these accuracies, all with the same verdict."""
    reason = {"check": "benefit", "verdict": verdict, "text": f"{verdict} since it is so"}
    candidates = {
        verb: {"model": verb, "parent": None, "batches": [], "figures": {"accuracy": value, **SIZE}}
        for verb, value in accuracy.items()
    }
    judgements = [{"verb": verb, "verdict": verdict, "reasons": [reason]} for verb in accuracy]
    decision = {"verdict": verdict, "promoted": next(iter(accuracy)), "judgements": judgements}
    write_json(workspace.out("gate") / "gate.json", {**decision, "candidates": candidates})
    rows = [
        {"verb": verb, "per_class": {"cat": value, "dog": 1.0}, "champion_size": SIZE}
        for verb, value in accuracy.items()
    ]
    write_json(workspace.out("evaluate") / "candidates.json", rows)


def stage_run(tracker: Tracker, verb: str, key: StageKey = KEY) -> str:
    run_id = tracker.open(verb, {"stage": verb, "stage_key": key.digest}, {}).info.run_id
    tracker.end(run_id, "FINISHED")
    return run_id


def gate_run(tracker: Tracker, workspace: Workspace, parent: str | None = None, key: StageKey = KEY) -> str:
    return journal.backfill(tracker, workspace, PARAMS, "gate", key, parent)


def data_of(tracker: Tracker, run_id: str) -> Any:
    return tracker.client.get_run(run_id).data


def test_candidates_get_the_same_figures_under_the_same_names(tracker, workspace) -> None:
    runs = {verb: stage_run(tracker, verb) for verb in ("base", "restructure")}
    gate_run(tracker, workspace)
    for verb, accuracy in (("base", 0.9375), ("restructure", 0.875)):
        expected = {"accuracy": accuracy, "class/cat": accuracy, "class/dog": 1.0, **SIZE}
        assert data_of(tracker, runs[verb]).metrics == expected


def test_a_class_whose_name_no_metric_can_have_is_judged_all_the_same(tracker, workspace) -> None:
    run_id = stage_run(tracker, "restructure")
    judge(workspace, {"restructure": 0.875})
    path = workspace.out("evaluate") / "candidates.json"
    path.write_text(path.read_text().replace('"cat"', '"R&D"'))
    gate = gate_run(tracker, workspace)
    assert data_of(tracker, run_id).metrics["class/R_D"] == 0.875
    assert data_of(tracker, run_id).tags["nss.judged_by"] == gate


def test_candidates_carry_their_verdict_and_its_reasons(tracker, workspace) -> None:
    run_id = stage_run(tracker, "restructure")
    gate = gate_run(tracker, workspace)
    tags = data_of(tracker, run_id).tags
    assert (tags["nss.role"], tags["nss.verdict"], tags["nss.judged_by"]) == ("candidate", "PROMOTE", gate)
    assert tags[NOTE].splitlines() == [
        "**PROMOTE**: PROMOTE since it is so",
        "",
        "- PROMOTE, benefit: PROMOTE since it is so",
    ]


def test_logging_again_changes_nothing(tracker, workspace) -> None:
    run_id = stage_run(tracker, "restructure")
    first = gate_run(tracker, workspace)
    before = tracker.client.get_metric_history(run_id, "accuracy")
    assert gate_run(tracker, workspace) == first
    after = tracker.client.get_metric_history(run_id, "accuracy")
    assert [(each.timestamp, each.value) for each in before] == [(each.timestamp, each.value) for each in after]
    assert len(after) == 1


def test_the_newest_judgement_counts_even_when_an_older_one_comes_back(tracker, workspace) -> None:
    """Settings of the gate are changed, and changed back: its first run is found finished, and counts again."""
    run_id = stage_run(tracker, "restructure")
    for accuracy, digest in ((0.875, "a"), (0.5, "b"), (0.875, "a")):
        judge(workspace, {"restructure": accuracy}, "PROMOTE" if digest == "a" else "REJECT")
        gate = gate_run(tracker, workspace, key=StageKey(digest * 32, "d", "c", "p"))
        found = data_of(tracker, run_id)
        assert (found.metrics["accuracy"], found.tags["nss.judged_by"]) == (accuracy, gate)
        assert found.tags["nss.verdict"] == ("PROMOTE" if digest == "a" else "REJECT")


def test_a_run_of_other_inputs_is_left_alone(tracker, workspace, keys) -> None:
    """The stage ran with other settings since; what was judged is the older run."""
    keys["restructure"] = StageKey("0" * 32, "d", "c", "p")
    judged = stage_run(tracker, "restructure", keys["restructure"])
    newer = stage_run(tracker, "restructure", StageKey("1" * 32, "d", "c", "p"))
    gate_run(tracker, workspace)
    assert data_of(tracker, judged).metrics["accuracy"] == 0.875
    assert "accuracy" not in data_of(tracker, newer).metrics


def test_a_run_that_is_missing_yet_is_made_up_for_later(tracker, workspace) -> None:
    """The tracking store was away while the candidate was made."""
    gate_run(tracker, workspace)
    run_id = stage_run(tracker, "restructure")
    gate_run(tracker, workspace)
    assert data_of(tracker, run_id).metrics["accuracy"] == 0.875


def test_logging_that_broke_off_is_done_again(tracker, workspace, monkeypatch) -> None:
    run_id = stage_run(tracker, "restructure")
    gate = tracker.client.get_run(stage_run(tracker, "gate"))
    log_batch = tracker.client.log_batch

    def lose_tags(run_id: str, metrics: Any, params: Any, tags: Any) -> None:
        if tags:
            raise ConnectionError("the store is away")
        log_batch(run_id, metrics, params, tags)

    with monkeypatch.context() as patch:
        patch.setattr(tracker.client, "log_batch", lose_tags)
        with pytest.raises(ConnectionError):
            log_candidates(tracker, workspace, gate)
    log_candidates(tracker, workspace, gate)
    found = data_of(tracker, run_id)
    assert (found.metrics["accuracy"], found.tags["nss.verdict"]) == (0.875, "PROMOTE")


def test_the_pinned_champion_stands_beside_its_candidates_with_all_images_of_its_classes(tracker, workspace) -> None:
    new = {"confusion": [[0, 0], [2, 6]], "per_class": {"dog": 0.75}}
    write_json(workspace.out("evaluate") / "evaluation.json", {"model": HELD_OUT, "new": new})
    judge(workspace, {"readapt": 0.75})
    run_id = stage_run(tracker, "base")
    gate_run(tracker, workspace)
    found = data_of(tracker, run_id)
    # 3 of 4 cats; 4 of 4 known dogs and 6 of 8 new ones.
    figures = {"images": 16, "accuracy": 13 / 16, "worst_class_accuracy": 0.75}
    assert found.metrics == {**figures, "class/cat": 0.75, "class/dog": 10 / 12, **SIZE}
    assert found.tags["nss.role"] == "champion"
    assert "nss.verdict" not in found.tags


def test_more_classes_than_a_store_takes_at_once_are_all_logged(tracker, workspace) -> None:
    run_id = stage_run(tracker, "restructure")
    names = [f"class-{place}" for place in range(1100)]
    rows = [
        {"verb": verb, "per_class": dict.fromkeys(names, 0.5), "champion_size": {}} for verb in ("restructure", "base")
    ]
    write_json(workspace.out("evaluate") / "candidates.json", rows)
    gate_run(tracker, workspace)
    found = data_of(tracker, run_id).metrics
    assert {f"class/{name}" for name in names} <= set(found)


def test_the_cycle_is_described_by_its_verdict(tracker, workspace) -> None:
    cycle = tracker.client.create_run(tracker.experiment_id, run_name="cycle").info.run_id
    gate = gate_run(tracker, workspace, parent=cycle)
    words = [
        "**PROMOTE**: restructure is promoted",
        "restructure: PROMOTE, PROMOTE since it is so",
        "base: PROMOTE, PROMOTE since it is so",
    ]
    assert data_of(tracker, cycle).tags[NOTE] == "\n\n".join(words)
    assert data_of(tracker, gate).tags[NOTE].endswith("\n\n".join(words))


def test_a_cycle_that_finds_all_cached_is_described_too(tracker, workspace) -> None:
    gate_run(tracker, workspace)
    cycle = tracker.client.create_run(tracker.experiment_id, run_name="cycle").info.run_id
    gate_run(tracker, workspace, parent=cycle)
    assert data_of(tracker, cycle).tags[NOTE].startswith("**PROMOTE**")
