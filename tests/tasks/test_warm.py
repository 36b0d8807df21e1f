"""The process that stages are forked from: what they find there, how they end, and what becomes of them without it."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from tasks.params import STAGES
from tasks.pipeline import OWNER
from tasks.processes import process_id
from tasks.warm import ADDRESS, Warm, end, hand_over
from tasks.warm_process import VERBS

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="without it on other systems than Linux")

HELPER = '''
import json, os, signal, sys, time

def tell(path, code):
    """Write down what it is like here."""
    ours = [name for name in sys.modules if name.partition(".")[0] in ("nss", "tasks", "flows")]
    libraries = [name for name in ("torch", "mlflow", "sqlalchemy") if name in sys.modules]
    found = {"argv": sys.argv, "cwd": os.getcwd(), "env": dict(os.environ), "ours": ours, "libraries": libraries}
    with open(path, "w") as file:
        json.dump({**found, "pid": os.getpid(), "line": sys.stdin.readline()}, file)
    print("out")
    sys.stderr.write("err")
    return int(code)

def work(path):
    """Work until told to end, and write down by what."""
    def end(number, frame):
        # Whoever waits and the system may both tell: once is enough, as for a stage.
        signal.signal(number, signal.SIG_IGN)
        with open(path, "a") as file:
            file.write(f"ended by {number}")
        sys.exit(3)
    signal.signal(signal.SIGTERM, end)
    with open(path, "w") as file:
        file.write("working ")
    while True:
        time.sleep(0.05)

def end_at_once(number):
    os.kill(os.getpid(), int(number))
    time.sleep(60)

def fail():
    raise ValueError("helper failed")
'''
# What `nss stage` does, for any function.
CLIENT = """
import sys
from tasks.warm import hand_over
begun = hand_over(*sys.argv[1:])
sys.exit(77 if begun is None else begun.wait())
"""


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with the module `helper`, beside which there is such a process."""
    folder = tmp_path_factory.mktemp("warm")
    (folder / "helper.py").write_text(HELPER)
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv(ADDRESS, raising=False)
        with Warm(folder, {OWNER: process_id(), "NSS_GONE": "1", **variables(folder)}) as warm:
            warm.begin()
            yield folder


def variables(folder: Path, **more: str) -> dict[str, str]:
    """Of who asks and of who is asked: with the module `helper` to be found, and without what each test has its own."""
    path = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))
    return {"PYTHONPATH": path, "PYTEST_CURRENT_TEST": "", **more}


def client(folder: Path, *call: str, cwd: Path | None = None, **more: str) -> subprocess.Popen[str]:
    """Who asks, with the module `helper` in that folder."""
    command, env = [sys.executable, "-c", CLIENT, *call], {**os.environ, **variables(folder, **more)}
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    return subprocess.Popen(command, cwd=cwd or folder, env=env, text=True, **pipes)


def begun_in(folder: Path) -> psutil.Process:
    """The process that was begun there by this one."""
    children = [each.as_dict(["pid", "cwd"]) for each in psutil.Process().children()]
    (pid,) = [each["pid"] for each in children if each["cwd"] == str(folder)]
    return psutil.Process(pid)


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def is_working(path: Path) -> bool:
    return path.exists() and path.read_text() == "working "


def test_what_is_handed_over_is_done_as_by_the_process_itself(here: Path, tmp_path: Path) -> None:
    asked = client(here, "helper", "tell", str(tmp_path / "told"), "5", cwd=tmp_path, NSS_X="a\udcffé")
    assert asked.communicate("in\n") == ("out\n", "err")
    told = json.loads((tmp_path / "told").read_text())
    assert asked.returncode == 5
    assert told["pid"] != asked.pid
    assert told["line"] == "in\n"
    assert told["argv"] == ["-c", "helper", "tell", str(tmp_path / "told"), "5"]
    assert told["cwd"] == str(tmp_path)
    assert told["env"].items() >= {**os.environ, **variables(here, NSS_X="a\udcffé")}.items()
    assert "NSS_GONE" not in told["env"]


@pytest.mark.parametrize("before", [["nice", "-n", "1"], ["taskset", "-c", "0"], ["env", "OMP_NUM_THREADS=7"]])
def test_what_is_to_run_under_other_limits_or_variables_is_not_done_for_others(here: Path, before: list[str]) -> None:
    command = [*before, sys.executable, "-c", CLIENT, "helper", "fail"]
    assert subprocess.run(command, env={**os.environ, **variables(here)}, check=False).returncode == 77


def test_libraries_are_there_already_and_none_of_our_own_code(here: Path, tmp_path: Path) -> None:
    client(here, "helper", "tell", str(tmp_path / "told"), "0").communicate("")
    told = json.loads((tmp_path / "told").read_text())
    assert (told["libraries"], told["ours"]) == (["torch", "mlflow", "sqlalchemy"], [])


def test_what_a_signal_ends_counts_as_a_shell_counts_it(here: Path) -> None:
    asked = client(here, "helper", "end_at_once", str(int(signal.SIGKILL)))
    asked.communicate()
    assert asked.returncode == 137


def test_what_fails_unforeseen_ends_with_1_and_says_why(here: Path) -> None:
    asked = client(here, "helper", "fail")
    err = asked.communicate()[1]
    assert asked.returncode == 1
    assert err.endswith("ValueError: helper failed\n")


def test_work_that_nobody_waits_for_is_asked_to_end_and_the_next_is_done(here: Path, tmp_path: Path) -> None:
    file = tmp_path / "work"
    asked = client(here, "helper", "work", str(file))
    wait_until(lambda: is_working(file))
    asked.kill()
    wait_until(lambda: file.read_text() == "working ended by 15")
    again = client(here, "helper", "tell", str(tmp_path / "told"), "0")
    again.communicate("")
    assert again.returncode == 0


def test_who_asks_and_goes_does_no_harm(here: Path, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as line:
        line.connect(os.environ[ADDRESS])
    with socket.socket(socket.AF_UNIX) as line:
        line.connect(os.environ[ADDRESS])
        socket.send_fds(line, [(100).to_bytes(8)], [0, 1, 2])
        line.sendall(b'{"call": [')
    again = client(here, "helper", "tell", str(tmp_path / "told"), "0")
    again.communicate("")
    assert again.returncode == 0


def test_only_its_owner_can_ask_it(here: Path) -> None:
    assert Path(os.environ[ADDRESS]).parent.stat().st_mode & 0o777 == 0o700


@contextmanager
def at_work(folder: Path) -> Iterator[tuple[psutil.Process, subprocess.Popen[str], Path]]:
    """Such a process, who has asked it for work that does not end, and the file that tells of that."""
    (folder / "helper.py").write_text(HELPER)
    file = folder / "work"
    with Warm(folder, variables(folder)) as warm:
        warm.begin()
        process = begun_in(folder)
        asked = client(folder, "helper", "work", str(file))
        wait_until(lambda: is_working(file))
        yield process, asked, file


def test_when_it_dies_work_is_asked_to_end_and_is_done_elsewhere_from_then_on(tmp_path: Path) -> None:
    with at_work(tmp_path) as (process, asked, file):
        process.kill()
        assert asked.wait(60) == 143
        assert file.read_text() == "working ended by 15"
        asked.communicate()
        assert hand_over("helper", "fail") is None


def test_when_it_dies_work_ends_that_nobody_else_can_tell_to(tmp_path: Path) -> None:
    with at_work(tmp_path) as (process, asked, file):
        asked.send_signal(signal.SIGSTOP)
        process.kill()
        wait_until(lambda: file.read_text() == "working ended by 15")
        asked.kill()
        asked.communicate()


def test_what_works_on_when_the_block_ends_is_ended(tmp_path: Path) -> None:
    with at_work(tmp_path) as (_, asked, file):
        pass
    assert file.read_text() == "working ended by 15"
    asked.communicate()


def test_what_does_not_end_when_asked_is_ended_by_force(monkeypatch) -> None:
    deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True); time.sleep(600)"
    monkeypatch.setattr("tasks.warm.PATIENCE_S", 0.1)
    with subprocess.Popen([sys.executable, "-c", deaf], stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        ended = os.pidfd_open(process.pid)
        end(process.pid, ended)
        os.close(ended)
        assert process.wait(10) == -signal.SIGKILL


def test_it_ends_with_the_process_that_it_works_for(tmp_path: Path) -> None:
    (tmp_path / "helper.py").write_text(HELPER)
    begin = (
        "import os, pathlib, sys, time\nfrom tasks.warm import Warm\n"
        "warm = Warm(pathlib.Path.cwd(), {})\nwarm.begin()\n"
        f"print(os.environ['{ADDRESS}'], flush=True)\ntime.sleep(600)\n"
    )
    env = {**os.environ, **variables(tmp_path)}
    owner = subprocess.Popen([sys.executable, "-c", begin], cwd=tmp_path, env=env, stdout=subprocess.PIPE, text=True)
    address = owner.stdout.readline().strip()
    file = tmp_path / "work"
    asked = client(tmp_path, "helper", "work", str(file), **{ADDRESS: address})
    wait_until(lambda: is_working(file))
    (process,) = psutil.Process(owner.pid).children()
    owner.kill()
    owner.wait()
    owner.stdout.close()
    wait_until(lambda: file.read_text() == "working ended by 15")
    asked.communicate()
    wait_until(lambda: not process.is_running() or process.status() == psutil.STATUS_ZOMBIE)
    wait_until(lambda: not Path(address).parent.exists())


def test_nothing_is_left_of_it_at_the_end_of_the_block(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.delenv(ADDRESS, raising=False)
    with Warm(tmp_path, {}) as warm:
        assert ADDRESS not in os.environ
        warm.begin()
        warm.begin()
        folder = Path(os.environ[ADDRESS]).parent
        process = begun_in(tmp_path)
    assert not process.is_running()
    assert not folder.exists()
    assert ADDRESS not in os.environ


def test_where_a_socket_would_have_too_long_a_path_there_is_none(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.delenv(ADDRESS, raising=False)
    deep = tmp_path / ("x" * 100)
    deep.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(deep))
    with Warm(tmp_path, {}) as warm:
        warm.begin()
        assert hand_over("helper", "fail") is None
    assert list(deep.iterdir()) == []


def test_where_the_system_cannot_wait_for_both_there_is_none(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.delenv(ADDRESS, raising=False)

    def refused(pid: int) -> int:
        raise PermissionError(pid)

    monkeypatch.setattr(os, "pidfd_open", refused)
    with Warm(tmp_path, {}) as warm:
        warm.begin()
        assert hand_over("helper", "fail") is None


def test_nothing_that_is_imported_starts_a_thread_or_a_gpu_which_a_fork_would_lose() -> None:
    count = (
        "import importlib, threading, torch\nfrom tasks import warm_process as w\n"
        "for name in (*w.FIRST, *w.LATER):\n    importlib.import_module(name)\n"
        "print(threading.active_count(), torch.cuda.is_initialized())"
    )
    done = subprocess.run([sys.executable, "-c", count], capture_output=True, text=True, check=True)
    assert done.stdout == "1 False\n"


def test_what_is_imported_later_is_every_stage() -> None:
    assert VERBS == STAGES
