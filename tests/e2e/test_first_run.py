"""What one `nss run` in a fresh clone leaves behind."""

from __future__ import annotations

import re

import mlflow
import pytest

from nss.data import load_data
from nss.evaluate import evaluate_slices
from nss.model import load_model, model_digest
from nss.slice import SemanticSlices

STAGES = ["base", "profile", "slice", "triage", "restructure", "readapt", "extend", "evaluate", "gate"]


def test_the_run_prints_a_line_a_stage_and_where_to_look(executed) -> None:
    copy, ended = executed
    lines = ended.out.splitlines()
    assert [line.split()[:2] for line in lines[: len(STAGES)]] == [[stage, "Executed"] for stage in STAGES]
    scores = copy.json("artifacts/evaluate/evaluation.json")
    assert f"accuracy    {scores['model']['accuracy']:.2%} on 373 held-out images" in ended.out
    for each in scores["slices"]["slices"]:
        assert f"{each['name']}   {', '.join(each['categories'])} (recall" in ended.out
    for run in [*copy.runs("cycle"), *copy.runs("stage")]:
        assert run.info.run_id in ended.out
    assert f"mlflow ui --backend-store-uri sqlite:///{copy.root}/mlflow/tracking.db" in ended.out
    assert "prefect server start" in ended.out


def test_the_run_says_what_is_needed_and_what_the_gate_decided(executed) -> None:
    copy, ended = executed
    budget, macs = 1_500_000, copy.json("artifacts/restructure/metrics.json")
    assert macs["macs"] <= budget < macs["macs"] / macs["macs_kept"], "the budget asks for it, and is then kept"
    assert "  readapt      not needed: no new images" in ended.out
    assert f"({budget:,} allowed)" in ended.out
    decision = copy.json("artifacts/gate/gate.json")
    assert f"verdict     {decision['verdict']}: {decision['promoted'] or 'nothing'}" in ended.out
    assert [each["verb"] for each in decision["judgements"]] == ["restructure", "base"]
    assert decision["verdict"] == "PROMOTE"
    for verb, each in decision["candidates"].items():
        assert each["model"] == model_digest(load_model(copy.root / "artifacts" / verb / "model"))


def test_the_run_is_quiet_beside_that(executed) -> None:
    assert "Traceback" not in executed[1].err
    assert not re.search(r"INFO|WARNING|ERROR|Running stage", executed[1].err), executed[1].err


def test_the_model_is_good_and_the_digits_are_in_every_slice_once(executed) -> None:
    scores = executed[0].json("artifacts/evaluate/evaluation.json")
    assert scores["model"]["accuracy"] > 0.95
    categories = [name for each in scores["slices"]["slices"] for name in each["categories"]]
    assert sorted(categories) == [str(digit) for digit in range(10)]


def test_no_tracked_file_but_the_lock_has_changed_and_dvc_has_nothing_to_do(executed) -> None:
    copy, _ = executed
    assert [line[3:] for line in copy.git("status", "--porcelain").splitlines()] in ([], ["dvc.lock"])
    assert copy.run("dvc", "status").out.strip() == "Data and pipelines are up to date."
    assert "Running stage" not in copy.run("dvc", "repro").out


def test_there_is_a_run_for_the_cycle_each_stage_and_each_slice_and_none_is_running(executed) -> None:
    copy, _ = executed
    slices = copy.json("artifacts/slice/metrics.json")["slices"]
    runs = copy.runs()
    # The second-run test may have added cycles that reuse all stages.
    assert len(runs) - len(copy.runs("cycle")) == len(STAGES) + slices
    assert {run.info.status for run in runs} == {"FINISHED"}


def test_runs_hang_under_each_other_cycle_stage_slice(executed) -> None:
    copy, _ = executed
    first = min(copy.runs("cycle"), key=lambda run: run.info.start_time)
    stages = {run.info.run_name: run for run in copy.runs("stage")}
    assert sorted(stages) == sorted(STAGES)
    assert {run.data.tags["mlflow.parentRunId"] for run in stages.values()} == {first.info.run_id}
    parents = {run.data.tags["mlflow.parentRunId"] for run in copy.runs("slice")}
    assert parents == {stages["slice"].info.run_id}
    for name, run in stages.items():
        assert first.data.tags[f"nss.stage.{name}.run_id"] == run.info.run_id
        assert first.data.tags[f"nss.stage.{name}.outcome"] == "executed"


def test_runs_say_where_they_come_from(executed) -> None:
    copy, _ = executed
    md5 = re.search(r"md5: (\S+)", (copy.root / "data.dvc").read_text())[1]
    for run in copy.runs():
        assert run.data.tags["nss.data_md5"] == md5
        assert run.data.tags["nss.git_sha"] == copy.git("rev-parse", "HEAD").strip()
    for run in copy.runs("stage"):
        (used,) = run.inputs.dataset_inputs
        assert (used.dataset.name, used.dataset.digest) == ("data", md5)
        assert len(run.data.tags["nss.stage_key"]) == 32


@pytest.mark.parametrize(
    ("stage", "expected"),
    [
        ("base", {"training.png"}),
        ("slice", {"dendrogram.png", "overlap.png", "kept_neurons.png"}),
        ("restructure", {"kept_neurons.png", "size_curve.png", "class_change.png"}),
        ("triage", {"restructure.json", "readapt.json", "extend.json"}),
        ("evaluate", {"confusion.png", "class_accuracy.png", "differences.png"}),
        ("gate", {"gate.json", "reasons.md"}),
    ],
)
def test_pictures_and_reasons_are_logged(executed, stage: str, expected: set[str]) -> None:
    copy, _ = executed
    (run,) = [run for run in copy.runs("stage") if run.info.run_name == stage]
    assert expected <= {file.path for file in copy.client.list_artifacts(run.info.run_id)}


def test_each_slices_model_comes_back_from_mlflow_with_the_logged_figures(
    executed, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy, _ = executed
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{copy.root / 'mlflow' / 'tracking.db'}")
    slices = SemanticSlices.load(copy.root / "artifacts" / "slice" / "slices.json")
    runs = {run.info.run_name: run for run in copy.runs("slice")}
    models = []
    for each in slices:
        (output,) = runs[each.name].outputs.model_outputs
        folder = mlflow.artifacts.download_artifacts(f"models:/{output.model_id}")
        models.append(load_model(folder))
    scores = evaluate_slices(slices, models, load_data(copy.root / "data").split("val"))
    for figures in scores.slices:
        run = runs[figures.name]
        assert run.data.params["categories"] == ", ".join(figures.categories)
        for name in ("recall", "recognised", "false_positive_rate", "balanced_accuracy", "parameters"):
            assert run.data.metrics[name] == pytest.approx(getattr(figures, name), abs=1e-9), name


def test_a_second_run_finds_all_cached_and_adds_only_its_cycle(executed) -> None:
    copy, _ = executed
    before = copy.runs()
    ended = copy.nss_run()
    assert ended.outcomes == dict.fromkeys(STAGES, "cached")
    (added,) = [run for run in copy.runs() if run.info.run_id not in {each.info.run_id for each in before}]
    assert added.data.tags["nss.kind"] == "cycle"
    for run in copy.runs("stage"):
        assert added.data.tags[f"nss.stage.{run.info.run_name}.run_id"] == run.info.run_id
        assert added.data.tags[f"nss.stage.{run.info.run_name}.outcome"] == "cached"
    # No server, and no more than what two cores do in 15 seconds, whatever else they are doing.
    assert ended.cpu < 25
