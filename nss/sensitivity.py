"""What the loss of a layer's neurons does to the answers: measured where it counts, at the output (method.md 5)."""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from nss.apply import merged
from nss.merge import Order, Reading
from nss.model import Classifier
from nss.predict import predict
from nss.sites import Sites
from nss.statistics import retake_statistics
from nss.units import Units

_LOG = logging.getLogger(__name__)
SHARES = (0.8, 0.6, 0.35, 0.15)
"""shares of a group's units that are kept where the error is measured"""


def measure_errors(
    model: Classifier,
    sites: Sites,
    units: Units,
    orders: Sequence[Order],
    read: Sequence[Reading],
    images: Tensor,
    parts: Sequence[Tensor],
) -> list[Tensor]:
    """Measure, for each group alone, the divergence of the answers when only some of its units are kept.

    images: uint8 or what the model takes [n, c, h, w]; parts: bool [n], the images of each semantic slice. The error is
    the Kullback-Leibler divergence from the original's answers, of the slice that suffers most: no category is
    sacrificed for the mean. Between the measured points it follows a power of what the readers miss.
    Statistics of norms are taken again over all images, mixed: the order in which they come is no matter.
    Returns for each group float64 [units + 1], falling.
    """
    mixed = images[_mixed(images)]
    nothing = torch.zeros(len(images), dtype=torch.int64)
    truth = F.log_softmax(predict(model, (images, nothing))[0].double(), 1)
    errors = []
    for number, order in enumerate(orders, start=1):
        count = len(order.units)
        points = {}
        for kept in sorted({max(1, round(share * count)) for share in SHARES} - {count}) if count > 1 else []:
            flags = torch.ones(len(units.removable), dtype=torch.bool)
            flags[order.units[kept:]] = False
            smaller = merged(model, sites, read, units.channels(flags))
            retake_statistics(smaller, mixed, all_images=True)
            points[kept] = _divergence(truth, predict(smaller, (images, nothing))[0], parts)
        _LOG.info("what the answers lose without neurons: layer %d of %d", number, len(orders))
        errors.append(power_law(order.missing, points) if points else _last_resort(count))
    return errors


def _mixed(images: Tensor) -> Tensor:
    """Return an order of the images, int64 [n], that follows from what they are: by digests, which are as good as dice.

    Data often comes class by class, and batches of few classes have other statistics than the whole.
    """
    rows = images.detach().cpu().contiguous().flatten(1).view(torch.uint8).numpy()
    digests = [hashlib.blake2b(row.tobytes(), digest_size=16).digest() for row in rows]
    return torch.tensor(sorted(range(len(digests)), key=digests.__getitem__), dtype=torch.int64)


def _divergence(truth: Tensor, logits: Tensor, parts: Sequence[Tensor]) -> float:
    each = (truth.exp() * (truth - F.log_softmax(logits.double(), 1))).sum(1)
    return max(float(each[part].mean()) for part in parts if bool(part.any()))


def _last_resort(count: int) -> Tensor:
    """Nothing could be measured: a group of one unit, which stays."""
    return torch.linspace(1, 0, count + 1, dtype=torch.float64) if count else torch.zeros(1, dtype=torch.float64)


def power_law(missing: Tensor, points: dict[int, float]) -> Tensor:
    """Fit error = a * missing ** p to measured points, by least squares of logarithms, and return it everywhere.

    missing: float64 [units + 1], falling; points: {units kept: error}. With a single usable point p is 1.
    """
    usable = [
        (math.log(float(missing[k])), math.log(max(error, 1e-9))) for k, error in points.items() if missing[k] > 0
    ]
    if not usable:
        return missing.clone()
    mean_x, mean_y = (sum(column) / len(usable) for column in zip(*usable, strict=True))
    spread = sum((x - mean_x) ** 2 for x, _ in usable)
    power = sum((x - mean_x) * (y - mean_y) for x, y in usable) / spread if spread > 1e-12 else 1.0
    power = min(4.0, max(0.5, power))
    return math.exp(mean_y - power * mean_x) * missing.pow(power)
