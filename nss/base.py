"""Training the base model, the same way every time."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nss.contexts import evaluating, seeded
from nss.data import Data, val_part
from nss.errors import ModelError, NssError, first_line
from nss.model import Classifier, device_of
from nss.predict import accuracy
from nss.steps import Schedule, sgd, step, training_images, training_logits

# Two, so that an answer without an axis of images is told from one with it.
_BLANKS = 2
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


def require_logits(model: Classifier) -> None:
    """Raise ModelError unless the model answers images with one logit a class, and in training mode with logits alone.

    Training goes well with more logits than classes, and what compares them with the labels comes long after it.

    >>> require_logits(build_model("nss.zoo:lenet", classes=["a", "b"], input_shape=(1, 28, 28), seed=0))
    """
    count = len(model.spec.classes)
    with _asking(model), evaluating(model), torch.no_grad():
        answer: object = model(_blanks(model))
    fix = "give its last layer `num_classes` outputs; where the factory names them otherwise, set them in `arguments`"
    if isinstance(answer, Tensor):
        if tuple(answer.shape) == (_BLANKS, count):
            with _asking(model), seeded(0, device_of(model)), torch.no_grad():
                training_logits(copy.deepcopy(model).train(), _blanks(model))
            return
        what = f"the network answers {list(answer.shape)}, the data has {count} classes"
    else:
        what, fix = f"the network answers a {type(answer).__name__}", "return the logits alone from its forward"
    allowed = f"one tensor, {[_BLANKS, count]} for {_BLANKS} images: one logit a class"
    raise ModelError(what, where=model.spec.factory, allowed=allowed, fix=fix)


@contextmanager
def _asking(model: Classifier) -> Iterator[None]:
    """Say in words what a network raises when it is given an image."""
    try:
        yield
    except NssError:
        raise
    except Exception as problem:
        raise ModelError(
            f"the network does not take a {model.spec.input_shape} image: {first_line(problem)}",
            where=model.spec.factory,
            fix="name a network that does, or add the images in its size (nss data add --resize)",
        ) from problem


def _blanks(model: Classifier) -> Tensor:
    return torch.zeros(_BLANKS, *model.spec.input_shape, dtype=torch.uint8, device=device_of(model))


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
