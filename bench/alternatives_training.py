"""The tables of re-adaptation (rq3) and of new classes (rq4): all methods side by side, the best of a column bold."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bench.extend_peers import JOINT, REPLAY
from bench.extend_peers import PEERS as LEARNERS
from bench.extend_points import OUR_REPLAY, OURS
from bench.measured import Row, Source, best_in_bold, number, percent, short, table
from bench.readapt_cases import MAIN
from bench.readapt_peers import PEERS as FOLLOWERS
from bench.rq3 import AGAINST, ALL

FOLLOWING = (OURS, *FOLLOWERS)
LEARNING = (*OUR_REPLAY, *LEARNERS)
# What a method is called in a table, where its short name says too little.
NAMES = {"full": "full retraining", "last": "last layers", "batchnorm": "BatchNorm only", "deeparc": "DeepArc"}
NAMES |= {"naive": "retraining", "joint": "joint training", "ewc": "EWC", "lwf": "LwF"}


def followed(source: Source) -> str:
    """Accuracy on new and on old images in the main case, every network in two columns."""
    situation, setting = MAIN
    header, columns = ["method"], []
    for model in source.different("model"):
        rows = _by_method(source.where(model=model, situation=situation, setting=setting), FOLLOWING)
        header += [f"{short(model)}: new", "old"]
        columns += [best_in_bold(rows, "new_accuracy"), best_in_bold(rows, "old_accuracy")]
    before = source.where(method=OURS, situation=situation, setting=setting)
    original = [percent(row, name) for row in before for name in ("original_new", "original_old")]
    lines = [["before", *original], *map(list, zip(_names(rows), *columns, strict=True))]
    return f"{table(header, lines)}\n\n{_over_all(source)}"


def _over_all(source: Source) -> str:
    """Say how far nss is from two baselines in the mean of all cases."""
    cases = len({(row["situation"], row["setting"]) for row in source.rows if row.get("situation") not in (None, ALL)})
    words = []
    for row in source.where(method=OURS, situation=ALL):
        gains = [
            f"{_points(row, f'new_vs_{peer}')} on new and {_points(row, f'old_vs_{peer}')} on old images against "
            f"{NAMES[peer]}"
            for peer in AGAINST
            if f"new_vs_{peer}" in row
        ]
        words.append(f"{short(row['model'])} {', '.join(gains)}")
    return f"Points that nss is ahead (+) or behind (-), mean of {cases} cases: {'; '.join(words)}."


def _points(row: Row, name: str) -> str:
    return f"{100 * row[name]:+.1f}"


def followed_cases(source: Source) -> str:
    """New / old accuracy of every case and method; the best of either is bold."""
    lines = []
    for model in source.different("model"):
        rows_of_model = [row for row in source.where(model=model) if "situation" in row]
        cases = list(dict.fromkeys((row["situation"], row["setting"]) for row in rows_of_model))
        for place, (situation, setting) in enumerate(cases):
            rows = _by_method(source.where(model=model, situation=situation, setting=setting), FOLLOWING)
            both = (best_in_bold(rows, f"{part}_accuracy", _plain) for part in ("new", "old"))
            name = "mean of all" if situation == ALL else f"{situation}: {setting}"
            first = short(model) if place == 0 else ""
            lines.append([first, name, *(f"{new} / {old}" for new, old in zip(*both, strict=True))])
    return table(["network", "new / old", *_names(rows)], lines)


def followed_costs(source: Source) -> str:
    """What the main case cost: weights trained, steps, and the time of those that were timed."""
    situation, setting = MAIN
    lines = []
    for model in source.different("model"):
        rows = source.where(model=model, situation=situation, setting=setting)
        for place, row in enumerate(_by_method(rows, FOLLOWING)):
            cells = [number(row, "trained_share", "{:.0f} %", 100), number(row, "steps", "{:.0f}")]
            cells += [number(row, "seconds_to_target", "{:.1f} s"), number(row, "time_vs_full", "{:.2f}")]
            lines.append([short(model) if place == 0 else "", NAMES.get(row["method"], row["method"]), *cells])
    header = ["network", "method", "weights trained", "steps", "time to the target", "of full retraining's"]
    return table(header, lines)


def learned(source: Source) -> str:
    """Accuracy on all classes, nobody told the task, a column for each data set and network."""
    halves = [row for row in source.rows if "told_old" in row]
    subjects = list(dict.fromkeys((row["data"], row["model"]) for row in halves))
    methods = [each for each in LEARNING if any(row["method"] == each for row in halves)]
    columns = []
    for data, model in subjects:
        own = {row["method"]: row for row in halves if (row["data"], row["model"]) == (data, model)}
        columns.append(best_in_bold([own.get(method, {}) for method in methods], "accuracy"))
    lines = [
        [NAMES.get(method, method), _old_images(method), *cells]
        for method, *cells in zip(methods, *columns, strict=True)
    ]
    return table(["method", "old images trained on", *(f"{data}, {short(model)}" for data, model in subjects)], lines)


def learned_tasks(source: Source) -> str:
    """Accuracy told the task and not, for each data set and network."""
    values = ("told_old", "told_new", "old_accuracy", "new_accuracy", "accuracy")
    lines = []
    halves = [row for row in source.rows if "told_old" in row]
    for data, model in dict.fromkeys((row["data"], row["model"]) for row in halves):
        rows = _by_method([row for row in halves if (row["data"], row["model"]) == (data, model)], LEARNING)
        columns = [best_in_bold(rows, value) for value in values]
        for place, (name, *cells) in enumerate(zip(_names(rows), *columns, strict=True)):
            lines.append([f"{data}, {short(model)}" if place == 0 else "", name, *cells])
    return table(["data, network", "method", "told: old", "told: new", "not told: old", "new", "all"], lines)


def learned_chain(source: Source) -> str:
    """What is left after a chain of tasks: accuracy told and not, and how much was forgotten on the way."""
    lines = []
    ends = [row for row in source.rows if "forgetting" in row]
    for data, model in dict.fromkeys((row["data"], row["model"]) for row in ends):
        rows = _by_method([row for row in ends if (row["data"], row["model"]) == (data, model)], LEARNING)
        columns = [best_in_bold(rows, "told"), best_in_bold(rows, "accuracy")]
        columns += [[percent(row, name) for row in rows] for name in ("told_forgetting", "forgetting")]
        for place, (name, *cells) in enumerate(zip(_names(rows), *columns, strict=True)):
            lines.append([f"{data}, {short(model)}" if place == 0 else "", name, *cells])
    return table(["data, network", "method", "told", "not told", "forgotten: told", "not told"], lines)


def _by_method(rows: Sequence[Row], order: Sequence[str]) -> list[Row]:
    found = {row["method"]: row for row in rows}
    return [found[method] for method in order if method in found]


def _names(rows: Sequence[Row]) -> list[Any]:
    return [NAMES.get(row["method"], row["method"]) for row in rows]


def _old_images(method: str) -> str:
    kept = {**REPLAY, **OUR_REPLAY, JOINT: 1.0}.get(method, 0.0)
    return f"{kept:.0%}" if kept else "none"


def _plain(row: Row, name: str) -> str:
    return f"{100 * row[name]:.1f}"
