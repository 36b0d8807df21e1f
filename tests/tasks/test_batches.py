"""What a further batch changes: nothing in what comes before the maintenance, and the evaluation scores it apart."""

from __future__ import annotations

import pytest

from nss.data import load_data
from nss.errors import StageError
from nss.evaluate import evaluate
from nss.model import load_model
from tasks.batches import known_and_new, known_data


def test_known_batches_have_the_models_classes_and_new_ones_all(small) -> None:
    old = load_data(small.workspace.data)
    digest = small.add([0, 3, 1], 1, new_classes=("dog",))
    known, new = known_and_new(small.workspace, ("ant", "bee", "cow"))
    assert (known.digest, known.classes) == (old.digest, old.classes)
    assert [batch.digest for batch in new.batches] == [digest]
    assert (new.classes, new.labels.tolist()) == (("ant", "bee", "cow", "dog"), [0, 3, 1])
    assert known_data(small.workspace, old.classes).digest == old.digest


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
    for verb in ("restructure", "readapt"):
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
    assert list(candidates) == ["readapted"]
    assert candidates["readapted"]["new"]["images"] == len(new)


def test_an_evaluation_of_a_model_that_followed_other_batches_is_refused(small) -> None:
    maintained(small)
    small.add([0, 1, 2] * 20, 1)
    with pytest.raises(
        StageError, match=r"the stage 'readapt' read another new .*\n(.*\n)*  fix: dvc repro .* readapt"
    ):
        small.run("evaluate")
