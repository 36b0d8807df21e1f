"""A small DVC workspace whose stages are shell commands."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tasks.workspace import Workspace

DVC_YAML = """\
stages:
  second:
    cmd: cat first.txt > second.txt
    deps: [first.txt]
    outs: [second.txt]
  first:
    cmd: {first}
    deps: [in.txt, code.py]
    params: [group]
    outs: [first.txt]
"""
FIRST = 'touch "$NSS_STAGE_RECEIPT"; echo working; cat in.txt > first.txt; echo run >> count.log'


@pytest.fixture
def toy(tmp_path: Path) -> Workspace:
    """Stages first (in.txt, code.py, params group) and second; count.log has a line for each time first ran."""
    root = tmp_path / "toy"
    (root / ".dvc").mkdir(parents=True)
    (root / ".dvc" / "config").write_text("[core]\n    analytics = false\n    autostage = false\n")
    subprocess.run(["git", "init", "-q"], cwd=root, check=True)
    (root / "in.txt").write_text("one\n")
    (root / "code.py").write_text("x = 1\n")
    (root / "params.yaml").write_text("group: {a: 1}\nother: {b: 2}\n")
    set_command(root, FIRST)
    return Workspace(root)


def set_command(root: Path, command: str) -> None:
    """Write dvc.yaml with this command for the first stage."""
    (root / "dvc.yaml").write_text(DVC_YAML.format(first="|\n      " + command))


@pytest.fixture
def command():
    """Give the function that changes the first stage's command."""
    return set_command
