"""Triage: each decision from hand-made evidence, and how often it is wrong about the digits."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from nss.base import train
from nss.data import Batch, Dataset, load_data
from nss.drift import KINDS, shifted
from nss.errors import ModelError, NssError, ParamsError
from nss.features import penultimate_features
from nss.ingest import demo
from nss.model import Classifier, build_model
from nss.predict import predict
from nss.triage import Look, TriageSettings, changed, new_labels, over_budget, triage

PLAIN = TriageSettings()


def look(count: int, seed: int, shift: float = 0.0, wrong: int = 0) -> Look:
    """Features of two classes in turn; the first `wrong` images are answered wrong."""
    features = torch.randn(count, 5, generator=torch.Generator().manual_seed(seed)) + shift
    return Look(features, torch.arange(count) >= wrong, torch.arange(count) % 2)


def test_new_labels_with_enough_images_are_learned() -> None:
    found = new_labels({"truck": 10, "ship": 9, "plane": 50}, PLAIN)
    assert found.needed
    assert found.why == "new classes: truck (10 images), plane (50 images)"
    assert found.evidence == {"images": {"truck": 10, "ship": 9, "plane": 50}, "min_class_images": 10}


def test_new_labels_with_too_few_images_and_none_at_all_wait() -> None:
    few, none = new_labels({"truck": 9}, PLAIN), new_labels({}, PLAIN)
    assert (few.needed, none.needed) == (False, False)
    assert few.why == "too few images of new classes: truck (9 images), 10 needed"
    assert none.why == "no new classes"


def test_what_looks_alike_has_not_changed() -> None:
    found = changed(look(80, 0), look(80, 1), PLAIN)
    assert not found.needed
    assert found.why.startswith("no drift (effect 0")
    assert found.evidence["drift"]["found"] is found.evidence["accuracy"]["found_lower"] is False
    assert json.loads(json.dumps(found.evidence, allow_nan=False)) == found.evidence


def test_drifted_features_are_followed_though_the_answers_are_right() -> None:
    found = changed(look(80, 0), look(80, 1, shift=1.0), PLAIN)
    assert found.needed
    assert found.why.startswith("features of the new images have drifted: effect 0.")
    assert found.evidence["drift"]["p_value"] == 0.001
    assert found.evidence["accuracy"]["found_lower"] is False


def test_a_lost_accuracy_is_followed_though_the_features_are_alike() -> None:
    found = changed(look(80, 0, wrong=2), look(80, 1, wrong=14), PLAIN)
    assert found.needed
    assert found.why.startswith("accuracy on the new images is 0.825, 0.975 was to be expected, p 0.00")
    assert found.evidence["accuracy"]["drop"] == pytest.approx(0.15)
    assert found.evidence["drift"]["found"] is False


def test_both_reasons_are_named() -> None:
    why = changed(look(80, 0), look(80, 1, shift=1.0, wrong=20), PLAIN).why
    assert "features of the new images have drifted" in why
    assert "; accuracy on the new images is 0.750" in why


def test_an_effect_or_a_drop_that_is_too_small_to_matter_is_not_followed() -> None:
    drifted, worse = (look(80, 0), look(80, 1, shift=1.0)), (look(80, 0), look(80, 1, wrong=14))
    assert not changed(*drifted, TriageSettings(min_effect=0.9)).needed
    assert not changed(*worse, TriageSettings(max_drop=0.18)).needed
    assert changed(*worse, TriageSettings(max_drop=0.17)).needed


def test_half_of_alpha_is_the_level_of_each_test() -> None:
    known, new = look(80, 0), look(80, 1, wrong=5)
    p = changed(known, new, PLAIN).evidence["accuracy"]["p_value"]
    assert 0.01 < p < 0.05
    assert changed(known, new, TriageSettings(alpha=2 * p + 1e-9)).needed
    assert not changed(known, new, TriageSettings(alpha=2 * p - 1e-9)).needed


@pytest.mark.parametrize(("known", "new", "side"), [(80, 29, "29 new"), (29, 80, "29 known")])
def test_too_few_images_decide_nothing_and_say_so(known: int, new: int, side: str) -> None:
    found = changed(look(known, 0), look(new, 1, shift=5.0, wrong=new), PLAIN)
    assert not found.needed
    assert found.why == f"cannot tell: {side} images to compare, 30 are needed"
    assert found.evidence["new_images"] == new
    assert changed(look(80, 0), look(30, 1, shift=5.0), PLAIN).needed


def test_images_of_classes_that_cannot_be_compared_do_not_count() -> None:
    new = look(80, 1, shift=5.0, wrong=80)
    found = changed(look(80, 0), Look(new.features, new.right, new.labels + 2), PLAIN)
    assert found.why == "cannot tell: 0 new images to compare, 30 are needed"
    assert found.evidence["accuracy"]["drop"] is None


def test_each_budget_that_is_exceeded_is_named() -> None:
    settings = TriageSettings(budgets={"macs": 1e6, "latency_ms": 5, "bytes": 100})
    found = over_budget({"macs": 2e6, "latency_ms": 5.5, "bytes": 100, "parameters": 1e9}, settings)
    assert found.needed
    assert found.why == "macs 2,000,000 (1,000,000 allowed); latency_ms 5.5 (5 allowed)"
    assert found.evidence["bytes"] == {"found": 100, "allowed": 100}
    within = over_budget({"macs": 1e6, "latency_ms": 1, "bytes": 1}, settings)
    assert (within.needed, within.why) == (False, "within its budgets")
    assert over_budget({"macs": 1e12}, PLAIN).why == "no budget is set"


@pytest.mark.parametrize("sizes", [{}, {"macs": float("nan")}, {"macs": float("inf")}])
def test_a_budget_without_its_measure_is_refused(sizes: dict[str, float]) -> None:
    with pytest.raises(ModelError, match="a budget for macs"):
        over_budget(sizes, TriageSettings(budgets={"macs": 1}))


def test_settings_out_of_range_are_listed_together() -> None:
    with pytest.raises(ParamsError) as caught:
        TriageSettings(
            alpha=0.01, min_effect=-1, max_drop=2, min_images=1, min_class_images=0, max_images=0,
            permutations=198, budgets={"size": 1, "macs": 0},
        )  # fmt: skip
    assert [text.partition(":")[0] for text in caught.value.problems] == [
        "min_effect", "max_drop", "min_images", "min_class_images", "max_images", "permutations", "budgets", "budgets"
    ]  # fmt: skip
    assert "from 199" in caught.value.problems[5]
    TriageSettings(alpha=0.01, permutations=199)
    for alpha in (0.0, 1.0, float("nan")):
        with pytest.raises(ParamsError, match="alpha"):
            TriageSettings(alpha=alpha)


def data_of(images: Tensor, labels: Tensor, classes: tuple[str, ...]) -> Dataset:
    split = torch.where(torch.arange(len(labels)) % 2 == 0, 0, 1).to(torch.uint8)
    return Dataset(classes, (1, 16, 16), (Batch("0" * 32, images, labels, split),))


def test_a_whole_data_set_is_compared_by_what_was_not_trained_on(networks: ModuleType) -> None:
    model, names = networks.zoo_model("lenet"), (*networks.CLASSES, "emu")
    known = data_of(networks.pictures(160), torch.arange(160) // 2 % 4, networks.CLASSES)
    new = data_of(networks.pictures(100, seed=1), torch.arange(100) // 2 % 5, names)
    before = [each.training for each in model.train().modules()]
    found = triage(model, known, new)
    assert [each.training for each in model.modules()] == before
    evidence = found.readapt.evidence
    assert (evidence["known_images"], evidence["new_images"]) == (80, 80)
    assert found.extend.evidence["images"] == {"emu": 20}
    assert found.needed[0] == "extend"
    assert found.restructure.why == "no budget is set"
    assert json.loads(json.dumps(found.to_dict(), allow_nan=False))["extend"]["needed"] is True
    pairs = triage(model, known.split("val"), (new.images, new.labels), classes=names)
    assert pairs == found
    assert triage(model, known.split("val"), (new.images, new.labels)).extend.evidence["images"] == {"4": 20}


def test_no_more_images_are_looked_at_than_allowed(networks: ModuleType) -> None:
    pair = networks.pictures(200), torch.arange(200) % 4
    evidence = triage(networks.zoo_model("lenet"), pair, pair, settings=TriageSettings(max_images=60)).readapt.evidence
    assert (evidence["known_images"], evidence["new_images"]) == (60, 60)


def test_without_images_to_compare_nothing_has_changed(networks: ModuleType) -> None:
    model, pair = networks.zoo_model("lenet"), (networks.pictures(40), torch.arange(40) % 4)
    nothing = networks.pictures(0), torch.zeros(0, dtype=torch.int64)
    for new in (None, nothing):
        found = triage(model, pair, new, sizes={"macs": 9}, settings=TriageSettings(budgets={"macs": 8}))
        assert found.needed == ("restructure",)
        assert found.readapt.why == found.extend.why == "no new images"
    strangers = triage(model, pair, (pair[0], pair[1] + 4))
    assert strangers.needed == ("extend",)
    assert strangers.readapt.why == "cannot tell: no new images of known classes"
    assert triage(model, nothing, pair).readapt.why == "cannot tell: no known images that were not trained on"


def test_known_images_of_an_unknown_class_are_refused(networks: ModuleType) -> None:
    pair = networks.pictures(40), torch.arange(40) % 5
    with pytest.raises(ModelError, match="labels from 0 to 4"):
        triage(networks.zoo_model("lenet"), pair, pair)
    with pytest.raises(NssError):
        triage(networks.zoo_model("lenet"), (pair[0], pair[1] % 4), (pair[0], pair[1] - 2))


class Digits:
    """A small trained model and the held-out digits."""

    def __init__(self, folder: Path) -> None:
        demo(folder)
        data = load_data(folder)
        mean, std = data.pixel_statistics()
        self.model: Classifier = build_model("nss.zoo:lenet", data.classes, data.image_shape, 0, mean=mean, std=std)
        train(self.model, data, epochs=4, seed=0)
        parts = [data.split(name) for name in ("val", "test")]
        self.images = torch.cat([part.images for part in parts])
        self.labels = torch.cat([part.labels for part in parts])
        self.plain = self.look(self.images, torch.arange(len(self.labels)))

    def look(self, images: Tensor, rows: Tensor) -> Look:
        logits, _ = predict(self.model, (images, self.labels[rows]))
        right = logits.argmax(1) == self.labels[rows]
        return Look(penultimate_features(self.model, images), right, self.labels[rows])

    def halves(self, seed: int) -> tuple[Look, Tensor]:
        order = torch.randperm(len(self.labels), generator=torch.Generator().manual_seed(seed))
        known, new = order[: len(order) // 2], order[len(order) // 2 :]
        return pick(self.plain, known), new


def pick(all_of: Look, rows: Tensor) -> Look:
    return Look(all_of.features[rows], all_of.right[rows], all_of.labels[rows])


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Digits:
    return Digits(tmp_path_factory.mktemp("digits") / "data")


def test_at_most_seven_of_a_hundred_unchanged_batches_of_digits_are_called_changed(digits: Digits) -> None:
    alarms = 0
    for seed in range(100):
        known, rows = digits.halves(seed)
        alarms += changed(known, pick(digits.plain, rows), TriageSettings(seed=seed)).needed
    assert alarms <= 7


def test_another_mix_of_digits_is_no_change(digits: Digits) -> None:
    alarms = 0
    for seed in range(30):
        known, rows = digits.halves(seed)
        rows = rows[digits.labels[rows] < 5]
        alarms += changed(known, pick(digits.plain, rows), TriageSettings(seed=seed)).needed
    assert alarms <= 4


@pytest.mark.parametrize("kind", KINDS)
def test_digits_that_have_drifted_are_always_found(digits: Digits, kind: str) -> None:
    for seed in range(3):
        known, rows = digits.halves(seed)
        drifted = digits.look(shifted(digits.images[rows], kind, 3, seed), rows)
        assert changed(known, drifted, TriageSettings(seed=seed)).needed
