"""The user's own modules are part of what stages depend on: every line in the workspace, else the version."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tasks import own_code as module
from tasks.own_code import own_code
from tasks.workspace import Workspace, with_packages


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workspace:
    monkeypatch.setattr(sys, "path", [*sys.path])
    package = tmp_path / "own_nets"
    (package / "blocks").mkdir(parents=True)
    (package / "__init__.py").write_text("raise SystemExit('imported')\n")
    (package / "blocks" / "wide.py").write_text("WIDTH = 3\n")
    (tmp_path / "own_net.py").write_text("raise SystemExit('imported')\n")
    return with_packages(Workspace(tmp_path), ["own_net", "own_nets"])


def test_without_packages_there_is_nothing(tmp_path: Path) -> None:
    assert own_code(Workspace(tmp_path)) == b""


@pytest.mark.parametrize("path", ["own_net.py", "own_nets/__init__.py", "own_nets/blocks/wide.py"])
def test_a_change_of_any_file_is_another_digest(workspace: Workspace, path: str) -> None:
    before = own_code(workspace)
    assert own_code(workspace) == before
    file = workspace.root / path
    text = file.read_text()
    file.write_text(f"{text}# more\n")
    assert own_code(workspace) != before
    file.write_text(text)
    assert own_code(workspace) == before


def test_where_the_workspace_lies_and_the_order_of_names_do_not_matter(workspace: Workspace, tmp_path_factory) -> None:
    before = own_code(workspace)
    assert own_code(with_packages(workspace, ["own_nets", "own_net"])) == before
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "cats"
    workspace.root.rename(elsewhere)
    sys.path.remove(str(workspace.root))
    assert own_code(with_packages(Workspace(elsewhere), workspace.packages)) == before


def test_a_file_by_another_name_is_another_digest(workspace: Workspace) -> None:
    before = own_code(workspace)
    (workspace.root / "own_nets" / "blocks" / "wide.py").rename(workspace.root / "own_nets" / "blocks" / "narrow.py")
    assert own_code(workspace) != before


@pytest.mark.parametrize("name", [".#wide.py", "blocks/.#wide.py"])
def test_the_link_by_which_emacs_says_that_a_file_is_open_is_no_code(workspace: Workspace, name: str) -> None:
    before = own_code(workspace)
    (workspace.root / "own_nets" / name).symlink_to("me@host.4711:1764465245")
    assert own_code(workspace) == before


def test_only_regular_files_that_are_not_hidden_are_code(workspace: Workspace) -> None:
    before = own_code(workspace)
    (workspace.root / "own_nets" / "folder.py").mkdir()
    (workspace.root / "own_nets" / "gone.py").symlink_to("nowhere.py")
    (workspace.root / "own_nets" / ".hidden.py").write_text("WIDTH = 5\n")
    assert own_code(workspace) == before
    (workspace.root / "own_nets" / "more.py").symlink_to(workspace.root / "own_net.py")
    assert own_code(workspace) != before


def test_what_is_installed_is_known_by_its_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    workspace = Workspace(tmp_path, ("safetensors",))
    before = own_code(workspace)
    (tmp_path / "safetensors.py").write_text("hidden by what is installed\n")
    assert own_code(workspace) == before
    monkeypatch.setattr(module, "version", lambda name: {"safetensors": "9.9.9"}[name])
    assert own_code(workspace) != before


def test_what_is_installed_in_an_environment_within_the_workspace_is_installed(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module.sysconfig, "get_path", lambda kind: str(workspace.root))
    before = own_code(workspace)
    (workspace.root / "own_net.py").write_text("WIDTH = 4\n")
    assert own_code(workspace) == before


def test_a_workspace_that_is_reached_by_a_link_is_the_same(workspace: Workspace, tmp_path_factory) -> None:
    link = tmp_path_factory.mktemp("links") / "link"
    link.symlink_to(workspace.root)
    assert own_code(Workspace(link, workspace.packages)) == own_code(workspace)


def test_a_package_that_is_not_there_is_told_by_the_stage_that_needs_it(tmp_path: Path) -> None:
    assert own_code(Workspace(tmp_path, ("no_such_nets",))) != own_code(Workspace(tmp_path, ("no_other_nets",)))
