"""`python -m bench all`: what runs beside what, that failures stay apart, and that what is finished is left alone."""

from __future__ import annotations

import contextlib
import json
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from bench import __main__, common, restructure, rq2, rq3, tables
from bench import all as everything
from bench.catalogue import BENCHES, module_of, protocol_of, settings_of
from bench.common import SUBJECT, Report, Row, Settings
from bench.readapt_peers import PEERS as ADAPTING
from nss.files import read_json, write_json
from nss.prune_weights import SCHEMES

Call = Callable[[list[str], int, Path], tuple[int, float]]
SIDE = {"rq1", "restructure", "rq2", "rq3", "triage", "rq4"}
ALONE = {"profile", "scale", "pipeline", "restructure", "rq3", "rq4"}


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(common, "CACHE", tmp_path / "cache")
    return tmp_path / "results"


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """What is started. Each of it writes its result, as a run of these arguments would."""
    made: list[list[str]] = []
    monkeypatch.setattr(everything, "_call", caller(made))
    return made


def caller(made: list[list[str]], failing: str = "") -> Call:
    def call(arguments: list[str], threads: int, log: Path) -> tuple[int, float]:
        made.append([*arguments, str(threads)])
        name, path = arguments[0], Path(arguments[-1])
        if name == failing:
            log.write_text("first\nRuntimeError: out of luck\n")
            return 3, 1.0
        settings = settings_of(name, command="", quick="--quick" in arguments, times="--without-times" not in arguments)
        report_of(settings).write(path, spent={"seconds": 1.0, "cpu_seconds": 1.5})
        return 0, 1.5

    return call


def report_of(settings: Settings) -> Report:
    """Return a report with a row of each subject."""
    return Report(
        settings, protocol_of(settings), [dict(zip(SUBJECT, each, strict=True)) for each in settings.subjects()]
    )


# What runs beside what.


def test_what_judges_accuracy_runs_first_without_times_and_what_takes_times_after_it() -> None:
    side, alone = everything.jobs(Path("there"), quick=True, keep=False)
    assert {job.name for job in side} == SIDE
    assert {job.name for job in alone} == ALONE
    assert set(BENCHES) == SIDE | ALONE
    without = {job.name for job in side if not job.times}
    assert without == SIDE & ALONE
    assert all(job.times for job in alone)
    first = side[0]
    assert first.arguments == ["rq4", "--quick", "--without-times", "--summary", "--json", "there/rq4.json"]


def test_two_run_at_a_time_with_one_thread_each_and_times_are_taken_alone_with_two(
    results: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    running, seen, both = set(), [], threading.Barrier(2, timeout=60)
    write = caller([])

    def call(arguments: list[str], threads: int, log: Path) -> tuple[int, float]:
        running.add(arguments[0])
        if threads == 1:
            both.wait()  # nobody goes on before another has come
        seen.append((arguments[0], threads, len(running)))
        found = write(arguments, threads, log)
        if threads == 1:
            both.wait()
        running.remove(arguments[0])
        return found

    monkeypatch.setattr(everything, "_call", call)
    assert everything.run(results, quick=True) == 0
    assert {name for name, threads, _ in seen if threads == 1} == SIDE
    assert {(name, count) for name, threads, count in seen if threads == 2} == {(name, 1) for name in ALONE}


# Failures.


def test_a_failure_does_not_stop_the_others_and_is_said_at_the_end(
    results: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made: list[list[str]] = []
    monkeypatch.setattr(everything, "_call", caller(made, failing="rq3"))
    assert everything.run(results, quick=True) == 1
    names = [call[0] for call in made]
    assert set(names) == set(BENCHES)
    assert names.count("rq3") == 1, "what failed is not run for its times"
    assert names.count("rq4") == 2
    out, err = capsys.readouterr()
    lines = {line.split("│")[1].strip(): line for line in out.splitlines() if line.startswith("│")}
    assert set(lines) == set(BENCHES)
    assert "False" in lines["rq3"]
    assert all("True" in line for name, line in lines.items() if name != "rq3")
    assert "rq3: failed with status 3" in err
    assert "RuntimeError: out of luck" in err
    page = (results / "README.md").read_text(encoding="utf-8")
    assert "## rq4" in page
    assert "## rq3" not in page


def test_seconds_of_both_runs_are_added_and_one_that_failed_counts() -> None:
    runs: list[Row] = [
        {"name": "rq3", "seconds": 2.0, "cpu_seconds": 3.0, "ok": True},
        {"name": "rq1", "seconds": 1.0, "cpu_seconds": 1.0, "ok": True},
        {"name": "rq3", "seconds": 5.0, "cpu_seconds": 4.0, "ok": False},
    ]
    assert everything.together(runs) == [
        {"name": "rq3", "seconds": 7.0, "cpu_seconds": 7.0, "ok": False},
        {"name": "rq1", "seconds": 1.0, "cpu_seconds": 1.0, "ok": True},
    ]


def test_a_child_is_a_process_whose_status_and_cpu_seconds_come_back(tmp_path: Path) -> None:
    write_json(tmp_path / "scale.json", {"bench": "scale", **result(), "summary": [{"categories": 3}]})
    status, cpu_seconds = everything._call(["tables", "--results", str(tmp_path)], 1, tmp_path / "log")
    assert status == 0
    assert 0.5 < cpu_seconds < 60
    assert (tmp_path / "README.md").read_text(encoding="utf-8") == tables.page(tmp_path)
    assert everything._call(["rq1"], 1, tmp_path / "log")[0] == 2
    assert "rq1 needs --json OUT.json" in (tmp_path / "log").read_text(encoding="utf-8")


def result() -> Row:
    return {"command": "c", "versions": {}, "machine": {}, "protocol": {}, "rows": []}


# What is finished.


def test_what_is_finished_is_not_measured_again_unless_its_file_is_removed(
    results: Path, calls: list[list[str]]
) -> None:
    assert everything.run(results, quick=True) == 0
    assert len(calls) == len(SIDE) + len(ALONE)
    calls.clear()
    assert everything.run(results, quick=True) == 0
    assert calls == []
    (results / "rq4.json").unlink()
    (results / "scale.json").unlink()
    assert everything.run(results, quick=True) == 0
    assert [(call[0], "--without-times" in call) for call in calls] == [("rq4", True), ("scale", False), ("rq4", False)]


def test_what_lacks_its_times_only_is_run_for_them(results: Path, calls: list[list[str]]) -> None:
    everything.run(results, quick=True)
    report_of(settings_of("rq3", command="", quick=True, times=False)).write(results / "rq3.json")
    calls.clear()
    everything.run(results, quick=True)
    assert [(call[0], "--without-times" in call) for call in calls] == [("rq3", False)]


def test_another_protocol_is_measured_again_and_a_quick_one_is_not_a_whole_one(
    results: Path, calls: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    everything.run(results, quick=True)
    calls.clear()
    monkeypatch.setattr("bench.rq1.PROTOCOL", {"masked": "in other words"})
    everything.run(results, quick=True)
    assert [call[0] for call in calls] == ["rq1"]
    calls.clear()
    everything.run(results)
    assert {call[0] for call in calls} == set(BENCHES)
    assert not any("--quick" in call for call in calls)


def finished(report: Report, folder: Path, **changed: object) -> bool:
    """Say whether a whole result counts, of which some entries are others; None: it is left out."""
    job = everything.Job(report.settings.bench, folder)
    report.write(job.result)
    content = {**read_json(job.result), **changed}
    write_json(job.result, {name: value for name, value in content.items() if value is not None})
    return job.is_finished()


def test_a_result_is_finished_when_no_subject_is_missing_that_was_asked_for(tmp_path: Path) -> None:
    report = report_of(settings_of("rq4", command="python -m bench rq4 --stored --json x.json", stored=True))
    assert len(report.rows) == 18
    assert finished(report, tmp_path)
    report.rows.pop(7)
    assert not finished(report, tmp_path)


def test_an_older_result_that_names_no_subjects_lacks_some_only_if_all_its_rows_were_kept_ones(tmp_path: Path) -> None:
    report = report_of(settings_of("rq4", command="python -m bench rq4 --json x.json"))
    stored = [{**row, "versions": {}, "machine": {}} for row in report.rows]
    typed = "python -m bench rq4 --stored --json x.json"
    assert not finished(report, tmp_path, measured=None, stored=stored[:3], command=typed)
    assert finished(report, tmp_path, measured=None, stored=stored, command=typed)
    assert finished(report, tmp_path, measured=None, stored=stored[:3])


def test_rows_that_are_of_no_seed_or_of_no_subject_stand_for_all_that_were_asked_for(tmp_path: Path) -> None:
    profiled = report_of(settings_of("profile", command=""))
    profiled.rows = [{"data": row["data"], "model": row["model"]} for row in profiled.rows]
    assert finished(profiled, tmp_path)
    assert read_json(tmp_path / "profile.json")["measured"] == [
        {"data": "fashion-mnist", "model": "nss.zoo:vgg_small"},
        {"data": "fashion-mnist", "model": "torchvision.models:resnet18"},
    ]
    profiled.rows = profiled.rows[:3]
    assert not finished(profiled, tmp_path)
    assert finished(report_of(settings_of("scale", command="")), tmp_path)


@pytest.mark.parametrize("typed", ["rq1 --quick --json {}/rq1.json", "all --quick --results {}"])
def test_a_whole_result_is_not_replaced_by_a_quick_one(
    typed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ran: list[str] = []
    monkeypatch.setattr("bench.rq1.run", lambda settings: ran.append("one") or Report(settings, {}))
    monkeypatch.setattr("bench.rq1.draw", lambda *_: None)
    monkeypatch.setattr(everything, "run", lambda *_, **__: ran.append("all") or 0)
    monkeypatch.setattr(sys, "argv", ["bench", *typed.format(tmp_path).split()])
    write_json(tmp_path / "rq1.json", {"bench": "rq1", **result(), "command": "python -m bench rq1 --json rq1.json"})
    with pytest.raises(SystemExit) as end:
        __main__.main()
    assert end.value.code == 2
    assert "whole results are not replaced by quick ones" in capsys.readouterr().err
    assert ran == []
    write_json(tmp_path / "rq1.json", {"bench": "rq1", **result(), "command": "python -m bench rq1 --quick"})
    with contextlib.suppress(SystemExit):
        __main__.main()
    assert ran == [{"rq1": "one", "all": "all"}[typed.split()[0]]]


def test_rows_are_kept_by_the_run_that_completes_a_subject(results: Path, calls: list[list[str]]) -> None:
    everything.run(results, keep=True)
    kept = {(call[0], "--without-times" in call) for call in calls if "--keep" in call}
    assert kept == {("rq2", False), ("restructure", False), ("rq3", False), ("rq4", False)}


def test_the_seconds_of_a_result_are_those_of_both_runs(tmp_path: Path) -> None:
    path, spent = tmp_path / "rq3.json", {"seconds": 2.0, "cpu_seconds": 3.0}
    first, second = (settings_of("rq3", command="", quick=True, times=times) for times in (False, True))
    assert common.spent_before(path, protocol_of(first), spent) == spent
    Report(first, protocol_of(first)).write(path, spent=spent)
    assert common.spent_before(path, protocol_of(first), spent) == spent, "what is measured anew has no earlier part"
    found = common.spent_before(path, protocol_of(second), spent)
    assert found == {"seconds": 4.0, "cpu_seconds": 6.0}
    Report(second, protocol_of(second)).write(path, spent=found)
    assert common.spent_before(path, protocol_of(second), spent) == spent
    assert read_json(path)["spent"] == found


# Quick forms.


def test_a_quick_protocol_says_what_is_left_out_and_on_what_it_is_measured() -> None:
    for name in BENCHES:
        quick, whole = (protocol_of(settings_of(name, command="", quick=is_quick)) for is_quick in (True, False))
        assert len(quick["quick"]) > 10
        assert "quick" not in whole
        assert quick["subjects"]["seeds"] == [0]
        assert whole["subjects"]["seeds"] == [0, 1, 2]
        assert json.loads(json.dumps(quick)) == quick
        assert len(quick["subjects"]["data"]) <= 1


def test_every_benchmark_says_what_its_columns_are() -> None:
    for name in BENCHES:
        module = module_of(name)
        assert module.COLUMNS.endswith(".")
        assert module.__doc__


def test_a_quick_run_compares_every_scheme_and_variant_that_a_whole_one_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def keys_of(module: ModuleType, subject: common.Subject, *size: object, **more: object) -> list[Row]:
        keys: list[Row] = []
        monkeypatch.setattr(module, "resumed", lambda _, key, __: keys.append(key) or [])
        monkeypatch.setattr(module, "model_digest", lambda _: "")
        vars(subject)["model"] = None
        module._one(subject, *size, **more)
        return keys

    who = "d", "m:n", 0
    pruned = [keys_of(rq2, rq2._Subject(*who, course)) for course in (rq2.SMALL, rq2.WHOLE)]
    assert [{(key["method"], key["setting"]) for key in keys} for keys in pruned] == [
        {(scheme, setting) for scheme in SCHEMES for setting in ("dense", "pre-slice")}
    ] * 2
    smaller = [
        keys_of(restructure, restructure._Subject(*who), size, times=False)
        for size in (restructure.SMALL, restructure.WHOLE)
    ]
    assert [{key["method"] for key in keys} for keys in smaller] == [
        {"nss", "nss-8", "nss-cut", "tp-magnitude-local", "tp-magnitude-global", "tp-taylor-local", "tp-taylor-global"}
    ] * 2
    assert all(set(grid.rates) == {*ADAPTING, "nss"} for grid in rq3.QUICK.values())
