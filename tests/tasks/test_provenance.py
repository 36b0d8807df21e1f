from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from nss.errors import StageError
from tasks.provenance import data_md5, workspace_id
from tasks.workspace import Workspace

VERSION = "outs:\n- md5: 1234.dir\n  path: data\n"
CONFLICT = "outs:\n<<<<<<< HEAD\n- md5: 1234.dir\n=======\n- md5: 5678.dir\n>>>>>>> theirs\n  path: data\n"


def test_the_version_of_the_data_is_what_data_dvc_names(tmp_path: Path) -> None:
    (tmp_path / "data.dvc").write_text(VERSION)
    assert data_md5(Workspace(tmp_path)) == "1234.dir"


@pytest.mark.parametrize("content", [None, "", "outs: []\n", "outs: 5\n", "- 1\n"])
def test_data_that_nobody_versions_is_unknown(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "data.dvc").write_text(content)
    assert data_md5(Workspace(tmp_path)) == "unknown"


def test_a_merge_conflict_in_data_dvc_is_said_with_the_way_out(tmp_path: Path) -> None:
    (tmp_path / "data.dvc").write_text(CONFLICT)
    with pytest.raises(StageError) as error:
        data_md5(Workspace(tmp_path))
    assert "a merge left conflicts in data.dvc" in str(error.value)
    assert "git checkout --ours data.dvc" in str(error.value)


@pytest.mark.parametrize("content", [b"outs: [", b"\xff\xfe\x00"])
def test_a_damaged_data_dvc_is_said_with_the_way_out(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "data.dvc").write_bytes(content)
    with pytest.raises(StageError) as error:
        data_md5(Workspace(tmp_path))
    assert "data.dvc is no YAML" in str(error.value)
    assert "git checkout data.dvc" in str(error.value)


def test_a_workspace_is_known_wherever_it_is_moved_to(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / os.fsdecode(b"caf\xe9")
    assert workspace_id(Workspace(one)) == ""
    assert not one.exists(), "whoever only looks writes nothing"
    found = workspace_id(Workspace(one), make=True)
    assert re.fullmatch("[0-9a-f]{12}", found)
    assert workspace_id(Workspace(one)) == workspace_id(Workspace(one), make=True) == found
    assert workspace_id(Workspace(two), make=True) != found
    one.rename(tmp_path / "moved")
    assert workspace_id(Workspace(tmp_path / "moved")) == found
