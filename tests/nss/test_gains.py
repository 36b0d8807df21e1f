"""What tuning a neuron is worth: how far the loss can fall where the guard allows it. It decides the choice."""

from __future__ import annotations

import copy
from types import ModuleType

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from torch import Tensor, nn

from nss.errors import ReadaptError
from nss.freeze import freeze
from nss.guard import Guard
from nss.moments import Groups, Moments, Product, Whole, gains, moments_of
from nss.profile import Profile, profile
from nss.sites import find_sites
from nss.slice import SemanticSlice, SemanticSlices
from nss.tunable import tunable_neurons

SHAPE = (3, 6, 6)
NORMS = {"wide": "bn1", "depthwise": "bn2"}


def moments(groups: int, size: int, seed: int) -> Tensor:
    """Second moments of vectors whose last entry is one."""
    seen = torch.randn(groups, 3 * size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    seen[..., -1] = 1
    return seen.mT @ seen / (3 * size)


def most(gradient: Tensor, moment: Tensor, outputs: int) -> float:
    """Four times the most that gradient.x less the guard, damped by a tenth of its mean, comes to, searched for."""
    metric = moment.numpy() / outputs
    metric = metric + 0.1 * np.diag(metric).mean() * np.eye(len(metric))
    g = gradient.numpy()
    found = minimize(
        lambda x: x @ metric @ x - g @ x, np.zeros(len(g)), jac=lambda x: 2 * metric @ x - g, options={"gtol": 1e-10}
    )
    return float(-4 * found.fun)


def flat(weight: Tensor, shift: Tensor | None) -> Tensor:
    rows = weight.flatten(1)
    return rows if shift is None else torch.cat([rows, shift[:, None]], 1)


def whole(moment: Tensor, rows: Tensor, outputs: int) -> Moments:
    groups = Groups(rows, outputs, len(moment))
    return Whole(moment[groups.present], groups)


@given(seed=st.integers(0, 10_000), bias=st.booleans())
@settings(max_examples=20, deadline=None)
def test_it_is_four_times_the_most_that_the_loss_can_fall_by_less_the_guard(seed: int, bias: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(3, 2, 1, 2, generator=generator, dtype=torch.float64)
    shift = torch.randn(3, generator=generator, dtype=torch.float64) if bias else None
    moment, gradient = moments(1, 5, seed), flat(weight, shift)
    own = whole(moment, torch.arange(3), 3)
    found = gains(gradient, own if bias else own.bare(), 3)
    for row in range(3):
        size = gradient.shape[1]
        assert float(found[row]) == pytest.approx(most(gradient[row], moment[0, :size, :size], 3), rel=1e-6)


@pytest.mark.parametrize("rows", [[0, 1, 2, 3, 4, 5], [0, 2, 3], [4, 5], [1]])
def test_each_row_of_a_grouped_convolution_is_measured_by_what_its_group_reads(rows: list[int]) -> None:
    gradient = torch.randn(len(rows), 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    moment = moments(3, 5, 1)
    found = gains(gradient, whole(moment, torch.tensor(rows), 6), 6)
    for place, row in enumerate(rows):
        assert float(found[place]) == pytest.approx(most(gradient[place], moment[row // 2], 6), rel=1e-6)


@pytest.mark.parametrize("shifted", [True, False])
def test_channels_and_positions_of_a_wide_layer_and_what_is_added_count_apart(shifted: bool) -> None:
    """As if all moments were products of one of the channels and one of the positions, and the mean nothing."""
    channels, positions = moments(2, 5, 2), moments(1, 3, 3)[0]
    positions = positions / positions.diagonal().mean()
    rows = torch.tensor([0, 3, 4])  # of six in two groups
    own = Product(channels, positions, Groups(rows, 6, 2), shifted=shifted)
    gradient = torch.randn(3, 12 + shifted, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found, times, damped = gains(gradient, own, 6), own.times(gradient), own.damped_times(gradient)
    for place, group in enumerate([0, 1, 1]):
        whole_moment = np.zeros((13, 13))
        whole_moment[:12, :12] = np.kron(channels[group, :4, :4].numpy(), positions.numpy())
        whole_moment[12, 12] = float(channels[group, 4, 4])
        whole_moment = whole_moment[: 12 + shifted, : 12 + shifted]
        damping = 0.1 * np.diag(whole_moment).mean() * np.eye(12 + shifted)
        g = gradient[place].numpy()
        np.testing.assert_allclose(times[place], whole_moment @ g, rtol=1e-9)
        np.testing.assert_allclose(damped[place], (whole_moment + damping) @ g, rtol=1e-9)
        assert float(found[place]) == pytest.approx(6 * g @ np.linalg.solve(whole_moment + damping, g), rel=1e-9)


@given(seed=st.integers(0, 10_000), shifted=st.booleans(), apart=st.booleans())
@settings(max_examples=20, deadline=None)
def test_white_coordinates_are_as_long_as_the_damped_guard_says(seed: int, shifted: bool, apart: bool) -> None:
    rows = torch.tensor([0, 1, 4])
    if apart:
        positions = moments(1, 2, seed + 1)[0]
        own: Moments = Product(moments(2, 4, seed), positions, Groups(rows, 6, 2), shifted=shifted)
    else:
        own = whole(moments(2, 7, seed), rows, 6)
        own = own if shifted else own.bare()
    white = torch.randn(3, 6 + shifted, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    change = own.colour(white)
    torch.testing.assert_close((change * own.damped_times(change)).sum(1), white.square().sum(1))
    # A gradient g for x is one of L^-1 g for v: the loss that it foretells is the same.
    gradient = torch.randn(3, 6 + shifted, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64)
    torch.testing.assert_close((gradient * change).sum(1), (own.whiten(gradient) * white).sum(1))


@pytest.mark.parametrize(("channels", "kind"), [(128, Whole), (129, Product)])
def test_kernels_of_more_than_1152_inputs_count_as_a_product(channels: int, kind: type) -> None:
    """All together, a step in their coordinates takes longer than the network does on small maps."""
    layer = nn.Conv2d(channels, 2, 3)
    mean = torch.eye(channels + 1).expand(13, 1, channels + 1, channels + 1)
    assert type(moments_of(mean, layer, torch.arange(2), shifted=True)) is kind


def test_what_is_none_of_second_moments_is_damped_until_it_could_be() -> None:
    moment = torch.tensor([[[1.0, 3.0], [3.0, 1.0]]])  # damped by 0.1 or 1 it still has no root, by 10 it has
    found = gains(torch.tensor([[1.0, 0.0]]), whole(moment, torch.arange(1), 1), 1)
    assert float(found) == pytest.approx(11 / (11 * 11 - 3 * 3))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e40])
@pytest.mark.parametrize("layer", [nn.Linear(1, 1), nn.Linear(5000, 1), nn.Conv2d(1, 1, 40)])
def test_moments_that_are_not_finite_in_single_precision_are_refused(value: float, layer: nn.Module) -> None:
    mean = torch.tensor([[[[1.0, 0.0], [0.0, value]]]], dtype=torch.float64)
    with pytest.raises(ReadaptError, match="what a layer reads is not finite"):
        moments_of(mean, layer, torch.arange(1), shifted=True)


def test_rows_of_a_wide_grouped_layer_are_measured_by_their_own_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nss.windows.WIDE", 8)
    layer = nn.Conv2d(8, 4, 3, groups=2)
    mean = torch.zeros(13, 2, 5, 5, dtype=torch.float64)
    mean[0] = moments(2, 5, 0)  # what places do together: nothing
    own = moments_of(mean, layer, torch.tensor([3]), shifted=False)
    row = torch.randn(1, 36, generator=torch.Generator().manual_seed(0))
    expected = np.kron(mean[0, 1, :4, :4].numpy(), np.eye(9)) @ row[0].double().numpy()
    np.testing.assert_allclose(own.times(row)[0].double(), expected, rtol=1e-5)


def test_what_old_images_never_show_is_worth_something_and_not_everything() -> None:
    moment = torch.diag(torch.tensor([0.0, 4.0, 1.0]))[None]
    gradient = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    damping = 0.1 * (0 + 4 + 1) / 3 / 2
    assert gains(gradient, whole(moment, torch.arange(2), 2), 2).tolist() == pytest.approx(
        [1 / damping, 1 / (2 + damping)]
    )


def known(network: nn.Module, images: Tensor) -> Profile:
    data = (images, torch.arange(len(images)) % 4)
    return profile(network, data, ("avg",), classes=list("abcd"), input_shape=SHAPE, gram=False, windows=1)


def slices_of(network: nn.Module) -> SemanticSlices:
    """One slice of all classes in which every neuron is critical."""
    masks = {site.name: torch.ones(len(site), dtype=torch.bool) for site in find_sites(network, SHAPE)}
    slices = (SemanticSlice("slice-0", tuple("abcd"), (0, 1, 2, 3), masks),)
    return SemanticSlices(tuple("abcd"), slices, np.zeros((4, 4)), np.zeros((3, 4)))


def metric_of(guard: Guard, entries: list[tuple[nn.Parameter, tuple[int, ...]]]) -> Tensor:
    """The guard's quadratic form for some entries, found by moving one and two of them."""

    def at(*places: int) -> float:
        with torch.no_grad():
            for place in places:
                entries[place][0][entries[place][1]] += 1
            value = guard()
            for place in places:
                entries[place][0][entries[place][1]] -= 1
        return value

    alone = [at(place) for place in range(len(entries))]
    rows = [
        [(at(one, other) - alone[one] - alone[other]) / 2 for other in range(len(entries))]
        for one in range(len(entries))
    ]
    return torch.tensor(rows, dtype=torch.float64)


def written_out(network: nn.Module, guard: Guard, frozen: nn.Module, layer: str, row: int) -> float:
    """The gain of a row by weight, from gradients of the plain network and the guard as the frozen one has it."""
    plain, free = network.get_submodule(layer), frozen.get_submodule(layer)
    norm = network.get_submodule(NORMS[layer]) if layer in NORMS else None
    count = plain.weight[0].numel()
    scale = torch.ones(1) if norm is None else (norm.weight / (norm.running_var + norm.eps).sqrt())[row].detach()
    places = [(free.free_weight, (row, *each)) for each in np.ndindex(*plain.weight.shape[1:])]
    adding = free if norm is None else frozen.get_submodule(NORMS[layer])
    metric = metric_of(guard, [*places, (adding.free_bias, (row,))])
    units = torch.cat([scale.expand(count), torch.ones(1)]).double()
    metric = metric / units / units[:, None]
    gradient = torch.cat([plain.weight.grad[row].flatten(), (plain if norm is None else norm).bias.grad[row, None]])
    gradient = gradient.double() / units
    damped = metric + 0.1 * metric.diagonal().mean() * torch.eye(count + 1)
    return float(gradient @ torch.linalg.inv(damped) @ gradient) / (count + (1 if norm is None else 3))


@pytest.mark.parametrize("share", [0.15, 0.5])
def test_the_neurons_worth_most_by_weight_are_taken_until_the_next_does_not_fit(
    networks: ModuleType, share: float
) -> None:
    network = networks.randomise(networks.Squeeze(), 3).eval()
    old, new, labels = networks.floats(12, SHAPE, 1), networks.floats(10, SHAPE, 2), torch.arange(10) % 4
    found = known(network, old)
    free = tunable_neurons(network, slices_of(network), new, labels, share, found)
    double = copy.deepcopy(network).double()
    F.cross_entropy(double(new.double()), labels).backward()
    whole = {layer: torch.ones_like(mask) for layer, mask in free.items()}
    frozen = freeze(double, whole, SHAPE)
    guard = Guard(frozen, find_sites(double, SHAPE).anatomy, found)
    rows = [(layer, row) for layer, mask in free.items() for row in range(len(mask))]
    worth = {each: written_out(double, guard, frozen, *each) for each in rows}
    room = share * sum(each.numel() for each in network.parameters())
    taken = set()
    for layer, row in sorted(rows, key=lambda each: -worth[each]):
        room -= network.get_submodule(layer).weight[0].numel() + (3 if layer in NORMS else 1)
        if room < 0:
            break
        taken.add((layer, row))
    assert taken == {(layer, row) for layer, row in rows if bool(free[layer][row])}
    assert 3 < len(taken) < len(rows) - 3


def test_what_a_norm_multiplies_by_zero_has_no_say_in_the_choice(networks: ModuleType) -> None:
    network = networks.randomise(networks.Squeeze(), 0).eval()
    images, labels = networks.floats(8, SHAPE), torch.arange(8) % 4
    chosen = []
    for weight in (0.3, 30.0):
        with torch.no_grad():
            network.bn1.weight[2] = 0
            network.wide.weight[2] = weight
        found = known(network, images)
        chosen.append(tunable_neurons(network, slices_of(network), images, labels, 0.5, found))
    assert sum(int(mask.sum()) for mask in chosen[0].values()) > 10
    assert all(torch.equal(mask, chosen[1][layer]) for layer, mask in chosen[0].items())
