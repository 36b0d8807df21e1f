"""The points of one case of RQ3: each method at each setting, judged on validation, the chosen ones on test images."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import nn

from bench.common import Row
from bench.readapt_cases import Case, Subject
from bench.readapt_peers import PEERS, Trained, train_peer, trained_layers
from nss.predict import accuracy
from nss.profile import Profile
from nss.readapt import Readapted, readapt
from nss.samples import Samples
from nss.slice import SemanticSlices

FULL, OURS = "full", "nss"
SHARE, BATCH = 0.2, 64
MARGIN = 0.005
"""so much less new accuracy than full retraining's best counts as enough"""
FRESH = 500
"""test images that are attacked again for each adapted model"""
TURNS = 3
"""how often the points of the main case are timed"""
PROBE = 500
"""training images on which DeepArc compares layers"""


@dataclass(frozen=True)
class Grid:
    """What is tried in a case, and on how many images it is judged."""

    epochs: int
    rates: Mapping[str, tuple[float, ...]]
    guards: tuple[float, ...]
    statistics: Mapping[str, tuple[bool, ...]]
    """whether the BatchNorms that are trained follow the batches"""
    held_out: int
    test: int


class Points:
    """Runs the methods on one case."""

    def __init__(self, subject: Subject, case: Case, grid: Grid) -> None:
        self.subject, self.case, self.grid = subject, case, grid

    @cached_property
    def _test(self) -> tuple[Samples, Samples]:
        return self.case.test(self.grid.test)

    @cached_property
    def _original(self) -> Row:
        new, old = (_right(self.case.model, samples) for samples in self._test)
        return {"original_new": new, "original_old": old}

    @cached_property
    def _known(self) -> tuple[Profile, SemanticSlices]:
        model = self.case.model
        return self.subject.known if model is self.subject.model else self.subject.knowledge(model)

    def peers(self) -> list[Row]:
        """Return a row for each baseline, learning rate and treatment of the statistics, at the epoch chosen for it."""
        rows: list[Row] = []
        probe = self.subject.first("train", 0, PROBE).images
        goal = 1.0
        for method in PEERS:  # full retraining first: it sets the goal
            layers = trained_layers(self.case.model, method, probe)
            settings = list(itertools.product(self.grid.rates[method], self.grid.statistics[method]))
            made = [self._peer(layers, *setting) for setting in settings]
            if method == FULL:
                goal = goal_of(each.curve for each in made)
            found = [
                {"method": method, "learning_rate": rate, "statistics": moving, **_peer_row(each, goal)}
                for (rate, moving), each in zip(settings, made, strict=True)
            ]
            place = best_point(found, goal)
            found[place] |= {"chosen": True, **self._tested(made[place].at(found[place]["kept_epoch"]))}
            rows += found
        return rows

    def _peer(self, layers: Sequence[str], rate: float, statistics: bool) -> Trained:
        return train_peer(
            self.case.model,
            layers,
            self.case.new,
            self.case.held_out,
            self.case.old,
            rate,
            epochs=self.grid.epochs,
            batch_size=BATCH,
            seed=self.subject.seed,
            statistics=statistics,
        )

    def ours(self, goal: float) -> list[Row]:
        """Return a row for each learning rate and guard. goal: the validation accuracy on new that is enough."""
        settings = list(itertools.product(self.grid.rates[OURS], self.grid.guards))
        made = [self._readapted(rate, guard, self.grid.epochs) for rate, guard in settings]
        rows = [
            {"method": OURS, "learning_rate": rate, "guard": guard, **self._our_row(each)}
            for (rate, guard), each in zip(settings, made, strict=True)
        ]
        place = best_point(rows, goal)
        rows[place] |= {"chosen": True, **self._tested(made[place].model)}
        return rows

    def _readapted(self, rate: float, guard: float, epochs: int) -> Readapted:
        known, slices = self._known
        return readapt(
            self.case.model,
            slices,
            self.case.new_data(),
            profile=known,
            share=SHARE,
            guard=guard,
            learning_rate=rate,
            epochs=epochs,
            batch_size=BATCH,
            seed=self.subject.seed,
            patience=epochs,
        )

    def timed(self, full: Row, own: Row) -> list[list[float]]:
        """Time two points again, in turn: for each the medians of the seconds at the end of its epochs."""
        layers = trained_layers(self.case.model, FULL, self.subject.first("train", 0, PROBE).images)
        seconds: list[list[list[float]]] = [[], []]
        for _ in range(TURNS):
            trained = self._peer(layers, full["learning_rate"], full["statistics"])
            seconds[0].append(list(trained.seconds))
            first, whole = (
                self._readapted(own["learning_rate"], own["guard"], epochs).report.seconds
                for epochs in (1, self.grid.epochs)
            )
            seconds[1].append(epoch_seconds(first, whole, self.grid.epochs))
        return [[statistics.median(each) for each in zip(*runs, strict=True)] for runs in seconds]

    def _our_row(self, found: Readapted) -> Row:
        report = found.report
        curve = [float(each.new_accuracy or 0) for each in report.curve]
        judged = {"new_val": curve[report.kept_epoch], "old_val": _right(found.model, self.case.old)}
        judged |= {"kept_epoch": report.kept_epoch, "curve": curve, "chosen": False}
        return {**judged, "trained_share": report.trained_share, "steps": report.steps}

    def _tested(self, model: nn.Module) -> Row:
        new, old = (_right(model, samples) for samples in self._test)
        row = {"new_accuracy": new, "old_accuracy": old, **self._original}
        if self.case.fresh is not None:
            row["fresh_accuracy"] = _right(model, self.case.fresh(model, min(FRESH, self.grid.test)))
        return row


def _right(model: nn.Module, samples: Samples) -> float:
    return accuracy(model, (samples.images, samples.labels))


def _peer_row(trained: Trained, goal: float) -> Row:
    points = [{"new_val": new, "old_val": old} for new, old in zip(trained.curve, trained.old_curve, strict=True)]
    epoch = best_point(points, goal)
    row = {**points[epoch], "kept_epoch": epoch, "curve": list(trained.curve), "chosen": False}
    return {**row, "trained_share": trained.trained_share, "steps": trained.steps}


def goal_of(curves: Iterable[Sequence[float]]) -> float:
    """Return the accuracy on new validation images that is enough: MARGIN below the best of full retraining's epochs.

    curves: of all its settings.
    """
    return round(max(map(max, curves)) - MARGIN, 9)


def best_point(points: Sequence[Row], goal: float) -> int:
    """Return which point is best on old validation images of those that reach `goal` on new ones, else on new ones.

    Of equals the one that is better on the others, then the first.
    """
    enough = [place for place, point in enumerate(points) if point["new_val"] >= goal]
    places, first, second = (enough, "old_val", "new_val") if enough else (range(len(points)), "new_val", "old_val")
    return max(places, key=lambda place: (points[place][first], points[place][second]))


def epoch_seconds(first: float, whole: float, epochs: int) -> list[float]:
    """Return the seconds at the end of each epoch: `first` of a run of one, `whole` of all, a line between.

    The head of the list is what the line leaves for before the first step: the choice of neurons counts in full.
    """
    each = max(0.0, whole - first) / max(1, epochs - 1)
    return [max(0.0, whole - (epochs - epoch) * each) for epoch in range(epochs + 1)]


def to_target(row: Row, target: float) -> Row:
    """Return whether and after how many steps a point reaches `target` on new validation images; None: it does not."""
    epoch = reached_at(row, target)
    steps = None if epoch is None else row["steps"] * epoch / (len(row["curve"]) - 1)
    return {"reached": float(epoch is not None), "steps_to_target": steps}


def reached_at(row: Row, target: float) -> int | None:
    """Return the first epoch that reaches `target` on new validation images."""
    return next((epoch for epoch, value in enumerate(row["curve"]) if value >= target), None)


def fastest_of_each(rows: Sequence[Row], target: float) -> dict[str, Row]:
    """Return for each method the row that its time to `target` is taken from.

    Of a baseline it is the setting that gets there first, wherever it ends; of ours the chosen one.
    """
    methods = dict.fromkeys(row["method"] for row in rows)
    counting = {
        method: [row for row in rows if row["method"] == method and (method != OURS or row["chosen"])]
        for method in methods
    }
    return {method: _fastest(own, target) for method, own in counting.items()}


def _fastest(rows: Sequence[Row], target: float) -> Row:
    """Return the row that reaches `target` after the fewest epochs, of equals, or where none does, the first."""
    return min(rows, key=lambda row: math.inf if (epoch := reached_at(row, target)) is None else epoch)
