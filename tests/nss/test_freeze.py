"""Structural freezing: what may move is a parameter, everything else stays bit for bit what it was (cases.md 14)."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
import torchvision
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from nss.anatomy import head_of
from nss.errors import ModelError, SiteError
from nss.freeze import freeze, thaw
from nss.model import load_model, model_digest, network_of, save_model
from nss.prune_weights import prune_weights
from nss.sites import find_sites
from nss.weight_masks import weight_masks

ZOO = ("lenet", "vgg_small", "resnet20", "mobilenet_small")
RGB = (3, 32, 32)
Masks = dict[str, Tensor]
few = settings(max_examples=4, deadline=None, suppress_health_check=[HealthCheck.too_slow])

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.1),
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.01, momentum=0.9, weight_decay=0.1, nesterov=True),
}


def layers_and_norms(network: nn.Module) -> dict[str, str | None]:
    """Each layer and the BatchNorm registered right after it: true of the zoo, resnet18 and mobilenet_v2."""
    leaves = [(name, module) for name, module in network.named_modules() if not list(module.children())]
    pairs: dict[str, str | None] = {}
    for (name, module), (after, following) in zip(leaves, [*leaves[1:], ("", nn.Identity())], strict=True):
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            pairs[name] = after if isinstance(following, nn.BatchNorm2d) else None
    return pairs


def free_entries(model: nn.Module, free: Masks) -> Masks:
    """Which entries of the state may move, by name, worked out from the names alone."""
    prefix = "network." if hasattr(model, "network") else ""
    flags = {name: torch.zeros_like(tensor, dtype=torch.bool) for name, tensor in model.state_dict().items()}
    for layer, norm in layers_and_norms(network_of(model)).items():
        for module in (layer, norm):
            for entry in ("weight", "bias"):
                name = f"{prefix}{module}.{entry}"
                if layer in free and name in flags:
                    flags[name][free[layer]] = True
    return flags


def steps(model: nn.Module, images: Tensor, optimizer: torch.optim.Optimizer, count: int = 3) -> None:
    labels = torch.arange(len(images)) % 2
    for _ in range(count):
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()


def check_only_free_entries_moved(
    model: nn.Module, free: Masks, images: Tensor, optimizer: str, training: bool
) -> None:
    before = copy.deepcopy(model.state_dict())
    frozen = freeze(model, free, None if hasattr(model, "spec") else RGB).train(training)
    steps(frozen, images, OPTIMIZERS[optimizer](frozen.parameters()))
    after = thaw(frozen).state_dict()
    flags = free_entries(model, free)
    assert list(after) == list(before)
    for name, tensor in after.items():
        assert torch.equal(tensor[~flags[name]], before[name][~flags[name]]), name
    moved = sum(int((tensor != before[name]).sum()) for name, tensor in after.items())
    allowed = sum(int(mask.sum()) for mask in flags.values())
    assert 0.5 * allowed < moved <= allowed
    assert sum(parameter.numel() for parameter in frozen.parameters()) == allowed
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", ZOO)
def test_untouched_entries_of_the_zoo_are_bit_identical(
    networks: ModuleType, name: str, optimizer: str, training: bool
) -> None:
    model = networks.zoo_model(name, 3)
    free = networks.random_masks(model.network, networks.SHAPE, 5, 0.3)
    check_only_free_entries_moved(model, free, networks.pictures(6), optimizer, training)


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2"])
def test_untouched_entries_of_torchvision_models_are_bit_identical(networks: ModuleType, name: str) -> None:
    torch.manual_seed(0)
    network = networks.randomise(getattr(torchvision.models, name)(num_classes=4), 1)
    free = networks.random_masks(network, RGB, 2, 0.2)
    check_only_free_entries_moved(network, free, networks.floats(4, RGB), "adamw", True)


@pytest.mark.parametrize("name", ZOO)
@given(seed=st.integers(0, 10_000), share=st.sampled_from([0.05, 0.5, 1.0]))
@few
def test_answers_are_those_of_the_model_in_evaluation_in_either_mode(
    networks: ModuleType, name: str, seed: int, share: float
) -> None:
    model = networks.zoo_model(name, seed)
    frozen = freeze(model, networks.random_masks(model.network, networks.SHAPE, seed, share))
    images = networks.pictures(5, seed=seed)
    with torch.no_grad():
        expected = model(images)
        for training in (True, False):
            torch.testing.assert_close(frozen.train(training)(images), expected, rtol=1e-4, atol=1e-4)


class Padded(nn.Module):
    """Convolutions whose padding is a word, or is no zeros, over one axis and two, with gaps and strides."""

    def __init__(self) -> None:
        super().__init__()
        self.wrap = nn.Conv2d(3, 20, 3, padding=1, padding_mode="circular")
        self.same = nn.Conv2d(20, 21, 4, padding="same", bias=False)
        self.valid = nn.Conv2d(21, 40, 3, padding="valid", dilation=2)
        self.strided = nn.Conv2d(40, 24, 3, stride=2, padding=1, groups=8)
        self.norm = nn.GroupNorm(4, 24)
        self.line = nn.Conv1d(24, 18, 3, padding=1)
        self.line_norm = nn.BatchNorm1d(18, affine=False)
        self.line_norm.running_mean += torch.linspace(-1, 1, 18)
        self.line_norm.running_var *= torch.linspace(0.5, 2, 18)
        self.head = nn.Linear(18, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.valid(F.relu(self.same(F.relu(self.wrap(x))))))
        x = F.relu(self.norm(self.strided(x))).mean(3)
        return self.head(F.relu(self.line_norm(self.line(x))).mean(2))


class OwnStatistics(nn.Module):
    """A BatchNorm that keeps no statistics normalises by those of the batch, in training and evaluation."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3)
        self.norm = nn.BatchNorm2d(6, track_running_stats=False)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.norm(self.conv(x))).mean((2, 3)))


def check_gradients(network: nn.Module, free: Masks, images: Tensor, pairs: dict[str, str | None]) -> None:
    """Gradients of free rows are those of the whole model in evaluation mode."""
    network, images = network.double(), images.double()
    plain, frozen = copy.deepcopy(network).eval(), freeze(network, free, tuple(images.shape[1:])).train()
    labels = torch.arange(len(images)) % 4
    for model in (plain, frozen):
        F.cross_entropy(model(images), labels).backward()
    compared = 0
    for layer, mask in free.items():
        for name in (layer, pairs.get(layer)):
            for entry in ("weight", "bias"):
                whole = getattr(plain.get_submodule(name), entry, None) if name else None
                if whole is not None and bool(mask.any()):
                    mine = getattr(frozen.get_submodule(str(name)), f"free_{entry}").grad
                    torch.testing.assert_close(mine, whole.grad[mask], rtol=1e-9, atol=1e-12)
                    compared += 1
    assert compared == len(list(frozen.parameters())) > 0


@given(seed=st.integers(0, 10_000), share=st.sampled_from([0.1, 0.4, 0.6, 1.0]))
@few
def test_gradients_of_free_rows_are_those_of_the_whole_model(networks: ModuleType, seed: int, share: float) -> None:
    for network, shape in (
        (networks.zoo_model("vgg_small", seed).network, networks.SHAPE),
        (networks.zoo_model("mobilenet_small", seed).network, networks.SHAPE),
    ):
        pairs = layers_and_norms(network)
        free = networks.random_masks(network, shape, seed, share)
        check_gradients(network, free, networks.floats(5, shape, seed), pairs)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@given(seed=st.integers(0, 10_000), share=st.sampled_from([0.2, 0.7]))
@few
def test_gradients_with_any_padding_groups_axes_and_norms(networks: ModuleType, seed: int, share: float) -> None:
    cases: list[tuple[nn.Module, tuple[int, ...], dict[str, str | None]]] = [
        (Padded(), (3, 9, 9), {"strided": "norm"}),
        (OwnStatistics(), (3, 6, 6), {"conv": "norm"}),
        (networks.Grouped(), (3, 6, 6), {}),
        (networks.randomise(networks.Squeeze(), seed), (3, 6, 6), {"wide": "bn1", "depthwise": "bn2"}),
        (networks.Tokens(), (4, 4, 8), {}),
        (networks.Residual(), (3, 6, 6), {}),
    ]
    for network, shape, pairs in cases:
        sites = find_sites(network, shape)
        generator = torch.Generator().manual_seed(seed)
        free = {each.name: torch.rand(len(each.out_ids), generator=generator) for each in sites.anatomy.producers}
        free = {name: lot <= max(share, float(lot.min())) for name, lot in free.items()}
        images = networks.floats(5, shape, seed)
        check_gradients(network, free, images, pairs)


class Joined(nn.Module):
    """A shortcut is added in place to what a convolution made; further on, a ReLU alone reads one, and two read one."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 20, 3, padding=1)
        self.main, self.norm = nn.Conv2d(20, 24, 3, padding=1, bias=False), nn.BatchNorm2d(24)
        self.shortcut = nn.Conv2d(20, 24, 1)
        self.after, self.relu = nn.Conv2d(24, 40, 3), nn.ReLU()
        self.split, self.other = nn.Conv2d(40, 18, 1), nn.ReLU()
        self.head = nn.Linear(18, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        joined = self.norm(self.main(x))
        joined += self.shortcut(x)
        both = self.split(self.relu(self.after(joined)))
        return self.head((self.other(both) - 0.5 * both).mean((2, 3)))


@pytest.mark.parametrize("lowest", ["features.0", "features.3", "features.7"])
@pytest.mark.parametrize("share", [0.1, 0.9])
def test_gradients_above_the_lowest_free_layer_are_those_of_the_whole_model(
    networks: ModuleType, lowest: str, share: float
) -> None:
    """Of what the layer above it hands down, only the channels of its free rows are computed."""
    network = networks.zoo_model("vgg_small", 4).network
    free = networks.random_masks(network, networks.SHAPE, 4, share)
    above = list(free)[list(free).index(lowest) :]
    free = {name: free[name] for name in above}
    check_gradients(network, free, networks.floats(5, networks.SHAPE, 4), layers_and_norms(network))


def test_gradients_behind_a_shortcut_that_is_added_in_place(networks: ModuleType) -> None:
    network = networks.randomise(Joined(), 3)
    free = {"main": torch.arange(24) < 2, "shortcut": torch.arange(24) >= 20, "after": torch.arange(40) == 7}
    for chosen in (free, {"main": free["main"]}, {**free, "split": torch.arange(18) < 9}):
        check_gradients(network, chosen, networks.floats(5, (3, 6, 6)), {"main": "norm"})


def test_layers_can_be_thawed_into_a_plain_model_that_is_kept_and_loaded(networks: ModuleType, tmp_path: Path) -> None:
    model = networks.zoo_model("resnet20").train()
    model.network.head.weight.requires_grad_(False)
    frozen = freeze(model, networks.random_masks(model.network, networks.SHAPE, 1, 0.3))
    plain = thaw(frozen)
    assert model_digest(plain) == model_digest(model)
    for (name, module), (other, twin) in zip(model.named_modules(), plain.named_modules(), strict=True):
        assert (name, type(module), module.training) == (other, type(twin), twin.training)
        assert set(vars(module)) == set(vars(twin))
    assert {n: p.requires_grad for n, p in plain.named_parameters()} == {
        n: p.requires_grad for n, p in model.named_parameters()
    }
    steps(frozen, networks.pictures(4), torch.optim.SGD(frozen.parameters(), 0.1))
    assert model_digest(plain) == model_digest(model)
    save_model(thaw(frozen), tmp_path / "model")
    assert model_digest(load_model(tmp_path / "model")) == model_digest(thaw(frozen)) != model_digest(model)


def test_what_moved_is_what_the_frozen_copy_computes_with(networks: ModuleType) -> None:
    model = networks.zoo_model("mobilenet_small")
    frozen = freeze(model, networks.random_masks(model.network, networks.SHAPE, 1, 0.5))
    steps(frozen, networks.pictures(6), OPTIMIZERS["sgd"](frozen.parameters()), 5)
    assert networks.largest_difference(thaw(frozen), frozen, networks.pictures(7, seed=9)) < 1e-5
    assert networks.largest_difference(thaw(frozen), model, networks.pictures(7, seed=9)) > 1e-2


def test_a_neuron_of_a_layer_called_twice_moves_if_every_named_call_lets_it(networks: ModuleType) -> None:
    network = networks.Twice()
    both = {"shared": torch.tensor([1, 1, 0, 0]).bool(), "shared#2": torch.tensor([0, 1, 1, 0]).bool()}
    for free, rows in ((both, [1]), ({"shared#2": both["shared#2"]}, [1, 2])):
        frozen = freeze(network, free, (1, 6, 6))
        assert [tuple(each.shape) for each in frozen.parameters()] == [(len(rows), 4, 3, 3), (len(rows),)]
        steps(frozen, networks.floats(6, (1, 6, 6)), torch.optim.SGD(frozen.parameters(), 0.5))
        after = thaw(frozen).shared.weight
        changed = [row for row in range(4) if not torch.equal(after[row], network.shared.weight[row])]
        assert changed == rows


def test_a_norm_behind_a_concatenation_moves_where_its_channels_do(networks: ModuleType) -> None:
    network = networks.randomise(networks.Concat(), 0)
    free = {"conv2": torch.arange(5) == 1, "conv1": torch.arange(4) == 3}  # joined: conv2, image, conv1
    frozen = freeze(network, free, (3, 6, 6))
    steps(frozen, networks.floats(6, (3, 6, 6)), OPTIMIZERS["adamw"](frozen.parameters()))
    after = thaw(frozen).bn
    assert (after.weight != network.bn.weight).nonzero()[:, 0].tolist() == [1, 11]
    assert torch.equal(after.running_mean, network.bn.running_mean)


def test_the_class_head_can_move_and_is_found(networks: ModuleType) -> None:
    model = networks.zoo_model("lenet")
    head = head_of(find_sites(model.network, networks.SHAPE).anatomy)
    assert head is not None
    assert head.name == "fc3"
    frozen = freeze(model, {"fc3": torch.arange(len(model.spec.classes)) == 1})
    assert [tuple(each.shape) for each in frozen.parameters()] == [(1, 84), (1,)]


def test_nothing_free_leaves_no_parameter_and_no_backward(networks: ModuleType) -> None:
    model = networks.zoo_model("resnet20")
    frozen = freeze(model, {})
    assert list(frozen.parameters()) == []
    assert not frozen(networks.pictures(2)).requires_grad


def test_no_backward_below_the_first_free_layer(networks: ModuleType) -> None:
    model = networks.zoo_model("vgg_small")
    frozen = freeze(model, {"features.10": torch.arange(64) < 8})
    seen = {}
    for name in ("features.9", "features.10"):
        frozen.network.get_submodule(name).register_forward_hook(
            lambda _m, _i, out, name=name: seen.update({name: out.requires_grad})
        )
    frozen(networks.pictures(2))
    assert seen == {"features.9": False, "features.10": True}


def work(model: nn.Module, images: Tensor) -> int:
    """Operations of a forward and a backward pass."""
    with FlopCounterMode(display=False) as counter:
        F.cross_entropy(model(images), torch.arange(len(images)) % 4).backward()
    return counter.get_total_flops()


def test_a_step_computes_weight_gradients_for_free_rows_alone(networks: ModuleType) -> None:
    model = networks.zoo_model("vgg_small")
    images = networks.pictures(2)
    masks = {site.name: torch.arange(len(site)) < len(site) // 4 for site in find_sites(model.network, networks.SHAPE)}

    # forward and backward to the input cost one each; a quarter of the weight gradient, at least 16 rows of it, follows
    assert work(freeze(model, masks), images) < 0.8 * work(model.eval(), images)


def test_a_step_computes_no_gradient_of_channels_below_which_nothing_moves(networks: ModuleType) -> None:
    model, images = networks.zoo_model("vgg_small"), networks.pictures(2)
    above = {"features.10": torch.arange(64) == 0}
    everything, some = (
        work(freeze(model, {**above, "features.7": torch.arange(64) < rows}), images) for rows in (64, 16)
    )
    places = len(images) * (networks.SHAPE[1] // 2) ** 2
    # 3 x 3 kernels: 48 of 64 rows of a weight's gradient from 32 channels, as many channels of an input's from 64 rows
    assert everything - some == 2 * places * 9 * 48 * (32 + 64)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_masked_weights_stay_masked_and_zero_and_the_others_move(
    networks: ModuleType, tmp_path: Path, optimizer: str
) -> None:
    model = prune_weights(networks.zoo_model("mobilenet_small"), sparsity=0.5)
    masks = weight_masks(model)
    frozen = freeze(model, networks.random_masks(model.network, networks.SHAPE, 1, 0.5))
    steps(frozen, networks.pictures(6), OPTIMIZERS[optimizer](frozen.parameters()), 5)
    plain = thaw(frozen)
    assert networks.largest_difference(plain, frozen, networks.pictures(7, seed=9)) < 1e-5
    assert networks.largest_difference(plain, model, networks.pictures(7, seed=9)) > 1e-2
    assert weight_masks(plain).keys() == masks.keys()
    for name, mask in weight_masks(plain).items():
        assert torch.equal(mask, masks[name])
        original = plain.get_submodule(name).parametrizations.weight.original
        assert not bool(original[~mask].any())
    assert list(plain.state_dict()) == list(model.state_dict())
    save_model(plain, tmp_path / "model")
    assert networks.largest_difference(load_model(tmp_path / "model"), plain, networks.pictures(5)) == 0


def test_a_copy_can_be_frozen_moved_and_copied_again(networks: ModuleType) -> None:
    model = networks.zoo_model("mobilenet_small")
    frozen = freeze(model, networks.random_masks(model.network, networks.SHAPE, 1, 0.5))
    twin = copy.deepcopy(frozen)
    steps(twin, networks.pictures(4), torch.optim.SGD(twin.parameters(), 0.1))
    assert model_digest(thaw(frozen)) == model_digest(model) != model_digest(thaw(twin))


@pytest.mark.parametrize(
    ("free", "message"),
    [
        ({"nowhere": torch.ones(4, dtype=torch.bool)}, "no layer 'nowhere'"),
        ({"conv1": torch.ones(3, dtype=torch.bool)}, "bool \\[3\\]"),
        ({"conv1": torch.ones(16)}, "float32 \\[16\\]"),
    ],
)
def test_wrong_masks_are_refused(networks: ModuleType, free: Masks, message: str) -> None:
    with pytest.raises(SiteError, match=message):
        freeze(networks.zoo_model("lenet"), free)


def test_a_frozen_copy_is_not_kept_in_a_folder(networks: ModuleType, tmp_path: Path) -> None:
    frozen = freeze(networks.zoo_model("lenet"), {"conv1": torch.arange(16) < 4})
    with pytest.raises(ModelError, match="frozen") as caught:
        save_model(frozen, tmp_path / "frozen")
    assert caught.value.fix == "save nss.thaw(model) instead"
    assert list(tmp_path.iterdir()) == []
