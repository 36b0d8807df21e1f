"""Away from the CPU: what a profile and a restructuring compute on another device is what they compute on the CPU.

No such device is needed: tensors say that they are elsewhere, keep their numbers on the CPU, and refuse what a device
would refuse: to be mixed with tensors of the CPU and, where it has none, float64.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny_helpers import classifier
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import nss
from nss.data import Data
from nss.precision import in_double
from nss.profile import METRICS

CPU, MPS = torch.device("cpu"), torch.device("mps", 0)
DOUBLE = torch.device("xla", 0)
"""a device that has float64, like CUDA, whose name alone makes PyTorch look for a driver"""
COPIES = ("_to_copy", "copy_")
INDEXING = ("index", "index_put_", "_index_put_impl_")
RGB = (3, 8, 8)

Kwargs = Mapping[str, Any]


class Elsewhere(Tensor):
    """A tensor that says it is on another device and keeps its numbers on the CPU."""

    inner: Tensor
    place: torch.device

    @staticmethod
    def __new__(cls, inner: Tensor, place: torch.device) -> Elsewhere:
        # To PyTorch itself it is on "meta", so that `.cpu()` is no copy of itself; `device` says otherwise.
        made = torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
            device="meta", requires_grad=inner.requires_grad,
        )  # fmt: skip
        made.inner, made.place = inner.detach(), place
        return made

    @property
    def device(self) -> torch.device:
        return self.place

    def tolist(self) -> Any:
        return self.inner.tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Kwargs | None = None) -> Any:
        place = next(each.place for each in tree_leaves((args, kwargs)) if isinstance(each, Elsewhere))
        return computed(place, func, args, kwargs or {})


class Machine(TorchDispatchMode):
    """A machine with one device beside its CPU."""

    def __init__(self, place: torch.device) -> None:
        super().__init__()
        self.place = place

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Kwargs | None = None
    ) -> Any:
        return computed(self.place, func, args, kwargs or {})


def computed(place: torch.device, func: Any, args: tuple[Any, ...], kwargs: Kwargs) -> Any:
    """Do on the CPU what was asked of either, and refuse what a device would refuse."""
    asked, name = kwargs.get("device"), func.overloadpacket.__name__
    given = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
    moved = [each for each in given if isinstance(each, Elsewhere)]
    mixed = moved and any(each.dim() for each in given if not isinstance(each, Elsewhere))
    allowed = name in COPIES or (name in INDEXING and isinstance(args[0], Elsewhere))
    assert allowed or not mixed, f"{func} mixes tensors of {place} and of the CPU"
    plain = tree_map(lambda each: each.inner if isinstance(each, Elsewhere) else each, (args, dict(kwargs)))
    if asked is not None:
        plain[1]["device"] = CPU
    found = func(*plain[0], **plain[1])
    away = bool(moved) if asked is None else asked.type != "cpu"
    return put(place, func, args, found) if away and name != "_local_scalar_dense" else found


def put(place: torch.device, func: Any, args: tuple[Any, ...], found: Any) -> Any:
    """Return what was written to, or else what was made, elsewhere."""
    if func._schema.name.endswith("_") and isinstance(args[0], Tensor):
        return args[0]

    def one(each: Any) -> Any:
        if not isinstance(each, Tensor):
            return each
        assert place.type != "mps" or each.dtype != torch.float64, f"{func} makes float64 on {place}"
        return Elsewhere(each, place)

    return tree_map(one, found)


class Mixed(nn.Module):
    """A norm behind a grouped convolution, a sum around it, and a head that reads a flattened map."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=2, bias=False)
        self.inner = nn.BatchNorm2d(8)
        self.hidden = nn.Linear(8 * 4, 10)
        self.head = nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        x = F.max_pool2d(F.relu(self.inner(self.grouped(x)) + x), 4)
        return self.head(F.gelu(self.hidden(x.flatten(1))))


@pytest.fixture(scope="module")
def model(networks: ModuleType) -> nss.Classifier:
    torch.manual_seed(0)
    return classifier(networks.randomise(Mixed(), 0), RGB).float()


@pytest.fixture(scope="module")
def data(networks: ModuleType) -> Data:
    return networks.floats(40, RGB), torch.arange(40) % 4


@pytest.fixture(scope="module")
def profiled(model: nss.Classifier, data: Data) -> nss.Profile:
    return nss.profile(model, data, METRICS, windows=2)


@pytest.fixture(scope="module")
def slices(profiled: nss.Profile) -> nss.SemanticSlices:
    return nss.semantic_slices(nss.critical_neurons(profiled, "taylor"), profiled)


@pytest.mark.parametrize("place", [MPS, DOUBLE], ids=str)
def test_a_device_refuses_what_one_refuses(place: torch.device) -> None:
    here = torch.ones(2)
    with Machine(place):
        there = here.to(place)
        assert (there.device, there.cpu().device) == (place, CPU)
        assert there[torch.tensor([True, False])].tolist() == [1.0]
        for mix in (lambda: here + there, lambda: there.add_(here), lambda: here @ there, lambda: here[there.long()]):
            with pytest.raises(AssertionError, match="mixes"):
                mix()
        if place == MPS:
            with pytest.raises(AssertionError, match="float64"):
                there.double()


@pytest.mark.parametrize(("place", "where"), [(MPS, CPU), (DOUBLE, DOUBLE), (CPU, CPU)], ids=str)
def test_double_precision_is_where_a_tensor_is_unless_its_device_has_none(
    place: torch.device, where: torch.device
) -> None:
    with Machine(place):
        x = torch.ones(2).to(place)
        assert (in_double(x).device, in_double(x).dtype) == (where, torch.float64)


@pytest.mark.parametrize("place", [MPS, DOUBLE], ids=str)
def test_a_profile_is_the_same_wherever_it_is_computed(
    model: nss.Classifier, data: Data, profiled: nss.Profile, place: torch.device
) -> None:
    with Machine(place):
        found = nss.profile(model, data, METRICS, windows=2, device=place)
    assert found.model == profiled.model
    assert found.windows.keys() == profiled.windows.keys() > set()
    for kind in ("sums", "grams", "windows"):
        torch.testing.assert_close(getattr(found, kind), getattr(profiled, kind), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("place", [MPS, DOUBLE], ids=str)
def test_a_model_elsewhere_is_restructured_as_here_and_stays_there(
    model: nss.Classifier, data: Data, profiled: nss.Profile, slices: nss.SemanticSlices, place: torch.device
) -> None:
    here = nss.restructure(model, slices, data, profiled, macs=0.5, fine_tune_steps=2)
    with Machine(place):
        there = nss.restructure(copy.deepcopy(model).to(place), slices, data, macs=0.5, fine_tune_steps=2)
        check_same(there.model, here.model, place)
    assert [layer.kept for layer in there.plan.layers.values()] == [layer.kept for layer in here.plan.layers.values()]
    assert any(len(layer.kept) < layer.total for layer in here.plan.layers.values())


@pytest.mark.parametrize("place", [MPS, DOUBLE], ids=str)
def test_a_model_elsewhere_is_trained_and_judged_as_here(
    model: nss.Classifier, data: Data, place: torch.device
) -> None:
    def trained(start: nss.Classifier) -> tuple[nss.Classifier, nss.Evaluation]:
        nss.train(start, data, epochs=1, batch_size=16, seed=0)
        return start, nss.evaluate(start, data)

    here, scores = trained(copy.deepcopy(model))
    with Machine(place):
        there, found = trained(copy.deepcopy(model).to(place))
        check_same(there, here, place)
    assert found.accuracy == scores.accuracy


@pytest.mark.parametrize("place", [MPS, DOUBLE], ids=str)
def test_a_model_elsewhere_is_readapted_as_here_and_stays_there(
    model: nss.Classifier,
    data: Data,
    profiled: nss.Profile,
    slices: nss.SemanticSlices,
    place: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # A tensor that only says where it is cannot be detached in inference mode.
    monkeypatch.setattr(torch, "inference_mode", torch.no_grad)

    def readapted(start: nss.Classifier, known: nss.Profile) -> nss.Classifier:
        new = (data[0].flip(2), data[1])
        return nss.readapt(
            start, slices, new, data, profile=known, replay=0.5, distil=0.5, epochs=1, batch_size=16, seed=0
        ).model

    here = readapted(model, profiled)
    with Machine(place):
        check_same(readapted(copy.deepcopy(model).to(place), profiled), here, place)


@pytest.mark.parametrize("place", [MPS, DOUBLE], ids=str)
def test_a_model_elsewhere_is_extended_as_here_and_stays_there(networks: ModuleType, place: torch.device) -> None:
    start = nss.build_model("nss.zoo:lenet", ["a", "b"], (1, 16, 16), seed=0)
    images = networks.floats(60, (1, 16, 16)).clamp(0, 1)
    old, new = (images[:40], torch.arange(40) % 2), (images[40:], torch.arange(20) % 2 + 2)
    nss.train(start, old, epochs=1, batch_size=16, seed=0)
    known = nss.profile(start, old, ("taylor",), windows=2)
    slices = nss.semantic_slices(nss.critical_neurons(known, "taylor"), known)

    def extended(start: nss.Classifier) -> nss.Classifier:
        return nss.extend(
            start, slices, new, 0.5, old_data=old, profile=known, classes=["c", "d"], epochs=1, batch_size=16, seed=0
        ).model

    here = extended(start)
    with Machine(place):
        # What tells the tasks apart is learned from noise here, and the last bits of sums count.
        check_same(extended(copy.deepcopy(start).to(place)), here, place, atol=1e-3)


def check_same(there: nss.Classifier, here: nss.Classifier, place: torch.device, atol: float = 1e-4) -> None:
    assert {each.device for each in there.state_dict().values()} == {place}
    weights = {name: each.cpu() for name, each in there.state_dict().items()}
    torch.testing.assert_close(weights, dict(here.state_dict()), rtol=1e-3, atol=atol)


@pytest.mark.parametrize("place", [MPS, DOUBLE], ids=str)
def test_images_and_labels_elsewhere_are_restructured_and_readapted_on_as_those_here(
    model: nss.Classifier,
    data: Data,
    profiled: nss.Profile,
    slices: nss.SemanticSlices,
    place: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # A tensor that only says where it is cannot be detached in inference mode.
    monkeypatch.setattr(torch, "inference_mode", torch.no_grad)

    def changed(start: nss.Classifier, samples: Data) -> list[nss.Classifier]:
        smaller = nss.restructure(start, slices, samples, profiled, macs=0.5, fine_tune_steps=2, held_out=samples)
        tuned = nss.readapt(
            start, slices, samples, samples, profile=profiled, replay=0.5, distil=0.5, epochs=1, batch_size=16, seed=0
        )
        return [smaller.model, tuned.model]

    here = changed(model, data)
    with Machine(place):
        images, labels = data
        there = changed(copy.deepcopy(model).to(place), (images.to(place), labels.to(place)))
        for found, wanted in zip(there, here, strict=True):
            check_same(found, wanted, place)


@pytest.mark.parametrize("place", [MPS, DOUBLE], ids=str)
def test_new_samples_elsewhere_are_readapted_on_beside_old_ones_here(
    model: nss.Classifier,
    data: Data,
    profiled: nss.Profile,
    slices: nss.SemanticSlices,
    place: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch, "inference_mode", torch.no_grad)

    def tuned(start: nss.Classifier, new: Data) -> nss.Classifier:
        return nss.readapt(
            start, slices, new, data, profile=profiled, replay=0.5, epochs=1, batch_size=16, seed=0
        ).model

    here = tuned(model, data)
    with Machine(place):
        images, labels = data
        check_same(tuned(copy.deepcopy(model).to(place), (images.to(place), labels.to(place))), here, place)
