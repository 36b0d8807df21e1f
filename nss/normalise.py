"""What a model is given: pixels, checked and normalised."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from nss.errors import DataError

SLACK = 0.01
"""how far pixels may lie outside of 0..1: resizing with a filter overshoots a little"""


class Normalise(nn.Module):
    """Pixels to normalised floats. Takes uint8 0..255 or floats 0..1, [n, c, h, w].

    With mean 0 and std 1 floats of any range are handed on as they are: of a model whose images come normalised.
    input_shape: (channels, height, width). layout: of the memory that is handed on.

    >>> Normalise((0.5,), (0.25,), (1, 1, 1))(torch.full((1, 1, 1, 1), 255, dtype=torch.uint8)).item()
    2.0
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        mean: Sequence[float],
        std: Sequence[float],
        input_shape: Sequence[int],
        layout: torch.memory_format = torch.channels_last,
    ) -> None:
        super().__init__()
        self.input_shape, self.layout = tuple(input_shape), layout
        self.takes_any = set(mean) == {0.0} and set(std) == {1.0}
        # Of whole numbers PyTorch makes whole numbers, and images would be cut to that type.
        self.register_buffer("mean", torch.tensor([float(each) for each in mean]).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor([float(each) for each in std]).view(-1, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        """images: [n, c, h, w]. Returns floats of the same shape. Raises DataError for what are no such pixels."""
        self._check(images)
        pixels = images.to(self.mean.dtype)
        if images.dtype == torch.uint8:
            pixels = pixels / 255
        return ((pixels - self.mean) / self.std).contiguous(memory_format=self.layout)

    def _check(self, images: Tensor) -> None:
        """What is wrong here would be normalised twice, or taken for 0..1: wrong answers without a word."""
        if tuple(images.shape[1:]) != self.input_shape:
            raise DataError(
                f"the images are {list(images.shape)}",
                allowed=f"[n, {', '.join(map(str, self.input_shape))}]",
                fix="resize or convert them to what the model was made for",
            )
        if images.dtype == torch.uint8:
            return
        if not images.is_floating_point():
            raise DataError(
                f"the pixels are {str(images.dtype).removeprefix('torch.')}",
                allowed="uint8 0..255, or floats 0..1",
                fix="images.to(torch.uint8)",
            )
        # A compiled graph cannot branch on values.
        if images.numel() and not self.takes_any and not torch.compiler.is_compiling():
            _check_range(*(float(each) for each in torch.aminmax(images.detach())))


def _check_range(low: float, high: float) -> None:
    if low >= -SLACK and high <= 1 + SLACK:
        return
    found = "not all numbers" if math.isnan(low) else f"from {low:.3g} to {high:.3g}"
    raise DataError(
        f"the pixels are {found}",
        allowed="uint8 0..255, or floats 0..1 without normalisation",
        fix="leave it to the model, whose mean and std are part of it, or build the model with mean 0 and std 1",
    )
