"""Extend: learn new classes, nothing forgotten, and nobody has to be told the task (method.md 7)."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, cast

import torch
from torch import Tensor

from nss.data import Data, Dataset
from nss.errors import ExtendError
from nss.extend_course import ExtendEpoch, Settings, train_column
from nss.extend_report import Told, judge
from nss.grow import Capacity, add_column, capacity, condense, require_float32
from nss.model import Classifier
from nss.profile import Profile
from nss.routing import fit_mix
from nss.samples import Samples, drawn, joined, old_parts, parts, rank_in_class
from nss.size import count_parameters
from nss.slice import SemanticSlices
from nss.told import blend, features_of, parts_of
from nss.weight_masks import refuse_masks
from nss.wiring import Columns

# Of the replayed images of a class so many are kept back, to weigh the evidence for old and new by: every fourth.
KEPT_BACK = 4
NOTHING = torch.zeros(0, dtype=torch.int64)


@dataclass(frozen=True)
class ExtendReport:
    """What was learned, what it did to the old classes, and the room that is left. Accuracies are shares of 1."""

    classes: tuple[str, ...]
    """the new ones, in the order of their logits"""
    curve: tuple[ExtendEpoch, ...]
    accuracies: Told
    """on held-out images, told the task and not"""
    before: float | None
    """accuracy of the model that was given on the held-out old images"""
    capacity: dict[str, Capacity]
    shrinkage: float
    """of the covariance that the tasks are told apart by"""
    replayed: int
    """old images that were used"""
    trained_share: float
    """of all weights of the extended model"""
    steps: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain numbers, texts and lists."""
        layers = {
            name: {**asdict(each), "free": each.free, "widened": each.widened} for name, each in self.capacity.items()
        }
        return {**asdict(self), "capacity": layers}


@dataclass(frozen=True)
class Extended:
    """A model that knows more classes, and how it came about."""

    model: Classifier
    report: ExtendReport


def extend(
    model: Classifier,
    slices: SemanticSlices | None,
    new_data: Data,
    replay: float = 0.0,
    *,
    profile: Profile | None = None,
    old_data: Data | None = None,
    classes: Sequence[str] | None = None,
    share: float = 0.85,
    width: float = 0.3,
    learning_rate: float = 0.05,
    epochs: int = 3,
    batch_size: int = 64,
    weight_decay: float = 5e-4,
    seed: int = 0,
) -> Extended:
    """Teach `model` classes it does not know; the logits of those it knows stay bit for bit what they are.

    The first time, the old knowledge is condensed into a share of each layer (see `condense`), which moves the old
    logits once; with share=1 they do not move at all. Then, and every further time, new neurons are put beside the old
    ones: they read the old ones and are read by none of them. The model answers for all classes at once.
    slices, profile: of the model, for condensing; a condensed model needs neither. new_data: labelled images of new
    classes, whose indices follow those of the known ones; images of known classes among them are replayed. replay:
    share of the old training images that are used beside the new ones, at least one a class; what it gains is small
    (docs/extend.md). old_data: needed for condensing and for replay, used to report old accuracy; of a Dataset that
    goes on with further classes, the images of known ones are taken. classes: names of the new classes, when new_data
    is no Dataset. share: see `condense`. width: share of the factory's neurons that each layer gets for the new
    classes: free ones first, then it is widened. learning_rate: the largest of a one-cycle schedule.
    batch_size: images of a step, a third of them old ones at most, when those are replayed.
    Source: NeuSemSlice, arXiv 2407.20281, section 3 (freeze the critical neurons, train the rest); one-way wiring and
    routing are ours, method.md 7.
    Raises ExtendError when there is no new class, a new class has no image or no name, old data is needed and not
    given, or has labels that the model does not know, settings are out of range, the network cannot be extended or is
    not in float32, or the loss is not finite any more.

    >>> result = nss.extend(model, slices, nss.load_data("new"), old_data=nss.load_data("data"))
    >>> result.report.accuracies.new, result.report.accuracies.new_told
    (0.92, 0.977)
    """
    started = time.perf_counter()
    settings = Settings(epochs, batch_size, learning_rate, weight_decay)
    _check(settings, replay, width)
    _check_model(model)
    new, held_out, names = _new_samples(model, new_data, classes, seed)
    old, judged = (None, held_out.pick(NOTHING)) if old_data is None else _old_samples(model, old_data, seed)
    ready = model if model.spec.tasks else _condensed(model, slices, old, profile, share, seed)
    known = len(model.spec.classes)
    memory, kept_back = _memory(new, old, replay, known, seed)
    new = new.pick(new.labels >= known)
    grown = add_column(ready, names, width, seed)
    network = cast(Columns, grown.network)
    network.router.learn(features_of(grown, (new.images, new.labels)))
    curve, steps = train_column(grown, new, held_out, memory, settings, seed)
    shrinkage = _open(grown, new, held_out, kept_back)
    report = ExtendReport(
        classes=tuple(names),
        curve=tuple(curve),
        accuracies=judge(grown, joined(held_out, judged), known),
        before=judge(model, judged, known).overall,
        capacity=capacity(grown),
        shrinkage=shrinkage,
        replayed=len(memory) + len(kept_back),
        trained_share=count_parameters(network.columns[-1]) / count_parameters(grown),
        steps=steps,
        seconds=time.perf_counter() - started,
    )
    return Extended(grown, report)


def _check(settings: Settings, replay: float, width: float) -> None:
    ranges = {
        "replay": (replay, 0 <= replay <= 1, "0 to 1"),
        "width": (width, 0 < width <= 1, "above 0, at most 1"),
        "epochs": (settings.epochs, settings.epochs >= 1, "from 1"),
        "batch_size": (settings.batch_size, settings.batch_size >= 1, "from 1"),
        "learning_rate": (settings.learning_rate, 0 < settings.learning_rate < float("inf"), "above 0"),
        "weight_decay": (settings.weight_decay, 0 <= settings.weight_decay < float("inf"), "0 or above"),
    }
    for name, (value, fits, allowed) in ranges.items():
        if not fits:
            raise ExtendError(f"{name} is {value}", where=name, allowed=allowed)


def _check_model(model: Classifier) -> None:
    if not isinstance(model, Classifier):
        raise ExtendError(f"{type(model).__name__} does not say how it is built", fix="make it with nss.build_model")
    if model.spec.tasks and model.spec.kept:
        raise ExtendError("the model was made smaller after it was extended", fix="restructure it before extending it")
    refuse_masks(model, "extending", ExtendError)
    require_float32(model)


def _old_samples(model: Classifier, data: Data, seed: int) -> tuple[Samples, Samples]:
    """Return the old samples to learn from and those to judge on, of the classes that the model knows."""
    known = model.spec.classes
    if isinstance(data, Dataset) and data.classes[: len(known)] == known:
        # New classes arrive in the folder that the old ones are in.
        data = data.of_classes(known)
    return old_parts(data, known, seed, ExtendError)


def _new_samples(
    model: Classifier, data: Data, classes: Sequence[str] | None, seed: int
) -> tuple[Samples, Samples, tuple[str, ...]]:
    """Return the new samples to train on, those of new classes to hold out, and the names of the new classes."""
    known = model.spec.classes
    new, held_out = parts(data, seed)
    if not len(new):
        raise ExtendError("there are no new samples", where="new_data", fix="give a few labelled images")
    if int(new.labels.max()) < len(known):
        raise ExtendError(
            "the new samples show no class that the model does not know",
            where="new_data",
            allowed=f"labels from {len(known)} on",
            fix="follow new samples of known classes with nss.readapt",
        )
    names = _names(known, data, classes)
    found = torch.bincount(new.labels.clamp_min(0), minlength=len(known) + len(names))[len(known) :]
    if len(found) > len(names) or int(new.labels.min()) < 0:
        raise ExtendError(
            f"the labels go from {int(new.labels.min())} to {int(new.labels.max())}",
            where="new_data",
            allowed=f"0 to {len(known) + len(names) - 1}",
            fix="name each new class once, in the order of the labels",
        )
    if missing := [name for name, count in zip(names, found.tolist(), strict=True) if not count]:
        raise ExtendError(
            f"there is no image of {', '.join(missing)} to learn from", where="new_data", allowed="from 1"
        )
    return new, held_out.pick(held_out.labels >= len(known)), names


def _names(known: tuple[str, ...], data: Data, classes: Sequence[str] | None) -> tuple[str, ...]:
    if classes is None and not isinstance(data, Dataset):
        raise ExtendError("the new classes have no names", where="classes", allowed="a name for each new class")
    names = (*known, *classes) if classes is not None else cast(Dataset, data).classes
    if names[: len(known)] != known or len(set(names)) < len(names):
        raise ExtendError(
            f"the classes are {list(names)}",
            where="classes" if classes is not None else "new_data",
            allowed=f"first {list(known)}, then new names, each once",
            fix="a new class comes last, whatever its name",
        )
    return names[len(known) :]


def _condensed(
    model: Classifier,
    slices: SemanticSlices | None,
    old: Samples | None,
    profile: Profile | None,
    share: float,
    seed: int,
) -> Classifier:
    if slices is None or old is None:
        raise ExtendError(
            "the old knowledge was not condensed yet, which takes its slices and the data it was learned from, once",
            where="slices" if slices is None else "old_data",
            fix="pass both; the extended model does not need them again",
        )
    return condense(model, slices, (old.images, old.labels), profile=profile, share=share, seed=seed)


def _memory(new: Samples, old: Samples | None, replay: float, known: int, seed: int) -> tuple[Samples, Samples]:
    """Return old images to train on, and those to weigh evidence by: drawn by class, and those among the new ones."""
    again = new.pick(new.labels < known)
    if replay and old is None:
        raise ExtendError(f"replay is {replay} without old data", where="old_data", fix="give old data")
    if replay and old is not None:
        again = joined(again, old.pick(drawn(old.labels, replay, seed, least=1)))
    back = rank_in_class(again.labels) % KEPT_BACK == KEPT_BACK - 1
    return again.pick(~back), again.pick(back)


@torch.no_grad()
def _open(model: Classifier, new: Samples, held_out: Samples, old: Samples) -> float:
    """Set the last gate from the statistics, and weigh what it goes by with images that were not trained on.

    With new ones, how far the statistics are heard beside the column; with old ones, how far beside the odds of both.
    Returns the shrinkage.
    """
    router = cast(Columns, model.network).router
    unseen, remembered = _read(model, held_out), _read(model, old)
    features = torch.cat([torch.zeros(0, router.features), *(seen.cpu() for _, seen, _ in (*unseen, *remembered))])
    shrinkage = router.open_gate(features, torch.cat([held_out.labels, old.labels]))
    blend(router, len(router.gates) - 1, unseen)
    if remembered:
        rows = [*(unseen or _read(model, new)), *remembered]
        seen = torch.cat([router.evidence(logits, features) for logits, features, _ in rows])
        router.mixes[-1] = fit_mix(seen, torch.arange(len(seen)) < len(seen) - len(old))
    return shrinkage


def _read(model: Classifier, samples: Samples) -> list[tuple[list[Tensor], Tensor, Tensor]]:
    """Return what `parts_of` yields; nothing of no images."""
    return list(parts_of(model, (samples.images, samples.labels))) if len(samples) else []
