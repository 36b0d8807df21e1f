"""The memory of a run is what all its tensors take together when they take most."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from bench.memory import peak_megabytes


def test_the_most_at_any_moment_counts_not_the_sum() -> None:
    model = nn.Linear(1000, 1000)
    own = 1000 * 1000 + 1000

    def run() -> None:
        for _ in range(3):
            first = torch.zeros(500, 1000)
            both = [first, torch.zeros(250, 1000)]
            del first, both
            torch.zeros(600, 1000)

    assert peak_megabytes(model, run) == pytest.approx(4e-6 * (own + 750_000))


def test_what_a_backward_pass_keeps_counts() -> None:
    model = nn.Sequential(
        nn.Linear(100, 1000, bias=False), nn.Tanh(), nn.Linear(1000, 100, bias=False)
    ).requires_grad_()
    images = torch.rand(400, 100)
    with torch.no_grad():
        without = peak_megabytes(model, lambda: model(images))
    kept = peak_megabytes(model, lambda: model(images).sum().backward())
    weights = 2 * 100 * 1000
    # Of each layer at least its result; and then the gradients of both.
    assert without == pytest.approx(4e-6 * (weights + 2 * 400 * 1000), rel=0.01)
    assert kept > 4e-6 * (2 * weights + 2 * 400 * 1000)


def test_a_run_that_makes_nothing_takes_the_model_alone() -> None:
    assert peak_megabytes(nn.BatchNorm1d(1000), lambda: None) == pytest.approx(4e-6 * 4000 + 8e-6)
