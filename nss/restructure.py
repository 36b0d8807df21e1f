"""Restructuring: a smaller model that keeps its classes (method.md 5).

Plan, then apply. The plan chooses, from the profile and the slices, which neurons stay for a budget; applying it folds
what leaves into what stays, removes it physically, and refits the rest to the original's outputs, without a gradient
step. Fine-tuning afterwards is optional.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any

from nss.apply import apply_plan
from nss.data import Data, train_part, val_part
from nss.errors import DataError, RestructureError
from nss.evaluate import evaluate
from nss.finetune import fine_tune
from nss.latency import LATENCY_BATCH, measured_latency
from nss.level import level_classes
from nss.model import Classifier
from nss.plan import RestructurePlan
from nss.planner import Planner
from nss.predict import SLACK
from nss.profile import Profile, profile
from nss.size import count_macs, count_parameters
from nss.slice import SemanticSlices
from nss.steps import trainable

_LOG = logging.getLogger(__name__)
BUDGETS = ("macs", "params", "latency_ms", "max_accuracy_drop")
TRIALS = 6
"""halvings of the range of multiply-adds in search of a latency or an accuracy"""
LEVELLED = "levelled"


@dataclass(frozen=True)
class Point:
    """A model on the way from the original to the result. Accuracies are shares of 1, None without held-out images."""

    name: str
    macs: int
    parameters: int
    accuracy: float | None
    per_class: dict[str, float] | None


@dataclass(frozen=True)
class Restructured:
    """A smaller model, the plan that it follows, and what came of it."""

    model: Classifier
    plan: RestructurePlan
    report: tuple[Point, ...]
    """original, refitted (no gradient step was taken yet) and, when asked for and no worse, fine-tuned; levelled, when
    asked for and something moved; the last is of `model`"""
    curve: tuple[Point, ...] = ()
    """refitted models at other sizes, as asked for by `curve`"""
    offsets: dict[str, float] = field(default_factory=dict)
    """what levelling added to the logit of each class that it raised"""

    def to_dict(self) -> dict[str, Any]:
        """Return the plan, the report and the offsets as plain numbers, lists and texts."""
        rows = {"report": self.report, "curve": self.curve}
        points = {name: [asdict(each) for each in of] for name, of in rows.items()}
        return {"plan": self.plan.to_dict(), **points, "offsets": dict(self.offsets)}


@dataclass(frozen=True)
class _Job:
    """What stays the same for every candidate of one call."""

    model: Classifier
    data: Data
    profiled: Profile
    held_out: Data | None
    seed: int
    fine_tune_steps: int
    learning_rate: float
    distil: bool
    level: bool

    @cached_property
    def original(self) -> Point:
        """The model as it is."""
        return self.point("original", self.model)

    def build(self, plan: RestructurePlan) -> Restructured:
        """Carry a plan out and measure every step of it."""
        smaller = apply_plan(self.model, plan, self.data, self.profiled, seed=self.seed)
        refitted = self.point("refitted", smaller)
        points = [self.original, refitted]
        if self.fine_tune_steps:
            tuned = self._fine_tuned(smaller)
            after = self.point("fine-tuned", tuned)
            if _is_worse(refitted, after):
                # A refitted model is near a good one already: steps that are too long only lead away.
                _LOG.info("fine-tuning lost accuracy, %s to %s: not kept", refitted.accuracy, after.accuracy)
            else:
                smaller, points = tuned, [*points, after]
        offsets = self._level(smaller) if self.level else {}
        if offsets:
            points.append(self.point(LEVELLED, smaller))
        return Restructured(smaller, plan, tuple(points), offsets=offsets)

    def _level(self, smaller: Classifier) -> dict[str, float]:
        if self.held_out is None:
            _LOG.warning("not levelled: there are no held-out images")
            return {}
        return level_classes(smaller, self.held_out)

    def _fine_tuned(self, smaller: Classifier) -> Classifier:
        tuned, teacher = copy.deepcopy(smaller), self.model if self.distil else None
        fine_tune(tuned, self.data, self.fine_tune_steps, self.seed, learning_rate=self.learning_rate, teacher=teacher)
        return tuned

    def refitted(self, planner: Planner, share: float) -> Point:
        """Measure what is left of the model at a share of the multiply-adds, without a gradient step."""
        plan = planner.plan(macs=share)
        return self.point(f"{share:g}", apply_plan(self.model, plan, self.data, self.profiled, seed=self.seed))

    def point(self, name: str, model: Classifier) -> Point:
        """Measure one model."""
        found = evaluate(model, self.held_out) if self.held_out is not None else None
        accuracy, per_class = (found.accuracy, found.per_class) if found else (None, None)
        return Point(name, count_macs(model), count_parameters(model), accuracy, per_class)


def _is_worse(before: Point, after: Point) -> bool:
    return before.accuracy is not None and after.accuracy is not None and after.accuracy < before.accuracy


def restructure(
    model: Classifier,
    slices: SemanticSlices,
    data: Data,
    profiled: Profile | None = None,
    *,
    macs: float | None = None,
    params: float | None = None,
    latency_ms: float | None = None,
    max_accuracy_drop: float | None = None,
    held_out: Data | None = None,
    cap: float = 0.9,
    multiple: int = 1,
    fine_tune_steps: int = 0,
    learning_rate: float = 0.02,
    distil: bool = False,
    level: bool = False,
    curve: Sequence[float] = (),
    seed: int = 0,
) -> Restructured:
    """Make `model` smaller within one budget; the original is left as it is.

    macs, params: the share of multiply-adds or weights that may be left, kept to within a unit of neurons.
    latency_ms: median milliseconds for a batch of 64 on this machine. max_accuracy_drop: share of accuracy that may be
    lost on the held-out images, as large as possible a saving within it.
    slices: of this model; no slice's answers are sacrificed for the others'. data: a Dataset (fitted on its train
    split, its val split is held out), or anything `iter_batches` takes. profiled: with Gram matrices; gathered when
    not given. held_out: to judge on, default the val split. cap: the largest share of a layer's neurons that may go.
    multiple: layers keep a multiple of so many neurons as far as the budget allows, 8 or 16 for fast kernels.
    fine_tune_steps: gradient steps afterwards, of batches of 128, which are not kept where they make the model worse on
    the held-out images; distil: with the original as a teacher.
    level: raise the worst class in the end, as far as that costs no accuracy on the held-out images
    (`level_classes`); where there are none, nothing moves.
    curve: shares of the multiply-adds at which a refitted model is measured too; those below the cap are left out.
    Source: NeuSemSlice, arXiv 2407.20281, section 4 (keep the critical neurons, remove the rest); merging, refit and
    budgets are ours, docs/restructure.md. Raises RestructureError for none or several budgets, one that cannot be
    reached (with what can), slices and a profile of another model, or numbers that are not finite; ModelError for what
    `fine_tune` refuses, before the work begins when no parameter requires a gradient; DataError for an iterator of
    batches, which can be read only once.

    >>> smaller = nss.restructure(model, slices, nss.load_data("data"), macs=0.5)
    >>> [(point.name, point.macs, point.accuracy) for point in smaller.report]
    [('original', 11949056, 0.9407), ('refitted', 5974000, 0.9366)]
    """
    given = {"macs": macs, "params": params, "latency_ms": latency_ms, "max_accuracy_drop": max_accuracy_drop}
    budget = {name: value for name, value in given.items() if value is not None}
    if len(budget) != 1:
        raise RestructureError(
            f"{len(budget)} budgets are given", where=", ".join(budget), allowed=" or ".join(BUDGETS)
        )
    if isinstance(data, Iterator):
        raise DataError(
            "a generator can be read only once",
            where="data",
            fix="give a list of batches, a DataLoader or a Dataset",
        )
    if fine_tune_steps:
        trainable(model.parameters())
    if profiled is None:
        profiled = profile(model, train_part(data), ("taylor",))
    planner = Planner(model, slices, data, profiled, cap=cap, multiple=multiple)
    judged = val_part(data) if held_out is None else held_out
    job = _Job(model, data, profiled, judged, seed, fine_tune_steps, learning_rate, distil, level)
    if latency_ms is not None:
        found = job.build(_for_latency(planner, latency_ms))
    elif max_accuracy_drop is not None:
        found = _for_accuracy(planner, job, max_accuracy_drop)
    else:
        found = job.build(planner.plan(macs=macs, params=params))
    return replace(found, curve=tuple(job.refitted(planner, share) for share in curve if share >= planner.least))


def _for_latency(planner: Planner, target: float) -> RestructurePlan:
    """Return the largest plan that is fast enough; what is removed decides that, not the weights."""

    def fast_enough(plan: RestructurePlan) -> bool:
        return measured_latency(planner.shape_of(plan)) <= target

    smallest = planner.plan(macs=planner.least)
    if not fast_enough(smallest):
        possible, now = measured_latency(planner.shape_of(smallest)), measured_latency(planner.model)
        raise RestructureError(
            f"{target} ms for a batch of {LATENCY_BATCH} cannot be reached",
            where=f"at most {planner.cap:.0%} of a layer may leave",
            allowed=f"from about {possible:.2f} ms; now {now:.2f} ms",
            fix="ask for more, or raise cap",
        )
    plan = _nearest(planner, fast_enough, sure=planner.least, unsure=1.0) or smallest
    return replace(plan, budget={"latency_ms": target})


def _nearest(
    planner: Planner, holds: Callable[[RestructurePlan], bool], *, sure: float, unsure: float
) -> RestructurePlan | None:
    """Halve the way between a share of multiply-adds that holds and one that may not; return the last plan that did."""
    found = None
    for _ in range(TRIALS):
        middle = (sure + unsure) / 2
        plan = planner.plan(macs=middle)
        if holds(plan):
            sure, found = middle, plan
        else:
            unsure = middle
    return found


def _for_accuracy(planner: Planner, job: _Job, drop: float) -> Restructured:
    """Return the smallest model whose held-out accuracy stays within `drop` of the original's."""
    if job.held_out is None:
        raise RestructureError("there are no held-out images to measure the accuracy on", fix="pass held_out")
    if not 0 <= drop < 1:
        raise RestructureError(f"max_accuracy_drop is {drop}", allowed="a share of 1, from 0 to below 1")
    floor = (job.original.accuracy or 0.0) - drop
    built: dict[int, Restructured] = {}

    def good_enough(plan: RestructurePlan) -> bool:
        built[plan.macs] = job.build(plan)
        # Not the levelled one: its offsets were chosen by the very images that are judged on.
        last = [point for point in built[plan.macs].report if point.name != LEVELLED][-1]
        return (last.accuracy or 0.0) >= floor - SLACK

    found = _nearest(planner, good_enough, sure=1.0, unsure=planner.least)
    if found is None:
        best = max(point.accuracy or 0.0 for each in built.values() for point in each.report[1:])
        raise RestructureError(
            f"no smaller model stays within {drop} of the accuracy",
            allowed=f"from {floor + drop - best:.4f} on",
            fix="allow a larger drop, or fine-tune (fine_tune_steps)",
        )
    chosen = built[found.macs]
    return replace(chosen, plan=replace(chosen.plan, budget={"max_accuracy_drop": drop}))
