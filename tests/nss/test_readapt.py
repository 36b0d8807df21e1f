"""Re-adaptation: new samples are followed, the rest stays bit for bit what it was, and nothing collapses silently."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nss.base import train
from nss.critical import critical_neurons
from nss.data import Batch, Dataset
from nss.errors import ReadaptError
from nss.evaluate import evaluate
from nss.model import Classifier, build_model, load_model, model_digest, network_of, save_model
from nss.profile import Profile, profile
from nss.prune_weights import prune_weights
from nss.readapt import Readapted, readapt
from nss.samples import parts
from nss.size import count_parameters
from nss.slice import SemanticSlices, semantic_slices
from nss.weight_masks import count_masked

ZOO = ("nss.zoo:lenet", "nss.zoo:vgg_small", "nss.zoo:resnet20", "nss.zoo:mobilenet_small")
TORCHVISION = ("torchvision.models:resnet18", "torchvision.models:mobilenet_v2")
Kit = tuple[Classifier, SemanticSlices, Profile]


def kit_of(model: Classifier, data: Any) -> Kit:
    found = profile(model, data, ("taylor",), samples_per_class=40, windows=1)
    return model, semantic_slices(critical_neurons(found, "taylor", "cumulative", 0.9), found), found


def drifted(data: Dataset, rows: slice = slice(None)) -> tuple[Tensor, Tensor]:
    """The bright columns are dark and the dark ones bright."""
    return 255 - data.images[rows], data.labels[rows]


@pytest.fixture(scope="module")
def data(networks: ModuleType) -> Dataset:
    return networks.coloured_data(480, classes=4)


@pytest.fixture(scope="module")
def kit(data: Dataset) -> Kit:
    mean, std = data.pixel_statistics()
    model = build_model("nss.zoo:vgg_small", data.classes, data.image_shape, 0, mean=mean, std=std)
    train(model, data, 4, 0, batch_size=32)
    return kit_of(model, data.split("train"))


@pytest.fixture(scope="module")
def followed(kit: Kit, data: Dataset) -> Readapted:
    model, slices, found = kit
    return readapt(model, slices, drifted(data, slice(240)), profile=found, epochs=8)


def free_rows(model: nn.Module, result: Readapted) -> dict[str, Tensor]:
    """Rows of each parameter that are not what they were."""
    pairs = zip(model.named_parameters(), result.model.parameters(), strict=True)
    return {name: (before != after).reshape(len(before), -1).any(1) for (name, before), after in pairs}


@pytest.mark.parametrize("factory", [*ZOO, *TORCHVISION])
def test_untouched_entries_are_bit_identical(networks: ModuleType, factory: str) -> None:
    shape = (3, 32, 32) if factory in TORCHVISION else networks.SHAPE
    model = build_model(factory, networks.CLASSES, shape, 0)
    networks.randomise(model, 0)
    images, labels = networks.pictures(24, shape), torch.arange(24) % 4
    model, slices, found = kit_of(model.train(), (images, labels))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    result = readapt(
        model, slices, (images, labels), profile=found, guard=0.01, learning_rate=0.0003, epochs=3, batch_size=8
    )
    report, after = result.report, result.model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(torch.equal(after[name], before[name]) for name in before if "running" in name or "tracked" in name)
    rows = free_rows(model, result)
    for layer, (tuned, of) in report.neurons.items():
        moved = rows[f"network.{layer}.weight"]
        assert int(moved.sum()) <= tuned <= of == len(moved)
    tunable = {f"network.{layer}" for layer, (tuned, _) in report.neurons.items() if tuned}
    layers = (nn.Conv2d, nn.Linear)
    still = [name for name, each in model.named_modules() if isinstance(each, layers) and name not in tunable]
    assert not any(bool(rows[f"{name}.weight"].any()) for name in still)
    assert 0.5 * report.trained_share < report.moved_share <= report.trained_share <= 0.2
    assert type(network_of(result.model)) is type(network_of(model))


def test_new_samples_are_followed_and_old_ones_kept(kit: Kit, data: Dataset, followed: Readapted) -> None:
    model = kit[0]
    test = data.split("test")
    assert evaluate(model, test).accuracy > 0.95
    assert evaluate(model, drifted(test)).accuracy < 0.5
    assert evaluate(followed.model, drifted(test)).accuracy > 0.9
    assert evaluate(followed.model, test).accuracy > 0.9


def test_the_report_says_what_was_done(kit: Kit, data: Dataset, followed: Readapted) -> None:
    model, report = kit[0], followed.report
    assert json.loads(json.dumps(report.to_dict()))["kept_epoch"] == report.kept_epoch
    assert [each.epoch for each in report.curve] == list(range(len(report.curve)))
    first, last = report.curve[0], report.curve[-1]
    assert (first.loss, first.guard, first.old_accuracy) == (None, 0.0, None)
    assert last.guard is not None
    assert last.guard > 0
    assert first.new_accuracy is not None
    assert first.new_accuracy < 0.5
    assert report.categories == data.classes
    assert report.steps == (len(report.curve) - 1) * (216 // 64) * 4  # at least ten steps an epoch
    assert report.seconds > 0
    moved = sum(
        int((before != after).sum())
        for before, after in zip(model.parameters(), followed.model.parameters(), strict=True)
    )
    assert report.moved_share == moved / count_parameters(model)


def test_the_model_names_its_parent_and_can_be_kept(kit: Kit, followed: Readapted, tmp_path: Path) -> None:
    assert isinstance(followed.model, Classifier)
    assert followed.model.spec.parent == model_digest(kit[0])
    assert not followed.model.training
    save_model(followed.model, tmp_path / "model")
    assert model_digest(load_model(tmp_path / "model")) == model_digest(followed.model)


def test_masked_weights_stay_masked(kit: Kit, data: Dataset) -> None:
    model = prune_weights(kit[0], sparsity=0.3)
    model, slices, found = kit_of(model, data.split("train"))
    result = readapt(model, slices, drifted(data, slice(240)), profile=found, epochs=6)
    assert count_masked(result.model) == count_masked(model) > 0
    assert result.report.moved_share > 0.05
    assert evaluate(result.model, drifted(data.split("test"))).accuracy > 0.9


def test_the_same_seed_gives_the_same_model(kit: Kit, data: Dataset) -> None:
    model, slices, found = kit
    new = drifted(data, slice(120))
    digests = [
        model_digest(readapt(model, slices, new, profile=found, epochs=2, seed=seed).model) for seed in (0, 0, 1)
    ]
    assert digests[0] == digests[1] != digests[2]


def test_a_stronger_guard_moves_what_layers_computed_less(kit: Kit, data: Dataset) -> None:
    model, slices, found = kit
    new = drifted(data, slice(120))
    runs = [
        readapt(model, slices, new, profile=found, guard=guard, epochs=5, patience=5) for guard in (0.1, 3.0, 100.0)
    ]
    guards = [run.report.curve[-1].guard for run in runs]
    assert guards == sorted(guards, reverse=True)
    assert guards[-1] < 0.2 * guards[0]


def test_without_a_guard_no_profile_is_needed_and_the_new_samples_stand_in_for_old_data(
    kit: Kit, data: Dataset
) -> None:
    model, slices, _ = kit
    new = drifted(data, slice(40))
    alone = readapt(model, slices, new, guard=0, epochs=1)
    trained, _ = parts(new, 0)
    found = profile(model, (trained.images, trained.labels), ("avg",), windows=1)
    given = readapt(model, slices, new, profile=found, guard=0, epochs=1)
    assert model_digest(alone.model) == model_digest(given.model) != model_digest(model)
    assert all(each.guard is None for each in alone.report.curve)  # of old knowledge they say nothing
    blind = profile(model, (trained.images, trained.labels), ("avg",))
    assert model_digest(readapt(model, slices, new, profile=blind, guard=0, epochs=1).model) == model_digest(
        alone.model
    )


def test_old_data_gives_the_guard_and_the_old_accuracy(kit: Kit, data: Dataset) -> None:
    model, slices, found = kit
    new = drifted(data, slice(120))
    given = readapt(model, slices, new, data, epochs=2)
    kept = readapt(model, slices, new, data, profile=profile(model, data.split("train"), ("avg",), windows=1), epochs=2)
    assert model_digest(given.model) == model_digest(kept.model)
    assert given.report.curve[0].old_accuracy == evaluate(model, data.split("val")).accuracy
    assert found.counts.sum() > 0
    # A plain network, which does not say which classes it knows: the slices do.
    images, labels = data.split("train").images.float() / 255, data.split("train").labels
    plain = readapt(model.network, slices, (images[:60], labels[:60]), (images, labels), epochs=1)
    assert plain.report.curve[0].guard is not None


def test_replay_and_distillation_hold_old_behaviour(kit: Kit, data: Dataset) -> None:
    model, slices, found = kit
    new = drifted(data, slice(120))
    old = data.split("test")
    plain, replayed, distilled = (
        readapt(model, slices, new, data, profile=found, guard=0.0, epochs=4, replay=replay, distil=distil)
        for replay, distil in ((0.0, 0.0), (0.5, 0.0), (0.5, 1.0))
    )
    losses = []
    for each in (plain, replayed, distilled):
        with torch.no_grad():
            losses.append(float(nn.functional.cross_entropy(each.model(old.images), old.labels)))
    assert losses[1] < losses[0]
    assert losses[2] < losses[0]
    assert model_digest(replayed.model) != model_digest(distilled.model)


def test_samples_of_one_class_only_do_not_make_the_model_answer_nothing_else(kit: Kit, data: Dataset) -> None:
    model, slices, found = kit
    images, labels = drifted(data)
    new = images[labels == 2][:60], labels[labels == 2][:60]
    result = readapt(model, slices, new, profile=found)
    assert result.report.categories == ("cow",)
    test = data.split("test")
    assert evaluate(result.model, drifted(test)).per_class["cow"] > evaluate(model, drifted(test)).per_class["cow"]
    assert evaluate(result.model, test).accuracy > 0.9


def test_a_single_sample_is_learned_and_the_rest_kept(kit: Kit, data: Dataset) -> None:
    model, slices, found = kit
    new = drifted(data, slice(1))
    result = readapt(model, slices, new, profile=found)
    assert "too few to hold any out" in result.report.stopped
    assert result.report.curve[-1].new_accuracy is None
    assert evaluate(model, new).accuracy == 0
    assert evaluate(result.model, new).accuracy == 1
    assert evaluate(result.model, data.split("test")).accuracy > 0.9


def test_no_samples_and_unknown_classes_are_refused(kit: Kit, data: Dataset) -> None:
    model, slices, found = kit
    with pytest.raises(ReadaptError, match="no new samples"):
        readapt(model, slices, drifted(data, slice(0)), profile=found)
    with pytest.raises(ReadaptError, match=r"does not know the class 4[\s\S]*nss\.extend"):
        readapt(model, slices, (data.images[:2], torch.tensor([0, 4])), profile=found)
    more = (*data.classes, "emu")
    batch = Batch("0" * 32, data.images[:8], torch.tensor([0, 4] * 4), torch.zeros(8, dtype=torch.uint8))
    with pytest.raises(ReadaptError, match=r"does not know the class emu[\s\S]*nss\.extend"):
        readapt(model, slices, Dataset(more, data.image_shape, (batch,)), profile=found)
    with pytest.raises(ReadaptError, match="the classes of the new samples"):
        readapt(model, slices, Dataset(more[::-1], data.image_shape, (batch,)), profile=found)
    with pytest.raises(ReadaptError, match="the affected categories"):
        readapt(model, slices, drifted(data, slice(4)), profile=found, categories=["emu"])


def test_a_guard_needs_the_profile_of_this_model(kit: Kit, data: Dataset, followed: Readapted) -> None:
    model, slices, found = kit
    new = drifted(data, slice(8))
    with pytest.raises(ReadaptError, match="nothing to guard"):
        readapt(model, slices, new)
    with pytest.raises(ReadaptError, match="of another model"):
        readapt(followed.model, slices, new, profile=found)
    with pytest.raises(ReadaptError, match="the slices are of other classes"):
        readapt(model, replace(slices, classes=slices.classes[::-1]), new, profile=found)
    without = profile(model, data.split("val"), ("avg",), gram=False)
    with pytest.raises(ReadaptError, match="what windows see"):
        readapt(model, slices, new, profile=without)


@pytest.mark.parametrize(
    "wrong",
    [
        {"share": 0.0},
        {"share": 1.1},
        {"guard": -1.0},
        {"guard": float("nan")},
        {"learning_rate": 0.0},
        {"epochs": 0},
        {"batch_size": 0},
        {"patience": 0},
        {"replay": 0.5},
        {"replay": 1.5},
        {"distil": 0.5},
    ],
)
def test_settings_out_of_range_are_refused(kit: Kit, data: Dataset, wrong: dict[str, Any]) -> None:
    model, slices, found = kit
    with pytest.raises(ReadaptError, match=next(iter(wrong))):
        readapt(model, slices, drifted(data, slice(8)), profile=found, **wrong)
