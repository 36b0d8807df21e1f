"""Random numbers: what is built, loaded and trained follows a seed, and the caller's own draws are left alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nss.base import train
from nss.contexts import seeded
from nss.critical import critical_neurons
from nss.data import Dataset
from nss.finetune import fine_tune
from nss.grow import add_column, condense
from nss.model import Classifier, build_model, load_model, save_model
from nss.profile import profile
from nss.slice import semantic_slices

SEED = 5


@pytest.fixture(scope="module")
def data(networks: ModuleType) -> Dataset:
    found: Dataset = networks.coloured_data(48)
    return found


@pytest.fixture(scope="module")
def condensed(data: Dataset) -> Iterator[Classifier]:
    """Ready to learn new classes."""
    model = build_model("nss.zoo:lenet", data.classes, data.image_shape, 0).eval()
    found = profile(model, data, ("taylor",))
    slices = semantic_slices(critical_neurons(found, "taylor"), found)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nss.routing.FEATURES", 50)
        yield condense(model, slices, data, profile=found, share=1.0)


def dropping() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.Dropout(0.5), nn.Linear(8, 2))


def test_neither_building_loading_nor_training_moves_the_random_state(
    condensed: Classifier, data: Dataset, tmp_path: Path
) -> None:
    save_model(build_model("nss.zoo:lenet", data.classes, data.image_shape, 0), tmp_path / "plain")
    save_model(add_column(condensed, ["cow"], 0.5, 0), tmp_path / "extended")
    samples = data.images / 255, data.labels
    network = dropping()
    calls: dict[str, Callable[[], object]] = {
        "build_model": lambda: build_model("nss.zoo:lenet", data.classes, data.image_shape, 1),
        "load_model": lambda: load_model(tmp_path / "plain"),
        "load_model of an extended one": lambda: load_model(tmp_path / "extended"),
        "add_column": lambda: add_column(condensed, ["cow"], 0.5, 1),
        "train": lambda: train(network, samples, 1, 1),
        "fine_tune": lambda: fine_tune(network, samples, 2, 1),
    }
    torch.manual_seed(3)
    before = torch.get_rng_state()
    for name, call in calls.items():
        call()
        assert torch.equal(torch.get_rng_state(), before), name


def test_what_is_drawn_in_the_block_follows_the_seed_and_what_is_drawn_around_it_does_not() -> None:
    expected = torch.rand(4, generator=torch.Generator().manual_seed(3)).split(2)
    inner = torch.rand(3, generator=torch.Generator().manual_seed(SEED))
    torch.manual_seed(3)
    assert torch.equal(torch.rand(2), expected[0])
    with seeded(SEED):
        assert torch.equal(torch.rand(3), inner)
    assert torch.equal(torch.rand(2), expected[1])


def test_the_generator_of_a_device_is_seeded_and_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    chip = torch.Generator().manual_seed(3)

    def put_back(state: Tensor, device: torch.device) -> None:
        chip.set_state(state)

    monkeypatch.setattr(torch.mps, "device_count", lambda: 1)
    monkeypatch.setattr(torch.mps, "get_rng_state", lambda device: chip.get_state())
    monkeypatch.setattr(torch.mps, "set_rng_state", put_back)
    monkeypatch.setattr(torch.mps, "manual_seed", chip.manual_seed)
    before = chip.get_state()
    with seeded(SEED, torch.device("mps", 0)):
        drawn = torch.rand(3, generator=chip)
    assert torch.equal(drawn, torch.rand(3, generator=torch.Generator().manual_seed(SEED)))
    assert torch.equal(chip.get_state(), before)


@pytest.mark.parametrize("device", ["xla:0", "meta", "cpu"])
def test_where_pytorch_knows_no_generator_the_cpu_is_seeded_all_the_same(device: str) -> None:
    with seeded(SEED, torch.device(device)):
        drawn = torch.rand(3)
    assert torch.equal(drawn, torch.rand(3, generator=torch.Generator().manual_seed(SEED)))


@pytest.mark.parametrize(("module", "verb"), [("base", train), ("finetune", fine_tune)])
def test_training_seeds_the_device_that_the_model_is_on(
    module: str, verb: Callable[..., object], data: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    @contextmanager
    def watched(seed: int, device: torch.device | None = None) -> Iterator[None]:
        asked.append((seed, device))
        with seeded(seed, device):
            yield

    monkeypatch.setattr(f"nss.{module}.seeded", watched)
    verb(dropping(), (data.images / 255, data.labels), 1, SEED)
    assert asked == [(SEED, torch.device("cpu"))]
