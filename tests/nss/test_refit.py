"""Refit: what a cut has lost is made up for as far as a layer can, copies cost nothing, nothing else is touched."""

from __future__ import annotations

import copy
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from tiny_helpers import RGB, classifier, correlated, cut, error, first
from torch import Tensor, nn

from nss.contexts import evaluating
from nss.merge import fold, readings
from nss.model import Classifier, model_digest
from nss.profile import profile
from nss.refit import refit
from nss.sites import find_sites

# -- what is added behind a layer ---------------------------------------------------------------------------------


class Around(nn.Module):
    """inner(h) + outer(x), h = stem(x), all linear: what h loses, outer can make up for, since it sees x itself."""

    def __init__(self, norm: str, scale: float = -0.3) -> None:
        super().__init__()
        self.norm = norm
        self.stem = nn.Conv2d(3, 6, 1)
        self.inner = nn.Conv2d(6, 5, 1)
        self.outer = nn.Conv2d(3, 5, 1)
        self.bn = nn.BatchNorm2d(5)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(5, 4)
        with torch.no_grad():
            self.bn.running_var.fill_(0.5)
            self.bn.weight.fill_(scale)

    def forward(self, x: Tensor) -> Tensor:
        inner, outer = self.inner(self.stem(x)), self.outer(x)
        if self.norm == "inner":
            y = self.bn(inner) + outer
        elif self.norm == "outer":
            y = inner + self.bn(outer)
        elif self.norm == "dropout":
            y = inner + F.dropout2d(self.drop(self.bn(outer)), 0.5, self.training)
        elif self.norm == "behind":
            y = self.bn(inner + outer)
        elif self.norm == "factor":
            y = torch.add(outer, inner, alpha=0.1)
        elif self.norm == "swapped":
            y = self.bn(outer + inner)
        else:
            y = inner + outer
        return self.head(F.relu(y).mean((2, 3)))


@pytest.mark.parametrize("norm", ["none", "inner", "outer", "behind", "swapped", "dropout"])
@pytest.mark.parametrize("scale", [-0.3, 4.0])
def test_what_the_path_around_has_lost_is_made_up_for(norm: str, scale: float) -> None:
    torch.manual_seed(6)
    model, images = classifier(Around(norm, scale)), correlated(80)
    smaller, left = cut(model, {"stem": first(2, 6)})  # two numbers of three: one direction of x is lost
    refit(model, smaller, left, images, ridge=1e-9)
    assert error(model, cut(model, {"stem": first(2, 6)})[0], images) > 1e-4
    assert error(model, smaller, images) < 1e-12


def test_channels_that_the_norm_all_but_silences_are_not_blown_up(networks: ModuleType) -> None:
    torch.manual_seed(6)
    network = Around("outer")
    with torch.no_grad():
        network.bn.weight[2] = 1e-6
    model, images = classifier(network), correlated(80)
    smaller, left = cut(model, {"stem": first(2, 6)})
    refit(model, smaller, left, images)
    assert float(smaller.network.outer.weight.detach().abs().max()) < 50


def test_a_sum_with_a_factor_is_not_made_up_for_as_if_it_had_none() -> None:
    torch.manual_seed(6)
    model, images = classifier(Around("factor")), correlated(80)
    smaller, left = cut(model, {"stem": first(2, 6)})
    refit(model, smaller, left, images, ridge=1e-9)
    # Made up for in full, a loss of which a tenth counts would do the greater harm.
    assert error(model, smaller, images) < error(model, cut(model, {"stem": first(2, 6)})[0], images) / 10


class Odd(nn.Module):
    """Things that are added and have another shape than what the layer made."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.stem = nn.Conv2d(3, 6, 1)
        self.conv = nn.Conv2d(6, 5, 3, padding=1)
        self.around = nn.Conv2d(6, 5, 1, stride=2)
        self.shift = nn.Parameter(torch.randn(1, 5, 1, 1))
        self.head = nn.Linear(5, 4)
        self.offset = nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        if self.how == "pooled":
            x = F.avg_pool2d(self.conv(x), 2) + self.around(x)
        elif self.how == "spread":
            x = self.conv(x) + F.adaptive_avg_pool2d(self.around(x), 1)
        elif self.how == "parameter":
            x = self.conv(x) + self.shift
        elif self.how == "number":
            x = self.conv(x) + 1.5
        return self.head(F.relu(x).mean((2, 3))) + self.offset


@pytest.mark.parametrize("how", ["pooled", "spread", "parameter", "number"])
def test_what_has_another_shape_is_added_all_the_same(how: str) -> None:
    torch.manual_seed(7)
    network = Odd(how)
    network.stem.weight.data[4:] = network.stem.weight.data[:2] * torch.tensor([2.0, 0.5]).view(2, 1, 1, 1)
    network.stem.bias.data[4:] = network.stem.bias.data[:2] * torch.tensor([2.0, 0.5])
    model, images = classifier(network), correlated(80)
    smaller, left = cut(model, {"stem": first(4, 6)})
    refit(model, smaller, left, images, ridge=1e-9)
    assert error(model, cut(model, {"stem": first(4, 6)})[0], images) > 1e-4
    assert error(model, smaller, images) < 1e-10


# -- the whole ----------------------------------------------------------------------------------------------------


class Chain(nn.Module):
    """Convolutions, a flattened map, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.middle = nn.Conv2d(8, 6, 3)
        self.hidden = nn.Linear(6 * 4, 5)
        self.head = nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.middle(F.relu(self.conv(x))))
        return self.head(F.relu(self.hidden(x.flatten(1))))


def test_what_a_refitted_layer_and_its_norm_make_has_the_mean_that_the_original_has(networks: ModuleType) -> None:
    model = networks.zoo_model("resnet20")
    images = networks.pictures(64)
    smaller, left = cut(model, networks.coupled_masks(model.network, networks.SHAPE, 3, 0.6))
    with evaluating(model), evaluating(smaller):
        refit(model, smaller, left, images)
    made: dict[str, list[Tensor]] = {}
    for each in (model, smaller):
        norm = each.network.blocks[0].bn1
        handle = norm.register_forward_hook(lambda _m, _i, out: made.setdefault("bn1", []).append(out.mean((0, 2, 3))))
        with torch.no_grad():
            each(images)
        handle.remove()
    wanted, found = made["bn1"][0][left["blocks.0.conv1"]], made["bn1"][1]
    torch.testing.assert_close(found, wanted, atol=1e-3, rtol=0)


def redundant(network: nn.Module, layers: dict[str, tuple[int, int]]) -> None:
    """Make an output channel of a layer (and of the norm behind it) a copy of another: {layer: (copy, of)}."""
    with torch.no_grad():
        for name, (twin, of) in layers.items():
            module = network.get_submodule(name)
            for key in ("weight", "bias", "running_mean", "running_var"):
                tensor = getattr(module, key, None)
                if tensor is not None:
                    tensor[twin] = tensor[of]


@pytest.mark.parametrize("kind", ["Squeeze", "Concat", "Residual"])
def test_a_network_that_lost_copies_only_gives_the_original_logits(networks: ModuleType, kind: str) -> None:
    torch.manual_seed(8)
    network = networks.randomise(getattr(networks, kind)(), 4)
    twins = {
        "Squeeze": dict.fromkeys(("wide", "bn1", "depthwise", "bn2", "excite"), (6, 1)),
        "Concat": {"conv1": (3, 0), "conv2": (4, 1), "bn": (11, 8)},
        "Residual": dict.fromkeys(("conv_a", "conv_b"), (7, 2)),
    }[kind]
    redundant(network, twins)
    if kind == "Concat":
        redundant(network, {"bn": (4, 1)})
    model, images = classifier(network), correlated(80)
    sizes = {site.name: len(site) for site in find_sites(network, RGB)}
    neurons = {name: torch.arange(sizes[name]) != twin for name, (twin, _) in twins.items() if name in sizes}
    smaller, left = cut(model, neurons)
    refit(model, smaller, left, images, ridge=1e-9)
    assert error(model, cut(model, neurons)[0], images) > 1e-7
    assert error(model, smaller, images) < 1e-12


def test_nothing_changes_where_nothing_was_cut(networks: ModuleType) -> None:
    for name in ("lenet", "resnet20", "mobilenet_small"):
        model = networks.zoo_model(name)
        smaller, left = cut(model, {})
        refit(model, smaller, left, networks.pictures(16))
        assert model_digest(smaller) == model_digest(model)


def test_layers_before_the_first_cut_keep_their_bits_and_a_layer_that_has_lost_nothing_keeps_its_weights() -> None:
    torch.manual_seed(9)
    model, images = classifier(Chain()), correlated(80)
    smaller, left = cut(model, {"hidden": first(3, 5)})
    refit(model, smaller, left, images)
    for name in ("conv", "middle"):
        assert torch.equal(smaller.network.get_submodule(name).weight, model.network.get_submodule(name).weight)
    # What `hidden` reads is unchanged: its own three outputs are right already.
    torch.testing.assert_close(smaller.network.hidden.weight, model.network.hidden.weight[:3], atol=1e-9, rtol=0)
    assert not torch.allclose(smaller.network.head.weight, model.network.head.weight[:, :3], atol=1e-3)


def test_refitting_loses_less_than_folding_alone(networks: ModuleType) -> None:
    for name in ("vgg_small", "resnet20"):
        model = networks.zoo_model(name)
        shape = networks.SHAPE
        images = ((correlated(100, shape, rank=20) + 1.5) / 3).clamp(0, 1).float()
        sites = find_sites(model.network, shape)
        profiled = profile(model, (images, torch.arange(100) % 4), ("avg",))
        neurons = networks.coupled_masks(model.network, shape, 2, 0.6)
        folded = copy.deepcopy(model)
        for each in readings(model.network, sites, profiled):
            fold(folded.network, each, sites.couple(neurons).ids)
        smaller, left = cut(folded, neurons)
        before = error(model, smaller, images)
        refit(model, smaller, left, images)
        assert error(model, smaller, images) < 0.5 * before


def test_a_larger_ridge_moves_the_weights_less() -> None:
    torch.manual_seed(10)
    model, images = classifier(Chain()), correlated(60)
    start, left = cut(model, {"conv": first(4, 8)})
    moved = []
    for ridge in (1e-6, 1e-2, 1.0, 1e9):
        smaller = copy.deepcopy(start)
        refit(model, smaller, left, images, ridge=ridge)
        moved.append((smaller.network.middle.weight - start.network.middle.weight).norm().item())
    assert moved == sorted(moved, reverse=True)
    assert moved[-1] == pytest.approx(0, abs=1e-5)


def test_what_is_drawn_follows_the_seed_and_how_images_are_batched_makes_no_difference_when_all_are_used(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(11)
    model, images = classifier(Chain()), correlated(70)
    start, left = cut(model, {"conv": first(4, 8)})

    def run(seed: int, batch_size: int = 100) -> str:
        smaller = copy.deepcopy(start)
        torch.manual_seed(seed + batch_size)  # whatever happened before in this process
        refit(model, smaller, left, images, seed=seed, batch_size=batch_size)
        state.append(smaller)
        return model_digest(smaller)

    state: list[Classifier] = []
    run(0)
    run(1, batch_size=32)
    for left_out, right_out in zip(state[0].parameters(), state[1].parameters(), strict=True):
        torch.testing.assert_close(left_out, right_out, atol=1e-8, rtol=1e-6)
    monkeypatch.setattr("nss.refit.ROWS", 140)  # two positions of four
    assert run(3) == run(3)
    assert run(3) != run(4)


def test_layers_that_are_too_wide_or_have_cubes_for_kernels_keep_their_weights(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(12)
    model, images = classifier(Chain()), correlated(60)
    smaller, left = cut(model, {"conv": first(4, 8)})
    start = copy.deepcopy(smaller)
    monkeypatch.setattr("nss.refit.WIDEST", 4 * 9 - 1)  # `middle` reads 36 numbers, `hidden` 24, `head` 5
    refit(model, smaller, left, images)
    assert torch.equal(smaller.network.middle.weight, start.network.middle.weight)
    assert not torch.equal(smaller.network.hidden.weight, start.network.hidden.weight)
    monkeypatch.setattr("nss.refit.WIDEST", 4 * 9)
    refit(model, smaller, left, images)
    assert not torch.equal(smaller.network.middle.weight, start.network.middle.weight)


def test_no_gradient_is_taken_and_modes_hooks_and_the_original_are_left_alone(networks: ModuleType) -> None:
    model = networks.zoo_model("resnet20")
    model.network.blocks[1].conv1.weight.requires_grad_(False)
    smaller, left = cut(model, networks.coupled_masks(model.network, networks.SHAPE, 1, 0.6))
    calls: list[int] = []
    for each in (model, smaller):
        each.network.head.register_forward_pre_hook(lambda _m, _i: calls.append(1))
    before = model_digest(model)
    modes = [module.training for each in (model, smaller) for module in each.modules()]
    wanted = [parameter.requires_grad for parameter in smaller.parameters()]
    seed = torch.get_rng_state()
    refit(model, smaller, left, networks.pictures(20))
    assert model_digest(model) == before
    assert [module.training for each in (model, smaller) for module in each.modules()] == modes
    assert [parameter.requires_grad for parameter in smaller.parameters()] == wanted
    assert all(each.grad is None and each.is_leaf for model in (model, smaller) for each in model.parameters())
    assert all(len(each.network.head._forward_pre_hooks) == 1 for each in (model, smaller))
    assert torch.equal(torch.get_rng_state(), seed)
    assert bool(torch.isfinite(smaller(networks.pictures(4))).all())


def test_dead_inputs_and_a_single_image_give_finite_weights(networks: ModuleType) -> None:
    torch.manual_seed(13)
    network = Chain()
    with torch.no_grad():
        network.conv.weight[:], network.conv.bias[:] = 0, -1
    model = classifier(network)
    smaller, left = cut(model, {"conv": first(4, 8)})
    refit(model, smaller, left, correlated(1))
    assert all(bool(torch.isfinite(each).all()) for each in smaller.state_dict().values())
    assert error(model, smaller, correlated(5, seed=1)) < 1e-10


def test_images_that_differ_by_rounding_give_the_same_fit(networks: ModuleType) -> None:
    """The features of an untrained network hardly vary about their means: that little is all there is to fit."""
    model = networks.zoo_model("resnet20")
    images = ((correlated(100, networks.SHAPE, rank=20) + 1.5) / 3).clamp(0, 1).float()
    start, left = cut(model, networks.coupled_masks(model.network, networks.SHAPE, 2, 0.6))
    heads = []
    for noise in (0.0, 1e-7):
        smaller = copy.deepcopy(start)
        refit(
            model, smaller, left, images + noise * torch.randn(images.shape, generator=torch.Generator().manual_seed(1))
        )
        heads.append(smaller.network.head.weight.detach())
    assert float((heads[0] - heads[1]).norm() / heads[0].norm()) < 0.01
