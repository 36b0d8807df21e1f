"""Reading back what stages wrote for people: tables, and numbers among other things."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np


def count_confusion(path: Path, classes: list[str]) -> np.ndarray:
    """Count the rows of a table of actual and predicted classes, [actual, predicted]."""
    places = {name: place for place, name in enumerate(classes)}
    counts = np.zeros((len(places), len(places)), dtype=int)
    for row in read_csv(path):
        counts[places[row["actual"]], places[row["predicted"]]] += 1
    return counts


def read_csv(path: Path) -> list[dict[str, str]]:
    """Return the rows of a table."""
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def cells_of(row: dict[str, str], *texts: str) -> dict[str, float]:
    """Return the numbers in a row of a table, without the columns named and the cells that are empty."""
    return {name: float(cell) for name, cell in row.items() if name not in texts and cell}


def numbers_of(content: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers among the values of what was read from JSON."""
    return {name: float(value) for name, value in content.items() if isinstance(value, int | float)}
