"""RQ3 of the paper: re-adaptation to drift, to adversarial images and of damaged models, against its baselines.

What is measured is kept in four parts: the baselines (rows/rq3-peers of the cache), ours (rq3-nss), the time to the
target (rq3-time) and that of a step (rq3-step-time). To measure one again, on a quiet machine or after a change, remove
its folder.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench.common import Report, Row, Settings, Table, mean_and_spread, resumed, said, show, training
from bench.kept import add_subjects
from bench.readapt_cases import (
    ATTACK,
    DRIFT,
    EPS,
    MAIN,
    MUTANT_IMAGES,
    NEW,
    OTHERS,
    PER_CLASS,
    PGD_STEPS,
    REPAIR,
    Subject,
)
from bench.readapt_peers import LAST, PEERS, THRESHOLD
from bench.readapt_points import (
    BATCH,
    FRESH,
    FULL,
    MARGIN,
    OURS,
    PROBE,
    SHARE,
    TURNS,
    Grid,
    Points,
    fastest_of_each,
    goal_of,
    reached_at,
    to_target,
)
from bench.step_time import BATCH as STEP_BATCH
from bench.step_time import REPEATS, step_times
from nss.model import model_digest
from nss.moments import DAMPING
from nss.tunable import TELLING

STEP_TIME = "nss.zoo:vgg_small"
_TRAINED = (FULL, "last", "deeparc")
# Moving statistics are better in some networks, fixed ones in others.
_EITHER = {**dict.fromkeys(_TRAINED, (False, True)), "batchnorm": (True,)}
# As many settings for every method; BatchNorm alone has no choice of statistics, and twice as many rates for it.
WHOLE = Grid(
    epochs=10,
    rates={
        **dict.fromkeys(_TRAINED, (0.00075, 0.0015, 0.003, 0.006)),
        "batchnorm": (0.005, 0.01, 0.015, 0.02, 0.03, 0.05, 0.07, 0.1),
        OURS: (0.001, 0.002),
    },
    guards=(0.0, 0.3, 1.0, 3.0),
    statistics=_EITHER,
    held_out=1000,
    test=10_000,
)
SMALL = Grid(
    epochs=5,
    rates={
        **dict.fromkeys(_TRAINED, (0.002, 0.005)),
        "batchnorm": (0.01, 0.02, 0.05, 0.1),
        OURS: (0.0005, 0.002),
    },
    guards=(1.0, 3.0),
    statistics=_EITHER,
    held_out=500,
    test=1000,
)
# For a look: each method once, baselines with fixed statistics where other weights are trained.
TINY = replace(
    SMALL,
    rates={**dict.fromkeys(_TRAINED, (0.004,)), "batchnorm": (0.05,), OURS: (0.002,)},
    guards=(1.0,),
    statistics={**dict.fromkeys(_TRAINED, (False,)), "batchnorm": (True,)},
)
CASES = {MAIN: WHOLE, **dict.fromkeys(OTHERS, SMALL)}
QUICK = dict.fromkeys((MAIN, (ATTACK, "fgsm"), (REPAIR, "drop 0.3")), TINY)
SUBJECT = ("data", "model", "seed")
BY = ("data", "model", "situation", "setting", "method")
ACCURACIES = ("new_accuracy", "old_accuracy", "fresh_accuracy")
AGAINST = (FULL, "deeparc")
AHEAD = tuple(f"{part}_vs_{peer}" for peer in AGAINST for part in ("new", "old"))
FRESH_AHEAD = tuple(f"fresh_vs_{peer}" for peer in AGAINST)
TIMES = ("seconds", "reached", "steps_to_target", "seconds_to_target", "time_vs_full")
ORIGINAL = ("original_new", "original_old")
VALUES = (*ACCURACIES, *ORIGINAL, "new_val", "old_val", *AHEAD, *FRESH_AHEAD, "trained_share", "steps", *TIMES)
ALL = "all"
SHOWN = {
    "accuracy on test images": ("new_accuracy", "old_accuracy", *AHEAD),
    "attacks on the adapted model": ("fresh_accuracy", *FRESH_AHEAD),
    "cost": ("trained_share", "steps", *TIMES),
}
PROTOCOL = {
    "samples": f"the first {NEW} validation images, at most half of them, changed, are trained on; of those behind "
    f"them {WHOLE.held_out} ({SMALL.held_out} outside the main case), changed, choose epoch, learning rate and guard: "
    "new_val",
    DRIFT: f"nss.drift, kind and strength; {MAIN[1]!r} is the main case, on the whole grid",
    ATTACK: f"eps {EPS}, pgd {PGD_STEPS} steps of eps/4 from a random start; made on the base model and rounded to 8 "
    "bits; a gradient of the true label leaks it (arXiv 1611.01236), so that new accuracy alone can be won by reading "
    f"the attack: fresh_accuracy is of attacks on the adapted model itself, {FRESH} clean test images",
    REPAIR: "nss.mutants; new: clean images; old: those of the held-out ones that the damaged model answers right",
    "old": "the same held-out images before the change: old_val; the same of the test split: old_accuracy",
    "training": f"Adam, one cycle, batches of {BATCH} in the same order, {WHOLE.epochs} epochs ({SMALL.epochs} outside "
    "the main case) for every method, no early stop; no old image is trained on",
    "settings": f"full, last, deeparc: rates {WHOLE.rates[FULL]}, outside the main case {SMALL.rates[FULL]}, each with "
    "the statistics of the BatchNorms that they train fixed and moving; batchnorm: rates "
    f"{WHOLE.rates['batchnorm']}, {SMALL.rates['batchnorm']}; nss: rates {WHOLE.rates[OURS]}, {SMALL.rates[OURS]}, "
    f"of what a neuron computes, root mean square, with the guards {WHOLE.guards}, {SMALL.guards}",
    "baselines": f"full; last: the last {LAST} layers; batchnorm: scale, shift and statistics; deeparc: modules of "
    f"neighbours with a CKA above {THRESHOLD}, lowered until there are at most half as many modules as layers, the "
    "first layers of the modules trained",
    "nss": f"share {SHARE}, neurons chosen by {TELLING} of the samples; choice, steps and guard live from a profile of "
    f"the first {PER_CLASS} training images of each category, not counted in its seconds",
    "choice": "for each case and seed, by the held-out images, the same for every method: of its points that reach "
    "the target on new ones the one that is best on old ones, where there is none the best on new ones; a baseline's "
    "points are all epochs of all its settings, those of nss its settings, each at the epoch that readapt keeps, which "
    "looks at no old image",
    "judged on": f"test images, the chosen points alone, once: the whole test split, {SMALL.test} of it outside the "
    "main case; the frontier of all settings is on validation",
    "target": f"new_val: that of full's best epoch of all settings - {MARGIN}; reached by the first epoch that does, "
    "of a baseline in the setting that gets there first",
    "seconds": f"main case, full in the setting that reaches the target first, and the chosen point of nss: medians of "
    f"{TURNS} runs in turn; nss: on a line from a run of one epoch to the run itself, so that its choice of neurons "
    "counts in full; judging on new images included; time_vs_full: share of full's seconds to the target, of those "
    "that reach it",
    "vs": "new, old and fresh accuracy of nss less that of the baseline; situation all: mean over all cases",
    "step time": f"median milliseconds of {REPEATS} steps in turn, batches of {STEP_BATCH}, Adam; free: share {SHARE}; "
    "full: statistics of the BatchNorms from the batch, as training does; full, fixed: as they are",
}
LEFT_OUT = (
    f"cases but {', '.join(setting for _, setting in QUICK)}; one setting of each method, a choice of a baseline's "
    f"epoch alone: rate {TINY.rates[FULL][0]}, of batchnorm {TINY.rates['batchnorm'][0]}, of nss {TINY.rates[OURS][0]} "
    f"with guard {TINY.guards[0]:g}, statistics fixed but of batchnorm; {TINY.epochs} epochs, {TINY.held_out} held-out "
    f"and {TINY.test} test images in each case"
)
COLUMNS = (
    "situation and setting say what happened to the images or to the model; accuracy on new and on old test images, "
    "and on fresh attacks; new_vs_full and the like: nss less that baseline; trained_share of the weights; seconds and "
    "steps to the target that full retraining sets, reached by that share of the seeds; time_vs_full: share of its "
    "seconds. Of a step: median milliseconds, and the ratio to a step of full retraining."
)


def run(settings: Settings) -> Report:
    """Measure every combination; finished parts are taken from the cache."""
    report = Report(settings, said(settings, PROTOCOL, LEFT_OUT))
    cases = QUICK if settings.quick else CASES

    def measure(*subject: Any) -> list[Row]:
        return _one(Subject(*subject), cases, times=settings.times)

    add_subjects(report, lambda name: {"base": training(name), **_terms(cases)}, measure)
    report.summary = summarised([row for row in report.rows if row.get("chosen")])
    times = [row for row in report.rows if "step" in row]
    report.summary += mean_and_spread(times, ("data", "model", "step"), ("trained_share", "milliseconds", "of_full"))
    show(tables(report.summary))
    return report


def tables(summary: Sequence[Row]) -> list[Table]:
    """Return what is shown of a summary."""
    methods, steps = ([row for row in summary if name in row] for name in ("method", "step"))
    shown = ("data", "model", "step", "trained_share", "milliseconds", "of_full", "of_full_sd")
    return [
        *(
            Table(f"re-adaptation: {title}", (*BY, *columns), [row for row in methods if columns[0] in row])
            for title, columns in SHOWN.items()
        ),
        Table("re-adaptation: time of a step", shown, steps),
    ]


def _terms(cases: Mapping[tuple[str, str], Grid]) -> Row:
    """Return what decides the rows of a subject."""
    turns = {"turns": TURNS, "step": [STEP_BATCH, REPEATS], "telling": TELLING, "damping": DAMPING}
    return {**_numbers(), **turns, "cases": {" ".join(case): asdict(grid) for case, grid in cases.items()}}


def _numbers() -> Row:
    attack, own, peers = [EPS, PGD_STEPS, FRESH], [SHARE, PER_CLASS], [LAST, THRESHOLD, PROBE]
    numbers = {"new": NEW, "attack": attack, "mutant": MUTANT_IMAGES, "nss": own, "peers": peers, "batch": BATCH}
    return {**numbers, "margin": MARGIN, "choice": "old_val of those that reach the target"}


def _one(subject: Subject, cases: Mapping[tuple[str, str], Grid], *, times: bool) -> list[Row]:
    rows = [row for case, grid in cases.items() for row in _case(subject, case, grid, times=times)]
    return [*rows, *_step_times(subject)] if times and subject.factory == STEP_TIME else rows


def _case(subject: Subject, case: tuple[str, str], grid: Grid, *, times: bool) -> list[Row]:
    situation, setting = case
    identity = {"data": subject.name, "model": subject.factory, "seed": subject.seed}
    identity |= {"situation": situation, "setting": setting}
    key = {**identity, "weights": model_digest(subject.model), **_numbers()}

    @cache
    def points() -> Points:
        return Points(subject, subject.case(situation, setting, grid.held_out), grid)

    peers_key = {**key, "grid": str(_of_peers(grid))}
    peers = resumed("rq3-peers", peers_key, lambda: [{**identity, **row} for row in points().peers()])
    target = goal_of(row["curve"] for row in peers if row["method"] == FULL)
    own_key = {**key, "grid": str(grid), "target": target, "telling": TELLING, "damping": DAMPING}
    ours = resumed("rq3-nss", own_key, lambda: [{**identity, **row} for row in points().ours(target)])
    rows = [{**row, "target": target} for row in (*peers, *ours)]
    first = fastest_of_each(rows, target)
    rows = [{**row, **to_target(first[row["method"]] if row["chosen"] else row, target)} for row in rows]
    return _timed(rows, first, own_key, points) if case == MAIN and times else rows


def _of_peers(grid: Grid) -> Grid:
    """Return what of a grid decides the baselines' rows."""
    return replace(grid, rates={name: each for name, each in grid.rates.items() if name in PEERS}, guards=())


def _timed(rows: Sequence[Row], first: Mapping[str, Row], key: Row, points: Callable[[], Points]) -> list[Row]:
    """Add to the chosen rows of full retraining and of ours what `first`, the settings that count, take."""
    timed = [first[FULL], first[OURS]]
    key = {**key, "rows": timed, "turns": TURNS, "threads": torch.get_num_threads()}

    def measure() -> list[Row]:
        seconds = points().timed(*timed)
        return [{"method": row["method"], "seconds": each} for row, each in zip(timed, seconds, strict=True)]

    seconds = {row["method"]: row["seconds"] for row in resumed("rq3-time", key, measure)}
    return [
        {**row, **_times(first[row["method"]], seconds[row["method"]])}
        if row["chosen"] and row["method"] in seconds
        else row
        for row in rows
    ]


def _times(row: Row, seconds: Sequence[float]) -> Row:
    """seconds: at the end of each epoch."""
    epoch = reached_at(row, row["target"])
    return {"seconds": seconds[-1], "seconds_to_target": None if epoch is None else seconds[epoch]}


def _step_times(subject: Subject) -> list[Row]:
    identity = {"data": subject.name, "model": subject.factory, "seed": subject.seed}
    key = {**identity, "weights": model_digest(subject.model), "share": SHARE, "threads": torch.get_num_threads()}
    key |= {"step": [STEP_BATCH, REPEATS], "full": "both kinds of statistics", "free": "whitened"}
    return resumed("rq3-step-time", key, lambda: [{**identity, **row} for row in step_times(subject, SHARE)])


def summarised(chosen: Sequence[Row]) -> list[Row]:
    """Means and spreads over the seeds of the chosen points, for each case and over all cases."""
    compared = with_differences(chosen)
    means = mean_and_spread(compared, [*SUBJECT, "method"], VALUES)
    return mean_and_spread([*compared, *({**row, "situation": ALL, "setting": ALL} for row in means)], BY, VALUES)


def with_differences(chosen: Sequence[Row]) -> list[Row]:
    """Return the chosen points; ours with how far they are ahead of full and DeepArc in the same case and seed."""
    rows = []
    for row in chosen:
        same = {
            other["method"]: other
            for other in chosen
            if all(other[name] == row[name] for name in (*SUBJECT, "situation", "setting"))
        }
        rows.append({**row, **(_differences(row, same) if row["method"] == OURS else {}), **_share_of_time(row, same)})
    return rows


def _differences(row: Row, same: dict[str, Row]) -> Row:
    return {
        f"{part}_vs_{peer}": row[f"{part}_accuracy"] - same[peer][f"{part}_accuracy"]
        for peer in AGAINST
        for part in ("new", "old", "fresh")
        if f"{part}_accuracy" in row
    }


def _share_of_time(row: Row, same: dict[str, Row]) -> Row:
    own, full = row.get("seconds_to_target"), same[FULL].get("seconds_to_target")
    return {"time_vs_full": own / full if own is not None and full else None}


def draw(report: Report, path: Path) -> None:
    """Left the frontier of the main case on validation; right, for each case, how far ahead the chosen points are."""
    points = [row for row in report.rows if "method" in row]
    panels = list(dict.fromkeys((row["data"], row["model"]) for row in points))
    figure = Figure(figsize=(11, 4.4 * len(panels)), layout="constrained")
    grid = figure.subplots(len(panels), 2, squeeze=False)
    for (left, right), panel in zip(grid, panels, strict=True):
        title = f"{panel[1].partition(':')[2]}, {panel[0]}"
        of_panel = [row for row in points if (row["data"], row["model"]) == panel]
        _frontier(left, [row for row in of_panel if (row["situation"], row["setting"]) == MAIN])
        left.set(title=f"{title}: {MAIN[1]}", xlabel="old accuracy, validation", ylabel="new accuracy, validation")
        _ahead(right, with_differences([row for row in of_panel if row["chosen"]]))
        right.set(title=f"{title}: nss less a baseline, test", xlabel="old accuracy", ylabel="new accuracy")
        left.legend(fontsize=7)
        right.legend(fontsize=7)
    figure.savefig(path, dpi=110)


def _frontier(axes: Axes, rows: Sequence[Row]) -> None:
    """Mean of each point over seeds; a ring around those that are chosen for any seed."""
    by = ("method", "learning_rate", "guard", "statistics")
    for place, method in enumerate((*PEERS, OURS)):
        own = [row for row in rows if row["method"] == method]
        means = mean_and_spread(
            [{**row, "chosen": float(row["chosen"])} for row in own], by, ["new_val", "old_val", "chosen"]
        )
        color = f"C{place}"
        axes.scatter(*_columns(means), s=18, color=color, label=method)
        axes.scatter(*_columns([row for row in means if row["chosen"]]), s=80, facecolors="none", edgecolors=color)


def _columns(rows: Sequence[Row]) -> tuple[list[Any], list[Any]]:
    return [row["old_val"] for row in rows], [row["new_val"] for row in rows]


def _ahead(axes: Axes, rows: Sequence[Row]) -> None:
    """A mark for each case: differences to a baseline, mean over seeds. Dotted: what is asked against full."""
    own = mean_and_spread([row for row in rows if row["method"] == OURS], ("situation", "setting"), AHEAD)
    marks = {DRIFT: "o", ATTACK: "^", REPAIR: "s"}
    for place, peer in enumerate(AGAINST):
        for situation, mark in marks.items():
            of_kind = [row for row in own if row["situation"] == situation]
            each = [[row[f"{part}_vs_{peer}"] for row in of_kind] for part in ("old", "new")]
            if of_kind:
                axes.scatter(*each, marker=mark, color=f"C{place}", label=f"{situation}, less {peer}")
        if own:
            old, new = (statistics.fmean(row[f"{part}_vs_{peer}"] for row in own) for part in ("old", "new"))
            axes.scatter(old, new, marker="x", s=90, color=f"C{place}", label=f"mean, less {peer}")
    axes.axhline(-MARGIN, color="grey", linestyle=":")
    axes.axvline(0.02, color="grey", linestyle=":")
