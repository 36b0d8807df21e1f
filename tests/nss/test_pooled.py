"""The two pooled tests against plain loops, scipy, and all permutations."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import cdist
from scipy.stats import energy_distance, fisher_exact

from nss.pooled import accuracy_test, energy, energy_test


def energy_by_loops(known: np.ndarray, new: np.ndarray) -> float:
    def mean(left: np.ndarray, right: np.ndarray) -> float:
        return sum(math.dist(a, b) for a in left for b in right) / (len(left) * len(right))

    return 2 * mean(known, new) - mean(known, known) - mean(new, new)


def statistic(known: np.ndarray, new: np.ndarray) -> float:
    pooled = np.concatenate([known, new])
    chosen = (np.arange(len(pooled)) >= len(known)).astype(float)
    return float(energy(cdist(pooled, pooled), chosen[None])[1][0])


@given(known=st.integers(1, 6), new=st.integers(1, 6), seed=st.integers(0, 100))
@settings(max_examples=30, deadline=None)
def test_the_energy_distance_is_that_of_plain_loops_and_of_scipy(known: int, new: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    left, right = rng.normal(size=(known, 3)), rng.normal(1, 2, size=(new, 3))
    assert statistic(left, right) == pytest.approx(energy_by_loops(left, right), abs=1e-12)
    line = statistic(left[:, :1], right[:, :1])
    assert line == pytest.approx(energy_distance(left[:, 0], right[:, 0]) ** 2, abs=1e-9)


def test_p_value_and_effect_are_those_of_all_splits_within_the_classes() -> None:
    rng = np.random.default_rng(5)
    labels = np.array([0, 0, 0, 0, 0, 0, 1, 1, 1, 1])
    pooled = rng.normal(size=(10, 2)) + np.outer(labels, [3, 0])
    new = np.array([0, 0, 0, 0, 1, 1, 0, 1, 1, 1], dtype=bool)
    pooled[new] += 0.8
    scaled = (pooled - pooled.mean(0)) / pooled.std(0)

    def total(first: tuple[int, ...], second: tuple[int, ...]) -> float:
        sides = [(set(range(6)), set(first), 4 * 2 / 6), (set(range(6, 10)), set(second), 1 * 3 / 4)]
        return sum(w * energy_by_loops(scaled[sorted(rows - own)], scaled[sorted(own)]) for rows, own, w in sides)

    splits = itertools.product(itertools.combinations(range(6), 2), itertools.combinations(range(6, 10), 3))
    values = [total(*split) for split in splits]
    observed = total((4, 5), (7, 8, 9))
    exact = sum(value >= observed - 1e-9 for value in values) / len(values)
    found = energy_test(pooled[~new], pooled[new], labels[~new], labels[new], permutations=5000)
    assert 0.05 < exact < 0.5
    assert found.p_value == pytest.approx(exact, abs=4 * math.sqrt(exact / 5000))
    means = [
        weight * np.mean([math.dist(a, b) for a in scaled[(labels == k) & new] for b in scaled[(labels == k) & ~new]])
        for k, weight in ((0, 4 * 2 / 6), (1, 1 * 3 / 4))
    ]
    assert found.effect == pytest.approx((observed - sum(values) / len(values)) / (2 * sum(means)), abs=0.01)
    assert found.effect > 0.05


def sample(count: int, seed: int, mean: float = 0.0, spread: float = 1.0) -> np.ndarray:
    return np.random.default_rng(seed).normal(mean, spread, size=(count, 4))


LABELS = np.arange(60, dtype=np.int64) % 3


def test_means_and_spreads_that_differ_are_seen_and_equal_ones_are_not() -> None:
    known = sample(60, 0)
    p = [
        energy_test(known, new, LABELS, LABELS).p_value
        for new in (sample(60, 1), sample(60, 1, mean=1.0), sample(60, 1, spread=2.5), sample(60, 1, spread=0.3))
    ]
    assert p[0] > 0.05
    assert p[1:] == [0.001] * 3


def test_the_effect_grows_with_the_distance_and_is_one_for_two_points() -> None:
    known = sample(60, 0)
    effects = [energy_test(known, sample(60, 1, mean=mean), LABELS, LABELS).effect for mean in (0.5, 1, 2, 8)]
    assert effects == sorted(effects)
    assert 0 < effects[0] < 0.2
    assert effects[-1] > 0.7
    ones, labels = np.ones((50, 2)), np.zeros(50, dtype=np.int64)
    assert energy_test(0 * ones, ones, labels, labels).effect == pytest.approx(1, abs=0.03)


def test_what_is_the_same_for_all_images_is_no_drift() -> None:
    same = np.full((60, 4), 7.0)
    found = energy_test(same, same, LABELS, LABELS)
    assert (found.p_value, found.effect) == (1.0, 0.0)


def test_neither_scale_nor_origin_of_a_feature_matters_and_a_seed_is_a_result() -> None:
    known, new = sample(60, 0), sample(60, 1, mean=0.3)
    scale, origin = np.array([1e-3, 1, 50, 1e4]), np.array([5, -3, 0, 1e3])
    plain = energy_test(known, new, LABELS, LABELS, seed=4)
    assert plain == energy_test(known, new, LABELS, LABELS, seed=4)
    moved = energy_test(known * scale + origin, new * scale + origin, LABELS, LABELS, seed=4)
    assert moved.p_value == plain.p_value
    assert moved.effect == pytest.approx(plain.effect, abs=1e-9)


def test_another_mix_of_classes_is_no_drift() -> None:
    centres = np.array([[0.0, 0, 0, 0], [9, 9, 9, 9]])
    known_labels, new_labels = (np.arange(60) < 30).astype(np.int64), (np.arange(60) < 6).astype(np.int64)
    known, new = sample(60, 0) + centres[known_labels], sample(60, 1) + centres[new_labels]
    by_class = energy_test(known, new, known_labels, new_labels)
    assert by_class.p_value > 0.1
    one = np.zeros(60, dtype=np.int64)
    assert energy_test(known, new, one, one).p_value == 0.001


def test_only_classes_of_both_sides_are_looked_at() -> None:
    found = energy_test(sample(60, 0), sample(60, 1, mean=9), LABELS, LABELS + 2)
    assert (found.known_images, found.new_images) == (20, 20)
    nothing = energy_test(sample(60, 0), sample(60, 1, mean=9), LABELS, LABELS + 3)
    assert (nothing.p_value, nothing.effect, nothing.known_images, nothing.new_images) == (1.0, 0.0, 0, 0)


def test_five_of_a_hundred_unchanged_samples_are_called_changed_at_five_percent() -> None:
    found = [
        energy_test(
            sample(24, 2 * seed), sample(24, 2 * seed + 1), LABELS[:24], LABELS[:24], permutations=99, seed=seed
        )
        for seed in range(400)
    ]
    # Standard deviation of the share: 0.011.
    assert sum(each.p_value <= 0.05 for each in found) / 400 == pytest.approx(0.05, abs=0.033)


@given(known=st.lists(st.booleans(), min_size=1, max_size=15), new=st.lists(st.booleans(), min_size=1, max_size=15))
def test_with_one_class_the_accuracy_test_is_fishers(known: list[bool], new: list[bool]) -> None:
    found = accuracy_test(np.array(known), np.array(new), np.zeros(len(known)), np.zeros(len(new)))
    table = [[sum(new), len(new) - sum(new)], [sum(known), len(known) - sum(known)]]
    assert found.p_value == pytest.approx(fisher_exact(table, alternative="less").pvalue, rel=1e-6)
    assert found.drop == pytest.approx(sum(known) / len(known) - sum(new) / len(new))


def test_with_several_classes_the_accuracy_test_is_the_share_of_all_permutations() -> None:
    known, known_labels = np.array([1, 1, 1, 0, 1, 1, 0], bool), np.array([0, 0, 0, 0, 1, 1, 1])
    new, new_labels = np.array([1, 0, 0, 0, 1], bool), np.array([0, 0, 1, 1, 1])
    totals = []
    for first in itertools.combinations([1, 1, 1, 0, 1, 0], 2):
        totals += [sum(first) + sum(second) for second in itertools.combinations([1, 1, 0, 0, 0, 1], 3)]
    found = accuracy_test(known, new, known_labels, new_labels)
    assert found.p_value == pytest.approx(sum(total <= 2 for total in totals) / len(totals))
    assert found.expected == pytest.approx((2 * 3 / 4 + 3 * 2 / 3) / 5)
    assert found.found == 2 / 5
    assert found.drop == pytest.approx(0.3)


def test_harder_classes_among_the_new_images_are_no_drop() -> None:
    known, known_labels = np.arange(200) % 200 < 140, (np.arange(200) >= 100).astype(np.int64)
    new, new_labels = np.arange(100) % 5 < 2, np.ones(100, dtype=np.int64)
    found = accuracy_test(known, new, known_labels, new_labels)
    assert (found.expected, found.found) == (0.4, 0.4)
    assert found.p_value > 0.4
    mixed = accuracy_test(known, new, np.zeros(200), np.zeros(100))
    assert mixed.p_value < 1e-5


def test_without_a_class_in_common_there_is_no_accuracy_to_compare() -> None:
    found = accuracy_test(np.ones(3, bool), np.zeros(3, bool), np.zeros(3), np.ones(3))
    assert found.p_value == 1.0
    assert math.isnan(found.drop)
