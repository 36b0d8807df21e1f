"""Training the base model, the same way every time."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nss.data import Data, Dataset, iter_batches
from nss.errors import ModelError
from nss.predict import predict


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
    """Train `model` in place by SGD with Nesterov momentum 0.9 under a one-cycle schedule; ends in evaluation mode.

    data: a Dataset is trained on its train split and validated on its val split; anything else is trained on whole.
    The same model, data, seed and machine give the same weights. Raises ModelError when there are no images, the
    settings are out of range, or the loss is not finite any more.

    >>> history = nss.train(model, nss.load_data("data"), epochs=5, seed=0)
    >>> history[-1].val_accuracy
    0.97
    """
    if epochs < 1 or batch_size < 1 or not 0 < learning_rate < float("inf") or not 0 <= weight_decay < float("inf"):
        raise ModelError(
            f"epochs {epochs}, batch_size {batch_size}, learning_rate {learning_rate}, weight_decay {weight_decay}",
            allowed="epochs and batch_size from 1, learning_rate above 0, weight_decay from 0",
        )
    held_out = data.split("val") if isinstance(data, Dataset) else None
    images, labels = _whole(data.split("train") if isinstance(data, Dataset) else data)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(model.parameters(), learning_rate, 0.9, weight_decay=weight_decay, nesterov=True)
    steps = max(1, len(images) // batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, learning_rate, total_steps=max(4, epochs * steps), cycle_momentum=False
    )
    history = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # dropout
        for epoch in range(1, epochs + 1):
            loss, accuracy = _epoch(model, images, labels, optimizer, schedule, generator, batch_size)
            history.append(Epoch(epoch, loss, accuracy, _accuracy(model, held_out)))
    model.eval()
    return history


def _epoch(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
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
        batch, target = images[rows].to(device), labels[rows].to(device)
        logits = model(batch)
        if int(target.min()) < 0 or int(target.max()) >= logits.shape[1]:
            raise ModelError(f"labels up to {int(target.max())}", allowed=f"0 to {logits.shape[1] - 1}: one a logit")
        loss = F.cross_entropy(logits, target)
        if not bool(torch.isfinite(loss)):
            raise ModelError("the loss is not finite any more", where="training", fix="lower the learning rate")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        total, seen = total + float(loss.detach()) * len(rows), seen + len(rows)
        right += int((logits.argmax(1) == target).sum())
    return total / seen, right / seen


def _whole(data: Data) -> tuple[Tensor, Tensor]:
    if isinstance(data, Dataset):
        images, labels = data.images, data.labels
    else:
        rows = list(iter_batches(data, 1024))
        images = torch.cat([batch for batch, _ in rows]) if rows else torch.zeros(0)
        labels = torch.cat([target for _, target in rows]) if rows else torch.zeros(0)
    if not len(images):
        raise ModelError("there are no images to train on", fix="use data with a train split")
    return images, labels


def _accuracy(model: nn.Module, data: Dataset | None) -> float:
    if data is None or not len(data):
        return float("nan")
    logits, labels = predict(model, data)
    return float((logits.argmax(1) == labels).double().mean())
