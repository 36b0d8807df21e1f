"""`nss run` on a terminal, in a pipe, and with --json. The cycle itself is not run: what it would tell is told."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
RUN = """
import sys
from types import ModuleType, SimpleNamespace

names = ("flows.launch", "flows.maintain", "flows.show", "tasks.params", "tasks.pipeline", "tasks.workspace")
launch, maintain, show, params, pipeline, workspace = modules = [ModuleType(name) for name in names]
sys.modules |= zip(names, modules)


class Server(SimpleNamespace):
    @staticmethod
    def prepare():
        return Server(wait=lambda: None, is_temporary=True)


def run_cycle(workspace, *, retries, tell, recorder):
    for stage in ("base", "profile"):
        sys.stderr.write(f"a note on {stage}\\n")
        tell(SimpleNamespace(stage=stage))
    if retries:
        raise KeyboardInterrupt
    return SimpleNamespace(to_dict=lambda: {"stages": ["base", "profile"]})


launch.Server, maintain.run_cycle = Server, run_cycle
params.STAGES, workspace.find_workspace = ("base", "profile", "slice"), lambda: None
pipeline.last_line = lambda: "epoch [3] of 20 " + "." * 200
show.stage_line = lambda stage: f"{stage.stage} [red]:cat: Executed"
show.summary = lambda report, workspace, is_temporary: "the summary"
import flows

flows.show = show
from flows.cli import main

sys.exit(main())
"""
LINES = ["base [red]:cat: Executed", "profile [red]:cat: Executed", "the summary"]
NOTES = "a note on base\na note on profile\n"
SHOW_CURSOR, HIDE_CURSOR = "\x1b[?25h", "\x1b[?25l"


def environment() -> dict[str, str]:
    plain = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "FORCE_COLOR", "LINES")}
    return {**plain, "TERM": "xterm", "COLUMNS": "100", "PYTHONPATH": str(ROOT)}


def piped(*options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", RUN, "run", *options]
    return subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=60, check=False)


def on_a_terminal(*options: str) -> tuple[int, str, str]:
    """Exit code, what the terminal shows, and stderr, which goes to a file."""
    pty = pytest.importorskip("pty")
    master, slave = pty.openpty()
    command = [sys.executable, "-c", RUN, "run", *options]
    with subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=slave, stderr=subprocess.PIPE) as process:
        os.close(slave)
        shown = b""
        try:
            while part := os.read(master, 65536):
                shown += part
        except OSError:
            # Linux says so when the other side has closed it.
            pass
        os.close(master)
        errors = process.stderr.read().decode()
    return process.returncode, shown.decode(), errors


def test_in_a_pipe_stages_are_plain_lines() -> None:
    done = piped()
    assert (done.returncode, done.stdout.splitlines(), done.stderr) == (0, LINES, NOTES)


def test_with_json_nothing_but_json_is_printed() -> None:
    done = piped("--json")
    assert (done.returncode, json.loads(done.stdout), done.stderr) == (0, {"stages": ["base", "profile"]}, NOTES)


def test_on_a_terminal_a_bar_names_the_stage_at_work_and_goes_away() -> None:
    code, shown, errors = on_a_terminal()
    assert code == 0, errors
    rows = shown.replace("\r", "\n").splitlines()
    for title, count in (("base", "0/3"), ("profile", "1/3"), ("slice", "2/3")):
        assert any(title in row and count in row and "epoch [3] of 20 ..." in row for row in rows), shown
    for line in LINES:
        assert line in shown
    assert shown.rstrip().endswith("the summary")
    assert shown.count(HIDE_CURSOR) == 1
    assert shown.rindex(SHOW_CURSOR) > shown.index(HIDE_CURSOR)
    assert errors == NOTES


def test_with_json_a_terminal_shows_no_bar_either() -> None:
    code, shown, errors = on_a_terminal("--json")
    assert (code, json.loads(shown), errors) == (0, {"stages": ["base", "profile"]}, NOTES)
    assert "\x1b" not in shown


def test_when_interrupted_the_terminal_gets_its_cursor_back() -> None:
    code, shown, _ = on_a_terminal("--retries", "1")
    assert code == 130
    assert shown.rindex(SHOW_CURSOR) > shown.index(HIDE_CURSOR)
