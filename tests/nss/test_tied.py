"""What hangs together beyond one layer: channels tied to the image or to parameters, and a module under two names."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import nss
from nss.anatomy import TIED
from nss.remove import BOUND

RGB = (3, 6, 6)
THIRD = torch.tensor([True, False, True])


class Gated(nn.Module):
    """The image, or a parameter, or a map of its own width, joined with what a convolution makes."""

    def __init__(self, how: str) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.how = how
        self.gate = nn.Conv2d(3, 3, 3, padding=1)
        self.norm = nn.BatchNorm2d(3, affine=how == "affine norm")
        self.scale = nn.Parameter(torch.rand(1, 3, 1, 1) + 0.5)
        self.last = nn.Conv2d(3, 5, 1)
        self.head = nn.Linear(5, 4)
        self.norm.running_mean.copy_(torch.tensor([0.2, -0.7, 0.4]))

    def forward(self, x: Tensor) -> Tensor:
        made = self.gate(x)
        if self.how == "gate":
            x = x * torch.sigmoid(made)
        elif self.how == "parameter":
            x = torch.sigmoid(made) * self.scale
        elif self.how in ("norm", "affine norm"):
            x = x + self.norm(made)
        elif self.how == "sigmoid behind":
            x = torch.sigmoid(x + made)
        elif self.how == "rectified":
            x = x + F.relu(made)
        return self.head(F.relu(self.last(x)).mean((2, 3)))


@pytest.mark.parametrize("how", ["gate", "parameter", "norm", "sigmoid behind"])
def test_channels_that_can_neither_leave_nor_be_silenced_are_kept_and_the_plan_says_why(
    networks: ModuleType, how: str
) -> None:
    network, images = Gated(how).eval(), networks.floats(7, RGB)
    neurons = {"gate": THIRD, "last": torch.arange(5) < 4}
    smaller, masked = nss.remove(network, neurons, RGB), nss.sliced(network, neurons, RGB)
    only_last = nss.sliced(network, {"last": neurons["last"]}, RGB)
    assert networks.largest_difference(masked, smaller, images) < 1e-6
    assert networks.largest_difference(masked, only_last, images) == 0
    assert torch.equal(smaller.gate.weight, network.gate.weight)
    plan = nss.plan_removal(network, neurons, RGB).layers
    assert (plan["gate"].kept, plan["gate"].added, plan["gate"].masked, plan["gate"].removed) == (3, 1, 0, 0)
    assert plan["gate"].reason == BOUND
    assert (plan["last"].removed, plan["last"].reason) == (1, "")


@pytest.mark.parametrize("how", ["rectified", "affine norm"])
def test_channels_tied_to_the_image_that_can_be_silenced_are_masked_as_before(networks: ModuleType, how: str) -> None:
    network, images = Gated(how).eval(), networks.floats(7, RGB)
    smaller, masked = nss.remove(network, {"gate": THIRD}, RGB), nss.sliced(network, {"gate": THIRD}, RGB)
    assert networks.largest_difference(masked, smaller, images) < 1e-6
    assert networks.largest_difference(network, smaller, images) > 1e-3
    plan = nss.plan_removal(network, {"gate": THIRD}, RGB).layers["gate"]
    assert (plan.kept, plan.added, plan.masked, plan.removed, plan.reason) == (2, 0, 1, 0, TIED)


def test_a_layer_that_is_kept_whole_has_no_reason() -> None:
    assert nss.plan_removal(Gated("gate").eval(), {}, RGB).layers["gate"].reason == ""


def test_unequal_groups_of_a_grouped_convolution_are_masked_and_the_plan_says_why(networks: ModuleType) -> None:
    network = networks.Grouped().eval()
    plan = nss.plan_removal(network, {"conv": torch.arange(16) >= 3}, RGB).layers
    assert (plan["conv"].kept, plan["conv"].masked, plan["conv"].removed) == (13, 3, 0)
    assert plan["conv"].reason == "the groups of a grouped convolution would lose unequal numbers"
    even = nss.plan_removal(network, {"conv": ~torch.isin(torch.arange(16), torch.tensor([0, 1, 8]))}, RGB).layers
    assert (even["conv"].kept, even["conv"].masked, even["conv"].removed) == (13, 1, 2)
    assert even["conv"].reason == "the groups of a grouped convolution would lose unequal numbers"
    assert plan["grouped"].reason == ""


class TwoNames(nn.Module):
    """One module under two names, called under each."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 6, 3, padding=1)
        self.again = nn.Conv2d(6, 6, 3, padding=1)
        self.and_again = self.again
        self.head = nn.Linear(6, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.again(F.relu(self.conv(x))))
        return self.head(F.relu(self.and_again(x)).mean((2, 3)))


def two_names() -> nss.Classifier:
    return nss.build_model(f"{__name__}:TwoNames", ("a", "b"), (1, 8, 8), 0, allow=[__name__]).eval()


def returned(model: nss.Classifier, folder: Path) -> nss.Classifier:
    nss.save_model(model, folder)
    return nss.load_model(folder, allow=[__name__])


def test_a_module_under_two_names_is_saved_and_loaded_with_equal_logits(networks: ModuleType, tmp_path: Path) -> None:
    model, images = two_names(), networks.pictures(4, (1, 8, 8))
    loaded = returned(model, tmp_path / "whole")
    assert torch.equal(loaded(images), model(images))
    assert loaded.network.and_again is loaded.network.again
    assert nss.model_digest(loaded) == nss.model_digest(model)


def test_a_module_under_two_names_is_cut_once_and_masked_once(networks: ModuleType, tmp_path: Path) -> None:
    model, images = two_names(), networks.pictures(4, (1, 8, 8))
    keep = torch.arange(6) % 2 == 0
    smaller = nss.remove(model, {"conv": keep, "again": keep, "again#2": keep}).eval()
    assert smaller.network.again.weight.shape == (3, 3, 3, 3)
    assert torch.equal(returned(smaller, tmp_path / "cut")(images), smaller(images))
    pruned = nss.prune_weights(model, sparsity=0.5)
    loaded = returned(pruned, tmp_path / "pruned")
    assert torch.equal(loaded(images), pruned(images))
    assert nss.count_masked(loaded) == nss.count_masked(pruned)


def test_layers_that_share_a_weight_are_saved_and_loaded_with_equal_logits(
    networks: ModuleType, tmp_path: Path
) -> None:
    model = nss.build_model(f"{__name__}:shared", ("a", "b"), (1, 8, 8), 0, allow=[__name__]).eval()
    images = networks.pictures(4, (1, 8, 8))
    loaded = returned(model, tmp_path / "m")
    assert torch.equal(loaded(images), model(images))
    assert loaded.network[2].weight is loaded.network[0].weight


def shared(num_classes: int) -> nn.Module:
    """A factory of two layers with one weight."""
    first, second = (nn.Conv2d(1, 1, 3, padding=1) for _ in range(2))
    second.weight = first.weight
    return nn.Sequential(first, nn.ReLU(), second, nn.Flatten(), nn.Linear(64, num_classes))


class TwiceFixed(nn.Module):
    """What is added to the image passes a norm of groups, or a view, which fix its channels too."""

    def __init__(self, how: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.how, self.conv, self.norm = how, nn.Conv2d(4, 4, 3, padding=1), nn.GroupNorm(2, 4)
        self.last, self.head = nn.Conv2d(4, 5, 1), nn.Linear(5, 3)
        self.norm.bias.data.copy_(torch.tensor([0.3, -0.2, 0.5, 0.4]))

    def forward(self, x: Tensor) -> Tensor:
        made = self.conv(x)
        x = x + (self.norm(made) if self.how == "norm" else F.relu(made).view(-1, 4, 6, 6))
        return self.head(F.relu(self.last(x)).mean((2, 3)))


@pytest.mark.parametrize("how", ["norm", "view"])
def test_channels_tied_to_the_image_are_masked_exactly_whatever_else_fixes_them(networks: ModuleType, how: str) -> None:
    network, images = TwiceFixed(how).eval(), networks.floats(7, (4, 6, 6))
    neurons = {"conv": torch.tensor([True, False, True, True])}
    smaller, masked = (each(network, neurons, (4, 6, 6)) for each in (nss.remove, nss.sliced))
    assert networks.largest_difference(masked, smaller, images) < 1e-6
