"""Two models judged on the same held-out images: those that one answers right and the other wrong tell them apart."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nss.data import Data, Dataset
from nss.errors import ModelError
from nss.model import Classifier
from nss.predict import answers_of, predict

# Probabilities of the bootstrap are sums of rounded numbers: a tie with the level is a tie.
_ROUNDING = 1e-9


@dataclass(frozen=True)
class Pairs:
    """Images by which of two models answers them right."""

    images: int
    both: int
    """that both answer right"""
    only_champion: int
    only_candidate: int

    @property
    def champion_accuracy(self) -> float:
        """Share answered right, of 1; nan without images."""
        return _share(self.both + self.only_champion, self.images)

    @property
    def candidate_accuracy(self) -> float:
        """Share answered right, of 1; nan without images."""
        return _share(self.both + self.only_candidate, self.images)

    @property
    def difference(self) -> float:
        """Accuracy of the candidate less that of the champion; nan without images."""
        return _share(self.only_candidate - self.only_champion, self.images)

    @property
    def p_value(self) -> float:
        """McNemar's exact test, two-sided: how likely so uneven a split is when both are equally good.

        It is 1 when no image tells them apart. The binomial distribution itself is used, not its approximation.
        Source: McNemar, Psychometrika 12, 1947.
        """
        return min(1.0, 2 * min(self.p_better, self.p_worse))

    @property
    def p_better(self) -> float:
        """The same, one-sided: how likely so many images that only the candidate answers right are by chance."""
        return _tail(self.only_candidate, self.only_champion)

    @property
    def p_worse(self) -> float:
        """The same, one-sided: how likely so many images that only the champion answers right are by chance."""
        return _tail(self.only_champion, self.only_candidate)

    def interval(self, confidence: float = 0.95) -> tuple[float, float]:
        """Percentile bootstrap interval of the difference over resampled images, each with both of its answers.

        Exact: the distribution over all resamples, not over some that a seed draws. It is the sum of `images` draws of
        -1, 0 or 1, so its generating function is a power. Without images it is (-1, 1): nothing is known.
        Raises ModelError for a confidence that is not between 0 and 1.

        >>> Pairs(images=100, both=90, only_champion=2, only_candidate=5).interval()
        (-0.02, 0.08)
        """
        if not 0 < confidence < 1:
            raise ModelError(f"the confidence is {confidence}", where="confidence", allowed="above 0, below 1")
        if not self.images:
            return -1.0, 1.0
        # The larger count first, so that with the models swapped the interval is the same to the last bit.
        more, fewer = sorted((self.only_candidate, self.only_champion), reverse=True)
        one = np.array([fewer, self.images - more - fewer, more]) / self.images
        length = 2 * self.images + 1
        chances = np.fft.irfft(np.fft.rfft(one, length) ** self.images, length)
        level = (1 - confidence) / 2 - _ROUNDING
        low = int(np.argmax(np.cumsum(chances) >= level)) - self.images
        high = self.images - int(np.argmax(np.cumsum(chances[::-1]) >= level))
        if self.only_candidate < self.only_champion:
            low, high = -high, -low
        return low / self.images, high / self.images

    def to_dict(self) -> dict[str, Any]:
        """Return the counts and what follows from them as plain numbers, None for what no image tells."""
        figures = {
            "champion_accuracy": self.champion_accuracy,
            "candidate_accuracy": self.candidate_accuracy,
            "difference": self.difference,
        }
        known = {name: None if math.isnan(value) else value for name, value in figures.items()}
        return {**asdict(self), **known, "p_value": self.p_value}


@dataclass(frozen=True)
class Score:
    """The candidate's answers to images of a class that the champion does not know."""

    images: int
    right: int

    @property
    def accuracy(self) -> float:
        """Share answered right, of 1; nan without images."""
        return _share(self.right, self.images)


@dataclass(frozen=True)
class Comparison:
    """A champion and a candidate on the same images. All but `new_classes` is on classes that both know."""

    overall: Pairs
    per_class: Mapping[str, Pairs]
    """of classes that have images"""
    per_batch: Mapping[str, Pairs]
    """of batches that have images of classes that both know"""
    new_classes: Mapping[str, Score]
    """of classes that only the candidate knows and that have images: never counted against the champion"""
    interval: tuple[float, float]
    """of the difference of accuracy, at `confidence`"""
    confidence: float

    @property
    def worst_champion(self) -> tuple[str, float]:
        """The class that the champion answers worst, and its accuracy; ("", nan) without images."""
        return _least({name: pairs.champion_accuracy for name, pairs in self.per_class.items()})

    @property
    def worst_candidate(self) -> tuple[str, float]:
        """The class that the candidate answers worst, of those that both know; ("", nan) without images."""
        return _least({name: pairs.candidate_accuracy for name, pairs in self.per_class.items()})

    @property
    def worst_change(self) -> tuple[str, float]:
        """The class that loses most (or gains least), and the difference of accuracy; ("", nan) without images."""
        return _least({name: pairs.difference for name, pairs in self.per_class.items()})

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain numbers, texts and lists."""
        worst = {name: getattr(self, name) for name in ("worst_champion", "worst_candidate", "worst_change")}
        return {
            "overall": self.overall.to_dict(),
            "interval": list(self.interval),
            "confidence": self.confidence,
            **{name: [label, value] if label else None for name, (label, value) in worst.items()},
            "per_class": {name: pairs.to_dict() for name, pairs in self.per_class.items()},
            "per_batch": {name: pairs.to_dict() for name, pairs in self.per_batch.items()},
            "new_classes": {
                name: {**asdict(score), "accuracy": score.accuracy} for name, score in self.new_classes.items()
            },
        }

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Comparison:
        """Return the comparison that `to_dict` described. Raises ModelError when something is missing.

        >>> Comparison.from_dict(comparison.to_dict()) == comparison
        True
        """
        try:
            low, high = content["interval"]
            return cls(
                overall=_pairs(content["overall"]),
                per_class={name: _pairs(each) for name, each in content["per_class"].items()},
                per_batch={name: _pairs(each) for name, each in content["per_batch"].items()},
                new_classes={
                    name: Score(each["images"], each["right"]) for name, each in content["new_classes"].items()
                },
                interval=(low, high),
                confidence=content["confidence"],
            )
        except (KeyError, TypeError, ValueError, AttributeError) as problem:
            raise ModelError(f"a comparison lacks or garbles {problem}", fix="compare again") from None


def compare(
    champion: nn.Module,
    candidate: nn.Module,
    data: Data,
    *,
    classes: Sequence[str] | None = None,
    confidence: float = 0.95,
    batch_size: int = 500,
) -> Comparison:
    """Compare two models on held-out images of `data`; a Dataset's batches are told apart.

    classes: names of the candidate's classes, needed for models not made by `build_model`. The champion's classes must
    be the first of them. What is not finite in the logits of an image counts as a wrong answer.
    Raises ModelError when there are no images, classes and labels do not fit, or `data` is shuffled on each reading.

    >>> nss.compare(champion, candidate, data.split("test")).overall.difference
    0.012
    """
    if isinstance(champion, Classifier) and isinstance(candidate, Classifier):
        before, after = champion.spec.classes, candidate.spec.classes
        if after[: len(before)] != before:
            raise ModelError(
                f"the candidate's classes are {', '.join(after)}", allowed=f"first {', '.join(before)}, then new ones"
            )
    names = classes if classes is not None else candidate.spec.classes if isinstance(candidate, Classifier) else None
    if names is None:
        raise ModelError(f"{type(candidate).__name__} does not say which classes it knows", fix="pass classes=[...]")
    before_logits, labels = predict(champion, data, batch_size)
    after_logits, again = predict(candidate, data, batch_size)
    if not torch.equal(labels, again):
        raise ModelError("the images come in another order the second time", where="data", fix="do not shuffle them")
    batches = {each.digest: len(each) for each in data.batches} if isinstance(data, Dataset) else None
    return compare_answers(before_logits, after_logits, labels, names, batches=batches, confidence=confidence)


def compare_answers(
    champion: Tensor,
    candidate: Tensor,
    labels: Tensor,
    classes: Sequence[str],
    *,
    known: int | None = None,
    batches: Mapping[str, int] | None = None,
    confidence: float = 0.95,
) -> Comparison:
    """Compare what two models have answered to the same images.

    champion, candidate: logits [n, classes it knows], or answers int64 [n]. labels: int64 [n]. classes: names of the
    candidate's classes. known: how many of them, the first, the champion knows; default as many as it has logits, or
    all. batches: {name: number of images}, in the order of the images.
    Raises ModelError when there are no images, or lengths, classes and labels do not fit.

    >>> labels = torch.tensor([0, 0, 1])
    >>> compare_answers(torch.tensor([0, 1, 1]), torch.tensor([0, 0, 1]), labels, ["a", "b"]).overall.only_candidate
    1
    """
    if known is None:
        known = champion.shape[1] if champion.dim() == 2 else len(classes)
    _check(champion, candidate, labels, classes, known, batches)
    before, after = _answers(champion).eq(labels), _answers(candidate).eq(labels)
    old = labels < known
    groups = {name: labels == index for index, name in enumerate(classes)}
    owners = torch.arange(len(batches or {})).repeat_interleave(torch.tensor(list((batches or {}).values())).long())
    parts = {name: old & (owners == index) for index, name in enumerate(batches or {})}
    overall = _count(before, after, old)
    return Comparison(
        overall=overall,
        per_class={n: _count(before, after, rows) for n, rows in list(groups.items())[:known] if bool(rows.any())},
        per_batch={n: _count(before, after, rows) for n, rows in parts.items() if bool(rows.any())},
        new_classes={
            n: Score(int(rows.sum()), int(after[rows].sum()))
            for n, rows in list(groups.items())[known:]
            if bool(rows.any())
        },
        interval=overall.interval(confidence),
        confidence=confidence,
    )


def _check(
    champion: Tensor,
    candidate: Tensor,
    labels: Tensor,
    classes: Sequence[str],
    known: int,
    batches: Mapping[str, int] | None,
) -> None:
    count = len(labels)
    if not count:
        raise ModelError("there are no images to compare on", fix="use a split that has images")
    if not len(champion) == len(candidate) == count or (batches is not None and sum(batches.values()) != count):
        lengths = f"{len(champion)} and {len(candidate)} answers, {count} labels"
        extra = "" if batches is None else f", {sum(batches.values())} images in batches"
        raise ModelError(f"the lengths differ: {lengths}{extra}", allowed="one of each for an image")
    if len(set(classes)) != len(classes) or not 1 <= known <= len(classes):
        raise ModelError(f"the champion knows {known} of the classes {list(classes)}", allowed="the first, each once")
    for name, given, width in (("champion", champion, known), ("candidate", candidate, len(classes))):
        if given.dim() not in (1, 2) or (given.dim() == 2 and given.shape[1] != width):
            raise ModelError(f"the answers are {list(given.shape)}", where=name, allowed=f"[n], or logits [n, {width}]")
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= len(classes):
        raise ModelError(f"labels from {low} to {high} do not fit {len(classes)} classes", where="labels")


def _answers(given: Tensor) -> Tensor:
    """Answers as they are, or those of logits."""
    return (given.long() if given.dim() == 1 else answers_of(given)).cpu()


def _count(before: Tensor, after: Tensor, rows: Tensor) -> Pairs:
    left, right = before[rows], after[rows]
    return Pairs(len(left), *(int(flags.sum()) for flags in (left & right, left & ~right, right & ~left)))


def _pairs(content: Mapping[str, Any]) -> Pairs:
    return Pairs(content["images"], content["both"], content["only_champion"], content["only_candidate"])


def _share(part: int, whole: int) -> float:
    return part / whole if whole else float("nan")


def _least(values: Mapping[str, float]) -> tuple[str, float]:
    return min(values.items(), key=lambda item: item[1]) if values else ("", float("nan"))


def _tail(more: int, fewer: int) -> float:
    """Return how likely a fair coin falls `more` times or more often on one side, of more + fewer throws."""
    from scipy.special import bdtr

    return float(bdtr(fewer, more + fewer, 0.5))
