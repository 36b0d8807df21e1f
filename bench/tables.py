"""One page of all result files of a folder: `python -m bench tables` writes its README.md, and nothing is measured."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.catalogue import BENCHES, module_of
from bench.common import SUBJECT, Row, Table, asked_for, is_number, missing, subjects_of, text
from nss.files import read_json, replacing

HEAD = """# Results

Written by `python -m bench tables --results FOLDER` from the JSON files in this folder; do not edit it. Each of them
also holds its protocol, all means and, without `--summary`, all rows. Accuracies are shares of 1, `_sd` is a standard
deviation over seeds, `_seeds` of how many a mean is where not all have a value.

`python -m bench NAME --json OUT.json` measures one, `python -m bench all` all of them, `python -m bench all --quick` a
quick form of each: the same methods on less data. What is finished is not measured again. With `--keep` the rows of
finished subjects go to `bench/rows`, so that what takes hours can be measured over many days and machines.

Data sets lie as `.npz` files in `~/.cache/nss-datasets`, or where `NSS_BENCH_DATA` says; base models are trained once
and kept in `~/.cache/nss-bench`. Times are of two shared cores: read the ratios. The seconds of a result are of the run
that wrote it; what had been measured before is not in them.
"""


def write(folder: Path) -> None:
    """Write README.md into a folder of result files; the same files give the same page."""
    with replacing(folder / "README.md") as part:
        part.write_text(page(folder), encoding="utf-8")


def page(folder: Path) -> str:
    """Return the page: a section for each result file, in the order of the catalogue, then by name."""
    found = {path.stem: read_json(path) for path in sorted(folder.glob("*.json"))}
    names = sorted(found, key=lambda name: [*BENCHES].index(found[name]["bench"]))
    return "\n".join([HEAD, *(section(name, found[name], folder) for name in names)])


def section(name: str, result: Mapping[str, Any], folder: Path) -> str:
    """Return one result as Markdown: what it is, how it was made, its tables and its picture."""
    module = module_of(result["bench"])
    assert module.__doc__
    first = " ".join(module.__doc__.split("\n\n")[0].split())
    parts = [f"## {name}", first, _made(result), f"Columns: {module.COLUMNS}"]
    for table in module.tables(result["summary"]):
        if table.rows:
            parts += [f"**{table.title}**", markdown(table)]
    if (folder / f"{name}.png").exists():
        parts.append(f"![{name}]({name}.png)")
    return "\n\n".join(parts) + "\n"


def _made(result: Mapping[str, Any]) -> str:
    """Say how a result came about."""
    protocol = result["protocol"]
    lines = [f"`{result['command']}`", *_origins(result)]
    if subjects := subjects_of(result):
        lines.append(f"Measured on: {_named(subjects)}")
    if lacking := missing(result):
        lines.append(f"Missing: {len(lacking)} of the {len(asked_for(result))} subjects that were asked for")
    if "quick" in protocol:
        lines.append(f"Quick, it leaves out or takes less: {protocol['quick']}")
    if "times" in protocol:
        lines.append(f"Times: {protocol['times']}")
    if stored := result.get("stored"):
        lines.append(f"Rows kept in `bench/rows`: of {len(stored)} subjects")
    return "\n".join(f"- {line}" for line in lines)


def _origins(result: Mapping[str, Any]) -> Iterator[str]:
    """Say with what the rows were measured, where each differs once: kept ones elsewhere than what was written now."""
    stored = result.get("stored", [])
    own = [] if stored and len(stored) >= len(subjects_of(result)) else [result]
    yield from dict.fromkeys(f"Versions: {_listed(each['versions'])}" for each in [*own, *stored])
    machines = [*dict.fromkeys(f"Machine: {_listed(each['machine'])}" for each in [*own, *stored])]
    if own and (spent := result.get("spent")):
        machines[0] += f"; {spent['seconds']:.0f} seconds, of one core {spent['cpu_seconds']:.0f}"
    yield from machines


def _named(subjects: Sequence[Row]) -> str:
    """Name subjects: by kind when they are all that these can be combined to, else the seeds of each model."""
    kinds = {kind: [*dict.fromkeys(each[name] for each in subjects if name in each)] for name, kind in SUBJECT.items()}
    filled = {kind: each for kind, each in kinds.items() if each}
    if math.prod(map(len, filled.values())) == len(subjects):
        return "; ".join(f"{kind} {', '.join(map(str, each))}" for kind, each in filled.items())
    models: dict[str, list[str]] = {}
    for each in subjects:
        models.setdefault(f"{each['data']} {each['model']}", []).append(str(each["seed"]))
    return "; ".join(f"{model}, seeds {', '.join(seeds)}" for model, seeds in models.items())


def _listed(content: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in content.items())


def markdown(table: Table) -> str:
    """Return a table as Markdown, without its empty columns; numbers stand right."""
    columns = table.filled()
    rule = ["---:" if is_number(table, column) else "---" for column in columns]
    rows = [[text(row.get(column)) for column in columns] for row in table.rows]
    return "\n".join(map(_line, [columns, rule, *rows]))


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"
