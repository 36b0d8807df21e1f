"""A plan as data: written and read back whole, and refused, with the layer named, where it does not fit."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import FrozenInstanceError, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from nss.errors import RestructureError
from nss.model import Classifier, model_digest
from nss.plan import LayerPlan, RestructurePlan
from nss.remove import remove
from nss.sites import Sites, find_sites


@pytest.fixture
def model(networks: ModuleType) -> Classifier:
    found = networks.zoo_model("lenet")
    assert isinstance(found, Classifier)
    return found


@pytest.fixture
def sites(model: Classifier) -> Sites:
    return find_sites(model.network, model.spec.input_shape)


def layer(total: int, kept: tuple[Any, ...], **other: float) -> LayerPlan:
    return LayerPlan(total, kept, **{"missing": 0.125, "error": 1 / 3, "critical": 0.75, **other})


@pytest.fixture
def plan(model: Classifier) -> RestructurePlan:
    layers = {
        "conv1": layer(16, (0, 3, 5, 15)),
        "conv2": layer(32, tuple(range(32))),
        "fc1": layer(120, (119, 7), missing=0.0),
        "fc2": layer(84, (83,)),
    }
    return RestructurePlan(model_digest(model), {"macs": 0.5}, layers, 123456789, 4321, 0.4999, 1e-3)


def test_a_plan_is_read_back_as_it_was_written(plan: RestructurePlan, tmp_path: Path) -> None:
    plan.save(tmp_path / "plan.json")
    assert RestructurePlan.load(tmp_path / "plan.json") == plan
    assert RestructurePlan.load(str(tmp_path / "plan.json")).to_dict() == plan.to_dict()


def test_equal_plans_are_equal_bytes_and_plain_json(plan: RestructurePlan, tmp_path: Path) -> None:
    plan.save(tmp_path / "one.json")
    RestructurePlan.load(tmp_path / "one.json").save(tmp_path / "two.json")
    assert (tmp_path / "one.json").read_bytes() == (tmp_path / "two.json").read_bytes()
    content = json.loads((tmp_path / "one.json").read_text())
    assert content == json.loads(json.dumps(plan.to_dict()))
    assert content["layers"]["conv1"]["kept"] == [0, 3, 5, 15]
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("one")] == ["one.json"]


def test_the_neurons_are_masks(plan: RestructurePlan, model: Classifier) -> None:
    masks = plan.neurons()
    assert {name: len(mask) for name, mask in masks.items()} == {"conv1": 16, "conv2": 32, "fc1": 120, "fc2": 84}
    assert masks["conv1"].nonzero()[:, 0].tolist() == [0, 3, 5, 15]
    assert masks["fc1"].nonzero()[:, 0].tolist() == [7, 119]
    assert masks["conv2"].dtype == torch.bool
    smaller = remove(model, masks)
    assert (smaller.network.conv1.out_channels, smaller.network.fc2.out_features) == (4, 1)


def test_a_plan_cannot_be_changed(plan: RestructurePlan) -> None:
    with pytest.raises(FrozenInstanceError):
        plan.macs = 1  # type: ignore[misc]
    with pytest.raises(FrozenInstanceError):
        plan.layers["conv1"].kept = ()  # type: ignore[misc]


def test_a_plan_that_fits_is_accepted_and_so_is_one_that_names_fewer_layers(
    plan: RestructurePlan, model: Classifier, sites: Sites
) -> None:
    plan.check(model, sites)
    replace(plan, layers={"fc1": plan.layers["fc1"]}).check(model, sites)
    replace(plan, layers={}).check(model, sites)


@pytest.mark.parametrize(
    ("name", "wrong", "message"),
    [
        ("conv1", layer(16, (0, 3, 3)), "neuron 3 is named twice"),
        ("conv1", layer(16, (0, 16)), "neuron 16 does not exist"),
        ("fc2", layer(84, (-1, 4)), "neuron -1 does not exist"),
        ("conv2", layer(32, ()), "no neuron is kept"),
    ],
)
def test_neurons_that_do_not_fit_are_refused_and_the_layer_is_named(
    plan: RestructurePlan, model: Classifier, sites: Sites, name: str, wrong: LayerPlan, message: str
) -> None:
    broken = replace(plan, layers={**plan.layers, name: wrong})
    with pytest.raises(RestructureError, match=message) as caught:
        broken.check(model, sites)
    assert caught.value.where == name
    assert caught.value.allowed


@pytest.mark.parametrize("total", [15, 17])
def test_a_layer_of_another_size_is_refused(plan: RestructurePlan, model: Classifier, sites: Sites, total: int) -> None:
    with pytest.raises(RestructureError) as caught:
        replace(plan, layers={"conv1": layer(total, (0, 3))}).check(model, sites)
    assert caught.value.where == "conv1"
    assert "16" in caught.value.allowed or "15" in caught.value.allowed
    # Neuron 14 of 16 exists: to say that it does not would mislead.
    assert "neuron 14 does not exist" not in str(caught.value)


@pytest.mark.parametrize("kept", [("a",), (1.0,), (None,), ("0", "1")])
def test_neurons_that_are_no_whole_numbers_are_refused(
    plan: RestructurePlan, model: Classifier, sites: Sites, kept: tuple[Any, ...]
) -> None:
    with pytest.raises(RestructureError) as caught:
        replace(plan, layers={"conv1": layer(16, kept)}).check(model, sites)
    assert caught.value.where == "conv1"


def test_a_layer_that_does_not_exist_is_refused_and_those_that_do_are_listed(
    plan: RestructurePlan, model: Classifier, sites: Sites
) -> None:
    for name in ("conv3", "fc3"):  # fc3 is the class head
        with pytest.raises(RestructureError, match=f"'{name}'") as caught:
            replace(plan, layers={name: layer(4, (0,))}).check(model, sites)
        assert caught.value.allowed == "conv1, conv2, fc1, fc2"


def test_a_plan_for_another_model_is_refused(plan: RestructurePlan, networks: ModuleType) -> None:
    other = networks.zoo_model("lenet", seed=1)
    with pytest.raises(RestructureError, match="another model"):
        plan.check(other, find_sites(other.network, other.spec.input_shape))


def without(key: str) -> Callable[[dict[str, Any]], Any]:
    return lambda content: {name: value for name, value in content.items() if name != key}


DAMAGES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "no model": without("model"),
    "no budget": without("budget"),
    "no layers": without("layers"),
    "no macs_share": without("macs_share"),
    "no format": without("format"),
    "another format": lambda content: {**content, "format": 2},
    "something more": lambda content: {**content, "colour": "blue"},
    "a list": lambda content: [content],
    "a number": lambda content: 7,
    "nothing": lambda content: None,
    "layers as a list": lambda content: {**content, "layers": [1, 2]},
    "a layer as a number": lambda content: {**content, "layers": {"conv1": 3}},
    "a layer without kept": lambda content: {**content, "layers": {"conv1": without("kept")(content["layers"]["fc2"])}},
    "kept as a number": lambda content: {**content, "layers": {"conv1": {**content["layers"]["fc2"], "kept": 3}}},
    "a layer with more": lambda content: {**content, "layers": {"conv1": {**content["layers"]["fc2"], "colour": 1}}},
}


@pytest.mark.parametrize("how", DAMAGES)
def test_a_file_that_holds_no_plan_is_refused_and_named(plan: RestructurePlan, tmp_path: Path, how: str) -> None:
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(DAMAGES[how](json.loads(json.dumps(plan.to_dict())))))
    with pytest.raises(RestructureError) as caught:
        RestructurePlan.load(path)
    assert caught.value.where == str(path)


@pytest.mark.parametrize("content", [b"", b'{"format": 1, "mod', b"\xff\xfe\x00", b"PK\x03\x04"])
def test_a_damaged_file_is_refused_and_named(plan: RestructurePlan, tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "plan.json"
    path.write_bytes(content)
    with pytest.raises(RestructureError) as caught:
        RestructurePlan.load(path)
    assert caught.value.where == str(path)


def test_a_missing_file_is_refused_and_named(tmp_path: Path) -> None:
    with pytest.raises(RestructureError, match="missing") as caught:
        RestructurePlan.load(tmp_path / "plan.json")
    assert caught.value.where == str(tmp_path / "plan.json")
