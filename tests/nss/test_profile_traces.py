"""Profiling leaves a model as it found it, whatever happens, and holds sums only."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

from nss.model import model_digest
from nss.profile import profile

METRICS = ("avg", "var", "ens", "taylor")


class Traces:
    """Everything about a model that profiling may touch."""

    def __init__(self, model: nn.Module) -> None:
        self.digest = model_digest(model)
        self.modes = {name: module.training for name, module in model.named_modules()}
        self.hooks = {
            name: (len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks), len(m._backward_pre_hooks))
            for name, m in model.named_modules()
        }
        self.grads = {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}
        self.needs = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
        self.modules = [name for name, _ in model.named_modules()]

    def __eq__(self, other: object) -> bool:
        assert isinstance(other, Traces)
        same_grads = all(
            left is right is None or (left is not None and right is not None and torch.equal(left, right))
            for left, right in zip(self.grads.values(), other.grads.values(), strict=True)
        )
        mine, theirs = ((t.digest, t.modes, t.hooks, t.needs, t.modules) for t in (self, other))
        return same_grads and mine == theirs

    __hash__ = None


def lived_in(networks: ModuleType) -> nn.Module:
    """A model in mixed modes, with a hook, some gradients, some frozen weights."""
    model = networks.zoo_model("resnet20").train()
    model.network.blocks[0].eval()
    model.network.stem[1].eval()
    model.network.head.register_forward_hook(lambda *_: None)
    model.network.head.weight.grad = torch.ones_like(model.network.head.weight)
    model.network.stem.requires_grad_(False)
    return model


def test_profiling_leaves_modes_hooks_gradients_buffers_and_flags_as_they_were(networks: ModuleType) -> None:
    model = lived_in(networks)
    before = Traces(model)
    profile(model, (networks.pictures(8), torch.arange(8) % 4))
    assert Traces(model) == before


def test_profiling_leaves_everything_as_it_was_when_the_data_fails_half_way(networks: ModuleType) -> None:
    model = lived_in(networks)
    before = Traces(model)

    def failing() -> Iterator[tuple[Tensor, Tensor]]:
        yield networks.pictures(4), torch.arange(4)
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        profile(model, failing(), batch_size=2)
    assert Traces(model) == before


def test_profiling_leaves_the_callers_images_alone(networks: ModuleType) -> None:
    images, labels = networks.plain_samples()
    kept = images.clone()
    profile(networks.Plain(), (images, labels), classes=("a", "b"), input_shape=(1, 2, 2))
    assert torch.equal(images, kept)
    assert not images.requires_grad


def test_profiling_works_where_gradients_are_switched_off(networks: ModuleType) -> None:
    with torch.no_grad():
        found = profile(networks.Plain(), networks.plain_samples(), classes=("a", "b"), input_shape=(1, 2, 2))
    torch.testing.assert_close(
        found.scores("taylor")["conv"], torch.tensor([[0.5, 0.5], [0.25, 0.75]], dtype=torch.float64)
    )


def test_a_frozen_model_profiles_equally(networks: ModuleType) -> None:
    model = networks.zoo_model("vgg_small")
    data = networks.pictures(8), torch.arange(8) % 4
    free = profile(model, data)
    frozen = profile(copy.deepcopy(model).requires_grad_(False), data)
    for name, layers in free.sums.items():
        assert all(torch.equal(rows, frozen.sums[name][layer]) for layer, rows in layers.items())


def test_a_model_in_training_mode_is_profiled_as_it_evaluates(networks: ModuleType) -> None:
    model = networks.zoo_model("mobilenet_small")
    data = networks.pictures(8), torch.arange(8) % 4
    assert torch.equal(
        profile(model, data).scores()["last.0"], profile(copy.deepcopy(model).train(), data).scores()["last.0"]
    )


def test_the_state_does_not_grow_with_the_number_of_images(networks: ModuleType) -> None:
    model = networks.zoo_model("lenet")

    def size(count: int) -> tuple[int, int]:
        found = profile(model, (networks.pictures(count), torch.arange(count) % 4), METRICS, batch_size=16)
        layers = [rows for each in found.sums.values() for rows in each.values()]
        return sum(rows.nbytes for rows in layers), sum(gram.nbytes for gram in found.grams.values())

    neurons = 16 + 32 + 120 + 84
    assert size(16) == size(128)
    assert size(16)[0] == 4 * len(("abs", "mean", "square", "taylor")) * 8 * neurons


def test_no_activation_is_held_when_the_next_batch_is_read(networks: ModuleType) -> None:
    network = networks.OneRelu().eval()
    outputs: list[weakref.ref[Tensor]] = []
    network.relu.register_forward_hook(lambda _m, _i, out: outputs.append(weakref.ref(out)))
    alive: list[int] = []

    def watched() -> Iterator[tuple[Tensor, Tensor]]:
        for _ in range(8):
            alive.append(sum(each() is not None for each in outputs))
            yield networks.floats(4, (1, 6, 6)), torch.arange(4) % 2

    profile(network, watched(), METRICS, batch_size=4, classes=("a", "b"), input_shape=(1, 6, 6))
    assert len(outputs) >= 2 * 8
    assert max(alive) <= 2  # those of the batch before


@pytest.mark.parametrize(("kept", "rows"), [(1 << 30, 70), (70 * 40_000, 35), (1000, 70)])
def test_a_batch_that_would_not_be_kept_goes_through_in_pieces(
    networks: ModuleType, monkeypatch: pytest.MonkeyPatch, kept: int, rows: int
) -> None:
    """In halves of at least 32 rows, if that helps; the last piece is filled up. The sums are the same."""
    model, images = networks.zoo_model("lenet"), networks.pictures(90)
    data = (images, torch.arange(90) % 4)
    expected = profile(model, data, METRICS, batch_size=70)
    monkeypatch.setattr("nss.gather.KEPT", kept)
    seen: list[int] = []
    original = nn.functional.log_softmax
    monkeypatch.setattr(
        "nss.gather.F.log_softmax", lambda logits, dim: seen.append(len(logits)) or original(logits, dim)
    )
    found = profile(model, data, METRICS, batch_size=70)
    assert seen == [min(rows, count) for batch in (70, 20) for count in range(batch, 0, -rows)]
    for name, layers in expected.sums.items():
        for layer, sums in layers.items():
            torch.testing.assert_close(found.sums[name][layer], sums, rtol=1e-4, atol=1e-5)
