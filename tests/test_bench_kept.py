"""Rows that are kept in the repository: what comes back, when they count, and that nothing else is measured then."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bench import __main__, common, extend_cases, kept, restructure, rq2, rq3, rq4
from bench.catalogue import BENCHES, settings_of
from bench.common import Report, Row, Settings
from nss.files import read_json, write_json

TERMS = {"base": {"epochs": 5}, "pruning": {"step": 0.2, "schemes": ("lamp", "erk")}}
ROWS = [{"method": "lamp", "accuracy": 0.123456789, "curve": [1 / 3, 2]}, {"method": "erk", "accuracy": None}]
STORED = [{"method": "lamp", "accuracy": 0.123457, "curve": [0.333333, 2]}, {"method": "erk", "accuracy": None}]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(kept, "ROWS", tmp_path / "rows")
    return tmp_path / "rows"


def settings(seeds: tuple[int, ...] = (0,), **more: bool) -> Settings:
    return Settings("rq2", ("mnist",), ("nss.zoo:vgg_small",), seeds, more.pop("quick", False), "typed", **more)


def never(*subject: Any) -> list[Row]:
    raise AssertionError(f"{subject} is measured")


def rows_of(
    of: Settings, measure: Callable[..., list[Row]] = never, terms: dict[str, Any] | None = None
) -> tuple[list[Row], Report]:
    report = Report(of, {})
    kept.add_subjects(report, lambda name: terms or TERMS, measure)
    return report.rows, report


# Round trip.


def test_kept_rows_come_back_with_six_digits_and_nothing_is_measured(folder: Path) -> None:
    first, _ = rows_of(settings(keep=True), lambda *_: ROWS)
    again, report = rows_of(settings())
    assert first == again == STORED
    (origin,) = report.stored
    assert origin["versions"] == common.versions()
    assert origin["machine"] == common.machine()
    assert origin["code"] == common.CODE
    assert (origin["data"], origin["model"], origin["seed"]) == ("mnist", "nss.zoo:vgg_small", 0)


def test_a_file_says_what_it_is_of_and_has_one_row_a_line(folder: Path) -> None:
    rows_of(settings(keep=True), lambda *_: ROWS)
    path = folder / "rq2" / "mnist-vgg_small-0.json"
    _, *lines, end = path.read_text(encoding="utf-8").splitlines()
    assert [json.loads(line.removesuffix(",")) for line in lines] == STORED
    assert end == "]}"
    content = read_json(path)
    assert content["command"] == "typed"
    assert content["code"] == common.CODE
    assert content["terms"]["pruning"] == {"step": 0.2, "schemes": ["lamp", "erk"]}
    assert content["protocol"] == common.digest(content["terms"])
    assert [each.name for each in path.parent.iterdir()] == [path.name]


def test_without_keep_nothing_is_written_and_the_rows_are_rounded_all_the_same(folder: Path) -> None:
    assert rows_of(settings(), lambda *_: ROWS)[0] == STORED
    assert not folder.exists()


# Another protocol.


def test_rows_of_another_protocol_are_measured_anew_and_the_difference_is_said(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows_of(settings(keep=True), lambda *_: ROWS)
    other = {"base": {"epochs": 5}, "pruning": {"step": 0.3, "more": 1}}
    new = [{"method": "new"}]
    assert rows_of(settings(), lambda *_: new, other)[0] == new
    assert capsys.readouterr().err.splitlines() == [
        "bench: mnist-vgg_small-0.json is of another protocol: pruning.step was 0.2, now 0.3",
        'bench: mnist-vgg_small-0.json is of another protocol: pruning.schemes was ["lamp", "erk"], now absent',
        "bench: mnist-vgg_small-0.json is of another protocol: pruning.more was absent, now 1",
    ]
    assert rows_of(settings())[0] == STORED, "it is not replaced without being asked"
    rows_of(settings(keep=True), lambda *_: new, other)
    assert rows_of(settings(), terms=other)[0] == new
    assert rows_of(settings(stored=True, seeds=(0,)), terms=other)[0] == new


def test_rows_of_another_factory_of_the_same_name_are_not_taken(capsys: pytest.CaptureFixture[str]) -> None:
    rows_of(settings(keep=True), lambda *_: ROWS)
    other = Settings("rq2", ("mnist",), ("elsewhere:vgg_small",), (0,), False, "")
    assert rows_of(other, lambda *_: [{"method": "new"}])[0] == [{"method": "new"}]
    assert 'model was "nss.zoo:vgg_small", now "elsewhere:vgg_small"' in capsys.readouterr().err


@pytest.mark.parametrize("partial", [{"quick": True}, {"times": False}])
def test_a_quick_run_and_one_without_times_leave_kept_rows_alone(
    partial: dict[str, bool], capsys: pytest.CaptureFixture[str]
) -> None:
    rows_of(settings(keep=True), lambda *_: ROWS)
    assert rows_of(settings(**partial), lambda *_: [{"method": "new"}])[0] == [{"method": "new"}]
    assert capsys.readouterr().err == ""


def test_rows_of_other_code_are_taken_and_said_and_a_file_without_code_is_of_unknown_code(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(common, "OTHER_CODE", Counter())
    rows_of(settings((0, 1, 2), keep=True), lambda *_: ROWS)
    for seed, code in ((1, {"code": "other"}), (2, {})):
        path = folder / "rq2" / f"mnist-vgg_small-{seed}.json"
        content = {name: value for name, value in read_json(path).items() if name != "code"}
        write_json(path, {**content, **code})
    rows, report = rows_of(settings((0, 1, 2)))
    assert rows == STORED * 3
    assert [each.get("code") for each in report.stored] == [common.CODE, "other", None]
    for _ in range(2):
        report.write(tmp_path / "out.json")
    assert capsys.readouterr().err == (
        f"bench: {folder / 'rq2'}: 2 taken of other or unknown code of nss, remove them there to measure again\n"
    )


# Missing seeds.


def test_seeds_that_are_missing_are_measured_and_the_others_taken() -> None:
    rows_of(settings((0, 2), keep=True), lambda name, factory, seed: [{"seed": seed}])
    asked: list[int] = []

    def measure(name: str, factory: str, seed: int) -> list[Row]:
        asked.append(seed)
        return [{"seed": 10 + seed}]

    assert rows_of(settings((0, 1, 2)), measure)[0] == [{"seed": 0}, {"seed": 11}, {"seed": 2}]
    assert asked == [1]


def test_of_stored_subjects_only_the_missing_ones_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    rows_of(settings((0, 2), keep=True), lambda name, factory, seed: [{"seed": seed}])
    assert rows_of(settings((0, 1, 2), stored=True))[0] == [{"seed": 0}, {"seed": 2}]
    said = capsys.readouterr().err
    assert said == "bench: mnist-vgg_small-1.json is missing: mnist nss.zoo:vgg_small 1 is left out\n"


def test_where_nothing_is_stored_it_says_how_to_get_some() -> None:
    with pytest.raises(SystemExit, match="no rows of rq2 are kept: measure some with --keep"):
        rows_of(settings(stored=True))


# The benchmarks that keep rows.

WHO: Row = {"data": "fashion-mnist", "model": "nss.zoo:vgg_small", "seed": 0}
PRUNED = {"iterations": 3, "cr": 2.0, "stop": True, "accuracy": 0.9, "original": 0.91, "val_accuracy": 0.9}
PRUNED |= {"val_original": 0.905}
SMALLER = {"budget": 0.5, "macs": 0.5, "accuracy_before": 0.8, "accuracy": 0.9, "worst_class": 0.7, "original": 0.93}
ADAPTED = {"situation": "drift", "setting": rq3.MAIN[1], "new_accuracy": 0.8, "old_accuracy": 0.7, "new_val": 0.8}
ADAPTED |= {"old_val": 0.7, "chosen": True, "learning_rate": 0.01, "trained_share": 0.2}
GROWN = {"setting": "5 + 5", "told_old": 0.9, "told_new": 0.8, "old_accuracy": 0.7, "new_accuracy": 0.6}
GROWN |= {"accuracy": 0.65, "before": 0.95, "seconds": 4.0, "steps": 8, "chosen": True}
CHAIN = {"setting": "2 + 2 + 2 + 2 + 2", "method": "nss"}
MEASURED = {
    "rq2": [WHO | PRUNED | {"method": "lamp", "setting": each} for each in rq2.SETTINGS],
    "restructure": [WHO | SMALLER | {"method": each, "budget": 0.5} for each in restructure.METHODS],
    "rq3": [
        *(WHO | ADAPTED | {"method": each} for each in ("full", "deeparc", "nss")),
        WHO | {"step": "full", "milliseconds": 3.0, "of_full": 1.0, "trained_share": 1.0},
    ],
    "rq4": [
        *(WHO | GROWN | {"method": each} for each in ("naive", "nss")),
        WHO | CHAIN | {"chosen": True, "told": 0.9, "accuracy": 0.8, "told_forgetting": 0.0, "forgetting": 0.1},
        WHO | CHAIN | {"after": 1, "task": 1, "told": 0.9, "accuracy": 0.9},
        WHO | {"setting": "5 + 5", "step": "naive", "milliseconds": 3.0, "of_naive": 1.0},
    ],
}


class BuiltError(Exception):
    """A base model is built, or its data are read."""


@pytest.fixture
def nothing_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    def build(*subject: Any) -> Any:
        raise BuiltError(subject)

    for module, name in ((common, "base_model"), (extend_cases, "base_model"), (common, "dataset")):
        monkeypatch.setattr(module, name, build)


def whole(name: str, **more: Any) -> Settings:
    asked = {"data": [WHO["data"]], "models": [WHO["model"]], "seeds": [0], "command": ""}
    return settings_of(name, **{**asked, **more})


@pytest.mark.parametrize("name", [name for name, entry in BENCHES.items() if entry.kept])
@pytest.mark.usefixtures("nothing_is_built")
def test_no_base_model_is_built_when_everything_is_kept(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = {"rq2": rq2, "restructure": restructure, "rq3": rq3, "rq4": rq4}[name]
    with monkeypatch.context() as patch:
        patch.setattr(module, "_one", lambda *_, **__: MEASURED[name])
        first = module.run(whole(name, keep=True))
    for again in (module.run(whole(name)), module.run(whole(name, seeds=[0, 1], stored=True))):
        assert again.rows == first.rows == MEASURED[name]
        assert again.summary == first.summary
    module.draw(again, tmp_path / "again.png")
    assert (tmp_path / "again.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(BuiltError):
        module.run(whole(name, seeds=[0, 1]))


@pytest.mark.parametrize("name", [name for name, entry in BENCHES.items() if entry.kept])
def test_every_number_of_the_protocol_that_is_changed_measures_anew(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = {"rq2": rq2, "restructure": restructure, "rq3": rq3, "rq4": rq4}[name]
    changed = {
        "rq2": {"DROP": 0.4, "PER_CLASS": 1, "TOLERANCE": 0.5, "BATCH": 1, "RATE": 0.5, "WHOLE": rq2.SMALL},
        "restructure": {"PER_CLASS": 1, "CALIBRATION": 1, "BATCH": 1, "RATES": (0.5,), "ALIGNED": 2}
        | {"CAP": 0.5, "METHODS": ("nss",), "WHOLE": restructure.SMALL, "TOLERANCE": 0.5, "HALVINGS": 1, "REPEATS": 1}
        | {"KNOWLEDGE": {"metric": "taylor", "rule": "cumulative", "threshold": 0.9}},
        "rq3": {"NEW": 1, "EPS": 0.5, "PGD_STEPS": 1, "FRESH": 1, "SHARE": 0.5, "PER_CLASS": 1, "LAST": 1}
        | {"THRESHOLD": 0.5, "BATCH": 1, "MARGIN": 0.5, "TURNS": 1, "PROBE": 1, "MUTANT_IMAGES": 1, "CASES": rq3.QUICK},
        "rq4": {"BASE": 1, "HALVES": (4, 6), "WEIGHT_DECAY": 0.1, "FISHER_IMAGES": 1, "PROBE": 1, "TEMPERATURE": 1}
        | {"SHARE": 0.5, "WIDTH": 0.5, "RATE": 0.5, "PER_CLASS": 1, "BATCH": 1, "WHOLE": rq4.SMALL},
    }[name]
    for where, constant, value in [
        (common, "EPOCHS", {f"{WHO['data']}{'-task' if name == 'rq4' else ''}": 1}),
        *((module, constant, value) for constant, value in changed.items()),
    ]:
        with monkeypatch.context() as patch:
            patch.setattr(module, "_one", lambda *_, **__: MEASURED[name])
            module.run(whole(name, keep=True))
            assert "another protocol" not in capsys.readouterr().err
            patch.setattr(where, constant, value)
            module.run(whole(name))
            assert "another protocol" in capsys.readouterr().err, constant


KEYS = {"PER_CLASS": 1, "CALIBRATION": 1, "BATCH": 1, "RATES": (0.5,), "ALIGNED": 2, "CAP": 0.5, "TOLERANCE": 0.5}
KEYS |= {"HALVINGS": 1, "KNOWLEDGE": {}}


def test_what_decides_rows_of_restructure_is_in_the_keys_of_the_cache_and_repeats_in_that_of_latencies(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def keys() -> dict[str, str]:
        found: dict[str, str] = {}
        monkeypatch.setattr(restructure, "resumed", lambda bench, key, _: found.update({bench: repr(key)}) or [])
        restructure._one(subject, restructure.SMALL, times=True)
        return found

    monkeypatch.setattr(restructure, "model_digest", lambda _: "")
    subject = restructure._Subject("d", "m:n", 0)
    vars(subject)["model"] = None
    first = keys()
    for constants, bench in ((KEYS, "restructure"), ({"REPEATS": 1}, "restructure-latency")):
        for constant, value in constants.items():
            with monkeypatch.context() as patch:
                patch.setattr(restructure, constant, value)
                assert [name for name, key in keys().items() if key != first[name]] == [bench], constant


# The command line.


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        (
            "rq1 --keep --json x.json",
            "--keep and --stored are of benchmarks that take hours: restructure, rq2, rq3, rq4",
        ),
        ("rq2 --keep --quick --json x.json", "rows are kept of whole measurements: leave out --quick"),
        ("rq3 --keep --without-times --json x.json", "rows are kept of whole measurements"),
        ("rq2 --stored --data a/b.npz --json x.json", "rows are kept of data sets by name"),
        ("rq2 --without-times --json x.json", "--without-times is of benchmarks that take times besides: restructure"),
        ("rq2", "rq2 needs --json OUT.json"),
        ("rq2 --json x.json --results x", "--results is of all and tables"),
        ("all --json x.json", "all takes --quick, --keep, --results and nothing else"),
        ("all --keep --quick", "rows are kept of whole measurements"),
        ("tables --quick", "tables takes --results and nothing else"),
    ],
)
def test_what_does_not_go_together_is_refused(
    typed: str, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["bench", *typed.split()])
    with pytest.raises(SystemExit) as end:
        __main__.main()
    assert end.value.code == 2
    assert said in " ".join(capsys.readouterr().err.split())
