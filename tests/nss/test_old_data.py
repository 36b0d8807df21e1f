"""Old data that extend and readapt are given: looked at before anything is trained, and on one scale with the new."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from nss.base import train
from nss.contexts import seeded
from nss.critical import critical_neurons
from nss.data import Batch, Dataset
from nss.errors import ExtendError, NssError, ReadaptError
from nss.extend import extend
from nss.grow import condense
from nss.model import Classifier, build_model, device_of, model_digest
from nss.profile import Profile, profile
from nss.readapt import readapt
from nss.slice import SemanticSlices, semantic_slices

KNOWN, NAMES = ("ant", "bee"), ("cow", "dog")
Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Kit:
    """A model of the first two classes, the same condensed, and what re-adapting the model takes."""

    model: Classifier
    ready: Classifier
    slices: SemanticSlices
    profile: Profile
    data: Dataset
    new: Pair
    """training images of the other two classes"""


def sliced(model: Classifier, data: Dataset) -> tuple[Profile, SemanticSlices]:
    found = profile(model, data.split("train"), ("taylor",), windows=1)
    return found, semantic_slices(critical_neurons(found, "taylor", "cumulative", 0.9), found)


@pytest.fixture(scope="module", autouse=True)
def _few_features() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nss.routing.FEATURES", 100)
        yield


@pytest.fixture(scope="module")
def kit(networks: ModuleType) -> Kit:
    data = networks.coloured_data(240, classes=4)
    old, seen = data.of_classes(KNOWN), data.split("train")
    model = build_model("nss.zoo:vgg_small", KNOWN, data.image_shape, 0)
    train(model, old, 2, 0, batch_size=16)
    found, slices = sliced(model, old)
    new = seen.images[seen.labels >= 2], seen.labels[seen.labels >= 2]
    return Kit(model, condense(model, slices, old, profile=found), slices, found, data, new)


@pytest.fixture(scope="module")
def grown(kit: Kit) -> tuple[Classifier, SemanticSlices]:
    """A model of all four classes, and its slices."""
    model = extend(kit.ready, None, kit.new, classes=NAMES, epochs=1).model
    return model, sliced(model, kit.data)[1]


def never(*_: Any) -> Any:
    raise AssertionError("something was trained")


@pytest.fixture
def untrained(monkeypatch: pytest.MonkeyPatch) -> None:
    for module, name in (("extend", "condense"), ("extend", "train_column"), ("readapt", "tunable_neurons")):
        monkeypatch.setattr(importlib.import_module(f"nss.{module}"), name, never)


def labelled(data: Dataset, rows: dict[int, int], classes: tuple[str, ...] = KNOWN) -> Dataset:
    """The images of known classes, the labels of some of them changed: {row: label}."""
    (batch,) = data.of_classes(KNOWN).batches
    labels = batch.labels.clone()
    for row, label in rows.items():
        labels[row] = label
    return Dataset(classes, data.image_shape, (Batch("0" * 32, batch.images, labels, batch.split),))


def first_of(data: Dataset, split: str) -> int:
    return int((data.of_classes(KNOWN).batches[0].split == ("train", "val").index(split)).nonzero()[0, 0])


def unknown(data: Dataset) -> dict[str, tuple[Any, str]]:
    """Old data with labels that a model of two classes does not know, and what they are called."""
    pair = labelled(data, {3: 2, 9: -1, 7: 2})
    training, held_out = (labelled(data, {first_of(data, split): 2}) for split in ("train", "val"))
    return {
        "a pair": ((pair.images, pair.labels), "the label -1, 2:"),
        "batches": ([(data.images[:4], torch.tensor([0, 1, 5, 1]))], "the label 5:"),
        "to learn from": (training, "the label 2:"),
        "held out": (held_out, "the label 2:"),
    }


def check_refused(caught: NssError, label: str) -> None:
    assert label in caught.what
    assert (caught.where, caught.allowed) == ("old_data", "0 to 1: ant, bee")
    assert "of_classes" in caught.fix


@pytest.mark.parametrize("case", ["a pair", "batches", "to learn from", "held out"])
@pytest.mark.parametrize("replay", [0.0, 0.5])
@pytest.mark.usefixtures("untrained")
def test_extend_refuses_old_labels_that_the_model_does_not_know(kit: Kit, case: str, replay: float) -> None:
    old, label = unknown(kit.data)[case]
    for model in (kit.model, kit.ready):
        with pytest.raises(ExtendError) as caught:
            extend(model, kit.slices, kit.new, replay, old_data=old, classes=NAMES)
        check_refused(caught.value, label)


@pytest.mark.parametrize("case", ["a pair", "batches", "to learn from", "held out"])
@pytest.mark.parametrize("replay", [0.0, 0.5])
@pytest.mark.usefixtures("untrained")
def test_readapt_refuses_old_labels_that_the_model_does_not_know(kit: Kit, case: str, replay: float) -> None:
    old, label = unknown(kit.data)[case]
    new = kit.data.images[:8], torch.arange(8) % 2
    with pytest.raises(ReadaptError) as caught:
        readapt(kit.model, kit.slices, new, old, guard=0, replay=replay)
    check_refused(caught.value, label)


@pytest.mark.usefixtures("untrained")
def test_old_classes_of_other_names_are_refused(kit: Kit) -> None:
    swapped = labelled(kit.data, {}, ("bee", "ant"))
    message = r"the classes of the old data are \['bee', 'ant'\]"
    with pytest.raises(ExtendError, match=message) as caught:
        extend(kit.ready, None, kit.new, old_data=swapped, classes=NAMES)
    assert (caught.value.where, caught.value.allowed) == ("old_data", "in order: ['ant', 'bee']")
    with pytest.raises(ReadaptError, match=message):
        readapt(kit.model, kit.slices, (kit.data.images[:8], torch.arange(8) % 2), swapped, guard=0)


@pytest.mark.parametrize("replay", [0.0, 0.2])
def test_of_a_folder_that_new_classes_have_arrived_in_extend_takes_the_known_ones(kit: Kit, replay: float) -> None:
    given, cut = (
        extend(kit.model, kit.slices, kit.data, replay, old_data=old, profile=kit.profile, epochs=1)
        for old in (kit.data, kit.data.of_classes(KNOWN))
    )
    assert model_digest(given.model) == model_digest(cut.model)
    assert given.report.before == cut.report.before is not None
    assert given.report.accuracies == cut.report.accuracies
    assert given.report.replayed == cut.report.replayed


def test_a_part_of_the_old_classes_is_enough_to_replay_from(kit: Kit, grown: tuple[Classifier, SemanticSlices]) -> None:
    emus = 255 - kit.new[0][:30], torch.full((30,), 4)
    old = kit.data.of_classes(KNOWN)
    report = extend(grown[0], None, emus, 0.1, old_data=old, classes=["emu"], epochs=1).report
    assert report.replayed == 2 * round(0.1 * 40)


def drifted(data: Dataset) -> Pair:
    """The first training images of each class, dark where they were bright."""
    seen = data.split("train")
    return 255 - seen.images[:40], seen.labels[:40]


@pytest.mark.usefixtures("untrained")
def test_a_router_that_could_not_learn_anew_is_found_out_before_training(
    kit: Kit, grown: tuple[Classifier, SemanticSlices]
) -> None:
    images, labels = drifted(kit.data)
    new, old = (images[labels != 3], labels[labels != 3]), kit.data.of_classes(KNOWN)
    with pytest.raises(ReadaptError, match="there is no image of dog to tell the tasks apart by") as caught:
        readapt(*grown, new, old, guard=0)
    assert "none: then the router stays as it was" in caught.value.fix


def test_new_and_old_samples_together_show_every_class_to_the_router(
    kit: Kit, grown: tuple[Classifier, SemanticSlices]
) -> None:
    images, labels = drifted(kit.data)
    nothing = kit.data.images[:0], labels[:0]
    for old, count in ((kit.data.of_classes(KNOWN), 80 + 40), (nothing, 40)):
        found = readapt(*grown, (images, labels), old, guard=0, epochs=1)
        # As many as there are to learn from: too few new ones to hold any out.
        assert int(found.model.network.router.counts.sum()) == count
    some = images[labels >= 2], labels[labels >= 2]
    found = readapt(*grown, some, kit.data.of_classes(KNOWN), guard=0, epochs=1)
    assert found.model.network.router.counts.tolist() == [40, 40, 10, 10]


def floats(data: Pair) -> Pair:
    return data[0].float() / 255, data[1]


@pytest.mark.parametrize("first", [True, False])
def test_bytes_beside_floats_give_the_extended_model_that_floats_give(kit: Kit, first: bool) -> None:
    old = kit.data.of_classes(KNOWN)
    pair = old.images, old.labels
    model, slices = (kit.model, kit.slices) if first else (kit.ready, None)
    digests = [
        model_digest(extend(model, slices, new, 0.3, old_data=seen, classes=NAMES, share=1.0, epochs=1).model)
        for new, seen in ((kit.new, floats(pair)), (floats(kit.new), pair), (floats(kit.new), floats(pair)))
    ]
    assert digests[0] == digests[1] == digests[2]


def test_bytes_beside_floats_give_the_readapted_model_that_floats_give(kit: Kit) -> None:
    old = kit.data.of_classes(KNOWN)
    pair, new = (old.images, old.labels), (255 - old.images[:40], old.labels[:40])
    digests = [
        model_digest(readapt(kit.model, kit.slices, left, right, guard=0, epochs=1, replay=0.3, distil=0.5).model)
        for left, right in ((new, floats(pair)), (floats(new), pair), (floats(new), floats(pair)))
    ]
    assert digests[0] == digests[1] == digests[2]


def test_only_the_cpu_and_the_models_device_are_seeded(kit: Kit, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, torch.device | None]] = []
    elsewhere: list[int] = []

    def noted(seed: int, device: torch.device | None = None) -> AbstractContextManager[None]:
        asked.append((seed, device))
        return seeded(seed, device)

    for module in ("extend_course", "readapt"):
        monkeypatch.setattr(importlib.import_module(f"nss.{module}"), "seeded", noted)
    monkeypatch.setattr(torch.cuda, "manual_seed_all", elsewhere.append)
    before = torch.get_rng_state()
    extend(kit.ready, None, kit.new, classes=NAMES, epochs=1, seed=7)
    readapt(kit.model, kit.slices, (kit.data.images[:8], torch.arange(8) % 2), guard=0, epochs=1, seed=8)
    assert asked == [(7, device_of(kit.model)), (8, device_of(kit.model))]
    assert elsewhere == []
    assert torch.equal(torch.get_rng_state(), before)
