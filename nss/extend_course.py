"""The course of an extension: epochs over new samples that move the new neurons and nothing else."""

from __future__ import annotations

import itertools
import logging
import math
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from nss.contexts import seeded
from nss.errors import ExtendError
from nss.finetune import batches
from nss.model import Classifier, device_of
from nss.predict import predict
from nss.samples import Samples, joined
from nss.steps import descend, passes_of, sgd
from nss.strides import sound_gradients
from nss.wiring import Columns, last_column

_LOG = logging.getLogger(__name__)
OLD_PER_NEW = 0.5
"""old images in each batch for each new one, when there are enough to replay"""


@dataclass(frozen=True)
class ExtendEpoch:
    """The new neurons after one pass over the new samples. Accuracies are shares of 1."""

    epoch: int
    loss: float
    new_accuracy: float | None
    """told the task, on the held-out part of the new samples"""


@dataclass(frozen=True)
class Settings:
    """How to train: see `extend`."""

    epochs: int
    batch_size: int
    learning_rate: float
    weight_decay: float


def train_column(
    model: Classifier, new: Samples, held_out: Samples, memory: Samples, settings: Settings, seed: int
) -> tuple[list[ExtendEpoch], int]:
    """Train the last column of `model`, in place. Returns what each epoch came to, and the number of steps.

    new, held_out: of the last column's classes. memory: old images; with some, the new logits are trained to be lower
    than the old ones there. No number of an earlier column is among what the optimizer steps.
    Raises ExtendError for a loss that is not finite.
    """
    network, device = cast(Columns, model.network), device_of(model)
    known = len(model.spec.classes) - model.spec.tasks[-1].classes
    generator = torch.Generator().manual_seed(seed)
    size = min(_fresh(settings.batch_size, len(memory)), len(new))
    # As often as without replay.
    passes = passes_of(len(new), min(settings.batch_size, len(new)))
    each_epoch = passes * (len(new) // size)
    steps = settings.epochs * each_epoch
    curve, orders = [], batches(len(new), steps, size, generator)
    with last_column(network) as column, seeded(seed, device):  # dropout
        optimizer, schedule = sgd(column.parameters(), steps, settings.learning_rate, settings.weight_decay)
        for epoch in range(1, settings.epochs + 1):
            total = 0.0
            for rows in itertools.islice(orders, each_epoch):
                batch = _with_memory(new, rows, memory, generator)
                loss = _loss(model, batch.images.to(device), batch.labels.to(device), known, len(memory) > 0)
                total += descend(loss, optimizer, schedule, ExtendError)
            curve.append(ExtendEpoch(epoch, total / each_epoch, _told(model, held_out)))
            _LOG.info("new classes, epoch %d of %d: loss %.4f", epoch, settings.epochs, curve[-1].loss)
    return curve, steps


def _fresh(batch_size: int, memory: int) -> int:
    """Return how many images of a batch are new: two where it has so many, since a norm takes statistics of several."""
    return max(min(2, batch_size), int(batch_size / (1 + OLD_PER_NEW)), batch_size - memory)


def _with_memory(new: Samples, rows: Tensor, memory: Samples, generator: torch.Generator) -> Samples:
    """Return a batch of new samples with some of the old ones."""
    replayed = min(len(memory), math.ceil(len(rows) * OLD_PER_NEW))
    # A norm takes no statistics of a single image.
    batch = new.pick(rows if len(rows) > 1 else rows.repeat(2))
    return joined(batch, memory.pick(torch.randperm(len(memory), generator=generator)[:replayed]))


def _loss(model: Classifier, images: Tensor, labels: Tensor, known: int, replayed: bool) -> Tensor:
    network = cast(Columns, model.network)
    with sound_gradients(network):
        logits, features = network.parts(model.normalise(images))
    if not replayed:
        return F.cross_entropy(logits[-1], labels - known)
    with torch.no_grad():
        # As log probabilities: what gates have added to earlier classes has no bound.
        old = network.router(logits, features)[:, :known].log_softmax(1)
    return F.cross_entropy(torch.cat([old, logits[-1]], 1), labels)


def _told(model: Classifier, held_out: Samples) -> float | None:
    if not len(held_out):
        return None
    classes = model.spec.tasks[-1].classes
    logits, labels = predict(model, (held_out.images, held_out.labels))
    known = logits.shape[1] - classes
    return float((logits[:, known:].argmax(1) + known == labels).double().mean())
