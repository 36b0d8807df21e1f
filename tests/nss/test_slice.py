"""Distances, clustering and the choice of the number of slices, against plain loops and scipy."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.cluster.hierarchy import fcluster
from scipy.cluster.hierarchy import linkage as scipy_linkage
from scipy.spatial.distance import squareform
from torch import Tensor

from nss.critical import CriticalNeurons, critical_neurons
from nss.errors import SliceError
from nss.profile import Profile
from nss.slice import SemanticSlices, category_distances, semantic_slices

LINKAGES = ("average", "complete", "single")


def made_of(*layers: Tensor) -> Profile:
    """A profile with the given taylor sums, [classes, neurons] a layer."""
    names = tuple("abcdefghijkl"[: len(layers[0])])
    sums = {f"layer{i}": layer.double() for i, layer in enumerate(layers)}
    sizes = {name: each.shape[1] for name, each in sums.items()}
    return Profile(names, sizes, torch.full((len(names),), 10), {"taylor": sums}, "0" * 32)


def random_case(classes: int, seed: int, threshold: float = 0.7) -> tuple[CriticalNeurons, Profile]:
    generator = torch.Generator().manual_seed(seed)
    profile = made_of(*(torch.rand(classes, size, generator=generator) ** 3 for size in (7, 5)))
    return critical_neurons(profile, "taylor", rule="cumulative", threshold=threshold), profile


def from_similarities(similar: list[list[float]]) -> tuple[CriticalNeurons, Profile]:
    """Masks and scores with about the given weighted Jaccard: a neuron for each pair and one for each category."""
    size = len(similar)
    rows = torch.zeros(size, size * size)
    for i in range(size):
        for j in range(size):
            if i != j:
                shared = 2 * similar[i][j] / (1 + similar[i][j])
                rows[i, min(i, j) * size + max(i, j)] = shared
        rows[i, i * size + i] = max(0.0, 1 - float(rows[i].sum()))
    profile = made_of(rows)
    masks = {"layer0": rows > 0}
    return CriticalNeurons(profile.classes, masks, "taylor", "cumulative", 1.0), profile


def plain_distance(critical: CriticalNeurons, profile: Profile, i: int, j: int) -> float:
    """1 - sum of minima / sum of maxima, one neuron after the other."""
    low = high = 0.0
    for layer, mask in critical.neurons.items():
        sums = profile.sums["taylor"][layer]
        for n in range(mask.shape[1]):
            left, right = (
                float(sums[k, n] / sums[k].sum()) if bool(mask[k, n]) and float(sums[k].sum()) else 0.0 for k in (i, j)
            )
            low, high = low + min(left, right), high + max(left, right)
    return 1 - low / high if high else 1.0


@given(classes=st.integers(2, 8), seed=st.integers(0, 10_000), threshold=st.sampled_from([0.3, 0.7, 1.0]))
@settings(max_examples=25, deadline=None)
def test_distances_are_weighted_jaccard_over_all_layers(classes: int, seed: int, threshold: float) -> None:
    critical, profile = random_case(classes, seed, threshold)
    found = category_distances(critical, profile)
    for i in range(classes):
        for j in range(classes):
            expected = 0.0 if i == j else plain_distance(critical, profile, i, j)
            assert found[i, j] == pytest.approx(expected, abs=1e-12)
    assert np.array_equal(found, found.T)


def test_distances_worked_out_by_hand() -> None:
    # Shares a: .5 .5 0, b: .5 .25 .25, c: 0 0 1; critical all but a's third and b's third.
    profile = made_of(torch.tensor([[2, 2, 0], [2, 1, 1], [0, 0, 3]]))
    mask = torch.tensor([[1, 1, 0], [1, 1, 0], [0, 0, 1]]).bool()
    found = category_distances(CriticalNeurons(profile.classes, {"layer0": mask}, "taylor", "x", 1.0), profile)
    # a, b: minima .5 + .25, maxima .5 + .5.
    assert found.tolist() == [[0, 0.25, 1], [0.25, 0, 1], [1, 1, 0]]


def test_sets_without_weight_are_at_distance_one_from_all_others_and_from_each_other() -> None:
    profile = made_of(torch.tensor([[1.0, 1], [0, 0], [0, 0]]))
    mask = torch.tensor([[True, True], [True, False], [True, False]])
    critical = CriticalNeurons(profile.classes, {"layer0": mask}, "taylor", "x", 1.0)
    assert category_distances(critical, profile).tolist() == [[0, 1, 1], [1, 0, 1], [1, 1, 0]]
    assert len(semantic_slices(critical, profile, distance_threshold=0.9)) == 3


@given(classes=st.integers(1, 8), seed=st.integers(0, 10_000))
@settings(max_examples=25, deadline=None)
def test_the_distance_by_cosine_is_of_the_scores_of_all_neurons_of_all_layers(classes: int, seed: int) -> None:
    critical, profile = random_case(classes, seed)
    found = category_distances(critical, profile, distance="cosine")
    rows = [
        [float(x) / float(sums[k].sum()) for sums in profile.sums["taylor"].values() for x in sums[k]]
        for k in range(classes)
    ]
    for i, left in enumerate(rows):
        for j, right in enumerate(rows):
            lengths = math.sqrt(sum(x * x for x in left)) * math.sqrt(sum(x * x for x in right))
            expected = 1 - sum(x * y for x, y in zip(left, right, strict=True)) / lengths
            assert found[i, j] == pytest.approx(0.0 if i == j else expected, abs=1e-9)
    assert np.array_equal(found, found.T)


def test_a_category_without_scores_has_no_cosine_and_is_at_distance_one() -> None:
    profile = made_of(torch.tensor([[0.0, 0.0], [3.0, 4.0], [0.0, 0.0], [4.0, 3.0]]))
    critical = critical_neurons(profile, "taylor", rule="cumulative", threshold=0.9)
    found = category_distances(critical, profile, distance="cosine")
    expected = np.array([[0, 1, 1, 1], [1, 0, 1, 0.04], [1, 1, 0, 1], [1, 0.04, 1, 0]])
    np.testing.assert_allclose(found, expected, atol=1e-12)


def test_the_distance_decides_which_categories_come_together() -> None:
    """By their critical neurons b is nearer to c, by all of their scores nearer to a."""
    profile = made_of(torch.tensor([[5.0, 0, 4, 4, 0], [0.0, 5, 4, 4, 0], [0.0, 5, 0, 0, 8]]))
    masks = {"layer0": torch.tensor([[True, False, False, False, False]] + 2 * [[False, True, False, False, False]])}
    critical = CriticalNeurons(profile.classes, masks, "taylor", "cumulative", 0.3)
    assert [each.categories for each in semantic_slices(critical, profile, n_slices=2)] == [("a",), ("b", "c")]
    by_cosine = semantic_slices(critical, profile, n_slices=2, distance="cosine")
    assert [each.categories for each in by_cosine] == [("a", "b"), ("c",)]


def test_equal_categories_are_at_distance_zero() -> None:
    profile = made_of(torch.tensor([[0.1, 0.2, 0.7]] * 3))
    critical = critical_neurons(profile, "taylor", rule="cumulative", threshold=0.8)
    assert category_distances(critical, profile).tolist() == [[0] * 3] * 3
    assert len(semantic_slices(critical, profile, distance_threshold=0.1)) == 1


def test_similar_categories_come_together_not_dissimilar_ones() -> None:
    """scikit-learn takes similarities for distances without a word: [[1,.9,.1],[.9,1,.1],[.1,.1,1]] gives 0,1,0."""
    critical, profile = from_similarities([[1, 0.9, 0.0], [0.9, 1, 0.0], [0.0, 0.0, 1]])
    slices = semantic_slices(critical, profile, n_slices=2)
    assert [each.categories for each in slices] == [("a", "b"), ("c",)]
    assert slices.distances[0, 1] == pytest.approx(0.1, abs=1e-6)
    by_threshold = semantic_slices(critical, profile, distance_threshold=0.5)
    assert [each.indices for each in by_threshold] == [(0, 1), (2,)]
    # The trap of method.md 4 with its very numbers: .1 shared with the third by each of two that share .9.
    weights = torch.tensor([[0.9, 0.1, 0.0], [0.9, 0.1, 0.0], [0.0, 0.1, 0.9]])
    three = made_of(weights)
    trap = semantic_slices(critical_neurons(three, "taylor", rule="cumulative", threshold=1.0), three, n_slices=2)
    assert [each.indices for each in trap] == [(0, 1), (2,)]


@pytest.mark.parametrize("linkage", LINKAGES)
@given(classes=st.integers(2, 9), seed=st.integers(0, 10_000))
@settings(max_examples=12, deadline=None)
def test_the_tree_and_every_cut_of_it_are_those_of_scipy(linkage: str, classes: int, seed: int) -> None:
    critical, profile = random_case(classes, seed)
    distances = category_distances(critical, profile)
    expected = scipy_linkage(squareform(distances, checks=False), linkage)
    for number in range(1, classes + 1):
        slices = semantic_slices(critical, profile, n_slices=number, linkage=linkage)
        assert len(slices) == number
        assert partition(slices) == groups(cut(expected, number))
        assert slices.linkage.shape == (classes - 1, 4)
        assert np.allclose(slices.linkage[:, 2], expected[:, 2])
        assert np.array_equal(slices.linkage[:, 3], expected[:, 3])
        assert [sorted(row) for row in slices.linkage[:, :2]] == [sorted(row) for row in expected[:, :2]]
    heights = np.unique(expected[:, 2].round(9))
    for threshold in (heights[:-1] + heights[1:]) / 2:
        slices = semantic_slices(critical, profile, distance_threshold=float(threshold), linkage=linkage)
        assert partition(slices) == groups(fcluster(expected, threshold, "distance").tolist())


def cut(tree: NDArray[np.float64], number: int) -> list[int]:
    """The label of each leaf after all but the last `number` - 1 merges, also where merges are equally high."""
    leaves = len(tree) + 1
    members = {leaf: [leaf] for leaf in range(leaves)}
    for step, (left, right) in enumerate(tree[: leaves - number, :2].astype(int).tolist()):
        members[leaves + step] = members.pop(left) + members.pop(right)
    labels = {leaf: label for label, group in enumerate(members.values()) for leaf in group}
    return [labels[leaf] for leaf in range(leaves)]


def groups(labels: list[int]) -> set[tuple[int, ...]]:
    return {tuple(i for i, each in enumerate(labels) if each == label) for label in set(labels)}


def partition(slices: SemanticSlices) -> set[tuple[int, ...]]:
    return {each.indices for each in slices}


def plain_silhouette(distances: NDArray[np.float64], labels: list[int]) -> float:
    """Rousseeuw 1987: (b - a) / max(a, b), 0 for a category on its own; the mean over categories."""
    total = 0.0
    for i, own in enumerate(labels):
        mates = [distances[i, j] for j, other in enumerate(labels) if other == own and j != i]
        if not mates:
            continue
        others = []
        for label in set(labels) - {own}:
            far = [distances[i, j] for j, other in enumerate(labels) if other == label]
            others.append(sum(far) / len(far))
        a, b = sum(mates) / len(mates), min(others)
        total += (b - a) / max(a, b) if max(a, b) else 0.0
    return total / len(labels)


@given(classes=st.integers(3, 9), seed=st.integers(0, 10_000))
@settings(max_examples=15, deadline=None)
def test_without_a_number_or_threshold_the_best_silhouette_decides(classes: int, seed: int) -> None:
    critical, profile = random_case(classes, seed)
    slices = semantic_slices(critical, profile)
    tree = scipy_linkage(squareform(slices.distances, checks=False), "average")
    scores = {number: round(plain_silhouette(slices.distances, cut(tree, number)), 9) for number in range(2, classes)}
    assert len(slices) == min(number for number, score in scores.items() if score == max(scores.values()))


def test_three_clear_pairs_give_three_slices() -> None:
    pairs = torch.eye(3).repeat_interleave(2, 0) + 0.01
    profile = made_of(pairs)
    slices = semantic_slices(critical_neurons(profile, "taylor", rule="cumulative", threshold=1.0), profile)
    assert [each.categories for each in slices] == [("a", "b"), ("c", "d"), ("e", "f")]
    assert [each.name for each in slices] == ["slice-0", "slice-1", "slice-2"]


def test_slices_are_in_the_order_of_their_first_category() -> None:
    rows = torch.tensor([[0, 1.0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 0, 0]])
    profile = made_of(rows)
    slices = semantic_slices(critical_neurons(profile, "taylor", rule="cumulative"), profile, n_slices=3)
    assert [each.indices for each in slices] == [(0, 2), (1, 4), (3,)]
    assert [each.categories for each in slices] == [("a", "c"), ("b", "e"), ("d",)]


@given(classes=st.integers(2, 7), seed=st.integers(0, 10_000), number=st.integers(1, 7))
@settings(max_examples=20, deadline=None)
def test_a_slice_has_the_union_of_its_categories_neurons(classes: int, seed: int, number: int) -> None:
    critical, profile = random_case(classes, seed)
    slices = semantic_slices(critical, profile, n_slices=min(number, classes))
    assert sorted(index for each in slices for index in each.indices) == list(range(classes))
    for each in slices:
        for layer, mask in critical.neurons.items():
            union = [any(bool(mask[i, n]) for i in each.indices) for n in range(mask.shape[1])]
            assert each.neurons[layer].tolist() == union


def test_one_category_is_one_slice() -> None:
    profile = made_of(torch.tensor([[3.0, 1.0]]))
    critical = critical_neurons(profile, "taylor", rule="cumulative", threshold=0.7)
    for how in ({}, {"n_slices": 1}, {"distance_threshold": 0.5}):
        slices = semantic_slices(critical, profile, **how)
        assert [each.categories for each in slices] == [("a",)]
        assert slices[0].neurons["layer0"].tolist() == [True, False]
        assert slices.distances.tolist() == [[0.0]]
        assert slices.linkage.shape == (0, 4)


def test_two_categories_without_a_number_stay_two() -> None:
    critical, profile = random_case(2, 0)
    assert len(semantic_slices(critical, profile)) == 2


def test_slices_are_a_sequence() -> None:
    critical, profile = random_case(4, 1)
    slices = semantic_slices(critical, profile, n_slices=3)
    assert list(slices) == [slices[0], slices[1], slices[2]]
    assert slices[-1] is slices[2]
    assert len(slices[:2]) == 2


@pytest.mark.parametrize("classes", [1, 2, 5])
def test_slices_load_back_exactly_and_equal_ones_give_equal_bytes(tmp_path: Path, classes: int) -> None:
    critical, profile = random_case(classes, 3)
    slices = semantic_slices(critical, profile, distance_threshold=0.8)
    slices.save(tmp_path / "a.json")
    again = SemanticSlices.load(tmp_path / "a.json")
    again.save(tmp_path / "b.json")
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    assert again.classes == slices.classes
    assert np.array_equal(again.distances, slices.distances)
    assert np.array_equal(again.linkage, slices.linkage)
    assert again.linkage.shape == slices.linkage.shape
    for left, right in zip(slices, again, strict=True):
        assert (left.name, left.categories, left.indices) == (right.name, right.categories, right.indices)
        assert left.neurons.keys() == right.neurons.keys()
        assert all(torch.equal(mask, right.neurons[layer]) for layer, mask in left.neurons.items())


@pytest.mark.parametrize(
    "damage", ["missing", "text", "list", "no linkage", "unknown class", "index too large", "another format"]
)
def test_a_missing_or_garbled_file_is_refused(tmp_path: Path, damage: str) -> None:
    critical, profile = random_case(3, 4)
    path = tmp_path / "slices.json"
    semantic_slices(critical, profile, n_slices=2).save(path)
    content = json.loads(path.read_text())
    if damage == "no linkage":
        del content["linkage"]
    elif damage == "unknown class":
        content["slices"][0]["categories"] = ["zebra"]
    elif damage == "index too large":
        content["slices"][0]["neurons"]["layer0"]["kept"] = [99]
    elif damage == "another format":
        content["format"] = 99
    path.write_text({"text": "{", "list": "[1]"}.get(damage, json.dumps(content)))
    if damage == "missing":
        path.unlink()
    with pytest.raises(SliceError) as caught:
        SemanticSlices.load(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("settings_", "message"),
    [
        ({"n_slices": 0}, "0 slices of 4 categories"),
        ({"n_slices": 5}, "5 slices of 4 categories"),
        ({"distance_threshold": -0.1}, "the distance threshold is -0.1"),
        ({"distance_threshold": 1.1}, "the distance threshold is 1.1"),
        ({"distance_threshold": float("nan")}, "the distance threshold is nan"),
        ({"n_slices": 2, "distance_threshold": 0.5}, "both 2 slices and the distance threshold 0.5"),
        ({"linkage": "ward"}, "the linkage is 'ward'"),
        ({"distance": "euclidean"}, "the distance is 'euclidean'"),
    ],
)
def test_settings_out_of_range_are_refused(settings_: dict[str, object], message: str) -> None:
    critical, profile = random_case(4, 5)
    with pytest.raises(SliceError, match=message):
        semantic_slices(critical, profile, **settings_)


def test_critical_neurons_of_another_profile_are_refused() -> None:
    critical, _ = random_case(4, 6)
    for other in (made_of(torch.rand(4, 7)), made_of(torch.rand(4, 7), torch.rand(4, 6)), random_case(3, 6)[1]):
        with pytest.raises(SliceError, match="not those of this profile"):
            semantic_slices(critical, other, n_slices=2)
