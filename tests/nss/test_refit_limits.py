"""Refit at the limits of numbers and of memory: half precision, weights that no type can hold, large maps."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny_helpers import classifier, correlated, cut, error, first
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nss.errors import RestructureError
from nss.refit import refit


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.middle = nn.Conv2d(8, 8, 3)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.middle(F.relu(self.conv(x)))).mean((2, 3)))


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_half_precision_loses_no_more_than_its_own_rounding(half: torch.dtype) -> None:
    """Of images that vary little about 10, sums overflow float16, and bfloat16 loses what they vary by."""
    torch.manual_seed(14)
    model, images = classifier(Network()), (correlated(100, rank=3) + 10).to(half)
    rough = copy.deepcopy(model).to(half)
    smaller, left = cut(rough, {"conv": first(5, 8)})
    refit(rough, smaller, left, images)
    exact, left = cut(rough.double(), {"conv": first(5, 8)})
    refit(rough, exact, left, images.double())
    lost = error(rough, exact, images.double())
    assert 0 < lost < error(rough, cut(rough, {"conv": first(5, 8)})[0], images.double())
    assert error(rough, smaller.double(), images.double()) == pytest.approx(lost, rel=0.05)


class Twins(nn.Module):
    """Two equal channels, averaged and summed by the head with the factor `head`."""

    def __init__(self, head: float) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 2, 1, bias=False)
        self.head = nn.Linear(2, 4, bias=False)
        with torch.no_grad():
            self.conv.weight.fill_(0.1)
            self.head.weight.fill_(head)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(x).mean((2, 3)))


@pytest.mark.parametrize(("head", "dtype"), [(float("nan"), torch.float32), (4e4, torch.float16)])
def test_weights_that_are_not_finite_are_refused_by_layer(head: float, dtype: torch.dtype) -> None:
    """What 40,000 and 40,000 are together is more than float16 can hold."""
    model = classifier(Twins(head)).to(dtype)
    smaller, left = cut(model, {"conv": first(1, 2)})
    before = smaller.network.head.weight.clone()
    with pytest.raises(RestructureError, match=r"'head'[\s\S]*model\.float\(\)") as caught:
        refit(model, smaller, left, (correlated(20) / 10).to(dtype))
    assert caught.value.where == f"head, in {str(dtype).removeprefix('torch.')}"
    assert torch.equal(smaller.network.head.weight.nan_to_num(), before.nan_to_num())


class Largest(TorchDispatchMode):
    """Keeps the bytes of the largest tensor that was made."""

    bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        self.bytes = max([self.bytes, *(each.nbytes for each in tree_leaves(found) if isinstance(each, Tensor))])
        return found


def test_only_the_places_that_are_drawn_are_unfolded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nss.refit.ROWS", 500)
    model, images = classifier(Network(), (3, 40, 40)), correlated(10, (3, 40, 40))
    smaller, left = cut(model, {"conv": first(5, 8)})
    with Largest() as largest:
        refit(model, smaller, left, images)
    assert largest.bytes == 10 * 8 * 40 * 40 * 8, "more than the largest map of the original"
    assert error(model, smaller, images) < error(model, cut(model, {"conv": first(5, 8)})[0], images)
