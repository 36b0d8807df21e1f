"""BatchNorm statistics taken again: means and variances as by hand, everything else as it was."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nss.model import model_digest
from nss.statistics import retake_statistics

RGB = (3, 6, 6)


class Two(nn.Module):
    """Two norms, one behind the other, with dropout between them."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.bn1 = nn.BatchNorm2d(4, momentum=0.3)
        self.drop = nn.Dropout(dropout)
        self.hidden = nn.Linear(4, 5)
        self.bn2 = nn.BatchNorm1d(5, momentum=None)
        self.head = nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop(F.relu(self.bn1(self.conv(x)))).mean((2, 3))
        return self.head(F.relu(self.bn2(self.hidden(x))))


def by_hand(network: Two, images: Tensor, size: int) -> list[Tensor]:
    """Means and variances (n - 1) of what enters each norm, averaged over batches that normalise by their own."""
    found: list[list[Tensor]] = [[], [], [], []]
    for start in range(0, len(images), size):
        x = network.conv(images[start : start + size])
        flat = x.permute(0, 2, 3, 1).reshape(-1, 4)
        mean, spread = flat.mean(0), flat.var(0, unbiased=False)
        x = (flat - mean) / (spread + network.bn1.eps).sqrt() * network.bn1.weight + network.bn1.bias
        pooled = network.hidden(x.clamp(min=0).view(-1, 36, 4).mean(1))
        for each, value in zip(found, (mean, flat.var(0), pooled.mean(0), pooled.var(0)), strict=True):
            each.append(value.detach())
    return [torch.stack(each).mean(0) for each in found]


@pytest.mark.parametrize("size", [30, 10, 250])
def test_means_and_variances_are_those_of_the_images(networks: ModuleType, size: int) -> None:
    torch.manual_seed(0)
    network = networks.randomise(Two(), 1).double().eval()
    images = networks.floats(30, RGB).double()
    expected = by_hand(network, images, min(size, 30))
    retake_statistics(network, images, size)
    found = [network.bn1.running_mean, network.bn1.running_var, network.bn2.running_mean, network.bn2.running_var]
    for left, right in zip(found, expected, strict=True):
        torch.testing.assert_close(left, right)


def test_the_rest_that_does_not_fill_a_batch_is_left_out(networks: ModuleType) -> None:
    first, second = Two(), Two()
    second.load_state_dict(first.state_dict())
    images = networks.floats(29, RGB)
    retake_statistics(first, images, 10)
    retake_statistics(second, images[:20], 10)
    assert model_digest(first) == model_digest(second)


@pytest.mark.parametrize(("count", "equal"), [(29, 10), (21, 7), (30, 10), (9, 9)])
def test_none_is_left_out_when_all_are_asked_for_and_batches_are_as_equal_as_can_be(
    networks: ModuleType, count: int, equal: int
) -> None:
    torch.manual_seed(0)
    network = networks.randomise(Two(), 1).double().eval()
    images = networks.floats(count, RGB).double()
    expected = by_hand(network, images, equal)
    retake_statistics(network, images, 10, all_images=True)
    found = [network.bn1.running_mean, network.bn1.running_var, network.bn2.running_mean, network.bn2.running_var]
    for left, right in zip(found, expected, strict=True):
        torch.testing.assert_close(left, right)


def test_weights_momenta_modes_and_hooks_stay_as_they_were(networks: ModuleType) -> None:
    network = networks.randomise(Two(0.5), 1)
    network.eval()
    network.drop.train()
    network.bn2.train()
    network.conv.register_forward_hook(lambda *_: None)
    network.register_buffer("other", torch.arange(3.0))
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    modes = [module.training for module in network.modules()]
    retake_statistics(network, networks.floats(20, RGB))
    assert (network.bn1.momentum, network.bn2.momentum) == (0.3, None)
    assert [module.training for module in network.modules()] == modes
    assert len(network.conv._forward_hooks) == 1
    changed = {name for name, tensor in network.state_dict().items() if not torch.equal(tensor, before[name])}
    statistics = {"running_mean", "running_var", "num_batches_tracked"}
    assert changed == {f"{norm}.{name}" for norm in ("bn1", "bn2") for name in statistics}
    assert all(parameter.grad is None for parameter in network.parameters())


def test_dropout_is_off_and_no_random_number_is_drawn(networks: ModuleType) -> None:
    quiet, noisy = Two(0.0), Two(0.9)
    noisy.load_state_dict(quiet.state_dict())
    noisy.train()
    state = torch.get_rng_state()
    for each in (quiet, noisy):
        retake_statistics(each, networks.floats(20, RGB))
    assert model_digest(quiet) == model_digest(noisy)
    assert torch.equal(torch.get_rng_state(), state)


def test_what_has_no_running_statistics_is_left_as_it_is(networks: ModuleType) -> None:
    free = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, track_running_stats=False), nn.Flatten())
    for network in (networks.GroupNormed(), networks.Residual(), free):
        before = model_digest(network)
        retake_statistics(network, networks.floats(20, RGB))
        assert model_digest(network) == before


@pytest.mark.parametrize("count", [0, 1])
def test_too_few_images_for_a_variance_change_nothing(networks: ModuleType, count: int) -> None:
    network = networks.randomise(Two(), 1)
    before = model_digest(network)
    retake_statistics(network, networks.floats(count, RGB))
    assert model_digest(network) == before


def test_a_classifier_takes_its_images_as_they_are_stored(networks: ModuleType) -> None:
    model = networks.zoo_model("resnet20")
    images = networks.pictures(32)
    retake_statistics(model, images)
    with torch.no_grad():
        made = model.network.stem[0](model.normalise(images)).permute(1, 0, 2, 3).flatten(1)
    torch.testing.assert_close(model.network.stem[1].running_mean, made.mean(1), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(model.network.stem[1].running_var, made.var(1), atol=1e-4, rtol=1e-4)


def test_taking_them_twice_changes_no_more(networks: ModuleType) -> None:
    model = networks.zoo_model("resnet20")
    retake_statistics(model, networks.pictures(32))
    once = model_digest(model)
    retake_statistics(model, networks.pictures(32))
    assert model_digest(model) == once


class Interrupted(nn.Module):
    """Fails at the second batch."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.calls > 1:
            raise KeyboardInterrupt
        return x


@pytest.mark.parametrize("images_fit", [False, True], ids=["before the norms", "after a whole batch"])
def test_statistics_come_back_after_an_error(networks: ModuleType, images_fit: bool) -> None:
    network = nn.Sequential(networks.randomise(Two(), 1), Interrupted())
    network[0].bn1.num_batches_tracked.fill_(7)
    buffer, before = network[0].bn1.running_mean, model_digest(network)
    with pytest.raises(KeyboardInterrupt if images_fit else RuntimeError):
        retake_statistics(network, networks.floats(20, RGB if images_fit else (2, 6, 6)), 10)
    assert model_digest(network) == before
    assert network[0].bn1.running_mean is buffer


def test_momenta_and_modes_come_back_after_an_error_too(networks: ModuleType) -> None:
    network = Two()
    modes = [module.training for module in network.modules()]
    with pytest.raises(RuntimeError):
        retake_statistics(network, networks.floats(20, (2, 6, 6)))
    assert (network.bn1.momentum, network.bn2.momentum) == (0.3, None)
    assert [module.training for module in network.modules()] == modes
