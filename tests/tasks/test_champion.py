"""The pin, and the stage `base` with and without it."""

from __future__ import annotations

import json
import math
import shutil

import pytest

from nss.data import load_data
from nss.errors import DataError, StageError
from nss.evaluate import evaluate
from nss.model import build_model, load_model, model_digest, save_model
from tasks.champion import Champion, load_champion, pin_champion, read_champion, unpin_champion


def pin(small, **changes: object) -> Champion:
    """Pin the model that `base` has trained."""
    folder = small.workspace.out("base") / "model"
    digests = tuple(batch.digest for batch in load_data(small.workspace.data).batches)
    found = {"name": "stripes", "version": 3, "model": model_digest(load_model(folder)), "batches": digests}
    champion = Champion(**{**found, **changes})
    pin_champion(small.workspace, champion, folder)
    return champion


def test_an_empty_pin_is_no_champion(sliced) -> None:
    assert sliced.workspace.pin.read_text() == '{\n "version": null\n}\n'
    assert read_champion(sliced.workspace) is None


def test_what_is_pinned_is_read_again_and_can_be_undone(small) -> None:
    champion = pin(small)
    assert read_champion(small.workspace) == champion
    assert json.loads(small.workspace.pin.read_text()).keys() == {"name", "version", "model", "batches"}
    unpin_champion(small.workspace)
    assert small.workspace.pin.read_text() == '{\n "version": null\n}\n'


GOOD = {"name": "a", "version": 1, "model": "m", "batches": ["b"]}


@pytest.mark.parametrize(
    "content",
    [
        [],
        {},
        {"version": 1},
        {**GOOD, "version": None},
        {**GOOD, "version": True},
        {**GOOD, "version": "1"},
        {**GOOD, "batches": []},
        {**GOOD, "batches": [1]},
        {**GOOD, "more": 1},
    ],
)
def test_a_pin_of_another_form_is_refused(small, content: object) -> None:
    small.workspace.pin.write_text(json.dumps(content))
    with pytest.raises(StageError, match=r"champion.json is not what it should be\n(.*\n)*  fix: git checkout"):
        read_champion(small.workspace)


def test_a_missing_pin_is_refused_and_not_taken_for_an_empty_one(small) -> None:
    small.workspace.pin.unlink()
    with pytest.raises(StageError, match="missing"):
        read_champion(small.workspace)


def test_missing_weights_say_how_to_get_them(small) -> None:
    champion = pin(small)
    shutil.rmtree(small.workspace.champion)
    with pytest.raises(StageError, match=r"stripes version 3, are missing\n(.*\n)*  fix: dvc pull champion.dvc"):
        load_champion(small.workspace, champion)


def test_weights_of_another_model_are_refused_and_base_stays_as_it_was(small) -> None:
    pin(small, model="0" * 32)
    before = small.files("base")
    with pytest.raises(StageError, match=r"holds another model .* than the champion, stripes version 3 \(0{32}\)"):
        small.run("base")
    assert small.files("base") == before


def test_base_lists_all_batches_when_it_trains(sliced) -> None:
    data = load_data(sliced.workspace.data)
    assert sliced.read("base", "source.json") == {"data": data.digest, "batches": [data.batches[0].digest]}
    assert len(sliced.read("base", "history.csv")) == 1 + sliced.params.base.epochs


def test_a_pinned_model_is_copied_byte_for_byte_with_figures_of_its_own(small) -> None:
    before = small.files("base")
    pin(small)
    metrics = small.run("base", epochs=1, seed=7)
    after = small.files("base")
    assert {name for name in before if before[name] != after[name]} == {"metrics.json", "history.csv", "champion.json"}
    model, data = load_model(small.workspace.champion), load_data(small.workspace.data)
    for split in ("train", "val"):
        assert metrics[f"{split}_accuracy"] == pytest.approx(evaluate(model, data.split(split)).accuracy)
    header, row = small.read("base", "history.csv")
    assert header == "epoch,loss,train_accuracy,val_accuracy"
    assert [float(cell) for cell in row.split(",")] == [0, *list(metrics.values())[:3]]
    assert list(metrics) == list(json.loads(before["metrics.json"]))


def test_a_batch_and_a_class_that_arrive_after_the_pin_change_nothing_in_base(small) -> None:
    pin(small)
    small.run("base")
    before = small.files("base")
    small.add([0, 3] * 12, 1, new_classes=("dog",))
    small.run("base")
    assert small.files("base") == before


def test_a_pinned_batch_that_is_gone_is_named(small) -> None:
    pin(small, batches=("f" * 32,))
    with pytest.raises(DataError, match=f"lacks batches that are known\n  - {'f' * 32}"):
        small.run("base")


def test_a_champion_of_other_classes_than_the_datas_is_refused(small) -> None:
    other = build_model("nss.zoo:lenet", ("bee", "ant", "cow"), (1, 8, 8), seed=0)
    save_model(other, small.workspace.out("base") / "model")
    pin(small)
    with pytest.raises(DataError, match=r"\['bee', 'ant', 'cow'\] are not the first"):
        small.run("base")


def test_a_champion_whose_batches_have_no_validation_image_has_no_validation_accuracy(small) -> None:
    digest = small.add([0, 1, 2], 5)
    pin(small, batches=(digest,))
    metrics = small.run("base")
    assert math.isnan(metrics["val_accuracy"])
    assert 0 <= metrics["train_accuracy"] <= 1
