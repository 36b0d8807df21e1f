"""What stages write for DVC and for people: tables, and the word that there was nothing to do."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from nss.files import replacing, write_json

Headers = Mapping[str, Sequence[str]]
Rows = Mapping[str, Iterable[Sequence[Any]]]


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Write a table in one rename; floats with the digits that give them back.

    >>> write_csv(Path("per_class.csv"), ["class", "accuracy"], [("cat", 0.5)])
    """
    with replacing(path) as part, part.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)


def write_tables(folder: Path, headers: Headers, rows: Rows) -> None:
    """Write all tables of a stage, {file: header}, without rows where there are none: DVC's plots name these files."""
    for name, header in headers.items():
        write_csv(folder / name, header, rows.get(name, []))


def write_nothing(folder: Path, headers: Headers, why: str) -> None:
    """Write that a maintenance stage had nothing to do: metrics.json, result.json and empty tables."""
    write_json(folder / "metrics.json", {"done": 0})
    write_json(folder / "result.json", {"done": False, "why": why})
    write_tables(folder, headers, {})


def confusion_rows(confusion: Tensor, classes: Sequence[str]) -> list[tuple[str, str]]:
    """Return a row an image, (actual, answered), as DVC's confusion template counts them.

    confusion: images by actual and by answered class, int64 [classes, classes].
    """
    rows = []
    for actual, counts in zip(classes, confusion.tolist(), strict=True):
        for predicted, count in zip(classes, counts, strict=True):
            rows += [(actual, predicted)] * count
    return rows
