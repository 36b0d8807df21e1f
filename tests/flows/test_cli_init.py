"""`nss init` through the command line: what it lays out nss takes, and what it refuses leaves nothing behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tasks.params import load_params

ROOT = Path(__file__).resolve().parents[2]


def nss(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    code = "import sys; from flows.cli import main; sys.exit(main())"
    env = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "200"}
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=cwd,
        env=env,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_a_folder_with_a_name_that_no_model_may_have_becomes_a_workspace_that_is_read(tmp_path: Path) -> None:
    done = nss("init", "kätzchen ü", "--json", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["root"] == str(tmp_path / "kätzchen ü")
    assert load_params(tmp_path / "kätzchen ü" / "params.yaml").register.name == "kätzchen-ü"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--name", "a/b", "slash"), "error: the name 'a/b' is not allowed\n  where: --name\n  allowed: letters"),
        (("afile",), "error: the workspace cannot be laid out (File exists)\n"),
        (("afile/sub",), "error: the workspace cannot be laid out (Not a directory)\n"),
    ],
)
def test_what_cannot_be_laid_out_is_a_mistake_without_a_traceback(
    tmp_path: Path, arguments: tuple[str, ...], says: str
) -> None:
    (tmp_path / "afile").write_text("mine\n")
    done = nss("init", *arguments, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(says)
    assert [path.name for path in tmp_path.iterdir()] == ["afile"]
