"""BatchNorm statistics taken again: part of every surgery on weights, without a gradient (method.md 5)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from nss.contexts import evaluating
from nss.model import device_of
from nss.operations import CHANNEL_NORMS


def retake_statistics(model: nn.Module, images: Tensor, batch_size: int = 250, *, all_images: bool = False) -> None:
    """Replace the running mean and variance of every BatchNorm, in place, by those over `images`.

    images: what the model takes, [n, c, h, w]. Each is the plain average over batches of equal size (the rest that
    does not fill a batch is left out, unless it is all there is). all_images: leave none out; batches are then as few,
    and as equal, as `batch_size` allows. Everything else is as in evaluation: dropout is off. A model without BatchNorm
    is left as it is, and so is every model that does not take the images: what it raises is raised.

    >>> nss.retake_statistics(model, data.split("train").images[:2000])
    """
    norms = [
        module for module in model.modules() if isinstance(module, CHANNEL_NORMS) and module.running_mean is not None
    ]
    if not norms or len(images) < 2:
        return
    size = min(batch_size, len(images))
    whole = images[: len(images) // size * size].split(size)
    batches = images.tensor_split(-(-len(images) // size)) if all_images else whole
    with evaluating(model), torch.no_grad(), _averaging(norms):
        for batch in batches:
            model(batch.to(device_of(model)))


@contextmanager
def _averaging(norms: Sequence[nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d]) -> Iterator[None]:
    """Have the norms average anew over the batches of this block; after an error they are as they were."""
    before = [(norm.momentum, {name: tensor.clone() for name, tensor in norm.named_buffers()}) for norm in norms]
    try:
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum, norm.training = None, True  # None: the average over all batches
        yield
    except BaseException:
        for norm, (_, buffers) in zip(norms, before, strict=True):
            for name, tensor in buffers.items():
                norm.get_buffer(name).copy_(tensor)
        raise
    finally:
        for norm, (momentum, _) in zip(norms, before, strict=True):
            norm.momentum = momentum
