"""Adversarial images: what a classifier is made to get wrong by a change that nobody sees (method.md 6).

Everything happens on pixels of 0..1; the normalisation is inside the model. FGSM: arXiv 1412.6572; PGD: arXiv
1706.06083; DeepFool: arXiv 1511.04599 and Carlini-Wagner: arXiv 1608.04644, both by foolbox.
"""

from __future__ import annotations

import importlib
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nss.contexts import evaluating
from nss.errors import DataError, ModelError
from nss.model import device_of
from nss.pixels import as_floats

BY_FOOLBOX = ("deepfool", "carlini-wagner")


def fgsm(model: nn.Module, images: Tensor, labels: Tensor, eps: float, *, batch_size: int = 250) -> Tensor:
    """Move every pixel by `eps` in the direction that raises the loss (fast gradient sign method).

    images: uint8 or floats 0..1, [n, c, h, w]; labels: int64 [n]. eps: 0 to 1. Returns floats 0..1, [n, c, h, w], on
    the CPU; eps 0 gives the clean images. The model's modes and gradients are left as they were.
    Raises ModelError for an eps out of range, DataError for images and labels that do not fit.

    >>> fgsm(model, images, labels, eps=0.1).sub(images / 255).abs().max()
    tensor(0.1000)
    """
    return pgd(model, images, labels, eps, 1, eps, None, batch_size=batch_size)


def pgd(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    eps: float,
    steps: int,
    step_size: float,
    seed: int | None,
    *,
    batch_size: int = 250,
) -> Tensor:
    """Take `steps` signed gradient steps that raise the loss, never further than `eps` from any pixel's own value.

    images: uint8 or floats 0..1, [n, c, h, w]; labels: int64 [n]. eps, step_size: 0 to 1. seed: of the random start
    within eps of each pixel; None starts from the image itself. Returns floats 0..1, [n, c, h, w], on the CPU; eps 0
    gives the clean images. The model's modes and gradients are left as they were.
    Raises ModelError for settings out of range, DataError for images and labels that do not fit.

    >>> attacked = pgd(model, images, labels, eps=0.1, steps=10, step_size=0.025, seed=0)
    >>> nss.evaluate(model, (attacked, labels)).accuracy
    0.02
    """
    if not 0 <= eps <= 1 or not 0 <= step_size <= 1 or steps < 1:
        raise ModelError(f"eps {eps}, step_size {step_size}, steps {steps}", allowed="0 to 1, 0 to 1, from 1")
    clean = _pixels(images, labels)
    start = clean
    if seed is not None:
        generator = torch.Generator().manual_seed(seed)
        start = _within(clean + eps * (2 * torch.rand(clean.shape, generator=generator) - 1), clean, eps)
    moved = []
    with evaluating(model):
        for x, own, target in zip(*(each.split(batch_size) for each in (start, clean, labels)), strict=True):
            x, own, target = (each.to(device_of(model)) for each in (x, own, target.long()))
            for _ in range(steps):
                x = _within(x + step_size * _gradient(model, x, target).sign(), own, eps)
            moved.append(x.cpu())
    return torch.cat(moved) if moved else clean


def foolbox_attack(
    model: nn.Module, images: Tensor, labels: Tensor, name: str, *, steps: int = 200, batch_size: int = 250
) -> Tensor:
    """Find for each image the nearest one (in L2) that is answered wrong, by foolbox, an optional extra.

    images: uint8 or floats 0..1, [n, c, h, w]; labels: int64 [n]. name: deepfool or carlini-wagner. Returns floats
    0..1, [n, c, h, w], on the CPU; where none is found, what came nearest.
    Raises ModelError for another name and when foolbox is not installed, DataError for images that do not fit.

    >>> foolbox_attack(model, images, labels, "deepfool").shape
    torch.Size([100, 1, 28, 28])
    """
    if name not in BY_FOOLBOX:
        raise ModelError(f"the attack is {name!r}", allowed=", ".join(BY_FOOLBOX))
    try:
        foolbox = importlib.import_module("foolbox")
    except ImportError:
        raise ModelError(
            f"{name} needs foolbox, which is not installed", fix="pip install foolbox, or use fgsm or pgd"
        ) from None
    clean, device = _pixels(images, labels), device_of(model)
    attacks = {
        "deepfool": lambda: foolbox.attacks.L2DeepFoolAttack(steps=steps),
        "carlini-wagner": lambda: foolbox.attacks.L2CarliniWagnerAttack(steps=steps, binary_search_steps=5),
    }
    moved = []
    with evaluating(model):
        target = foolbox.PyTorchModel(model, bounds=(0, 1), device=device)
        for x, own in zip(clean.split(batch_size), labels.long().split(batch_size), strict=True):
            _, clipped, _ = attacks[name]()(target, x.to(device), own.to(device), epsilons=None)
            moved.append(clipped.detach().cpu())
    return torch.cat(moved) if moved else clean


def _pixels(images: Tensor, labels: Tensor) -> Tensor:
    """Return the images as floats 0..1."""
    pixels = as_floats(images).float()
    if images.dim() != 4 or len(images) != len(labels):
        raise DataError(f"images {list(images.shape)} and labels {list(labels.shape)}", allowed="[n, c, h, w] and [n]")
    if pixels.numel() and not (float(pixels.min()) >= 0 and float(pixels.max()) <= 1):
        low, high = float(pixels.min()), float(pixels.max())
        what = "not numbers" if math.isnan(low) else f"from {low:.3g} to {high:.3g}"
        raise DataError(f"the pixels are {what}", allowed="uint8, or floats 0..1 without normalisation")
    return pixels.detach().cpu()


def _within(x: Tensor, clean: Tensor, eps: float) -> Tensor:
    """Clip to eps of the clean images, and to pixels that exist."""
    return torch.maximum(torch.minimum(x, clean + eps), clean - eps).clamp(0, 1)


def _gradient(model: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        loss = F.cross_entropy(model(x), labels, reduction="sum")
        return torch.autograd.grad(loss, x)[0]
