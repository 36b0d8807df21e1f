"""Room for new classes: condensing moves the old logits once or not at all, columns add and never take away."""

from __future__ import annotations

from types import ModuleType
from typing import Any, cast

import pytest
import torch
from tiny_helpers import error, first
from torch import Tensor

from nss.base import train
from nss.critical import critical_neurons
from nss.data import Dataset
from nss.errors import ExtendError
from nss.grow import Capacity, add_column, capacity, condense, features_of
from nss.model import Classifier, build_model, load_model, save_model
from nss.profile import Profile, profile
from nss.prune_weights import prune_weights
from nss.remove import remove
from nss.slice import SemanticSlices, semantic_slices
from nss.told import parts_of
from nss.wiring import Columns

Kit = tuple[Classifier, SemanticSlices, Profile, Dataset]


@pytest.fixture(autouse=True)
def few_features(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nss.routing.FEATURES", 200)


@pytest.fixture(scope="module")
def kit(networks: ModuleType) -> Kit:
    data = networks.coloured_data(240, classes=2)
    model = build_model("nss.zoo:vgg_small", data.classes, data.image_shape, 0)
    train(model, data, 2, 0, batch_size=32)
    found = profile(model, data.split("train"), ("taylor",))
    return model, semantic_slices(critical_neurons(found, "taylor", "cumulative", 0.9), found), found, data


def logits_of(model: Classifier, images: Tensor) -> Tensor:
    with torch.no_grad():
        answers: Tensor = model.eval()(images)
    return answers


def test_with_share_one_every_logit_stays_bit_for_bit(kit: Kit) -> None:
    model, slices, _, data = kit
    ready = condense(model, slices, data, share=1.0)
    assert ready.spec.tasks[0].kept == {}
    assert torch.equal(logits_of(ready, data.images), logits_of(model, data.images))


def test_condensing_keeps_the_share_of_each_layer_and_what_the_model_answers(kit: Kit) -> None:
    model, slices, found, data = kit
    ready = condense(model, slices, data, profile=found, share=0.5)
    assert {name: each.used for name, each in capacity(ready).items()} == {
        name: (total // 2,) for name, total in found.layers.items()
    }
    images = data.split("test").images
    masks = {name: first(total // 2, total) for name, total in found.layers.items()}
    plainly_cut = remove(model, masks)
    assert error(model, ready.eval(), images) < 0.2 * error(model, plainly_cut.eval(), images)


def test_the_original_is_left_as_it_was(kit: Kit) -> None:
    model, slices, found, data = kit
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    add_column(condense(model, slices, data, profile=found), ["cow"], 0.3, 0)
    assert model.spec.tasks == ()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_what_was_condensed_and_grown_changes_its_precision_alone(kit: Kit) -> None:
    model, slices, found, data = kit
    images = data.images[:3]
    ready = condense(model, slices, data, profile=found)
    before = [logits_of(each, images) for each in (model, ready)]
    add_column(ready, ["cow"], 0.3, 0).double()
    assert torch.equal(logits_of(ready, images), before[1])
    ready.double()
    assert torch.equal(logits_of(model, images), before[0])


def test_statistics_are_of_the_training_images_by_class(kit: Kit) -> None:
    model, slices, found, data = kit
    ready = condense(model, slices, data, profile=found, share=0.5)
    part = data.split("train")
    rows = torch.cat([features for features, _ in features_of(ready, part)])
    router = ready.network.router
    assert router.counts.tolist() == torch.bincount(part.labels).tolist()
    for label in range(2):
        assert torch.allclose(router.means[label], rows[part.labels == label].mean(0), atol=1e-4)


def test_a_column_more_leaves_the_old_logits_and_takes_the_free_neurons(kit: Kit) -> None:
    model, slices, found, data = kit
    ready = condense(model, slices, data, profile=found, share=0.5)
    two = add_column(ready, ["cow", "dog"], 0.5, 0)
    three = add_column(two, ["eel"], 0.25, 1)
    assert three.spec.classes == ("ant", "bee", "cow", "dog", "eel")
    assert capacity(two)["hidden"] == Capacity(256, (128, 128))
    assert (capacity(two)["hidden"].free, capacity(two)["hidden"].widened) == (0, 0)
    assert capacity(three)["hidden"].used == (128, 128, 64)
    assert capacity(three)["hidden"].widened == 64
    assert capacity(ready)["hidden"].free == 128
    for count in (1, 5, 64):
        images = data.images[:count]
        answers = logits_of(three, images)
        assert torch.equal(answers[:, :2], logits_of(ready, images))
        assert torch.equal(answers[:, :4], logits_of(two, images))


@pytest.mark.parametrize("width", [0.01, 0.3, 1.0])
def test_coupled_layers_of_a_column_have_one_width(width: float, networks: ModuleType) -> None:
    data = networks.coloured_data(48, classes=2)
    model = build_model("nss.zoo:resnet20", data.classes, data.image_shape, 0).eval()
    found = profile(model, data, ("taylor",))
    slices = semantic_slices(critical_neurons(found, "taylor", "cumulative", 0.9), found)
    grown = add_column(condense(model, slices, data, profile=found, share=1.0), ["cow"], width, 0)
    used = {name: each.used[1] for name, each in capacity(grown).items()}
    assert used["stem.0"] == used["blocks.2.conv2"] == max(1, round(width * 16))
    assert used["blocks.8.conv1"] == max(1, round(width * 64))
    column = grown.network.columns[1]
    assert column.blocks[8].conv1.in_channels == 64 + used["blocks.7.conv2"]
    assert logits_of(grown, data.images[:2]).shape == (2, 3)


def test_the_seed_decides_how_a_column_starts(kit: Kit) -> None:
    model, slices, found, data = kit
    ready = condense(model, slices, data, profile=found, share=0.5)

    def start(seed: int) -> list[Tensor]:
        torch.manual_seed(seed + 7)  # the surroundings do not
        return list(add_column(ready, ["cow"], 0.3, seed).network.columns[1].parameters())

    assert all(torch.equal(one, other) for one, other in zip(start(0), start(0), strict=True))
    assert not torch.equal(start(0)[0], start(1)[0])


def test_a_folder_brings_columns_gates_and_statistics_back(kit: Kit, tmp_path: Any) -> None:
    model, slices, found, data = kit
    grown = add_column(condense(model, slices, data, profile=found, share=0.5), ["cow"], 0.3, 0)
    save_model(grown, tmp_path / "grown")
    again = load_model(tmp_path / "grown")
    assert again.spec == grown.spec
    assert torch.equal(logits_of(again, data.images), logits_of(grown, data.images))
    further = [logits_of(add_column(each, ["dog"], 0.2, 3), data.images) for each in (again, grown)]
    assert torch.equal(*further)


def test_evidence_is_what_the_last_gate_goes_by(kit: Kit) -> None:
    model, slices, found, data = kit
    grown = add_column(condense(model, slices, data, profile=found, share=0.5), ["cow"], 0.3, 0)
    images = data.images[:5]
    ((logits, features, _),) = parts_of(grown, (images, torch.zeros(5, dtype=torch.int64)))
    seen = cast(Columns, grown.network).router.evidence(logits, features)
    answers = logits_of(grown, images)
    odds = answers[:, 2:].logsumexp(1) - answers[:, :2].logsumexp(1)
    assert torch.allclose(odds, seen[:, 0], atol=1e-4)


def test_what_cannot_be_condensed_is_refused(kit: Kit, networks: ModuleType) -> None:
    model, slices, found, data = kit
    with pytest.raises(ExtendError, match="before"):
        condense(condense(model, slices, data, profile=found), slices, data)
    with pytest.raises(ExtendError, match="no image of bee"):
        condense(model, slices, (data.images[:1], data.labels[:1]), profile=found)
    with pytest.raises(ExtendError, match="does not know"):
        condense(model, slices, (data.images[:3], torch.tensor([0, 1, 5])), profile=found)
    with pytest.raises(ExtendError, match="another model"):
        condense(networks.zoo_model("lenet", classes=data.classes), slices, data, profile=found)
    with pytest.raises(ExtendError, match="share is 0"):
        condense(model, slices, data, profile=found, share=0.0)
    with pytest.raises(ExtendError, match="masked"):
        condense(prune_weights(model, sparsity=0.5), slices, data, profile=found)  # type: ignore[arg-type]
    with pytest.raises(ExtendError, match="how it is built"):
        condense(model.network, slices, data, profile=found)  # type: ignore[arg-type]
    with pytest.raises(ExtendError, match="other classes"):
        condense(networks.zoo_model("vgg_small"), slices, data, profile=found)


def test_a_restructured_model_can_be_condensed(kit: Kit) -> None:
    model, _, _, data = kit
    smaller = remove(model, {"hidden": first(100, 256)})
    assert isinstance(smaller, Classifier)
    found = profile(smaller, data, ("taylor",))
    ready = condense(smaller, semantic_slices(critical_neurons(found, "taylor"), found), data, profile=found, share=0.5)
    assert capacity(ready)["hidden"] == Capacity(256, (50,))
    assert isinstance(ready.network, Columns)
