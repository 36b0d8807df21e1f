"""The process that keeps a cycle's MLflow run beside us: its answers, its end, and what becomes of it without us."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from email.message import Message
from io import BytesIO
from multiprocessing import Pipe
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.error import HTTPError

import psutil
import pytest

from nss.errors import CrashError, StageError
from nss.files import write_json
from tasks.cycle import Cycle
from tasks.params import Params, load_params
from tasks.processes import is_dead, process_id
from tasks.provenance import PROCESS
from tasks.recorder import Beside, Here, Recorder, beside
from tasks.recorder_process import serve
from tasks.recovery_runs import end_runs
from tasks.tracking import create_database, open_tracker
from tasks.workspace import Workspace

ROOT = Path(__file__).resolve().parents[2]
PATIENCE_S = 60

on_linux = pytest.mark.skipif(sys.platform != "linux", reason="without it on other systems than Linux")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an empty tracking store: making one takes seconds, copying it does not."""
    folder = tmp_path_factory.mktemp("store") / "mlflow"
    create_database(folder / "tracking.db", folder / "artifacts")
    return folder


@pytest.fixture
def workspace(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workspace:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    shutil.copytree(store, tmp_path / "mlflow")
    (tmp_path / "params.yaml").write_bytes((ROOT / "params.yaml").read_bytes())
    write_json(tmp_path / "champion.json", {"version": None})
    return Workspace(tmp_path)


@pytest.fixture
def params(workspace: Workspace) -> Params:
    return load_params(workspace.params)


@pytest.fixture
def no_answer(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> str:
    """Have a tracking store where nobody listens, and return its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{probe.getsockname()[1]}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    return address


@pytest.fixture
def other() -> Iterator[Beside]:
    with Beside() as recorder:
        yield recorder


@pytest.fixture(params=["here", pytest.param("beside", marks=on_linux)])
def recorder(request: pytest.FixtureRequest) -> Recorder:
    return Here() if request.param == "here" else request.getfixturevalue("other")


def process_of(recorder: Beside) -> psutil.Process:
    return psutil.Process(recorder._process.pid)


def run_of(workspace: Workspace, run_id: str) -> Any:
    return open_tracker(workspace).client.get_run(run_id)


def test_a_cycle_has_one_run_that_ends_as_it_is_told(
    recorder: Recorder, workspace: Workspace, params: Params, capsys
) -> None:
    recorder.start(workspace, params)
    opened = recorder.call("open", "flow-run-7")()
    run = run_of(workspace, opened.run_id)
    assert (run.info.status, run.info.experiment_id) == ("RUNNING", opened.experiment_id)
    assert run.data.tags["nss.prefect_flow_run"] == "flow-run-7"
    recorder.end("FAILED")
    assert run_of(workspace, opened.run_id).info.status == "FAILED"
    assert capsys.readouterr() == ("", "")


def test_a_mistake_is_raised_as_it_is_and_does_not_end_the_recorder(
    recorder: Recorder, workspace: Workspace, params: Params
) -> None:
    recorder.start(workspace, params)
    opened = recorder.call("open", "")()
    with pytest.raises(StageError, match="the gate has not decided anything yet") as caught:
        recorder.call("close", {"base": "cached"}, {"base/loss": 0.25})()
    assert (caught.value.where, caught.value.fix) == (str(workspace.out("gate") / "gate.json"), "nss run")
    recorder.end("KILLED")
    run = run_of(workspace, opened.run_id)
    assert (run.info.status, run.data.metrics) == ("KILLED", {"base/loss": 0.25})
    assert run.data.tags["nss.stage.base.outcome"] == "cached"


def test_a_store_that_does_not_answer_is_warned_of_once_on_our_standard_error(
    no_answer: str, recorder: Recorder, workspace: Workspace, params: Params, capsys
) -> None:
    recorder.start(workspace, params)
    opened = recorder.call("open", "")()
    assert (opened.run_id, opened.experiment_id) == ("", "")
    recorder.end("FINISHED")
    why = f"not logged to MLflow (no answer from {no_answer} within 5 seconds)"
    assert capsys.readouterr().err == f"warning: {why}; the next `nss run` makes up for it\n"


@on_linux
def test_what_a_call_raised_whose_answer_nobody_awaited_is_raised_by_the_next_that_is(
    other: Beside, workspace: Workspace, params: Params
) -> None:
    other.start(workspace, params)
    opened = other.call("open", "")
    other.call("close", {}, {})
    resumed = other.call("resume")
    with pytest.raises(StageError, match="the gate has not decided anything yet"):
        resumed()
    assert (bool(opened().run_id), resumed()) == (True, None)


@on_linux
def test_a_fault_of_ours_is_a_crash_that_says_where_it_comes_from(workspace: Workspace, capfd) -> None:
    with Beside() as other:
        other.start(workspace, None)
        with pytest.raises(CrashError, match="'NoneType' object has no attribute 'base'"):
            other.call("open", "")()
    assert "params.base.packages" in capfd.readouterr().err


@pytest.mark.parametrize(
    "raised",
    [HTTPError("http://store", 503, "try later", Message(), BytesIO()), PermissionError(13, "not yours", "log")],
)
def test_what_a_library_of_ours_raises_arrives_even_when_it_cannot_be_sent(
    raised: OSError, workspace: Workspace, params: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(_: Cycle) -> None:
        raise raised

    monkeypatch.setattr(Cycle, "resume", fails)
    ours, theirs = Pipe()
    for request in (("start", (workspace, params)), ("resume", ()), ("end", ("FAILED",))):
        ours.send(request)
    answering = Thread(target=serve, args=(theirs,))
    answering.start()
    answers = [ours.recv() for _ in range(3)]
    ours.close()
    answering.join(PATIENCE_S)
    assert [str(error) for _, _, error in answers] == ["None", str(raised), "None"]
    assert isinstance(answers[1][2], OSError)


@on_linux
def test_a_process_that_is_gone_is_a_crash_and_its_run_is_ended_by_who_comes_next(
    other: Beside, workspace: Workspace, params: Params
) -> None:
    other.start(workspace, params)
    opened = other.call("open", "", process_id(other._process.pid))()
    process_of(other).kill()
    other._process.wait()
    with pytest.raises(CrashError, match="the process that keeps the cycle's MLflow run has ended"):
        other.call("resume")()
    other.end("FAILED")
    assert end_runs(workspace) == [f"MLflow run {opened.run_id} (cycle) of a process that has died: KILLED"]


@on_linux
def test_a_warning_is_told_by_the_next_call_and_not_only_by_an_answer_that_is_awaited(
    no_answer: str, other: Beside, workspace: Workspace, params: Params, capsys
) -> None:
    other.start(workspace, params)
    other.call("open", "")
    # Until both have been answered, whatever nobody has read yet.
    while not (other._line.poll(PATIENCE_S) and other._answers):
        other._receive()
    other.call("resume")
    assert f"not logged to MLflow (no answer from {no_answer} within 5 seconds)" in capsys.readouterr().err


@on_linux
def test_what_waits_when_the_cycle_is_interrupted_is_not_done(
    other: Beside, workspace: Workspace, params: Params
) -> None:
    other.start(workspace, params)
    opened = other.call("open", "")
    # All are sent while the process still imports.
    other.call("close", {"base": "cached"}, {"base/loss": 0.25})
    other.end("KILLED")
    run = run_of(workspace, opened().run_id)
    assert (run.info.status, run.data.metrics) == ("KILLED", {})


@on_linux
def test_a_flow_that_is_tried_again_has_a_process_anew(other: Beside, workspace: Workspace, params: Params) -> None:
    other.start(workspace, params)
    first = other.call("open", "")()
    other.end("FAILED")
    other.start(workspace, params)
    second = other.call("open", "")()
    other.end("FINISHED")
    assert [run_of(workspace, each.run_id).info.status for each in (first, second)] == ["FAILED", "FINISHED"]


@on_linux
def test_signals_to_the_whole_group_leave_it_to_us_how_the_run_ends(
    other: Beside, workspace: Workspace, params: Params
) -> None:
    other.start(workspace, params)
    opened = other.call("open", "")()
    for number in (signal.SIGINT, signal.SIGTERM):
        process_of(other).send_signal(number)
    other.end("KILLED")
    assert other._process.returncode == 0
    assert run_of(workspace, opened.run_id).info.status == "KILLED"


@on_linux
def test_signals_before_it_is_ready_wait_and_ours_are_let_through_again(
    workspace: Workspace, params: Params, capfd
) -> None:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    with Beside() as other:
        for number in (signal.SIGINT, signal.SIGTERM):
            process_of(other).send_signal(number)
        assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == before
        other.start(workspace, params)
        opened = other.call("open", "")()
        process_of(other).send_signal(signal.SIGINT)
        other.end("KILLED")
        assert other._process.returncode == 0
    assert run_of(workspace, opened.run_id).info.status == "KILLED"
    assert capfd.readouterr().err == ""
    assert not {signal.SIGINT, signal.SIGTERM} & before


@on_linux
def test_an_answer_that_was_cut_off_by_a_signal_is_not_read_on(
    other: Beside, workspace: Workspace, params: Params, monkeypatch
) -> None:
    other.start(workspace, params)
    opened = other.call("open", "")()

    def interrupted() -> None:
        os.read(other._line.fileno(), 3)
        raise KeyboardInterrupt

    monkeypatch.setattr(other._line, "recv", interrupted, raising=False)
    with pytest.raises(KeyboardInterrupt):
        other.call("resume")()
    other.end("KILLED")
    assert other._process.returncode == 0
    assert run_of(workspace, opened.run_id).info.status == "KILLED"


@on_linux
def test_it_ends_with_the_block_whatever_it_does(workspace: Workspace) -> None:
    with Beside() as recorder:
        process = process_of(recorder)
    assert not process.is_running()


@on_linux
def test_it_ends_at_once_with_a_process_that_is_killed(tmp_path: Path) -> None:
    script = """
    import time
    from tasks.recorder import Beside

    with Beside() as recorder:
        print(recorder._process.pid, flush=True)
        time.sleep(600)
    """
    command = [sys.executable, "-c", textwrap.dedent(script)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as parent:
        assert parent.stdout is not None
        ours = psutil.Process(int(parent.stdout.readline()))
        # It is to be past its first lines, where it asks to end with its parent.
        while not ours.cmdline() or "tasks.recorder_process" not in ours.cmdline():
            pass
        parent.kill()
    gone, _ = psutil.wait_procs([ours], timeout=PATIENCE_S)
    assert gone == [ours]


def test_there_is_none_where_it_could_outlive_us(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    assert beside() is None


def test_what_runs_beside_it_imports_no_mlflow() -> None:
    script = "import sys, flows.maintain, flows.show, flows.progress; sys.exit('mlflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=False).returncode == 0


def test_the_identity_that_a_run_bears_is_that_of_a_living_process(workspace: Workspace, params: Params) -> None:
    recorder = Here()
    recorder.start(workspace, params)
    opened = recorder.call("open", "")()
    assert not is_dead(run_of(workspace, opened.run_id).data.tags[PROCESS])


def test_a_cycle_that_cannot_begin_ends_the_runs_of_the_dead_all_the_same(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    for command in (["git", "init", "-q"], ["nss", "init"]):
        subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    shutil.copytree(store, tmp_path / "mlflow", dirs_exist_ok=True)
    dead = f"{socket.gethostname()}:999999999:1.00"
    run = open_tracker(Workspace(tmp_path)).open("dead", {"stage_key": "x"}, {PROCESS: dead})
    done = subprocess.run(["nss", "run"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith(f"MLflow run {run.info.run_id} (dead) of a process that has died: KILLED\nerror: ")
    assert run_of(Workspace(tmp_path), run.info.run_id).info.status == "KILLED"
