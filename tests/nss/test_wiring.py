"""One-way wiring: an earlier column's logits are the same bits whatever stands beside it, and nothing can move them."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from nss.errors import ExtendError
from nss.freeze import freeze
from nss.mask import ChannelMask
from nss.model import Classifier, build_model
from nss.remove import remove
from nss.routing import Router, choose_views
from nss.sites import find_sites
from nss.sliced import sliced
from nss.weight_masks import apply_masks
from nss.wiring import Columns, last_column, read_earlier

NETWORKS = (
    ("nss.zoo:lenet", (1, 16, 16)),
    ("nss.zoo:vgg_small", (1, 16, 16)),
    ("nss.zoo:resnet20", (3, 16, 16)),
    ("nss.zoo:mobilenet_small", (3, 16, 16)),
    ("torchvision.models:resnet18", (3, 32, 32)),
)
Shape = tuple[int, int, int]


def columns_of(factory: str, shape: Shape, classes: Sequence[int], randomise: object) -> list[nn.Module]:
    """As many untrained columns as numbers of classes, with lived-in norms."""
    found: list[nn.Module] = []
    for seed, count in enumerate(classes):
        network = build_model(factory, [str(each) for each in range(max(2, count))], shape, seed).network
        if found:
            read_earlier(network, found, shape)
        found.append(randomise(network, seed).eval())  # type: ignore[operator]
    return found


def joined(columns: Sequence[nn.Module], shape: Shape, classes: Sequence[int]) -> Columns:
    views, features = choose_views(columns[0], shape)
    router = Router(views, features, classes)
    for gate in router.gates:
        gate.reset_parameters()  # type: ignore[operator]
    network = Columns(columns, shape, router)
    return network.eval().to(memory_format=torch.channels_last)


def images_of(shape: Shape, count: int, seed: int = 0) -> Tensor:
    images = torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed))
    return images.contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(("factory", "shape"), NETWORKS)
def test_the_first_column_answers_as_it_does_alone_bit_for_bit(
    factory: str, shape: Shape, networks: ModuleType
) -> None:
    columns = columns_of(factory, shape, (3, 2, 4), networks.randomise)
    whole, two = joined(columns, shape, (3, 2, 4)), joined(columns[:2], shape, (3, 2))
    two.router.gates[0].load_state_dict(whole.router.gates[0].state_dict())
    alone = columns[0]
    with torch.no_grad():
        for count in (1, 2, 3, 33):
            images = images_of(shape, count)
            answers = whole(images)
            assert answers.shape == (count, 9)
            assert torch.equal(answers[:, :3], alone(images))
            assert torch.equal(answers[:, :5], two(images))


class TwoLayers(nn.Module):
    def __init__(self, hidden: int, classes: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, hidden, 3)
        self.norm = nn.BatchNorm2d(hidden)
        self.mid = nn.Conv2d(hidden, hidden, 1)
        self.head = nn.Linear(hidden * 4, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.conv(x)))
        return self.head(F.relu(self.mid(x)).flatten(1))


def test_a_later_column_reads_everything_before_it_as_the_formula_says() -> None:
    torch.manual_seed(0)
    old, new = TwoLayers(3, 2).eval(), TwoLayers(2, 2)
    read_earlier(new, [old], (1, 4, 4))
    new.eval()
    network = joined([old, new], (1, 4, 4), (2, 2))
    x = torch.randn(5, 1, 4, 4)
    with torch.no_grad():
        first = F.relu(old.norm(old.conv(x))), F.relu(new.norm(new.conv(x)))
        second = F.relu(old.mid(first[0])), F.conv2d(torch.cat(first, 1), new.mid.weight, new.mid.bias).relu()
        expected = F.linear(torch.cat([each.flatten(1) for each in second], 1), new.head.weight, new.head.bias)
        logits, _ = network.parts(x)
    assert new.mid.weight.shape == (2, 5, 1, 1)
    assert new.head.in_features == (3 + 2) * 4
    assert torch.allclose(logits[1], expected, atol=1e-6)


class Backward(TorchDispatchMode):
    """Notes of every backward pass of a convolution how many channels it read, and whether their gradient was made."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[tuple[int, bool]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.convolution_backward.default:
            self.made.append((args[1].shape[1], args[-1][0]))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("bias", [True, False])
def test_a_column_in_training_computes_the_same_and_no_gradient_of_what_is_frozen(bias: bool) -> None:
    torch.manual_seed(0)
    columns: list[TwoLayers] = []
    for hidden in (3, 4, 2):
        column = TwoLayers(hidden, 2)
        column.mid = nn.Conv2d(hidden, hidden, 1, bias=bias)
        if columns:
            read_earlier(column, columns, (1, 4, 4))
        columns.append(column)
    network, x = joined(columns, (1, 4, 4), (2, 2, 2)), torch.randn(5, 1, 4, 4)
    own = columns[-1]
    whole, _ = network.parts(x)
    asked = [own.conv.weight, own.mid.weight, own.head.weight, own.head.bias]
    asked += [own.mid.bias] if own.mid.bias is not None else []
    expected = torch.autograd.grad(whole[-1].square().sum(), asked)
    with last_column(network), Backward() as backward:
        own.norm.eval()
        logits, _ = network.parts(x)
        found = torch.autograd.grad(logits[-1].square().sum(), asked)
    assert torch.equal(logits[0], whole[0])
    assert torch.equal(logits[1], whole[1])
    assert torch.allclose(logits[2], whole[2], atol=1e-6)
    for gradient, right in zip(found, expected, strict=True):
        assert torch.allclose(gradient, right, rtol=1e-4, atol=1e-5)
    assert sorted(backward.made) == [(1, False), (2, True), (3 + 4, False)]


@pytest.mark.parametrize("kind", ["hook", "hook before", "mirrored edge"])
def test_a_layer_that_does_more_than_sums_reads_everything_at_once_in_training_too(kind: str) -> None:
    torch.manual_seed(0)
    old, new = TwoLayers(3, 2), TwoLayers(2, 2)
    if kind == "mirrored edge":
        old.mid, new.mid = (nn.Conv2d(count, count, 3, padding=1, padding_mode="reflect") for count in (3, 2))
    read_earlier(new, [old], (1, 4, 4))
    if kind == "hook":
        new.mid.register_forward_hook(lambda layer, args, made: made.tanh())
    if kind == "hook before":
        new.mid.register_forward_pre_hook(lambda layer, args: (args[0] - args[0].mean(1, keepdim=True),))
    network, x = joined([old, new], (1, 4, 4), (2, 2)), torch.randn(5, 1, 4, 4)
    expected, _ = network.parts(x)
    with last_column(network):
        new.norm.eval()
        found, _ = network.parts(x)
    assert torch.allclose(found[1], expected[1], atol=1e-6)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("factory", "shape"), NETWORKS[:4])
def test_a_later_column_answers_the_same_in_training_when_it_is_frozen_in_part(
    factory: str, shape: Shape, masked: bool, networks: ModuleType
) -> None:
    whole = joined(columns_of(factory, shape, (3, 2), networks.randomise), shape, (3, 2))
    if masked:
        layers = {name: layer for name, layer in whole.columns[1].named_modules() if isinstance(layer, nn.Conv2d)}
        apply_masks(whole.columns[1], {name: layer.weight > 0 for name, layer in layers.items()})
    own = [site for site in find_sites(whole, shape) if site.module.startswith("columns.1.")]
    frozen = freeze(whole, {site.name: torch.arange(len(site)) % 2 == 0 for site in own}, shape)
    assert list(frozen.parameters())
    images = images_of(shape, 4)
    in_evaluation, _ = frozen.eval().parts(images)
    in_training, _ = frozen.train().parts(images)
    assert in_training[1].requires_grad
    assert not in_training[0].requires_grad
    for found, expected in zip(in_training, in_evaluation, strict=True):
        assert torch.allclose(found, expected, rtol=1e-4, atol=1e-4)
    expected_logits, _ = whole.parts(images)
    assert torch.allclose(in_training[1], expected_logits[1], rtol=1e-4, atol=1e-4)


def test_one_wide_network_with_zeros_from_new_to_old_computes_the_same() -> None:
    torch.manual_seed(0)
    old, new = TwoLayers(3, 2).eval(), TwoLayers(2, 2)
    read_earlier(new, [old], (1, 4, 4))
    wide = TwoLayers(5, 4).eval()
    with torch.no_grad():
        for name in ("conv", "mid"):
            layers = [getattr(each, name) for each in (old, new, wide)]
            layers[2].weight.zero_()
            layers[2].weight[:3, : layers[0].weight.shape[1]] = layers[0].weight
            layers[2].weight[3:] = layers[1].weight
            layers[2].bias.copy_(torch.cat([layers[0].bias, layers[1].bias]))
        wide.head.weight.zero_()
        wide.head.weight[:2, :12], wide.head.weight[2:] = old.head.weight, new.head.weight
        wide.head.bias.copy_(torch.cat([old.head.bias, new.head.bias]))
        x = torch.randn(5, 1, 4, 4)
        logits, _ = joined([old, new.eval()], (1, 4, 4), (2, 2)).parts(x)
        assert torch.allclose(torch.cat(logits, 1), wide(x), atol=1e-5)


@pytest.mark.parametrize(("factory", "shape"), NETWORKS[1:4])
def test_not_even_broken_numbers_in_a_later_column_reach_an_earlier_one(
    factory: str, shape: Shape, networks: ModuleType
) -> None:
    columns = columns_of(factory, shape, (3, 2), networks.randomise)
    network, images = joined(columns, shape, (3, 2)), images_of(shape, 4)
    with torch.no_grad():
        before = network(images)[:, :3]
        for parameter in network.columns[1].parameters():
            parameter.fill_(float("nan"))
        after = network(images)
    assert torch.equal(before, after[:, :3])
    assert bool(after[:, 3:].isnan().all())


def test_training_the_last_column_moves_no_number_of_another(networks: ModuleType) -> None:
    shape = (3, 16, 16)
    network = joined(columns_of("nss.zoo:resnet20", shape, (3, 2), networks.randomise), shape, (3, 2)).train()
    before = copy.deepcopy(network.state_dict())
    images, labels = images_of(shape, 8), torch.arange(8) % 2
    with last_column(network) as column:
        optimizer = torch.optim.AdamW(column.parameters(), 0.01, weight_decay=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            F.cross_entropy(network.parts(images)[0][1], labels).backward()
            optimizer.step()
        assert all(parameter.grad is None for parameter in network.columns[0].parameters())
    moved = {name for name, tensor in network.state_dict().items() if not torch.equal(tensor, before[name])}
    # Behind a norm a convolution of this network has no bias: every number of the column moves.
    assert moved == {name for name in before if name.startswith("columns.1.")}


def test_modes_and_flags_are_as_they_were_also_after_an_error(networks: ModuleType) -> None:
    shape = (1, 16, 16)
    network = joined(columns_of("nss.zoo:vgg_small", shape, (3, 2), networks.randomise), shape, (3, 2)).train()
    network.columns[0].head.weight.requires_grad_(False)
    network.columns[1].features[1].eval()
    modes = [module.training for module in network.modules()]
    flags = [parameter.requires_grad for parameter in network.parameters()]

    def fail() -> None:
        with last_column(network):
            assert not network.columns[0].training
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert [module.training for module in network.modules()] == modes
    assert [parameter.requires_grad for parameter in network.parameters()] == flags


def test_the_neurons_of_all_columns_can_be_found_masked_and_removed(networks: ModuleType) -> None:
    shape = (1, 16, 16)
    network = joined(columns_of("nss.zoo:lenet", shape, (3, 2), networks.randomise), shape, (3, 2))
    sites = find_sites(network, shape)
    assert [site.name for site in sites if len(site) == 84] == ["columns.0.fc2", "columns.1.fc2"]
    masks = networks.random_masks(network, shape, 0)
    smaller, masked = remove(network, masks, shape), sliced(network, masks, shape)
    assert any(isinstance(module, ChannelMask) for module in masked.modules())
    images = images_of(shape, 4)
    assert networks.largest_difference(smaller, masked, images) < 1e-5
    assert smaller.get_submodule("columns.1.fc2").out_features == int(masks["columns.1.fc2"].sum())


@pytest.mark.parametrize(
    ("name", "arguments", "reason"),
    [("Grouped", (), "in groups"), ("GroupNormed", (), "averages over"), ("FixedView", (), "fixes the number")],
)
def test_networks_that_have_no_columns_are_refused_with_the_reason(
    networks: ModuleType, name: str, arguments: tuple[int, ...], reason: str
) -> None:
    network = getattr(networks, name)(*arguments)
    with pytest.raises(ExtendError, match=reason):
        Columns([network], (3, 8, 8), Router({}, 1, [2]))


def test_a_copy_of_an_extended_model_is_independent(networks: ModuleType) -> None:
    shape = (1, 16, 16)
    network = joined(columns_of("nss.zoo:vgg_small", shape, (4, 2), networks.randomise), shape, (4, 2))
    model = Classifier(network, networks.zoo_model("vgg_small").spec)
    twin = copy.deepcopy(model)
    images = networks.pictures(3)
    with torch.no_grad():
        before = model(images)
        twin.network.columns[0].head.bias.add_(1)
        assert torch.equal(model(images), before)
        assert not torch.equal(twin(images), before)
