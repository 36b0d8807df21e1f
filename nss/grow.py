"""Room for new classes: the old knowledge condensed into its critical neurons, columns and heads added beside it."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from nss.anatomy import dissect
from nss.apply import refitted
from nss.contexts import seeded
from nss.data import Data, train_part
from nss.errors import ExtendError
from nss.factories import factory_network
from nss.merge import order_units, readings, unit_scores
from nss.model import Classifier, Task, device_of, model_digest, with_network
from nss.profile import Profile
from nss.profile import profile as gather_profile
from nss.routing import Router, choose_views
from nss.samples import whole
from nss.sites import Sites, find_sites
from nss.slice import SemanticSlices
from nss.steps import first_of_each
from nss.surgery import cut
from nss.told import features_of
from nss.units import Units, find_units
from nss.weight_masks import refuse_masks
from nss.wiring import Columns, read_earlier, refuse_unfit

REFITTED_ON = 4000
"""images, as many of each class"""


@dataclass(frozen=True)
class Capacity:
    """The neurons of one layer."""

    total: int
    """that the factory gives it"""
    used: tuple[int, ...]
    """by each task, in the order in which they were learned"""

    @property
    def free(self) -> int:
        """How many are left for further tasks before the layer is widened."""
        return max(0, self.total - sum(self.used))

    @property
    def widened(self) -> int:
        """How many it has more than the factory gives it."""
        return max(0, sum(self.used) - self.total)


def condense(
    model: Classifier,
    slices: SemanticSlices,
    old_data: Data,
    *,
    profile: Profile | None = None,
    share: float = 0.85,
    seed: int = 0,
) -> Classifier:
    """Return `model` with its knowledge in its critical neurons alone, and with what tells its classes from later ones.

    What it answers then is what it answers for ever, however often it is extended; no old image is needed any more.
    slices: of this model. old_data: what it was trained on; of a Dataset the train split is used. profile: of this
    model, with Gram matrices; gathered when not given. share: of each layer's neurons that are critical, chosen by what
    they explain of what is read (see nss.order_units) and refitted to the original's outputs; 1 keeps all, and every
    answer bit for bit.
    Source: NeuSemSlice, arXiv 2407.20281, section 3; merging and refit are ours, docs/restructure.md.
    Raises ExtendError for a model that was extended before, or that cannot be, or is not in float32; for slices or a
    profile of another model; and for classes without an image.

    >>> ready = condense(model, slices, nss.load_data("data"))
    """
    _check_old(model, slices, share)
    refuse_unfit(dissect(model.network, model.spec.input_shape))
    samples = whole(train_part(old_data))
    found = torch.bincount(samples.labels, minlength=len(model.spec.classes))
    missing = [name for name, count in zip(model.spec.classes, found.tolist(), strict=False) if not count]
    if missing or len(found) > len(model.spec.classes):
        raise ExtendError(
            f"the old data has {'no image of ' + ', '.join(missing) if missing else 'classes the model does not know'}",
            where="old_data",
            allowed=f"images of each of {', '.join(model.spec.classes)}",
        )
    smaller = copy.deepcopy(model)
    if share < 1:
        if profile is None:
            profile = gather_profile(model, (samples.images, samples.labels), ("taylor",))
        _check_profile(model, profile)
        images, _ = first_of_each(samples.images, samples.labels, max(1, REFITTED_ON // len(found)))
        smaller = _condensed(model, profile, images, share, seed)
    views, features = choose_views(smaller.network, model.spec.input_shape)
    router = Router(views, features, [len(found)]).to(device_of(model))
    network = Columns([smaller.network], model.spec.input_shape, router)
    changes = {"kept": {}, "views": views, "features": features, "parent": model_digest(model)}
    task = Task(len(found), smaller.spec.kept)
    ready = cast(Classifier, with_network(model, network, tasks=(task,), **changes)).eval()
    router.learn(features_of(ready, (samples.images, samples.labels)))
    return ready


def _check_old(model: Classifier, slices: SemanticSlices, share: float) -> None:
    if not isinstance(model, Classifier):
        raise ExtendError(f"{type(model).__name__} does not say how it is built", fix="make it with nss.build_model")
    if model.spec.tasks:
        raise ExtendError("the model was condensed or extended before", fix="extend it as it is")
    if slices.classes != model.spec.classes:
        raise ExtendError("the slices are of other classes", fix="slice this model")
    if not 0 < share <= 1:
        raise ExtendError(f"share is {share}", where="share", allowed="above 0, at most 1")
    refuse_masks(model, "extending", ExtendError)
    require_float32(model)


def require_float32(model: Classifier) -> None:
    """Raise ExtendError for a model with weights of another precision.

    >>> require_float32(model.float())
    """
    if other := {parameter.dtype for parameter in model.parameters()} - {torch.float32}:
        raise ExtendError(
            f"the model has weights in {', '.join(sorted(str(each).removeprefix('torch.') for each in other))}",
            where="model",
            allowed="float32, which new columns and the router are made in",
            fix="extend model.float(), with a profile of that",
        )


def _check_profile(model: Classifier, profile: Profile) -> None:
    if profile.model != model_digest(model) or not profile.grams:
        raise ExtendError(
            "the profile is of another model, or without Gram matrices",
            where="profile",
            fix="profile this model with gram=True",
        )


def _condensed(model: Classifier, profile: Profile, images: Tensor, share: float, seed: int) -> Classifier:
    sites = find_sites(model.network, model.spec.input_shape)
    units = find_units(sites)
    read = list(readings(model.network, sites, profile))
    scores = unit_scores(profile, sites, units)
    orders = [order_units(group.units, units.of, read, scores[group.units]).units for group in units.groups]
    return refitted(model, sites, read, _first_units(sites, units, orders, share), images, seed)


def _first_units(sites: Sites, units: Units, orders: Sequence[Tensor], share: float) -> Tensor:
    """Return the channels of the first `share` of each group's units, and of one of each layer at least."""
    kept = ~units.removable
    for order in orders:
        kept[order[: max(1, round(share * len(order)))]] = True
    place = torch.cat([*orders, torch.zeros(0, dtype=torch.int64)])
    for site in sites:
        own = units.of[site.ids].unique()
        if not bool(kept[own].any()):
            kept[place[torch.isin(place, own)][0]] = True
    return units.channels(kept)


def add_column(model: Classifier, names: Sequence[str], width: float, seed: int) -> Classifier:
    """Return a copy of a condensed model with a column more, untrained, and the classes `names` at the end.

    width: share of the factory's neurons that each layer of the column has. The last gate is still to be opened.
    """
    spec = model.spec
    column = factory_network(spec, len(names), seed, None)
    sites = find_sites(column, spec.input_shape)
    units = find_units(sites)
    spread = [group.units[_spread(len(group.units), width)] for group in units.groups]
    left = cut(column, sites, _first_units(sites, units, spread, 1.0))
    kept = {site.module: tuple(left[site.name].nonzero()[:, 0].tolist()) for site in sites}
    kept = {module: indices for module, indices in kept.items() if len(indices) < _outputs(sites, module)}
    twin = copy.deepcopy(cast(Columns, model.network))
    columns = list(twin.columns)
    with seeded(seed, device_of(column)):
        read_earlier(column, columns, spec.input_shape)
    tasks = (*spec.tasks, Task(len(names), kept))
    router = Router(spec.views, spec.features, [task.classes for task in tasks])
    router.take_over(twin.router)
    network = Columns([*columns, column.to(device_of(model))], spec.input_shape, router.to(device_of(model)))
    changes = {"classes": (*spec.classes, *names), "tasks": tasks, "parent": model_digest(model)}
    return cast(Classifier, with_network(model, network, **changes)).eval()


def _spread(count: int, width: float) -> Tensor:
    """Return that share of 0..count-1, evenly spaced, one at least."""
    wanted = min(count, max(1, round(width * count)))
    return torch.arange(wanted) * count // wanted


def _outputs(sites: Sites, module: str) -> int:
    return next(len(site) for site in sites if site.module == module)


def capacity(model: Classifier) -> dict[str, Capacity]:
    """Return {layer of the factory's network: its neurons by task}. model: condensed or extended.

    >>> capacity(nss.extend(model, slices, new, old_data=old).model)["hidden"].free
    0
    """
    sites = find_sites(factory_network(model.spec, 2, 0, None), model.spec.input_shape)
    return {
        site.name: Capacity(
            len(site), tuple(len(task.kept.get(site.module, range(len(site)))) for task in model.spec.tasks)
        )
        for site in sites
    }
