"""The stage `evaluate`: every model on the same held-out images, and what the gate is told of each candidate."""

from __future__ import annotations

import csv
from collections import Counter
from typing import Any

import pytest
import torch

from nss.compare import compare
from nss.data import load_data
from nss.errors import StageError
from nss.evaluate import evaluate
from nss.model import Classifier, load_model, model_digest
from nss.predict import predict
from nss.size import count_macs, count_parameters
from tasks.champion import Champion, pin_champion


def maintained(small, **settings: Any):
    """Run what the evaluation reads."""
    small.run("restructure")
    for verb in ("readapt", "extend"):
        small.run(verb, **settings)
    return small


def test_without_new_batches_the_model_is_scored_on_all_held_out_images(small) -> None:
    metrics = maintained(small).run("evaluate")
    model, data = load_model(small.workspace.out("base") / "model"), load_data(small.workspace.data)
    assert metrics["accuracy"] == pytest.approx(evaluate(model, data.split("test")).accuracy)
    assert set(metrics) == {"accuracy", "worst_accuracy", "images", "vote_accuracy", "told_accuracy"}
    found = small.read("evaluate", "evaluation.json")
    assert (found["new"], found["candidates"]) == (None, {})
    assert small.read("evaluate", "differences.csv") == ["candidate,difference,low,high,p_value,images"]


def test_old_and_new_images_are_scored_apart_for_every_model(small) -> None:
    old = load_data(small.workspace.data).split("test")
    small.add([0, 1, 2, 3] * 45, 1, negative=True, new_classes=("dog",))
    metrics = maintained(small).run("evaluate")
    data = load_data(small.workspace.data)
    new = data.known_and_new(small.read("base", "source.json")["batches"])[1].of_classes(old.classes).split("test")
    assert 0 < len(new) < len(data.split("test")) - len(old)
    for name, verb in (("", "base"), ("readapted_", "readapt")):
        model = load_model(small.workspace.out(verb) / "model")
        assert metrics[f"{name}accuracy"] == pytest.approx(evaluate(model, old).accuracy)
        assert metrics[f"{name}worst_accuracy"] == pytest.approx(evaluate(model, old).worst_accuracy)
        assert metrics[f"{name}new_accuracy"] == pytest.approx(evaluate(model, new).accuracy)
    assert metrics["readapted_new_accuracy"] > metrics["new_accuracy"]
    assert (metrics["images"], metrics["new_images"]) == (len(old), len(new))
    candidates = small.read("evaluate", "evaluation.json")["candidates"]
    assert list(candidates) == ["readapted", "extended"]
    assert candidates["readapted"]["new"]["images"] == len(new)


def test_the_extended_model_is_scored_on_all_new_images_told_the_task_and_not(small) -> None:
    old = load_data(small.workspace.data).split("test")
    small.add([0, 3] * 90, 1, new_classes=("dog",))
    metrics = maintained(small).run("evaluate")
    new = load_data(small.workspace.data).known_and_new(small.read("base", "source.json")["batches"])[1].split("test")
    model = load_model(small.workspace.out("extend") / "model")
    for name, part in (("", old), ("new_", new)):
        logits, labels = predict(model, part)
        told = torch.where(labels < 3, logits[:, :3].argmax(1), 3)
        assert metrics[f"extended_{name}accuracy"] == pytest.approx(float((logits.argmax(1) == labels).double().mean()))
        assert metrics[f"extended_{name}told_accuracy"] == pytest.approx(float((told == labels).double().mean()))
    found = small.read("evaluate", "evaluation.json")["candidates"]["extended"]
    assert (found["old"]["images"], found["new"]["images"]) == (len(old), len(new))
    assert metrics["new_images"] == int((new.labels < 3).sum()) < len(new)
    assert not {name for name in metrics if name.startswith(("readapted_told", "readapted_new_told"))}


def test_without_held_out_new_images_the_extended_model_has_no_score_there(small) -> None:
    small.add([3] * 15, 1, new_classes=("dog",))
    metrics = maintained(small).run("evaluate")
    assert {name for name in metrics if name.startswith("extended")} == {
        "extended_accuracy",
        "extended_worst_accuracy",
        "extended_told_accuracy",
        "extended_difference",
        "extended_p_value",
    }


@pytest.mark.parametrize("verb", ["readapt", "extend"])
def test_an_evaluation_of_a_model_that_learned_from_other_batches_is_refused(small, verb: str) -> None:
    maintained(small)
    small.add([0, 1, 2] * 20, 1)
    small.run("extend" if verb == "readapt" else "readapt")
    with pytest.raises(StageError, match=rf"the stage '{verb}' read another new .*\n(.*\n)*  fix: dvc repro .* {verb}"):
        small.run("evaluate")


def candidates(small) -> dict[str, dict[str, Any]]:
    return {each["verb"]: each for each in small.read("evaluate", "candidates.json")}


def pin_base(small) -> None:
    """Pin the model that was trained, as it is."""
    folder = small.workspace.out("base") / "model"
    batches = tuple(small.read("base", "source.json")["batches"])
    pin_champion(small.workspace, Champion("stripes", 1, model_digest(load_model(folder)), batches), folder)
    small.run("base")


def size_of(small, verb: str) -> dict[str, int]:
    folder = small.workspace.out(verb) / "model"
    model, weights = load_model(folder), (folder / "model.safetensors").read_bytes()
    return {"parameters": count_parameters(model), "macs": count_macs(model), "bytes": len(weights)}


def test_without_a_champion_the_base_model_is_a_candidate_that_is_compared_with_nothing(small) -> None:
    maintained(small).run("evaluate")
    scores = evaluate(load_model(small.workspace.out("base") / "model"), load_data(small.workspace.data).split("test"))
    assert small.read("evaluate", "candidates.json") == [
        {
            "verb": "base",
            "images": scores.images,
            "accuracy": scores.accuracy,
            "per_class": scores.per_class,
            "known": None,
            "arrived": None,
            "size": size_of(small, "base"),
            "champion_size": {},
            "model": model_digest(load_model(small.workspace.out("base") / "model")),
            "parent": None,
            "batches": small.read("base", "source.json")["batches"],
        }
    ]


def test_the_base_model_stands_in_for_a_champion_for_the_other_candidates(small) -> None:
    small.run("restructure", when="always", fine_tune_steps=0, curve=[])
    for verb in ("readapt", "extend"):
        small.run(verb)
    small.run("evaluate")
    found = candidates(small)
    assert list(found) == ["restructure", "base"]
    smaller = found["restructure"]
    assert (smaller["size"], smaller["champion_size"]) == (size_of(small, "restructure"), size_of(small, "base"))
    assert smaller["parent"] == found["base"]["model"]
    assert smaller["batches"] == small.read("base", "source.json")["batches"]
    assert smaller["arrived"] is None


def test_which_champion_is_pinned_changes_one_file_of_the_base_model_only(small) -> None:
    before = small.files("base")
    assert small.read("base", "champion.json") is None
    pin_base(small)
    assert small.read("base", "champion.json") == {"name": "stripes", "version": 1}
    after = small.files("base")
    # The figures of a pinned model are those of today, not those of its training.
    assert {name for name in after if after[name] != before[name]} == {"champion.json", "metrics.json", "history.csv"}


def test_a_pinned_champion_is_no_candidate(small) -> None:
    pin_base(small)
    maintained(small).run("evaluate")
    assert small.read("evaluate", "candidates.json") == []


def test_candidates_are_compared_with_the_champion_on_known_and_on_new_images(small) -> None:
    pin_base(small)
    digest = small.add([0, 1, 2, 3] * 45, 1, negative=True, new_classes=("dog",))
    maintained(small, epochs=1).run("evaluate")
    data = load_data(small.workspace.data)
    old, new = data.known_and_new(small.read("base", "source.json")["batches"])
    base, names = load_model(small.workspace.out("base") / "model"), ("ant", "bee", "cow")
    for verb, each in candidates(small).items():
        model = load_model(small.workspace.out(verb) / "model")
        held_out = new.of_classes(model.spec.classes).split("test")
        classes = model.spec.classes
        expected = [compare(base, model, part, classes=classes) for part in (old.split("test"), held_out)]
        assert [each["known"], each["arrived"]] == [found.to_dict() for found in expected]
        answers = [predict(model, part) for part in (old.split("test"), held_out)]
        right = torch.cat([logits.argmax(1) == labels for logits, labels in answers])
        labels = torch.cat([labels for _, labels in answers])
        assert (each["images"], each["accuracy"]) == (len(right), pytest.approx(float(right.double().mean())))
        shares = {name: float(right[labels == at].double().mean()) for at, name in enumerate(classes)}
        assert each["per_class"] == pytest.approx(shares)
        assert (each["model"], each["parent"]) == (model_digest(model), model_digest(base))
        assert each["batches"] == small.read(verb, "source.json")["batches"]
        assert set(each["arrived"]["per_batch"]) == {digest}
        assert set(each["arrived"]["per_class"]) == set(names)
    assert list(candidates(small)) == ["readapt", "extend"]
    assert set(candidates(small)["extend"]["arrived"]["new_classes"]) == {"dog"}


def test_differences_are_in_the_metrics_and_in_a_table(small) -> None:
    pin_base(small)
    small.add([0, 1, 2] * 60, 1, negative=True)
    metrics = maintained(small, epochs=3).run("evaluate")
    (each,) = small.read("evaluate", "candidates.json")
    rows = list(csv.DictReader(small.read("evaluate", "differences.csv")))
    assert [row["candidate"] for row in rows] == ["readapt, known images", "readapt, new images"]
    for row, part, name in zip(rows, ("known", "arrived"), ("", "new_"), strict=True):
        found = each[part]["overall"]
        assert metrics[f"readapted_{name}difference"] == float(row["difference"]) == found["difference"]
        assert metrics[f"readapted_{name}p_value"] == float(row["p_value"]) == found["p_value"]
        assert [float(row["low"]), float(row["high"]), int(row["images"])] == [*each[part]["interval"], found["images"]]
    assert float(rows[1]["difference"]) > 0.3


def test_each_model_runs_over_each_image_once(small, monkeypatch: pytest.MonkeyPatch) -> None:
    small.add([0, 3] * 90, 1, new_classes=("dog",))
    small.run("restructure")
    small.run("readapt", when="never")
    small.run("extend", epochs=1)
    seen: dict[str, Counter[bytes]] = {}
    forward = Classifier.forward

    def counting(model: Classifier, images: torch.Tensor) -> torch.Tensor:
        if images.any():  # an empty image is there to count multiply-adds
            rows = seen.setdefault(model_digest(model), Counter())
            rows.update(image.numpy().tobytes() for image in images)
        return forward(model, images)

    monkeypatch.setattr(Classifier, "forward", counting)
    small.run("evaluate")
    held_out = Counter(image.numpy().tobytes() for image in load_data(small.workspace.data).split("test").images)
    for verb in ("base", "extend"):
        assert seen[model_digest(load_model(small.workspace.out(verb) / "model"))] == held_out
    assert len(seen) == 2 + small.read("slice", "metrics.json")["slices"]
