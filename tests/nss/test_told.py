"""Models of several tasks: told the task, told apart anew, and followed when the world drifts."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nss.base import train
from nss.critical import critical_neurons
from nss.data import Dataset, load_data
from nss.drift import shifted
from nss.errors import ModelError
from nss.evaluate import evaluate
from nss.extend import extend
from nss.extend_report import told_accuracy
from nss.finetune import fine_tune
from nss.ingest import demo
from nss.model import Classifier, build_model, load_model, model_digest, save_model
from nss.profile import Profile, profile
from nss.readapt import readapt
from nss.restructure import restructure
from nss.routing import PLAIN, Router, fit_blend, fit_mix
from nss.size import count_macs
from nss.slice import SemanticSlices, semantic_slices
from nss.told import features_of, route_anew, tasks_apart, within_task
from nss.wiring import Columns

TASKS = torch.tensor([0, 0, 1])


def test_each_image_is_left_the_classes_of_its_own_task() -> None:
    logits = torch.tensor([[1.0, 2.0, 9.0], [7.0, 2.0, 1.0]])
    told = within_task(logits, torch.tensor([0, 2]), TASKS)
    assert told.argmax(1).tolist() == [1, 2]
    # -log(e / (e + e^2)) for the first; the second has one class to choose from.
    expected = (torch.log1p(torch.tensor(1.0).exp()) + 0) / 2
    assert torch.allclose(F.cross_entropy(told, torch.tensor([0, 2])), expected)


def test_soft_targets_of_another_task_cost_nothing_and_no_nan() -> None:
    logits = torch.tensor([[1.0, 2.0, 9.0]], requires_grad=True)
    told = within_task(logits, torch.tensor([0]), TASKS)
    loss = F.cross_entropy(told, within_task(logits.detach(), torch.tensor([0]), TASKS).softmax(1))
    loss.backward()
    assert torch.isfinite(loss)
    assert cast(Tensor, logits.grad)[0, 2] == 0
    assert torch.isfinite(cast(Tensor, logits.grad)).all()


def test_without_tasks_nothing_is_taken_away() -> None:
    logits = torch.randn(3, 3, generator=torch.Generator().manual_seed(0))
    assert within_task(logits, torch.tensor([0, 1, 2]), None) is logits


def test_a_router_that_learns_anew_is_one_that_never_saw_anything_else() -> None:
    generator = torch.Generator().manual_seed(0)
    features, labels = torch.randn(90, 4, generator=generator), torch.arange(90) % 6
    used, fresh = Router({}, 4, (2, 2, 2)), Router({}, 4, (2, 2, 2))
    used.learn([(features.flip(0) * 3, labels)])
    used.learn_anew([(features[:40], labels[:40]), (features[40:], labels[40:])])
    fresh.learn([(features[:40], labels[:40]), (features[40:], labels[40:])])
    for name in ("counts", "means", "scatter"):
        assert torch.equal(getattr(used, name), getattr(fresh, name)), name
    weight, bias = fresh.scores(fresh.shrinkage())
    for gate, known in zip(used.gates, (4, 6), strict=True):
        # Scores less what all classes that the gate knows have in common: only differences between classes count.
        assert torch.equal(gate.weight, (weight[:known] - weight[:known].mean(0)).float())
        assert torch.equal(gate.bias, (bias[:known] - bias[:known].mean()).float())
        torch.testing.assert_close(gate.weight - gate.weight[0], (weight[:known] - weight[0]).float())
        torch.testing.assert_close(gate.bias - gate.bias[0], (bias[:known] - bias[0]).float())


@dataclass(frozen=True)
class Grown:
    """A model of the digits 0 to 7 that was taught 8 and 9, and what readapt needs of it."""

    data: Dataset
    model: Classifier
    slices: SemanticSlices
    profile: Profile


def known_of(model: Classifier, data: Dataset) -> tuple[Profile, SemanticSlices]:
    found = profile(model, data.split("train"), ("taylor",), windows=1)
    return found, semantic_slices(critical_neurons(found, "taylor", "cumulative", 0.95), found, n_slices=3)


@pytest.fixture(scope="module")
def grown(tmp_path_factory: pytest.TempPathFactory) -> Grown:
    folder = tmp_path_factory.mktemp("digits") / "data"
    demo(folder)
    data = load_data(folder)
    old, seen = data.of_classes(data.classes[:8]), data.split("train")
    mean, std = old.split("train").pixel_statistics()
    model = build_model("nss.zoo:lenet", old.classes, data.image_shape, 0, mean=mean, std=std)
    train(model, old, 8, 0, batch_size=32)
    found, slices = known_of(model, old)
    new = seen.images[seen.labels >= 8], seen.labels[seen.labels >= 8]
    # With fewer neurons drift costs more: there is something to regain.
    settings: dict[str, Any] = {"share": 0.7, "epochs": 6, "seed": 0}
    extended = extend(model, slices, new, profile=found, old_data=old, classes=("8", "9"), **settings).model
    found, slices = known_of(extended, data)
    return Grown(data, extended, slices, found)


def dark(data: Dataset, split: str) -> tuple[Tensor, Tensor]:
    part = data.split(split)
    return shifted(part.images, "brightness", 3, seed=0), part.labels


def test_an_extended_model_follows_drift_and_keeps_old_and_new_classes(grown: Grown, tmp_path: Path) -> None:
    data, test = grown.data, grown.data.split("test")
    before, drifted = evaluate(grown.model, test).accuracy, evaluate(grown.model, dark(data, "test")).accuracy
    found = readapt(grown.model, grown.slices, dark(data, "val"), data, profile=grown.profile, seed=0)
    after = evaluate(found.model, test).accuracy
    followed = evaluate(found.model, dark(data, "test")).accuracy
    assert followed > drifted + 0.3
    assert after > before - 0.03
    assert followed > told_accuracy(found.model, dark(data, "test"))["all"][0] - 0.05
    assert found.report.moved_share <= 0.2
    # The router's statistics are those of the moved features.
    model, router = found.model, found.model.network.router
    again = copy.deepcopy(model)
    part = data.split("val")
    route_anew(again, [(part.images, part.labels)])
    rows = torch.cat([features for features, _ in features_of(model, part)])
    mean = rows[part.labels == 3].mean(0)
    assert torch.allclose(again.network.router.means[3], mean, atol=1e-4)
    assert int(router.counts.sum()) > len(data.split("train"))
    save_model(model, tmp_path / "model")
    assert model_digest(load_model(tmp_path / "model")) == model_digest(model)


def test_without_old_data_the_router_stays_as_it_was(grown: Grown) -> None:
    found = readapt(grown.model, grown.slices, dark(grown.data, "val"), profile=grown.profile, epochs=1, seed=0)
    before = cast(Columns, grown.model.network).router.state_dict()
    after = cast(Columns, found.model.network).router.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert tasks_apart(found.model).tolist() == [0] * 8 + [1] * 2


def test_an_extended_model_becomes_smaller_loads_and_is_extended_again(grown: Grown, tmp_path: Path) -> None:
    data, val = grown.data, grown.data.split("val")
    smaller = restructure(grown.model, grown.slices, data, grown.profile, macs=0.4).model
    assert count_macs(smaller) <= 0.4 * count_macs(grown.model)
    assert evaluate(smaller, val).accuracy > evaluate(grown.model, val).accuracy - 0.02
    # Its columns are what the factory makes, cut: nothing is left to be cut a second time.
    assert smaller.spec.kept == {}
    sizes = [cast(nn.Linear, each.get_submodule("fc2")).out_features for each in smaller.network.columns]
    assert sizes == [len(each.kept["fc2"]) for each in smaller.spec.tasks]
    save_model(smaller, tmp_path / "model")
    again = load_model(tmp_path / "model")
    assert torch.equal(again(val.images), smaller(val.images))
    labels = torch.full((60,), 10)
    further = extend(again, None, (255 - val.images[:60], labels), classes=("inverted",), epochs=1, seed=0).model
    with torch.no_grad():
        assert torch.equal(further(val.images)[:, :10], smaller(val.images))


def test_the_router_of_a_smaller_model_learned_its_own_features(grown: Grown) -> None:
    smaller = restructure(grown.model, grown.slices, grown.data, grown.profile, macs=0.4, fine_tune_steps=5).model
    router, train_split = smaller.network.router, grown.data.split("train")
    assert router.counts.tolist() == torch.bincount(train_split.labels).tolist()
    rows = torch.cat([features for features, _ in features_of(smaller, train_split)])
    assert rows.shape[1] == smaller.spec.features < grown.model.spec.features
    torch.testing.assert_close(router.means[9], rows[train_split.labels == 9].mean(0), atol=1e-4, rtol=1e-4)
    # How it weighs its evidence is fitted to images that it did not learn from, of which the val split has some.
    val = grown.data.split("val")
    logits, features = smaller.network.parts(smaller.normalise(val.images))
    expected = fit_mix(router.evidence(logits, features).detach(), val.labels >= 8)
    torch.testing.assert_close(router.mixes[0], expected, rtol=1e-3, atol=1e-4)
    new = val.labels >= 8
    scores = router.gates[0](features)[new, 8:].detach()
    fewest = int(router.counts[8:].min())
    expected = fit_blend(logits[1][new].detach(), scores, val.labels[new] - 8, fewest)
    torch.testing.assert_close(router.blends[0], expected, rtol=1e-3, atol=1e-4)


def test_a_router_learns_anew_from_images_of_every_class_or_not_at_all(grown: Grown) -> None:
    model = copy.deepcopy(grown.model)
    eight = grown.data.of_classes(grown.data.classes[:8])
    with pytest.raises(ModelError, match="no image of 8, 9 to tell the tasks apart by"):
        fine_tune(model, eight, 1, 0)
    before = cast(Columns, grown.model.network).router.state_dict()
    assert all(torch.equal(value, before[name]) for name, value in model.network.router.state_dict().items())


def test_fine_tuning_an_extended_model_is_told_the_task(grown: Grown) -> None:
    """A loss over all classes leads through the router, whose odds are in the hundreds."""
    model = copy.deepcopy(grown.model)
    fine_tune(model, grown.data, 20, 0)
    val = grown.data.split("val")
    assert evaluate(model, val).accuracy > evaluate(grown.model, val).accuracy - 0.02


def test_a_router_that_learned_anew_weighs_its_evidence_by_images_held_out(grown: Grown) -> None:
    """Odds by other statistics are of another size: weights fitted to the earlier ones say nothing of them."""
    model, data = copy.deepcopy(grown.model), grown.data
    router = cast(Columns, model.network).router
    router.mixes[0] = torch.tensor([1e-6, 0.0, 0.0, 0.0])
    route_anew(model, [data.split("train")], [data.split("val")])
    assert evaluate(model, data.split("test")).accuracy > evaluate(grown.model, data.split("test")).accuracy - 0.01
    assert float(router.mixes[0, 0]) > 1e-4
    eight = data.of_classes(data.classes[:8])
    route_anew(model, [data.split("train")], [eight.split("val")])
    assert router.mixes.tolist() == [list(PLAIN)]
    fewest = int(torch.bincount(data.split("train").labels)[8:].min())
    torch.testing.assert_close(router.blends, torch.tensor([[1.0, 0.2 * fewest / (fewest + 10)]]))


def test_evidence_for_an_earlier_gate_is_what_the_model_without_the_later_columns_finds() -> None:
    generator = torch.Generator().manual_seed(0)
    three, two = Router({}, 4, (2, 3, 2)), Router({}, 4, (2, 3))
    for gate in three.gates:
        nn.init.normal_(cast(nn.Linear, gate).weight, generator=generator)
    two.gates[0].load_state_dict(three.gates[0].state_dict())
    logits, features = [torch.randn(7, size, generator=generator) for size in (2, 3, 2)], torch.randn(7, 4)
    with torch.no_grad():
        assert torch.equal(three.evidence(logits, features, 0), two.evidence(logits[:2], features))
        assert torch.equal(three.evidence(logits, features, 1), three.evidence(logits, features))
        assert not torch.equal(three.evidence(logits, features, 0), three.evidence(logits, features, 1))
