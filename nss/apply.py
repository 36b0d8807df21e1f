"""Carrying a plan out: merge, cut, and refit to the original, without a gradient step (method.md 5)."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import cast

from torch import Tensor

from nss.contexts import evaluating
from nss.data import Data, Dataset, train_part
from nss.errors import RestructureError
from nss.merge import Reading, fold, readings
from nss.model import Classifier
from nss.narrow import narrow
from nss.plan import RestructurePlan
from nss.profile import Profile
from nss.refit import refit
from nss.remove import cut_out
from nss.shards import first_of_each_class
from nss.sites import Sites, find_sites
from nss.steps import first_of_each, training_images
from nss.told import route_by
from nss.units import find_units
from nss.weight_masks import refuse_masks


def apply_plan(
    model: Classifier, plan: RestructurePlan, data: Data, profiled: Profile, *, seed: int = 0, images: int = 4000
) -> Classifier:
    """Return the smaller model that `plan` says: merged, cut, and refitted to the original's outputs.

    data: what to refit on, `images` of it, as many of each category; no gradient step is taken. Ready to train on,
    with a fresh optimizer. Of an extended model the columns become smaller, and its router learns anew from the data.
    Raises RestructureError for a plan of another model, layers or neurons that do not exist, and numbers that are not
    finite; ModelError when there are no images; DataError for an iterator of batches that was read before.

    >>> smaller = nss.apply_plan(model, plan, data, profile)
    """
    refuse_masks(model, "restructuring", RestructureError)
    sites = find_sites(model.network, model.spec.input_shape)
    plan.check(model, sites)
    units = find_units(sites)
    stay = units.channels(units.kept(plan.neurons(), sites))  # what cannot leave stays as it is
    sample, _ = calibration(data, max(1, images // len(model.spec.classes)))
    smaller = refitted(model, sites, list(readings(model.network, sites, profiled)), stay, sample, seed)
    if model.spec.tasks:
        narrow(smaller)
        route_by(smaller, training_images(data), data)
    smaller.spec = replace(smaller.spec, parent=plan.model)
    return smaller


def calibration(data: Data, count: int) -> tuple[Tensor, Tensor]:
    """Return the first `count` training images of each category, and their labels; of a Dataset no other is read.

    Raises ModelError when there are none, and DataError for an iterator of batches that was read before.
    """
    part = train_part(data)
    if isinstance(part, Dataset):
        return training_images(first_of_each_class(part, count))
    return first_of_each(*training_images(part), count)


def refitted(
    model: Classifier, sites: Sites, read: Sequence[Reading], stay: Tensor, images: Tensor, seed: int
) -> Classifier:
    """Return what `merged` makes, refitted to the original's outputs on images [n, c, h, w]. stay: bool [channels]."""
    smaller = merged(model, sites, read, stay)
    left = {producer.name: stay[producer.out_ids] for producer in sites.anatomy.producers}
    with evaluating(model), evaluating(smaller):
        refit(model, smaller, left, images, seed=seed)
    return smaller


def merged(model: Classifier, sites: Sites, read: Sequence[Reading], stay: Tensor) -> Classifier:
    """Return a smaller copy of `model` with what leaves folded into what stays. stay: bool [channels]."""
    folded = copy.deepcopy(model)
    for reading in read:
        fold(folded.network, reading, stay)
    return cast(Classifier, cut_out(folded, sites, {site.name: stay[site.ids] for site in sites}))
