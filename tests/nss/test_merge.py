"""Merging: what readers read and make of it; folding is the formula, and exact where it can be."""

from __future__ import annotations

import math
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from nss.merge import RIDGE, Reading, fold, output_scale, readings, spread_weight
from nss.profile import Profile, profile
from nss.remove import remove
from nss.sites import Sites, find_sites

RGB = (3, 6, 6)
few = settings(max_examples=20, deadline=None)


def profiled(network: nn.Module, images: Tensor) -> tuple[Sites, Profile]:
    shape = tuple(images.shape[1:])
    labels = torch.arange(len(images)) % 2
    sums = profile(network, (images, labels), ("avg",), classes=["a", "b"], input_shape=shape, batch_size=16)
    return find_sites(network, shape), sums


def read_all(network: nn.Module, images: Tensor) -> tuple[Sites, dict[str, Reading]]:
    sites, sums = profiled(network, images)
    return sites, {each.name: each for each in readings(network, sites, sums)}


def random_gram(size: int, seed: int, rank: int | None = None) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(rank or 2 * size, size, generator=generator, dtype=torch.float64)
    return rows.T @ rows / len(rows)


# -- readings -----------------------------------------------------------------------------------------------------


def test_readings_come_in_forward_order_without_depthwise_layers_and_layers_that_read_the_image(
    networks: ModuleType,
) -> None:
    network = networks.Squeeze().eval()
    _, found = read_all(network, networks.floats(8, RGB))
    assert list(found) == ["squeeze", "excite", "narrow", "head"]


def test_a_reading_is_the_second_moment_of_what_enters_and_how_errors_in_it_add_up(networks: ModuleType) -> None:
    network = networks.Smooth().eval()
    images = networks.floats(12, (2, 4, 4))
    _, found = read_all(network, images)
    parts, _ = network.parts(images)
    with torch.no_grad():
        rows = parts["conv1"].permute(0, 2, 3, 1).reshape(-1, 3).double()
        flat = parts["conv2"].permute(0, 2, 3, 1).reshape(-1, 4).double()
    torch.testing.assert_close(found["conv2"].gram, rows.T @ rows / len(rows))
    torch.testing.assert_close(found["hidden"].gram, flat.T @ flat / len(flat))
    weight = network.conv2.weight.detach().double()
    for i in range(3):
        for j in range(3):
            product = float((weight[:, i] * weight[:, j]).sum())  # over outputs and kernel positions
            assert float(found["conv2"].importance[i, j]) == pytest.approx(product)
    wide = network.hidden.weight.detach().double().view(5, 4, 4)
    assert float(found["hidden"].importance[1, 3]) == pytest.approx(float((wide[:, 1] * wide[:, 3]).sum()))


def test_importance_counts_outputs_in_what_the_norm_makes_of_them(networks: ModuleType) -> None:
    network = nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 5, 1, bias=False), nn.BatchNorm2d(5), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 4),
    )  # fmt: skip
    networks.randomise(network, 3).eval()
    with torch.no_grad():
        network[3].weight[1] *= -1
    _, found = read_all(network, networks.floats(8, RGB))
    weight, norm = network[2].weight[:, :, 0, 0].detach().double(), network[3].requires_grad_(False)
    expected = torch.zeros(4, 4, dtype=torch.float64)
    for out in range(5):
        gain = float(norm.weight[out]) / math.sqrt(float(norm.running_var[out]) + norm.eps)
        expected += gain**2 * torch.outer(weight[out], weight[out])
    torch.testing.assert_close(found["2"].importance, expected, rtol=1e-6, atol=1e-9)


def scales(*layers: nn.Module) -> list[list[float]]:
    """What `output_scale` says of each layer with weights."""
    anatomy = find_sites(nn.Sequential(*layers).eval(), RGB).anatomy
    return [output_scale(producer, anatomy.graph).tolist() for producer in anatomy.producers]


def test_the_scale_behind_a_layer_is_its_norms_with_its_sign_and_one_without_a_norm() -> None:
    plain = nn.BatchNorm2d(4, affine=False)
    plain.running_var.copy_(torch.tensor([1.0, 4.0, 0.25, 0.0]))
    rest = nn.Conv2d(4, 2, 1), nn.Flatten(), nn.Linear(72, 4)
    first, second, head = scales(nn.Conv2d(3, 4, 1), plain, *rest)
    assert first == pytest.approx([1 / math.sqrt(each + 1e-5) for each in (1, 4, 0.25, 0)])
    assert (second, head) == ([1, 1], [1, 1, 1, 1])
    norm = nn.BatchNorm2d(4)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([2.0, -3.0, 0.0, 1.0]))
    first, *_ = scales(nn.Conv2d(3, 4, 1), norm, *rest)
    assert first == pytest.approx([each / math.sqrt(1 + 1e-5) for each in (2, -3, 0, 1)])


class NormBehindSum(nn.Module):
    """A norm that reads what two layers make together is neither one's own."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1)
        self.norm = nn.BatchNorm2d(4)
        nn.init.constant_(self.norm.weight, 5.0)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(self.left(x) + self.right(x)))


def test_a_norm_behind_a_sum_is_nobodys_scale() -> None:
    left, right, _ = scales(NormBehindSum(), nn.Flatten(), nn.Linear(144, 4))
    assert left == right == [1, 1, 1, 1]


def test_weights_of_a_grouped_convolution_are_spread_with_zeros_over_what_it_does_not_read() -> None:
    layer = nn.Conv2d(6, 4, (1, 2), groups=2)
    wide = spread_weight(layer, 6)
    assert wide.shape == (4, 6, 2)
    for out in range(4):
        for channel in range(6):
            inside = channel // 3 == out // 2
            expected = layer.weight[out, channel % 3, 0].tolist() if inside else [0, 0]
            assert wide[out, channel].tolist() == expected


# -- folding ------------------------------------------------------------------------------------------------------


def folded_by_hand(weight: Tensor, gram: Tensor, kept: list[int], ridge: float) -> Tensor:
    """W_K + W_R (G_KK + ridge)^-1 G_KR, number by number. weight: [outputs, channels, positions]."""
    gone = [channel for channel in range(len(gram)) if channel not in kept]
    level = sum(float(gram[k, k]) for k in kept) / len(kept)
    inner = torch.tensor([[float(gram[k, j]) + ridge * level * (k == j) for j in kept] for k in kept]).double()
    result = torch.zeros_like(weight)
    rebuild = {r: torch.linalg.inv(inner) @ gram[kept, r] for r in gone}
    for out in range(weight.shape[0]):
        for position in range(weight.shape[2]):
            for place, k in enumerate(kept):
                more = sum(float(rebuild[r][place]) * float(weight[out, r, position]) for r in gone)
                result[out, k, position] = weight[out, k, position] + more
    return result


def reading(module: str, gram: Tensor, importance: Tensor | None = None, ids: Tensor | None = None) -> Reading:
    channels = torch.arange(len(gram)) if ids is None else ids
    return Reading(module, module, channels, gram, torch.eye(len(gram)).double() if importance is None else importance)


@given(seed=st.integers(0, 1000), ridge=st.sampled_from([RIDGE, 1e-6, 0.3]))
@few
def test_folding_is_the_formula(seed: int, ridge: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    kept = torch.rand(6, generator=generator) < 0.5
    kept[seed % 6] = True
    gram = random_gram(6, seed)
    for layer in (nn.Conv2d(6, 4, (3, 2)), nn.Linear(6 * 4, 3), nn.Conv1d(6, 2, 3), nn.Linear(6, 3)):
        network = nn.ModuleDict({"reader": layer.double()})
        before = layer.weight.detach().clone()
        bias = layer.bias.detach().clone()
        fold(network, reading("reader", gram), kept, ridge)
        wide = before.reshape(len(before), 6, -1)
        expected = folded_by_hand(wide, gram, kept.nonzero()[:, 0].tolist(), ridge)
        torch.testing.assert_close(layer.weight.detach().reshape(wide.shape), expected)
        assert torch.equal(layer.bias, bias)
        assert not layer.weight.detach().reshape(wide.shape)[:, ~kept].any()
        assert layer.weight.grad_fn is None


def test_a_grouped_convolution_is_folded_within_each_group() -> None:
    layer = nn.Conv2d(8, 6, 3, groups=2).double()
    before, gram = layer.weight.detach().clone(), random_gram(8, 4)
    kept = torch.tensor([1, 0, 1, 1, 0, 1, 1, 1]).bool()
    fold(nn.ModuleDict({"reader": layer}), reading("reader", gram), kept)
    first = folded_by_hand(before[:3].flatten(2), gram[:4, :4], [0, 2, 3], RIDGE)
    second = folded_by_hand(before[3:].flatten(2), gram[4:, 4:], [1, 2, 3], RIDGE)
    torch.testing.assert_close(layer.weight.detach().flatten(2), torch.cat([first, second]))


def test_channels_without_a_name_stay_and_take_their_part() -> None:
    """The reader of a concat with the image: ids -1 are the image's."""
    layer = nn.Conv2d(4, 2, 1).double()
    before, gram = layer.weight.detach().clone(), random_gram(4, 5)
    stay = torch.tensor([False, True])
    fold(nn.ModuleDict({"reader": layer}), reading("reader", gram, ids=torch.tensor([-1, 0, -1, 1])), stay)
    torch.testing.assert_close(
        layer.weight.detach().flatten(2), folded_by_hand(before.flatten(2), gram, [0, 2, 3], RIDGE)
    )


def test_nothing_is_folded_where_everything_stays_or_what_leaves_was_silent() -> None:
    layer = nn.Conv2d(4, 2, 3)
    before = layer.weight.detach().clone()
    network = nn.ModuleDict({"reader": layer})
    fold(network, reading("reader", random_gram(4, 6)), torch.ones(4, dtype=torch.bool))
    assert torch.equal(layer.weight, before)
    gram = random_gram(4, 6)
    gram[2], gram[:, 2] = 0, 0
    fold(network, reading("reader", gram), torch.tensor([1, 1, 0, 1]).bool())
    assert torch.equal(layer.weight[:, [0, 1, 3]], before[:, [0, 1, 3]])


def test_folding_into_channels_that_are_all_silent_is_finite() -> None:
    layer = nn.Conv2d(4, 2, 3)
    fold(nn.ModuleDict({"reader": layer}), reading("reader", torch.zeros(4, 4).double()), torch.arange(4) < 2)
    assert bool(torch.isfinite(layer.weight).all())


def mix(layer: nn.Conv2d | nn.Linear, of: dict[int, dict[int, float]]) -> None:
    """Make output channels of a layer combinations of others: of[channel] = {other: factor}."""
    with torch.no_grad():
        for channel, parts in of.items():
            layer.weight[channel] = sum(factor * layer.weight[other] for other, factor in parts.items())
            layer.bias[channel] = sum(factor * layer.bias[other] for other, factor in parts.items())


class Linearly(nn.Module):
    """No nonlinearity behind `conv`, so that any combination of its channels is one for whoever reads it."""

    def __init__(self, reader: str) -> None:
        super().__init__()
        self.reader = reader
        self.conv = nn.Conv2d(3, 6, 3, padding=1)
        self.other = nn.Conv2d(3, 6, 3, padding=1)
        inputs = {"conv": 6, "grouped": 6, "concat": 15, "residual": 6, "flatten": 6 * 36, "twice": 6}[reader]
        groups = 2 if reader == "grouped" else 1
        self.last = nn.Linear(inputs, 5) if reader == "flatten" else nn.Conv2d(inputs, 6, 3, padding=1, groups=groups)
        self.head = nn.Linear(5 if reader == "flatten" else 6, 4)

    def forward(self, x: Tensor) -> Tensor:
        made = self.conv(x)
        if self.reader == "flatten":
            return self.head(F.relu(self.last(made.flatten(1))))
        if self.reader == "concat":
            made = torch.cat([self.other(x), x, made], 1)
        elif self.reader == "residual":
            made = made + self.other(x)
        elif self.reader == "twice":
            return self.head(self.last(self.last(made)).mean((2, 3)))
        return self.head(F.relu(self.last(made)).mean((2, 3)))


def fold_and_cut(network: nn.Module, images: Tensor, neurons: dict[str, Tensor], ridge: float) -> nn.Module:
    sites, found = read_all(network, images)
    stay = sites.couple(neurons).ids
    for each in found.values():
        fold(network, each, stay, ridge)
    return remove(network, neurons, tuple(images.shape[1:]))


@pytest.mark.parametrize("how", ["conv", "grouped", "concat", "residual", "flatten"])
def test_what_the_kept_channels_can_say_is_not_lost(networks: ModuleType, how: str) -> None:
    """Channels 2 and 5 are combinations of others (of their own group, where there are groups)."""
    torch.manual_seed(1)
    network = Linearly(how).eval()
    combined = {2: {0: 0.5, 1: -2.0}, 5: {3: 1.5, 4: 1.0}}
    mix(network.conv, combined)
    mix(network.other, combined)
    images = networks.floats(40, RGB)
    with torch.no_grad():
        logits = network(images)
    keep = torch.tensor([1, 1, 0, 1, 1, 0]).bool()
    neurons = {"conv": keep, "other": keep} if how == "residual" else {"conv": keep}
    cut_only = remove(network, neurons, RGB)
    smaller = fold_and_cut(network, images, neurons, ridge=1e-9)
    with torch.no_grad():
        assert smaller.conv.out_channels == 4
        assert float((cut_only(images) - logits).abs().max()) > 1e-2
        torch.testing.assert_close(smaller(images), logits, atol=1e-5, rtol=0)


def test_equal_channels_behind_a_nonlinearity_are_not_lost_by_any_reader(networks: ModuleType) -> None:
    """Two readers, one of them a squeeze-and-excite, behind a depthwise layer."""
    network = networks.randomise(networks.Squeeze(), 2).eval()
    with torch.no_grad():
        for layer in (network.wide, network.bn1, network.depthwise, network.bn2, network.excite):
            layer.weight[6], layer.bias[6] = layer.weight[1], layer.bias[1]
        for norm in (network.bn1, network.bn2):
            norm.running_mean[6], norm.running_var[6] = norm.running_mean[1], norm.running_var[1]
    images = networks.floats(40, RGB)
    with torch.no_grad():
        logits = network(images)
    keep = torch.arange(8) != 6
    smaller = fold_and_cut(network, images, {"wide": keep, "depthwise": keep, "excite": keep}, ridge=1e-9)
    with torch.no_grad():
        assert smaller.depthwise.groups == 7
        torch.testing.assert_close(smaller(images), logits, atol=1e-5, rtol=0)


def test_the_default_ridge_costs_little(networks: ModuleType) -> None:
    torch.manual_seed(1)
    network = Linearly("conv").eval()
    mix(network.conv, {5: {3: 1.5, 4: 1.0}})
    images = networks.floats(40, RGB)
    with torch.no_grad():
        logits = network(images)
        smaller = fold_and_cut(network, images, {"conv": torch.arange(6) < 5}, RIDGE)
        assert float((smaller(images) - logits).abs().max()) < 0.01 * float(logits.std())


def test_a_reader_called_twice_is_folded_once(networks: ModuleType) -> None:
    torch.manual_seed(1)
    network = Linearly("twice").eval()
    combined = {5: {3: 1.5, 4: 1.0}}
    mix(network.conv, combined)
    mix(network.last, combined)
    images = networks.floats(40, RGB)
    with torch.no_grad():
        logits = network(images)
        keep = torch.arange(6) < 5
        smaller = fold_and_cut(network, images, {"conv": keep, "last": keep, "last#2": keep}, 1e-9)
        torch.testing.assert_close(smaller(images), logits, atol=1e-5, rtol=0)
