"""nss beside its alternatives: tables and pictures for README.md and docs/, from the committed result files.

`python -m bench.alternatives` writes each table between the markers that name it, and the pictures in docs/pictures/.
Nothing is measured here. The best of a comparison is bold, whoever it belongs to.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path

from ruamel.yaml import YAML

from bench import alternatives_training as training
from bench import pictures
from bench.measured import Row, Source, best_in_bold, find, number, percent, short, table
from nss.files import replacing

ROOT = Path(__file__).resolve().parents[1]
# Torch-pruning ranks within each layer or over all: the better of the two, in each column anew.
FAMILIES = {
    "magnitude": ("tp-magnitude-local", "tp-magnitude-global"),
    "Taylor": ("tp-taylor-local", "tp-taylor-global"),
}
NAMES = ("nss", *FAMILIES)
PEERS = tuple(chain.from_iterable(FAMILIES.values()))
BUDGETS = (0.5, 0.25, 0.1)
SLICED_BY = ("accuracy", "category", "global")
MARKS = re.compile(r"(<!-- measured: ([\w-]+) -->\n).*?(<!-- measured: end -->)", re.DOTALL)

Section = Callable[[Source], str]


def smaller(source: Source) -> str:
    """Accuracy at shares of the multiply-adds: nss, and the better variant of either importance of torch-pruning."""
    header = [f"{when}: {name}" if name == "nss" else name for when in ("untrained", "tuned") for name in NAMES]
    lines = []
    for first, model, budget in _budgets(source):
        cells = []
        for value in ("accuracy_before", "accuracy"):
            cells += best_in_bold([_ours(source, model, budget), *_families(source, model, budget, value)], value)
        lines.append([first, f"{100 * budget:.0f} %", *cells])
    return table(["network (whole)", "multiply-adds", *header], lines)


def smaller_costs(source: Source) -> str:
    """Worst class, size and times at shares of the multiply-adds, with the best of torch-pruning in each column."""
    lines = []
    for first, model, budget in _budgets(source):
        own, aligned = _ours(source, model, budget), source.row(model=model, budget=budget, method="nss-8")
        best = {value: _best(source, model, budget, PEERS, value) for value in (*MEASURES, "seconds")}
        cells = best_in_bold([own, best["worst_class"]], "worst_class")
        cells += best_in_bold([own, best["params"]], "params", _in_per_cent, smallest=True)
        cells += best_in_bold([own, best["bytes"]], "bytes", _kilobytes, smallest=True)
        cells += best_in_bold([own, aligned, best["speedup"]], "speedup", _times)
        cells += [number(row, "seconds", "{:.0f}") for row in (own, best["seconds"])]
        lines.append([first, f"{100 * budget:.0f} %", *cells])
    header = ["network (whole)", "multiply-adds"]
    header += ["worst class, fine-tuned: nss", "torch-pruning", "weights left, %: nss", "torch-pruning"]
    header += ["kilobytes: nss", "torch-pruning", "times faster: nss", "nss, `multiple=8`", "torch-pruning"]
    return table([*header, "seconds to make: nss", "torch-pruning"], lines)


def smaller_parts(source: Source) -> str:
    """What fine-tuning leaves of the parts of nss: its neurons only cut, its neurons in eights, and torch-pruning."""
    lines = []
    for first, model, budget in _budgets(source):
        ours = [source.row(model=model, budget=budget, method=method) for method in ("nss", "nss-8", "nss-cut")]
        cells = best_in_bold([*ours, _best(source, model, budget, PEERS, "accuracy")], "accuracy")
        cells += [number(row, "seconds", "{:.0f}") for row in ours[:2]]
        lines.append([first, f"{100 * budget:.0f} %", *cells])
    header = ["tuned: nss", "nss, `multiple=8`", "neurons of nss, only cut", "torch-pruning"]
    header += ["seconds to make: nss", "nss, `multiple=8`"]
    return table(["network (whole)", "multiply-adds", *header], lines)


def behind(source: Source) -> str:
    """List where an alternative is ahead of nss."""
    found: dict[str, list[tuple[float, Row, Row]]] = {}
    for _, model, budget in _budgets(source):
        for value in MEASURES:
            own, peer = _ours(source, model, budget), _best(source, model, budget, PEERS, value)
            if _sign(value) * peer.get(value, 0) > _sign(value) * own.get(value, 0):
                found.setdefault(f"{short(model)}|{value}", []).append((budget, peer, own))
    made = [_span(each) for each in zip(*_seconds(source), strict=True)]
    lines = [_lost(*each) for each in found.items()]
    lines.append(f"seconds to make the smaller network: {made[0]} (nss {made[1]})")
    return "\n".join(["Where torch-pruning is ahead:", "", *(f"- {line}" for line in lines)])


def _lost(key: str, cases: list[tuple[float, Row, Row]]) -> str:
    model, value = key.split("|")
    what, write = MEASURES[value]
    budgets = ", ".join(f"{100 * budget:.0f} %" for budget, _, _ in cases)
    theirs, ours = (", ".join(write(case[place], value) for case in cases) for place in (1, 2))
    return f"{model} at {budgets}, {what}: {theirs} (nss {ours})"


def _seconds(source: Source) -> list[tuple[float, float]]:
    cases = [each[1:] for each in _budgets(source)]
    return [(_best(source, *each, PEERS, "seconds")["seconds"], _ours(source, *each)["seconds"]) for each in cases]


def _span(values: tuple[float, ...]) -> str:
    return f"{min(values):.0f} to {max(values):.0f}"


def sliced(source: Source) -> str:
    """Accuracy of the slices nobody is told the category of, beside the baselines at the same share masked."""
    shipped = YAML(typ="safe").load(ROOT / "params.yaml")["slice"]
    lines = []
    for model in source.different("model"):
        row = source.row(model=model, **{name: shipped[name] for name in ("metric", "rule", "threshold")})
        lines.append(
            [f"{short(model)} ({100 * row['original']:.2f})", number(row, "masked", "{:.0f} %", 100), *_slicing(row)]
        )
    return table(["network (whole)", "masked", "semantic slices", "a slice each category", "one for all"], lines)


def sliced_by_threshold(source: Source) -> str:
    """`sliced` at three thresholds; the shipped one is bold."""
    shipped = YAML(typ="safe").load(ROOT / "params.yaml")["slice"]
    lines = []
    for model in source.different("model"):
        for threshold in (0.95, 0.97, 0.99):
            row = source.row(model=model, metric=shipped["metric"], rule=shipped["rule"], threshold=threshold)
            first = f"{short(model)} ({100 * row['original']:.2f})" if threshold == 0.95 else ""
            theta = f"**{threshold}**" if threshold == shipped["threshold"] else f"{threshold}"
            lines.append([first, theta, number(row, "masked", "{:.0f} %", 100), *_slicing(row)])
    return table(["network (whole)", "θ", "masked", "semantic slices", "`category`", "`global`"], lines)


def _slicing(row: Row) -> list[str]:
    named = [{"seeds": row["seeds"], "it": row[name], "it_sd": row[f"{name}_sd"]} for name in SLICED_BY]
    return best_in_bold(named, "it")


def _budgets(source: Source) -> Iterator[tuple[str, str, float]]:
    for model in source.different("model"):
        for budget in (each for each in BUDGETS if source.where(model=model, budget=each)):
            row = _ours(source, model, budget)
            yield f"{short(model)} ({100 * row['original']:.2f})" if budget == BUDGETS[0] else "", model, budget


def _ours(source: Source, model: str, budget: float) -> Row:
    return source.row(model=model, budget=budget, method="nss")


def _families(source: Source, model: str, budget: float, value: str) -> list[Row]:
    return [_best(source, model, budget, methods, value) for methods in FAMILIES.values()]


def _best(source: Source, model: str, budget: float, methods: tuple[str, ...], value: str) -> Row:
    rows = [row for row in source.where(model=model, budget=budget) if row["method"] in methods]
    return max(rows, key=lambda row: _sign(value) * row.get(value, 0))


def _sign(value: str) -> int:
    return -1 if value in SMALL_IS_BETTER else 1


def _times(row: Row, name: str) -> str:
    return number(row, name, "{:.1f}")


def _in_per_cent(row: Row, name: str) -> str:
    return number(row, name, "{:.1f}", 100)


def _kilobytes(row: Row, name: str) -> str:
    return number(row, name, "{:.0f}", 1 / 1000)


SMALL_IS_BETTER = ("params", "bytes", "seconds")
# {figure: (what it is called where nss is behind, how it is written)}
MEASURES: dict[str, tuple[str, Callable[[Row, str], str]]] = {
    "accuracy_before": ("untrained", percent),
    "accuracy": ("tuned", percent),
    "worst_class": ("worst class", percent),
    "params": ("per cent of the weights left", _in_per_cent),
    "bytes": ("kilobytes", _kilobytes),
    "speedup": ("times faster", _times),
}
# {what a marker names: (result file, what it becomes)}
SECTIONS: dict[str, tuple[str, Section]] = {
    "smaller": ("restructure", smaller),
    "smaller-costs": ("restructure", smaller_costs),
    "smaller-parts": ("restructure", smaller_parts),
    "behind": ("restructure", behind),
    "slices": ("rq1", sliced),
    "slices-by-threshold": ("rq1", sliced_by_threshold),
    "followed": ("rq3", training.followed),
    "followed-cases": ("rq3", training.followed_cases),
    "followed-costs": ("rq3", training.followed_costs),
    "learned": ("rq4", training.learned),
    "learned-tasks": ("rq4", training.learned_tasks),
    "learned-chain": ("rq4", training.learned_chain),
}


def section(name: str, page: Path) -> str:
    """Return what stands between the markers of `name` in `page`; a sentence when nothing was measured."""
    bench, write = SECTIONS[name]
    source = find(bench)
    if source is None:
        return f"Not among the results yet: `python -m bench {bench} --summary --json docs/results/{bench}.json`.\n"
    # A list of what a table holds stands below that table, whose caption is enough.
    return f"{write(source)}\n" if write is behind else f"{write(source)}\n\n{source.caption(page)}\n"


def filled(page: Path) -> str:
    """Return the text of a page with all its tables written anew. Raises KeyError for a marker that names none."""
    text = page.read_text(encoding="utf-8")
    return MARKS.sub(lambda found: f"{found[1]}{section(found[2], page)}{found[3]}", text)


def pages() -> list[Path]:
    """Return the pages that have tables."""
    texts = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    return [page for page in texts if MARKS.search(page.read_text(encoding="utf-8"))]


def main() -> None:
    """Write all tables and pictures."""
    for page in pages():
        text = filled(page)
        with replacing(page) as part:
            part.write_text(text, encoding="utf-8")
    for path in pictures.draw_all():
        print(path.relative_to(ROOT))


if __name__ == "__main__":
    main()
