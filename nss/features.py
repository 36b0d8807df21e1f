"""What the class head of a model reads: its penultimate features."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from nss.anatomy import dissect, head_of
from nss.contexts import evaluating
from nss.errors import SiteError
from nss.model import Classifier, device_of, network_of, shape_of
from nss.refit import Probe


def penultimate_features(
    model: nn.Module, images: Tensor, *, input_shape: Sequence[int] | None = None, batch_size: int = 500
) -> Tensor:
    """Return the input of the model's class head for each image, float32 [n, features], on the CPU.

    Where a model cannot be traced, or something else than one layer makes the scores (as in an extended model), the
    scores themselves are its features. images: what the model takes, [n, c, h, w]. input_shape: needed for models not
    made by `build_model`. The model is left in its mode.

    >>> penultimate_features(model, images).shape
    torch.Size([500, 128])
    """
    device = device_of(model)
    with evaluating(model), torch.no_grad():
        read = _reader(model, shape_of(model, input_shape))
        rows = [read(batch.to(device)).flatten(1).float().cpu() for batch in images.split(batch_size)]
    return torch.cat(rows) if rows else torch.zeros(0, 0)


def _reader(model: nn.Module, shape: Sequence[int]) -> Callable[[Tensor], Tensor]:
    try:
        anatomy = dissect(network_of(model), tuple(shape))
    except SiteError:
        return model
    head = head_of(anatomy)
    if head is None:
        return model
    probe, source = Probe(anatomy.graph), head.node.all_input_nodes[0].name

    def read(images: Tensor) -> Tensor:
        normalised = model.normalise(images) if isinstance(model, Classifier) else images
        return probe.values(normalised, [source])[0]

    return read
