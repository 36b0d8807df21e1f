"""Restructuring as a whole: budgets hold, no class is lost, and the result is an ordinary model."""

from __future__ import annotations

import copy
import importlib
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import nss
from nss.data import iter_batches
from nss.errors import ModelError, RestructureError
from nss.ingest import demo

Layers = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> nss.Dataset:
    folder = tmp_path_factory.mktemp("digits") / "data"
    demo(folder)
    return nss.load_data(folder)


@pytest.fixture(scope="module")
def trained(digits: nss.Dataset) -> nss.Classifier:
    mean, std = digits.split("train").pixel_statistics()
    model = nss.build_model("nss.zoo:lenet", digits.classes, digits.image_shape, seed=0, mean=mean, std=std)
    nss.train(model, digits, epochs=6, seed=0)
    return model


@pytest.fixture(scope="module")
def profiled(trained: nss.Classifier, digits: nss.Dataset) -> nss.Profile:
    return nss.profile(trained, digits.split("train"), ("taylor",))


@pytest.fixture(scope="module")
def slices(profiled: nss.Profile) -> nss.SemanticSlices:
    return nss.semantic_slices(nss.critical_neurons(profiled, "taylor"), profiled)


@pytest.fixture(scope="module")
def planner(
    trained: nss.Classifier, slices: nss.SemanticSlices, digits: nss.Dataset, profiled: nss.Profile
) -> nss.Planner:
    return nss.Planner(trained, slices, digits, profiled)


@pytest.mark.parametrize("share", [0.8, 0.5, 0.25, 0.1])
@pytest.mark.parametrize("what", ["macs", "params"])
def test_a_share_is_met_to_two_per_cent_and_never_exceeded(
    planner: nss.Planner, trained: nss.Classifier, what: str, share: float
) -> None:
    plan = planner.plan(**{what: share})
    smaller = nss.remove(trained, plan.neurons())
    count = nss.count_macs if what == "macs" else nss.count_parameters
    asked = share * count(trained)
    assert 0.98 * asked <= count(smaller) <= asked
    assert (plan.macs, plan.parameters) == (nss.count_macs(smaller), nss.count_parameters(smaller))


def test_layers_keep_multiples_all_but_one_within_the_same_budget(
    trained: nss.Classifier, slices: nss.SemanticSlices, digits: nss.Dataset, profiled: nss.Profile
) -> None:
    plan = nss.restructure(trained, slices, digits, profiled, macs=0.5, multiple=4).plan
    assert 0.98 * 0.5 * nss.count_macs(trained) <= plan.macs <= 0.5 * nss.count_macs(trained)
    odd = [name for name, layer in plan.layers.items() if len(layer.kept) % 4 and len(layer.kept) < layer.total]
    assert len(odd) <= 1


def test_no_layer_loses_more_than_its_cap_and_what_cannot_be_reached_says_what_can(
    trained: nss.Classifier, slices: nss.SemanticSlices, digits: nss.Dataset, profiled: nss.Profile
) -> None:
    planner = nss.Planner(trained, slices, digits, profiled, cap=0.5)
    smallest = planner.plan(macs=planner.least)
    assert all(len(layer.kept) >= layer.total / 2 for layer in smallest.layers.values())
    with pytest.raises(RestructureError, match=r"macs=0.01 cannot be reached") as caught:
        planner.plan(macs=0.01)
    assert caught.value.allowed == f"{planner.least:.4f} to 1"
    assert "50%" in caught.value.where


def test_without_a_gradient_step_a_merged_model_is_better_than_one_that_was_only_cut(
    trained: nss.Classifier, slices: nss.SemanticSlices, digits: nss.Dataset, profiled: nss.Profile
) -> None:
    before = {name: tensor.clone() for name, tensor in trained.state_dict().items()}
    found = nss.restructure(trained, slices, digits, profiled, macs=0.6, curve=[0.75, 0.001])
    assert all(torch.equal(tensor, before[name]) for name, tensor in trained.state_dict().items())
    original, refitted = found.report
    assert (original.name, refitted.name) == ("original", "refitted")
    assert refitted.accuracy == nss.evaluate(found.model, digits.split("val")).accuracy
    assert refitted.accuracy > original.accuracy - 0.05
    cut = nss.remove(trained, found.plan.neurons())
    assert nss.evaluate(cut, digits.split("val")).accuracy < refitted.accuracy - 0.02
    assert [point.name for point in found.curve] == ["0.75"], "what lies below the cap is left out"
    assert found.model.spec.parent == nss.model_digest(trained)


def test_the_loss_of_accuracy_on_held_out_images_is_never_above_what_is_allowed(
    trained: nss.Classifier, slices: nss.SemanticSlices, digits: nss.Dataset, profiled: nss.Profile
) -> None:
    found = nss.restructure(trained, slices, digits, profiled, max_accuracy_drop=0.03)
    whole, smaller = (nss.evaluate(each, digits.split("val")).accuracy for each in (trained, found.model))
    assert smaller >= whole - 0.03
    assert found.plan.macs_share < 0.5
    assert found.plan.budget == {"max_accuracy_drop": 0.03}


def test_a_loss_of_just_what_is_allowed_is_within(
    monkeypatch: pytest.MonkeyPatch,
    trained: nss.Classifier,
    slices: nss.SemanticSlices,
    digits: nss.Dataset,
    profiled: nss.Profile,
) -> None:
    # 0.8 - 0.1 is 0.7000000000000001: an accuracy of 0.7 must not miss it by that.
    verb = importlib.import_module("nss.restructure")
    monkeypatch.setattr(verb, "apply_plan", lambda model, plan, *_, **__: nss.remove(model, plan.neurons()))
    monkeypatch.setattr(
        verb, "evaluate", lambda model, _: SimpleNamespace(accuracy=0.8 if model is trained else 0.7, per_class={})
    )
    found = nss.restructure(trained, slices, digits, profiled, max_accuracy_drop=0.1)
    assert [point.accuracy for point in found.report] == [0.8, 0.7]
    with pytest.raises(RestructureError, match=r"no smaller model stays within 0.09999 of"):
        nss.restructure(trained, slices, digits, profiled, max_accuracy_drop=0.09999)


def test_a_loss_of_accuracy_that_nothing_stays_within_is_refused_with_the_least(
    monkeypatch: pytest.MonkeyPatch,
    trained: nss.Classifier,
    slices: nss.SemanticSlices,
    digits: nss.Dataset,
    profiled: nss.Profile,
) -> None:
    # Every smaller model answers "0": a tenth of the images is right.
    silent = copy.deepcopy(trained)
    with torch.no_grad():
        silent.network.fc3.weight.zero_()
        silent.network.fc3.bias.copy_(torch.tensor([1.0] + [0.0] * 9))
    monkeypatch.setattr(importlib.import_module("nss.restructure"), "apply_plan", lambda *_, **__: silent)
    whole, least = (nss.evaluate(each, digits.split("val")).accuracy for each in (trained, silent))
    with pytest.raises(RestructureError, match=r"no smaller model stays within 0.1 of") as caught:
        nss.restructure(trained, slices, digits, profiled, max_accuracy_drop=0.1)
    assert caught.value.allowed == f"from {whole - least:.4f} on"


def test_a_latency_is_met_as_measured_and_one_out_of_reach_says_what_is_possible(
    monkeypatch: pytest.MonkeyPatch,
    trained: nss.Classifier,
    slices: nss.SemanticSlices,
    digits: nss.Dataset,
    profiled: nss.Profile,
) -> None:
    # A clock of a machine that takes one millisecond for a hundred thousand multiply-adds.
    verb = importlib.import_module("nss.restructure")
    monkeypatch.setattr(verb, "measured_latency", lambda model: nss.count_macs(model) / 100_000)
    whole = nss.count_macs(trained) / 100_000
    found = nss.restructure(trained, slices, digits, profiled, latency_ms=whole / 2)
    assert 0.45 * whole < nss.count_macs(found.model) / 100_000 <= whole / 2
    assert found.plan.budget == {"latency_ms": whole / 2}
    with pytest.raises(RestructureError, match="cannot be reached") as caught:
        nss.restructure(trained, slices, digits, profiled, latency_ms=whole / 1000)
    assert "from about" in caught.value.allowed


def test_fine_tuning_with_the_original_as_a_teacher_is_reported_as_a_step_of_its_own(
    trained: nss.Classifier, slices: nss.SemanticSlices, digits: nss.Dataset, profiled: nss.Profile
) -> None:
    found = nss.restructure(trained, slices, digits, profiled, macs=0.1, fine_tune_steps=60, distil=True, seed=3)
    original, refitted, tuned = found.report
    assert tuned.name == "fine-tuned"
    assert (tuned.macs, tuned.parameters) == (refitted.macs, refitted.parameters)
    assert tuned.accuracy > refitted.accuracy
    again = nss.restructure(trained, slices, digits, profiled, macs=0.1, fine_tune_steps=60, distil=True, seed=3)
    assert nss.model_digest(again.model) == nss.model_digest(found.model)
    assert json.loads(json.dumps(found.to_dict()))["plan"]["macs_share"] == found.plan.macs_share
    assert original.macs == nss.count_macs(trained)


def test_fine_tuning_without_a_weight_to_train_is_refused_before_the_work_begins(
    monkeypatch: pytest.MonkeyPatch,
    trained: nss.Classifier,
    slices: nss.SemanticSlices,
    digits: nss.Dataset,
    profiled: nss.Profile,
) -> None:
    frozen = copy.deepcopy(trained).requires_grad_(False)
    smaller = nss.restructure(frozen, slices, digits, profiled, macs=0.5).model
    assert nss.count_macs(smaller) <= 0.5 * nss.count_macs(trained)
    verb = importlib.import_module("nss.restructure")
    monkeypatch.setattr(verb, "profile", None)
    monkeypatch.setattr(verb, "Planner", None)
    with pytest.raises(ModelError, match="no parameter requires a gradient") as caught:
        nss.restructure(frozen, slices, digits, macs=0.5, fine_tune_steps=1)
    assert caught.value.fix == "model.requires_grad_(True)"


def test_an_iterator_of_batches_is_refused_before_a_profile_reads_it(
    trained: nss.Classifier, slices: nss.SemanticSlices, digits: nss.Dataset
) -> None:
    batches = iter_batches(digits.split("train"), 32)
    with pytest.raises(nss.NssError, match=r"only once[\s\S]*a list of batches, a DataLoader or a Dataset"):
        nss.restructure(trained, slices, batches, macs=0.5)
    assert len(list(batches)) > 1


def test_fine_tuning_that_loses_accuracy_is_not_kept(
    trained: nss.Classifier,
    slices: nss.SemanticSlices,
    digits: nss.Dataset,
    profiled: nss.Profile,
    caplog: pytest.LogCaptureFixture,
) -> None:
    refitted = nss.restructure(trained, slices, digits, profiled, macs=0.3)
    harmful: Any = {"macs": 0.3, "fine_tune_steps": 3, "learning_rate": 5.0}
    with caplog.at_level("INFO", "nss.restructure"):
        found = nss.restructure(trained, slices, digits, profiled, **harmful)
    assert nss.model_digest(found.model) == nss.model_digest(refitted.model)
    assert [point.name for point in found.report] == ["original", "refitted"]
    assert f"fine-tuning lost accuracy, {refitted.report[1].accuracy} to " in caplog.text
    # Without held-out images nobody knows, and what was asked for is done.
    train = digits.split("train")
    blind = nss.restructure(trained, slices, (train.images[:], train.labels[:]), profiled, **harmful)
    assert [(point.name, point.accuracy) for point in blind.report[1:]] == [("refitted", None), ("fine-tuned", None)]


@pytest.mark.parametrize("name", ["resnet20", "mobilenet_small"])
def test_coupled_networks_shrink_load_in_a_new_process_and_train_on(
    networks: ModuleType, tmp_path: Path, name: str
) -> None:
    model = networks.zoo_model(name)
    images = networks.pictures(80)
    labels = torch.arange(80) % len(networks.CLASSES)
    found = nss.profile(model, (images, labels), ("taylor",))
    slices = nss.semantic_slices(nss.critical_neurons(found, "taylor"), found)
    smaller = nss.restructure(model, slices, (images, labels), found, macs=0.5).model
    assert 0.45 < nss.count_macs(smaller) / nss.count_macs(model) <= 0.5
    nss.save_model(smaller, tmp_path / "smaller")
    np.save(tmp_path / "images.npy", images.numpy())
    script = (
        "import sys, numpy as np, torch, nss\n"
        "torch.set_num_threads(1)\n"
        "folder = sys.argv[1]\n"
        "model = nss.load_model(folder + '/smaller')\n"
        "images = torch.from_numpy(np.load(folder + '/images.npy'))\n"
        "with torch.no_grad(): logits = model(images)\n"
        "np.save(folder + '/logits.npy', logits.numpy())\n"
        "nss.fine_tune(model, (images, torch.arange(80) % 4), steps=1, seed=0)\n"
        "with torch.no_grad(): assert not torch.equal(model(images), logits)\n"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True)
    with torch.no_grad():
        torch.testing.assert_close(
            torch.from_numpy(np.load(tmp_path / "logits.npy")), smaller(images), rtol=0, atol=1e-6
        )


def test_a_network_shrinks_again_and_again(networks: ModuleType) -> None:
    model = networks.zoo_model("resnet20")
    samples = networks.pictures(40), torch.arange(40) % len(networks.CLASSES)
    for _ in range(2):
        found = nss.profile(model, samples, ("taylor",))
        slices = nss.semantic_slices(nss.critical_neurons(found, "taylor"), found)
        smaller = nss.restructure(model, slices, samples, found, macs=0.7).model
        assert nss.count_macs(smaller) <= 0.7 * nss.count_macs(model)
        model = smaller


def test_what_does_not_fit_together_is_refused_by_name(
    trained: nss.Classifier, slices: nss.SemanticSlices, digits: nss.Dataset, profiled: nss.Profile
) -> None:
    with pytest.raises(RestructureError, match="0 budgets are given"):
        nss.restructure(trained, slices, digits, profiled)
    with pytest.raises(RestructureError, match="2 budgets are given") as caught:
        nss.restructure(trained, slices, digits, profiled, macs=0.5, params=0.5)
    assert (caught.value.where, caught.value.allowed) == (
        "macs, params",
        "macs or params or latency_ms or max_accuracy_drop",
    )
    with pytest.raises(RestructureError, match=r"the budget is 1.5"):
        nss.restructure(trained, slices, digits, profiled, macs=1.5)
    with pytest.raises(RestructureError, match=r"max_accuracy_drop is -0.1"):
        nss.restructure(trained, slices, digits, profiled, max_accuracy_drop=-0.1)
    with pytest.raises(RestructureError, match=r"cap is 1.0"):
        nss.restructure(trained, slices, digits, profiled, macs=0.5, cap=1.0)
    with pytest.raises(RestructureError, match=r"multiple is 0"):
        nss.restructure(trained, slices, digits, profiled, macs=0.5, multiple=0)
    train = digits.split("train")
    with pytest.raises(RestructureError, match="no held-out images"):
        nss.restructure(trained, slices, (train.images, train.labels), profiled, max_accuracy_drop=0.1)
    other = copy.deepcopy(trained)
    with torch.no_grad():
        next(other.parameters()).add_(1)
    with pytest.raises(RestructureError, match="the profile is of another model"):
        nss.restructure(other, slices, digits, profiled, macs=0.5)
    with pytest.raises(RestructureError, match="no Gram matrices"):
        nss.restructure(trained, slices, digits, replace(profiled, grams={}), macs=0.5)
    with pytest.raises(RestructureError, match="slices are of other classes"):
        nss.restructure(trained, replace(slices, classes=("a", "b")), digits, profiled, macs=0.5)
    with pytest.raises(RestructureError, match="Sequential does not say what it takes"):
        nss.restructure(trained.network, slices, digits, profiled, macs=0.5)


def with_layers(slices: nss.SemanticSlices, change: Callable[[Layers], Layers]) -> nss.SemanticSlices:
    """The slices with the neurons of the last one changed."""
    *others, last = slices.slices
    return replace(slices, slices=(*others, replace(last, neurons=change(last.neurons))))


def test_slices_of_another_model_are_refused_before_anything_is_measured(
    trained: nss.Classifier,
    slices: nss.SemanticSlices,
    digits: nss.Dataset,
    profiled: nss.Profile,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    smaller = nss.remove(trained, {"conv1": torch.arange(16) < 12})
    of_smaller = nss.profile(smaller, digits.split("train"), ("taylor",))
    monkeypatch.setattr(importlib.import_module("nss.planner"), "find_sites", None)
    cases = [
        (smaller, slices, of_smaller, ("conv1: 16 neurons", "12 neurons")),
        (
            trained,
            with_layers(slices, lambda of: {**of, "fc9": of["fc1"]}),
            profiled,
            ("fc9: 120 neurons", "no neurons"),
        ),
        (
            trained,
            with_layers(slices, lambda of: {"conv1": of["conv1"]}),
            profiled,
            ("conv2: no neurons", "32 neurons"),
        ),
    ]
    for model, other, found, (where, allowed) in cases:
        with pytest.raises(RestructureError, match="the slices are of another model") as caught:
            nss.restructure(model, other, digits, found, macs=0.5)
        assert (caught.value.where, caught.value.allowed) == (where, allowed)
        assert caught.value.fix == "slice this model"


def test_masked_weights_are_refused_before_they_would_be_lost(
    trained: nss.Classifier, slices: nss.SemanticSlices, digits: nss.Dataset, profiled: nss.Profile
) -> None:
    masked = nss.prune_weights(trained, "lamp", 0.5)
    with pytest.raises(RestructureError, match="masked"):
        nss.restructure(masked, slices, digits, profiled, macs=0.5)


def test_the_smallest_share_that_is_named_can_be_had(planner: nss.Planner) -> None:
    sizes = planner.path("macs").sizes
    assert planner.plan(macs=planner.least).macs == sizes[-1]
    # 7 / 25 * 25 is 7.000000000000001: a whole number of multiply-adds must not be missed by that.
    for size in (sizes[1], sizes[len(sizes) // 2]):
        assert planner.plan(macs=size / sizes[0]).macs <= size
