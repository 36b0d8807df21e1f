"""Planning a restructuring: which neurons stay for a budget, and why (method.md 5)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from nss.allocate import Path, find_path, kept_units
from nss.apply import calibration
from nss.cost import cost_model
from nss.data import Data
from nss.errors import RestructureError
from nss.merge import order_units, readings, unit_scores
from nss.model import Classifier, model_digest
from nss.plan import LayerPlan, RestructurePlan
from nss.profile import Profile
from nss.remove import remove
from nss.sensitivity import measure_errors
from nss.sites import find_sites
from nss.slice import SemanticSlices
from nss.units import find_units
from nss.weight_masks import refuse_masks

PROBED = 50
"""training images of each category that sensitivities are measured on"""


class Planner:
    """Everything a plan needs to know about a model, measured once; `plan` then answers for any budget.

    model: made by `build_model`. slices: whose categories must not be sacrificed. data: the train split of a Dataset,
    or all of anything else. cap: the largest share of a layer's neurons that may leave. multiple: layers keep a
    multiple of so many, as far as the budget allows: kernels work on blocks of 8 or 16 channels.
    Raises RestructureError for a cap or a multiple out of range, or slices or a profile of another model; ModelError
    when there are no images; DataError for an iterator of batches that was read before, by the profile say.

    >>> planner = Planner(model, slices, data, profile)
    >>> planner.plan(macs=0.5).macs_share
    0.4996
    """

    def __init__(
        self,
        model: Classifier,
        slices: SemanticSlices,
        data: Data,
        profiled: Profile,
        *,
        cap: float = 0.9,
        multiple: int = 1,
    ) -> None:
        refuse_masks(model, "restructuring", RestructureError)
        _check(model, slices, profiled, cap, multiple)
        self.model, self.slices, self.cap, self.multiple = model, slices, cap, multiple
        self.sites = find_sites(model.network, model.spec.input_shape)
        self.units = find_units(self.sites)
        self.cost = cost_model(model, self.sites)
        self.read = list(readings(model.network, self.sites, profiled))
        scores = unit_scores(profiled, self.sites, self.units)
        self.orders = [
            order_units(each.units, self.units.of, self.read, scores[each.units]) for each in self.units.groups
        ]
        images, labels = calibration(data, PROBED)
        parts = [torch.isin(labels, torch.tensor(each.indices)) for each in slices]
        self.errors = measure_errors(model, self.sites, self.units, self.orders, self.read, images, parts)
        self._paths: dict[str, Path] = {}

    @property
    def least(self) -> float:
        """The smallest share of the multiply-adds that the cap allows."""
        sizes = self.path("macs").sizes
        return sizes[-1] / sizes[0]

    def shape_of(self, plan: RestructurePlan) -> nn.Module:
        """Return a network of the size that `plan` leaves; its answers mean nothing."""
        return remove(self.model, plan.neurons())

    def path(self, what: str) -> Path:
        """Return the way from the whole network to the smallest, by "macs" or by "params"."""
        if what not in self._paths:
            size = self.cost.macs if what == "macs" else self.cost.parameters
            self._paths[what] = find_path(self.units, self.orders, self.errors, size, self.cap)
        return self._paths[what]

    def plan(self, *, macs: float | None = None, params: float | None = None) -> RestructurePlan:
        """Return the plan for a share of the multiply-adds or of the weights: at most that, and as near as units allow.

        Raises RestructureError for a share that cannot be reached, and says which can.
        """
        what, share = ("macs", macs) if macs is not None else ("params", params)
        if share is None or not 0 < share <= 1:
            raise RestructureError(f"the budget is {share}", where=what, allowed="a share above 0, at most 1")
        path = self.path(what)
        # A share that stands for a whole number misses it by rounding.
        target = int(share * path.sizes[0] + 1e-6)
        if path.sizes[-1] > target:
            raise RestructureError(
                f"{what}={share} cannot be reached",
                where=f"at most {self.cap:.0%} of a layer may leave",
                allowed=f"{path.sizes[-1] / path.sizes[0]:.4f} to 1",
                fix="ask for more, or raise cap",
            )
        return self._plan(path.within(target, self.multiple), {what: share})

    def _plan(self, counts: Sequence[int], budget: dict[str, float]) -> RestructurePlan:
        stay = self.units.channels(kept_units(self.units, self.orders, counts))
        whole = torch.ones_like(stay)
        layers = {}
        for place, group in enumerate(self.units.groups):
            for name in group.sites:
                layers[name] = self._layer(name, stay, place, counts[place])
        macs, parameters = self.cost.macs(stay), self.cost.parameters(stay)
        return RestructurePlan(
            model=model_digest(self.model),
            budget=budget,
            layers={site.name: layers[site.name] for site in self.sites},
            macs=macs,
            parameters=parameters,
            macs_share=macs / self.cost.macs(whole),
            parameters_share=parameters / self.cost.parameters(whole),
        )

    def _layer(self, name: str, stay: Tensor, group: int, count: int) -> LayerPlan:
        site = next(each for each in self.sites if each.name == name)
        chosen = stay[site.ids]
        critical = torch.stack([each.neurons[name] for each in self.slices]).any(0)
        return LayerPlan(
            total=len(site),
            kept=tuple(chosen.nonzero()[:, 0].tolist()),
            missing=float(self.orders[group].missing[count]),
            error=float(self.errors[group][count]),
            critical=float(chosen[critical].double().mean()),
        )


def _check(model: nn.Module, slices: SemanticSlices, profiled: Profile, cap: float, multiple: int) -> None:
    if not isinstance(model, Classifier):
        raise RestructureError(
            f"{type(model).__name__} does not say what it takes and answers", fix="make it with nss.build_model"
        )
    if not 0 < cap < 1:
        raise RestructureError(f"cap is {cap}", where="cap", allowed="above 0, below 1")
    if multiple < 1:
        raise RestructureError(f"multiple is {multiple}", where="multiple", allowed="from 1")
    if profiled.model != model_digest(model):
        raise RestructureError("the profile is of another model", fix="profile this one")
    if not profiled.grams:
        raise RestructureError("the profile has no Gram matrices", fix="profile with gram=True")
    if slices.classes != model.spec.classes:
        raise RestructureError("the slices are of other classes", fix="slice this model")
    _check_slices(slices, profiled)


def _check_slices(slices: SemanticSlices, profiled: Profile) -> None:
    sizes = dict(profiled.layers)
    for each in slices:
        found = {name: len(neurons) for name, neurons in each.neurons.items()}
        if other := [name for name in {**sizes, **found} if found.get(name) != sizes.get(name)]:
            name = other[0]
            raise RestructureError(
                "the slices are of another model",
                where=f"{name}: {found.get(name, 'no')} neurons",
                allowed=f"{sizes.get(name, 'no')} neurons",
                fix="slice this model",
            )
