"""The tables of re-adaptation (rq3) and of new classes (rq4): all methods side by side, the best of a column bold."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from bench.extend_peers import JOINT, REPLAY
from bench.extend_peers import PEERS as LEARNERS
from bench.extend_points import OUR_REPLAY, OURS
from bench.measured import Row, Source, best_in_bold, number, percent, short, table
from bench.readapt_cases import ATTACK, MAIN
from bench.readapt_peers import PEERS as FOLLOWERS
from bench.rq3 import AGAINST, ALL

FOLLOWING = (OURS, *FOLLOWERS)
LEARNING = (*OUR_REPLAY, *LEARNERS)
# What a method is called in a table, where its short name says too little.
NAMES = {"full": "full retraining", "last": "last layers", "batchnorm": "BatchNorm only", "deeparc": "DeepArc"}
NAMES |= {"naive": "retraining", "joint": "joint training", "ewc": "EWC", "lwf": "LwF"}
ABOUT_ATTACKS = (
    "New images that are attacks are left out of this mean, because a model can answer them right by reading the "
    "attack; fresh attacks are made on the adapted model itself."
)


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
    cases = _cases(source.rows)
    words = []
    for model in source.different("model"):
        own = _of_cases(source.where(model=model, method=OURS))
        gains = [f"{_gains(own, peer)} against {NAMES[peer]}" for peer in AGAINST]
        words.append(f"{short(model)} {', '.join(gains)}")
    said = f"Points that nss is ahead (+) or behind (-), mean of {len(cases)} cases: {'; '.join(words)}."
    return f"{said} {ABOUT_ATTACKS}" if _has_attacks(cases) else said


def _gains(own: Sequence[Row], peer: str) -> str:
    """Say how far nss is from one baseline. own: its row of each case."""
    mean = _mean_of_cases(own, *(f"{part}_vs_{peer}" for part in ("new", "old", "fresh")))
    names = {f"new_vs_{peer}": "on new", f"old_vs_{peer}": "on old images", f"fresh_vs_{peer}": "on fresh attacks"}
    parts = [f"{100 * mean[name]:+.1f} {where}" for name, where in names.items() if name in mean]
    return f"{', '.join(parts[:-1])} and {parts[-1]}" if len(parts) > 1 else parts[0]


def _mean_of_cases(rows: Sequence[Row], new: str, *others: str) -> dict[str, float]:
    """Return means over the cases that have a figure, of `new` over those that are no attacks."""
    kept = {new: [row for row in rows if row["situation"] != ATTACK], **dict.fromkeys(others, rows)}
    values = {name: [row[name] for row in each if row.get(name) is not None] for name, each in kept.items()}
    return {name: statistics.fmean(each) for name, each in values.items() if each}


def _of_cases(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if row.get("situation") not in (None, ALL)]


def _cases(rows: Sequence[Row]) -> list[tuple[str, str]]:
    return list(dict.fromkeys((row["situation"], row["setting"]) for row in _of_cases(rows)))


def _has_attacks(cases: Sequence[tuple[str, str]]) -> bool:
    return any(situation == ATTACK for situation, _ in cases)


def followed_cases(source: Source) -> str:
    """New / old accuracy of every case and method, of attacks also that on fresh ones; the best of each is bold.

    New accuracy of attacks is not: it can be won by reading the attack.
    """
    lines = []
    for model in source.different("model"):
        of_model = source.where(model=model)
        cases = _cases(of_model)
        for place, (situation, setting) in enumerate(cases):
            rows = _by_method(source.where(model=model, situation=situation, setting=setting), FOLLOWING)
            first = short(model) if place == 0 else ""
            lines.append([first, f"{situation}: {setting}", *_parts(rows, judge_new=situation != ATTACK)])
        name = "mean of all, new without attacks" if _has_attacks(cases) else "mean of all"
        lines.append(["", name, *_parts(_means(of_model), judge_new=True)])
    shown = "new / old / fresh attacks" if _has_attacks(_cases(source.rows)) else "new / old"
    return table(["network", shown, *_names(rows)], lines)


def _parts(rows: Sequence[Row], *, judge_new: bool) -> list[str]:
    columns = [
        best_in_bold(rows, "new_accuracy", _plain) if judge_new else [_plain(row, "new_accuracy") for row in rows]
    ]
    columns.append(best_in_bold(rows, "old_accuracy", _plain))
    if any("fresh_accuracy" in row for row in rows):
        columns.append(best_in_bold(rows, "fresh_accuracy", _plain))
    return [" / ".join(each) for each in zip(*columns, strict=True)]


def _means(rows: Sequence[Row]) -> list[Row]:
    """Return a row of each method with its means over all cases."""
    names = ("new_accuracy", "old_accuracy", "fresh_accuracy")
    own = {method: [row for row in _of_cases(rows) if row["method"] == method] for method in FOLLOWING}
    return [{"method": method, **_mean_of_cases(each, *names)} for method, each in own.items() if each]


def followed_costs(source: Source) -> str:
    """What the main case cost: weights trained, steps, whether and when the target was reached."""
    situation, setting = MAIN
    lines = []
    for model in source.different("model"):
        rows = source.where(model=model, situation=situation, setting=setting)
        for place, row in enumerate(_by_method(rows, FOLLOWING)):
            cells = [_share(row), number(row, "steps", "{:.0f}"), _steps_to_target(row), _time_to_target(row)]
            lines.append([short(model) if place == 0 else "", NAMES.get(row["method"], row["method"]), *cells])
    times = "time to the target (share of full retraining's)"
    return table(["network", "method", "weights trained", "steps", "steps to the target", times], lines)


def _share(row: Row) -> str:
    return number(row, "trained_share", "{:.0f} %" if row["trained_share"] >= 0.01 else "{:.2f} %", 100)


def _steps_to_target(row: Row) -> str:
    return number(row, "steps_to_target", "{:.0f}") if row["reached"] else "not reached"


def _time_to_target(row: Row) -> str:
    if not row["reached"]:
        return "not reached"
    if row.get("seconds_to_target") is None:
        return "not timed"
    return f"{number(row, 'seconds_to_target', '{:.1f} s')} ({number(row, 'time_vs_full', '{:.2f}')})"


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
