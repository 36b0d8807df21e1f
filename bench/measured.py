"""Result files as Markdown: which file there is, how a figure is written, and which of several is the best."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.common import is_quick
from nss.files import read_json

Row = Mapping[str, Any]
RESULTS = Path(__file__).resolve().parents[1] / "docs" / "results"
QUICK = "quick"
"""the folder beside the results for those of one seed and a subset"""
_WORDS = {1: "one", 2: "two", 3: "three"}


@dataclass(frozen=True)
class Source:
    """One result file.

    >>> find("rq1").row(model="nss.zoo:vgg_small", metric="deeplift", rule="score", threshold=0.97)  # doctest: +SKIP
    {'data': 'fashion-mnist', ..., 'masked': 0.284, 'masked_sd': 0.02, ...}
    """

    path: Path
    command: str
    rows: Sequence[Row]
    left_out: str = ""
    """what a quick run leaves out or takes less of, as its protocol says"""

    @property
    def is_quick(self) -> bool:
        """Whether it is of one seed and a subset."""
        return is_quick({"command": self.command})

    def where(self, **wanted: Any) -> list[Row]:
        """Return the rows that have these values."""
        return [row for row in self.rows if all(row.get(name) == value for name, value in wanted.items())]

    def row(self, **wanted: Any) -> Row:
        """Return the one row that has these values. Raises LookupError when there is none, or more than one."""
        found = self.where(**wanted)
        if len(found) != 1:
            raise LookupError(f"{self.path.name} has {len(found)} rows of {wanted}, not one")
        return found[0]

    def different(self, name: str, rows: Iterable[Row] | None = None) -> list[Any]:
        """Return the values of a column, each once, in their order."""
        return list(dict.fromkeys(row[name] for row in (self.rows if rows is None else rows) if name in row))

    def caption(self, page: Path) -> str:
        """Say where the figures are from, how many seeds they are of, and how to make them; links are from `page`.

        Of a quick run also what it leaves out.
        """
        seeds = sorted({row.get("seeds", 1) for row in self.rows})
        words = " to ".join(dict.fromkeys(_WORDS.get(each, str(each)) for each in (seeds[0], seeds[-1])))
        scope = f"{words.capitalize()} seed{'s' * (seeds[-1] > 1)}"
        if seeds[-1] > 1:
            scope += ", mean ± standard deviation"
        if self.is_quick:
            scope = f"**A quick run of {scope.lower()}, a subset**"
        folder = Path(os.path.relpath(self.path.parent, page.parent)).as_posix()
        links = f"[all figures]({folder}/{self.path.name})"
        if self.path.with_suffix(".png").exists():
            links += f", [picture]({folder}/{self.path.stem}.png)"
        left_out = f" It leaves out or takes less: {self.left_out}." if self.left_out else ""
        return f"{scope}; {links}, made by `{self.command}`.{left_out}"


def find(name: str, folder: Path = RESULTS) -> Source | None:
    """Return the results of a benchmark: the whole ones, else the quick ones, else None."""
    for path in (folder / f"{name}.json", folder / QUICK / f"{name}.json"):
        if path.exists():
            content = read_json(path)
            left_out = content.get("protocol", {}).get("quick", "")
            return Source(path, content["command"], content["summary"], left_out)
    return None


def percent(row: Row, name: str) -> str:
    """Write a share of 1 in per cent, with its spread over more seeds than one.

    >>> percent({"seeds": 3, "accuracy": 0.93193, "accuracy_sd": 0.00127}, "accuracy")
    '93.19 ± 0.13'
    """
    return number(row, name, "{:.2f}", 100)


def number(row: Row, name: str, pattern: str, unit: float = 1) -> str:
    """Write a figure and its spread over more seeds than one, or of how many seeds it is where some lack it.

    "-" when the row lacks it.
    """
    if row.get(name) is None:
        return "-"
    text = pattern.format(unit * row[name])
    if f"{name}_seeds" in row:
        return f"{text} ({row[f'{name}_seeds']} of {row['seeds']} seeds)"
    return f"{text} ± {pattern.format(unit * row[f'{name}_sd'])}" if row.get("seeds", 1) > 1 else text


def best_in_bold(
    rows: Sequence[Row], name: str, write: Callable[[Row, str], str] = percent, *, smallest: bool = False
) -> list[str]:
    """Write one figure of each row, the best in bold: whoever it belongs to, and all that are written alike.

    smallest: whether the smallest is the best, not the largest.
    """
    texts = [write(row, name) for row in rows]
    values = [row[name] for row in rows if row.get(name) is not None]
    if len(values) < 2:
        return texts
    heads = [text.split(" ± ")[0] for text in texts]
    wanted = min(values) if smallest else max(values)
    best = next(head for row, head in zip(rows, heads, strict=True) if row.get(name) == wanted)
    return [f"**{text}**" if head == best else text for text, head in zip(texts, heads, strict=True)]


def table(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """Write a Markdown table."""
    rows = [f"| {' | '.join(cells)} |".replace("|  |", "| |") for cells in (header, *lines)]
    return "\n".join([rows[0], f"|{'---|' * len(header)}", *rows[1:]])


def short(model: str) -> str:
    """Name a network without its package.

    >>> short("nss.zoo:vgg_small")
    'vgg_small'
    """
    return model.partition(":")[2]
