"""Gradient steps: the one way in which base training and fine-tuning move weights."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nss.data import Data, train_part
from nss.errors import ModelError, NssError
from nss.model import network_of
from nss.samples import rank_in_class, whole
from nss.strides import sound_gradients
from nss.told import within_task

# An epoch of few samples has several passes: with fewer steps nothing is learned, nor brought back what went too far.
FEWEST_STEPS = 10

Schedule = torch.optim.lr_scheduler.LRScheduler


def sgd(
    parameters: Iterable[nn.Parameter], steps: int, learning_rate: float, weight_decay: float
) -> tuple[torch.optim.Optimizer, Schedule]:
    """Return SGD with Nesterov momentum 0.9 and a one-cycle schedule over `steps` steps.

    Of the parameters it moves those that require a gradient. Raises ModelError when none does, and for settings out of
    range.
    """
    if steps < 1 or not 0 < learning_rate < float("inf") or not 0 <= weight_decay < float("inf"):
        raise ModelError(
            f"steps {steps}, learning_rate {learning_rate}, weight_decay {weight_decay}",
            allowed="steps from 1, learning_rate above 0, weight_decay from 0",
        )
    optimizer = torch.optim.SGD(trainable(parameters), learning_rate, 0.9, weight_decay=weight_decay, nesterov=True)
    # Fewer than four steps leave one phase of the cycle without a step.
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, learning_rate, total_steps=max(4, steps), cycle_momentum=False
    )
    return optimizer, schedule


def trainable(parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    """Return those that require a gradient. Raises ModelError when none does."""
    found = [each for each in parameters if each.requires_grad]
    if not found:
        raise ModelError(
            "no parameter requires a gradient",
            where="training",
            allowed="models with at least one that does",
            fix="model.requires_grad_(True)",
        )
    return found


def step(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    optimizer: torch.optim.Optimizer,
    schedule: Schedule,
    soft: Tensor | None = None,
    tasks: Tensor | None = None,
) -> tuple[float, int]:
    """Take one step on a batch. Returns the loss and the number of images answered right before the step.

    soft: logits of a teacher [n, classes]: the loss is then the mean of the cross entropies with the labels and with
    the teacher's probabilities. tasks: of each class, int64 [classes]: answers are then among the classes of the
    label's own task. Raises ModelError for answers that are more than logits, labels outside the logits and a loss that
    is not finite.
    """
    logits = training_logits(model, images)
    if int(labels.min()) < 0 or int(labels.max()) >= logits.shape[1]:
        raise ModelError(f"labels up to {int(labels.max())}", allowed=f"0 to {logits.shape[1] - 1}: one a logit")
    logits = within_task(logits, labels, tasks)
    loss = F.cross_entropy(logits, labels)
    if soft is not None:
        loss = (loss + F.cross_entropy(logits, within_task(soft, labels, tasks).softmax(1))) / 2
    return descend(loss, optimizer, schedule), int((logits.argmax(1) == labels).sum())


def training_logits(model: nn.Module, images: Tensor) -> Tensor:
    """Return the answer of a model in training mode, [n, classes]; raise ModelError when it is more than logits.

    Some networks answer with the logits of auxiliary heads beside their own, in training mode only.
    """
    with sound_gradients(model):
        answer = model(images)
    if not isinstance(answer, Tensor):
        raise ModelError(
            f"{type(network_of(model)).__name__} answers a {type(answer).__name__} in training mode",
            where="training",
            allowed="one tensor, logits [n, classes]",
            fix='build it without auxiliary heads: in torchvision with arguments={"aux_logits": False}',
        )
    return answer


def descend(
    loss: Tensor, optimizer: torch.optim.Optimizer, schedule: Schedule, error: type[NssError] = ModelError
) -> float:
    """Move the weights against the gradient of `loss`. Returns it. Raises `error` when it is not finite."""
    if not bool(torch.isfinite(loss)):
        raise error("the loss is not finite any more", where="training", fix="lower the learning rate")
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    schedule.step()
    return float(loss.detach())


def passes_of(samples: int, batch_size: int) -> int:
    """Return how often an epoch goes through so few samples. batch_size: at most their number.

    >>> passes_of(40, 8)
    2
    """
    return math.ceil(FEWEST_STEPS / (samples // batch_size))


def training_images(data: Data) -> tuple[Tensor, Tensor]:
    """Return images and labels to train on, whole: of a whole Dataset its train split, of anything else all there is.

    Raises ModelError when there are none.
    """
    samples = whole(train_part(data))
    if not samples:
        raise ModelError("there are no images to train on", fix="use data with a train split")
    return samples.images, samples.labels


def first_of_each(images: Tensor, labels: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the first `count` images of each category, in their order: no category outweighs another."""
    chosen = rank_in_class(labels) < count
    return images[chosen], labels[chosen]
