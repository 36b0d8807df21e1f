"""Every command of README.md, run in its order in a clone, as by somebody who has just found it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.soak
ROOT = Path(__file__).resolve().parents[2]
_FOREIGN = ("MLFLOW_", "PREFECT_", "DVC_", "NSS_", "GIT_", "MAKE", "MFLAGS")
_BLOCK = re.compile(r"^```sh\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def run(folder: Path, env: dict[str, str], command: str) -> str:
    """Run a line in a shell of its own, with the environment that `.venv/bin/activate` makes."""
    line = f". .venv/bin/activate\n{command}"
    done = subprocess.run(
        ["bash", "-e", "-c", line], cwd=folder, env=env, capture_output=True, text=True, timeout=1800, check=False
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    assert "Traceback" not in done.stderr, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clone. Its environment is that of these tests, so that make has nothing to install."""
    folder = tmp_path_factory.mktemp("readme") / "nss"
    subprocess.run(["git", "clone", "-q", str(ROOT), str(folder)], check=True)
    (folder / ".venv").mkdir()
    (folder / ".venv" / "bin").symlink_to(Path(sys.prefix) / "bin")
    (folder / ".venv" / ".installed").touch()
    return folder


@pytest.fixture(scope="module")
def printed(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What the commands of the README print, in their order."""
    home = tmp_path_factory.mktemp("prefect")
    env = {name: value for name, value in os.environ.items() if not name.startswith(_FOREIGN)}
    env |= {"PYTHONPATH": str(checkout), "PREFECT_HOME": str(home)}
    found: dict[str, str] = {}
    for block in _BLOCK.findall((checkout / "README.md").read_text(encoding="utf-8")):
        for line in block.splitlines():
            command = line.partition("  #")[0].strip()
            found[command] = run(checkout, env, command)
            if command == "make demo":
                found["git status"] = run(checkout, env, "git status --porcelain")
    return found


def test_make_run_takes_the_digits_through_the_pipeline(printed: dict[str, str]) -> None:
    text = printed["make run"]
    assert len(re.findall(r"^\w+ +Executed ", text, re.MULTILINE)) == 9
    assert "verdict     PROMOTE: restructure" in text
    assert "registered  digits version 1 waits" in text


def test_make_demo_tells_of_a_model_that_shrinks_learns_and_follows(printed: dict[str, str]) -> None:
    text = printed["make demo"]
    promoted = re.findall(r"^  gate +(restructure|extend|readapt): PROMOTE", text, re.MULTILINE)
    assert promoted == ["restructure", "extend", "readapt"]
    champions = re.findall(r"^  registered  digits version (\d) is the champion", text, re.MULTILINE)
    assert champions == ["1", "2", "3"]


def test_neither_changes_a_file_that_git_tracks(printed: dict[str, str]) -> None:
    # Where floating point is not that of the machine that wrote dvc.lock, its hashes are not either.
    assert [line[3:] for line in printed["git status"].splitlines()] in ([], ["dvc.lock"])


def test_the_second_run_and_dvc_find_nothing_to_do(printed: dict[str, str]) -> None:
    assert len(re.findall(r"^\w+ +Cached ", printed["nss run"], re.MULTILINE)) == 9
    assert "Running stage" not in printed["dvc repro"]


def test_what_the_gate_lets_through_is_reported_and_promoted(printed: dict[str, str], checkout: Path) -> None:
    assert "verdict     PROMOTE of restructure" in printed["nss status"]
    assert "PROMOTE: restructure is promoted" in printed["nss report"]
    assert (checkout / "report" / "index.html").is_file()
    assert "the champion is digits version 1 (restructure)" in printed["nss promote"]
