"""A ReLU before a max pool does its work behind it in a frozen copy: same answers, same gradients, same plain model."""

from __future__ import annotations

import copy
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nss.freeze import freeze, thaw
from nss.rows import FoldedActivation, RectifiedPool

SHAPE = (3, 16, 16)
FREE = {
    "first": torch.arange(20) < 7,
    "second": torch.arange(24) % 3 == 0,
    "third": torch.arange(24) >= 20,
    "fourth": torch.arange(18) < 5,
}


class Pools(nn.Module):
    """Pools that overlap and reach over the edge, of an even map, read beside their ReLU, and called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.relu1 = nn.Conv2d(3, 20, 3, padding=1), nn.BatchNorm2d(20), nn.ReLU(inplace=True)
        self.overlapping = nn.MaxPool2d(3, 2, padding=1)
        self.second, self.relu2, self.even = nn.Conv2d(20, 24, 3, padding=1), nn.ReLU(), nn.AdaptiveMaxPool2d(4)
        self.third, self.relu3, self.beside = nn.Conv2d(24, 24, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)
        self.fourth, self.relu4, self.twice = nn.Conv2d(24, 18, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)
        self.head = nn.Linear(18, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.overlapping(self.relu1(self.norm(self.first(x))))
        x = self.even(self.relu2(self.second(x)))
        x = self.relu3(self.third(x))
        x = self.beside(x).repeat_interleave(2, 2).repeat_interleave(2, 3) + x
        return self.head(self.twice(self.twice(self.relu4(self.fourth(x)))).flatten(1))


@pytest.fixture
def network(networks: ModuleType) -> nn.Module:
    return networks.randomise(Pools(), 3).double().eval()


def test_the_relu_moves_behind_a_pool_that_alone_reads_it(network: nn.Module) -> None:
    frozen = freeze(network, FREE, SHAPE)
    behind = {name for name, module in frozen.named_modules() if isinstance(module, RectifiedPool)}
    assert behind == {"overlapping", "even"}
    assert {name for name, module in frozen.named_modules() if isinstance(module, FoldedActivation)} == {
        *behind, "relu1", "relu2", "relu3", "relu4",
    }  # fmt: skip


def test_answers_and_gradients_are_those_of_the_plain_model(network: nn.Module, networks: ModuleType) -> None:
    images = networks.floats(6, SHAPE, 1).double()
    plain, frozen = copy.deepcopy(network), freeze(network, FREE, SHAPE)
    for model in (plain, frozen):
        answers = model(images)
        F.cross_entropy(answers, torch.arange(6) % 4).backward()
    torch.testing.assert_close(answers, network(images), rtol=1e-12, atol=1e-12)
    for name, mask in FREE.items():
        for entry in ("weight", "bias"):
            expected = getattr(plain.get_submodule(name), entry).grad[mask]
            assert bool((expected != 0).any())
            found = getattr(frozen.get_submodule(name), f"free_{entry}").grad
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-14)


def test_thawed_it_is_plain_again(network: nn.Module, networks: ModuleType) -> None:
    frozen = freeze(network, FREE, SHAPE)
    with torch.no_grad():
        frozen.get_submodule("first").free_weight.add_(0.5)
    plain = thaw(frozen)
    assert [type(module) for module in plain.modules()] == [type(module) for module in network.modules()]
    images = networks.floats(4, SHAPE, 2).double()
    torch.testing.assert_close(plain(images), frozen(images), rtol=1e-9, atol=1e-9)
    assert networks.largest_difference(plain, network, images) > 1e-2


def test_the_relu_passes_over_the_pooled_map_alone(network: nn.Module, networks: ModuleType) -> None:
    seen: list[int] = []
    kept = torch.autograd.graph.saved_tensors_hooks(lambda each: seen.append(each.numel()) or each, lambda each: each)
    frozen = freeze(network, {"first": FREE["first"]}, SHAPE)
    with kept:
        frozen.overlapping(frozen.relu1(frozen.norm(frozen.first(networks.floats(2, SHAPE).double()))))
    whole = 2 * 20 * 16 * 16
    # The pool keeps its input and where it found the largest, the ReLU what came of it.
    assert sorted(size for size in seen if size > 2 * 3 * 16 * 16) == [whole // 4, whole // 4, whole]
