"""model.json, read: what save_model writes comes back equal, and each field that is wrong is named."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from nss.errors import ModelError
from nss.model_spec import ModelSpec, Task, read_spec

FULL = ModelSpec(
    factory="nss.zoo:lenet",
    classes=("b", "a", "c"),
    input_shape=(3, 8, 6),
    mean=(0.5, 0.25, 0),
    std=(1, 0.5, 0.25),
    arguments={"width": 2, "names": ["x"]},
    kept={"conv1": (0, 3)},
    parent="0" * 32,
    tasks=(Task(2, {"conv1": (0,)}), Task(1, {})),
    views={"relu1": 0, "relu2": 4},
    features=7,
)


def write(path: Path, **changes: Any) -> Path:
    content = {"format": 1, **asdict(FULL), "weights": "1" * 32, **changes}
    path.write_text(json.dumps({key: value for key, value in content.items() if value != "absent"}))
    return path


def test_a_full_spec_comes_back_equal(tmp_path: Path) -> None:
    assert read_spec(write(tmp_path / "model.json")) == (FULL, "1" * 32)


def test_means_and_deviations_are_floats_however_they_were_written(tmp_path: Path) -> None:
    found, _ = read_spec(write(tmp_path / "model.json", mean=[0, 1, 0.5], std=[1, 2, 3]))
    assert (found.mean, found.std) == ((0.0, 1.0, 0.5), (1.0, 2.0, 3.0))
    for spec in (found, FULL):
        assert {type(each) for each in (*spec.mean, *spec.std)} == {float}


def test_a_spec_from_before_there_were_tasks_has_none(tmp_path: Path) -> None:
    old = write(tmp_path / "model.json", tasks="absent", views="absent", features="absent")
    found, _ = read_spec(old)
    assert (found.tasks, found.views, found.features) == ((), {}, 0)


WRONG: list[tuple[str, Any]] = [
    ("factory", ""),
    ("factory", 1),
    ("classes", "ab"),
    ("classes", ["a"]),
    ("classes", ["a", "a", "b"]),
    ("classes", ["a", ""]),
    ("classes", [1, 2]),
    ("classes", [["a"], ["b"]]),
    ("input_shape", [8, 6]),
    ("input_shape", [3, 8, 6, 1]),
    ("input_shape", [3, 8, 0]),
    ("input_shape", [3, 8, 6.0]),
    ("input_shape", [True, 8, 6]),
    ("mean", 0.5),
    ("mean", ["0.5", 0, 0]),
    ("mean", [float("inf"), 0, 0]),
    ("std", [0, 1, 1]),
    ("std", [-1, 1, 1]),
    ("std", [float("nan"), 1, 1]),
    ("arguments", []),
    ("kept", []),
    ("kept", {"conv1": []}),
    ("kept", {"conv1": [-1]}),
    ("kept", {"conv1": [True]}),
    ("kept", {"conv1": "01"}),
    ("parent", 1),
    ("tasks", "ab"),
    ("tasks", [{"classes": 3}]),
    ("tasks", [{"classes": 0, "kept": {}}]),
    ("tasks", [{"classes": 3, "kept": {"conv1": [1.5]}}]),
    ("views", ["relu1"]),
    ("views", {"relu1": -1}),
    ("features", -1),
    ("features", 1.5),
    ("weights", None),
]


@pytest.mark.parametrize(("key", "value"), WRONG)
def test_a_wrong_field_is_named_with_what_is_allowed_and_no_other(tmp_path: Path, key: str, value: Any) -> None:
    with pytest.raises(ModelError) as caught:
        read_spec(write(tmp_path / "model.json", **{key: value}))
    assert caught.value.what.startswith(f"model.json lacks or garbles {key} (")
    assert ";" not in caught.value.what
    assert caught.value.where == str(tmp_path / "model.json")


@pytest.mark.parametrize(
    "key",
    ["factory", "classes", "input_shape", "mean", "std", "arguments", "kept", "parent", "weights"],
)
def test_a_missing_field_is_named(tmp_path: Path, key: str) -> None:
    with pytest.raises(ModelError, match=f"lacks or garbles {key}"):
        read_spec(write(tmp_path / "model.json", **{key: "absent"}))


def test_all_that_is_wrong_is_named_at_once(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"garbles classes .*; mean .*; features"):
        read_spec(write(tmp_path / "model.json", classes=[], mean=0, features=-1))


@pytest.mark.parametrize(
    "changes",
    [{"mean": [0.5]}, {"std": [1, 1, 1, 1]}, {"tasks": [{"classes": 2, "kept": {}}]}, {"classes": ["a", "b"]}],
)
def test_fields_that_do_not_fit_each_other_are_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(ModelError, match="for each channel, tasks for all classes"):
        read_spec(write(tmp_path / "model.json", **changes))


@pytest.mark.parametrize("version", [2, 0, True, "1", None])
def test_another_format_is_refused(tmp_path: Path, version: Any) -> None:
    with pytest.raises(ModelError, match="of a format that is known"):
        read_spec(write(tmp_path / "model.json", format=version))
