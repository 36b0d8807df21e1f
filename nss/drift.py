"""Shifted copies of images: what a source that drifts would have sent (method.md 6)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from nss.errors import DataError

STRENGTHS = (1, 2, 3, 4, 5)
# Degrees, to the left or to the right.
ANGLES = (6.0, 12.0, 18.0, 24.0, 30.0)
# Standard deviation of the blur, as a share of the shorter side, which counts for 20 pixels at least: less is no blur.
BLURS = (0.02, 0.04, 0.06, 0.08, 0.10)
SIDE = 20
# Standard deviation of the noise, of pixels scaled to 0..1.
NOISES = (0.06, 0.12, 0.18, 0.24, 0.30)
# What is left of the contrast and of the light.
FACTORS = (0.80, 0.65, 0.50, 0.35, 0.20)


def shifted(images: Tensor, kind: str, strength: int, seed: int) -> Tensor:
    """Return the images as a shifted source would have sent them, uint8 [n, c, h, w].

    images: uint8 [n, c, h, w], of one or three channels. kind: rotation (each image to the left or to the right by
    chance), blur, noise (Gaussian), contrast or brightness (both fall). strength: 1 to 5, see the tables above. What
    chance decides depends on the seed and the place of an image in the order, not on the images after it.
    Raises DataError for another kind, strength, type or shape.

    >>> drifted = shifted(data.split("test").images, "rotation", 3, seed=0)
    >>> drifted.dtype
    torch.uint8
    """
    if kind not in KINDS:
        raise DataError(f"the kind of drift is {kind!r}", allowed=", ".join(KINDS))
    if strength not in STRENGTHS:
        raise DataError(f"the strength of the drift is {strength!r}", allowed="1 to 5")
    if images.dtype != torch.uint8 or images.dim() != 4 or images.shape[1] not in (1, 3):
        found = f"{str(images.dtype).removeprefix('torch.')} {list(images.shape)}"
        raise DataError(f"the images are {found}", allowed="uint8 [n, 1 or 3, height, width]")
    if not len(images):
        return images.clone()
    return KINDS[kind](images, strength - 1, torch.Generator().manual_seed(seed))


def _rotation(images: Tensor, level: int, generator: torch.Generator) -> Tensor:
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms.v2 import functional

    left = torch.cat([torch.rand(1, generator=generator) < 0.5 for _ in range(len(images))])
    result = images.clone()
    for chosen, angle in ((left, ANGLES[level]), (~left, -ANGLES[level])):
        if bool(chosen.any()):
            result[chosen] = functional.rotate(images[chosen], angle, InterpolationMode.BILINEAR)
    return result


def _blur(images: Tensor, level: int, generator: torch.Generator) -> Tensor:
    from torchvision.transforms.v2 import functional

    side = min(images.shape[2:])
    sigma = BLURS[level] * max(side, SIDE)
    reach = max(1, min(math.ceil(3 * sigma), side - 1))
    blurred: Tensor = functional.gaussian_blur(images, [2 * reach + 1] * 2, [sigma] * 2)
    return blurred


def _noise(images: Tensor, level: int, generator: torch.Generator) -> Tensor:
    from torchvision.transforms.v2 import functional

    result = torch.empty_like(images)
    for row, image in enumerate(images):
        noise = torch.randn(image.shape, generator=generator) * NOISES[level]
        noisy = (functional.to_dtype(image, torch.float32, scale=True) + noise).clamp(0, 1)
        result[row] = functional.to_dtype(noisy, torch.uint8, scale=True)
    return result


def _contrast(images: Tensor, level: int, generator: torch.Generator) -> Tensor:
    from torchvision.transforms.v2 import functional

    faded: Tensor = functional.adjust_contrast(images, FACTORS[level])
    return faded


def _brightness(images: Tensor, level: int, generator: torch.Generator) -> Tensor:
    from torchvision.transforms.v2 import functional

    darker: Tensor = functional.adjust_brightness(images, FACTORS[level])
    return darker


KINDS: Mapping[str, Callable[[Tensor, int, torch.Generator], Tensor]] = {
    "rotation": _rotation,
    "blur": _blur,
    "noise": _noise,
    "contrast": _contrast,
    "brightness": _brightness,
}
