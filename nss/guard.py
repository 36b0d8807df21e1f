"""A guard of old behaviour that needs no old data: what an update changes in what each layer computed (method.md 6)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from nss.anatomy import Anatomy
from nss.model import network_of
from nss.profile import Profile
from nss.rows import FreeRows


@dataclass(frozen=True)
class _Term:
    """One layer: its free rows now and at the start, and the second moment of what each of them reads."""

    now: Callable[[], tuple[Tensor | None, Tensor | None]]
    weight: Tensor
    bias: Tensor | None
    moment: Tensor | None
    """[channels, channels], or [rows, channels, channels] where each row reads channels of its own; None: ones"""
    outputs: int

    def change(self) -> Tensor:
        """Return the mean over all outputs of the squared change on old inputs."""
        weight, bias = self.now()
        moved = cast(Tensor, weight) - self.weight
        read = moved[0].shape[0] if self.moment is None else self.moment.shape[-1]
        moved = moved.reshape(len(moved), read, -1).transpose(1, 2)  # [rows, positions, channels]
        total = (moved.square() if self.moment is None else (moved @ self.moment) * moved).sum()
        if bias is not None:
            total = total + (bias - cast(Tensor, self.bias)).square().sum()
        return total / self.outputs


class Guard:
    """Sum over layers of tr(dW G dW^T) / outputs: dW the change of the free rows, G the profile's second moment.

    Both are those of the layer with the norm behind it folded in, so that each output counts in units of its spread; a
    change of a bias counts by its square. A layer whose input was not gathered (the first, depthwise ones) is taken to
    read unrelated channels of second moment one, as normalised pixels are.

    >>> guard = Guard(frozen, anatomy, profile)
    >>> float(guard())
    0.0
    """

    def __init__(self, frozen: nn.Module, anatomy: Anatomy, profile: Profile) -> None:
        self._terms = []
        for producer in anatomy.producers:
            layer = network_of(frozen).get_submodule(producer.module)
            if not isinstance(layer, FreeRows) or layer.weight is None:
                continue
            weight, bias = (None if each is None else each.detach().clone() for each in layer.effective())
            gram = profile.gram(producer.name) if producer.name in profile.grams else None
            moment = None if gram is None else _read_by(layer, gram.to(layer.weight))
            self._terms.append(_Term(layer.effective, cast(Tensor, weight), bias, moment, len(producer.out_ids)))

    def __call__(self) -> Tensor:
        """Return the guard of the free rows as they are now, with gradients; zero at the start."""
        return torch.stack([term.change() for term in self._terms]).sum()


def _read_by(layer: FreeRows, gram: Tensor) -> Tensor:
    """Return the second moment of what the rows read: of their own group's channels in a grouped convolution."""
    groups = int(getattr(layer.layer, "groups", 1))
    if groups == 1:
        return gram
    size, rows = len(gram) // groups, len(cast(Tensor, layer.layer.weight)) // groups
    blocks = torch.stack([gram[start : start + size, start : start + size] for start in range(0, len(gram), size)])
    return blocks[layer.rows // rows]
