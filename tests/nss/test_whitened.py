"""Adam in the units of the guard: each step written out row by row, and what never moves."""

from __future__ import annotations

from types import ModuleType

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nss.freeze import freeze, thaw
from nss.guard import Guard
from nss.moments import DAMPING
from nss.profile import Profile, profile
from nss.prune_weights import prune_weights
from nss.sites import find_sites
from nss.weight_masks import weight_masks
from nss.whitened import WhitenedAdam, _Rows
from nss.windows import position_moment, window_moment

SHAPE = (3, 6, 6)
RATE, GUARD = 0.05, 3.0


def known(network: nn.Module, images: Tensor) -> Profile:
    shape, classes = tuple(images.shape[1:]), list("abcd")
    data = (images, torch.arange(len(images)) % 4)
    return profile(network, data, ("avg",), classes=classes, input_shape=shape, gram=False, windows=1)


def begun(network: nn.Module, images: Tensor) -> tuple[nn.Module, WhitenedAdam, Profile]:
    """Every second neuron of every layer free, and the optimizer over them."""
    shape = tuple(images.shape[1:])
    found, anatomy = known(network, images), find_sites(network, shape).anatomy
    free = {each.name: torch.arange(len(each.out_ids)) % 2 == 0 for each in anatomy.producers}
    frozen = freeze(network, free, shape)
    return frozen, WhitenedAdam(Guard(frozen, anatomy, found).terms, RATE, GUARD), found


def step(frozen: nn.Module, optimizer: WhitenedAdam, images: Tensor) -> None:
    optimizer.zero_grad()
    F.cross_entropy(frozen(images), torch.arange(len(images)) % 4).backward()
    optimizer.step()


class Written:
    """One row, its shift last: Adam on v, row = start + (v L^-1) / unit, of the loss and guard |v|^2 / outputs."""

    def __init__(self, start: Tensor, units: Tensor, moment: Tensor | np.ndarray, outputs: int) -> None:
        self.outputs = outputs
        metric = np.asarray(moment, dtype=float)
        metric = metric + DAMPING * np.diag(metric).mean() * np.eye(len(metric))
        self.inverse = np.linalg.inv(np.linalg.cholesky(metric))
        self.start, self.units = start.double().numpy(), units.double().numpy()
        self.v = self.mean = self.square = np.zeros(len(metric))

    @classmethod
    def apart(cls, start: Tensor, channels: Tensor, positions: np.ndarray, outputs: int) -> Written:
        """A row of a wide layer: the root by eigenvectors of channels and of positions; a shift, if any, by itself."""
        n = len(channels) - 1
        of_channels, u = np.linalg.eigh(channels[:n, :n].double().numpy())
        of_positions, w = np.linalg.eigh(positions)
        values = np.append(np.kron(of_channels, of_positions), float(channels[n, n]))[: len(start)]
        row = cls(start, torch.ones(len(start)), np.eye(len(start)), outputs)
        axes = np.eye(len(start))
        axes[: n * len(positions), : n * len(positions)] = np.kron(u, w)
        row.inverse = (axes / np.sqrt(values + DAMPING * values.mean())).T
        return row

    def step(self, gradient: Tensor, number: int) -> np.ndarray:
        g = (gradient.double().numpy() / self.units) @ self.inverse.T + 2 * GUARD * self.v / self.outputs
        self.mean = 0.9 * self.mean + 0.1 * g
        self.square = 0.999 * self.square + 0.001 * g * g
        spread = np.sqrt(self.square / (1 - 0.999**number)) + 1e-8
        self.v = self.v - RATE * self.mean / (1 - 0.9**number) / spread
        return self.start + (self.v @ self.inverse) / self.units


def test_steps_are_those_of_adam_in_white_coordinates(networks: ModuleType) -> None:
    network = networks.randomise(networks.Squeeze(), 3).eval()
    images = networks.floats(12, SHAPE, 1)
    frozen, optimizer, found = begun(network, images)
    norms = {"wide": "bn1", "depthwise": "bn2"}
    watched: list[tuple[nn.Parameter, nn.Parameter, int, Written]] = []
    for name in ("wide", "depthwise", "squeeze", "narrow", "head"):
        layer, plain = frozen.get_submodule(name), network.get_submodule(name)
        norm = network.get_submodule(norms[name]) if name in norms else None
        shift = layer.free_bias if norm is None else frozen.get_submodule(norms[name]).free_bias
        unit = torch.ones(len(plain.weight)) if norm is None else norm.weight / (norm.running_var + norm.eps).sqrt()
        moment = window_moment(found.window(name), plain)
        for place, row in enumerate(range(0, len(plain.weight), 2)):
            own = moment[row // (len(plain.weight) // len(moment))]
            start = torch.cat([layer.free_weight[place].flatten(), shift[place, None]]).detach()
            units = torch.cat([unit[row].expand(len(start) - 1), torch.ones(1)]).detach()
            watched.append((layer.free_weight, shift, place, Written(start, units, own, len(plain.weight))))
    gains = [frozen.get_submodule(norm).free_weight.clone() for norm in norms.values()]
    for number in (1, 2, 3):
        step(frozen, optimizer, networks.floats(8, SHAPE, number))
        for weight, shift, place, written in watched:
            gradient = torch.cat([weight.grad[place].flatten(), shift.grad[place, None]])
            moved = torch.cat([weight[place].flatten(), shift[place, None]]).detach()
            np.testing.assert_allclose(moved.numpy(), written.step(gradient, number), rtol=2e-3, atol=2e-4)
    for norm, gain in zip(norms.values(), gains, strict=True):
        assert torch.equal(frozen.get_submodule(norm).free_weight, gain)


def test_it_counts_what_it_moves(networks: ModuleType) -> None:
    network = networks.randomise(networks.Squeeze(), 3).eval()
    frozen, optimizer, _ = begun(network, networks.floats(12, SHAPE, 1))
    # Rows times their inputs and the shift: no gain of a norm.
    assert optimizer.count == 4 * (3 + 1) + 4 * (9 + 1) + 1 * (8 + 1) + 4 * (2 + 1) + 3 * (8 + 1) + 2 * (5 + 1)
    step(frozen, optimizer, networks.floats(8, SHAPE, 5))
    pairs = zip(network.parameters(), thaw(frozen).parameters(), strict=True)
    assert 50 < sum(int((before != after).sum()) for before, after in pairs) <= optimizer.count


class Bare(nn.Module):
    """Nothing is added to what the first layer computes; a norm that scales nothing stands behind the second."""

    def __init__(self) -> None:
        super().__init__()
        self.bare = nn.Conv2d(3, 4, 3, bias=False)
        self.conv = nn.Conv2d(4, 6, 1)
        self.norm = nn.BatchNorm2d(6, affine=False)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.norm(self.conv(F.relu(self.bare(x))))).mean((2, 3)))


def test_a_layer_without_a_bias_and_one_before_a_norm_without_gains(networks: ModuleType) -> None:
    torch.manual_seed(0)
    network = Bare().eval()
    network.norm.running_var.copy_(torch.linspace(0.2, 3, 6))
    images = networks.floats(12, SHAPE, 1)
    frozen, optimizer, found = begun(network, images)
    scale = 1 / (network.norm.running_var + network.norm.eps).sqrt()
    bare, conv = frozen.bare, frozen.conv
    whole = window_moment(found.window("bare"), network.bare)[0]
    rows = [Written(bare.free_weight[i].detach().flatten(), torch.ones(27), whole[:-1, :-1], 4) for i in range(2)]
    second = window_moment(found.window("conv"), network.conv)[0]
    others = [
        Written(
            torch.cat([conv.free_weight[i].detach().flatten(), conv.free_bias[i, None].detach()]),
            scale[2 * i].expand(5),
            second,
            6,
        )
        for i in range(3)
    ]
    step(frozen, optimizer, images)
    for place, written in enumerate(rows):
        expected = written.step(bare.free_weight.grad[place].flatten(), 1)
        np.testing.assert_allclose(bare.free_weight[place].detach().flatten(), expected, rtol=1e-3, atol=1e-4)
    for place, written in enumerate(others):
        gradient = torch.cat([conv.free_weight.grad[place].flatten(), conv.free_bias.grad[place, None]])
        moved = torch.cat([conv.free_weight[place].flatten(), conv.free_bias[place, None]]).detach()
        np.testing.assert_allclose(moved, written.step(gradient, 1), rtol=1e-3, atol=1e-4)


class Still(nn.Module):
    """A convolution before a norm, neither of which adds anything that moves."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4, affine=False)
        self.head = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.norm(self.conv(x))).mean((2, 3)))


def test_a_wide_layer_without_a_bias_before_a_norm_without_gains(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nss.windows.WIDE", 8)
    torch.manual_seed(0)
    network = Still().eval()
    network.norm.running_var.copy_(torch.linspace(0.2, 3, 4))
    images = torch.randn(12, *SHAPE, generator=torch.Generator().manual_seed(1))
    frozen, optimizer, found = begun(network, images)
    mean, weight = found.window("conv"), frozen.conv.free_weight
    positions = position_moment(mean, network.conv).numpy()
    rows = [Written.apart(weight[i].detach().flatten(), mean[0, 0], positions, 4) for i in range(2)]
    for place, written in enumerate(rows):
        written.units = np.full(27, float(1 / (network.norm.running_var[2 * place] + network.norm.eps).sqrt()))
    for number in (1, 2):
        step(frozen, optimizer, images)
        for place, written in enumerate(rows):
            expected = written.step(weight.grad[place].flatten(), number)
            np.testing.assert_allclose(weight[place].detach().flatten(), expected, rtol=2e-3, atol=5e-4)


def test_a_layer_that_is_called_twice_is_moved_once_by_what_both_calls_read(networks: ModuleType) -> None:
    network = networks.Twice().eval()
    shape = (1, 6, 6)
    data = (networks.floats(8, shape), torch.arange(8) % 2)
    found = profile(network, data, ("avg",), classes=["a", "b"], input_shape=shape, gram=False, windows=1)
    anatomy = find_sites(network, shape).anatomy
    free = {name: torch.tensor([True, False, True, False]) for name in ("shared", "shared#2")}
    frozen = freeze(network, free, shape)
    optimizer = WhitenedAdam(Guard(frozen, anatomy, found).terms, RATE, GUARD)
    both = sum(window_moment(found.window(name), network.shared)[0] for name in free)
    shared = frozen.shared
    rows = [
        Written(
            torch.cat([shared.free_weight[i].flatten(), shared.free_bias[i, None]]).detach(), torch.ones(37), both, 4
        )
        for i in range(2)
    ]
    optimizer.zero_grad()
    F.cross_entropy(frozen(data[0]), data[1]).backward()
    optimizer.step()
    for place, written in enumerate(rows):
        gradient = torch.cat([shared.free_weight.grad[place].flatten(), shared.free_bias.grad[place, None]])
        moved = torch.cat([shared.free_weight[place].flatten(), shared.free_bias[place, None]]).detach()
        np.testing.assert_allclose(moved, written.step(gradient, 1), rtol=1e-3, atol=1e-4)


class Lone(nn.Module):
    """A norm that reads an image: no layer is before it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.GroupNorm(2, 4)
        self.head = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.norm(self.conv(x))).mean((2, 3)))


def test_gain_and_shift_of_a_norm_that_is_not_folded_move_by_the_rate_at_first(networks: ModuleType) -> None:
    torch.manual_seed(0)
    images = networks.floats(12, SHAPE, 1)
    frozen, optimizer, _ = begun(Lone().eval(), images)
    before = [each.detach().clone() for each in (frozen.norm.free_weight, frozen.norm.free_bias)]
    step(frozen, optimizer, images)
    for entry, then in zip((frozen.norm.free_weight, frozen.norm.free_bias), before, strict=True):
        moved = (entry - then).abs().detach()
        # Adam's first step is the rate in each coordinate; what is normed already has moments one, damped.
        assert moved.tolist() == pytest.approx([RATE / (1 + DAMPING) ** 0.5] * 2, rel=1e-3)


def test_the_gain_of_a_norm_that_adds_nothing_moves_by_the_rate_at_first(networks: ModuleType) -> None:
    torch.manual_seed(0)
    network = Lone().eval()
    network.norm.register_parameter("bias", None)
    images = networks.floats(12, SHAPE, 1)
    frozen, optimizer, _ = begun(network, images)
    before = frozen.norm.free_weight.detach().clone()
    step(frozen, optimizer, images)
    moved = (frozen.norm.free_weight - before).abs().detach()
    assert moved.tolist() == pytest.approx([RATE / (1 + DAMPING) ** 0.5] * 2, rel=1e-3)


def test_masked_weights_stay_zero(networks: ModuleType) -> None:
    model = networks.zoo_model("lenet")
    pruned = prune_weights(model, "lamp", 0.5).eval()
    images = networks.pictures(12)
    found = profile(pruned, (images, torch.arange(12) % 4), ("avg",), gram=False, windows=1)
    anatomy = find_sites(pruned.network, networks.SHAPE).anatomy
    free = {each.name: torch.arange(len(each.out_ids)) % 2 == 0 for each in anatomy.producers}
    frozen = freeze(pruned, free)
    optimizer = WhitenedAdam(Guard(frozen, anatomy, found).terms, RATE, GUARD)
    for _ in range(3):
        step(frozen, optimizer, images)
    after = thaw(frozen)
    masks = weight_masks(pruned.network)
    assert masks
    for name, mask in masks.items():
        moved = after.network.get_submodule(name).weight
        assert bool((moved[~mask] == 0).all())
        assert int((moved != pruned.network.get_submodule(name).weight).sum()) > 0


def test_what_the_loss_does_not_depend_on_stays_where_it_is(networks: ModuleType) -> None:
    torch.manual_seed(0)
    images = networks.floats(12, SHAPE, 1)
    frozen, optimizer, _ = begun(Lone().eval(), images)
    before = frozen.head.free_weight.detach().clone(), frozen.conv.free_weight.detach().clone()
    optimizer.zero_grad()
    frozen.conv(images).square().mean().backward()  # the head has no part in it
    optimizer.step()
    assert torch.equal(frozen.head.free_weight, before[0])
    assert not torch.equal(frozen.conv.free_weight, before[1])


def test_of_masked_weights_only_what_moves_is_guarded(networks: ModuleType) -> None:
    """The pull of the guard is the gradient of what it says of the change itself, by differences."""
    pruned = prune_weights(networks.zoo_model("lenet"), "lamp", 0.6).eval()
    images = networks.pictures(12)
    found = profile(pruned, (images, torch.arange(12) % 4), ("avg",), gram=False, windows=1)
    anatomy = find_sites(pruned.network, networks.SHAPE).anatomy
    guard = Guard(freeze(pruned, {"conv1": torch.arange(16) < 2}), anatomy, found)
    (term,) = guard.terms
    rows = _Rows(term, 1.0)
    assert term.layer.unmasked is not None
    assert 0 < int(term.layer.unmasked.sum()) < term.layer.unmasked.numel()
    moment = window_moment(found.window("conv1"), pruned.network.conv1)[0]
    metric = moment + DAMPING * moment.diagonal().mean() * torch.eye(26)
    with torch.no_grad():
        rows.values.copy_(torch.randn(rows.values.shape, generator=torch.Generator().manual_seed(1)))
        before = [entry.clone() for entry in (term.layer.free_weight, term.layer.free_bias)]

        def harm() -> float:
            rows.push()
            pairs = zip((term.layer.free_weight, term.layer.free_bias), before, strict=True)
            weight, bias = (entry.double() - then.double() for entry, then in pairs)
            change = torch.cat([weight.flatten(1), bias[:, None]], 1)
            return float(torch.einsum("ri,ij,rj->", change, metric.double(), change)) / 2

        held = rows._held()
        for row, place in ((0, 0), (0, 25), (1, 7), (1, 13)):
            values = []
            for step_of in (0.01, -0.01):
                rows.values[row, place] += step_of
                values.append(harm())
                rows.values[row, place] -= step_of
            assert float(held[row, place]) == pytest.approx((values[0] - values[1]) / 0.02, rel=2e-2, abs=1e-3)


class Flattened(nn.Module):
    """A linear layer behind four channels at nine positions."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 4)
        self.hidden = nn.Linear(36, 10)
        self.head = nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.hidden(self.conv(x).flatten(1))))


def test_positions_of_a_wide_linear_layer_and_its_bias_are_white_apart(
    networks: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nss.windows.WIDEST", 8)
    torch.manual_seed(0)
    network, images = Flattened().eval(), networks.floats(20, SHAPE, 1)
    found, anatomy = known(network, images), find_sites(network, SHAPE).anatomy
    frozen = freeze(network, {"hidden": torch.arange(10) < 2}, SHAPE)
    optimizer = WhitenedAdam(Guard(frozen, anatomy, found).terms, RATE, GUARD)
    moment = window_moment(found.window("hidden"), network.hidden)[0]
    assert len(moment) == 5
    stepped_as_written(frozen.hidden, frozen, optimizer, images, moment, np.eye(9), 10)


def test_channels_and_positions_of_a_wide_kernel_and_its_shift_are_white_apart(
    networks: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nss.windows.WIDE", 8)
    network = networks.zoo_model("lenet").network.eval()
    images = networks.floats(8, networks.SHAPE, 1)
    found, anatomy = known(network, images), find_sites(network, networks.SHAPE).anatomy
    frozen = freeze(network, {"conv2": torch.arange(len(network.conv2.weight)) < 2}, networks.SHAPE)
    optimizer = WhitenedAdam(Guard(frozen, anatomy, found).terms, RATE, GUARD)
    mean = found.window("conv2")
    positions = position_moment(mean, network.conv2).numpy()
    assert np.diag(positions).tolist() == pytest.approx([1.0] * len(positions))
    count = len(network.conv2.weight)
    stepped_as_written(frozen.conv2, frozen, optimizer, images, mean[0, 0], positions, count)


def stepped_as_written(
    layer: nn.Module,
    frozen: nn.Module,
    optimizer: WhitenedAdam,
    images: Tensor,
    channels: Tensor,
    positions: np.ndarray,
    outputs: int,
) -> None:
    rows = []
    for place in range(2):
        start = torch.cat([layer.free_weight[place].flatten(), layer.free_bias[place, None]]).detach()
        rows.append(Written.apart(start, channels, positions, outputs))
    for number in (1, 2, 3):
        step(frozen, optimizer, images)
        for place, written in enumerate(rows):
            gradient = torch.cat([layer.free_weight.grad[place].flatten(), layer.free_bias.grad[place, None]])
            moved = torch.cat([layer.free_weight[place].flatten(), layer.free_bias[place, None]]).detach()
            np.testing.assert_allclose(moved.numpy(), written.step(gradient, number), rtol=2e-3, atol=5e-4)
