"""Norms with running statistics that are no BatchNorm: what they hold stays, in a frozen copy and in readapt."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nss.critical import critical_neurons
from nss.freeze import freeze, thaw
from nss.profile import profile
from nss.readapt import readapt
from nss.slice import semantic_slices

SHAPE = (1, 8, 8)


class Normed(nn.Module):
    """Instance norms with running statistics, with affine entries and without, and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.first = nn.InstanceNorm2d(4, affine=True, track_running_stats=True)
        self.second = nn.InstanceNorm2d(4, track_running_stats=True)
        self.hidden = nn.Linear(4, 40)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(40, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.second(self.first(self.conv(x)))).mean((2, 3))
        return self.head(self.drop(F.relu(self.hidden(x))))


@pytest.fixture
def model() -> Normed:
    torch.manual_seed(0)
    network = Normed()
    for _ in range(3):
        network(torch.rand(8, *SHAPE))
    return network


def buffers(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.named_buffers()}


def check_still(model: nn.Module, before: dict[str, Tensor]) -> None:
    after = dict(model.named_buffers())
    assert list(after) == list(before)
    assert {name.partition(".")[2] for name in after} == {"running_mean", "running_var", "num_batches_tracked"}
    assert all(torch.equal(tensor, before[name]) for name, tensor in after.items())


@pytest.mark.parametrize("training", [True, False])
def test_a_frozen_copy_leaves_running_statistics_in_any_mode(model: Normed, training: bool) -> None:
    before, images = buffers(model), torch.rand(8, *SHAPE)
    assert int(before["first.num_batches_tracked"]) == 0  # PyTorch counts for BatchNorm alone
    frozen = freeze(model.train(training), {"hidden": torch.arange(40) < 10}, SHAPE)
    assert frozen.drop.training is training
    frozen.train()
    optimizer = torch.optim.AdamW(frozen.parameters(), 0.1)
    for _ in range(3):
        optimizer.zero_grad()
        frozen(images).square().sum().backward()
        optimizer.step()
    assert not torch.equal(frozen(images), frozen(images))  # dropout
    check_still(thaw(frozen), before)
    check_still(model, before)


def test_a_frozen_copy_answers_as_the_model_and_is_thawed_in_its_own_mode(model: Normed) -> None:
    images = torch.rand(8, *SHAPE)
    frozen = freeze(model, {"hidden": torch.arange(40) < 10}, SHAPE)
    expected = model.eval()(images)
    assert torch.equal(frozen.eval()(images), expected)
    for training in (True, False):
        plain = thaw(frozen.train(training))
        assert [type(each) for each in plain.modules()] == [type(each) for each in model.modules()]
        assert {each.training for each in plain.modules()} == {training}
        assert list(plain.state_dict()) == list(model.state_dict())
        assert [name for name, _ in plain.named_parameters()] == [name for name, _ in model.named_parameters()]


def test_readapt_leaves_running_statistics_and_drops_out(
    model: Normed, networks: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = networks.coloured_data(80, classes=4)
    samples = data.images.float() / 255, data.labels
    found = profile(model, samples, ("taylor",), windows=1, input_shape=SHAPE, classes=data.classes)
    slices = semantic_slices(critical_neurons(found, "taylor", "cumulative", 0.9), found)
    before, real = buffers(model), F.dropout
    modes: list[bool] = []

    def dropout(x: Tensor, p: float, training: bool, inplace: bool) -> Tensor:
        modes.append(training)
        return real(x, p, training, inplace)

    monkeypatch.setattr(F, "dropout", dropout)
    arguments: dict[str, Any] = {"share": 0.5, "epochs": 2, "batch_size": 8, "learning_rate": 0.01}
    result = readapt(model, slices, samples, profile=found, guard=0.01, **arguments)
    check_still(result.model, before)
    check_still(model, before)
    assert modes.count(True) == result.report.steps > 0
    assert False in modes
