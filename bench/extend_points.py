"""The points of RQ4: each method at each setting, judged on validation images, the chosen ones on test images."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from bench.common import Row, interleaved
from bench.extend_cases import Subject, balanced, forgetting, judged, matrix_row
from bench.extend_peers import NAIVE, Budget, Setting, grown, learn, loss_of, train_peer
from bench.memory import peak_megabytes
from nss.extend import Extended, extend
from nss.extend_course import Settings, train_column
from nss.grow import add_column, capacity
from nss.model import Classifier
from nss.samples import Samples, drawn

OURS = "nss"
OUR_REPLAY = {OURS: 0.0, "nss, replay 5 %": 0.05, "nss, replay 10 %": 0.1}
WIDTH, RATE = 0.3, 0.05
"""of extend, its defaults: nothing about it is chosen"""
CHAINED = (NAIVE, "replay 10 %")
BATCH = 64
NO_RATE = 1e-6
"""too small to get anywhere"""
STEP_BATCHES, TURNS = 10, 9
"""batches of a run that is timed, and how often it is run, after one more to warm up"""


@dataclass(frozen=True)
class Grid:
    """What is tried."""

    images: int
    """of each task, in each split"""
    epochs: int
    settings: Mapping[str, tuple[Setting, ...]]
    """of each baseline"""
    ours: tuple[str, ...]


class Halves:
    """Learning the second half of the classes."""

    def __init__(self, subject: Subject, grid: Grid) -> None:
        self.subject, self.grid = subject, grid
        self.budget = Budget(grid.epochs, BATCH, subject.seed)

    @cached_property
    def _old(self) -> Samples:
        return self.subject.seen("train", 1)

    @cached_property
    def _new(self) -> Samples:
        part = self.subject.tasks[1].split("train")
        return Samples(part.images, part.labels)

    @cached_property
    def _test(self) -> Samples:
        return self.subject.seen("test", 2)

    @cached_property
    def _before(self) -> float:
        return matrix_row(self.subject.model, self.subject.seen("test", 1), self.subject.sizes[:1])[0][0]

    def peers(self) -> list[Row]:
        """Return a row for each baseline and setting."""
        rows = []
        for method, settings in self.grid.settings.items():
            made = [self._learn(method, setting) for setting in settings]
            found = [row for row, _ in made]
            place = best(found)
            found[place] |= {"chosen": True, **self._tested(made[place][1])}
            rows += found
        return rows

    def _learn(self, method: str, setting: Setting) -> tuple[Row, Classifier]:
        model, names = self.subject.model, self.subject.names(1)
        done = learn(method, model, names, self._new, self._old, setting, self.budget)
        row = {"method": method, "learning_rate": setting.rate, "strength": setting.strength}
        row |= {"steps": done.steps, "trained_share": done.trained_share}
        return {**row, **self._validated(done.model)}, done.model

    def ours(self) -> list[Row]:
        """Return a row for each share of old images that is replayed."""
        rows = []
        for method in self.grid.ours:
            done = extended(self.subject, self.subject.condensed, 1, self.budget, OUR_REPLAY[method])
            row = {"method": method, "learning_rate": RATE, "strength": 0.0}
            row |= {name: getattr(done.report, name) for name in ("steps", "trained_share")}
            rows.append({**row, **self._validated(done.model), "chosen": True, **self._tested(done.model)})
        return rows

    def _validated(self, model: Classifier) -> Row:
        return {"val": balanced(model, self.subject.seen("val", 2), self.subject.sizes), "chosen": False}

    def _tested(self, model: Classifier) -> Row:
        return {**judged(model, self._test, self.subject.sizes), "before": self._before}

    def step_times(self) -> list[Row]:
        """Return the median milliseconds and the most megabytes of a naive step and of steps of extend.

        They are run in turn on the same images.
        """
        runs = self._steps()
        found = interleaved({name: run for name, (_, run) in runs.items()}, turns=TURNS, warm_up=1)
        peaks = {name: peak_megabytes(model, run) for name, (model, run) in runs.items()}
        return [
            {
                "step": name,
                "milliseconds": found[name],
                "of_naive": found[name] / found[NAIVE],
                "megabytes": peaks[name],
                "memory_of_naive": peaks[name] / peaks[NAIVE],
            }
            for name in runs
        ]

    def _steps(self) -> dict[str, tuple[Classifier, Callable[[], int]]]:
        """Return what is trained, and a run of some steps that returns their number."""
        subject, one = self.subject, Budget(1, BATCH, 0)
        new = self._new.pick(torch.arange(STEP_BATCHES * BATCH) % len(self._new))
        nothing, memory = self._old.pick(torch.arange(0)), self._old.pick(drawn(self._old.labels, 0.1, 0))
        naive = grown(subject.model, subject.names(1), 0)
        column = add_column(subject.condensed, subject.names(1), WIDTH, 0)
        loss = loss_of(NAIVE, subject.model, self._old, 0.0)
        settings = Settings(1, BATCH, NO_RATE, 0.0)
        return {
            NAIVE: (naive, lambda: train_peer(naive, None, new, nothing, loss, NO_RATE, one)),
            OURS: (column, lambda: train_column(column, new, nothing, nothing, settings, 0)[1]),
            "nss, replay": (column, lambda: train_column(column, new, nothing, memory, settings, 0)[1]),
        }


class Chain:
    """Learning task after task."""

    def __init__(self, subject: Subject, grid: Grid) -> None:
        self.subject, self.grid = subject, grid
        self.budget = Budget(grid.epochs, BATCH, subject.seed)

    def peers(self) -> list[Row]:
        """Return a row for each baseline and setting; those chosen are followed by their matrices."""
        rows: list[Row] = []
        for method in CHAINED:
            made = [self._retrained(method, setting) for setting in self.grid.settings[method]]
            found = [
                {"method": method, "learning_rate": setting.rate, **self._validated(models[-1])}
                for setting, models in zip(self.grid.settings[method], made, strict=True)
            ]
            place = best(found)
            matrix = self._matrix(made[place])
            found[place] |= {"chosen": True, **ends(matrix)}
            rows += [*found, *({"method": method, **each} for each in matrix)]
        return rows

    def _retrained(self, method: str, setting: Setting) -> list[Classifier]:
        models = [self.subject.model]
        for task in range(1, len(self.subject.sizes)):
            part = self.subject.tasks[task].split("train")
            new, old = Samples(part.images, part.labels), self.subject.seen("train", task)
            models.append(learn(method, models[-1], self.subject.names(task), new, old, setting, self.budget).model)
        return models

    def ours(self) -> list[Row]:
        """Return a row of nss without an old image, its matrix, and the neurons of each layer in the end."""
        models = [self.subject.condensed]
        for task in range(1, len(self.subject.sizes)):
            models.append(extended(self.subject, models[-1], task, self.budget, 0.0).model)
        matrix = self._matrix(models)
        row = {"method": OURS, "learning_rate": RATE, **self._validated(models[-1]), "chosen": True, **ends(matrix)}
        layers = [
            {"layer": name, "total": each.total, "free": each.free, "widened": each.widened, "used": list(each.used)}
            for name, each in capacity(models[-1]).items()
        ]
        return [row, *({"method": OURS, **each} for each in (*matrix, *layers))]

    def _validated(self, model: Classifier) -> Row:
        subject = self.subject
        return {"val": balanced(model, subject.seen("val", len(subject.sizes)), subject.sizes), "chosen": False}

    def _matrix(self, models: Sequence[Classifier]) -> list[Row]:
        """Return, after each task, the accuracies on it and on those before; tasks are counted from 1."""
        rows = []
        for after, model in enumerate(models, start=1):
            answers = matrix_row(model, self.subject.seen("test", after), self.subject.sizes[:after])
            rows += [
                {"after": after, "task": task, "told": told, "accuracy": free}
                for task, (told, free) in enumerate(answers, start=1)
            ]
        return rows


def extended(subject: Subject, ready: Classifier, task: int, budget: Budget, replay: float) -> Extended:
    """Let nss.extend learn one task; without replay it is given no old image."""
    return extend(
        ready,
        None,
        subject.tasks[task],
        replay,
        old_data=subject.tasks[0] if replay else None,
        width=WIDTH,
        learning_rate=RATE,
        epochs=budget.epochs,
        batch_size=budget.batch_size,
        seed=budget.seed,
    )


def best(rows: Sequence[Row]) -> int:
    """Return which row is best on validation images, the first of equals."""
    return max(range(len(rows)), key=lambda place: rows[place]["val"])


def ends(matrix: Sequence[Row]) -> Row:
    """Return what a matrix comes to: mean accuracies after the last task, and forgetting, told the task and not."""
    last = max(row["after"] for row in matrix)
    found: Row = {}
    for name, lost in (("told", "told_forgetting"), ("accuracy", "forgetting")):
        table = [[row[name] for row in matrix if row["after"] == after] for after in range(1, last + 1)]
        found |= {name: statistics.fmean(table[-1]), lost: forgetting(table)}
    return found
