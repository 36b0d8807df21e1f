"""Triage: which maintenance a model needs, and why, from evidence.

Each decision is data: what was found, the numbers it was found by, and whether that is enough to act.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import nn

from nss.data import Data, Dataset
from nss.errors import ModelError, ParamsError
from nss.features import penultimate_features
from nss.pooled import AccuracyTest, EnergyTest, accuracy_test, energy_test
from nss.predict import answers_of, predict
from nss.samples import Samples, whole

BUDGETS = ("parameters", "macs", "bytes", "latency_ms")


@dataclass(frozen=True)
class TriageSettings:
    """What counts as evidence. Raises ParamsError that lists every value that is out of range."""

    alpha: float = 0.05
    """share of unchanged new data that may be taken for changed; half of it for each of the two tests"""
    min_effect: float = 0.01
    """drift below it is not followed, however sure: in what we measured it cost less than `max_drop`"""
    max_drop: float = 0.02
    """what the accuracy on new images may fall by: re-adaptation itself is not much more exact"""
    min_images: int = 30
    """new images of known classes that it takes to judge them: three of each of ten classes"""
    min_class_images: int = 10
    """images of a new class that it takes to learn it"""
    max_images: int = 1000
    """known and new images, each, that are looked at: more take time, and make no difference that matters sure"""
    permutations: int = 999
    budgets: Mapping[str, float] = field(default_factory=dict)
    """the most that is allowed of parameters, macs, bytes, latency_ms; figures that are not named are free"""
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the ranges."""
        fewest = math.ceil(2 / self.alpha) - 1 if 0 < self.alpha < 1 else 1
        unknown = sorted(set(self.budgets) - set(BUDGETS))
        wrong = {
            "alpha: above 0, below 1": 0 < self.alpha < 1,
            "min_effect: 0 to 1": 0 <= self.min_effect <= 1,
            "max_drop: 0 to 1": 0 <= self.max_drop <= 1,
            "min_images: from 2": self.min_images >= 2,
            "min_class_images: from 1": self.min_class_images >= 1,
            "max_images: from min_images": self.max_images >= self.min_images,
            f"permutations: from {fewest}, fewer cannot reach half of alpha": self.permutations >= fewest,
            f"budgets: {', '.join(BUDGETS)}, not {', '.join(unknown)}": not unknown,
            "budgets: numbers above 0": all(0 < each < float("inf") for each in self.budgets.values()),
        }
        if problems := [text for text, fits in wrong.items() if not fits]:
            raise ParamsError("settings of triage are out of range", problems, where="triage")


@dataclass(frozen=True)
class Finding:
    """Whether one kind of maintenance is needed."""

    needed: bool
    why: str
    """one sentence, with numbers"""
    evidence: Mapping[str, Any]
    """plain numbers, texts and lists"""


@dataclass(frozen=True)
class Triage:
    """What a model needs."""

    extend: Finding
    readapt: Finding
    restructure: Finding

    @property
    def needed(self) -> tuple[str, ...]:
        """The kinds of maintenance that are needed, most urgent first."""
        return tuple(name for name in ("extend", "readapt", "restructure") if getattr(self, name).needed)

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain numbers, texts and lists."""
        return asdict(self)


def triage(
    model: nn.Module,
    known: Data,
    new: Data | None = None,
    *,
    classes: Sequence[str] | None = None,
    sizes: Mapping[str, float] | None = None,
    settings: TriageSettings | None = None,
) -> Triage:
    """Decide which maintenance `model` needs: new labels -> extend, drift or lost accuracy -> readapt, budget -> size.

    known: images of the kind that the model was made for, but not trained on: features of training images are closer to
    their class, which would look like drift. A whole Dataset is taken without its train split. new: what has arrived,
    all of it; None: nothing. classes: names in the order of the labels, new ones last; a Dataset has its own.
    sizes: {one of `BUDGETS`: of this model}, for each budget that is set.
    Raises ModelError for a label of `known` that the model does not know, or a size that is missing or not finite.

    >>> nss.triage(model, data.split("val"), arrived).readapt.why
    'features of the new images have drifted: effect 0.19, p 0.001'
    """
    settings = settings or TriageSettings()
    size = over_budget(sizes or {}, settings)
    arrived = whole(new) if new is not None else None
    if not arrived:
        nothing = Finding(False, "no new images", {})
        return Triage(nothing, nothing, size)
    answered = predict(model, (arrived.images[:1], arrived.labels[:1]))[0].shape[1]
    extend = new_labels(_counts(arrived, answered, _names(new, classes)), settings)
    sides = _held_out(known), arrived.pick(arrived.labels < answered)
    for name, samples in zip(
        ("known images that were not trained on", "new images of known classes"), sides, strict=True
    ):
        if not samples:
            return Triage(extend, Finding(False, f"cannot tell: no {name}", {}), size)
    reference, seen = (_look_at(model, samples, settings) for samples in sides)
    return Triage(extend, changed(reference, seen, settings), size)


def new_labels(counts: Mapping[str, int], settings: TriageSettings) -> Finding:
    """Decide whether there are classes to learn. counts: new images of each class that the model does not know.

    >>> new_labels({"truck": 40}, TriageSettings()).why
    'new classes: truck (40 images)'
    """
    evidence = {"images": dict(counts), "min_class_images": settings.min_class_images}
    enough = {name: count for name, count in counts.items() if count >= settings.min_class_images}
    listed = ", ".join(f"{name} ({count} images)" for name, count in (enough or counts).items())
    if enough:
        return Finding(True, f"new classes: {listed}", evidence)
    if counts:
        return Finding(False, f"too few images of new classes: {listed}, {settings.min_class_images} needed", evidence)
    return Finding(False, "no new classes", evidence)


@dataclass(frozen=True)
class Look:
    """What a model makes of images."""

    features: torch.Tensor
    """float32 [n, features]"""
    right: torch.Tensor
    """whether each is answered right, bool [n]"""
    labels: torch.Tensor
    """int64 [n]"""


def changed(known: Look, new: Look, settings: TriageSettings) -> Finding:
    """Decide whether new images of known classes are no longer what the model was made for.

    Two tests, each at half of alpha, so that together they give no more false alarms than alpha: whether features have
    drifted, and whether the accuracy has fallen (see nss.pooled). Each must be sure, and large enough to matter.
    Where too few images can be compared, nothing is said to have changed, and why.

    >>> changed(known, new, TriageSettings()).evidence["drift"]["effect"]
    0.19
    """
    labels = known.labels.numpy(), new.labels.numpy()
    drift = energy_test(
        known.features.double().numpy(),
        new.features.double().numpy(),
        *labels,
        permutations=settings.permutations,
        seed=settings.seed,
    )
    accuracy = accuracy_test(known.right.numpy(), new.right.numpy(), *labels)
    count = min(drift.known_images, drift.new_images)
    evidence = _evidence(drift, accuracy, settings)
    if count < settings.min_images:
        side = "new" if drift.new_images == count else "known"
        return Finding(
            False, f"cannot tell: {count} {side} images to compare, {settings.min_images} are needed", evidence
        )
    drifted, fallen = evidence["drift"]["found"], evidence["accuracy"]["found_lower"]
    texts = {
        f"features of the new images have drifted: effect {drift.effect:.3g}, p {drift.p_value:.2g}": drifted,
        f"accuracy on the new images is {accuracy.found:.3f}, {accuracy.expected:.3f} was to be expected, "
        f"p {accuracy.p_value:.2g}": fallen,
    }
    if drifted or fallen:
        return Finding(True, "; ".join(text for text, found in texts.items() if found), evidence)
    why = f"no drift (effect {drift.effect:.3g}, p {drift.p_value:.2g}), no drop of accuracy ({accuracy.drop:+.3f})"
    return Finding(False, why, evidence)


def over_budget(sizes: Mapping[str, float], settings: TriageSettings) -> Finding:
    """Decide whether a model is larger or slower than it may be.

    Raises ModelError for a size that is missing or not finite though it has a budget.

    >>> over_budget({"macs": 2e6}, TriageSettings(budgets={"macs": 1e6})).why
    'macs 2,000,000 (1,000,000 allowed)'
    """
    for name in settings.budgets:
        if not math.isfinite(sizes.get(name, float("nan"))):
            raise ModelError(f"there is a budget for {name}, but not what the model has", fix=f"measure {name}")
    evidence = {name: {"found": sizes[name], "allowed": allowed} for name, allowed in settings.budgets.items()}
    over = [f"{name} {sizes[name]:,.10g} ({allowed:,.10g} allowed)" for name, allowed in settings.budgets.items()]
    over = [text for text, each in zip(over, evidence.values(), strict=True) if each["found"] > each["allowed"]]
    if over:
        return Finding(True, "; ".join(over), evidence)
    return Finding(False, "within its budgets" if evidence else "no budget is set", evidence)


def _evidence(drift: EnergyTest, accuracy: AccuracyTest, settings: TriageSettings) -> dict[str, Any]:
    level = settings.alpha / 2
    drifted = drift.p_value <= level and drift.effect >= settings.min_effect
    fallen = accuracy.p_value <= level and accuracy.drop > settings.max_drop
    answers = {"expected": accuracy.expected, "new": accuracy.found, "drop": accuracy.drop}
    plain = {name: None if math.isnan(value) else value for name, value in answers.items()}
    return {
        "known_images": drift.known_images,
        "new_images": drift.new_images,
        "min_images": settings.min_images,
        "level": level,
        "drift": {
            "found": drifted,
            "effect": drift.effect,
            "p_value": drift.p_value,
            "min_effect": settings.min_effect,
        },
        "accuracy": {"found_lower": fallen, **plain, "p_value": accuracy.p_value, "max_drop": settings.max_drop},
    }


def _held_out(data: Data) -> Samples:
    if isinstance(data, Dataset) and not data.part:
        data = replace(data, batches=tuple(batch.pick(batch.split > 0) for batch in data.batches))
    return whole(data)


def _look_at(model: nn.Module, samples: Samples, settings: TriageSettings) -> Look:
    """Look at no more than `max_images`, drawn by the seed."""
    order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(settings.seed))
    some = samples.pick(order[: settings.max_images].sort().values)
    logits, labels = predict(model, (some.images, some.labels))
    if int(labels.min()) < 0 or int(labels.max()) >= logits.shape[1]:
        raise ModelError(
            f"labels from {int(labels.min())} to {int(labels.max())}", allowed=f"0 to {logits.shape[1] - 1}"
        )
    shape = tuple(some.images.shape[1:])
    features = penultimate_features(model, some.images, input_shape=shape)
    return Look(features, answers_of(logits).eq(labels), labels)


def _names(new: Data | None, classes: Sequence[str] | None) -> tuple[str, ...]:
    """Return the names of the classes, as far as they are known."""
    if classes is not None:
        return tuple(classes)
    return new.classes if isinstance(new, Dataset) else ()


def _counts(arrived: Samples, known: int, names: Sequence[str]) -> dict[str, int]:
    """Return the number of images of each new class; one without a name is called by its number."""
    labels, counts = arrived.labels[arrived.labels >= known].unique(return_counts=True)
    pairs = zip(labels.tolist(), counts.tolist(), strict=True)
    return {names[label] if label < len(names) else str(label): count for label, count in pairs}
