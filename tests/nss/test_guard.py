"""The guard: the squared change of what layers computed on old inputs, from second moments alone."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from nss.errors import ProfileError
from nss.freeze import freeze, thaw
from nss.guard import Guard
from nss.profile import profile
from nss.sites import find_sites

few = settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def guarded(network: nn.Module, free: dict[str, Tensor], images: Tensor, classes: int) -> tuple[nn.Module, Guard]:
    shape = tuple(images.shape[1:])
    names = [str(label) for label in range(classes)]
    data = (images, torch.arange(len(images)) % classes)
    found = profile(network, data, ("avg",), classes=names, input_shape=shape, gram=False, windows=1)
    frozen = freeze(network, free, shape)
    return frozen, Guard(frozen, find_sites(network, shape).anatomy, found)


def disturb(frozen: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in frozen.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)


@given(seed=st.integers(0, 999))
@few
def test_for_one_by_one_convolutions_and_linear_layers_it_is_the_change_on_the_very_images(
    networks: ModuleType, seed: int
) -> None:
    network, images = networks.Plain(), networks.floats(9, (1, 3, 3), seed)
    free = {"hidden": torch.tensor([True, False, True])}
    frozen, guard = guarded(network, free, images, 2)
    assert guard() == 0
    disturb(frozen, seed)
    with torch.no_grad():
        read = torch.relu(network.conv(images)).mean((2, 3))
        moved = thaw(frozen).hidden.weight - network.hidden.weight
        shifted = thaw(frozen).hidden.bias - network.hidden.bias
        expected = (read @ moved.T + shifted).square().mean(0).sum()
    assert guard() == pytest.approx(float(expected) / 3, rel=1e-4)


def folded(network: nn.Module, layer: str, norm: str | None) -> tuple[Tensor, Tensor]:
    """Weight and bias of a layer with the norm behind it, written out."""
    weight, bias = network.get_submodule(layer).weight.double(), network.get_submodule(layer).bias
    if norm is None:
        return weight, bias.double()
    bn = network.get_submodule(norm)
    scale = bn.weight.double() / (bn.running_var.double() + bn.eps).sqrt()
    shift = (0 if bias is None else bias.double()) - bn.running_mean.double()
    return weight * scale.view(-1, 1, 1, 1), bn.bias.double() + shift * scale


def seen_by(network: nn.Module, layer: str, images: Tensor) -> Tensor:
    seen: list[Tensor] = []
    handle = network.get_submodule(layer).register_forward_pre_hook(lambda _m, given: seen.append(given[0].double()))
    network(images)
    handle.remove()
    return seen[0]


def slid_over_everything(x: Tensor, weight: Tensor, bias: Tensor, groups: int) -> Tensor:
    """The squared change at every place where the window touches the map, the bias counting where its centre does."""
    ones = torch.ones_like(x[:, :1])
    x = torch.cat([torch.cat([part, ones], 1) for part in x.chunk(groups, 1)], 1)
    last = torch.zeros_like(weight[:, :1])
    last[:, 0, last.shape[2] // 2, last.shape[3] // 2] = bias
    kernel = torch.cat([weight, last], 1)
    outputs = F.conv2d(x, kernel, padding=[size - 1 for size in weight.shape[2:]], groups=groups)
    return outputs.square().sum() / (len(x) * x.shape[2] * x.shape[3])


def test_norms_scale_it_and_the_positions_of_a_kernel_count_together(networks: ModuleType) -> None:
    model = networks.zoo_model("vgg_small")
    network, images = model.network, networks.floats(6, networks.SHAPE)
    free = {"features.0": torch.arange(32) < 9, "features.10": torch.arange(64) % 3 == 0}
    free["hidden"] = torch.arange(256) < 5
    frozen, guard = guarded(network, free, images, 4)
    disturb(frozen, 1)
    plain, expected = thaw(frozen), 0.0
    with torch.no_grad():
        for layer, norm in (("features.0", "features.1"), ("features.10", "features.11"), ("hidden", None)):
            seen = seen_by(network, layer, images)
            pairs = zip(folded(plain, layer, norm), folded(network, layer, norm), strict=True)
            weight, bias = (after - before for after, before in pairs)
            if norm is None:
                change = (seen.flatten(1) @ weight.T + bias).square().mean(0).sum()
            else:
                change = slid_over_everything(seen, weight, bias, 1)
            expected += float(change) / len(weight)
    assert guard() == pytest.approx(expected, rel=1e-4)


def test_a_kernel_that_cancels_over_smooth_images_costs_less_than_one_that_adds_up(networks: ModuleType) -> None:
    network = networks.Grouped()
    images = networks.floats(4, (3, 1, 1)).expand(4, 3, 9, 9).contiguous()
    costs = []
    for signs in ([1.0] * 9, [1.0, -1.0] * 4 + [0.0]):
        frozen, guard = guarded(network, {"grouped": torch.arange(16) == 0}, images, 4)
        with torch.no_grad():
            next(frozen.parameters()).add_(0.1 * torch.tensor(signs).view(1, 1, 3, 3))
        costs.append(guard())
    assert costs[1] < costs[0] / 5


def test_a_grouped_convolution_reads_its_own_group(networks: ModuleType) -> None:
    network, images = networks.Grouped(), networks.floats(6, (3, 5, 5))
    free = {"grouped": torch.arange(16) % 2 == 0, "conv": torch.arange(16) == 3}
    frozen, guard = guarded(network, free, images, 4)
    disturb(frozen, 0)
    plain = thaw(frozen)
    with torch.no_grad():
        total = torch.zeros(())
        for layer, groups in (("conv", 1), ("grouped", 2)):
            before, after = network.get_submodule(layer), plain.get_submodule(layer)
            moved = (after.weight - before.weight).double(), (after.bias - before.bias).double()
            total = total + slid_over_everything(seen_by(network, layer, images), *moved, groups)
    assert guard() == pytest.approx(float(total) / 16, rel=1e-4)


def test_positions_and_the_bias_of_a_wide_linear_layer_count_apart(
    networks: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nss.windows.WIDEST", 8)
    model = networks.zoo_model("vgg_small")
    network, images = model.network, networks.floats(6, networks.SHAPE)
    frozen, guard = guarded(network, {"hidden": torch.arange(256) < 5}, images, 4)
    disturb(frozen, 1)
    with torch.no_grad():
        seen = seen_by(network, "hidden", images).unflatten(1, (128, -1))
        pairs = zip(folded(thaw(frozen), "hidden", None), folded(network, "hidden", None), strict=True)
        weight, bias = (after - before for after, before in pairs)
        weight = weight.unflatten(1, (128, -1))
        gram = torch.einsum("ncp,ndp->cd", seen, seen) / (seen.shape[0] * seen.shape[2])
        expected = torch.einsum("ocp,cd,odp->", weight, gram, weight) + bias.square().sum()
    assert guard() == pytest.approx(float(expected) / 256, rel=1e-4)


def test_channels_positions_and_the_shift_of_a_wide_kernel_count_apart(
    networks: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a kernel, what channels do together at one place, times what places do together, mean over channels."""
    monkeypatch.setattr("nss.windows.WIDE", 8)
    network, images = networks.Grouped(), networks.floats(6, (3, 5, 5))
    free = {"grouped": torch.arange(16) % 3 == 0}
    frozen, guard = guarded(network, free, images, 4)
    disturb(frozen, 0)
    plain, expected = thaw(frozen), 0.0
    with torch.no_grad():
        seen = seen_by(network, "grouped", images)
        count, height, width = len(seen), seen.shape[2], seen.shape[3]
        power = seen.square().sum()
        apart = torch.zeros(9, 9, dtype=torch.float64)
        for a in range(9):
            for b in range(9):
                down, right = b // 3 - a // 3, b % 3 - a % 3
                for y in range(max(0, -down), min(height, height - down)):
                    for x in range(max(0, -right), min(width, width - right)):
                        apart[a, b] += (seen[:, :, y, x] * seen[:, :, y + down, x + right]).sum() / power
        moved = (plain.grouped.weight - network.grouped.weight).double().flatten(2)
        shift = (plain.grouped.bias - network.grouped.bias).double()
        half = seen.shape[1] // 2
        for row in range(16):
            read = seen[:, :half] if row < 8 else seen[:, half:]
            gram = torch.einsum("ncyx,ndyx->cd", read, read) / (count * height * width)
            expected += float(torch.einsum("cp,cd,pq,dq->", moved[row], gram, apart, moved[row]) + shift[row] ** 2)
    assert guard() == pytest.approx(expected / 16, rel=1e-4)


def test_without_windows_it_says_what_to_do(networks: ModuleType) -> None:
    network, images = networks.Plain(), networks.floats(6, (1, 3, 3))
    found = profile(network, (images, torch.arange(6) % 2), ("avg",), classes=["a", "b"], input_shape=(1, 3, 3))
    frozen = freeze(network, {"head": torch.tensor([True, False])}, (1, 3, 3))
    with pytest.raises(ProfileError, match=r"head[\s\S]*windows=1"):
        Guard(frozen, find_sites(network, (1, 3, 3)).anatomy, found)


def test_more_old_data_with_the_same_second_moment_is_the_same_guard(networks: ModuleType) -> None:
    network, images = networks.Plain(), networks.floats(6, (1, 3, 3))
    values = []
    for data in (images, torch.cat([images, images])):
        frozen, guard = guarded(network, {"head": torch.tensor([True, False])}, data, 2)
        disturb(frozen, 0)
        values.append(guard())
    assert values[0] == pytest.approx(values[1])


class Normed(nn.Module):
    """A BatchNorm behind a linear layer, and one before a layer that reads it with a ReLU between."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm = nn.Linear(3, 5), nn.BatchNorm1d(5)
        self.before, self.last = nn.BatchNorm1d(5), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.norm(self.first(x.flatten(1))))
        return self.last(torch.relu(self.before(x)))


def test_a_norm_behind_a_linear_layer_is_folded_in_and_one_without_a_layer_counts_by_itself(
    networks: ModuleType,
) -> None:
    network, images = Normed(), networks.floats(40, (3, 1, 1))
    network.norm.momentum = network.before.momentum = None
    network.train()(images)
    network.eval()
    free = {"first": torch.arange(5) != 2}
    frozen, guard = guarded(network, free, images, 2)
    assert {".".join(name.split(".")[-2:]) for name, _ in frozen.named_parameters()} == {
        f"{layer}.free_{entry}" for layer in ("first", "norm", "before") for entry in ("weight", "bias")
    }
    assert guard() == 0
    disturb(frozen, 3)
    plain = thaw(frozen)
    with torch.no_grad():
        x = images.flatten(1)
        folded_in = (plain.norm(plain.first(x)) - network.norm(network.first(x))).square().mean(0).sum()
        read = torch.tanh(network.norm(network.first(x)))
        # With the running variance of a batch, n / (n - 1) of its own, what is normed has a variance a little below 1.
        by_itself = (plain.before(read) - network.before(read)).square().mean(0).sum()
    assert guard() == pytest.approx(float(folded_in + by_itself) / 5, rel=0.03)
    norm = (plain.before.weight - network.before.weight).square() + (plain.before.bias - network.before.bias).square()
    assert guard() == pytest.approx(float((folded_in + norm.sum()).detach()) / 5, rel=1e-4)


class Unbiased(nn.Module):
    """Nothing is added anywhere."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm = nn.Conv2d(3, 4, 1, bias=False), nn.GroupNorm(2, 4)
        self.norm.register_parameter("bias", None)
        self.head = nn.Linear(4, 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.norm(self.conv(x))).mean((2, 3)))


@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
def test_layers_and_norms_that_add_nothing_count_too(networks: ModuleType, kind: torch.dtype) -> None:
    network, images = Unbiased().to(kind), networks.floats(6, (3, 3, 3)).to(kind)
    free = {"conv": torch.tensor([True, False, True, True]), "head": torch.tensor([False, True])}
    frozen, guard = guarded(network, free, images, 2)
    assert guard() == 0
    disturb(frozen, 1)
    moved = {
        name: (thaw(frozen).get_submodule(name).weight - each.weight).detach().double()
        for name, each in network.named_children()
    }
    assert all(bool(each.any()) for each in moved.values())
    with torch.no_grad():
        change = F.conv2d(images.double(), moved["conv"]).square().mean((0, 2, 3)).sum() / 4
        read = torch.relu(network.norm(network.conv(images))).mean((2, 3)).double()
        of_head = (read @ moved["head"].T).square().mean(0).sum() / 2
    expected = float(change + moved["norm"].square().sum() / 4 + of_head)
    assert guard() == pytest.approx(expected, rel=1e-4)
