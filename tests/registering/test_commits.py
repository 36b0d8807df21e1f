from __future__ import annotations

from pathlib import Path

import pytest

from tasks.commits import CYCLE, PIN, commit
from tasks.workspace import Workspace


@pytest.fixture
def workspace(tmp_path: Path, run_git) -> Workspace:
    run_git(tmp_path, "init", "-q")
    for name, value in (("user.name", "t"), ("user.email", "t@example.org"), ("commit.gpgsign", "false")):
        run_git(tmp_path, "config", name, value)
    for name in ("data.dvc", "champion.json", "other"):
        (tmp_path / name).write_text("1")
    run_git(tmp_path, "add", "-A")
    run_git(tmp_path, "commit", "-q", "-m", "start")
    return Workspace(tmp_path)


def test_exactly_the_files_named_are_committed_and_what_else_is_staged_stays_staged(workspace, run_git) -> None:
    for name in ("data.dvc", "champion.json", "champion.dvc", "other"):
        (workspace.root / name).write_text("2")
    run_git(workspace.root, "add", "other")
    assert commit(workspace, "cycle", CYCLE) == ""
    assert run_git(workspace.root, "show", "--format=%s", "--name-only").split() == ["cycle", "data.dvc"]
    assert commit(workspace, "pin", PIN) == ""
    assert run_git(workspace.root, "show", "--format=%s", "--name-only").split() == [
        "pin",
        "champion.dvc",
        "champion.json",
    ]
    assert run_git(workspace.root, "status", "--porcelain") == "M  other\n"


def test_nothing_changed_is_no_commit(workspace, run_git) -> None:
    before = run_git(workspace.root, "rev-parse", "HEAD")
    assert commit(workspace, "cycle", CYCLE) == ""
    assert run_git(workspace.root, "rev-parse", "HEAD") == before


def test_what_git_says_against_it_is_told(workspace, run_git) -> None:
    (workspace.root / "data.dvc").write_text("2")
    (workspace.root / ".git" / "index.lock").touch()
    assert commit(workspace, "cycle", CYCLE).startswith("git did not commit data.dvc: fatal: Unable to create")


def test_no_repository_and_no_git_are_told_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data.dvc").write_text("1")
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert "not a git repository" in commit(Workspace(tmp_path), "cycle", CYCLE)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert commit(Workspace(tmp_path), "cycle", CYCLE) == "git did not commit data.dvc: git is not installed"
