"""What a restructuring is measured and refitted on: the first images of each category, and no others are read."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch

import nss
from nss.apply import apply_plan, calibration
from nss.data import Batch
from nss.errors import DataError, ModelError
from nss.plan import RestructurePlan
from nss.planner import Planner


def test_the_first_training_images_of_each_category_are_taken_of_any_kind_of_data(networks: ModuleType) -> None:
    data = networks.coloured_data(60)
    train = data.split("train")
    pair = train.images, train.labels
    rows = torch.tensor([0, 1, 2, 3, 4, 5])  # the two categories take turns
    for each in (data, train, pair, [(pair[0][:3], pair[1][:3]), (pair[0][3:], pair[1][3:])]):
        images, labels = calibration(each, 3)
        assert torch.equal(images, pair[0][rows])
        assert labels.tolist() == [0, 1, 0, 1, 0, 1]
    with pytest.raises(ModelError, match="no images to train on"):
        calibration([], 3)


def test_no_other_image_of_a_data_set_is_read_however_often_a_plan_is_made_and_applied(
    networks: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = networks.coloured_data(600)
    model = nss.build_model("nss.zoo:lenet", data.classes, data.image_shape, seed=0).eval()
    profiled = nss.profile(model, data.split("train"), ("taylor",))
    slices = nss.semantic_slices(nss.critical_neurons(profiled, "taylor"), profiled)
    read: list[int] = []
    images = Batch.images.fget

    def counted(batch: Batch) -> torch.Tensor:
        read.append(len(batch))
        return images(batch)

    monkeypatch.setattr(Batch, "images", property(counted))
    monkeypatch.setattr("nss.planner.PROBED", 5)
    plan = Planner(model, slices, data, profiled).plan(macs=0.5)
    apply_plan(model, plan, data, profiled, images=12)
    assert read == [2 * 5, 2 * 6], "of 400"
    assert isinstance(plan, RestructurePlan)


def test_a_generator_that_the_profile_has_read_is_refused_with_what_to_give(networks: ModuleType) -> None:
    model = networks.zoo_model("lenet")
    images, labels = networks.pictures(16), torch.arange(16) % 4
    profiled = nss.profile(model, (images, labels), ("taylor",))
    slices = nss.semantic_slices(nss.critical_neurons(profiled, "taylor"), profiled)
    batches = ((images[rows], labels[rows]) for rows in torch.arange(16).split(4))
    with pytest.raises(DataError, match="a generator can be read only once"):
        nss.restructure(model, slices, batches, macs=0.5)
