"""What a further batch changes: nothing in what comes before the maintenance, and the evaluation scores it apart."""

from __future__ import annotations

import pytest
import torch

from nss.data import load_data
from nss.errors import StageError
from nss.evaluate import evaluate
from nss.model import load_model
from nss.predict import predict
from tasks.batches import known_and_new, known_data, with_new_classes

# Labels of images, and names of new classes.
ARRIVED = [([0, 2], ()), ([0, 3], ("dog",)), ([2], ()), ([4, 4], ("eel",))]


def test_known_batches_have_the_models_classes_and_new_ones_all(small) -> None:
    old = load_data(small.workspace.data)
    digest = small.add([0, 3, 1], 1, new_classes=("dog",))
    known, new = known_and_new(small.workspace, ("ant", "bee", "cow"))
    assert (known.digest, known.classes) == (old.digest, old.classes)
    assert [batch.digest for batch in new.batches] == [digest]
    assert (new.classes, new.labels.tolist()) == (("ant", "bee", "cow", "dog"), [0, 3, 1])
    assert known_data(small.workspace, old.classes).digest == old.digest


def test_batches_with_a_class_that_the_model_lacks_are_told_from_others(small) -> None:
    digests = [small.add(labels, seed, new_classes=names) for seed, (labels, names) in enumerate(ARRIVED)]
    _, new = known_and_new(small.workspace, ("ant", "bee", "cow"))
    found = with_new_classes(new, 3)
    assert [batch.digest for batch in found.batches] == [digests[1], digests[3]]
    assert found.classes == ("ant", "bee", "cow", "dog", "eel")
    assert len(with_new_classes(new, 5)) == 0


def test_without_the_base_model_there_is_nothing_known(small) -> None:
    (small.workspace.out("base") / "source.json").unlink()
    with pytest.raises(StageError, match=r"the file is missing\n  where: .*artifacts/base/source.json"):
        known_data(small.workspace, ("ant", "bee", "cow"))


@pytest.mark.parametrize("verb", ["profile", "slice", "restructure"])
def test_a_further_batch_and_class_leave_profile_slices_and_the_smaller_model_byte_for_byte(small, verb: str) -> None:
    changes = {"when": "always", "fine_tune_steps": 2, "curve": []} if verb == "restructure" else {}
    small.run(verb, **changes)
    before = small.files(verb)
    small.add([0, 3] * 30, 1, negative=True, new_classes=("dog",))
    small.run(verb, **changes)
    assert small.files(verb) == before


def test_a_smaller_model_that_is_not_wanted_says_so(small) -> None:
    assert small.run("restructure") == {"done": 0}
    assert small.read("restructure", "result.json") == {"done": False, "why": "restructure.when is never"}


def maintained(small):
    """Run what the evaluation reads."""
    for verb in ("restructure", "readapt", "extend"):
        small.run(verb)
    return small


def test_without_new_batches_the_model_is_scored_on_all_held_out_images(small) -> None:
    metrics = maintained(small).run("evaluate")
    model, data = load_model(small.workspace.out("base") / "model"), load_data(small.workspace.data)
    assert metrics["accuracy"] == pytest.approx(evaluate(model, data.split("test")).accuracy)
    assert set(metrics) == {"accuracy", "worst_accuracy", "images", "vote_accuracy", "told_accuracy"}
    found = small.read("evaluate", "evaluation.json")
    assert (found["new"], found["candidates"]) == (None, {})


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
    }


@pytest.mark.parametrize("verb", ["readapt", "extend"])
def test_an_evaluation_of_a_model_that_learned_from_other_batches_is_refused(small, verb: str) -> None:
    maintained(small)
    small.add([0, 1, 2] * 20, 1)
    small.run("extend" if verb == "readapt" else "readapt")
    with pytest.raises(StageError, match=rf"the stage '{verb}' read another new .*\n(.*\n)*  fix: dvc repro .* {verb}"):
        small.run("evaluate")
