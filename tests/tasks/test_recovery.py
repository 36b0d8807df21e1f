from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from uuid import UUID

import psutil
import pytest
from filelock import FileLock
from prefect.client.orchestration import get_client
from prefect.settings import PREFECT_API_URL, temporary_settings

from tasks.pipeline import OWNER, Pipeline
from tasks.processes import is_dead, process_id, stop
from tasks.provenance import PROCESS
from tasks.recovery import recover
from tasks.tracking import open_tracker
from tasks.workspace import Workspace

HOST = socket.gethostname()


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return Workspace(tmp_path)


@pytest.fixture(autouse=True)
def nobody_elses_store(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MLFLOW_TRACKING_URI", "DVC_ROOT"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def no_store(monkeypatch: pytest.MonkeyPatch) -> None:
    """Making a store takes seconds; most tests need none."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")


@pytest.fixture
def gone() -> str:
    """The identity of a process that has ended."""
    process = subprocess.Popen(["sleep", "600"])
    identity = process_id(process.pid)
    process.kill()
    process.wait()
    return identity


def start(code: str, *arguments: object, **env: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]
    return subprocess.Popen(command, env={**os.environ, **env}, stdout=subprocess.PIPE, text=True)


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_living_process_is_not_dead_and_one_that_ended_is(gone: str) -> None:
    assert process_id() == process_id(os.getpid())
    assert not is_dead(process_id())
    assert is_dead(gone)


def test_a_process_that_nobody_has_waited_for_is_dead() -> None:
    process = subprocess.Popen(["sleep", "600"])
    identity = process_id(process.pid)
    assert not is_dead(identity)
    process.kill()
    wait_for(lambda: psutil.Process(process.pid).status() == psutil.STATUS_ZOMBIE)
    assert is_dead(identity)
    process.wait()


def test_another_process_with_the_same_number_does_not_keep_it_alive() -> None:
    host, pid, started = process_id().split(":")
    assert is_dead(f"{host}:{pid}:{float(started) - 10:.2f}")


@pytest.mark.parametrize("identity", ["", "x", f"{HOST}:", f"{HOST}:x:1.00", "elsewhere:999999999:1.00"])
def test_what_is_no_process_of_this_host_is_not_called_dead(identity: str) -> None:
    assert not is_dead(identity)


def test_a_process_that_does_not_listen_is_ended_by_force(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tasks.processes._PATIENCE_S", 0.5)
    process = start("import signal; signal.signal(15, signal.SIG_IGN); print('ready', flush=True); signal.pause()")
    process.stdout.readline()
    stop([psutil.Process(process.pid)])
    assert process.wait() == -signal.SIGKILL


def test_only_runs_of_processes_that_died_here_are_killed(workspace: Workspace, gone: str) -> None:
    tracker = open_tracker(workspace)
    begun = {"dead": gone, "living": process_id(), "elsewhere": gone.replace(HOST, "elsewhere"), "nobody": ""}
    runs = {name: tracker.open(name, {"stage_key": name}, {PROCESS: identity}) for name, identity in begun.items()}
    done = tracker.open("done", {"stage_key": "done"}, {PROCESS: gone})
    tracker.end(done.info.run_id, "FINISHED")
    killed = runs["dead"].info.run_id
    assert recover(workspace) == [f"MLflow run {killed} (dead) of a process that has died: KILLED"]
    found = {name: tracker.client.get_run(run.info.run_id).info.status for name, run in runs.items()}
    assert found == {"dead": "KILLED", "living": "RUNNING", "elsewhere": "RUNNING", "nobody": "RUNNING"}
    assert tracker.client.get_run(done.info.run_id).info.status == "FINISHED"
    assert recover(workspace) == []


# A program that is called nss, as the orphan's command line says; and who begins it as `nss run` does.
SLEEPER = "import pathlib, os, time; pathlib.Path('pid').write_text(str(os.getpid())); time.sleep(600)"
RUNNER = """
    from pathlib import Path
    from tasks.pipeline import Pipeline
    from tasks.workspace import Workspace

    Pipeline(Workspace(Path.cwd())).reproduce("first")
"""


@pytest.fixture
def sleeper(toy: Workspace, command) -> Workspace:
    (toy.root / "nss").write_text(SLEEPER)
    command(toy.root, f"{sys.executable} nss stage first")
    return toy


def begin(toy: Workspace, runner: list[str]) -> tuple[subprocess.Popen[bytes], psutil.Process]:
    env = {name: value for name, value in os.environ.items() if name != "DVC_STAGE"}
    process = subprocess.Popen(runner, cwd=toy.root, env=env)
    wait_for(lambda: (toy.root / "pid").exists() and bool((toy.root / "pid").read_text()))
    return process, psutil.Process(int((toy.root / "pid").read_text()))


@pytest.mark.parametrize("runner", [[sys.executable, "-c", textwrap.dedent(RUNNER)], ["dvc", "repro", "-q", "first"]])
def test_a_stage_whose_parent_was_killed_is_ended_and_one_whose_parent_lives_is_not(
    sleeper: Workspace, runner: list[str], no_store: None
) -> None:
    parent, stage = begin(sleeper, runner)
    try:
        assert recover(sleeper) == []
        assert recover(Workspace(sleeper.root.parent)) == []
        parent.kill()
        parent.wait()
        assert stage.is_running()
        assert recover(Workspace(sleeper.root.parent)) == [], "it works in another workspace"
        (line,) = recover(sleeper)
        assert f"process {stage.pid}:" in line
        assert not stage.is_running()
    finally:
        stop([stage])


def test_who_works_for_stages_is_ended_when_who_began_it_has_died(toy: Workspace, gone: str, no_store: None) -> None:
    command = [sys.executable, "-c", "import time; time.sleep(60)", "tasks.warm_process"]
    envs = [{**os.environ, OWNER: owner} for owner in (gone, gone, process_id())]
    *dead, lives = (subprocess.Popen(command, cwd=toy.root, env=env) for env in envs)
    first, second = sorted(each.pid for each in dead)
    assert recover(toy) == [f"stage that worked on without its parent, processes {first}, {second}: ended"]
    assert [psutil.pid_exists(pid) for pid in (first, second, lives.pid)] == [False, False, True]
    lives.kill()


def test_a_stage_that_somebody_began_by_hand_is_left_alone(sleeper: Workspace, no_store: None) -> None:
    _, stage = begin(sleeper, ["sh", "-c", f"{sys.executable} nss stage first & exit"])
    try:
        assert recover(sleeper) == []
        assert stage.is_running()
    finally:
        stop([stage])


REPLACE = """
    import sys, time
    from pathlib import Path
    from nss.files import replacing

    with replacing(Path(sys.argv[1])) as part:
        part.mkdir()
        (part / "new").touch()
        print("ready", flush=True)
        time.sleep(600)
"""


@pytest.mark.parametrize("place", ["champion", "data/batches/x.safetensors", "artifacts/base/model"])
def test_temporary_files_go_when_their_owner_has_died(workspace: Workspace, place: str, no_store: None) -> None:
    path = workspace.root / place
    process = start(REPLACE, path)
    process.stdout.readline()
    assert recover(workspace) == []
    (temporary,) = path.parent.iterdir()
    process.kill()
    process.wait()
    (line,) = recover(workspace)
    assert f"process {process.pid}" in line
    assert not temporary.exists()
    assert not path.exists()


def test_what_cannot_be_removed_is_said_and_keeps_nothing_else(
    workspace: Workspace, gone: str, no_store: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    pid, remove = int(gone.split(":")[1]), shutil.rmtree
    first, second = (leave(workspace, HOST, pid, suffix) for suffix in ("aaaa_123", "bbbb_123"))

    def refuse(folder: Path, **options: object) -> None:
        if folder == first:
            raise PermissionError(13, "Permission denied")
        remove(folder, **options)

    monkeypatch.setattr("shutil.rmtree", refuse)
    lines = {line.rsplit(", ", 1)[1] for line in recover(workspace)}
    assert lines == {f"{first.name}: cannot be removed (Permission denied)", f"{second.name}: removed"}
    assert (first.exists(), second.exists()) == (True, False)


def test_what_goes_wrong_is_a_note_and_the_rest_is_put_in_order(half_added: Workspace, no_store: None) -> None:
    (half_added.root / ".data.lock").mkdir()
    lines = recover(half_added)
    (note,) = [line for line in lines if line.startswith("not put in order: ")]
    assert note.startswith("not put in order: batches that were never finished (")
    assert note.endswith("); the next cycle tries again")
    assert batches(half_added) == ["a", "b"]


def test_one_sweep_that_fails_ends_no_other(
    workspace: Workspace, gone: str, no_store: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken() -> None:
        raise ValueError("an odd process\nand more")

    monkeypatch.setattr("psutil.process_iter", broken)
    folder = leave(workspace, HOST, int(gone.split(":")[1]))
    note, line = recover(workspace)
    assert note == "not put in order: stages without a parent (an odd process); the next cycle tries again"
    assert line.endswith(f"{folder.name}: removed")


def leave(workspace: Workspace, host: str, pid: int, suffix: str = "abcd_123") -> Path:
    folder = workspace.root / f".champion.{host}~{pid}.{suffix}"
    folder.mkdir()
    return folder


def test_temporary_files_of_another_host_stay(workspace: Workspace, gone: str, no_store: None) -> None:
    folder = leave(workspace, "elsewhere", int(gone.split(":")[1]))
    assert recover(workspace) == []
    assert folder.exists()


def test_what_was_put_aside_when_the_kill_came_is_put_back(workspace: Workspace, gone: str, no_store: None) -> None:
    folder = leave(workspace, HOST, int(gone.split(":")[1]))
    (folder / "before").mkdir()
    (folder / "before" / "model.json").write_text("old")
    assert len(recover(workspace)) == 1
    assert not folder.exists()
    assert (workspace.champion / "model.json").read_text() == "old"


@pytest.fixture
def half_added(workspace: Workspace) -> Workspace:
    """A data folder with one batch that it names and one that it does not."""
    (workspace.data / "batches").mkdir(parents=True)
    (workspace.data / "dataset.json").write_text(json.dumps({"batches": ["a" * 32]}))
    for name in "ab":
        (workspace.data / "batches" / f"{name * 32}.safetensors").touch()
    return workspace


def batches(workspace: Workspace) -> list[str]:
    return sorted(path.name[0] for path in (workspace.data / "batches").iterdir())


def test_a_batch_that_was_written_and_never_named_goes(half_added: Workspace, no_store: None) -> None:
    assert recover(half_added) == [f"batch that was never finished, data/batches/{'b' * 32}.safetensors: removed"]
    assert batches(half_added) == ["a"]


def test_a_batch_that_somebody_is_adding_stays(half_added: Workspace, no_store: None) -> None:
    with FileLock(half_added.root / ".data.lock"):
        assert recover(half_added) == []
    assert batches(half_added) == ["a", "b"]


@pytest.mark.parametrize("content", [None, "{", "[]", "{}"])
def test_batches_stay_where_nobody_can_tell_which_are_named(
    half_added: Workspace, content: str | None, no_store: None
) -> None:
    path = half_added.data / "dataset.json"
    path.unlink()
    if content is not None:
        path.write_text(content)
    assert recover(half_added) == []
    assert batches(half_added) == ["a", "b"]


def test_half_copies_in_the_cache_go_when_nobody_can_be_at_work_on_them(workspace: Workspace, no_store: None) -> None:
    folder = workspace.root / ".dvc" / "cache" / "files" / "md5" / "10"
    folder.mkdir(parents=True)
    for name in (".old.tmp", ".new.tmp", "whole"):
        (folder / name).touch()
    for name in (".old.tmp", "whole"):
        os.utime(folder / name, (1, 1))
    (line,) = recover(workspace)
    assert ".old.tmp" in line
    assert sorted(path.name for path in folder.iterdir()) == [".new.tmp", "whole"]


@pytest.mark.parametrize("cut", [0.0, 0.3, 0.5, 0.8])
def test_a_lock_file_that_a_kill_cut_off_costs_no_stage(toy: Workspace, cut: float, no_store: None) -> None:
    pipeline, path = Pipeline(toy), toy.root / "dvc.lock"
    for name in ("first", "second"):
        pipeline.reproduce(name)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(cut * len(whole))])
    recover(toy)
    for name in ("first", "second"):
        assert pipeline.reproduce(name) in ("restored", "cached")
    assert path.read_bytes() == whole
    assert recover(toy) == []
    assert (toy.root / "count.log").read_text() == "run\n"


def test_dvcs_list_of_who_works_where_blocks_nobody_when_it_was_cut_off(toy: Workspace, no_store: None) -> None:
    Pipeline(toy).reproduce("first")
    (toy.root / ".dvc" / "tmp" / "rwlock").write_text("")
    (toy.root / "in.txt").write_text("two\n")
    assert recover(toy) == [".dvc/tmp/rwlock, which was cut off: removed"]
    assert Pipeline(toy).reproduce("first") == "executed"


def test_a_lock_file_with_a_merge_conflict_is_the_users(toy: Workspace, no_store: None) -> None:
    (toy.root / "dvc.lock").write_text("<<<<<<< ours\nstages: {}\n")
    assert recover(toy) == []
    assert (toy.root / "dvc.lock").exists()


FLOW = """
    import sys, time
    from pathlib import Path
    from prefect import flow
    from prefect.context import FlowRunContext
    from tasks.recovery import recover
    from tasks.workspace import Workspace

    @flow(name="maintain")
    def maintain():
        recover(Workspace(Path(sys.argv[1])))
        print(FlowRunContext.get().flow_run.id, flush=True)
        time.sleep(600)

    maintain()
"""


# Holds a temporary server as `nss run` does.
HOLDER = """
    import time
    from flows.launch import Server

    server = Server.start()
    server.wait()
    print(server.process.pid, server.url, flush=True)
    time.sleep(600)
"""


def test_a_killed_processes_prefect_run_is_crashed_and_its_temporary_server_ends(
    workspace: Workspace, tmp_path: Path, no_store: None
) -> None:
    (workspace.root / "data.dvc").write_text("outs:\n- md5: 1234.dir\n  path: data\n")
    holder = start(HOLDER, PREFECT_HOME=str(tmp_path / "prefect"))
    pid, api = holder.stdout.readline().split()
    processes = [start(FLOW, workspace.root, PREFECT_API_URL=api) for _ in range(2)]
    dead, living = (process.stdout.readline().strip() for process in processes)
    processes[0].kill()
    processes[0].wait()
    with temporary_settings({PREFECT_API_URL: api}):
        (line,) = recover(workspace)
        assert dead in line
        with get_client(sync_client=True) as client:
            runs = [client.read_flow_run(UUID(each)) for each in (dead, living)]
    for process in (processes[1], holder):
        process.kill()
        process.wait()
    assert [run.state_name for run in runs] == ["Crashed", "Running"]
    assert all("nss.data_md5=1234.dir" in run.tags for run in runs)
    server = psutil.Process(int(pid))
    wait_for(lambda: not server.is_running() or server.status() == psutil.STATUS_ZOMBIE)
