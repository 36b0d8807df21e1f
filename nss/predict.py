"""Running a model over held-out data."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nss.contexts import evaluating
from nss.data import Data, iter_batches
from nss.errors import ModelError
from nss.model import device_of

# Products and differences of shares miss numbers that they should meet by rounding alone.
SLACK = 1e-9


def predict(model: nn.Module, data: Data, batch_size: int = 500) -> tuple[Tensor, Tensor]:
    """Run the model over the data in evaluation mode. Returns logits [n, classes] and labels int64 [n], on the CPU.

    Raises ModelError when there are no images.
    """
    device = device_of(model)
    rows = []
    with evaluating(model), torch.inference_mode():
        for images, labels in iter_batches(data, batch_size):
            rows.append((model(images.to(device)).cpu(), labels.cpu().long()))
    if not rows:
        raise ModelError("there are no images to evaluate on", fix="use a split that has images")
    return torch.cat([logits for logits, _ in rows]), torch.cat([labels for _, labels in rows])


def answers_of(logits: Tensor) -> Tensor:
    """Return the class with the largest logit of each image, int64 [n]; -1, which no label is, where one is not finite.

    >>> answers_of(torch.tensor([[0.0, 2.0], [1.0, float("nan")]]))
    tensor([ 1, -1])
    """
    return torch.where(logits.isfinite().all(1), logits.argmax(1), -1)


def accuracy(model: nn.Module, data: Data) -> float:
    """Return the share of images that the model answers right, of 1. Raises ModelError when there are no images."""
    logits, labels = predict(model, data)
    return float((answers_of(logits) == labels).double().mean())
