"""The module that holds channels at zero in a masked view."""

from __future__ import annotations

import torch
from torch import nn


class ChannelMask(nn.Module):
    """Multiplies one axis by zeros and ones.

    >>> ChannelMask(torch.tensor([True, False]), dim=1)(torch.ones(1, 2))
    tensor([[1., 0.]])
    """

    mask: torch.Tensor

    def __init__(self, mask: torch.Tensor, dim: int) -> None:
        super().__init__()
        self.dim = dim
        self.register_buffer("mask", mask.float())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: any shape with len(mask) entries along `dim`. Returns the same shape."""
        shape = [1] * x.dim()
        shape[self.dim] = -1
        return x * self.mask.view(shape).to(x.dtype)
