"""What happens to a model before it is adapted again: drift, adversarial images, damaged weights (method.md 6)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from bench import common
from nss.attacks import fgsm, pgd
from nss.data import Batch, Dataset
from nss.drift import shifted
from nss.model import Classifier
from nss.mutants import mutate
from nss.predict import predict
from nss.profile import Profile
from nss.samples import Samples
from nss.slice import SemanticSlices

DRIFT, ATTACK, REPAIR = "drift", "attack", "repair"
MAIN = (DRIFT, "rotation 3 + noise 2")
OTHERS = (
    *((DRIFT, setting) for setting in ("rotation 5", "blur 3", "noise 4", "contrast 5", "brightness 5")),
    *((ATTACK, setting) for setting in ("pgd", "fgsm")),
    *((REPAIR, setting) for setting in ("drop 0.1", "drop 0.3", "drop 0.5")),
)
NEW = 1000
"""the first images of the validation split are trained on, some of those behind them are held out"""
PER_CLASS = 200
MUTANT_IMAGES = 1000
EPS, PGD_STEPS = 0.05, 10


@dataclass(frozen=True)
class Case:
    """A model to adapt, and the images that decide."""

    situation: str
    setting: str
    model: Classifier
    new: Samples
    """labelled new samples, to train on"""
    held_out: Samples
    """further new samples, which choose epochs, learning rates and guards"""
    old: Samples
    """what must not be lost, to choose by as well"""
    fresh: Callable[[nn.Module, int], Samples] | None
    """attacks on an adapted model, of the first images of the test split"""
    test: Callable[[int], tuple[Samples, Samples]]
    """new and old samples made of the first images of the test split"""

    def new_data(self) -> Dataset:
        """Return the new samples as a user brings them, with those held out as the val split."""
        split = torch.cat([torch.zeros(len(self.new)), torch.ones(len(self.held_out))]).byte()
        images = torch.cat([self.new.images, self.held_out.images])
        labels = torch.cat([self.new.labels, self.held_out.labels])
        spec = self.model.spec
        return Dataset(spec.classes, spec.input_shape, (Batch("0" * 32, images, labels, split),))


class Subject(common.Subject):
    """One base model and its data."""

    @cached_property
    def known(self) -> tuple[Profile, SemanticSlices]:
        """What readapt needs to know of the base model."""
        return self.knowledge(self.model)

    def knowledge(self, model: nn.Module) -> tuple[Profile, SemanticSlices]:
        """Return what readapt needs to know of a model: its profile on old data and its slices."""
        return common.knowledge(model, self.data.split("train"), PER_CLASS, windows=1)

    def first(self, split: str, start: int, count: int) -> Samples:
        """Return `count` images of a split, from `start` on."""
        part = self.data.split(split)
        return Samples(part.images[start : start + count], part.labels[start : start + count])

    def case(self, situation: str, setting: str, count: int) -> Case:
        """Make a case with `count` held-out images. Everything that chance decides follows from the seed."""
        if situation == REPAIR:
            return self._case(situation, setting, count, self._mutant(float(setting.removeprefix("drop "))))
        return self._case(situation, setting, count, self.model)

    def _mutant(self, drop: float) -> Classifier:
        mutant = mutate(self.model, self.data, drop, self.seed, images=MUTANT_IMAGES)
        assert isinstance(mutant, Classifier)
        return mutant

    def _case(self, situation: str, setting: str, count: int, model: Classifier) -> Case:
        # Of a small data set half of the validation images, so that some are left to hold out.
        new = min(NEW, len(self.data.split("val")) // 2)
        clean, held_out = self.first("val", 0, new), self.first("val", new, count)

        def changed(samples: Samples, target: nn.Module, seed: int) -> Samples:
            return Samples(change(samples, situation, setting, target, 3 * self.seed + seed), samples.labels)

        def test(count: int) -> tuple[Samples, Samples]:
            images = self.first("test", 0, count)
            return changed(images, model, 2), worked(model, images, situation)

        def fresh(adapted: nn.Module, count: int) -> Samples:
            return changed(self.first("test", 0, count), adapted, 2)

        return Case(
            situation=situation,
            setting=setting,
            model=model,
            new=changed(clean, model, 0),
            held_out=changed(held_out, model, 1),
            old=worked(model, held_out, situation),
            fresh=fresh if situation == ATTACK else None,
            test=test,
        )


def change(samples: Samples, situation: str, setting: str, model: nn.Module, seed: int) -> Tensor:
    """Return the images as the situation brings them, uint8: drifted, attacked through `model`, or as they are."""
    images = samples.images
    if situation == DRIFT:
        for place, part in enumerate(setting.split(" + ")):
            kind, strength = part.split(" ")
            images = shifted(images, kind, int(strength), 1000 * place + seed)
    if situation == ATTACK:
        moved = (
            fgsm(model, images, samples.labels, EPS)
            if setting == "fgsm"
            else pgd(model, images, samples.labels, EPS, PGD_STEPS, EPS / 4, seed)
        )
        images = (moved * 255).round().byte()  # an image that arrives has 8 bits
    return images


def worked(model: nn.Module, samples: Samples, situation: str) -> Samples:
    """Return the old images: of a damaged model those that it still answers right, else all."""
    if situation != REPAIR:
        return samples
    logits, labels = predict(model, (samples.images, samples.labels))
    return samples.pick(logits.argmax(1) == labels)
