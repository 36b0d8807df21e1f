"""RQ2 of the paper: iterative weight pruning by four schemes, with and without the semantic pre-slice.

The pre-slice removes neurons first (restructure at half of the multiply-adds, no gradient step), then the same scheme
masks weights. Both are judged against the base model, and what is compared is the total compression rate: weights of
the base model over weights that are neither removed nor masked.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from bench.common import Report, Row, Settings, base_model, dataset, knowledge, mean_and_spread, resumed, show
from nss.data import Dataset
from nss.evaluate import evaluate
from nss.model import Classifier, model_digest
from nss.prune_weights import SCHEMES, prune_weights_iteratively
from nss.restructure import restructure
from nss.size import count_parameters
from nss.weight_masks import count_prunable

SETTINGS = ("dense", "pre-slice")
QUICK = ("lamp",)
MACS = 0.5
PER_CLASS = 500
STEP, TOLERANCE, ITERATIONS = 0.2, 0.01, 30
# On one core an iteration of vgg_small takes seconds, a (model, seed) with all its schemes a quarter of an hour. The
# rate is the largest of .001 .. .02 at which training goes on without harm to a dense model (validation, two seeds): at
# .02 it alone costs as much as the tolerance allows, and chance decides where the pruning stops.
RETRAIN, BATCH, RATE, IMAGES = 100, 64, 0.005, 2000
PROTOCOL = {
    "iteration": f"{STEP:.0%} of the remaining weights masked, then {RETRAIN} SGD steps (batch {BATCH}, momentum 0.9, "
    f"one-cycle to {RATE})",
    "stop": f"accuracy on the first {IMAGES} validation images more than {TOLERANCE} below the base model's, or "
    f"{ITERATIONS} iterations",
    "pre-slice": f"restructure(macs={MACS}) by taylor, cumulative 0.95, {PER_CLASS} training images of each category, "
    "slices by the best silhouette; no gradient step",
    "cr": "total: weights of the base model's layers over those neither removed nor masked; cr_masked is of the model "
    "that is pruned, cr_removed of parameters",
    "accuracy": "on the test split, of the last model within the tolerance, touched once (MA)",
    "iterations": "NI; iterations_same: to the CR same_cr, the smaller one of both settings at their stops",
}


def run(settings: Settings) -> Report:
    """Measure every combination; finished ones are taken from the cache."""
    report = Report(settings, PROTOCOL)
    for name, factory, seed in settings.subjects():
        report.rows += _one(name, factory, seed, settings)
    by = ["data", "model", "method", "setting"]
    stops = _at_same_rate(report.rows)
    values = ["iterations", "cr", "cr_masked", "cr_removed", "masked", "removed", "accuracy", "val_accuracy"]
    values += ["same_cr", "iterations_same", "original"]
    report.summary = mean_and_spread(stops, by, values)
    shown = ["iterations", "cr", "cr_masked", "cr_removed", "accuracy", "original", "iterations_same", "same_cr"]
    show("iterative pruning, dense and after the semantic pre-slice", report.summary, [*by, *shown])
    return report


def _at_same_rate(rows: Sequence[Row]) -> list[Row]:
    """Return the rows of the stops, each with the iterations to the CR that both settings reach."""
    keys = ("data", "model", "seed", "method")
    added = []
    for stop in (row for row in rows if row["stop"]):
        same = [row for row in rows if all(row[key] == stop[key] for key in keys)]
        rate = min(row["cr"] for row in same if row["stop"])
        own = [row for row in same if row["setting"] == stop["setting"] and row["cr"] >= rate]
        added.append({**stop, "same_cr": rate, "iterations_same": min(row["iterations"] for row in own)})
    return added


def _one(name: str, factory: str, seed: int, settings: Settings) -> list[Row]:
    data = dataset(name)
    model = base_model(data, name, factory, seed)

    @cache
    def pre_sliced() -> Classifier:
        return _pre_slice(model, data, seed)

    start: dict[str, Callable[[], Classifier]] = {"dense": lambda: model, "pre-slice": pre_sliced}
    rows = []
    for method in QUICK if settings.quick else SCHEMES:
        for setting in SETTINGS:
            identity = {"data": name, "model": factory, "seed": seed, "method": method, "setting": setting}
            numbers = [MACS, PER_CLASS, STEP, TOLERANCE, ITERATIONS, RETRAIN, BATCH, RATE, IMAGES]
            key = {**identity, "weights": model_digest(model), "protocol": numbers}

            def measure(method: str = method, setting: str = setting, identity: Row = identity) -> list[Row]:
                return [{**identity, **row} for row in _measure(model, start[setting](), data, method, seed)]

            rows += resumed("rq2", key, measure)
    return rows


def _pre_slice(model: Classifier, data: Dataset, seed: int) -> Classifier:
    found, slices = knowledge(model, data.split("train"), PER_CLASS)
    return restructure(model, slices, data, found, macs=MACS, seed=seed).model


def _measure(base: Classifier, model: Classifier, data: Dataset, method: str, seed: int) -> list[Row]:
    """Prune once. Returns a row for each iteration, the start first; only the stop is judged on the test split."""
    val, test = data.split("val"), data.split("test")
    judge = val.images[:IMAGES], val.labels[:IMAGES]
    reference = evaluate(base, judge).accuracy
    found = prune_weights_iteratively(
        model,
        data,
        method,
        step=STEP,
        tolerance=TOLERANCE,
        retrain_steps=RETRAIN,
        batch_size=BATCH,
        learning_rate=RATE,
        held_out=judge,
        seed=seed,
        max_iterations=ITERATIONS,
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
    accuracies = {"accuracy": evaluate(found.model, test).accuracy, "original": evaluate(base, test).accuracy}
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
