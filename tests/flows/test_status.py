from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from flows import doctor
from flows import status as module
from nss.files import write_json
from tasks.workspace import Workspace

CYCLE = {
    "run_id": "0b5e",
    "status": "FINISHED",
    "data_md5": "1234.dir",
    "outcomes": {"base": "cached", "gate": "cached"},
}


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workspace:
    monkeypatch.setattr(module, "_last_cycle", lambda _: CYCLE)
    monkeypatch.setattr(module, "has_server", lambda: False)
    (tmp_path / "data.dvc").write_text("outs:\n- md5: 1234.dir\n  path: data\n")
    (tmp_path / "inbox").mkdir()
    write_json(tmp_path / "champion.json", {"version": None})
    return Workspace(tmp_path)


def look(workspace: Workspace) -> dict[str, Any]:
    return module.status(workspace, workspace.root / "inbox", "digits")


def judge(workspace: Workspace, promoted: str | None) -> None:
    candidates = {"base": {"model": "aaaa"}, "restructure": {"model": "bbbb"}}
    decision = {"verdict": "PROMOTE" if promoted else "HOLD", "promoted": promoted, "candidates": candidates}
    write_json(workspace.out("gate") / "gate.json", decision)


def pin(workspace: Workspace, model: str) -> None:
    write_json(workspace.pin, {"name": "digits", "version": 3, "model": model, "batches": ["cccc"]})


def test_before_the_first_cycle_there_is_no_champion_and_no_verdict(workspace: Workspace) -> None:
    content = look(workspace)
    assert (content["champion"], content["verdict"], content["is_working"]) == (None, None, False)
    assert module.text(content).splitlines() == [
        "champion    none is pinned",
        "data        1234.dir",
        "last cycle  FINISHED, of this data (2 cached), MLflow run 0b5e",
        "verdict     none yet",
        "inbox       0 waiting",
        "at work     nobody",
        "Prefect     no server is named",
    ]


@pytest.mark.parametrize(
    ("promoted", "champion", "waits", "line"),
    [
        (None, None, False, "verdict     HOLD"),
        (
            "restructure",
            None,
            True,
            "verdict     PROMOTE of restructure; it waits, `nss promote` makes it the champion",
        ),
        (
            "restructure",
            "aaaa",
            True,
            "verdict     PROMOTE of restructure; it waits, `nss promote` makes it the champion",
        ),
        ("restructure", "bbbb", False, "verdict     PROMOTE of restructure"),
    ],
)
def test_a_candidate_that_is_promoted_waits_until_it_is_the_champion(
    workspace: Workspace, promoted: str | None, champion: str | None, waits: bool, line: str
) -> None:
    judge(workspace, promoted)
    if champion:
        pin(workspace, champion)
    content = look(workspace)
    assert content["verdict"]["waits"] is waits
    assert line in module.text(content).splitlines()


def test_what_is_in_the_inbox_is_named(workspace: Workspace) -> None:
    for name in ("b.npz", "a.npz", ".hidden"):
        (workspace.root / "inbox" / name).write_bytes(b"")
    assert "inbox       2 waiting: a.npz, b.npz" in module.text(look(workspace)).splitlines()


def test_doctor_tells_the_versions_of_the_packages() -> None:
    found = doctor._packages()
    assert re.search(r"\btorch 2\.\d+\.\d+", found)
    assert re.search(r"\bscikit-learn 1\.\d+", found)
    assert len(found.split(", ")) == 9
