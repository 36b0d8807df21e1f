"""How much each neuron contributes to each category, gathered in one pass over the samples (method.md 2).

The state is sums only, in float64, of a size that does not depend on the number of samples, and two states over
different samples add up: profile(A + B) == merge(profile(A), profile(B)).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from nss.contexts import evaluating
from nss.data import Data, iter_batches
from nss.errors import ProfileError
from nss.gather import Gatherer
from nss.model import Classifier, device_of, model_digest, network_of, on_device, shape_of
from nss.prefetch import read_ahead
from nss.samples import rank_in_class
from nss.sites import find_sites
from nss.tensor_files import read_tensors, write_tensors

_LOG = logging.getLogger(__name__)
_EACH = 5000
"""images between two lines about them"""

METRICS = ("avg", "var", "ens", "taylor", "deeplift")
# Which sums each metric is computed from.
_SUMS = {
    "avg": ("abs",),
    "var": ("mean", "square"),
    "ens": ("abs", "mean", "square"),
    "taylor": ("taylor",),
    "deeplift": ("deeplift",),
}
FORMAT = 2


@dataclass(frozen=True)
class Profile:
    """Sums over samples for each category and neuron. Make one with `profile`, read it with `scores`."""

    classes: tuple[str, ...]
    layers: Mapping[str, int]
    """{layer: number of neurons}, in forward order"""
    counts: Tensor
    """samples seen of each category, int64 [classes]"""
    sums: Mapping[str, Mapping[str, Tensor]]
    """{sum: {layer: float64 [classes, neurons]}}"""
    model: str
    """digest of the model that was profiled"""
    grams: Mapping[str, Tensor] = field(default_factory=dict)
    """{layer: sum over samples and positions of x x^T of the channels that enter it, float64 [channels, channels]}"""
    reads: Mapping[str, tuple[str, tuple[int, ...]]] = field(default_factory=dict)
    """{layer: (a layer that reads its neurons, their places in that layer's Gram matrix)}"""
    positions: Mapping[str, int] = field(default_factory=dict)
    """{layer: number of samples x positions in its Gram matrix}"""
    windows: Mapping[str, Tensor] = field(default_factory=dict)
    """{layer: sums over some samples of what its window sees together, as `nss.windows.correlations` has them}"""
    window_positions: Mapping[str, int] = field(default_factory=dict)
    """{layer: number of samples x positions in them}"""

    @property
    def metrics(self) -> tuple[str, ...]:
        """The metrics that can be computed from the sums that were gathered."""
        return tuple(metric for metric in METRICS if all(name in self.sums for name in _SUMS[metric]))

    def scores(self, metric: str = "taylor") -> dict[str, Tensor]:
        """Contribution of each neuron to each category, normalised to sum 1 for each (category, layer).

        Returns {layer: float64 [classes, neurons]}; zeros for a category without samples or a silent layer.
        Raises ProfileError for a metric that was not gathered, and for the variance of a single sample.

        >>> profile.scores("taylor")["conv1"].sum(1)
        tensor([1., 1.], dtype=torch.float64)
        """
        self._check(metric, self.counts)
        return {layer: _scores(metric, self._layer(metric, layer), self.counts) for layer in self.layers}

    def overall_scores(self, metric: str = "taylor") -> dict[str, Tensor]:
        """Contribution of each neuron over all samples. Returns {layer: float64 [neurons]}, each summing to 1."""
        count = self.counts.sum(0, keepdim=True)
        self._check(metric, count)
        sums = {
            layer: {name: each.sum(0, keepdim=True) for name, each in self._layer(metric, layer).items()}
            for layer in self.layers
        }
        return {layer: _scores(metric, each, count)[0] for layer, each in sums.items()}

    def gram(self, layer: str) -> Tensor:
        """Second moment of the channels that enter `layer`, over samples and positions. Returns float64 [c, c].

        Raises ProfileError for a layer whose input was not gathered.
        """
        if layer not in self.grams:
            raise ProfileError(
                f"there is no Gram matrix of {layer!r}", allowed=", ".join(self.grams) or "none: gram=True"
            )
        return self.grams[layer] / max(1, self.positions[layer])

    def window(self, layer: str) -> Tensor:
        """Mean of what the window of `layer` sees together, by lag. Returns float64 [lags, groups, c + 1, c + 1].

        Raises ProfileError when it was not gathered.
        """
        if not self.window_positions.get(layer):
            raise ProfileError(
                f"what the window of {layer!r} sees together was not gathered",
                where=layer,
                fix="profile with windows=1: with a higher number, few samples may leave none",
            )
        return self.windows[layer] / self.window_positions[layer]

    def merge(self, other: Profile) -> Profile:
        """Return the profile over the samples of both.

        Raises ProfileError if they are of different models, classes, layers or metrics.
        """
        mine, theirs = (each._kind() for each in (self, other))
        for what, left, right in zip(("models", "classes", "layers", "metrics"), mine, theirs, strict=True):
            if left != right:
                raise ProfileError(
                    f"the profiles are of different {what}", where=f"{left} and {right}", fix="profile both again"
                )
        sums = {
            name: {layer: each + other.sums[name][layer] for layer, each in of.items()}
            for name, of in self.sums.items()
        }
        grams = {layer: each + other.grams[layer] for layer, each in self.grams.items()}
        positions = {layer: each + other.positions[layer] for layer, each in self.positions.items()}
        seen = {layer: each + other.window_positions[layer] for layer, each in self.window_positions.items()}
        return replace(
            self,
            counts=self.counts + other.counts,
            sums=sums,
            grams=grams,
            positions=positions,
            windows=_added(self.windows, other.windows),
            window_positions=seen,
        )

    def _kind(self) -> tuple[object, ...]:
        gathered = sorted(self.sums), sorted(self.grams), sorted(self.window_positions)
        return self.model, self.classes, dict(self.layers), gathered

    def save(self, path: str | Path) -> None:
        """Write one safetensors file, in one rename; equal profiles give equal bytes."""
        tensors = {f"{name}/{layer}": each for name, of in self.sums.items() for layer, each in of.items()}
        meta = {
            "format": FORMAT,
            "classes": self.classes,
            "layers": dict(self.layers),
            "sums": list(self.sums),
            "model": self.model,
            "reads": dict(self.reads),
            "positions": dict(self.positions),
            "window_positions": dict(self.window_positions),
        }
        grams = {f"gram/{layer}": each for layer, each in self.grams.items()}
        windows = {f"window/{layer}": each for layer, each in self.windows.items()}
        write_tensors(Path(path), {"counts": self.counts, **tensors, **grams, **windows}, meta)

    @classmethod
    def load(cls, path: str | Path) -> Profile:
        """Read what `save` wrote. Raises ProfileError for a missing or damaged file."""
        tensors, meta = read_tensors(Path(path), ProfileError)
        if not isinstance(meta, dict) or meta.get("format") != FORMAT:
            raise ProfileError(
                "this is not a profile of a format that is known", where=str(path), allowed=f"format {FORMAT}"
            )
        try:
            sums = {name: {layer: tensors[f"{name}/{layer}"] for layer in meta["layers"]} for name in meta["sums"]}
            grams = {layer: tensors[f"gram/{layer}"] for layer in meta["positions"]}
            reads = {layer: (reader, tuple(places)) for layer, (reader, places) in meta["reads"].items()}
            classes, counts = tuple(meta["classes"]), tensors["counts"]
            seen = meta["window_positions"]
            windows = {layer: tensors[f"window/{layer}"] for layer, count in seen.items() if count}
            positions = meta["positions"]
            return cls(classes, meta["layers"], counts, sums, meta["model"], grams, reads, positions, windows, seen)
        except (KeyError, TypeError, ValueError) as problem:
            raise ProfileError(f"this is no profile: it lacks or garbles {problem}", where=str(path)) from None

    def _layer(self, metric: str, layer: str) -> dict[str, Tensor]:
        return {name: self.sums[name][layer] for name in _SUMS[metric]}

    def _check(self, metric: str, counts: Tensor) -> None:
        if metric not in self.metrics:
            raise ProfileError(
                f"the metric {metric!r} was not gathered", allowed=", ".join(self.metrics), fix="profile with it"
            )
        if "square" in _SUMS[metric] and bool((counts == 1).any()):
            names = [name for name, count in zip(self.classes, counts.tolist(), strict=False) if count == 1]
            raise ProfileError(
                f"{metric!r} needs two samples of a category", where=", ".join(names), fix="use avg or taylor"
            )


def _scores(metric: str, sums: Mapping[str, Tensor], counts: Tensor) -> Tensor:
    """sums: {name: [rows, neurons]}, counts: [rows]. Returns [rows, neurons]."""
    n = counts.clamp_min(1).double()[:, None]
    if metric == "ens":
        return _to_share(_scores("avg", sums, counts) + _scores("var", sums, counts))
    if metric == "var":
        return _to_share((sums["square"] / n - (sums["mean"] / n).square()).clamp_min(0))
    return _to_share(sums["abs" if metric == "avg" else metric] / n)


def _to_share(scores: Tensor) -> Tensor:
    total = scores.sum(1, keepdim=True)
    return torch.where(total > 0, scores / total, 0.0)


def profile(
    model: nn.Module,
    data: Data,
    metrics: Sequence[str] = METRICS,
    *,
    samples_per_class: int | None = None,
    batch_size: int = 128,
    gram: bool = True,
    windows: int = 0,
    reference: Tensor | None = None,
    device: str | torch.device | None = None,
    bf16: bool = False,
    prefetch: int = 2,
    classes: Sequence[str] | None = None,
    input_shape: Sequence[int] | None = None,
) -> Profile:
    """Gather the contribution of every neuron of `model` to every category, in one pass over `data`.

    With a the activation behind norm and nonlinearity, averaged over the map for the first three and summed for the
    last two: avg E|a|; var Var(a); ens the mean of both, each first normalised over the layer; taylor
    E|a * d log p / d a|, p the probability of the true class; deeplift E|(a - a0) * multiplier| towards the logit of
    the true class, by the rescale rule (arXiv 1704.02685).
    Source: NeuSemSlice, arXiv 2407.20281, section 3; the formulas are choices explained in docs/slicing.md.

    samples_per_class: use only the first so many samples of each category. gram: also gather the second moment of the
    channels that enter each layer. windows: of about one sample in so many, chosen by what it holds, gather too what
    the window of each layer sees together, for `readapt` to guard old behaviour by; 0 of none. reference: the image
    that DeepLIFT compares with, as the network reads it [c, h, w], default zeros (the mean pixel). device: where to
    compute, "auto" for the fastest there is, default where the model is. bf16: compute activations and gradients in
    bfloat16 (sums stay float64). prefetch: batches read ahead. classes, input_shape: needed for models not made by
    `build_model`.
    The model's mode, hooks, gradients and buffers are left as they were.
    Raises ProfileError for unknown metrics, labels outside the classes, no samples at all, and a BatchNorm without
    running statistics: what it makes of an image depends on the others of its batch.

    >>> profile = nss.profile(model, nss.load_data("data").split("train"))
    >>> profile.scores("taylor")["conv1"].shape
    torch.Size([10, 16])
    """
    unknown = [metric for metric in metrics if metric not in METRICS]
    if unknown or not metrics:
        raise ProfileError(f"the metrics are {list(metrics)}", allowed=", ".join(METRICS))
    if windows < 0:
        raise ProfileError(f"windows is {windows}", where="windows", allowed="from 0: one sample in so many, 0: none")
    names, shape = _class_names(model, classes), shape_of(model, input_shape)
    model = on_device(model, device)
    sites = find_sites(network_of(model), shape)
    wanted = sorted({name for metric in metrics for name in _SUMS[metric]})
    gatherer = Gatherer(sites, wanted, len(names), gram=gram, windows=windows)
    compared = torch.zeros(shape) if reference is None else reference
    ahead = read_ahead(iter_batches(data, batch_size), prefetch)
    mixed = torch.autocast(device_of(model).type, torch.bfloat16, enabled=bf16)
    # Closed, since whoever keeps an error would keep the thread that reads ahead.
    with closing(ahead), evaluating(model), mixed:
        for images, labels in _counted(_limited(ahead, samples_per_class, names)):
            inputs = _network_input(model, images)
            gatherer.see(inputs, labels, compared.to(inputs)[None], batch_size)
    if not int(gatherer.counts.sum()):
        raise ProfileError("there are no samples to profile", fix="pass a split with images")
    return Profile(
        classes=names,
        layers={site.name: len(site) for site in sites},
        counts=gatherer.counts,
        sums=gatherer.sums,
        model=model_digest(model),
        grams=gatherer.grams,
        reads=gatherer.reads,
        positions=gatherer.positions,
        windows=gatherer.windows,
        window_positions=gatherer.window_positions,
    )


def _added(mine: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Add up what was gathered of the same layer; a layer of which one has nothing keeps the other's."""
    both = {layer: [of[layer] for of in (mine, theirs) if layer in of] for layer in (*mine, *theirs)}
    return {layer: torch.stack(each).sum(0) for layer, each in both.items()}


def _counted(batches: Iterator[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
    seen = 0
    for images, labels in batches:
        yield images, labels
        before, seen = seen, seen + len(labels)
        if seen // _EACH > before // _EACH:
            _LOG.info("%d images profiled", seen)


def _limited(
    batches: Iterator[tuple[Tensor, Tensor]], limit: int | None, names: Sequence[str]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Pass on the first `limit` samples of each category."""
    seen = torch.zeros(len(names), dtype=torch.int64)
    for images, labels in batches:
        labels = labels.cpu().long()
        wrong = labels[(labels < 0) | (labels >= len(names))]
        if len(wrong):
            raise ProfileError(f"a label is {int(wrong[0])}", allowed=f"0 to {len(names) - 1}: {', '.join(names)}")
        if limit is not None:
            rank = rank_in_class(labels) + seen[labels]
            seen += torch.bincount(labels, minlength=len(names))
            images, labels = images[rank < limit], labels[rank < limit]
        if len(labels):
            yield images, labels


def _class_names(model: nn.Module, classes: Sequence[str] | None) -> tuple[str, ...]:
    if isinstance(model, Classifier):
        return model.spec.classes
    if classes is None:
        raise ProfileError(
            f"{type(model).__name__} does not say which classes it knows",
            fix="pass classes=[...], or use nss.build_model",
        )
    return tuple(classes)


def _network_input(model: nn.Module, images: Tensor) -> Tensor:
    images = images.to(device_of(model))
    with torch.no_grad():
        inputs: Tensor = model.normalise(images) if isinstance(model, Classifier) else images
    if not inputs.is_floating_point():
        raise ProfileError(
            "the images are whole numbers", allowed="normalised floats for models not made by build_model"
        )
    return inputs.detach()
