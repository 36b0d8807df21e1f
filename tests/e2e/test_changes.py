"""What is run again after a change, and what is not."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path

import pytest

STAGES = ["base", "profile", "slice", "triage", "restructure", "readapt", "extend", "evaluate", "gate"]
CACHED = dict.fromkeys(STAGES, "cached")
# Triage does not read slices, nor does the gate as long as the candidates are what they were.
READERS = ["slice", "restructure", "readapt", "extend", "evaluate"]
FROM_SLICE = {**CACHED, **dict.fromkeys(READERS, "executed")}

# Put at the start of the stage `evaluate`, they make it fail twice, and wait for a file.
FAIL_TWICE = """
    log = workspace.root / "artifacts" / "attempts"
    attempts = log.read_text() if log.exists() else ""
    log.write_text(attempts + "x")
    if len(attempts) < 2:
        raise RuntimeError("not yet")
"""
WAIT = """
    import time
    (workspace.root / "artifacts" / "started").touch()
    while not (workspace.root / "artifacts" / "go").exists():
        time.sleep(0.05)
"""
EVALUATE = "    model = base_model(workspace, params.device)\n"


def test_deleted_outputs_are_restored_and_not_computed(copy) -> None:
    shutil.rmtree(copy.root / "artifacts" / "slice")
    (copy.root / "artifacts" / "evaluate" / "metrics.json").unlink()
    shutil.rmtree(copy.root / "data")
    before = len(copy.runs())
    ended = copy.nss_run()
    assert ended.outcomes == {**CACHED, "slice": "restored", "evaluate": "restored"}
    assert copy.run("dvc", "status").out.strip() == "Data and pipelines are up to date."
    assert len(copy.runs()) == before + 1


def test_an_edit_of_the_slice_module_runs_slice_and_what_follows_again(copy) -> None:
    copy.edit("nss/slice.py", "FORMAT = 1\n", "FORMAT = 1\n\n")
    before = copy.runs()
    assert copy.nss_run().outcomes == FROM_SLICE
    slices = copy.json("artifacts/slice/metrics.json")["slices"]
    assert len(copy.runs()) == len(before) + 1 + len(READERS) + slices
    assert {run.info.status for run in copy.runs()} == {"FINISHED"}


@pytest.mark.soak
def test_another_threshold_by_exp_run_runs_slice_and_what_follows_and_the_old_one_restores_them(copy) -> None:
    text = copy.run("dvc", "exp", "run", "--name", "lower", "-S", "slice.threshold=0.9").out
    ran = [stage for stage in STAGES if f"Running stage '{stage}'" in text]
    # The gate too, where other slices have led to another candidate.
    assert ran in (READERS, [*READERS, "gate"])
    slices = [run for run in copy.runs("stage") if run.data.tags.get("nss.dvc_experiment") == "lower"]
    assert sorted(run.info.run_name for run in slices) == sorted(ran)
    assert copy.nss_run().outcomes == CACHED
    copy.edit("params.yaml", "  threshold: 0.9\n", "  threshold: 0.97\n")
    assert copy.nss_run().outcomes == {**CACHED, **dict.fromkeys(ran, "restored")}


def test_a_fresh_clone_gives_the_same_lock_and_the_flow_finds_what_dvc_repro_did(
    executed, clone_again, server: str, tmp_path: Path
) -> None:
    first, _ = executed
    other = clone_again(first, tmp_path / "repository")
    (other.root / "dvc.lock").unlink(missing_ok=True)
    pointer = (other.root / "data.dvc").read_bytes()
    other.run("nss", "data", "demo")
    assert (other.root / "data.dvc").read_bytes() == pointer
    assert "epoch 1 of 8: loss " in other.run("dvc", "repro", "-f").err
    assert (other.root / "dvc.lock").read_bytes() == (first.root / "dvc.lock").read_bytes()
    before = other.runs()
    assert {run.data.tags.get("nss.kind") for run in before} == {"stage", "slice"}
    assert other.nss_run(PREFECT_API_URL=server).outcomes == CACHED
    assert len(other.runs()) == len(before) + 1


def test_a_stage_that_fails_twice_leaves_one_finished_run(copy) -> None:
    copy.edit("tasks/evaluate.py", EVALUATE, FAIL_TWICE + EVALUATE)
    before = len(copy.runs())
    assert copy.nss_run("--retries", "2").outcomes == {**CACHED, "evaluate": "executed"}
    assert len((copy.root / "artifacts" / "attempts").read_text()) == 3
    runs = copy.runs()
    assert len(runs) == before + 2
    assert {run.info.status for run in runs} == {"FINISHED"}


def test_a_failing_stage_ends_with_its_message_and_failed_runs(copy) -> None:
    copy.edit("tasks/evaluate.py", EVALUATE, '    raise RuntimeError("the pump is broken")\n')
    ended = copy.nss_run(code=1)
    assert "the stage 'evaluate' failed with exit code 1" in ended.err
    assert "RuntimeError: the pump is broken" in ended.err
    assert ended.err.count("Traceback") == 1, "the stage's own traceback, and none of ours"
    failed = {run.data.tags["nss.kind"] for run in copy.runs() if run.info.status == "FAILED"}
    assert failed == {"cycle", "stage"}


@pytest.mark.soak
def test_one_works_and_others_are_told_who_and_a_stopped_run_is_resumed(copy, wait_for) -> None:
    copy.edit("tasks/evaluate.py", EVALUATE, WAIT + EVALUATE)
    process = copy.start("nss", "run")
    wait_for((copy.root / "artifacts" / "started").exists, "the stage to start")
    busy = copy.nss_run(code=75)
    assert f"process {process.pid} (" in busy.err
    assert "is at work in this workspace" in busy.err
    assert "fix: wait until it has ended" in busy.err
    assert "Traceback" not in busy.err
    told = copy.run("dvc", "repro", code=255)
    assert f"(PID {process.pid})" in told.err
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGTERM
    stopped = [run for run in copy.runs() if run.info.status != "FINISHED"]
    kinds = {run.data.tags["nss.kind"]: run.info.status for run in stopped if run.info.status != "FAILED"}
    assert kinds == {"cycle": "KILLED", "stage": "KILLED"}
    (copy.root / "artifacts" / "go").touch()
    assert copy.nss_run().outcomes == {**CACHED, "evaluate": "executed"}
    (killed,) = [run for run in stopped if run.data.tags["nss.kind"] == "stage"]
    assert copy.client.get_run(killed.info.run_id).info.status == "FINISHED"


@pytest.mark.soak
def test_a_run_is_made_up_for_when_the_tracking_server_was_away(copy) -> None:
    copy.edit("nss/slice.py", "FORMAT = 1\n", "FORMAT = 1\n\n")
    before = len(copy.runs())
    ended = copy.nss_run(MLFLOW_TRACKING_URI="http://127.0.0.1:9", MLFLOW_HTTP_REQUEST_MAX_RETRIES="0")
    assert ended.outcomes == FROM_SLICE
    assert "not logged to MLflow" in ended.err
    assert ended.err.count("warning") == 1
    assert len(copy.runs()) == before
    assert copy.nss_run().outcomes == CACHED
    slices = copy.json("artifacts/slice/metrics.json")["slices"]
    assert len(copy.runs()) == before + 1 + len(READERS) + slices
    assert {run.info.status for run in copy.runs()} == {"FINISHED"}


def test_data_that_is_not_what_data_dvc_names_is_refused_before_anything_runs(copy) -> None:
    (copy.root / "data" / "extra").touch()
    ended = copy.nss_run(code=2)
    assert "data/ is not what data.dvc names" in ended.err
    assert "dvc checkout data.dvc" in ended.err
    assert "Traceback" not in ended.err


def test_a_wrong_parameter_is_named_before_anything_runs(copy) -> None:
    copy.edit("params.yaml", "  threshold: 0.97\n", "  threshold: 9\n")
    ended = copy.nss_run(code=2)
    assert "slice.threshold: 9 is not allowed; allowed: a number above 0, at most 1" in ended.err
    assert "Traceback" not in ended.err
