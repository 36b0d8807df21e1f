"""How large a model is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from nss.contexts import evaluating
from nss.model import device_of, shape_of


def count_parameters(model: nn.Module) -> int:
    """Return the number of trainable and frozen weights, without buffers."""
    return sum(parameter.numel() for parameter in model.parameters())


def count_macs(model: nn.Module, input_shape: Sequence[int] | None = None) -> int:
    """Return the multiply-adds of convolutions and matrix products for one image, as PyTorch counts them.

    input_shape: (channels, height, width), needed for models not made by `build_model`.
    """
    shape = shape_of(model, input_shape)
    like = next((each for each in model.parameters() if each.is_floating_point()), torch.zeros(()))
    image = torch.zeros(1, *shape, dtype=like.dtype, device=device_of(model))
    with evaluating(model), torch.no_grad(), _attention_in_parts(), FlopCounterMode(display=False) as counter:
        model(image)
    return int(counter.get_total_flops()) // 2


@contextmanager
def _attention_in_parts() -> Iterator[None]:
    """Compute attention by products of matrices: the counter does not know those that do all of it at once."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
