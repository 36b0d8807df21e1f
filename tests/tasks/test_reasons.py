"""Findings and verdicts in words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from nss.errors import NssError
from nss.files import write_json
from tasks.reasons import all_reasons, triage_words, verdict_words
from tasks.workspace import Workspace


def reason(check: str, verdict: str, text: str) -> dict[str, str]:
    return {"check": check, "verdict": verdict, "text": text}


FLOOR = reason("accuracy", "PROMOTE", "accuracy 0.900 (0.5 asked for)")
BENEFIT = reason("benefit", "PROMOTE", "smaller")


@pytest.mark.parametrize(
    ("reasons", "words"),
    [
        ([FLOOR, BENEFIT], "smaller"),
        (
            [FLOOR, reason("images", "HOLD", "40 images"), reason("size", "REJECT", "larger"), BENEFIT],
            "larger; 40 images",
        ),
        (
            [reason(name, "HOLD", name) for name in "abc"] + [reason("size", "REJECT", "larger")],
            "larger; a; and 2 more",
        ),
        ([FLOOR, reason("images", "PROMOTE", "200 images")], "accuracy 0.900 (0.5 asked for); 200 images"),
    ],
)
def test_a_verdict_is_told_by_what_decided(reasons: list[dict[str, str]], words: str) -> None:
    assert verdict_words({"reasons": reasons}) == words


def test_all_reasons_name_every_candidate_and_every_check() -> None:
    judgements: list[dict[str, Any]] = [
        {"verb": "readapt", "verdict": "HOLD", "reasons": [FLOOR, reason("benefit", "HOLD", "not better")]},
        {"verb": "restructure", "verdict": "PROMOTE", "reasons": [FLOOR, BENEFIT]},
    ]
    text = all_reasons({"verdict": "PROMOTE", "promoted": "restructure", "judgements": judgements})
    assert text.splitlines() == [
        "# PROMOTE: restructure is promoted",
        "",
        "## readapt: HOLD",
        "",
        "- PROMOTE, accuracy: accuracy 0.900 (0.5 asked for)",
        "- HOLD, benefit: not better",
        "",
        "## restructure: PROMOTE",
        "",
        "- PROMOTE, accuracy: accuracy 0.900 (0.5 asked for)",
        "- PROMOTE, benefit: smaller",
    ]


def test_without_a_promotion_that_is_the_title() -> None:
    assert all_reasons({"verdict": "HOLD", "promoted": None, "judgements": []}) == "# HOLD: no candidate is promoted\n"


def test_findings_of_triage_are_told_with_why(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    for verb, needed in (("restructure", True), ("readapt", False), ("extend", False)):
        finding = {"needed": needed, "why": f"about {verb}", "evidence": {}}
        write_json(workspace.out("triage") / f"{verb}.json", finding)
    assert triage_words(workspace) == {
        "restructure": "about restructure",
        "readapt": "not needed: about readapt",
        "extend": "not needed: about extend",
    }
    (workspace.out("triage") / "extend.json").unlink()
    with pytest.raises(NssError, match=r"the file is missing"):
        triage_words(workspace)
