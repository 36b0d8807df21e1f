"""Two tests between known and new images, class by class, pooled over the classes.

Within a class, known and new images are exchangeable when nothing has changed. So neither test is misled by new images
that are of other classes, in other shares, than the known ones: that is no drift.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Flags = NDArray[np.bool_]

# What is equal but for rounding counts as equal: a permutation that only renames the images.
_ROUNDING = 1e-9


@dataclass(frozen=True)
class EnergyTest:
    """How far features of new images are from those of known ones, within their classes."""

    p_value: float
    """share of permutations (this order one of them) with so large a distance"""
    effect: float
    """0: as near as chance makes them; 1: within each class, two points. Share of the distance between known and new
    images that is more than the distances among the known and among the new ones, less what chance gives"""
    known_images: int
    """of classes that have known and new images: the others say nothing"""
    new_images: int


def energy_test(
    known: Floats, new: Floats, known_labels: Ints, new_labels: Ints, *, permutations: int = 999, seed: int = 0
) -> EnergyTest:
    """Test whether two samples of features have one distribution in each class: mean, spread and shape.

    known: [n, features], new: [m, features]; labels: [n], [m]. Each feature is scaled to standard deviation 1 over all
    images. The statistic is the energy distance of each class times n m / (n + m) of that class, summed; its
    distribution is that over permutations of known and new within the classes. Two samples without a class in common
    have p-value 1 and effect 0.
    Source: energy distance, Szekely and Rizzo, Journal of Statistical Planning and Inference 143, 2013.

    >>> energy_test(known, new, known_labels, new_labels).p_value
    0.001
    """
    generator = np.random.default_rng(seed)
    scaled = _standardised(np.concatenate([known, new]))
    known, new = scaled[: len(known)], scaled[len(known) :]
    observed, between = 0.0, 0.0
    permuted = np.zeros(permutations)
    counts = np.zeros(2, dtype=np.int64)
    for label in np.intersect1d(known_labels, new_labels):
        ours, theirs = known[known_labels == label], new[new_labels == label]
        distance, cross, by_chance = _within_class(ours, theirs, permutations, generator)
        observed, between, permuted = observed + distance, between + cross, permuted + by_chance
        counts += len(ours), len(theirs)
    as_far = int((permuted >= observed - _ROUNDING * (1 + abs(observed))).sum())
    excess = observed - float(permuted.mean())
    return EnergyTest(
        p_value=(1 + as_far) / (1 + permutations),
        effect=min(1.0, max(0.0, excess / between)) if between else 0.0,
        known_images=int(counts[0]),
        new_images=int(counts[1]),
    )


def _within_class(
    known: Floats, new: Floats, permutations: int, generator: np.random.Generator
) -> tuple[float, float, Floats]:
    """Return a class's weighted energy distance, its part between known and new, and the distance when permuted."""
    from scipy.spatial.distance import cdist

    pooled = np.concatenate([known, new])
    distances = cdist(pooled, pooled)
    chosen = np.arange(len(pooled)) >= len(known)
    lots = generator.random((permutations, len(pooled))).argsort(1) >= len(known)
    between, far = energy(distances, np.concatenate([chosen[None], lots]).astype(np.float64))
    weight = len(known) * len(new) / len(pooled)
    return weight * float(far[0]), weight * float(between[0]), weight * far[1:]


def energy(distances: Floats, new: Floats) -> tuple[Floats, Floats]:
    """Return, for each choice of new images, twice the mean distance between known and new, and the energy distance.

    That is the former less the mean distances among new and among known images. distances: [images, images], of all
    known and new ones. new: [choices, images], 1 for those that count as new. Returns [choices] each.
    """
    row = distances.sum(1)
    size = new.sum(1)
    rest = new.shape[1] - size
    among_new = ((new @ distances) * new).sum(1)
    from_new = new @ row
    between = 2 * (from_new - among_new) / (size * rest)
    among_known = row.sum() - 2 * from_new + among_new
    return between, between - among_new / size**2 - among_known / rest**2


def _standardised(pooled: Floats) -> Floats:
    """Scale each feature to mean 0 and standard deviation 1 over known and new images together.

    By the known ones alone, known and new would not be exchangeable any more, and the test not exact: a feature that
    hardly any known image has would be blown up among the new ones.
    """
    spread = pooled.std(0)
    scaled: Floats = (pooled - pooled.mean(0)) / np.where(spread > 0, spread, 1.0)
    return scaled


@dataclass(frozen=True)
class AccuracyTest:
    """Whether new images are answered right less often than known ones of the same classes."""

    p_value: float
    """how likely so few right answers to the new images are, if known and new ones are equally hard in each class"""
    expected: float
    """accuracy on known images, each class counted as often as it is among the new ones"""
    found: float
    """accuracy on new images"""

    @property
    def drop(self) -> float:
        """What the accuracy has fallen by, of 1."""
        return self.expected - self.found


def accuracy_test(known_right: Flags, new_right: Flags, known_labels: Ints, new_labels: Ints) -> AccuracyTest:
    """Test, one-sided, whether new images are answered worse than known ones of the same class.

    *_right: bool, whether each image is answered right; labels: of each image. Given how many images of a class are
    answered right in all, the number of new ones among them is hypergeometric: the p-value is exact, from the sum over
    the classes. With one class it is Fisher's exact test. Without a class in common: p-value 1, accuracies nan.

    >>> accuracy_test(known_right, new_right, known_labels, new_labels).drop
    0.12
    """
    from scipy.stats import hypergeom

    chances = np.ones(1)
    right, images, expected = 0, 0, 0.0
    for label in np.intersect1d(known_labels, new_labels):
        ours, theirs = known_right[known_labels == label], new_right[new_labels == label]
        of_class = hypergeom(len(ours) + len(theirs), int(ours.sum() + theirs.sum()), len(theirs))
        chances = np.convolve(chances, of_class.pmf(np.arange(len(theirs) + 1)))
        right, images = right + int(theirs.sum()), images + len(theirs)
        expected += len(theirs) * float(ours.mean())
    if not images:
        return AccuracyTest(1.0, float("nan"), float("nan"))
    return AccuracyTest(min(1.0, float(chances[: right + 1].sum())), expected / images, right / images)
