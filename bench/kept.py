"""Rows that are kept in the repository, so that what takes hours can be measured over many days and machines.

bench/rows/BENCH/DATA-MODEL-SEED.json holds all rows of one subject: all methods were measured against the same base
model, on one machine. They are taken in place of a measurement as long as what decides them, the terms, is the same; to
measure a subject again, remove its file. Other code of nss does not decide: it is noted, and said when rows are taken.
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from bench.common import CODE, SUBJECT, Report, Row, Settings, digest, machine, note_code, rounded, say, versions
from nss.files import read_json, replacing

ROWS = Path(__file__).resolve().parent / "rows"
ORIGIN = (*SUBJECT, "versions", "machine", "code")
"""what a result says of a subject whose rows are kept; files from before code was noted lack it"""

Terms = Callable[[str], Mapping[str, Any]]
Measure = Callable[[str, str, int], list[Row]]


def add_subjects(report: Report, terms: Terms, measure: Measure) -> None:
    """Add the rows of every subject of the settings to a report: kept ones, or those that are measured now.

    terms: of a data set by name, what decides the rows (JSON-able). measure: of (data, factory, seed); it is not called
    where rows are kept. What differs in them, and with `stored` what is missing, is said on standard error.
    Raises SystemExit when only kept rows are asked for and there are none.
    """
    for subject in report.settings.subjects():
        report.rows += _of_subject(report, subject, _plain(terms(subject[0])), measure)
    if report.settings.stored and not report.rows:
        raise SystemExit(f"bench: no rows of {report.settings.bench} are kept: measure some with --keep")


def path_of(bench: str, name: str, factory: str, seed: int) -> Path:
    """Return where the rows of a subject are kept.

    >>> path_of("rq2", "mnist", "nss.zoo:vgg_small", 0).relative_to(ROWS).as_posix()
    'rq2/mnist-vgg_small-0.json'
    """
    return ROWS / bench / f"{Path(name).stem}-{factory.partition(':')[2]}-{seed}.json"


def _of_subject(report: Report, subject: tuple[str, str, int], terms: Row, measure: Measure) -> list[Row]:
    settings, path = report.settings, path_of(report.settings.bench, *subject)
    # A quick run is of other terms by design, and a run without times would keep rows that lack them.
    kept = None if settings.quick or not settings.times else _matching(path, _identity(settings, subject), terms)
    if kept is not None:
        note_code(path.parent, kept.get("code"))
        report.stored.append({name: kept[name] for name in ORIGIN if name in kept})
        rows: list[Row] = kept["rows"]
        return rows
    if settings.stored:
        say(f"{path.name} is missing: {' '.join(map(str, subject))} is left out")
        return []
    rows = rounded(measure(*subject))
    if settings.keep:
        head = {"protocol": digest(terms), "command": settings.command}
        made = {"versions": versions(), "machine": machine(), "code": CODE}
        _write(path, {**_identity(settings, subject), **head, **made, "terms": terms}, rows)
    return rows


def _identity(settings: Settings, subject: tuple[str, str, int]) -> Row:
    return {"bench": settings.bench, **dict(zip(SUBJECT, subject, strict=True))}


def _matching(path: Path, identity: Row, terms: Row) -> Row | None:
    """Return a file of kept rows if it is of this subject and of these terms; say what differs if not."""
    if not path.exists():
        return None
    kept: Row = read_json(path)
    if kept["protocol"] == digest(terms) and all(kept[name] == value for name, value in identity.items()):
        return kept
    before = {**{name: kept[name] for name in identity}, **dict(_leaves(kept["terms"]))}
    now = {**identity, **dict(_leaves(terms))}
    for name in (name for name in {**before, **now} if before.get(name) != now.get(name)):
        say(f"{path.name} is of another protocol: {name} was {_short(before, name)}, now {_short(now, name)}")
    return None


def _leaves(content: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    """Yield what lies in nested records, each under its path."""
    if isinstance(content, Mapping):
        for name, value in content.items():
            yield from _leaves(value, f"{place}.{name}" if place else name)
    else:
        yield place, content


def _short(content: Mapping[str, Any], name: str) -> str:
    return textwrap.shorten(json.dumps(content[name]), 100) if name in content else "absent"


def _write(path: Path, head: Row, rows: list[Row]) -> None:
    """Write one row a line, so that a change shows as the rows that it is of."""
    start = json.dumps({**head, "rows": []}, ensure_ascii=False).removesuffix("]}")
    lines = ",\n".join(json.dumps(row, ensure_ascii=False, separators=(",", ":")) for row in rows)
    with replacing(path) as part:
        part.write_text(f"{start}\n{lines}\n]}}\n", encoding="utf-8")


def _plain(terms: Mapping[str, Any]) -> Row:
    """Return terms as they are read back: keys are texts, sequences are lists."""
    found: Row = json.loads(json.dumps(terms))
    return found
