"""RQ4 of the paper: learning new classes, told the task and not, against its baselines; and a chain of tasks.

What is measured is kept in five parts: five new classes beside five (rows/rq4-peers and rq4-nss of the cache), five
tasks of two classes (rq4-chain-peers and rq4-chain-nss), and what a step takes (rq4-step-time). To measure one again,
on a quiet machine or after a change, remove its folder.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench.common import DEFAULT_EPOCHS, Report, Row, Settings, Table, mean_and_spread, resumed, said, show, training
from bench.extend_cases import BASE, CHAIN, HALVES, PER_CLASS, SHARE, Subject
from bench.extend_peers import (
    DEEPARC,
    EWC,
    FISHER_IMAGES,
    JOINT,
    LWF,
    NAIVE,
    PEERS,
    PROBE,
    REPLAY,
    TEMPERATURE,
    WEIGHT_DECAY,
    Setting,
)
from bench.extend_points import (
    BATCH,
    CHAINED,
    OUR_REPLAY,
    OURS,
    RATE,
    STEP_BATCHES,
    TURNS,
    WIDTH,
    Chain,
    Grid,
    Halves,
)
from bench.kept import add_subjects
from nss.model import model_digest

_EITHER = (Setting(0.02), Setting(0.05))
WHOLE = Grid(
    images=4000,
    epochs=3,
    settings={
        **dict.fromkeys((NAIVE, *REPLAY, DEEPARC), _EITHER),
        JOINT: (Setting(0.05), Setting(0.1)),
        EWC: (Setting(0.05, 30.0), Setting(0.05, 100.0)),
        LWF: (Setting(0.05, 1.0), Setting(0.05, 3.0)),
    },
    ours=tuple(OUR_REPLAY),
)
# For a look: each baseline at one setting.
SMALL = Grid(
    images=2000,
    epochs=2,
    settings={
        **dict.fromkeys((NAIVE, *REPLAY, JOINT, DEEPARC), (Setting(0.05),)),
        EWC: (Setting(0.05, 30.0),),
        LWF: (Setting(0.05, 3.0),),
    },
    ours=tuple(OUR_REPLAY),
)
CHAIN_IMAGES, QUICK_CHAIN = 1500, 1000
"""images of each task of the chain, and of that of a quick run"""
SUBJECT = ("data", "model", "seed")
BY = ("data", "model", "method")
JUDGED = ("told_old", "told_new", "old_accuracy", "new_accuracy", "accuracy")
# {name of the difference: (of which accuracy, to which baseline)}
AGAINST = {
    "new_vs_naive": ("told_new", NAIVE),
    "vs_replay_10": ("accuracy", "replay 10 %"),
    "vs_ewc": ("accuracy", EWC),
    "vs_lwf": ("accuracy", LWF),
}
COSTS = ("steps", "trained_share")
VALUES = (*JUDGED, "before", "told_lost", *AGAINST, "val", *COSTS)
ENDS = ("told", "accuracy", "told_forgetting", "forgetting")
PROTOCOL = {
    "data": f"the first five classes are known, the others arrive; of each task, in each split, the first "
    f"{WHOLE.images} images are used, as many of each class; the base model, of {BASE}, is trained for "
    f"{DEFAULT_EPOCHS} epochs, the same for every data set",
    "budget": f"{WHOLE.epochs} epochs over the new images, batches of {BATCH}, SGD with Nesterov "
    f"momentum, weight decay {WEIGHT_DECAY}, one cycle, the same for all; no epoch is chosen",
    "told": "among the classes of the image's own task: told_old, told_new; not told, among all: old_accuracy, "
    "new_accuracy, accuracy; before: of the base model on the old test images; told_lost: before less told_old",
    "replay": "that share of each old class; half of each batch is old, repeated as often as it takes: twice as many "
    "steps, to see each new image as often as without; of nss a third, and half as many steps more",
    JOINT: "from a new initialisation, with all old images, half of each batch",
    DEEPARC: f"modules by CKA on {PROBE} old images as in rq3; layers and norms that are no interface are trained, "
    "with their statistics, and the head",
    EWC: f"Fisher diagonal of {FISHER_IMAGES} old images, the expectation over answers in full; its loss and LwF's are "
    "over the new classes' logits alone, as in their papers",
    LWF: f"distillation of the old logits on the new images, temperature {TEMPERATURE:g}; no phase of the head alone",
    OURS: f"share {SHARE}, width {WIDTH}, learning rate {RATE}: its defaults, nothing chosen; validation images of the "
    "new classes weigh column against statistics, none of the old classes is used; condensed "
    f"with a profile of {PER_CLASS} training images of each class; without replay, extend is given no old image",
    "choice": "learning rate and strength of the baselines: the best mean of the tasks' accuracies, not told, on the "
    "validation split",
    "judged on": "test images, chosen settings alone, once",
    "chain": f"{len(CHAIN)} tasks of two classes, {CHAIN_IMAGES} images of each task in each split; "
    f"{', '.join(CHAINED)} and nss without replay; forgetting: the best accuracy on a task before the last one was "
    "learned, less that in the end, mean over tasks (arXiv 1801.10112)",
    "step time": f"median milliseconds a step, of {TURNS} runs of {STEP_BATCHES} steps in turn",
    "memory": "megabytes of all tensors of the model and of such a run when they take most, counted by torch",
}
LEFT_OUT = (
    f"{SMALL.images} images of each task in place of {WHOLE.images}, of the chain {QUICK_CHAIN} in place of "
    f"{CHAIN_IMAGES}; epochs: "
    f"{SMALL.epochs}; one setting of each baseline, no choice"
)
COLUMNS = (
    "told_old, told_new: accuracy on old and on new test images among the classes of their own task; old_accuracy, "
    "new_accuracy, accuracy: among all classes; before: of the base model, told_lost: how much less told_old is; "
    "new_vs_naive is of told_new, vs_replay_10 and the like of accuracy: nss less that baseline. Of the chain: the "
    "same in the end, and what was forgotten of each task. Of a step: median milliseconds, the most megabytes, and the "
    "ratios to those of a naive one."
)


def run(settings: Settings) -> Report:
    """Measure every combination; finished parts are taken from the cache."""
    report = Report(settings, said(settings, PROTOCOL, LEFT_OUT))
    grid = SMALL if settings.quick else WHOLE
    chained = replace(grid, images=QUICK_CHAIN if settings.quick else CHAIN_IMAGES)

    def measure(*subject: Any) -> list[Row]:
        return _one(subject, grid, chained, times=settings.times)

    add_subjects(report, lambda name: _terms(name, grid, chained), measure)
    steps, learned = ([row for row in report.rows if ("step" in row) == is_step] for is_step in (True, False))
    halves, chain = ([row for row in learned if row["setting"] == _setting(sizes)] for sizes in (HALVES, CHAIN))
    report.summary = summarised(halves, chain, steps)
    show(tables(report.summary))
    return report


def _terms(name: str, grid: Grid, chained: Grid) -> Row:
    """Return what decides the rows of a subject."""
    base = {"images": BASE, **training(f"{name}-task")}
    parts = {"halves": [*HALVES], "chain": [*CHAIN], "chained": [*CHAINED], "turns": [STEP_BATCHES, TURNS]}
    sizes = {"images": [grid.images, chained.images], "batch": BATCH}
    return {"base": base, **parts, **sizes, "settings": _plain(grid), "methods": [*grid.ours], **_ours(grid)}


def _one(subject: tuple[str, str, int], grid: Grid, chained: Grid, *, times: bool) -> list[Row]:
    two = Subject(*subject, HALVES, grid.images)
    half = Halves(two, grid)
    rows = _part("rq4-peers", two, {"settings": _plain(grid)}, half.peers)
    rows += _part("rq4-nss", two, {"methods": grid.ours, **_ours(grid)}, half.ours)
    if times:
        more = {"threads": torch.get_num_threads(), **_ours(grid)}
        rows += _part("rq4-step-time", two, more, half.step_times)
    five = Subject(*subject, CHAIN, chained.images)
    tasks = Chain(five, chained)
    rows += _part("rq4-chain-peers", five, {"settings": _plain(chained)}, tasks.peers)
    return rows + _part("rq4-chain-nss", five, _ours(chained), tasks.ours)


def _part(bench: str, subject: Subject, more: Row, measure: Callable[[], list[Row]]) -> list[Row]:
    identity = {
        "data": subject.name,
        "model": subject.factory,
        "seed": subject.seed,
        "setting": _setting(subject.sizes),
    }
    key = {**identity, "weights": model_digest(subject.model), "images": subject.images, "batch": BATCH, **more}
    return resumed(bench, key, lambda: [{**identity, **row} for row in measure()])


def _setting(sizes: Sequence[int]) -> str:
    return " + ".join(map(str, sizes))


def _plain(grid: Grid) -> Row:
    fixed = {"epochs": grid.epochs, "decay": WEIGHT_DECAY, "fisher": FISHER_IMAGES, "probe": PROBE}
    return {
        **fixed,
        "temperature": TEMPERATURE,
        "grid": {name: [*map(asdict, each)] for name, each in grid.settings.items()},
    }


def _ours(grid: Grid) -> Row:
    return {"epochs": grid.epochs, "nss": [SHARE, WIDTH, RATE, PER_CLASS]}


def summarised(halves: Sequence[Row], chain: Sequence[Row], steps: Sequence[Row]) -> list[Row]:
    """Means and spreads over the seeds: chosen settings, ends and matrices of chains, neurons by layer, steps."""
    chosen = with_differences([row for row in halves if row["chosen"]])
    ended = [row for row in chain if row.get("chosen")]
    matrix = [row for row in chain if "after" in row]
    layers = [{**row, "used": ", ".join(map(str, row["used"]))} for row in chain if "layer" in row]
    return [
        *_means(chosen, BY, VALUES),
        *_means(ended, BY, ENDS),
        *_means(matrix, (*BY, "after", "task"), ("told", "accuracy")),
        *_means(layers, (*BY, "layer", "used"), ("total", "free", "widened")),
        *_means(steps, ("data", "model", "step"), ("milliseconds", "of_naive", "megabytes", "memory_of_naive")),
    ]


def _means(rows: Sequence[Row], by: Sequence[str], values: Sequence[str]) -> list[Row]:
    return mean_and_spread(rows, ["setting", *by], values)


def with_differences(chosen: Sequence[Row]) -> list[Row]:
    """Return the chosen settings with what they lost and how far they are ahead of baselines of the same seed."""
    rows = []
    for row in chosen:
        same = {each["method"]: each for each in chosen if all(each[name] == row[name] for name in SUBJECT)}
        ahead = {
            name: row[of] - same[peer][of]
            for name, (of, peer) in AGAINST.items()
            if row["method"] in OUR_REPLAY and peer in same
        }
        rows.append({**row, **ahead, "told_lost": row["before"] - row["told_old"]})
    return rows


def tables(summary: Sequence[Row]) -> list[Table]:
    """Return what is shown of a summary."""
    halves = [row for row in summary if "told_old" in row]
    ours = [row for row in halves if row["method"] in OUR_REPLAY]
    ended = [row for row in summary if "forgetting" in row]
    layers = [row for row in summary if "layer" in row]
    times = [row for row in summary if "milliseconds" in row]
    step = ("data", "model", "step", "milliseconds", "of_naive", "of_naive_sd", "megabytes", "memory_of_naive")
    return [
        Table("new classes: accuracy on test images", (*BY, *JUDGED, "before", "told_lost"), halves),
        Table("new classes: nss less a baseline", (*BY, "told_lost", *AGAINST), ours),
        Table("new classes: cost", (*BY, *COSTS), halves),
        Table("chain: after the last task", (*BY, *ENDS), ended),
        Table("chain: neurons by layer", ("data", "model", "layer", "total", "used", "free", "widened"), layers),
        Table("new classes: time and memory of a step", step, times),
    ]


def draw(report: Report, path: Path) -> None:
    """Left what each method answers right, told and not told; right the chain, not told, after each task."""
    panels = list(dict.fromkeys((row["data"], row["model"]) for row in report.summary))
    figure = Figure(figsize=(11, 4.4 * len(panels)), layout="constrained")
    for (left, right), panel in zip(figure.subplots(len(panels), 2, squeeze=False), panels, strict=True):
        of_panel = [row for row in report.summary if (row["data"], row["model"]) == panel]
        title = f"{panel[1].partition(':')[2]}, {panel[0]}"
        _bars(left, [row for row in of_panel if "told_old" in row])
        left.set(title=f"{title}: five new classes", xlabel="accuracy, test")
        left.legend(fontsize=7)
        _courses(right, [row for row in of_panel if "after" in row])
        right.set(title=f"{title}: tasks of two classes", xlabel="tasks learned", ylabel="accuracy, not told, test")
        right.legend(fontsize=7)
    figure.savefig(path, dpi=110)


def _bars(axes: Axes, rows: Sequence[Row]) -> None:
    """A bar for each method: all classes, not told; marks for old and new images, filled when told."""
    places = list(range(len(rows)))
    axes.barh(places, [row["accuracy"] for row in rows], color="lightgrey", label="all, not told")
    for name, color in (("old", "C0"), ("new", "C1")):
        axes.scatter([row[f"told_{name}"] for row in rows], places, s=22, color=color, label=f"{name}, told")
        free: list[Any] = [row[f"{name}_accuracy"] for row in rows]
        axes.scatter(free, places, s=40, facecolors="none", edgecolors=color, label=f"{name}, not told")
    axes.set_yticks(places, [row["method"] for row in rows])
    axes.invert_yaxis()


def _courses(axes: Axes, rows: Sequence[Row]) -> None:
    """Mean accuracy over the tasks so far."""
    for method in (each for each in (*PEERS, OURS) if any(row["method"] == each for row in rows)):
        own = [row for row in rows if row["method"] == method]
        tasks = sorted({row["after"] for row in own})
        means = [[row["accuracy"] for row in own if row["after"] == task] for task in tasks]
        axes.plot(tasks, [sum(each) / len(each) for each in means], marker="o", label=method)
