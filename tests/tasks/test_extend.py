"""The stage `extend`: new classes are learned, and what there is nothing to do for says so."""

from __future__ import annotations

import csv
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from nss.data import Dataset, load_data
from nss.errors import StageError
from nss.evaluate import evaluate
from nss.extend import extend
from nss.grow import condense
from nss.model import Classifier, load_model, model_digest, save_model
from nss.predict import predict
from nss.profile import Profile
from nss.slice import SemanticSlices
from tasks.champion import Champion, pin_champion
from tasks.workspace import Workspace

TABLES = {
    "curve.csv": "epoch,loss,new",
    "change.csv": "class,before,after",
    "capacity.csv": "layer,total,old,new,free,widened",
    "confusion_before.csv": "actual,predicted",
    "confusion_after.csv": "actual,predicted",
}


@pytest.fixture(scope="module")
def grown(sliced, tmp_path_factory: pytest.TempPathFactory):
    """A batch of a new class and one of known classes have arrived; the class was learned. Digest of the first."""
    root = shutil.copytree(sliced.workspace.root, tmp_path_factory.mktemp("grown") / "small")
    found = replace(sliced, workspace=Workspace(root))
    digest = found.add([3] * 150, 1, new_classes=("dog",))
    found.add([0, 1, 2] * 20, 2)
    found.run("extend")
    return found, digest


def rows(small, name: str) -> list[dict[str, str]]:
    return list(csv.DictReader(small.read("extend", name)))


def model_of(small, verb: str) -> Classifier:
    return load_model(small.workspace.out(verb) / "model")


def old_and_new(small) -> tuple[Dataset, Dataset]:
    return load_data(small.workspace.data).known_and_new(small.read("base", "source.json")["batches"])


def logits_of(model: Classifier, images: Tensor) -> Tensor:
    with torch.no_grad():
        answers: Tensor = model(images)
    return answers


def condensed(small, old: Dataset) -> Classifier:
    """What the old knowledge is condensed to before anything is learned."""
    out, settings = small.workspace.out, small.params.extend
    slices = SemanticSlices.load(out("slice") / "slices.json")
    gathered = Profile.load(out("profile") / "profile.safetensors")
    classes = model_of(small, "base").spec.classes
    return condense(
        model_of(small, "base"),
        slices,
        old.of_classes(classes).split("train"),
        profile=gathered,
        share=settings.share,
        seed=settings.seed,
    )


def has_nothing_to_do(small, why: str) -> None:
    assert small.read("extend", "metrics.json") == {"done": 0}
    assert small.read("extend", "result.json") == {"done": False, "why": why}
    assert {name: small.read("extend", name) for name in TABLES} == {name: [head] for name, head in TABLES.items()}
    assert not (small.workspace.out("extend") / "model").exists()
    known = small.read("base", "source.json")["batches"]
    assert small.read("extend", "source.json")["batches"] == known


def test_without_a_new_batch_there_is_nothing_to_do(small) -> None:
    small.run("extend")
    has_nothing_to_do(small, "no batch has arrived since the model was made")


def test_never_is_never(small) -> None:
    small.add([3] * 60, 1, new_classes=("dog",))
    small.run("extend", when="never")
    has_nothing_to_do(small, "extend.when is never")


def test_new_images_of_known_classes_alone_are_left_to_readapt(small) -> None:
    small.add([0, 1, 2] * 20, 1, negative=True)
    small.run("extend")
    has_nothing_to_do(small, "the new batches hold no class that the model does not know")


def test_a_new_class_whose_images_are_all_held_out_is_not_learned(small) -> None:
    # Unknown ones in the last two turns of six, known ones in the others.
    small.add([0] * 16 + [3] * 8, 1, new_classes=("dog",))
    small.run("extend")
    has_nothing_to_do(small, "the new batches have no image to train on of dog")


def test_the_model_answers_for_old_and_new_classes_and_the_figures_are_its_own(grown) -> None:
    small, digest = grown
    metrics, model = small.read("extend", "metrics.json"), model_of(small, "extend")
    old, new = old_and_new(small)
    learned = replace(new, batches=tuple(batch for batch in new.batches if batch.digest == digest))
    assert model.spec.classes == ("ant", "bee", "cow", "dog")
    logits, labels = predict(model, old.split("val"))
    right = {"old": logits.argmax(1) == labels, "old_told": logits[:, :3].argmax(1) == labels}
    logits, labels = predict(model, learned.split("val"))
    right |= {"new": logits.argmax(1) == labels, "new_told": logits[:, 3:].argmax(1) + 3 == labels}
    expected = {f"{name}_accuracy": float(each.double().mean()) for name, each in right.items()}
    expected["accuracy"] = float(torch.cat([right["old"], right["new"]]).double().mean())
    expected["original_old_accuracy"] = evaluate(
        model_of(small, "base"), old.of_classes(("ant", "bee", "cow")).split("val")
    ).accuracy
    assert {name: metrics[name] for name in expected} == pytest.approx(expected)
    assert metrics["new_accuracy"] > 0.8
    assert metrics["old_accuracy"] > metrics["original_old_accuracy"] - 0.1


def test_counts_are_of_what_was_trained_and_on_what(grown) -> None:
    small, digest = grown
    metrics, settings = small.read("extend", "metrics.json"), small.params.extend
    old, new = old_and_new(small)
    assert metrics["done"] == 1
    assert metrics["images"] == sum(len(batch.part("train")) for batch in new.batches if batch.digest == digest)
    per_class = old.split("train").per_class_counts()
    drawn = [max(1, int(settings.replay * per_class[name] + 0.5)) for name in ("ant", "bee", "cow")]
    assert metrics["replayed"] == sum(drawn)
    # 102 images are 6 batches of 16; an epoch has 10 steps at least, so two passes; ten of each are new.
    assert metrics["steps"] == 6 * 2 * 10
    assert 0 < metrics["trained_share"] < 1
    assert 0 < metrics["shrinkage"] < 1


def test_old_logits_are_bit_for_bit_those_of_the_condensed_model(grown) -> None:
    small, _ = grown
    old, _ = old_and_new(small)
    images = old.split("test").images
    assert torch.equal(logits_of(model_of(small, "extend"), images)[:, :3], logits_of(condensed(small, old), images))


def test_with_a_share_of_one_old_logits_are_bit_for_bit_those_of_the_base_model(small) -> None:
    small.add([3] * 60, 1, new_classes=("dog",))
    small.run("extend", share=1.0, epochs=1)
    images = old_and_new(small)[0].split("test").images
    assert torch.equal(logits_of(model_of(small, "extend"), images)[:, :3], logits_of(model_of(small, "base"), images))


def test_the_source_says_what_was_read_and_which_batches_the_new_model_knows(grown) -> None:
    small, digest = grown
    base = small.read("base", "source.json")
    assert small.read("extend", "source.json") == {
        "data": base["data"],
        "model": model_digest(model_of(small, "base")),
        "new": old_and_new(small)[1].digest,
        "batches": [*base["batches"], digest],
    }


def test_forgetting_is_told_by_class_and_new_classes_have_no_accuracy_before(grown) -> None:
    small, digest = grown
    old, new = old_and_new(small)
    known = old.of_classes(("ant", "bee", "cow")).split("val")
    before = evaluate(model_of(small, "base"), known).per_class
    model = model_of(small, "extend")
    learned = replace(new, batches=tuple(batch for batch in new.batches if batch.digest == digest))
    after = evaluate(model, old.split("val")).per_class | evaluate(model, learned.split("val")).per_class
    change = rows(small, "change.csv")
    assert [row["class"] for row in change] == ["ant", "bee", "cow", "dog"]
    assert {row["class"]: float(row["after"]) for row in change} == pytest.approx(after)
    assert {row["class"]: float(row["before"]) for row in change[:3]} == pytest.approx(before)
    assert change[3]["before"] == ""


@pytest.mark.parametrize(("name", "verb"), [("confusion_before.csv", "base"), ("confusion_after.csv", "extend")])
def test_confusion_is_on_all_held_out_images_before_and_after(grown, name: str, verb: str) -> None:
    small, digest = grown
    old, new = old_and_new(small)
    expected: Counter[tuple[str, str]] = Counter()
    for batch in (*old.batches, *(each for each in new.batches if each.digest == digest)):
        part = batch.part("val")
        answers = logits_of(model_of(small, verb), part.images).argmax(1)
        for actual, answer in zip(part.labels.tolist(), answers.tolist(), strict=True):
            expected[old.classes[actual], old.classes[answer]] += 1
    assert Counter((row["actual"], row["predicted"]) for row in rows(small, name)) == expected
    assert ("dog", "dog") in expected or verb == "base"


def test_capacity_says_what_each_layer_has_left(grown) -> None:
    small, _ = grown
    found = {row.pop("layer"): {name: int(value) for name, value in row.items()} for row in rows(small, "capacity.csv")}
    assert {name: row["total"] for name, row in found.items()} == {"conv1": 16, "conv2": 32, "fc1": 120, "fc2": 84}
    weights = dict(model_of(small, "extend").named_parameters())
    for name, row in found.items():
        shapes = [len(weights[f"network.columns.{column}.{name}.weight"]) for column in (0, 1)]
        assert [row["old"], row["new"]] == shapes
        assert row["free"] - row["widened"] == row["total"] - sum(shapes)
        assert min(row["free"], row["widened"]) == 0


def test_the_result_holds_the_curve_of_the_table_and_no_duration(grown) -> None:
    small, _ = grown
    result, curve = small.read("extend", "result.json"), rows(small, "curve.csv")
    assert (result["done"], result["why"]) == (True, "new classes have arrived: dog")
    assert "seconds" not in result
    assert [int(row["epoch"]) for row in curve] == list(range(1, small.params.extend.epochs + 1))
    assert [float(row["loss"]) for row in curve] == [each["loss"] for each in result["curve"]]
    assert all(float(row["new"]) <= 1 for row in curve)


def test_the_same_inputs_give_the_same_bytes(grown) -> None:
    small, _ = grown
    before = small.files("extend")
    small.run("extend")
    assert small.files("extend") == before


def test_the_stage_does_what_the_library_does_with_its_settings(small) -> None:
    small.add([0, 3] * 40, 1, new_classes=("dog",))
    settings = {"replay": 0.5, "share": 0.6, "width": 0.2, "epochs": 2, "batch_size": 32}
    rest = {"learning_rate": 0.02, "weight_decay": 0.01, "seed": 5}
    out, (old, new) = small.workspace.out, old_and_new(small)
    expected = extend(
        model_of(small, "base"),
        SemanticSlices.load(out("slice") / "slices.json"),
        new,
        old_data=old.of_classes(("ant", "bee", "cow")),
        profile=Profile.load(out("profile") / "profile.safetensors"),
        **settings,
        **rest,
    )
    small.run("extend", **settings, **rest)
    assert model_digest(model_of(small, "extend")) == model_digest(expected.model)


def test_known_classes_in_a_batch_with_a_new_one_are_replayed(small) -> None:
    small.add([0, 1, 3] * 40, 1, new_classes=("dog",))
    metrics = small.run("extend", replay=0.0, epochs=1)
    labels = old_and_new(small)[1].split("train").labels
    assert metrics["replayed"] == int((labels < 3).sum())
    assert metrics["images"] == int((labels == 3).sum())


def test_a_second_class_that_sorts_first_comes_last_and_both_are_learned(small) -> None:
    digests = [small.add([3] * 60, 1, new_classes=("dog",)), small.add([4] * 60, 2, new_classes=("aardvark",))]
    small.run("extend", epochs=1)
    assert model_of(small, "extend").spec.classes == ("ant", "bee", "cow", "dog", "aardvark")
    assert small.read("extend", "source.json")["batches"][1:] == digests
    assert small.read("extend", "result.json")["classes"] == ["dog", "aardvark"]


def test_an_extended_champion_learns_on_and_all_its_logits_stay(grown, tmp_path: Path) -> None:
    first, _ = grown
    small = replace(first, workspace=Workspace(shutil.copytree(first.workspace.root, tmp_path / "small")))
    champion = model_of(small, "extend")
    batches = tuple(small.read("extend", "source.json")["batches"])
    pin_champion(
        small.workspace,
        Champion("stripes", 2, model_digest(champion), batches),
        small.workspace.out("extend") / "model",
    )
    for verb in ("base", "profile", "slice"):
        small.run(verb)
    small.add([4] * 60, 3, new_classes=("eel",))
    metrics = small.run("extend", replay=0.2)
    images = load_data(small.workspace.data).split("test").images
    assert torch.equal(logits_of(model_of(small, "extend"), images)[:, :4], logits_of(champion, images))
    assert metrics["accuracy"] > 0.95
    assert small.read("extend", "result.json")["classes"] == ["eel"]
    room = rows(small, "capacity.csv")
    assert [int(row["old"]) for row in room] == [
        int(row["old"]) + int(row["new"]) for row in rows(first, "capacity.csv")
    ]
    assert all(int(row["widened"]) > 0 for row in room)


def test_a_new_batch_without_validation_images_has_no_accuracy(small) -> None:
    small.add([3] * 15, 1, new_classes=("dog",))
    metrics = small.run("extend", epochs=1)
    assert metrics["images"] == 15
    assert metrics["new_accuracy"] is metrics["new_told_accuracy"] is None
    assert metrics["old_accuracy"] is not None
    assert rows(small, "change.csv")[3] == {"class": "dog", "before": "", "after": ""}


def test_a_single_new_sample_is_learned_without_losing_the_old(small) -> None:
    small.add([3], 1, new_classes=("dog",))
    metrics = small.run("extend")
    assert metrics["images"] == 1
    assert metrics["old_told_accuracy"] > metrics["original_old_accuracy"] - 0.1


def test_slices_of_another_model_are_refused_and_nothing_is_written(small) -> None:
    model = model_of(small, "base")
    with torch.no_grad():
        next(model.parameters()).add_(1)
    save_model(model, small.workspace.out("base") / "model")
    with pytest.raises(StageError, match=r"the stage 'slice' read another model .*\n(.*\n)*  fix: dvc repro"):
        small.run("extend")
    assert not small.workspace.out("extend").exists()
