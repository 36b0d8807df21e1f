"""Restructuring against torch-pruning: accuracy at the same share of the multiply-adds, before and after fine-tuning.

Everybody gets the same images, for statistics of BatchNorm taken again and for a fine-tune of the same steps, order and
learning rate. What levelling makes of every method's result, and latencies, are taken last, of the saved models; the
latter once for each number of threads: run again on a quiet machine, and only they are measured.
"""

from __future__ import annotations

import copy
import itertools
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from bench.common import (
    CACHE,
    KNOWLEDGE,
    Report,
    Row,
    Settings,
    Subject,
    Table,
    digest,
    knowledge,
    mean_and_spread,
    resumed,
    said,
    show,
    training,
)
from bench.kept import add_subjects
from bench.peers import CAP, HALVINGS, PEERS, TOLERANCE, prune, taylor_gradients
from nss.evaluate import Evaluation, evaluate
from nss.finetune import fine_tune
from nss.latency import random_pixels, time_calls
from nss.level import DIP, FEWEST, STEP, STEPS, level_classes
from nss.model import Classifier, load_model, model_digest, save_model
from nss.profile import Profile
from nss.remove import remove
from nss.restructure import Restructured, restructure
from nss.size import count_macs, count_parameters
from nss.slice import SemanticSlices
from nss.statistics import retake_statistics
from nss.steps import first_of_each, training_images

BUDGETS = (0.5, 0.25, 0.1)
OURS = ("nss", "nss-8", "nss-cut")
ALIGNED = 8
"""channels that a layer of nss-8 keeps a multiple of"""
PER_CLASS = 500
CALIBRATION = 400
BATCH = 128
RATES = (0.003, 0.02)
"""of the fine-tune: a network that was refitted is spoilt by what one that was only cut needs"""
REPEATS = 30


@dataclass(frozen=True)
class Size:
    """How much is measured."""

    budgets: tuple[float, ...]
    images: int
    """to fine-tune on"""
    epochs: int


WHOLE = Size(BUDGETS, images=20_000, epochs=2)
SMALL = Size(BUDGETS[:2], images=4000, epochs=1)
METHODS = (*OURS, *PEERS)
BY = ("data", "model", "budget", "method")
SIZES = ("macs", "params", "removed", "masked", "bytes", "latency_ms", "latency_1_ms", "speedup")
BEFORE = ("accuracy_before", "lost_before", "worst_before")
AFTER = ("accuracy", "worst_class", "original", "original_worst")
LEVELLED = ("accuracy_level", "worst_level")
AHEAD = {
    "ahead_before": "accuracy_before",
    "ahead": "accuracy",
    "worst_ahead": "worst_class",
    "level_ahead": "accuracy_level",
    "worst_level_ahead": "worst_level",
}
SHOWN = {
    "before any gradient step": ("macs", *BEFORE, "ahead_before"),
    "after fine-tuning": ("macs", *AFTER, "ahead", "worst_ahead"),
    "after fine-tuning, levelled": ("macs", *LEVELLED, "level_ahead", "worst_level_ahead"),
    "size": SIZES,
}
PROTOCOL = {
    "budget": "share of the multiply-adds; torch-pruning's ratio is bisected to come closest, above or below",
    "nss": "merged into the kept neurons and refitted; nss-8: layers keep multiples of 8, all but one; nss-cut: the "
    "neurons of nss kept, the rest only cut",
    "peers": f"torch-pruning's defaults in one step, at most {CAP:.0%} of a layer, the head stays",
    "seen": f"profile and Taylor gradients: first {PER_CLASS} training images of each category",
    "statistics": f"BatchNorm taken again on the first {CALIBRATION} training images of each category (nss-cut, peers)",
    "fine-tune": f"the first {WHOLE.images} training images, {WHOLE.epochs} epochs of batches of {BATCH}, "
    f"SGD with Nesterov 0.9, weight decay 5e-4, one-cycle to each of {RATES}; of every method the model counts that is "
    "best on the validation split",
    "judged on": "the whole test split, once before the first gradient step and once after the last",
    "ahead": "mean of nss less that of the best peer in that very column",
    "levelled": "the fine-tuned models of all methods, their classes levelled on the validation split "
    "(nss.level_classes), judged once more",
    "size": "macs, params: share left; removed: share of the weights gone; masked: share of the weights left but zero; "
    "bytes: the weight file",
    "latency": f"median milliseconds, all models in turn, {REPEATS} calls each; latency_ms: batch of 64",
    "seconds": "from the profile (nss) or the gradients (Taylor) to the model, before fine-tuning",
}
LEFT_OUT = (
    f"budgets but {' and '.join(map(str, SMALL.budgets))}; fine-tuned on {SMALL.images} images, epochs: {SMALL.epochs}"
)
COLUMNS = (
    "budget is the share of the multiply-adds asked for, macs what is left, params of the weights; lost_before and "
    "accuracy_before: before any gradient step, accuracy: after fine-tuning, worst: of the worst class, level: with "
    "classes levelled afterwards; ahead: nss less the best of torch-pruning in that very column; latencies in "
    "milliseconds for 64 images and for one."
)


def run(settings: Settings) -> Report:
    """Measure every combination; finished ones are taken from the cache."""
    report = Report(settings, said(settings, PROTOCOL, LEFT_OUT))
    size = SMALL if settings.quick else WHOLE

    def measure(*subject: Any) -> list[Row]:
        return _one(_Subject(*subject), size, times=settings.times)

    add_subjects(report, lambda name: {"base": training(name), **_terms(size)}, measure)
    report.summary = _against_the_best(report.rows)
    show(tables(report.summary))
    return report


def tables(summary: Sequence[Row]) -> list[Table]:
    """Return what is shown of a summary. Rows from before levelling have nothing but `macs` for one table."""
    return [
        Table(f"restructuring against torch-pruning: {title}", (*BY, *columns), summary)
        for title, columns in SHOWN.items()
        if any(row.get(name) is not None for row in summary for name in columns[1:])
    ]


def _terms(size: Size) -> Row:
    """Return what decides the rows of a subject."""
    return {**_numbers(size), **_timing(), "methods": [*METHODS], "budgets": [*size.budgets]}


def _numbers(size: Size) -> Row:
    """Return what decides the row of any method and budget, latencies apart."""
    seen = {"knowledge": KNOWLEDGE, "per_class": PER_CLASS, "calibration": CALIBRATION}
    peers = {"cap": CAP, "bisection": {"tolerance": TOLERANCE, "halvings": HALVINGS}}
    return {**seen, **peers, "aligned": ALIGNED, "fine_tune": [size.images, size.epochs, BATCH, *RATES]}


def _timing() -> Row:
    """Return what decides latencies."""
    return {"repeats": REPEATS}


def _against_the_best(rows: Sequence[Row]) -> list[Row]:
    """Means over seeds; ours with how far they are ahead of whichever peer is best in that column."""
    summary = mean_and_spread(rows, BY, [*SIZES, *BEFORE, *AFTER, *LEVELLED, "seconds"])
    for row in summary:
        peers = [
            each for each in summary if each["method"] in PEERS and all(each[name] == row[name] for name in BY[:-1])
        ]
        if row["method"] not in PEERS:
            row |= {
                name: row[value] - max(peer[value] for peer in peers) for name, value in AHEAD.items() if value in row
            }
    return summary


class _Subject(Subject):
    """One base model and what its restructurings share, made when it is first asked for."""

    @cached_property
    def train(self) -> tuple[Tensor, Tensor]:
        return training_images(self.data)

    @cached_property
    def calibration(self) -> Tensor:
        return first_of_each(*self.train, CALIBRATION)[0]

    @cached_property
    def original(self) -> Evaluation:
        return evaluate(self.model, self.data.split("test"))

    @cached_property
    def known(self) -> tuple[Profile, SemanticSlices]:
        return knowledge(self.model, self.data.split("train"), PER_CLASS)

    @cached_property
    def gradients(self) -> dict[str, Tensor]:
        return taylor_gradients(self.model, *first_of_each(*self.train, PER_CLASS))

    @cached_property
    def restructured(self) -> dict[tuple[float, int], Restructured]:
        return {}

    def prepare(self, method: str) -> None:
        """Make what `make` needs and what is not counted in its seconds."""
        _ = self.known if method in OURS else self.gradients if "taylor" in method else None

    def make(self, method: str, budget: float) -> Classifier:
        """Return a smaller model on which no gradient step was taken."""
        if method in PEERS:
            gradients = self.gradients if "taylor" in method else {}
            return prune(self.model, method, budget, gradients, self.calibration)
        how = budget, ALIGNED if method == "nss-8" else 1
        if how not in self.restructured:
            profiled, slices = self.known
            self.restructured[how] = restructure(
                self.model, slices, self.data, profiled, macs=budget, multiple=how[1], seed=self.seed
            )
        if method != "nss-cut":
            return copy.deepcopy(self.restructured[how].model)
        smaller = remove(self.model, self.restructured[how].plan.neurons())
        retake_statistics(smaller, self.calibration)
        assert isinstance(smaller, Classifier)
        return smaller

    def fine_tuned(self, smaller: Classifier, size: Size) -> tuple[Classifier, float]:
        """Train as every method does. Returns the model at the rate that is best on validation images, and the rate."""
        images, labels = (each[: size.images] for each in self.train)
        steps, val = size.epochs * max(1, len(images) // BATCH), self.data.split("val")
        tuned = [(copy.deepcopy(smaller), rate) for rate in RATES]
        for model, rate in tuned:
            fine_tune(model, (images, labels), steps, self.seed, learning_rate=rate, batch_size=BATCH)
        return max(tuned, key=lambda each: evaluate(each[0], val).accuracy)


def _one(subject: _Subject, size: Size, *, times: bool) -> list[Row]:
    identity = {"data": subject.name, "model": subject.factory, "seed": subject.seed}
    rows: list[Row] = []
    for budget, method in itertools.product(size.budgets, METHODS):
        key = {**identity, "weights": model_digest(subject.model), **_numbers(size)}
        key |= {"method": method, "budget": budget}
        folder = CACHE / "restructured" / digest(key)

        def measure(method: str = method, budget: float = budget, folder: Path = folder) -> list[Row]:
            judged = _judge(subject, method, budget, size, folder)
            return [{**identity, "method": method, "budget": budget, **judged}]

        rows += resumed("restructure", key, measure)
    rows = _levelled(subject, identity, rows)
    return _timed(subject, identity, rows) if times else rows


def _levelled(subject: _Subject, identity: Row, rows: Sequence[Row]) -> list[Row]:
    """Add how the saved models answer with their classes levelled on validation images."""

    def measure(row: Row) -> list[Row]:
        model = load_model(CACHE / "restructured" / row["saved"])
        level_classes(model, subject.data.split("val"))
        found = evaluate(model, subject.data.split("test"))
        return [{"accuracy_level": found.accuracy, "worst_level": found.worst_accuracy}]

    # Not among the terms: rows that were kept before there was levelling lack these columns, and hold for the others.
    how = {**identity, "level": [STEP, STEPS, DIP, FEWEST]}
    keys = [{**how, "weights": row["weights"]} for row in rows]
    found = [resumed("restructure-level", key, partial(measure, row)) for key, row in zip(keys, rows, strict=True)]
    return [{**row, **of} for row, (of,) in zip(rows, found, strict=True)]


def _judge(subject: _Subject, method: str, budget: float, tuned: Size, folder: Path) -> Row:
    subject.prepare(method)
    start = time.perf_counter()
    smaller = subject.make(method, budget)
    seconds = time.perf_counter() - start
    test = subject.data.split("test")
    before = evaluate(smaller, test)
    size = _size(subject.model, smaller)
    smaller, rate = subject.fine_tuned(smaller, tuned)
    after = evaluate(smaller, test)
    save_model(smaller, folder)
    return {
        **size,
        "bytes": (folder / "model.safetensors").stat().st_size,
        "original": subject.original.accuracy,
        "original_worst": subject.original.worst_accuracy,
        "accuracy_before": before.accuracy,
        "worst_before": before.worst_accuracy,
        "lost_before": subject.original.accuracy - before.accuracy,
        "accuracy": after.accuracy,
        "worst_class": after.worst_accuracy,
        "learning_rate": rate,
        "seconds": seconds,
        "saved": folder.name,
        "weights": model_digest(smaller),
    }


def _size(model: Classifier, smaller: Classifier) -> Row:
    whole, left = count_parameters(model), count_parameters(smaller)
    zeros = sum(int((weight == 0).sum()) for weight in smaller.parameters())
    shares = {"params": left / whole, "removed": 1 - left / whole, "masked": zeros / whole}
    return {"macs": count_macs(smaller) / count_macs(model), **shares}


def _timed(subject: _Subject, identity: Row, rows: Sequence[Row]) -> list[Row]:
    """Add the latencies of the saved models, measured again for other weights or another number of threads."""
    key = {**identity, "weights": [row["weights"] for row in rows], "threads": torch.get_num_threads(), **_timing()}

    def measure() -> list[Row]:
        models = {row["saved"]: load_model(CACHE / "restructured" / row["saved"]) for row in rows}
        pixels = random_pixels(64, subject.model.spec.input_shape)
        found = time_calls({"original": subject.model, **models}, pixels, repeats=REPEATS)
        return [_faster(found[row["saved"]].median_ms, found["original"].median_ms) for row in rows]

    return [{**row, **times} for row, times in zip(rows, resumed("restructure-latency", key, measure), strict=True)]


def _faster(smaller: Mapping[int, float], original: Mapping[int, float]) -> dict[str, Any]:
    return {
        "latency_ms": smaller[64],
        "latency_1_ms": smaller[1],
        "original_latency_ms": original[64],
        "original_latency_1_ms": original[1],
        "speedup": original[64] / smaller[64],
    }


def draw(report: Report, path: Path) -> None:
    """Accuracy over the share of multiply-adds, before fine-tuning above, after it below; a column for each model."""
    points = mean_and_spread(
        report.rows, ["data", "model", "method", "budget"], ["macs", "accuracy_before", "accuracy", "original"]
    )
    panels = sorted({(row["data"], row["model"]) for row in points})
    figure = Figure(figsize=(4.5 * len(panels), 6.4), layout="constrained")
    grid = figure.subplots(2, len(panels), squeeze=False, sharex=True)
    for column, (data, model) in enumerate(panels):
        of_panel = [row for row in points if (row["data"], row["model"]) == (data, model)]
        for axes, value in zip(grid[:, column], ("accuracy_before", "accuracy"), strict=True):
            axes.axhline(of_panel[0]["original"], color="grey", linestyle=":", label="original")
            for method in sorted({row["method"] for row in of_panel}):
                curve = sorted((row["macs"], row[value]) for row in of_panel if row["method"] == method)
                style = {"linestyle": "-" if method in OURS else "--", "marker": "."}
                axes.plot([macs for macs, _ in curve], [accuracy for _, accuracy in curve], label=method, **style)
        grid[0, column].set(title=f"{model.partition(':')[2]}, {data}")
        grid[1, column].set(xlabel="share of the multiply-adds")
    grid[0, 0].set(ylabel="accuracy, no gradient step")
    grid[1, 0].set(ylabel="accuracy after fine-tuning")
    grid[0, 0].legend(fontsize=7)
    figure.savefig(path, dpi=110)
