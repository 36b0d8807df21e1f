"""What is built can be kept: what model.json has no room for is refused at once, precision and numbers come back."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from nss.errors import ModelError
from nss.files import file_digest
from nss.model import build_model, load_model, model_digest, save_model
from nss.tensor_files import read_tensors, write_tensors


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"classes": range(3)}, r"classes is \[0, 1, 2\]"),
        ({"classes": ["", "a"]}, "at least two different names"),
        ({"mean": [float("nan")]}, r"mean is \[nan\]"),
        ({"input_shape": (28, 28)}, r"input_shape is \[28, 28\]"),
        ({"input_shape": (1, 0, 28)}, r"input_shape is \[1, 0, 28\]"),
        ({"input_shape": 28}, "input_shape is 28"),
        ({"arguments": {"norm_layer": nn.BatchNorm2d}}, "model.json cannot keep the arguments"),
    ],
)
def test_what_a_model_folder_could_not_keep_is_refused_when_the_model_is_built(
    wrong: dict[str, Any], message: str
) -> None:
    given = {"classes": ("a", "b"), "input_shape": (1, 28, 28), "seed": 0, **wrong}
    with pytest.raises(ModelError, match=message):
        build_model("nss.zoo:lenet", **given)


@pytest.mark.parametrize("kind", [np.float32, np.array, torch.tensor, list])
def test_numbers_of_numpy_and_torch_are_kept_as_numbers(tmp_path: Path, kind: Callable[[Any], Any]) -> None:
    pixels: Any = [kind(0.5)] * 3 if kind is np.float32 else kind([0.5, 0.5, 0.5])
    shape: Any = np.array([3, 28, 28])
    model = build_model("nss.zoo:lenet", ("a", "b"), shape, 0, mean=pixels, std=pixels)
    save_model(model, tmp_path / "m")
    spec = load_model(tmp_path / "m").spec
    assert spec == model.spec
    assert (spec.input_shape, spec.mean, spec.std) == ((3, 28, 28), (0.5,) * 3, (0.5,) * 3)


def test_whole_numbers_as_mean_and_deviation_make_the_same_model_and_the_same_folder(tmp_path: Path) -> None:
    for name, mean, std in (("whole", (0,), (1,)), ("floats", (0.0,), (1.0,))):
        save_model(build_model("nss.zoo:lenet", ("a", "b"), (1, 8, 8), 0, mean=mean, std=std), tmp_path / name)
    for name in ("model.json", "model.safetensors"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "floats" / name).read_bytes()


def test_a_folder_that_was_written_with_whole_numbers_loads_as_the_same_model(
    tmp_path: Path, networks: ModuleType
) -> None:
    model, folder = build_model("nss.zoo:lenet", ("a", "b"), (1, 8, 8), 0, mean=(0,), std=(1,)).eval(), tmp_path / "m"
    save_model(model, folder)
    tensors, _ = read_tensors(folder / "model.safetensors", ModelError)
    whole = {name: tensors[name].long() for name in ("normalise.mean", "normalise.std")}
    write_tensors(folder / "model.safetensors", {**tensors, **whole}, {"format": 1})
    said = json.loads((folder / "model.json").read_text())
    said.update(mean=[0], std=[1], weights=file_digest(folder / "model.safetensors"))
    (folder / "model.json").write_text(json.dumps(said))
    again, images = load_model(folder), networks.floats(4, (1, 8, 8))
    assert model_digest(again) == model_digest(model)
    assert torch.equal(again(images), model(images))


@pytest.mark.parametrize("kind", [torch.float64, torch.bfloat16, torch.float16])
def test_a_model_of_another_precision_loads_in_that_precision(
    tmp_path: Path, kind: torch.dtype, networks: ModuleType
) -> None:
    model = networks.zoo_model("resnet20").to(kind)
    save_model(model, tmp_path / "m")
    loaded = load_model(tmp_path / "m")
    assert {each.dtype for each in loaded.parameters()} == {kind}
    assert model_digest(loaded) == model_digest(model)
    if kind is torch.float64:
        assert torch.equal(loaded(networks.pictures(4)), model(networks.pictures(4)))
