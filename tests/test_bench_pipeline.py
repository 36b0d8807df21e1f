"""How the figures of `python -m bench pipeline` come about; the bench itself is run by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from bench.common import Report, Settings
from bench.pipeline import EXECUTED, IDLE, LIMITS, REPRO, SERVED, STAGE, Bench, draw, summarise, timed


def rows(**seconds: list[float]) -> list[dict]:
    names = {"idle": IDLE, "served": SERVED, "executed": EXECUTED, "repro": REPRO}
    return [{"method": names[key], "seconds": value} for key, values in seconds.items() for value in values]


def test_cases_are_taken_in_turn() -> None:
    taken: list[str] = []

    def case(name: str) -> float:
        taken.append(name)
        return float(len(taken))

    found = timed({name: lambda name=name: case(name) for name in "ab"}, 2)
    assert taken == ["a", "b", "a", "b"]
    assert [(row["method"], row["seed"], row["seconds"]) for row in found] == [
        ("a", 0, 1.0),
        ("b", 0, 2.0),
        ("a", 1, 3.0),
        ("b", 1, 4.0),
    ]


def test_the_summary_has_medians_the_worst_and_what_a_stage_adds_to_the_run_before_it() -> None:
    found = summarise(rows(idle=[9, 30, 8], served=[2, 3, 4], executed=[7, 12, 8], repro=[2.5, 1, 2.25]))
    assert [row["method"] for row in found] == [IDLE, SERVED, REPRO, STAGE]
    assert [row["seconds"] for row in found] == [9, 3, 2.25, 5]
    assert [row["worst"] for row in found] == [30, 4, 2.5, 9]
    assert [row["within"] for row in found] == [True, True, False, True]
    assert [row["limit"] for row in found] == list(LIMITS.values()) == [10, 3, 2, 6]


def test_the_picture_and_the_file_are_written(tmp_path: Path) -> None:
    report = Report(Settings("pipeline", (), (), (0,), True, "python -m bench pipeline"), {"taken": "once"})
    report.rows = rows(idle=[1], served=[1], executed=[2], repro=[1])
    report.summary = summarise(report.rows)
    draw(report, tmp_path / "out.png")
    report.write(tmp_path / "out.json")
    assert Image.open(tmp_path / "out.png").width > 500
    assert [row["within"] for row in json.loads((tmp_path / "out.json").read_text())["summary"]] == [True] * 4


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path / "home"))
    return Bench(tmp_path, "")


def test_a_command_is_timed_in_the_copy_without_what_the_shell_has_set(bench: Bench, monkeypatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://elsewhere")
    script = "import os, time; time.sleep(.2); open('seen', 'w').write(f'{dict(os.environ)}')"
    assert 0.2 <= bench.call("python", "-c", script, PREFECT_API_URL="http://here") < 20
    seen = (bench.root / "seen").read_text()
    assert "http://here" in seen
    assert "elsewhere" not in seen
    assert str(bench.root / "home") in seen


def test_a_command_that_fails_ends_the_bench_with_what_it_said(bench: Bench) -> None:
    with pytest.raises(SystemExit, match=r"ended with 3\n.*the disk is full"):
        bench.call("python", "-c", "import sys; sys.stderr.write('the disk is full'); sys.exit(3)")


def test_parameters_are_changed_and_comments_stay(bench: Bench) -> None:
    (bench.root / "params.yaml").write_text("base:\n  epochs: 8 # passes\n  seed: 0\n")
    bench.change("base", seed=1000)
    assert (bench.root / "params.yaml").read_text() == "base:\n  epochs: 8 # passes\n  seed: 1000\n"
