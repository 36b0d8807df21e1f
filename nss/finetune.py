"""Fine-tuning within a budget of steps, with or without the original as a teacher (method.md 5)."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor, nn

from nss.contexts import evaluating, seeded
from nss.data import Data
from nss.errors import ModelError
from nss.model import Classifier, device_of
from nss.steps import sgd, step, training_images
from nss.told import check_classes, route_by, tasks_apart

_LOG = logging.getLogger(__name__)
_EACH = 100
"""steps between two lines about them"""


def fine_tune(
    model: nn.Module,
    data: Data,
    steps: int,
    seed: int,
    *,
    learning_rate: float = 0.02,
    batch_size: int = 128,
    weight_decay: float = 5e-4,
    teacher: nn.Module | None = None,
) -> None:
    """Train `model` in place for so many steps by SGD with Nesterov momentum 0.9 under a one-cycle schedule.

    data: of a Dataset the train split is used, of anything else everything. teacher: a model whose probabilities are
    half of what is learned from (distillation, Hinton et al. 2015); default none. Always ends in evaluation mode. A
    model that was extended is trained told the task, since a loss that leads through its router ruins it, and the
    router learns anew from the images. The same model, data, seed and machine give the same weights.
    Parameters that do not require a gradient stay as they are. Raises ModelError when none requires one, there are no
    images (of an extended model: of some class), settings are out of range, the model answers more than logits in
    training mode, or the loss is not finite any more.

    >>> nss.fine_tune(smaller, nss.load_data("data"), steps=300, seed=0, teacher=model)
    """
    if batch_size < 1:
        raise ModelError(f"batch_size {batch_size}", allowed="from 1")
    images, labels = training_images(data)
    optimizer, schedule = sgd(model.parameters(), steps, learning_rate, weight_decay)
    device, tasks = device_of(model), tasks_apart(model)
    if tasks is not None:
        check_classes(cast(Classifier, model), labels)
    model.train()
    try:
        with seeded(seed, device):  # dropout
            orders = batches(len(images), steps, batch_size, torch.Generator().manual_seed(seed))
            for number, rows in enumerate(orders, start=1):
                batch, target = images[rows].to(device), labels[rows].to(device)
                soft = None if teacher is None else _answers(teacher, batch)
                loss, _ = step(model, batch, target, optimizer, schedule, soft, tasks)
                if number % _EACH == 0:
                    _LOG.info("fine-tuning, step %d of %d: loss %.4f", number, steps, loss)
    finally:
        model.eval()
    if tasks is not None:
        route_by(cast(Classifier, model), (images, labels), data)


def batches(count: int, steps: int, batch_size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Yield `steps` batches of indices below `count`: one new order after the other, rests of orders left out."""
    size = min(batch_size, count)
    done = 0
    while done < steps:
        for rows in torch.randperm(count, generator=generator)[: count // size * size].split(size)[: steps - done]:
            yield rows
            done += 1


def _answers(teacher: nn.Module, images: Tensor) -> Tensor:
    with evaluating(teacher), torch.no_grad():
        logits: Tensor = teacher(images.to(device_of(teacher)))
    return logits.to(images.device)
