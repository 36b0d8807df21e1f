"""Answers: what is not finite is no answer, wherever answers are counted."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import nss
from nss.predict import accuracy, answers_of
from nss.told import told_answers
from tasks.candidates import Answers

BROKEN = [float("nan"), float("inf"), float("-inf")]


class Given(nn.Module):
    """Answers with the image itself."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1)


def logits_with(value: float) -> Tensor:
    """Three images of class 0: one is answered right, one wrong, and one has something else in its logits."""
    return torch.tensor([[2.0, 1.0], [1.0, 2.0], [3.0, value]])


@pytest.mark.parametrize("value", BROKEN)
def test_what_is_not_finite_is_no_answer(value: float) -> None:
    assert answers_of(logits_with(value)).tolist() == [0, 1, -1]


@pytest.mark.parametrize("value", BROKEN)
def test_it_counts_as_wrong_wherever_it_is_counted(value: float) -> None:
    logits, labels = logits_with(value), torch.zeros(3, dtype=torch.int64)
    model = nss.build_model("nss.zoo:lenet", ["a", "b"], (1, 8, 8), seed=0)
    assert accuracy(Given(), (logits.view(3, 1, 1, 2), labels)) == pytest.approx(1 / 3)
    assert told_answers(model, logits, labels).tolist() == [0, 1, -1]
    found = Answers(model, logits, labels, ()).evaluation
    assert found is not None
    assert found.accuracy == pytest.approx(1 / 3)
