"""Semantic slices: categories merged because their critical neurons are similar (method.md 4)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nss.critical import CriticalNeurons
from nss.errors import SliceError
from nss.files import read_json, write_json
from nss.profile import Profile

FORMAT = 1
LINKAGES = ("average", "complete", "single")
DISTANCES = ("jaccard", "cosine")


@dataclass(frozen=True)
class SemanticSlice:
    """A set of categories and the union of their critical neurons."""

    name: str
    categories: tuple[str, ...]
    indices: tuple[int, ...]
    """of the categories among the classes"""
    neurons: dict[str, Tensor]
    """{layer: bool [neurons]}"""


@dataclass(frozen=True)
class SemanticSlices(Sequence[SemanticSlice]):
    """All slices of a model, in the order of their first category, with the tree they were cut from."""

    classes: tuple[str, ...]
    slices: tuple[SemanticSlice, ...]
    distances: NDArray[np.float64]
    """[classes, classes]"""
    linkage: NDArray[np.float64]
    """[classes - 1, 4], as scipy.cluster.hierarchy.dendrogram reads it"""

    def __getitem__(self, index: Any) -> Any:
        return self.slices[index]

    def __iter__(self) -> Iterator[SemanticSlice]:
        return iter(self.slices)

    def __len__(self) -> int:
        return len(self.slices)

    def save(self, path: str | Path) -> None:
        """Write one JSON file, in one rename: neurons as {layer: {of: number, kept: [indices]}}."""
        slices = [
            {
                "name": each.name,
                "categories": each.categories,
                "neurons": {
                    layer: {"of": len(mask), "kept": mask.nonzero()[:, 0].tolist()}
                    for layer, mask in each.neurons.items()
                },
            }
            for each in self.slices
        ]
        tree = {"distances": self.distances.tolist(), "linkage": self.linkage.tolist()}
        write_json(Path(path), {"format": FORMAT, "classes": self.classes, "slices": slices, **tree})

    @classmethod
    def load(cls, path: str | Path) -> SemanticSlices:
        """Read what `save` wrote. Raises SliceError for a missing or damaged file."""
        content = read_json(Path(path), SliceError)
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise SliceError("these are no slices of a format that is known", where=str(path))
        try:
            classes = tuple(content["classes"])
            slices = tuple(
                _slice(classes, each["name"], each["categories"], _masks(each["neurons"])) for each in content["slices"]
            )
            return cls(classes, slices, np.array(content["distances"]), np.array(content["linkage"]).reshape(-1, 4))
        except (KeyError, TypeError, ValueError, IndexError) as problem:
            raise SliceError(
                f"the slices lack or garble {problem}", where=str(path), fix="restore the file (dvc checkout)"
            ) from None


def _masks(stored: dict[str, dict[str, Any]]) -> dict[str, Tensor]:
    masks = {}
    for layer, entry in stored.items():
        masks[layer] = torch.zeros(entry["of"], dtype=torch.bool)
        masks[layer][entry["kept"]] = True
    return masks


def _slice(classes: tuple[str, ...], name: str, categories: Sequence[str], neurons: dict[str, Tensor]) -> SemanticSlice:
    return SemanticSlice(name, tuple(categories), tuple(classes.index(each) for each in categories), neurons)


def semantic_slices(
    critical: CriticalNeurons,
    profile: Profile,
    n_slices: int | None = None,
    distance_threshold: float | None = None,
    linkage: str = "average",
    layers: Sequence[str] | None = None,
    distance: str = "jaccard",
) -> SemanticSlices:
    """Merge categories whose critical neurons are similar; each slice has the union of its categories' neurons.

    Agglomerative, by average, complete or single linkage; the distance of two categories is that of
    `category_distances`, over all layers or those named. The tree is cut to leave `n_slices`, or at
    `distance_threshold`, or, when neither is given, where the mean silhouette (Rousseeuw 1987) is best.
    Source: NeuSemSlice, arXiv 2407.20281, section 3; the distances are method.md 4's choice.
    Raises SliceError for a number or threshold out of range, an unknown linkage or distance, or a profile of other
    classes.

    >>> slices = nss.semantic_slices(critical, profile, n_slices=4)
    >>> [slice.categories for slice in slices]
    [('0', '6'), ('1', '7'), ('2', '3', '5', '8', '9'), ('4',)]
    """
    _check(critical, profile, n_slices, distance_threshold, linkage)
    distances = category_distances(critical, profile, layers, distance)
    labels, tree = _cluster(distances, n_slices, distance_threshold, linkage)
    slices = []
    for number, label in enumerate(dict.fromkeys(labels)):
        members = [index for index, each in enumerate(labels) if each == label]
        neurons = {layer: mask[members].any(0) for layer, mask in critical.neurons.items()}
        slices.append(
            _slice(critical.classes, f"slice-{number}", [critical.classes[index] for index in members], neurons)
        )
    return SemanticSlices(critical.classes, tuple(slices), distances, tree)


def category_distances(
    critical: CriticalNeurons, profile: Profile, layers: Sequence[str] | None = None, distance: str = "jaccard"
) -> NDArray[np.float64]:
    """Return how far each pair of categories is apart, [classes, classes], from 0 to 1.

    By jaccard 1 - weighted Jaccard of their critical neurons, weighted by the scores of `critical.metric`: sum of
    minima over sum of maxima. By cosine 1 - cosine of their scores of all neurons, critical or not. Over all layers,
    or those named. What has no score at all is at distance 1 from all others.
    Raises SliceError for a layer that was not profiled or an unknown distance.
    """
    if distance not in DISTANCES:
        raise SliceError(f"the distance is {distance!r}", where="distance", allowed=", ".join(DISTANCES))
    scores = profile.scores(critical.metric)
    chosen = list(critical.neurons) if layers is None else list(layers)
    if not chosen or not set(chosen) <= critical.neurons.keys():
        raise SliceError(f"the layers are {chosen}", where="layers", allowed=", ".join(critical.neurons))
    if distance == "cosine":
        distances = 1 - _cosines(torch.cat([scores[layer] for layer in chosen], 1).numpy())
    else:
        distances = 1 - _overlaps(torch.cat([scores[layer] * critical.neurons[layer] for layer in chosen], 1).numpy())
    distances = distances.clip(0, 1)
    np.fill_diagonal(distances, 0)
    return distances


def _overlaps(weights: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the weighted Jaccard index of each pair of rows; 0 where both are without weight."""
    from scipy.spatial.distance import pdist, squareform

    total = weights.sum(1)
    both = total[:, None] + total[None]
    apart = squareform(pdist(weights, "cityblock"))
    # min(a, b) = (a + b - |a - b|) / 2 and max(a, b) = (a + b + |a - b|) / 2
    found: NDArray[np.float64] = np.divide(both - apart, both + apart, out=np.zeros_like(both), where=both > 0)
    return found


def _cosines(rows: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the cosine of each pair of rows; 0 where one is zero."""
    length = np.linalg.norm(rows, axis=1, keepdims=True)
    unit = np.divide(rows, length, out=np.zeros_like(rows), where=length > 0)
    found: NDArray[np.float64] = unit @ unit.T
    return (found + found.T) / 2


def _cluster(
    distances: NDArray[np.float64], n_slices: int | None, threshold: float | None, linkage: str
) -> tuple[list[int], NDArray[np.float64]]:
    """Return the cluster of each category and the merge tree in scipy's form."""
    from sklearn.cluster import AgglomerativeClustering

    count = len(distances)
    if count == 1:
        return [0], np.zeros((0, 4))
    model = AgglomerativeClustering(
        n_clusters=1, metric="precomputed", linkage=linkage, compute_full_tree=True, compute_distances=True
    )
    model.fit(distances)
    if threshold is not None:
        n_slices = count - int((model.distances_ < threshold).sum())
    elif n_slices is None:
        n_slices = _best_number(distances, model.children_)
    return _cut(model.children_, count - n_slices).tolist(), _scipy_tree(model.children_, model.distances_)


def _cut(children: NDArray[np.int64], merges: int) -> NDArray[np.int64]:
    """Return the cluster of each leaf after the first so many merges of the tree."""
    leaves = len(children) + 1
    labels = np.arange(leaves)
    for number, pair in enumerate(children[:merges]):
        labels[np.isin(labels, pair)] = leaves + number
    return labels


def _best_number(distances: NDArray[np.float64], children: NDArray[np.int64]) -> int:
    """Return the number of slices with the best mean silhouette, the smaller of equals; two categories stay two.

    Walks down the tree keeping, for each category, the sum of its distances to every cluster: merging adds two columns.
    """
    count = len(distances)
    to_cluster = {label: distances[:, label] for label in range(count)}
    sizes = dict.fromkeys(range(count), 1)
    own = np.arange(count)
    best, number = -np.inf, 2
    for new, (left, right) in enumerate(children[: count - 2], start=count):
        to_cluster[new] = to_cluster.pop(left) + to_cluster.pop(right)
        sizes[new] = sizes.pop(left) + sizes.pop(right)
        own[np.isin(own, (left, right))] = new
        score = round(_silhouette(to_cluster, sizes, own), 9)
        if score >= best:
            best, number = score, len(sizes)
    return number


def _silhouette(to_cluster: dict[int, NDArray[np.float64]], sizes: dict[int, int], own: NDArray[np.int64]) -> float:
    """Mean over categories of (b - a) / max(a, b): a within the own cluster, b to the nearest other; 0 when alone."""
    labels = np.array(list(sizes))
    sums, size = np.stack([to_cluster[label] for label in labels], 1), np.array([sizes[label] for label in labels])
    mine = own[:, None] == labels
    own_size = size[mine.argmax(1)]
    within = sums[mine] / np.maximum(own_size - 1, 1)
    nearest = np.where(mine, np.inf, sums / size).min(1)
    spread = np.maximum(within, nearest)
    scores = np.divide(nearest - within, spread, out=np.zeros_like(within), where=spread > 0)
    return float(np.where(own_size == 1, 0, scores).mean())


def _scipy_tree(children: NDArray[np.int64], heights: NDArray[np.float64]) -> NDArray[np.float64]:
    leaves = len(children) + 1
    sizes = [1] * leaves
    for left, right in children:
        sizes.append(sizes[left] + sizes[right])
    return np.column_stack([children, heights, sizes[leaves:]]).astype(np.float64)


def _check(
    critical: CriticalNeurons, profile: Profile, n_slices: int | None, threshold: float | None, linkage: str
) -> None:
    if critical.classes != profile.classes or {k: v.shape[1] for k, v in critical.neurons.items()} != dict(
        profile.layers
    ):
        raise SliceError("the critical neurons are not those of this profile", fix="compute them from it again")
    if linkage not in LINKAGES:
        raise SliceError(f"the linkage is {linkage!r}", where="linkage", allowed=", ".join(LINKAGES))
    if n_slices is not None and not 1 <= n_slices <= len(critical.classes):
        raise SliceError(
            f"{n_slices} slices of {len(critical.classes)} categories",
            where="n_slices",
            allowed=f"1 to {len(critical.classes)}",
        )
    if n_slices is not None and threshold is not None:
        raise SliceError(
            f"both {n_slices} slices and the distance threshold {threshold} are asked for", allowed="one of them"
        )
    if threshold is not None and not 0 <= threshold <= 1:
        raise SliceError(f"the distance threshold is {threshold}", where="distance_threshold", allowed="0 to 1")
