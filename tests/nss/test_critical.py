"""Rules for critical neurons against brute force over all subsets."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nss.critical import CriticalNeurons, critical_neurons, smallest_explaining
from nss.errors import ProfileError, SliceError
from nss.profile import Profile, profile

RULES = ("cumulative", "category", "global")

score = st.integers(0, 6).map(float)
rows = st.integers(1, 7).flatmap(lambda n: st.lists(st.lists(score, min_size=n, max_size=n), min_size=2, max_size=3))


def profile_of(*layers: list[list[float]], counts: list[int] | None = None) -> Profile:
    """A profile whose taylor sums are given, [classes][neurons] for each layer."""
    sums = {f"layer{i}": torch.tensor(layer, dtype=torch.float64) for i, layer in enumerate(layers)}
    names = tuple("abcdefgh"[: len(layers[0])])
    sizes = {name: each.shape[1] for name, each in sums.items()}
    return Profile(names, sizes, torch.tensor(counts or [10] * len(names)), {"taylor": sums}, "0" * 32)


def kept(critical: CriticalNeurons, layer: str = "layer0") -> list[list[int]]:
    return [row.nonzero()[:, 0].tolist() for row in critical.neurons[layer]]


def test_the_cumulative_rule_on_numbers_worked_out_by_hand() -> None:
    found = profile_of([[5, 1, 3, 1], [0, 0, 0, 4]])
    # shares .5 .3 .1 .1: 0.5 needs one, 0.51 two, 0.8 two exactly, 0.81 three (the lower index of the two equals)
    for threshold, expected in ((0.5, [0]), (0.51, [0, 2]), (0.8, [0, 2]), (0.81, [0, 1, 2]), (1.0, [0, 1, 2, 3])):
        assert kept(critical_neurons(found, "taylor", rule="cumulative", threshold=threshold)) == [expected, [3]]


def smallest_subset(scores: list[float], share: float) -> list[int]:
    """The smallest subset that holds the share; of equally small ones the first in index order among the largest."""
    total = sum(scores)
    for size in range(1, len(scores) + 1):
        subsets = itertools.combinations(range(len(scores)), size)
        best = max(subsets, key=lambda subset: (sum(scores[i] for i in subset), [-i for i in subset]))
        if sum(scores[i] for i in best) >= share * total - 1e-9:
            return list(best)
    raise AssertionError("the whole layer holds everything")


@given(layer=rows, threshold=st.sampled_from([0.05, 0.3, 0.5, 0.75, 0.9, 0.95, 0.99, 1.0]))
@settings(max_examples=80, deadline=None)
def test_the_cumulative_rule_keeps_the_smallest_subset(layer: list[list[float]], threshold: float) -> None:
    found = kept(critical_neurons(profile_of(layer), "taylor", rule="cumulative", threshold=threshold))
    for scores, indices in zip(layer, found, strict=True):
        expected = smallest_subset(scores, threshold)
        assert len(indices) == len(expected)
        assert indices == expected


@given(layer=rows, low=st.floats(0.01, 1), high=st.floats(0.01, 1), rule=st.sampled_from(RULES))
@settings(max_examples=80, deadline=None)
def test_a_higher_threshold_never_loses_a_neuron_and_no_layer_is_emptied(
    layer: list[list[float]], low: float, high: float, rule: str
) -> None:
    low, high = sorted((low, high))
    found = profile_of(layer)
    fewer, more = (
        critical_neurons(found, "taylor", rule=rule, threshold=each).neurons["layer0"] for each in (low, high)
    )
    assert not (fewer & ~more).any()
    assert fewer.any(1).all()
    assert fewer.dtype == torch.bool


@given(layer=rows, tenths=st.integers(1, 10))
@settings(max_examples=60, deadline=None)
def test_the_baselines_keep_the_top_share_of_a_layer(layer: list[list[float]], tenths: int) -> None:
    found = profile_of(layer)
    count = max(1, math.ceil(tenths * len(layer[0]) / 10))
    normalised = [[each / (sum(row) or 1) for each in row] for row in layer]

    def top(scores: list[float]) -> list[int]:
        return sorted(sorted(range(len(scores)), key=lambda i: (-round(scores[i], 9), i))[:count])

    category = critical_neurons(found, "taylor", rule="category", threshold=tenths / 10)
    assert kept(category) == [top(row) for row in normalised]
    overall = critical_neurons(found, "taylor", rule="global", threshold=tenths / 10)
    sums = [sum(row[i] for row in layer) for i in range(len(layer[0]))]
    assert kept(overall) == [top(sums)] * len(layer)


def test_the_global_baseline_weighs_categories_by_their_samples() -> None:
    # Sums, not shares: class a has one large neuron, class b many samples on the other.
    found = profile_of([[9, 1], [20, 80]], counts=[1, 10])
    assert kept(critical_neurons(found, "taylor", rule="global", threshold=0.5)) == [[1], [1]]
    assert kept(critical_neurons(found, "taylor", rule="category", threshold=0.5)) == [[0], [1]]


@pytest.mark.parametrize("rule", RULES)
def test_equal_scores_and_silent_layers_go_to_the_lower_index(rule: str) -> None:
    found = profile_of([[1] * 4, [0] * 4], [[2, 1, 2, 2], [0, 0, 0, 0]])
    critical = critical_neurons(found, "taylor", rule=rule, threshold=0.5)
    assert kept(critical)[0] == [0, 1]
    assert kept(critical, "layer1")[0] == [0, 2]
    silent = {"cumulative": [0], "category": [0, 1], "global": [0, 1]}[rule]
    assert kept(critical)[1] == silent


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("threshold", [0.1, 0.5, 0.95])
def test_a_layer_of_tiny_weights_is_not_emptied_by_one_threshold_for_all(
    networks: ModuleType, rule: str, threshold: float
) -> None:
    torch.manual_seed(0)
    data = networks.floats(12, (1, 8, 8)), torch.arange(12) % 2
    found = profile(networks.Three(), data, classes=("a", "b"), input_shape=(1, 8, 8))
    critical = critical_neurons(found, "taylor", rule=rule, threshold=threshold)
    assert list(critical.neurons) == ["conv1", "conv2", "conv3"]
    for mask in critical.neurons.values():
        assert mask.any(1).all()
    if rule != "cumulative":
        assert {int(row.sum()) for row in critical.neurons["conv2"]} == {math.ceil(threshold * 16)}


def test_every_metric_that_was_gathered_can_decide(networks: ModuleType) -> None:
    found = profile(networks.Plain(), networks.plain_samples(), classes=("a", "b"), input_shape=(1, 2, 2))
    assert kept(critical_neurons(found, "avg", rule="cumulative", threshold=0.75), "conv") == [[0, 1], [1]]
    assert kept(critical_neurons(found, "var", rule="cumulative", threshold=0.75), "hidden") == [[2], [2]]
    assert kept(critical_neurons(found, "ens", rule="cumulative", threshold=0.6), "hidden") == [[2], [0, 2]]
    critical = critical_neurons(found, "taylor", rule="cumulative", threshold=0.75)
    assert kept(critical, "hidden") == [[0, 1], [0, 1]]
    assert (critical.metric, critical.rule, critical.threshold) == ("taylor", "cumulative", 0.75)
    with pytest.raises(ProfileError, match="'lift' was not gathered"):
        critical_neurons(found, "lift", rule="cumulative")


def test_one_image_of_a_category_is_enough_for_taylor_but_not_for_the_variance(networks: ModuleType) -> None:
    images, labels = networks.plain_samples()
    data = images[:3], labels[:3]
    found = profile(networks.Plain(), data, classes=("a", "b"), input_shape=(1, 2, 2))
    assert kept(critical_neurons(found, "taylor", rule="cumulative", threshold=0.9), "conv") == [[0, 1], [0, 1]]
    with pytest.raises(ProfileError, match="'var' needs two samples of a category"):
        critical_neurons(found, "var", rule="cumulative")


def test_a_category_without_images_is_named() -> None:
    with pytest.raises(SliceError, match="no sample of b, c was profiled") as caught:
        critical_neurons(profile_of([[1], [0], [0]], counts=[3, 0, 0]), "taylor", rule="cumulative")
    assert "add images to train on" in caught.value.fix


@pytest.mark.parametrize("threshold", [0, -0.1, 1.1, float("nan")])
def test_a_threshold_out_of_range_is_refused(threshold: float) -> None:
    with pytest.raises(SliceError, match=f"the threshold is {threshold}") as caught:
        critical_neurons(profile_of([[1], [1]]), "taylor", rule="cumulative", threshold=threshold)
    assert caught.value.allowed == "above 0, at most 1"


def test_an_unknown_rule_is_refused_with_those_that_exist() -> None:
    with pytest.raises(SliceError, match="the rule is 'best'") as caught:
        critical_neurons(profile_of([[1], [1]]), "taylor", rule="best")
    assert set(RULES) <= set(caught.value.allowed.split(", "))


def test_critical_neurons_load_back_as_they_were_saved_and_equal_ones_give_equal_bytes(tmp_path: Path) -> None:
    critical = critical_neurons(
        profile_of([[3, 1, 2], [1, 1, 1]], [[1, 2], [2, 1]]), "taylor", rule="category", threshold=0.4
    )
    critical.save(tmp_path / "a")
    again = CriticalNeurons.load(tmp_path / "a")
    again.save(tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert list(again.neurons) == ["layer0", "layer1"]
    assert all(torch.equal(mask, again.neurons[layer]) for layer, mask in critical.neurons.items())
    decided: tuple[object, ...] = (again.classes, again.metric, again.rule, again.threshold)
    assert decided == (("a", "b"), "taylor", "category", 0.4)


def test_a_missing_damaged_or_foreign_file_is_refused(tmp_path: Path) -> None:
    found = profile_of([[1, 2], [2, 1]])
    with pytest.raises(SliceError, match="missing"):
        CriticalNeurons.load(tmp_path / "nothing")
    (tmp_path / "text").write_text("text")
    with pytest.raises(SliceError, match="not a whole safetensors file"):
        CriticalNeurons.load(tmp_path / "text")
    found.save(tmp_path / "profile")
    with pytest.raises(SliceError) as caught:
        CriticalNeurons.load(tmp_path / "profile")
    assert str(tmp_path / "profile") in str(caught.value)


def test_masks_of_all_rules_can_be_written_and_are_whole_tensors() -> None:
    for rule in RULES:
        masks: list[Tensor] = list(critical_neurons(profile_of([[1, 2], [2, 1]]), "taylor", rule=rule).neurons.values())
        assert all(mask.is_contiguous() for mask in masks)


@given(layer=rows, threshold=st.sampled_from([0.05, 0.3, 0.5, 0.75, 0.9, 1.0]))
@settings(max_examples=40, deadline=None)
def test_the_score_rule_keeps_what_comes_near_enough_to_the_largest(layer: list[list[float]], threshold: float) -> None:
    found = kept(critical_neurons(profile_of(layer), "taylor", rule="score", threshold=threshold))
    for scores, indices in zip(layer, found, strict=True):
        total = sum(scores) or 1
        least = (1 - threshold) * max(scores) / total - 1e-9
        assert indices == [i for i, each in enumerate(scores) if each / total >= least]


def rebuilt_greedily(moments: np.ndarray, weights: np.ndarray, share: float) -> list[int]:
    """Try every neuron at every step; what is left is measured by explicit linear regression."""
    scale = np.sqrt(weights / moments.diagonal())
    scaled = moments * np.outer(scale, scale)

    def left(chosen: list[int]) -> float:
        inner = np.linalg.solve(scaled[np.ix_(chosen, chosen)], scaled[chosen])
        return float(np.trace(scaled - scaled[:, chosen] @ inner))

    chosen: list[int] = []
    while not chosen or left(chosen) > (1 - share) * np.trace(scaled) + 1e-9:
        chosen.append(min(set(range(len(weights))) - set(chosen), key=lambda i: (round(left([*chosen, i]), 9), i)))
    return sorted(chosen)


@given(seed=st.integers(0, 10_000), size=st.integers(2, 6), share=st.sampled_from([0.5, 0.8, 0.95, 0.999]))
@settings(max_examples=30, deadline=None)
def test_the_energy_rule_rebuilds_what_it_leaves_out(seed: int, size: int, share: float) -> None:
    random = np.random.default_rng(seed)
    activations = random.normal(size=(40, size)) @ random.normal(size=(size, size))
    moments, weights = activations.T @ activations / 40, random.uniform(0.1, 1, size)
    found = smallest_explaining(torch.tensor(moments), torch.tensor(weights), share)
    assert found.nonzero()[:, 0].tolist() == rebuilt_greedily(moments, weights, share)


def test_the_energy_rule_leaves_out_a_copy(networks: ModuleType) -> None:
    # networks.Plain: the hidden units are 4, 4 and m0: the second is the first again.
    found = profile(networks.Plain(), networks.plain_samples(), classes=("a", "b"), input_shape=(1, 2, 2))
    assert kept(critical_neurons(found, "avg", rule="energy", threshold=0.99), "hidden") == [[0, 2], [0, 2]]
    assert kept(critical_neurons(found, "avg", rule="cumulative", threshold=0.99), "hidden")[0] == [0, 1, 2]
