"""RQ2 of the paper: iterative weight pruning by four schemes, with and without the semantic pre-slice.

The pre-slice removes neurons first (restructure within half of the tolerance, no gradient step), then the same scheme
masks weights. Both are judged against the base model, and what is compared is the total compression rate: weights of
the base model over weights that are neither removed nor masked.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, astuple, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from torch import Tensor

from bench.common import (
    Report,
    Row,
    Settings,
    Subject,
    Table,
    knowledge,
    mean_and_spread,
    resumed,
    said,
    show,
    training,
)
from bench.kept import add_subjects
from nss.data import Data
from nss.evaluate import evaluate
from nss.model import Classifier, model_digest
from nss.predict import SLACK
from nss.prune_weights import SCHEMES, prune_weights_iteratively
from nss.restructure import restructure
from nss.size import count_parameters
from nss.weight_masks import count_prunable

SETTINGS = ("dense", "pre-slice")
PER_CLASS = 500
TOLERANCE, BATCH, RATE = 0.01, 64, 0.005
# Half is left to the masks: a fixed share of the multiply-adds costs one network nothing, another more than all of it.
DROP = TOLERANCE / 2


@dataclass(frozen=True)
class Course:
    """How a model is pruned."""

    step: float
    """share of the remaining weights that an iteration masks"""
    iterations: int
    retrain: int
    """steps of an iteration"""
    images: int
    """of the validation split, that tell when to stop"""


# On one core an iteration of vgg_small takes seconds, a (model, seed) with all its schemes a quarter of an hour. The
# rate is the largest of .001 .. .02 at which training goes on without harm to a dense model (validation, two seeds): at
# .02 it alone costs as much as the tolerance allows, and chance decides where the pruning stops.
WHOLE = Course(step=0.2, iterations=30, retrain=100, images=2000)
SMALL = Course(step=0.36, iterations=15, retrain=30, images=1000)
PROTOCOL = {
    "iteration": f"{WHOLE.step:.0%} of the remaining weights masked, then {WHOLE.retrain} SGD steps (batch {BATCH}, "
    f"momentum 0.9, one-cycle to {RATE})",
    "stop": f"accuracy on the first {WHOLE.images} validation images more than {TOLERANCE} below the base model's, or "
    f"{WHOLE.iterations} iterations",
    "pre-slice": f"restructure(max_accuracy_drop={DROP}) on those validation images, by taylor, cumulative 0.95, "
    f"{PER_CLASS} training images of each category, slices by the best silhouette; no gradient step",
    "cr": "total: weights of the base model's layers over those neither removed nor masked; cr_masked is of the model "
    "that is pruned, cr_removed of parameters",
    "accuracy": "on the test split, of the last model within the tolerance, touched once (MA); where the pre-slice "
    "alone is out of it and stays so, of the start: within is the share of seeds where that is not so",
    "iterations": "NI; iterations_same: to the CR same_cr, the smaller one of both settings at their stops",
}
LEFT_OUT = (
    f"{SMALL.step:.0%} of the remaining weights an iteration, {SMALL.retrain} steps and at most {SMALL.iterations} "
    f"iterations, {SMALL.images} validation images"
)
COLUMNS = (
    "method is the scheme, setting whether neurons were removed first; iterations to the stop, the share of seeds "
    "where it is within the tolerance, and the total compression rate cr there, of it by masks (cr_masked) and by "
    "removed neurons (cr_removed); test accuracy there and of the original; iterations_same: to the rate same_cr that "
    "both settings reach."
)
BY = ("data", "model", "method", "setting")
RATES = ("cr", "cr_masked", "cr_removed", "masked", "removed")
VALUES = ("iterations", "within", *RATES, "accuracy", "val_accuracy", "same_cr", "iterations_same", "original")


def run(settings: Settings) -> Report:
    """Measure every combination; finished ones are taken from the cache."""
    report = Report(settings, said(settings, PROTOCOL, LEFT_OUT))
    course = SMALL if settings.quick else WHOLE

    def measure(name: str, factory: str, seed: int) -> list[Row]:
        return _one(_Subject(name, factory, seed, course))

    add_subjects(report, lambda name: _terms(name, course), measure)
    report.summary = mean_and_spread(_at_same_rate(report.rows), BY, VALUES)
    show(tables(report.summary))
    return report


def tables(summary: Sequence[Row]) -> list[Table]:
    """Return what is shown of a summary."""
    stops = ("iterations", "within", "cr", "cr_masked", "cr_removed", "accuracy", "original")
    columns = (*BY, *stops, "iterations_same", "same_cr")
    return [Table("iterative pruning, dense and after the semantic pre-slice", columns, summary)]


def _terms(name: str, course: Course) -> Row:
    """Return what decides the rows of a subject."""
    pre_slice = {"max_accuracy_drop": DROP, "per_class": PER_CLASS}
    pruning = {**asdict(course), "tolerance": TOLERANCE, "batch": BATCH, "rate": RATE}
    return {"base": training(name), "schemes": [*SCHEMES], "pre_slice": pre_slice, "pruning": pruning}


def _numbers(course: Course, setting: str) -> list[float]:
    pruning = [*astuple(course), TOLERANCE, BATCH, RATE]
    return [*pruning, PER_CLASS, DROP] if setting == "pre-slice" else pruning


def _at_same_rate(rows: Sequence[Row]) -> list[Row]:
    """Return the rows of the stops, each with the iterations to the CR that both settings reach within the tolerance.

    A start that loses more than the tolerance, and never makes up for it, is a stop all the same: it counts as none.
    """
    keys = ("data", "model", "seed", "method")
    added = []
    for stop in (row for row in rows if row["stop"]):
        same = [row for row in rows if all(row[key] == stop[key] for key in keys)]
        ends = [row for row in same if row["stop"]]
        found: Row = {**stop, "within": float(_is_within(stop)), "same_cr": None, "iterations_same": None}
        if all(map(_is_within, ends)):
            rate = min(row["cr"] for row in ends)
            own = [row for row in same if row["setting"] == stop["setting"] and row["cr"] >= rate]
            found |= {"same_cr": rate, "iterations_same": min(row["iterations"] for row in own)}
        added.append(found)
    return added


def _is_within(stop: Row) -> bool:
    # Both are shares of so many images, rounded when they are kept.
    return bool(stop["val_accuracy"] >= stop["val_original"] - TOLERANCE - SLACK)


@dataclass
class _Subject(Subject):
    """One base model and what its prunings share, made when it is first asked for."""

    course: Course

    @cached_property
    def judge(self) -> tuple[Tensor, Tensor]:
        """The validation images that tell when to stop, and their labels."""
        val = self.data.split("val")
        return val.images[: self.course.images], val.labels[: self.course.images]

    @cached_property
    def held_out(self) -> Data:
        return self.data.split("test")

    @cached_property
    def original(self) -> float:
        return evaluate(self.model, self.held_out).accuracy

    @cached_property
    def pre_sliced(self) -> Classifier:
        """The smallest model that loses at most DROP."""
        found, slices = knowledge(self.model, self.data.split("train"), PER_CLASS)
        smaller = restructure(
            self.model, slices, self.data, found, max_accuracy_drop=DROP, held_out=self.judge, seed=self.seed
        )
        return smaller.model


def _one(subject: _Subject) -> list[Row]:
    rows = []
    for method in SCHEMES:
        for setting in SETTINGS:
            identity = {"data": subject.name, "model": subject.factory, "seed": subject.seed}
            identity |= {"method": method, "setting": setting}
            key = {**identity, "weights": model_digest(subject.model), "protocol": _numbers(subject.course, setting)}

            def measure(method: str = method, setting: str = setting, identity: Row = identity) -> list[Row]:
                start = subject.model if setting == "dense" else subject.pre_sliced
                return [{**identity, **row} for row in _measure(subject, start, method)]

            rows += resumed("rq2", key, measure)
    return rows


def _measure(subject: _Subject, model: Classifier, method: str) -> list[Row]:
    """Prune once. Returns a row for each iteration, the start first; only the stop is judged on the test split."""
    base, judge, course = subject.model, subject.judge, subject.course
    reference = evaluate(base, judge).accuracy
    found = prune_weights_iteratively(
        model,
        subject.data,
        method,
        step=course.step,
        tolerance=TOLERANCE,
        retrain_steps=course.retrain,
        batch_size=BATCH,
        learning_rate=RATE,
        held_out=judge,
        seed=subject.seed,
        max_iterations=course.iterations,
        reference=reference,
        original_parameters=count_parameters(base),
    )
    total, whole = count_prunable(model), count_prunable(base)
    removed = {"removed": 1 - 1 / found.cr_removed, "cr_removed": found.cr_removed}

    def row(iteration: int, remaining: int, val_accuracy: float, **more: Any) -> Row:
        rates = {"masked": 1 - remaining / total, "cr_masked": total / remaining, "cr": whole / remaining}
        return {"iterations": iteration, **rates, **removed, "val_accuracy": val_accuracy, "stop": False, **more}

    rows = [row(0, total, evaluate(model, judge).accuracy)]
    rows += [row(each.iteration, each.remaining, each.accuracy) for each in found.curve]
    accuracies = {"accuracy": evaluate(found.model, subject.held_out).accuracy, "original": subject.original}
    rows[found.iterations] |= {"stop": True, "val_original": reference, **accuracies}
    return rows


def draw(report: Report, path: Path) -> None:
    """Validation accuracy over the total compression rate, a panel for each model and scheme, a mark an iteration."""
    points = mean_and_spread(report.rows, ["data", "model", "method", "setting", "iterations"], ["cr", "val_accuracy"])
    panels = list(dict.fromkeys((row["data"], row["model"], row["method"]) for row in points))
    columns = len({method for _, _, method in panels})
    lines = -(-len(panels) // columns)
    figure = Figure(figsize=(3.2 * columns, 2.8 * lines), layout="constrained")
    grid = figure.subplots(lines, columns, squeeze=False, sharey="row")
    for axes, panel in zip(grid.flat, panels, strict=False):
        of_panel = [row for row in points if (row["data"], row["model"], row["method"]) == panel]
        for setting in SETTINGS:
            # Where some seeds have stopped, the mean of the others would lead on as if it were of all.
            rows = [row for row in of_panel if row["setting"] == setting]
            rows = [row for row in rows if row["seeds"] == rows[0]["seeds"]]
            axes.plot([row["cr"] for row in rows], [row["val_accuracy"] for row in rows], marker=".", label=setting)
        axes.set(title=f"{panel[1].partition(':')[2]}, {panel[0]}\n{panel[2]}", xlabel="compression rate", xscale="log")
    for row_of_axes in grid:
        row_of_axes[0].set(ylabel="validation accuracy")
    grid[0, 0].legend(fontsize=7)
    figure.savefig(path, dpi=110)
