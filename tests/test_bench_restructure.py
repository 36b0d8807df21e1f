"""Restructuring's benchmark: every method is fine-tuned at the rate that suits it, chosen on validation images."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from bench import common, restructure
from nss.data import SPLITS, Batch, Dataset
from nss.evaluate import evaluate
from nss.finetune import fine_tune
from nss.level import level_classes
from nss.model import Classifier, ModelSpec, model_digest

SHAPE = (1, 4, 4)
SIZE = restructure.Size((0.5,), images=24, epochs=20)


@pytest.fixture
def model() -> Classifier:
    """Takes dark images for light ones."""
    network = nn.Sequential(nn.Flatten(), nn.Linear(16, 2, bias=False))
    network[1].weight.data = torch.tensor([[0.1], [-0.1]]).expand(2, 16).clone()
    return Classifier(network, ModelSpec("tiny:network", ("dark", "light"), SHAPE, (0.5,), (0.25,))).eval()


def subject(model: Classifier, val_labels: Tensor | None = None) -> restructure._Subject:
    """Dark and light images in all splits; val_labels: in place of the right ones."""
    labels = torch.arange(90) % 2
    noise = torch.randint(0, 100, (90, *SHAPE), generator=torch.Generator().manual_seed(1))
    images = (noise + 120 * labels.view(-1, 1, 1, 1)).byte()
    split = torch.cat([torch.full((30,), SPLITS.index(name)) for name in SPLITS]).byte()
    if val_labels is not None:
        labels = labels.masked_scatter(split == SPLITS.index("val"), val_labels)
    found = restructure._Subject("tiny", "tiny:network", 0)
    found.data = Dataset(model.spec.classes, SHAPE, (Batch("0" * 32, images, labels, split),))
    found.model = model
    return found


def test_the_rate_is_the_one_that_is_best_on_validation_images(
    model: Classifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(restructure, "BATCH", 8)
    monkeypatch.setattr(restructure, "RATES", (1e-9, 0.05))
    before, of = model_digest(model), subject(model)
    tuned, rate = of.fine_tuned(model, SIZE)
    assert rate == 0.05
    twin, (images, labels) = copy.deepcopy(model), of.train
    fine_tune(twin, (images[:24], labels[:24]), 60, 0, learning_rate=0.05, batch_size=8)
    assert model_digest(tuned) == model_digest(twin)
    assert model_digest(model) == before
    answers = model(of.data.split("val").images[:]).argmax(1)
    assert int((answers != of.data.split("val").labels[:]).sum()) > 0
    assert subject(model, answers).fine_tuned(model, SIZE)[1] == 1e-9


def test_of_equally_good_rates_the_first_counts(model: Classifier, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(restructure, "RATES", (2e-9, 1e-9))
    assert subject(model).fine_tuned(model, SIZE)[1] == 2e-9


def test_what_levelling_makes_of_a_saved_model_is_measured_once_and_stands_beside_the_rest(
    model: Classifier, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(restructure, "CACHE", tmp_path)
    monkeypatch.setattr(common, "CACHE", tmp_path)
    monkeypatch.setattr(restructure, "level_classes", lambda *given: level_classes(*given, least=1))
    network = nn.Sequential(nn.Flatten(), nn.Linear(16, 2))
    network[1].weight.data = torch.tensor([[-0.1], [0.1]]).expand(2, 16).clone()
    network[1].bias.data = torch.tensor([2.1, 0.0])
    askew = Classifier(network, model.spec).eval()
    saved = {tmp_path / "restructured" / "it": askew}
    monkeypatch.setattr(restructure, "load_model", lambda path: copy.deepcopy(saved[path]))
    of, row = subject(askew), {"saved": "it", "weights": model_digest(askew), "accuracy": 0.25}
    test = of.data.split("test")
    before = evaluate(askew, test)
    (found,) = restructure._levelled(of, {"seed": 0}, [row])
    level_classes(askew, of.data.split("val"), least=1)
    after = evaluate(askew, test)
    assert after.worst_accuracy > before.worst_accuracy
    assert found == {**row, "accuracy_level": after.accuracy, "worst_level": after.worst_accuracy}
    monkeypatch.delattr(restructure, "load_model")
    assert restructure._levelled(of, {"seed": 0}, [row]) == [found]


def test_a_table_that_no_row_has_figures_for_is_left_out() -> None:
    row = {"macs": 0.5, "accuracy_before": 0.8, "accuracy": 0.9, "params": 0.5}
    titles = [table.title.partition(": ")[2] for table in restructure.tables([row])]
    assert titles == ["before any gradient step", "after fine-tuning", "size"]
    titles = [table.title.partition(": ")[2] for table in restructure.tables([row | {"worst_level": 0.7}])]
    assert titles == ["before any gradient step", "after fine-tuning", "after fine-tuning, levelled", "size"]
