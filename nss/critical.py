"""Critical neurons: those kept for a category by a rule and a threshold (method.md 3)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from nss.errors import SliceError
from nss.profile import Profile
from nss.tensor_files import read_tensors, write_tensors

FORMAT = 1
# Sums of shares miss a threshold that they should meet by rounding alone.
_SLACK = 1e-12


@dataclass(frozen=True)
class CriticalNeurons:
    """Which neurons are critical for which category, and how that was decided."""

    classes: tuple[str, ...]
    neurons: Mapping[str, Tensor]
    """{layer: bool [classes, neurons]}"""
    metric: str
    rule: str
    threshold: float

    def save(self, path: str | Path) -> None:
        """Write one safetensors file, in one rename."""
        decided = {"metric": self.metric, "rule": self.rule, "threshold": self.threshold}
        write_tensors(
            Path(path),
            self.neurons,
            {"format": FORMAT, "classes": self.classes, "layers": list(self.neurons), **decided},
        )

    @classmethod
    def load(cls, path: str | Path) -> CriticalNeurons:
        """Read what `save` wrote. Raises SliceError for a missing or damaged file."""
        tensors, meta = read_tensors(Path(path), SliceError)
        if not isinstance(meta, dict) or meta.get("format") != FORMAT:
            raise SliceError("these are not critical neurons of a format that is known", where=str(path))
        try:
            neurons = {layer: tensors[layer] for layer in meta["layers"]}
            return cls(tuple(meta["classes"]), neurons, meta["metric"], meta["rule"], meta["threshold"])
        except (KeyError, TypeError) as problem:
            raise SliceError(f"these are no critical neurons: {problem} is missing", where=str(path)) from None


def critical_neurons(
    profile: Profile, metric: str = "deeplift", rule: str = "score", threshold: float = 0.97
) -> CriticalNeurons:
    """Choose the critical neurons of every category in every layer.

    cumulative: the smallest set of top-scored neurons whose share of the score reaches `threshold`.
    category: the top `threshold` share of each layer's neurons, for each category (the paper's category-wise baseline).
    global: the top `threshold` share of each layer by the score over all data, the same for every category (baseline).
    score: the neurons whose score is at least (1 - `threshold`) of the layer's largest.
    energy: the smallest set, taken greedily, that holds `threshold` of the score when a neuron that is left out counts
    by the share of its second moment that is linearly rebuilt from those kept (needs the profile's Gram matrices).
    The defaults are the most that a table on Fashion-MNIST masks at next to no loss (docs/slicing.md).
    A rule never empties a layer; ties go to the lower index. Source: NeuSemSlice, arXiv 2407.20281, sections 3 and 5.
    Raises SliceError for an unknown rule, a threshold outside 0..1, or a category without samples.

    >>> critical = nss.critical_neurons(profile, metric="taylor", threshold=0.95)
    >>> critical.neurons["conv1"].shape
    torch.Size([10, 16])
    """
    if rule not in RULES:
        raise SliceError(f"the rule is {rule!r}", where="rule", allowed=", ".join(RULES))
    if not 0 < threshold <= 1:
        raise SliceError(f"the threshold is {threshold}", where="threshold", allowed="above 0, at most 1")
    empty = [name for name, count in zip(profile.classes, profile.counts.tolist(), strict=True) if not count]
    if empty:
        fix = "add images to train on of each to the data, then train and profile again"
        raise SliceError(f"no sample of {', '.join(empty)} was profiled", fix=fix)
    return CriticalNeurons(profile.classes, RULES[rule](profile, metric, threshold), metric, rule, threshold)


def _cumulative(profile: Profile, metric: str, threshold: float) -> dict[str, Tensor]:
    return {layer: smallest_share(scores, threshold) for layer, scores in profile.scores(metric).items()}


def smallest_share(scores: Tensor, share: float) -> Tensor:
    """Mark the smallest set of largest entries of each row that holds `share` of the row's sum.

    scores: [rows, n], not negative. Returns bool [rows, n] with at least one True a row.
    """
    ordered, order = scores.sort(dim=1, descending=True, stable=True)
    before = ordered.cumsum(1) - ordered
    needed = before < (share * scores.sum(1, keepdim=True) - _SLACK)
    needed[:, 0] = True
    return torch.zeros_like(needed).scatter_(1, order, needed)


def _score(profile: Profile, metric: str, threshold: float) -> dict[str, Tensor]:
    return {
        layer: scores >= (1 - threshold) * scores.max(1, keepdim=True).values - _SLACK
        for layer, scores in profile.scores(metric).items()
    }


def _energy(profile: Profile, metric: str, threshold: float) -> dict[str, Tensor]:
    kept = {}
    for layer, scores in profile.scores(metric).items():
        moments = torch.eye(scores.shape[1], dtype=torch.float64)
        if layer in profile.reads:
            reader, places = profile.reads[layer]
            moments = profile.gram(reader)[list(places)][:, list(places)]
        kept[layer] = torch.stack([smallest_explaining(moments, row, threshold) for row in scores])
    return kept


def smallest_explaining(moments: Tensor, weights: Tensor, share: float) -> Tensor:
    """Take neurons greedily until the rest is rebuilt from them, by pivoted Cholesky of the second moments.

    moments: float64 [n, n]; weights: [n], what it counts to rebuild each. Returns bool [n] with at least one True.
    """
    scale = moments.diagonal().clamp_min(1e-30).rsqrt() * weights.double().sqrt()
    residual = moments * scale[:, None] * scale[None]
    total, kept = residual.diagonal().sum(), torch.zeros(len(weights), dtype=torch.bool)
    while not bool(kept.any()) or (residual.diagonal().sum() > (1 - share) * total + _SLACK and not bool(kept.all())):
        gain = residual.square().sum(0) / residual.diagonal().clamp_min(1e-30)
        best = int(gain.masked_fill(kept, -1).argmax())
        kept[best] = True
        column = residual[:, best] / residual[best, best].clamp_min(1e-30).sqrt()
        residual = residual - torch.outer(column, column)
        residual[best], residual[:, best] = 0, 0
    return kept


def _category(profile: Profile, metric: str, threshold: float) -> dict[str, Tensor]:
    return {layer: _top(scores, threshold) for layer, scores in profile.scores(metric).items()}


def _global(profile: Profile, metric: str, threshold: float) -> dict[str, Tensor]:
    rows = len(profile.classes)
    overall = profile.overall_scores(metric)
    return {layer: _top(scores[None], threshold).expand(rows, -1).contiguous() for layer, scores in overall.items()}


def _top(scores: Tensor, share: float) -> Tensor:
    count = max(1, math.ceil(share * scores.shape[1] - _SLACK))
    order = scores.sort(dim=1, descending=True, stable=True).indices[:, :count]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, order, True)


RULES: Mapping[str, Callable[[Profile, str, float], dict[str, Tensor]]] = {
    "cumulative": _cumulative,
    "score": _score,
    "energy": _energy,
    "category": _category,
    "global": _global,
}
