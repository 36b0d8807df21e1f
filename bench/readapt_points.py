"""The points of one case of RQ3: each method at each setting, judged on validation, the chosen ones on test images."""

from __future__ import annotations

import itertools
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

OURS = "nss"
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
        """Return a row for each baseline, learning rate and treatment of the statistics."""
        rows = []
        probe = self.subject.first("train", 0, PROBE).images
        for method in PEERS:
            layers = trained_layers(self.case.model, method, probe)
            settings = list(itertools.product(self.grid.rates[method], self.grid.statistics[method]))
            made = [self._peer(layers, *setting) for setting in settings]
            found = [
                {"method": method, "learning_rate": rate, "statistics": moving, **self._peer_row(each)}
                for (rate, moving), each in zip(settings, made, strict=True)
            ]
            place = best_new(found)
            found[place] |= {"chosen": True, **self._tested(made[place].model)}
            rows += found
        return rows

    def _peer(self, layers: Sequence[str], rate: float, statistics: bool) -> Trained:
        return train_peer(
            self.case.model,
            layers,
            self.case.new,
            self.case.held_out,
            rate,
            epochs=self.grid.epochs,
            batch_size=BATCH,
            seed=self.subject.seed,
            statistics=statistics,
        )

    def _peer_row(self, trained: Trained) -> Row:
        return {
            **self._validated(trained.model, trained.curve, trained.kept_epoch),
            "trained_share": trained.trained_share,
            "steps": trained.steps,
        }

    def ours(self, goal: float) -> list[Row]:
        """Return a row for each learning rate and guard. goal: the validation accuracy on new that is enough."""
        settings = list(itertools.product(self.grid.rates[OURS], self.grid.guards))
        made = [self._readapted(rate, guard, self.grid.epochs) for rate, guard in settings]
        rows = [
            {"method": OURS, "learning_rate": rate, "guard": guard, **self._our_row(each)}
            for (rate, guard), each in zip(settings, made, strict=True)
        ]
        place = best_of_ours(rows, goal)
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

    def timed(self, full: Row, own: Row) -> list[Row]:
        """Time two points again, in turn: medians of the seconds at the end of each epoch, with the rest of the row."""
        layers = trained_layers(self.case.model, "full", self.subject.first("train", 0, PROBE).images)
        seconds: list[list[list[float]]] = [[], []]
        for _ in range(TURNS):
            trained = self._peer(layers, full["learning_rate"], full["statistics"])
            seconds[0].append(list(trained.seconds))
            first, whole = (
                self._readapted(own["learning_rate"], own["guard"], epochs).report.seconds
                for epochs in (1, self.grid.epochs)
            )
            seconds[1].append(epoch_seconds(first, whole, self.grid.epochs))
        medians = [[statistics.median(each) for each in zip(*runs, strict=True)] for runs in seconds]
        rows = zip((full, own), medians, strict=True)
        return [{**row, "seconds": each[-1], "epoch_seconds": each} for row, each in rows]

    def _our_row(self, found: Readapted) -> Row:
        report = found.report
        curve = [float(each.new_accuracy or 0) for each in report.curve]
        return {
            **self._validated(found.model, curve, report.kept_epoch),
            "trained_share": report.trained_share,
            "steps": report.steps,
        }

    def _validated(self, model: nn.Module, curve: Iterable[float], kept_epoch: int) -> Row:
        points = list(curve)
        row = {"new_val": points[kept_epoch], "old_val": _right(model, self.case.old)}
        return {**row, "kept_epoch": kept_epoch, "curve": points, "chosen": False}

    def _tested(self, model: nn.Module) -> Row:
        new, old = (_right(model, samples) for samples in self._test)
        row = {"new_accuracy": new, "old_accuracy": old, **self._original}
        if self.case.fresh is not None:
            row["fresh_accuracy"] = _right(model, self.case.fresh(model, min(FRESH, self.grid.test)))
        return row


def _right(model: nn.Module, samples: Samples) -> float:
    return accuracy(model, (samples.images, samples.labels))


def best_new(rows: Sequence[Row]) -> int:
    """Return which row is best on new validation images, of equals the one that is best on old ones."""
    return max(range(len(rows)), key=lambda place: (rows[place]["new_val"], rows[place]["old_val"]))


def best_of_ours(rows: Sequence[Row], goal: float) -> int:
    """Return which row is best on old validation images of those that reach `goal` on new ones; else `best_new`."""
    enough = [place for place, row in enumerate(rows) if row["new_val"] >= goal]
    if not enough:
        return best_new(rows)
    return max(enough, key=lambda place: (rows[place]["old_val"], rows[place]["new_val"]))


def epoch_seconds(first: float, whole: float, epochs: int) -> list[float]:
    """Return the seconds at the end of each epoch: `first` of a run of one, `whole` of all, a line between.

    The head of the list is what the line leaves for before the first step: the choice of neurons counts in full.
    """
    each = max(0.0, whole - first) / max(1, epochs - 1)
    return [max(0.0, whole - (epochs - epoch) * each) for epoch in range(epochs + 1)]


def to_target(row: Row, target: float) -> Row:
    """Return whether and when a point reaches `target` on new validation images; None where it does not."""
    epoch = next((epoch for epoch, value in enumerate(row["curve"]) if value >= target), None)
    steps = None if epoch is None else row["steps"] * epoch / (len(row["curve"]) - 1)
    found = {"reached": float(epoch is not None), "steps_to_target": steps}
    if "epoch_seconds" not in row:
        return found
    return {**found, "seconds_to_target": None if epoch is None else row["epoch_seconds"][epoch]}
