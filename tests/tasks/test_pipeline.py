from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import psutil
import pytest
from dvc import dvcfile

from nss.errors import BusyError, StageError
from tasks.pipeline import Pipeline, last_line
from tasks.workspace import Workspace

# What the fixture's first stage does.
FIRST = 'touch "$NSS_STAGE_RECEIPT"; cat in.txt > first.txt; echo run >> count.log'


def runs(toy: Workspace) -> int:
    log = toy.root / "count.log"
    return len(log.read_text().splitlines()) if log.exists() else 0


def test_stages_come_after_what_they_depend_on(toy: Workspace) -> None:
    assert Pipeline(toy).stages() == ("first", "second")


def test_of_stages_that_could_both_come_next_the_first_in_dvc_yaml_does(toy: Workspace) -> None:
    text = (toy.root / "dvc.yaml").read_text()
    more = "".join(f"  {name}:\n    cmd: touch {name}\n    deps: [first.txt]\n    outs: [{name}]\n" for name in "zya")
    (toy.root / "dvc.yaml").write_text(text + more)
    assert Pipeline(toy).stages() == ("first", "second", "z", "y", "a")


def test_a_first_reproduction_executes_and_a_second_finds_all_there(toy: Workspace) -> None:
    pipeline = Pipeline(toy)
    assert not pipeline.look("first")[1]
    assert pipeline.stale() == ("first", "second")
    assert pipeline.reproduce("first") == "executed"
    assert pipeline.stale() == ("second",)
    pipeline.reproduce("second")
    assert (toy.root / "second.txt").read_text() == "one\n"
    assert pipeline.look("first")[1]
    assert pipeline.stale() == ()
    assert pipeline.reproduce("first") == "cached"
    assert runs(toy) == 1


def test_a_changed_input_is_seen_as_changed_and_is_in_the_key_at_one_look(toy: Workspace) -> None:
    pipeline = Pipeline(toy)
    pipeline.reproduce("first")
    pipeline.reproduce("second")
    before, was_clean = pipeline.look("first")
    (toy.root / "in.txt").write_text("two\n")
    after, is_clean = pipeline.look("first")
    assert (was_clean, is_clean) == (True, False)
    assert before != after == pipeline.stage_key("first")
    assert pipeline.stale() == ("first",)


def test_while_it_is_kept_every_change_is_seen_and_looking_changes_nothing(toy: Workspace) -> None:
    pipeline = Pipeline(toy)
    with pipeline.kept():
        assert (pipeline.stages(), pipeline.look("first")[1]) == (("first", "second"), False)
        assert pipeline.reproduce("first") == "executed"
        key, is_clean = pipeline.look("first")
        assert is_clean
        (toy.root / "in.txt").write_text("two\n")
        assert not pipeline.look("first")[1]
        # A look that took what is there now for what the stage had seen would find it clean the second time.
        assert not pipeline.look("first")[1]
        (toy.root / "in.txt").write_text("one\n")
        assert pipeline.look("first") == (key, True)
        (toy.root / "params.yaml").write_text("group: {a: 2}\nother: {b: 2}\n")
        assert pipeline.look("first")[0].params != key.params
        (toy.root / "first.txt").unlink()
        assert pipeline.stale() == ("first", "second")
    assert Pipeline(toy).look("first") == pipeline.look("first")


def test_while_it_is_kept_dvc_yaml_and_dvc_lock_are_read_once(toy: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = Pipeline(toy)
    pipeline.reproduce("first")
    pipeline.reproduce("second")
    read: list[str] = []
    real = dvcfile.FileMixin._load
    monkeypatch.setattr(dvcfile.FileMixin, "_load", lambda self: read.append(Path(self.path).name) or real(self))
    with pipeline.kept():
        pipeline.stages()
        for name in ("first", "second"):
            pipeline.look(name)
            pipeline.stage_key(name)
    assert sorted(read) == ["dvc.lock", "dvc.yaml"]


def test_a_deleted_output_is_restored_without_running(toy: Workspace) -> None:
    pipeline = Pipeline(toy)
    pipeline.reproduce("first")
    (toy.root / "first.txt").unlink()
    assert pipeline.reproduce("first") == "restored"
    assert (toy.root / "first.txt").read_text() == "one\n"
    assert runs(toy) == 1


def test_an_input_set_back_is_restored_without_running(toy: Workspace) -> None:
    pipeline = Pipeline(toy)
    pipeline.reproduce("first")
    (toy.root / "in.txt").write_text("two\n")
    assert pipeline.reproduce("first") == "executed"
    (toy.root / "in.txt").write_text("one\n")
    assert pipeline.reproduce("first") == "restored"
    assert runs(toy) == 2


@pytest.mark.parametrize(
    ("name", "text", "part"),
    [
        ("in.txt", "two\n", None),
        ("code.py", "x = 2\n", "code"),
        ("params.yaml", "group: {a: 2}\nother: {b: 2}\n", "params"),
    ],
)
def test_the_key_changes_with_what_the_stage_depends_on(toy: Workspace, name: str, text: str, part: str | None) -> None:
    before = Pipeline(toy).stage_key("first")
    (toy.root / name).write_text(text)
    after = Pipeline(toy).stage_key("first")
    assert before.digest != after.digest
    changed = {key for key in ("data", "code", "params") if getattr(before, key) != getattr(after, key)}
    assert changed == ({part} if part else set())


def test_what_a_stage_printed_last_can_be_seen_while_it_works(toy: Workspace, command) -> None:
    wait = 'printf "one\\ntwo\\nhalf" >> "$NSS_STAGE_LOG"; while [ ! -e go ]; do sleep 0.05; done'
    command(toy.root, f'touch "$NSS_STAGE_RECEIPT"; {wait}; cat in.txt > first.txt')
    seen = []

    def look() -> None:
        deadline = time.monotonic() + 60
        while last_line() != "two" and time.monotonic() < deadline:
            time.sleep(0.02)
        seen.append(last_line())
        (toy.root / "go").touch()

    assert last_line() == ""
    other = threading.Thread(target=look)
    other.start()
    assert Pipeline(toy).reproduce("first") == "executed"
    other.join()
    assert (seen, last_line()) == (["two"], "")


def test_the_key_changes_with_the_command(toy: Workspace, command) -> None:
    before = Pipeline(toy).stage_key("first")
    command(toy.root, "cat in.txt > first.txt")
    assert Pipeline(toy).stage_key("first").digest != before.digest


def test_the_key_keeps_with_time_other_groups_and_the_place(toy: Workspace, tmp_path: Path) -> None:
    before = Pipeline(toy).stage_key("first")
    os.utime(toy.root / "in.txt", (1, 1))
    (toy.root / "params.yaml").write_text("other: {b: 3}\ngroup: {a: 1}\n")
    assert Pipeline(toy).stage_key("first") == before
    Pipeline(toy).reproduce("first")
    assert Pipeline(toy).stage_key("first") == before
    moved = shutil.copytree(toy.root, tmp_path / "elsewhere")
    assert Pipeline(Workspace(moved)).stage_key("first") == before


def test_a_missing_input_is_named(toy: Workspace) -> None:
    (toy.root / "in.txt").unlink()
    with pytest.raises(StageError, match=r"in\.txt"):
        Pipeline(toy).stage_key("first")


def test_a_failing_stage_shows_the_end_of_what_it_printed(toy: Workspace, command, capfd) -> None:
    command(toy.root, 'for i in $(seq 50); do echo "line $i" >> "$NSS_STAGE_LOG"; done; exit 3')
    with pytest.raises(StageError) as caught:
        Pipeline(toy).reproduce("first")
    message = str(caught.value)
    assert "the stage 'first' failed with exit code 3" in message
    assert "  | line 50" in message
    assert "line 20\n" not in message
    assert capfd.readouterr() == ("", "")


def test_ctrl_c_in_a_stage_is_ctrl_c_here(toy: Workspace, command) -> None:
    command(toy.root, "exit 130")
    with pytest.raises(KeyboardInterrupt):
        Pipeline(toy).reproduce("first")


def test_a_stage_gets_this_interpreters_programs_and_the_environment_asked_for(toy: Workspace, command) -> None:
    command(toy.root, 'command -v python > first.txt; echo "$WORD" >> first.txt')
    Pipeline(toy).reproduce("first", {"WORD": "hello"})
    program, word = (toy.root / "first.txt").read_text().split()
    assert (Path(program).parent, word) == (Path(sys.executable).parent, "hello")
    assert "WORD" not in os.environ


def test_a_folder_without_dvc_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StageError, match="dvc init"):
        Pipeline(Workspace(tmp_path)).stages()


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.05)


def start(toy: Workspace, script: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", textwrap.dedent(script)], cwd=toy.root)


def test_a_stage_that_somebody_else_runs_is_busy_and_the_holder_is_named(toy: Workspace, command) -> None:
    command(toy.root, "touch started; while [ ! -e go ]; do sleep 0.05; done; cat in.txt > first.txt")
    other = subprocess.Popen(["dvc", "repro", "-q", "first"], cwd=toy.root)
    try:
        wait_for(toy.root / "started")
        with pytest.raises(BusyError, match=rf"in use by process {other.pid} \(.*dvc.*repro"):
            Pipeline(toy).reproduce("first")
    finally:
        (toy.root / "go").touch()
        other.wait()
    assert other.returncode == 0
    assert Pipeline(toy).reproduce("first") == "cached"


def test_a_stage_ends_with_the_process_that_is_told_to_stop(toy: Workspace, command) -> None:
    command(toy.root, "echo $$ > pid; touch started; sleep 600")
    script = """
        import signal
        from pathlib import Path
        from tasks.pipeline import Pipeline
        from tasks.workspace import Workspace

        class Stop(BaseException): ...

        def stop(*_):
            raise Stop

        signal.signal(signal.SIGTERM, stop)
        Pipeline(Workspace(Path.cwd())).reproduce("first")
    """
    process = start(toy, script)
    wait_for(toy.root / "started")
    shell = psutil.Process(int((toy.root / "pid").read_text()))
    process.send_signal(signal.SIGTERM)
    process.wait(timeout=60)
    assert not shell.is_running()


def cached_files(toy: Workspace) -> list[Path]:
    return [path for path in (toy.root / ".dvc" / "cache" / "files").rglob("*") if path.is_file()]


def flip_a_bit(path: Path) -> None:
    """Damage a file as a failing disk does: size, time and mode stay."""
    was, content = path.stat(), bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.chmod(0o600)
    path.write_bytes(content)
    os.utime(path, ns=(was.st_atime_ns, was.st_mtime_ns))
    path.chmod(was.st_mode & 0o777)


FOLDER = "mkdir -p first.txt; cp in.txt first.txt/a; echo other > first.txt/b; echo run >> count.log"


@pytest.mark.parametrize(("makes", "damaged"), [(FIRST, "one"), (FOLDER, "one"), (FOLDER, "relpath")])
def test_an_output_whose_cached_copy_is_damaged_is_computed_again(
    toy: Workspace, command, makes: str, damaged: str
) -> None:
    command(toy.root, makes)
    pipeline = Pipeline(toy)
    pipeline.reproduce("first")
    (path,) = [path for path in cached_files(toy) if damaged in path.read_text()]
    flip_a_bit(path)
    out = toy.root / "first.txt"
    shutil.rmtree(out) if out.is_dir() else out.unlink()
    assert pipeline.reproduce("first") in ("executed", "restored")
    assert (out / "a" if out.is_dir() else out).read_text() == "one\n"
    assert runs(toy) == 2
    # The cache is whole again.
    shutil.rmtree(out) if out.is_dir() else out.unlink()
    assert pipeline.reproduce("first") == "restored"
    assert runs(toy) == 2


@pytest.mark.parametrize("damaged", ["content of x", "relpath"])
def test_data_whose_cached_copy_is_damaged_is_refused_and_not_brought_back(toy: Workspace, damaged: str) -> None:
    pipeline = Pipeline(toy)
    toy.data.mkdir()
    (toy.data / "x").write_text("content of x")
    pipeline.add_data()
    (path,) = [path for path in cached_files(toy) if damaged in path.read_text()]
    flip_a_bit(path)
    shutil.rmtree(toy.data)
    with pytest.raises(StageError) as caught:
        pipeline.restore("data.dvc")
    assert "data.dvc" in str(caught.value)
    assert "dvc pull data.dvc" in str(caught.value)
    assert not toy.data.exists()


LIMITED = """
    import resource
    from pathlib import Path
    from nss.errors import StageError
    from tasks.pipeline import Pipeline
    from tasks.workspace import Workspace

    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, resource.RLIM_INFINITY))
    try:
        Pipeline(Workspace(Path.cwd())).reproduce("first")
    except StageError as error:
        print(error)
"""


@pytest.mark.parametrize(("limit", "says"), [("unlimited", "there is no room left"), ("1024", "exit code")])
def test_a_full_disk_is_named_and_nothing_half_is_kept(toy: Workspace, command, limit: str, says: str) -> None:
    """Larger files than the limit do not fit: when the stage may write them, DVC's cache has no room."""
    command(toy.root, f"bash -c 'ulimit -S -f {limit}; exec head -c 2000000 /dev/zero > first.txt'")
    code = textwrap.dedent(LIMITED)
    ended = subprocess.run([sys.executable, "-c", code], cwd=toy.root, capture_output=True, text=True, check=False)
    assert (ended.returncode, "Traceback" in ended.stderr) == (0, False), ended.stderr
    assert says in ended.stdout
    assert all(len(path.read_bytes()) != 2_000_000 for path in cached_files(toy))
    # With room again it goes on.
    command(toy.root, 'touch "$NSS_STAGE_RECEIPT"; head -c 2000000 /dev/zero > first.txt')
    assert Pipeline(toy).reproduce("first") == "executed"
    (toy.root / "first.txt").unlink()
    assert Pipeline(toy).reproduce("first") == "restored"
    assert (toy.root / "first.txt").read_bytes() == bytes(2_000_000)


def test_data_that_dvc_knows_is_committed_only_when_it_changed(toy: Workspace) -> None:
    pipeline = Pipeline(toy)
    assert pipeline.has_changed_data() is None
    toy.data.mkdir()
    (toy.data / "x").write_text("1")
    pipeline.add_data()
    assert pipeline.has_changed_data() is False
    pointer = toy.root / "data.dvc"
    before = pointer.read_bytes(), pointer.stat().st_mtime_ns
    pipeline.add_data()
    assert (pointer.read_bytes(), pointer.stat().st_mtime_ns) == before
    (toy.data / "x").write_text("2")
    assert pipeline.has_changed_data() is True
    pipeline.add_data()
    assert pipeline.has_changed_data() is False
    assert pointer.read_bytes() != before[0]
    shutil.rmtree(toy.data)
    pipeline.restore("data.dvc")
    assert (toy.data / "x").read_text() == "2"


def test_a_kill_that_cut_off_dvcs_list_of_who_works_where_keeps_nobody_from_adding_data(toy: Workspace) -> None:
    pipeline = Pipeline(toy)
    toy.data.mkdir()
    (toy.data / "x").write_text("1")
    pipeline.add_data()
    before = (toy.root / "data.dvc").read_bytes()
    (toy.data / "x").write_text("2")
    (toy.root / ".dvc" / "tmp" / "rwlock").write_text("")
    pipeline.add_data()
    assert pipeline.has_changed_data() is False
    assert (toy.root / "data.dvc").read_bytes() != before
