"""Pixels on one scale: uint8 0..255 and floats 0..1 say the same."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def as_floats(images: Tensor) -> Tensor:
    """Return uint8 0..255 as floats 0..1, and floats as they are.

    >>> as_floats(torch.tensor([0, 255], dtype=torch.uint8))
    tensor([0., 1.])
    """
    return images.float() / 255 if images.dtype == torch.uint8 else images


def joined_images(parts: Sequence[Tensor]) -> Tensor:
    """Return all images in one; uint8 beside floats become floats 0..1.

    parts: [n, ...] each, alike but for n.

    >>> joined_images([torch.tensor([255], dtype=torch.uint8), torch.tensor([0.5])])
    tensor([1.0000, 0.5000])
    """
    if any(part.is_floating_point() for part in parts):
        # torch.cat alone would make floats 0..255 of the uint8.
        parts = [as_floats(part) for part in parts]
    return torch.cat([*parts])
