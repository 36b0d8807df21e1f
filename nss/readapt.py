"""Re-adaptation: follow new samples by tuning critical neurons only, without losing what worked (method.md 6)."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, cast

import torch
from torch import nn

from nss.contexts import seeded
from nss.course import Course, Memory, ReadaptEpoch, Settings
from nss.data import Data, Dataset
from nss.errors import ReadaptError
from nss.freeze import freeze, thaw
from nss.guard import Guard
from nss.model import Classifier, device_of, model_digest, network_of, with_network
from nss.predict import predict
from nss.profile import Profile
from nss.profile import profile as gather_profile
from nss.samples import Samples, drawn, old_parts, parts, unknown_labels
from nss.sites import find_sites
from nss.size import count_parameters
from nss.slice import SemanticSlices
from nss.told import check_classes, route_anew, tasks_apart, within_task
from nss.tunable import tunable_neurons
from nss.weight_masks import refuse_unowned
from nss.whitened import WhitenedAdam

# Images of the old data on which the learning curve is drawn.
JUDGED = 1000
# Images of each class that the profile is gathered from when there is none.
GUARDED = 100


@dataclass(frozen=True)
class ReadaptReport:
    """What was tuned and what it came to."""

    curve: tuple[ReadaptEpoch, ...]
    kept_epoch: int
    """the epoch whose weights the model has; 0: nothing was better than the original"""
    stopped: str
    """why there was no further epoch"""
    categories: tuple[str, ...]
    """the affected ones: of the new samples, or those that were named"""
    neurons: dict[str, tuple[int, int]]
    """{layer: (neurons tuned, neurons)}"""
    trained_share: float
    """of all weights of the model"""
    moved_share: float
    """of all weights of the model, those that are not what they were"""
    steps: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain numbers, texts and lists."""
        return asdict(self)


@dataclass(frozen=True)
class Readapted:
    """A model that follows the new samples, and how it came about."""

    model: nn.Module
    report: ReadaptReport


def readapt(
    model: nn.Module,
    slices: SemanticSlices,
    new_data: Data,
    old_data: Data | None = None,
    *,
    profile: Profile | None = None,
    share: float = 0.2,
    guard: float = 1.0,
    learning_rate: float = 0.002,
    epochs: int = 10,
    batch_size: int = 64,
    seed: int = 0,
    replay: float = 0.0,
    distil: float = 0.0,
    categories: Sequence[str] | None = None,
    patience: int = 5,
) -> Readapted:
    """Tune the critical neurons worth most to the new samples; every other number stays bit for bit what it was.

    slices: of this model; they say which neurons may be tuned (see `tunable_neurons`). new_data: a few labelled samples
    of the classes that the model knows. old_data: what it was made for, or a part; optional, never trained on unless
    `replay` says so, used to report old accuracy and to stop. profile: of this model on old data, with `windows`:
    the choice of neurons, the steps and the guard against forgetting live from it and need no old image; without it,
    it is gathered from old_data, and with guard 0 and none of both from the new samples.
    share: of all weights, at most so many are trained. guard: weight of the guard in the loss; more keeps more of the
    old at the cost of the new, 0 needs no profile; it counts more, by the number of known classes over that of classes
    that the new samples show, since they say nothing about the others. learning_rate: the largest of a one-cycle
    schedule of Adam; a step of 1 changes what a neuron computes on old data by 1, root mean square (`WhitenedAdam`).
    replay: share of the old training images that are trained on too, as many a step as new ones. distil: how much of
    their targets the original's answers are, 0 to 1. categories: the affected ones, default those of the new samples.
    patience: epochs without a better accuracy on held-out new samples after which to stop.
    An extended model is tuned told which task an image is of, and old_data, together with the new samples, teaches its
    router anew what tells the tasks apart, and how much that counts: it takes images of every class to train on.
    Without old_data the router stays as it was, and mistakes more images.

    A part of the new samples (a Dataset's val split, else a tenth of each class) is held out. Of the epochs, the
    original included, whose accuracy there is within one standard error of the best, the one is kept that harms old
    knowledge least: by accuracy on held-out old data where it is given, else by the guard. With too few samples to hold
    any out it is the one with the smallest loss on all of them, guard included.
    Source: NeuSemSlice, arXiv 2407.20281, section 3; the choice of neurons and the guard are method.md 6's.
    Raises ReadaptError when there are no new samples, a label, among old data too, is not known to the model, old data
    and new samples lack a class of an extended model, the profile or the slices are of another model, settings are out
    of range, weights are computed from others or shared by layers, or the loss is not finite any more; SiteError when
    the network, with some neurons frozen, would answer otherwise.

    >>> result = nss.readapt(model, slices, drifted, profile=profile)
    >>> result.report.curve[-1].new_accuracy, result.report.trained_share
    (0.81, 0.2)
    """
    started = time.perf_counter()
    settings = Settings(epochs, batch_size, learning_rate, guard, patience)
    _check(settings, share, replay, distil)
    refuse_unowned(network_of(model), "re-adapting", ReadaptError)
    if isinstance(model, Classifier) and slices.classes != model.spec.classes:
        raise ReadaptError("the slices are of other classes", fix="profile and slice this model")
    new, held_out = _new_samples(new_data, slices, seed)
    settings = replace(settings, guard=guard * len(slices.classes) / len(new.labels.unique()))
    affected = _affected(new, slices, categories)
    tasks = tasks_apart(model)
    old, judged = _old_samples(model, slices, old_data, new, seed)
    memory = _memory(model, old, replay, distil, seed)
    shape = tuple(new.images.shape[1:])
    known = _known(model, slices.classes, profile, old, new, guard)
    neurons = tunable_neurons(model, slices, new.images, new.labels, share, known, affected)
    frozen = freeze(model, neurons, shape)
    keeper = Guard(frozen, find_sites(network_of(model), shape).anatomy, known)
    optimizer = WhitenedAdam(keeper.terms, learning_rate, settings.guard)
    # Made from new samples it says nothing of harm to old knowledge.
    harm = keeper if old or known is profile else None
    course = Course(frozen, new, held_out, judged, memory, harm, settings, optimizer, tasks)
    with seeded(seed, device_of(model)):  # dropout
        stopped = course.run(torch.Generator().manual_seed(seed))
    result, total = _dressed(model, thaw(frozen)), count_parameters(model)
    moved = _moved(model, result)
    if tasks is not None and old is not None:
        learned = [(each.images, each.labels) for each in (old, new) if each]
        others = [(each.images, each.labels) for each in (judged, held_out) if each]
        route_anew(cast(Classifier, result), learned, others)
    report = ReadaptReport(
        curve=tuple(course.curve),
        kept_epoch=course.kept,
        stopped=stopped,
        categories=affected,
        neurons={name: (int(mask.sum()), len(mask)) for name, mask in neurons.items()},
        trained_share=optimizer.count / total,
        moved_share=moved / total,
        steps=course.steps,
        seconds=time.perf_counter() - started,
    )
    return Readapted(result, report)


def _check(settings: Settings, share: float, replay: float, distil: float) -> None:
    ranges = {
        "share": (share, 0 < share <= 1, "above 0, at most 1"),
        "guard": (settings.guard, 0 <= settings.guard < float("inf"), "0 or above"),
        "learning_rate": (settings.learning_rate, 0 < settings.learning_rate < float("inf"), "above 0"),
        "epochs": (settings.epochs, settings.epochs >= 1, "from 1"),
        "batch_size": (settings.batch_size, settings.batch_size >= 1, "from 1"),
        "patience": (settings.patience, settings.patience >= 1, "from 1"),
        "replay": (replay, 0 <= replay <= 1, "0 to 1"),
        "distil": (distil, 0 <= distil <= 1 and (replay > 0 or distil == 0), "0 to 1, above 0 with replay only"),
    }
    for name, (value, fits, allowed) in ranges.items():
        if not fits:
            raise ReadaptError(f"{name} is {value}", where=name, allowed=allowed)


def _new_samples(data: Data, slices: SemanticSlices, seed: int) -> tuple[Samples, Samples]:
    """Return the new samples to train on and those to hold out."""
    new, held_out = parts(data, seed)
    if not len(new):
        raise ReadaptError("there are no new samples", where="new_data", fix="give a few labelled images")
    known = slices.classes
    names = data.classes if isinstance(data, Dataset) else known
    if names[: len(known)] != known[: len(names)]:
        raise ReadaptError(f"the classes of the new samples are {list(names)}", allowed=f"in order: {list(known)}")
    if unknown := unknown_labels((new, held_out), len(known)):
        called = [names[label] if 0 <= label < len(names) else str(label) for label in unknown]
        raise ReadaptError(
            f"the model does not know the class {', '.join(called)}",
            where="new_data",
            allowed=f"0 to {len(known) - 1}: {', '.join(known)}",
            fix="teach it new classes with nss.extend",
        )
    return new, held_out


def _affected(new: Samples, slices: SemanticSlices, categories: Sequence[str] | None) -> tuple[str, ...]:
    """Return the affected categories in the order of the classes."""
    present = {slices.classes[label] for label in new.labels.unique().tolist()}
    wanted = present if categories is None else set(categories)
    if not wanted <= set(slices.classes) or not wanted & present:
        raise ReadaptError(
            f"the affected categories are {sorted(wanted)}",
            where="categories",
            allowed=f"some of {', '.join(slices.classes)}, of which there are new samples",
        )
    return tuple(name for name in slices.classes if name in wanted)


def _old_samples(
    model: nn.Module, slices: SemanticSlices, data: Data | None, new: Samples, seed: int
) -> tuple[Samples | None, Samples | None]:
    """Return old samples and those to judge on; refuse at once what a router could not learn anew from."""
    if data is None:
        return None, None
    old, judged = old_parts(data, slices.classes, seed, ReadaptError)
    if tasks_apart(model) is not None:
        check_classes(
            cast(Classifier, model),
            torch.cat([old.labels, new.labels]),
            ReadaptError,
            "give old data with images of each class, or none: then the router stays as it was",
        )
    order = torch.randperm(len(judged), generator=torch.Generator().manual_seed(seed))
    return old, judged.pick(order[:JUDGED])


def _memory(model: nn.Module, old: Samples | None, replay: float, distil: float, seed: int) -> Memory | None:
    """Return the old samples to train on again, with the original's answers."""
    if old is None:
        if replay:
            raise ReadaptError(f"replay is {replay} without old data", where="old_data", fix="give old data")
        return None
    again = old.pick(drawn(old.labels, replay, seed))
    if not len(again):
        return None
    answers, labels = predict(model, (again.images, again.labels))
    return Memory(again, within_task(answers, labels, tasks_apart(model)), distil)


def _known(
    model: nn.Module,
    classes: Sequence[str],
    profile: Profile | None,
    old: Samples | None,
    new: Samples,
    guard: float,
) -> Profile:
    """Return the profile with what windows see together on old data; without a guard and old data, on new samples."""
    if profile is not None and not (guard or profile.windows):
        profile = None
    if profile is not None and (profile.model != model_digest(model) or not profile.windows):
        raise ReadaptError(
            "the profile is of another model, or does not say what windows see together",
            where="profile",
            fix="profile this model with windows=10, or with windows=1 for few samples",
        )
    if profile is None and not old and guard:
        raise ReadaptError(
            "there is nothing to guard old behaviour by", where="profile", fix="give a profile or old data, or guard=0"
        )
    if profile is not None:
        return profile
    seen = old or new
    return gather_profile(
        model,
        (seen.images, seen.labels),
        ("avg",),
        samples_per_class=GUARDED,
        gram=False,
        windows=1,
        input_shape=tuple(new.images.shape[1:]),
        classes=classes,
    )


def _dressed(model: nn.Module, result: nn.Module) -> nn.Module:
    """Return the result in evaluation mode; a Classifier names the model that it was made from."""
    if isinstance(model, Classifier):
        result = with_network(result, network_of(result), parent=model_digest(model))
    return result.eval()


def _moved(model: nn.Module, result: nn.Module) -> int:
    pairs = zip(model.parameters(), result.parameters(), strict=True)
    return sum(int((before != after).sum()) for before, after in pairs)
