"""A champion that was extended by a class goes through every stage: each works on."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest
import torch

from nss.data import load_data
from nss.evaluate import evaluate
from nss.model import Classifier, load_model, model_digest
from nss.profile import Profile
from nss.size import count_macs
from tasks.champion import Champion, pin_champion
from tasks.workspace import Workspace

CLASSES = ("ant", "bee", "cow", "dog")


@pytest.fixture(scope="module")
def extended(sliced, tmp_path_factory: pytest.TempPathFactory):
    """A class was learned, the model was pinned and sliced, and batches arrived: a drifted one, and a further class."""
    root = shutil.copytree(sliced.workspace.root, tmp_path_factory.mktemp("extended") / "small")
    small = replace(sliced, workspace=Workspace(root))
    small.add([3] * 120, 1, new_classes=("dog",))
    small.run("extend", epochs=3)
    folder = small.workspace.out("extend") / "model"
    batches = tuple(small.read("extend", "source.json")["batches"])
    pin_champion(small.workspace, Champion("stripes", 2, model_digest(load_model(folder)), batches), folder)
    for verb in ("base", "profile", "slice"):
        small.run(verb)
    small.add([0, 1, 2, 3] * 45, 2, negative=True)
    small.add([4] * 30, 3, new_classes=("eel",))
    limit = {"parameters": 1, "macs": None, "bytes": None, "latency_ms": None}
    small.run("triage", budgets=limit)
    return small


def model_of(small, verb: str) -> Classifier:
    return load_model(small.workspace.out(verb) / "model")


def test_profile_and_slices_are_of_the_neurons_of_every_task_and_of_all_classes(extended) -> None:
    layers = Profile.load(extended.workspace.out("profile") / "profile.safetensors").layers
    assert {name.split(".")[1] for name in layers} == {"0", "1"}
    assert extended.read("profile", "metrics.json")["layers"] == len(layers) == 8
    categories = [name for each in extended.read("slice", "slices_val.json")["slices"] for name in each["categories"]]
    assert sorted(categories) == sorted(CLASSES)
    assert extended.read("slice", "metrics.json")["told_accuracy"] > 0.9


def test_triage_finds_what_has_changed_for_it(extended) -> None:
    assert extended.read("triage", "metrics.json") == {"restructure": 1, "readapt": 1, "extend": 1}
    assert extended.read("triage", "extend.json")["why"] == "new classes: eel (30 images)"


def test_it_is_made_smaller_and_answers_for_all_its_classes(extended) -> None:
    assert extended.run("restructure", when="triage", target=0.5)["done"] == 1
    champion, smaller = model_of(extended, "base"), model_of(extended, "restructure")
    assert count_macs(smaller) <= 0.5 * count_macs(champion)
    assert [each.classes for each in smaller.spec.tasks] == [3, 1]
    known, _ = load_data(extended.workspace.data).known_and_new(extended.read("base", "source.json")["batches"])
    held_out = known.of_classes(CLASSES).split("test")
    assert evaluate(smaller, held_out).accuracy > evaluate(champion, held_out).accuracy - 0.05


def test_it_follows_learns_on_and_is_judged(extended) -> None:
    champion = model_of(extended, "base")
    extended.run("restructure", when="triage", target=0.5)
    followed = extended.run("readapt", when="triage", epochs=2)
    extended.run("extend", when="triage", epochs=1, replay=0.1)
    assert followed["new_accuracy"] > followed["original_new_accuracy"] + 0.3
    old, new = load_data(extended.workspace.data).known_and_new(extended.read("base", "source.json")["batches"])
    held_out = old.of_classes(CLASSES).split("test")
    learned = model_of(extended, "extend")
    assert learned.spec.classes == (*CLASSES, "eel")
    with torch.no_grad():
        assert torch.equal(learned(held_out.images)[:, :4], champion(held_out.images))
    metrics = extended.run("evaluate")
    assert metrics["accuracy"] == pytest.approx(evaluate(champion, held_out).accuracy)
    arrived = new.of_classes(CLASSES).split("test")
    assert metrics["readapted_new_accuracy"] == pytest.approx(evaluate(model_of(extended, "readapt"), arrived).accuracy)
    candidates = extended.read("evaluate", "candidates.json")
    assert [each["verb"] for each in candidates] == ["restructure", "readapt", "extend"]
    assert {each["parent"] for each in candidates} == {model_digest(champion)}
    extended.run("gate", min_images=1)
    verdicts = {each["verb"]: each["verdict"] for each in extended.read("gate", "gate.json")["judgements"]}
    assert set(verdicts) == {"restructure", "readapt", "extend"}
