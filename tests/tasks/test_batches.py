"""What a further batch changes: nothing in what comes before the maintenance, and the evaluation scores it apart."""

from __future__ import annotations

import pytest

from nss.data import load_data
from nss.errors import StageError
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
