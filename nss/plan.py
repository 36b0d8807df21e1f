"""A restructuring decided but not done: kept neurons by layer, what it will cost, and why."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nss.errors import RestructureError
from nss.files import read_json, write_json
from nss.model import model_digest
from nss.sites import Sites

FORMAT = 1


@dataclass(frozen=True)
class LayerPlan:
    """Which neurons of one layer stay, and why so many."""

    total: int
    kept: tuple[int, ...]
    missing: float
    """share of what its readers compute that is lost before they are folded and refitted"""
    error: float
    """expected divergence of the answers of the slice that suffers most, were this the only layer to shrink"""
    critical: float
    """share of the neurons critical for some semantic slice that stay"""


@dataclass(frozen=True)
class RestructurePlan:
    """Decisions as data: print it, store it, compare it; `nss.apply_plan` carries it out."""

    model: str
    """digest of the model that it was made for"""
    budget: Mapping[str, float]
    """what was asked, {"macs": 0.5} .."""
    layers: Mapping[str, LayerPlan]
    macs: int
    parameters: int
    macs_share: float
    parameters_share: float

    def neurons(self) -> dict[str, Tensor]:
        """Return the choice as masks, {layer: bool [neurons]}."""
        masks = {}
        for name, layer in self.layers.items():
            masks[name] = torch.zeros(layer.total, dtype=torch.bool)
            masks[name][list(layer.kept)] = True
        return masks

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain numbers, lists and texts."""
        return {"format": FORMAT, **asdict(self)}

    def save(self, path: str | Path) -> None:
        """Write one JSON file, in one rename."""
        write_json(Path(path), self.to_dict())

    @classmethod
    def load(cls, path: str | Path) -> RestructurePlan:
        """Read what `save` wrote. Raises RestructureError for a missing or damaged file."""
        content = read_json(Path(path), RestructureError)
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise RestructureError("this is no plan of a format that is known", where=str(path))
        try:
            layers = {
                name: LayerPlan(**{**entry, "kept": tuple(entry["kept"])}) for name, entry in content["layers"].items()
            }
            rest = {name: value for name, value in content.items() if name not in ("format", "layers")}
            return cls(layers=layers, **rest)
        except (KeyError, TypeError, AttributeError) as problem:
            raise RestructureError(f"this is no plan: it lacks or garbles {problem}", where=str(path)) from None

    def check(self, model: nn.Module, sites: Sites) -> None:
        """Refuse a plan for another model, and neurons that are named twice or do not exist.

        Raises RestructureError that names the layer.
        """
        if self.model != model_digest(model):
            raise RestructureError("the plan was made for another model", fix="make a plan for this one")
        sizes = {site.name: len(site) for site in sites}
        for name, layer in self.layers.items():
            if name not in sizes:
                raise RestructureError(f"there is no layer {name!r} with neurons", allowed=", ".join(sizes))
            if layer.total != sizes[name]:
                raise RestructureError(
                    f"the plan is for {layer.total} neurons", where=name, allowed=f"{sizes[name]}, as the layer has"
                )
            wrong = [index for index in layer.kept if type(index) is not int or not 0 <= index < sizes[name]]
            if wrong:
                raise RestructureError(
                    f"neuron {wrong[0]!r} does not exist", where=name, allowed=f"0 to {sizes[name] - 1}"
                )
            twice = sorted({index for index in layer.kept if layer.kept.count(index) > 1})
            if twice:
                raise RestructureError(f"neuron {twice[0]} is named twice", where=name, allowed="each neuron once")
            if not layer.kept:
                raise RestructureError("no neuron is kept", where=name, allowed="at least one neuron a layer")
