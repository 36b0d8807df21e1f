"""RQ1 of the paper: how many weights can be masked by which rule, and what is left of the accuracy.

Semantic slices against the two baselines, for every metric: one mask for all data (`global`), one for each category
(`category`), one for each semantic slice. Nobody is told the category: all masked models answer, the most certain wins.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import nn

from bench.common import Report, Row, Settings, Table, base_model, dataset, mean_and_spread, resumed, said, show
from nss.critical import CriticalNeurons, critical_neurons
from nss.data import Dataset
from nss.evaluate import evaluate, evaluate_slices
from nss.model import model_digest
from nss.profile import METRICS, Profile, profile
from nss.remove import remove
from nss.size import count_parameters
from nss.slice import SemanticSlices, semantic_slices

THRESHOLDS = tuple(round(0.90 + 0.01 * step, 2) for step in range(10))
SHARES = tuple(round(0.1 * step, 1) for step in range(1, 11))
RULES = ("cumulative", "score", "energy")
BASELINES = ("global", "category")
KINDS = ("", "val_")
PER_CLASS = 500
IMAGES, QUICK_IMAGES = 1000, 500
QUICK_METRICS, QUICK_THRESHOLDS, QUICK_SHARES = ("taylor", "deeplift"), THRESHOLDS[::3], SHARES[4::2]
BY = ("data", "model", "metric", "rule", "threshold")
VALUES = ("masked", "accuracy", "told", *BASELINES, "ahead", "val_ahead", "slices", "original")
PROTOCOL = {
    "profile": f"first {PER_CLASS} training images of each category",
    "judged on": f"the first {IMAGES} test images (accuracy) and validation images (val_accuracy: to choose by)",
    "semantic": f"rules {', '.join(RULES)} at thresholds {THRESHOLDS}, slices by the best silhouette",
    "baselines": f"the top shares {SHARES} of each layer, over all data (global) or for each category",
    "masked": "share of the weights that the masks take away, mean over the models of one method",
    "accuracy": "nobody is told the category, the most certain model wins; told: the category's own model answers",
}
LEFT_OUT = (
    f"all metrics but {' and '.join(QUICK_METRICS)}; thresholds {QUICK_THRESHOLDS} and shares {QUICK_SHARES} alone, "
    f"{QUICK_IMAGES} images of each split in place of {IMAGES}"
)
COLUMNS = (
    "accuracy of the semantic slices at the share of the weights masked, and told the category; global, category: what "
    "the baselines reach at that share; ahead: accuracy less the better of them. Of each metric and rule the threshold "
    "that is furthest ahead on validation images."
)


def run(settings: Settings) -> Report:
    """Measure every combination; finished ones are taken from the cache."""
    report = Report(settings, said(settings, PROTOCOL, LEFT_OUT))
    for name, factory, seed in settings.subjects():
        report.rows += _one(name, factory, seed, settings)
    compared = [row for row in _at_equal_size(report.rows) if row["method"] == "semantic"]
    report.summary = mean_and_spread(compared, BY, VALUES)
    show(tables(report.summary))
    return report


def tables(summary: Sequence[Row]) -> list[Table]:
    """Return what is shown of a summary: one threshold for each metric and rule, chosen on validation images."""
    best: dict[tuple[Any, ...], Row] = {}
    for row in summary:
        key = tuple(row[name] for name in BY[:-1])
        best[key] = max(best.get(key, row), row, key=lambda each: each["val_ahead"])
    shown = (*BY, *VALUES, "ahead_sd")
    return [Table("semantic slices against the baselines at an equal share masked", shown, list(best.values()))]


def _at_equal_size(rows: Sequence[Row]) -> list[Row]:
    """Add to each row what the baselines of its (data, model, seed, metric) reach at its share masked, interpolated."""
    added = []
    for row in rows:
        same = [each for each in rows if all(each[key] == row[key] for key in ("data", "model", "seed", "metric"))]
        reached = {
            f"{kind}{rule}": _interpolated(same, rule, kind, row["masked"]) for rule in BASELINES for kind in KINDS
        }
        ahead = row["accuracy"] - max(reached[rule] for rule in BASELINES)
        val_ahead = row["val_accuracy"] - max(reached[f"val_{rule}"] for rule in BASELINES)
        added.append({**row, **reached, "ahead": ahead, "val_ahead": val_ahead})
    return added


def _interpolated(rows: Sequence[Row], rule: str, kind: str, masked: float) -> float:
    curve = sorted((row["masked"], row[f"{kind}accuracy"]) for row in rows if row["rule"] == rule)
    return float(np.interp(masked, [share for share, _ in curve], [accuracy for _, accuracy in curve]))


def _one(name: str, factory: str, seed: int, settings: Settings) -> list[Row]:
    data = dataset(name)
    model = base_model(data, name, factory, seed)
    metrics = QUICK_METRICS if settings.quick else METRICS
    thresholds = QUICK_THRESHOLDS if settings.quick else THRESHOLDS
    shares = QUICK_SHARES if settings.quick else SHARES
    images = QUICK_IMAGES if settings.quick else IMAGES
    held_out = {part: _first(data.split(part), images) for part in ("test", "val")}
    identity = {"data": name, "model": factory, "seed": seed}
    original = {"original": evaluate(model, held_out["test"]).accuracy}
    plans: list[tuple[str, str, float]] = [("semantic", rule, each) for rule in RULES for each in thresholds]
    plans += [(rule, rule, each) for rule in BASELINES for each in shares]
    found: Profile | None = None
    rows = []
    for metric in metrics:
        for method, rule, threshold in plans:
            key = {
                **identity,
                "weights": model_digest(model),
                "per_class": PER_CLASS,
                "images": images,
                "metric": metric,
                "method": method,
                "rule": rule,
                "threshold": threshold,
            }

            def measure(
                method: str = method, metric: str = metric, rule: str = rule, threshold: float = threshold
            ) -> list[Row]:
                nonlocal found
                found = found or profile(model, data.split("train"), METRICS, samples_per_class=PER_CLASS)
                critical = critical_neurons(found, metric, rule, threshold)
                return [{**identity, **original, **_judge(model, critical, found, method, held_out)}]

            rows += resumed("rq1", key, measure)
    return rows


def _first(data: Dataset, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    return data.images[:count], data.labels[:count]


def _judge(
    model: nn.Module,
    critical: CriticalNeurons,
    found: Profile,
    method: str,
    held_out: Mapping[str, tuple[torch.Tensor, torch.Tensor]],
) -> Row:
    counts = {"global": 1, "category": len(critical.classes), "semantic": None}
    slices: SemanticSlices = semantic_slices(critical, found, n_slices=counts[method])
    models = [remove(model, each.neurons) for each in slices]
    scores, chosen_by = (evaluate_slices(slices, models, held_out[part]) for part in ("test", "val"))
    whole = count_parameters(model)
    kept = sum(count_parameters(each) for each in models) / len(models) / whole
    row: Row = {"method": method, "metric": critical.metric, "rule": critical.rule, "threshold": critical.threshold}
    row |= {"accuracy": scores.vote_accuracy, "told": scores.told_accuracy, "masked": 1 - kept, "slices": len(slices)}
    row |= {"val_accuracy": chosen_by.vote_accuracy, "val_told": chosen_by.told_accuracy}
    return row


def draw(report: Report, path: Path) -> None:
    """Accuracy over the share masked, a panel for each model and metric."""
    by = ["data", "model", "method", "metric", "rule", "threshold"]
    points = mean_and_spread(report.rows, by, ["masked", "accuracy"])
    panels = sorted({(row["data"], row["model"], row["metric"]) for row in points})
    columns = min(5, len(panels))
    lines = -(-len(panels) // columns)
    figure = Figure(figsize=(3.2 * columns, 2.8 * lines), layout="constrained")
    grid = figure.subplots(lines, columns, squeeze=False, sharey=True)
    for axes, (data, model, metric) in zip(grid.flat, panels, strict=False):
        of_panel = [row for row in points if (row["data"], row["model"], row["metric"]) == (data, model, metric)]
        for label, rows in _curves(of_panel):
            axes.plot([row["masked"] for row in rows], [row["accuracy"] for row in rows], marker=".", label=label)
        axes.set(title=f"{model.partition(':')[2]}, {data}\n{metric}", xlabel="share masked")
    grid[0, 0].set(ylabel="accuracy, not told")
    grid[0, 0].legend(fontsize=7)
    figure.savefig(path, dpi=110)


def _curves(rows: Sequence[Row]) -> list[tuple[str, list[Row]]]:
    labels = sorted({(row["method"], row["rule"]) for row in rows})
    curves = []
    for method, rule in labels:
        members = [row for row in rows if (row["method"], row["rule"]) == (method, rule)]
        label = method if method == rule else f"{method}, {rule}"
        curves.append((label, sorted(members, key=lambda row: row["masked"])))
    return curves
