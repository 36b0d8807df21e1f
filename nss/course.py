"""The course of a re-adaptation: epochs over new samples, what each came to, and which of them is kept."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nss.errors import ReadaptError
from nss.guard import Guard
from nss.model import device_of
from nss.predict import answers_of, predict
from nss.samples import Samples, joined
from nss.steps import descend, passes_of
from nss.told import within_task

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class ReadaptEpoch:
    """The model after one pass over the new samples; epoch 0 is the original. Accuracies are shares of 1."""

    epoch: int
    loss: float | None
    """mean over the steps of this pass, memory included"""
    guard: float | None
    """how much the update changes what the layers computed on old data, estimated from the profile"""
    new_accuracy: float | None
    """on the held-out part of the new samples; of an extended model told the task, as is the next"""
    old_accuracy: float | None
    """on the held-out part of the old data"""


@dataclass(frozen=True)
class Memory:
    """Old samples that are trained on again, and how the original answered them."""

    samples: Samples
    answers: Tensor
    """logits [n, classes]"""
    distil: float
    """how much of the target the original's answers are, 0 to 1"""

    def loss(self, logits: Tensor, rows: Tensor) -> Tensor:
        """Return the mean loss of the logits of some rows."""
        hard = F.cross_entropy(logits, self.samples.labels[rows].to(logits.device))
        soft = F.cross_entropy(logits, self.answers[rows].to(logits.device).softmax(1))
        return (1 - self.distil) * hard + self.distil * soft


@dataclass(frozen=True)
class Settings:
    """How to train: see `readapt`."""

    epochs: int
    batch_size: int
    learning_rate: float
    guard: float
    patience: int


@dataclass(frozen=True)
class _Kept:
    """The free entries after an epoch, and what speaks for them."""

    epoch: int
    merit: float
    """accuracy on held-out new samples; when none are held out, minus what is minimised, on all of them"""
    harm: float
    """to old knowledge: minus the held-out old accuracy, without old data the guard"""
    entries: list[Tensor]

    def beats(self, other: _Kept) -> bool:
        """Say whether nothing speaks for the other, and it is not earlier."""
        return self.merit >= other.merit and self.harm <= other.harm


class Course:
    """Trains the free entries of a frozen model in place, and ends with those of the epoch that is kept.

    Of the epochs whose accuracy on held-out new samples is within one standard error of the best (Breiman et al. 1984),
    the one that harms old knowledge least is kept. When no samples are held out, it is the one with the smallest loss
    on all of them, guard included. The original is one of them: what ends worse than it began is not kept.
    optimizer: of the free entries, which holds the guard too; its learning rate follows one cycle, whose top is that of
    the settings.
    tasks: of each class, int64 [classes], where a router tells them apart: then each image is answered within its own.
    What leads through the router would have features moved until it errs no more, and old images pay for it.
    """

    def __init__(
        self,
        model: nn.Module,
        samples: Samples,
        held_out: Samples,
        old: Samples | None,
        memory: Memory | None,
        guard: Guard | None,
        settings: Settings,
        optimizer: torch.optim.Optimizer,
        tasks: Tensor | None = None,
    ) -> None:
        self.model, self.samples, self.held_out, self.old = model, samples, held_out, old
        self.memory, self.guard, self.settings, self.tasks = memory, guard, settings, tasks
        self.size = min(settings.batch_size, len(samples))
        self.curve: list[ReadaptEpoch] = []
        self.steps = self.kept = 0
        self._kept: list[_Kept] = []
        batches = len(samples) // self.size
        self._passes = passes_of(len(samples), self.size)
        self._optimizer = optimizer
        self._schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer,
            settings.learning_rate,
            total_steps=settings.epochs * self._passes * batches,
            cycle_momentum=False,
        )

    def run(self, generator: torch.Generator) -> str:
        """Train. Returns why there was no further epoch."""
        self.model.train()
        self._judge(0, None)
        progress, epoch = 0, 0
        while epoch < self.settings.epochs and epoch - progress < self.settings.patience:
            epoch += 1
            if self._judge(epoch, self._epoch(generator)):
                progress = epoch
            _LOG.info("epoch %d of %d: loss %.4f, accuracy on new %s, on old %s", *self._said())
        self._settle()
        judged = "held-out new samples" if len(self.held_out) else "new samples (too few to hold any out)"
        if epoch - progress == self.settings.patience:
            return f"no progress on {judged} for {self.settings.patience} epochs"
        return f"all epochs done, judged on {judged}"

    def _said(self) -> tuple[Any, ...]:
        last = self.curve[-1]
        shares = ("not measured" if each is None else f"{each:.4f}" for each in (last.new_accuracy, last.old_accuracy))
        return last.epoch, self.settings.epochs, last.loss, *shares

    def _settle(self) -> None:
        best, count = max(each.merit for each in self._kept), len(self.held_out)
        error = math.sqrt(best * (1 - best) / count) if count else 0.0
        chosen = min((each for each in self._kept if each.merit >= best - error), key=lambda each: each.harm)
        self.kept = chosen.epoch
        with torch.no_grad():
            for parameter, value in zip(self.model.parameters(), chosen.entries, strict=True):
                parameter.copy_(value)

    def _epoch(self, generator: torch.Generator) -> float:
        """One pass in a new order; the rest that does not fill a batch is left out. Returns the mean loss."""
        losses = [self._step(rows, again) for rows, again in self._rows(generator)]
        return sum(losses) / len(losses)

    def _rows(self, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Yield the rows of each batch, and as many of the memory."""
        for _ in range(self._passes):
            order = torch.randperm(len(self.samples), generator=generator)
            for rows in order[: len(order) // self.size * self.size].split(self.size):
                count = 0 if self.memory is None else len(self.memory.samples)
                yield rows, torch.randint(count, (len(rows),), generator=generator) if count else None

    def _step(self, rows: Tensor, again: Tensor | None) -> float:
        device = device_of(self.model)
        batch = new = self.samples.pick(rows)
        if self.memory is not None and again is not None:
            batch = joined(new, self.memory.samples.pick(again))
        logits = self.model(batch.images.to(device))
        labels = new.labels.to(device)
        loss = F.cross_entropy(within_task(logits[: len(rows)], labels, self.tasks), labels)
        if self.memory is not None and again is not None:
            old = within_task(logits[len(rows) :], self.memory.samples.labels[again], self.tasks)
            loss = (loss + self.memory.loss(old, again)) / 2
        self.steps += 1
        return descend(loss, self._optimizer, self._schedule, ReadaptError)

    def _judge(self, epoch: int, loss: float | None) -> bool:
        """Note what an epoch came to. Returns whether it is better on new samples than all before."""
        guard = None if self.guard is None else self.guard()
        new, old = self._accuracy(self.held_out), self._accuracy(self.old)
        self.curve.append(ReadaptEpoch(epoch, loss, guard, new, old))
        merit = new if new is not None else -self._objective(guard or 0.0)
        harm = (guard or 0.0) if old is None else -old
        better = all(merit > each.merit for each in self._kept)
        latest = _Kept(epoch, merit, harm, [parameter.detach().clone() for parameter in self.model.parameters()])
        if not any(each.beats(latest) for each in self._kept):
            self._kept = [each for each in self._kept if not latest.beats(each)] + [latest]
        return better

    def _objective(self, guard: float) -> float:
        logits, labels = self._answers(self.samples)
        return float(F.cross_entropy(logits, labels)) + self.settings.guard * guard

    def _accuracy(self, samples: Samples | None) -> float | None:
        if not samples:
            return None
        logits, labels = self._answers(samples)
        return float((answers_of(logits) == labels).double().mean())

    def _answers(self, samples: Samples) -> tuple[Tensor, Tensor]:
        logits, labels = predict(self.model, (samples.images, samples.labels))
        return within_task(logits, labels, self.tasks), labels
