"""The pages of results: they are what the JSON files give, and what they show of a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bench import rq1, rq3, tables, triage
from bench.common import Row, Table
from nss.files import write_json

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted((ROOT / "docs" / "results").rglob("README.md"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.parent.relative_to(ROOT)))
def test_a_committed_page_is_what_its_json_files_give(page: Path) -> None:
    assert page.read_text(encoding="utf-8") == tables.page(page.parent), "run: python -m bench tables --results FOLDER"


def test_every_result_is_on_its_page() -> None:
    assert ROOT / "docs" / "results" / "README.md" in PAGES
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        names = [path.stem for path in page.parent.glob("*.json")]
        assert names
        assert [name for name in names if f"## {name}\n" not in text] == []
        assert [name for name in names if f"![{name}]({name}.png)" not in text] == []


def result(bench: str, summary: list[Row], **more: Any) -> Row:
    versions = {"python": "3.11.7", "torch": "2.14.1"}
    made = {"command": f"python -m bench {bench}", "versions": versions, "machine": {"threads": 2}, "protocol": {}}
    return {"bench": bench, **made, **more, "rows": [], "summary": summary}


SUMMARY = [
    {"categories": 100, "slices": 40, "seconds": 0.123456, "peak_mb": 1234567.0},
    {"categories": 300, "slices": 90, "seconds": 1.0, "peak_mb": 250.0},
]
SECTION = """## scale

How long merging many categories of many neurons takes, and how much memory.

- `python -m bench scale`
- Versions: python 3.11.7, torch 2.14.1
- Machine: threads 2; 61 seconds, of one core 119
- Measured on: data mnist; models m:n, m:o; seeds 0, 1
- Quick, it leaves out or takes less: 1000 categories

Columns: the number of categories and of slices they were merged into, seconds, and the peak_mb of the process after \
each.

**merging, 30000 neurons**

| categories | slices | seconds | peak_mb |
| ---: | ---: | ---: | ---: |
| 100 | 40 | 0.1235 | 1.235e+06 |
| 300 | 90 | 1 | 250 |

![scale](scale.png)
"""


def test_a_section_has_how_it_was_made_its_columns_tables_and_picture(tmp_path: Path) -> None:
    protocol = {"subjects": {"data": ["mnist"], "models": ["m:n", "m:o"], "seeds": [0, 1]}, "quick": "1000 categories"}
    made = result("scale", SUMMARY, protocol=protocol, spent={"seconds": 60.7, "cpu_seconds": 119.2})
    (tmp_path / "scale.png").touch()
    assert tables.section("scale", made, tmp_path) == SECTION


def test_a_section_without_a_picture_and_with_kept_rows_says_so(tmp_path: Path) -> None:
    protocol = {"times": "left to a later run"}
    made = result("scale", SUMMARY, stored=[stored("m:n", 0), stored("m:n", 1)], protocol=protocol)
    found = tables.section("scale", made, tmp_path)
    assert "![" not in found
    assert "- Rows kept in `bench/rows`: of 2 subjects\n" in found
    assert "- Times: left to a later run\n" in found


def stored(model: str, seed: int, threads: int = 1, torch: str = "2.14.1") -> Row:
    """What a result says of a subject whose rows are kept."""
    versions, machine = {"python": "3.11.7", "torch": torch}, {"threads": threads}
    return {"data": "mnist", "model": model, "seed": seed, "versions": versions, "machine": machine}


def made_of(**more: Any) -> list[str]:
    """How a result came about that was asked for two models and two seeds."""
    subjects = {"data": ["mnist"], "models": ["m:n", "m:o"], "seeds": [0, 1]}
    spent = {"seconds": 1.0, "cpu_seconds": 3.0}
    found = tables.section("scale", result("scale", [], protocol={"subjects": subjects}, spent=spent, **more), ROOT)
    return [line for line in found.splitlines() if line.startswith("- ") and not line.startswith("- `")]


def test_a_section_says_what_kept_rows_were_measured_with_and_what_is_missing() -> None:
    kept = [stored("m:n", 0), stored("m:n", 1), stored("m:o", 0, torch="2.15.0")]
    expected = [
        "- Versions: python 3.11.7, torch 2.14.1",
        "- Versions: python 3.11.7, torch 2.15.0",
        "- Machine: threads 1",
        "- Measured on: mnist m:n, seeds 0, 1; mnist m:o, seeds 0",
        "- Missing: 1 of the 4 subjects that were asked for",
        "- Rows kept in `bench/rows`: of 3 subjects",
    ]
    measured = [{name: each[name] for name in ("data", "model", "seed")} for each in kept]
    assert made_of(stored=kept, measured=measured) == expected
    assert made_of(stored=kept, command="x --stored") == expected, "a file from before it said what was measured"


def test_a_section_of_kept_and_of_new_rows_names_both_machines() -> None:
    measured = [{"data": "mnist", "model": model, "seed": seed} for model in ("m:n", "m:o") for seed in (0, 1)]
    assert made_of(stored=[stored("m:n", 0), stored("m:n", 1)], measured=measured) == [
        "- Versions: python 3.11.7, torch 2.14.1",
        "- Machine: threads 2; 1 seconds, of one core 3",
        "- Machine: threads 1",
        "- Measured on: data mnist; models m:n, m:o; seeds 0, 1",
        "- Rows kept in `bench/rows`: of 2 subjects",
    ]


def test_rows_of_no_seed_are_said_to_be_of_none() -> None:
    measured = [{"data": "mnist", "model": "m:n"}, {"data": "mnist", "model": "m:o"}]
    assert made_of(measured=measured)[2:] == ["- Measured on: data mnist; models m:n, m:o"]
    assert len(made_of(measured=[])) == 3


def test_results_stand_in_the_order_of_the_catalogue_and_the_page_is_written_whole(tmp_path: Path) -> None:
    for name, bench in (("rq1-z", "rq1"), ("rq1-a", "rq1"), ("triage", "triage"), ("scale", "scale")):
        write_json(tmp_path / f"{name}.json", result(bench, []))
    tables.write(tmp_path)
    page = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert [line for line in page.splitlines() if line.startswith("## ")] == [
        "## scale", "## rq1-a", "## rq1-z", "## triage",
    ]  # fmt: skip
    assert page.startswith("# Results\n")
    assert page == tables.page(tmp_path)


def test_columns_without_a_value_are_left_out_and_texts_stand_left() -> None:
    rows = [{"method": "a", "x": None, "y": 0.5, "within": True}, {"method": "b", "z": None}]
    assert tables.markdown(Table("t", ("method", "x", "y", "z", "within"), rows)).splitlines() == [
        "| method | y | within |",
        "| --- | ---: | ---: |",
        "| a | 0.5 | True |",
        "| b |  |  |",
    ]


def test_how_many_seeds_a_mean_is_of_stands_beside_it_where_not_all_have_a_value() -> None:
    rows = [{"x": 1.0, "x_sd": 0.5}, {"x": 2.0, "x_sd": None, "x_seeds": 1}]
    assert tables.markdown(Table("t", ("x", "x_sd"), rows)).splitlines() == [
        "| x | x_seeds | x_sd |",
        "| ---: | ---: | ---: |",
        "| 1 |  | 0.5 |",
        "| 2 | 1 |  |",
    ]


# What is shown of a summary.


def test_of_rq1_the_threshold_is_shown_that_is_furthest_ahead_on_validation() -> None:
    who = {"data": "d", "model": "m", "metric": "taylor"}
    rows = [
        {**who, "rule": "score", "threshold": 0.9, "ahead": 0.9, "val_ahead": 0.1},
        {**who, "rule": "score", "threshold": 0.95, "ahead": 0.1, "val_ahead": 0.2},
        {**who, "rule": "energy", "threshold": 0.9, "ahead": 0.1, "val_ahead": -0.5},
    ]
    (table,) = rq1.tables(rows)
    assert [(row["rule"], row["threshold"]) for row in table.rows] == [("score", 0.95), ("energy", 0.9)]


def test_of_triage_drifts_stand_in_a_row_by_strength() -> None:
    who = {"data": "d", "model": "m", "new_images": 30}
    drifts = [{**who, "change": "blur", "strength": each, "found": each / 10} for each in (1, 2, 3, 4, 5)]
    plain, drift = triage.tables([{**who, "change": triage.FALSE, "strength": 0, "found": 0.05}, *drifts])
    assert [row["found"] for row in plain.rows] == [0.05]
    assert tables.markdown(drift).splitlines()[2:] == ["| d | m | blur | 30 | 0.1 | 0.2 | 0.3 | 0.4 | 0.5 |"]


def test_of_rq3_a_step_stands_in_its_own_table_only() -> None:
    method = {"method": "nss", "new_accuracy": 0.5, "trained_share": 0.2, "steps": 10}
    step = {"step": "full", "milliseconds": 3.0, "trained_share": 1.0}
    found = {table.title: list(table.rows) for table in rq3.tables([method, step])}
    assert found["re-adaptation: cost"] == [method]
    assert found["re-adaptation: time of a step"] == [step]
    assert found["re-adaptation: attacks on the adapted model"] == []
