"""RQ2: both settings are compared at the compression rate that both reach within the tolerance."""

from __future__ import annotations

from bench import rq2
from bench.common import Row


def course(setting: str, rates: list[float], accuracies: list[float], stop: int, seed: int = 0) -> list[Row]:
    identity = {"data": "d", "model": "m:n", "seed": seed, "method": "lamp", "setting": setting}
    rows: list[Row] = [
        {**identity, "iterations": number, "cr": rate, "val_accuracy": accuracy, "stop": False}
        for number, (rate, accuracy) in enumerate(zip(rates, accuracies, strict=True))
    ]
    rows[stop] |= {"stop": True, "val_original": 0.90, "accuracy": accuracies[stop]}
    return rows


DENSE = course("dense", [1.0, 1.25, 1.56, 1.95, 2.44], [0.90, 0.90, 0.90, 0.89, 0.88], stop=3)


def test_iterations_are_counted_to_the_smaller_rate_of_both_stops() -> None:
    sliced = course("pre-slice", [1.6, 2.0, 2.5], [0.90, 0.895, 0.85], stop=1)
    dense, pre_slice = rq2._at_same_rate([*DENSE, *sliced])
    assert (dense["same_cr"], dense["iterations_same"], dense["iterations"], dense["within"]) == (1.95, 3, 3, 1.0)
    assert (pre_slice["same_cr"], pre_slice["iterations_same"], pre_slice["within"]) == (1.95, 1, 1.0)


def test_a_start_that_loses_more_than_the_tolerance_is_no_stop_to_compare_at() -> None:
    sliced = course("pre-slice", [1.6, 2.0], [0.8899, 0.88], stop=0)
    dense, pre_slice = rq2._at_same_rate([*DENSE, *sliced])
    assert (dense["within"], pre_slice["within"]) == (1.0, 0.0)
    assert [row[name] for row in (dense, pre_slice) for name in ("same_cr", "iterations_same")] == [None] * 4


def test_a_loss_of_just_the_tolerance_is_within_it() -> None:
    sliced = course("pre-slice", [1.6, 2.0], [0.89, 0.88], stop=0)
    _, pre_slice = rq2._at_same_rate([*DENSE, *sliced])
    assert (pre_slice["within"], pre_slice["same_cr"], pre_slice["iterations_same"]) == (1.0, 1.6, 0)


def test_seeds_are_compared_apart() -> None:
    sliced = course("pre-slice", [1.6, 2.0], [0.80, 0.80], stop=0)
    others = [
        *course("dense", [1.0, 1.25], [0.9, 0.9], 1, seed=1),
        *course("pre-slice", [1.5, 1.9], [0.9, 0.9], 1, seed=1),
    ]
    found = rq2._at_same_rate([*DENSE, *sliced, *others])
    assert [(row["seed"], row["setting"], row["same_cr"]) for row in found] == [
        (0, "dense", None),
        (0, "pre-slice", None),
        (1, "dense", 1.25),
        (1, "pre-slice", 1.25),
    ]
