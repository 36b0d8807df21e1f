"""Training the base model, the same way every time."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nss.data import Data, val_part
from nss.errors import ModelError
from nss.model import device_of, seeded
from nss.predict import accuracy
from nss.steps import Schedule, sgd, step, training_images

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Epoch:
    """What one pass over the training images came to. Accuracies are shares of 1; without validation images, nan."""

    epoch: int
    loss: float
    train_accuracy: float
    val_accuracy: float


def train(
    model: nn.Module,
    data: Data,
    epochs: int,
    seed: int,
    *,
    batch_size: int = 64,
    learning_rate: float = 0.05,
    weight_decay: float = 5e-4,
) -> list[Epoch]:
    """Train `model` in place by SGD with Nesterov momentum 0.9 under a one-cycle schedule.

    Always ends in evaluation mode.

    data: a Dataset is trained on its train split and validated on its val split; anything else is trained on whole.
    The same model, data, seed and machine give the same weights. Raises ModelError when there are no images, no
    parameter requires a gradient, the settings are out of range, the model answers more than logits in training mode,
    or the loss is not finite any more.

    >>> history = nss.train(model, nss.load_data("data"), epochs=5, seed=0)
    >>> history[-1].val_accuracy
    0.97
    """
    if epochs < 1 or batch_size < 1:
        raise ModelError(f"epochs {epochs}, batch_size {batch_size}", allowed="epochs and batch_size from 1")
    held_out = val_part(data)
    images, labels = training_images(data)
    generator = torch.Generator().manual_seed(seed)
    steps = max(1, len(images) // batch_size)
    optimizer, schedule = sgd(model.parameters(), epochs * steps, learning_rate, weight_decay)
    history = []
    try:
        with seeded(seed, device_of(model)):  # dropout
            for epoch in range(1, epochs + 1):
                loss, right = _epoch(model, images, labels, optimizer, schedule, generator, batch_size)
                judged = float("nan") if held_out is None else accuracy(model, held_out)
                history.append(Epoch(epoch, loss, right, judged))
                _LOG.info("epoch %d of %d: loss %.4f, validation accuracy %.4f", epoch, epochs, loss, judged)
    finally:
        model.eval()
    return history


def _epoch(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    optimizer: torch.optim.Optimizer,
    schedule: Schedule,
    generator: torch.Generator,
    batch_size: int,
) -> tuple[float, float]:
    """One pass in a new order; the rest that does not fill a batch is left out. Returns mean loss and accuracy."""
    device = next(model.parameters()).device
    model.train()
    order = torch.randperm(len(images), generator=generator)
    steps = max(1, len(images) // batch_size)
    total, right, seen = 0.0, 0, 0
    for rows in order[: steps * batch_size].split(batch_size):
        loss, correct = step(model, images[rows].to(device), labels[rows].to(device), optimizer, schedule)
        total, seen, right = total + loss * len(rows), seen + len(rows), right + correct
    return total / seen, right / seen
