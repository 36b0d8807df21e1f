"""Lines for a terminal, and the figures of a cycle, from results that were written by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from flows.maintain import CycleReport, StageReport, figures_of
from flows.show import stage_line, summary
from nss.files import write_json
from tasks.recorder import RegisteredVersion
from tasks.workspace import Workspace


def report(stage: str, metrics: dict[str, float | None]) -> StageReport:
    return StageReport(stage, "executed", 1.25, "run", metrics)


@pytest.mark.parametrize(
    ("stage", "metrics", "text"),
    [
        ("base", {"val_accuracy": 0.987}, "validation accuracy 98.7%"),
        ("readapt", {"done": 1, "new_accuracy": 0.5}, "new images 50.0%"),
        ("readapt", {"done": 1, "new_accuracy": None}, ""),
        ("readapt", {"done": 0}, "nothing to do"),
        ("extend", {"done": 1, "new_accuracy": 0.75}, "new classes 75.0%"),
        ("extend", {"done": 0}, "nothing to do"),
        ("restructure", {"done": 1, "macs_kept": 0.5}, "50% of the multiply-adds"),
        ("restructure", {"done": 0}, "nothing to do"),
        ("triage", {"restructure": 1, "readapt": 0, "extend": 1}, "restructure, extend"),
        ("triage", {"restructure": 0, "readapt": 0, "extend": 0}, "nothing needed"),
        ("gate", {"promoted": 1, "candidates": 2, "held": 1, "rejected": 0}, "one of 2 promoted"),
        ("gate", {"promoted": 0, "candidates": 2, "held": 1, "rejected": 1}, "none of 2 promoted"),
        ("gate", {"promoted": 0, "candidates": 0, "held": 0, "rejected": 0}, "no candidate"),
        ("unheard-of", {"x": 1}, ""),
    ],
)
def test_a_stage_has_one_line_with_the_figure_that_people_look_at_first(
    stage: str, metrics: dict[str, float | None], text: str
) -> None:
    assert stage_line(report(stage, metrics)) == f"{stage:<11} Executed     1.2 s  {text}".rstrip()


def test_figures_of_a_cycle_leave_out_what_could_not_be_measured() -> None:
    stages = (report("base", {"loss": 0.5}), report("readapt", {"done": 1, "new_accuracy": None}))
    assert figures_of(stages) == {"base/loss": 0.5, "readapt/done": 1}


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    """Results in which nothing was restructured, followed or learned."""
    found = Workspace(tmp_path)
    model = {"accuracy": 0.9, "images": 10, "worst_class": "cat", "worst_accuracy": 0.8}
    slices = {"vote_accuracy": 0.7, "slices": []}
    write_json(found.out("evaluate") / "evaluation.json", {"model": model, "slices": slices})
    write_json(found.out("evaluate") / "metrics.json", {"accuracy": 0.9})
    for verb in ("restructure", "readapt"):
        write_json(found.out(verb) / "metrics.json", {"done": 0})
    write_json(found.out("extend") / "result.json", {"done": False})
    for verb in ("restructure", "readapt", "extend"):
        write_json(found.out("triage") / f"{verb}.json", {"needed": False, "why": "no new images"})
    write_json(found.out("gate") / "gate.json", {"verdict": "HOLD", "promoted": None, "judgements": []})
    return found


def lines(workspace: Workspace) -> list[str]:
    cycle = CycleReport((), "run", "sqlite:///store", "1", "")
    return summary(cycle, workspace, is_temporary=True).splitlines()


def test_a_summary_is_silent_about_what_was_not_done(workspace: Workspace) -> None:
    assert "accuracy    90.00% on 10 held-out images" in lines(workspace)
    assert [line for line in lines(workspace) if line.startswith(("smaller", "readapted", "extended"))] == []


def test_a_summary_tells_new_and_old_accuracy_before_and_after_following(workspace: Workspace) -> None:
    write_json(workspace.out("readapt") / "metrics.json", {"done": 1, "moved_share": 0.2})
    scores = {"accuracy": 0.9, "readapted_accuracy": 0.89}
    write_json(workspace.out("evaluate") / "metrics.json", scores)
    assert "readapted   old images 90.00% -> 89.00%, 20% of the weights moved" in lines(workspace)
    scores |= {"new_accuracy": 0.25, "readapted_new_accuracy": 0.75}
    write_json(workspace.out("evaluate") / "metrics.json", scores)
    expected = "new images 25.00% -> 75.00%, old images 90.00% -> 89.00%, 20% of the weights moved"
    assert f"readapted   {expected}" in lines(workspace)


def test_a_summary_tells_what_was_learned_and_how_well_old_and_new_are_told_apart(workspace: Workspace) -> None:
    write_json(workspace.out("extend") / "result.json", {"done": True, "classes": ["dog", "eel"]})
    scores = {"accuracy": 0.9, "extended_accuracy": 0.8, "extended_told_accuracy": 0.875}
    write_json(workspace.out("evaluate") / "metrics.json", scores)
    old = "old images 90.00% -> 80.00% (87.50% told old or new)"
    assert f"extended    by dog, eel: {old}" in lines(workspace)
    scores |= {"extended_new_accuracy": 0.75, "extended_new_told_accuracy": 1.0}
    write_json(workspace.out("evaluate") / "metrics.json", scores)
    assert f"extended    by dog, eel: new images 75.00% (100.00% told old or new), {old}" in lines(workspace)


def test_a_summary_tells_what_is_needed_and_why(workspace: Workspace) -> None:
    finding = {"needed": True, "why": "macs 2,413,056 (1,500,000 allowed)"}
    write_json(workspace.out("triage") / "restructure.json", finding)
    found = lines(workspace)
    at = found.index("triage")
    assert found[at + 1 : at + 4] == [
        "  restructure  macs 2,413,056 (1,500,000 allowed)",
        "  readapt      not needed: no new images",
        "  extend       not needed: no new images",
    ]


def test_a_summary_tells_the_verdict_on_every_candidate_and_what_decided(workspace: Workspace) -> None:
    assert "verdict     HOLD: there is no candidate" in lines(workspace)
    lost = {"check": "old knowledge", "verdict": "REJECT", "text": "class 8 falls by 0.3"}
    gained = {"check": "benefit", "verdict": "PROMOTE", "text": "smaller"}
    judgements = [
        {"verb": "readapt", "verdict": "REJECT", "reasons": [lost, gained]},
        {"verb": "restructure", "verdict": "PROMOTE", "reasons": [gained]},
    ]
    decision = {"verdict": "PROMOTE", "promoted": "restructure", "judgements": judgements}
    write_json(workspace.out("gate") / "gate.json", decision)
    found = lines(workspace)
    at = found.index("verdict     PROMOTE: restructure")
    assert found[at + 1 : at + 3] == [
        "  readapt      REJECT: class 8 falls by 0.3",
        "  restructure  PROMOTE: smaller",
    ]
    write_json(
        workspace.out("gate") / "gate.json", {"verdict": "REJECT", "promoted": None, "judgements": judgements[:1]}
    )
    assert "verdict     REJECT: nothing" in lines(workspace)


@pytest.mark.parametrize(
    ("outcome", "words"),
    [("candidate", "waits: `nss promote` makes it the champion"), ("promoted", "is the champion"), ("kept", "kept")],
)
def test_a_summary_names_the_version_and_whether_it_is_the_champion(
    workspace: Workspace, outcome: str, words: str
) -> None:
    version = RegisteredVersion("cats", 3)
    cycle = CycleReport((), "run", "sqlite:///store", "1", "", "PROMOTE", "restructure", version, outcome)
    assert f"registered  cats version 3 {words}" in summary(cycle, workspace, is_temporary=True).splitlines()
    assert not [line for line in lines(workspace) if line.startswith("registered")]
