"""What model.json says of a model: how to build it, what it takes and answers. Read with every field checked.

A model folder may come from anywhere: what is wrong in it is named before anything is built from it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nss.errors import ModelError
from nss.files import read_json

FORMAT = 1
FILES = ("model.json", "model.safetensors")
"""of a model folder"""


@dataclass(frozen=True)
class Task:
    """Classes that were learned together, and the neurons that learned them (see nss.extend)."""

    classes: int
    kept: Mapping[str, tuple[int, ...]]
    """{layer: as many indices as it has neurons for this task, of the factory's}; layers that have all are absent"""


@dataclass(frozen=True)
class ModelSpec:
    """How to build a model again, and what it takes and answers."""

    factory: str
    """package.module:callable"""
    classes: tuple[str, ...]
    """in the order of the logits"""
    input_shape: tuple[int, int, int]
    """channels, height, width"""
    mean: tuple[float, ...]
    """of each channel, on pixels scaled to 0..1"""
    std: tuple[float, ...]
    arguments: Mapping[str, Any] = field(default_factory=dict)
    kept: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """{layer: original indices of the output channels that are left}; layers that lost nothing are absent"""
    parent: str | None = None
    """digest of the model this one was made from"""
    tasks: tuple[Task, ...] = ()
    """in the order in which they were learned; none for a model that was never extended"""
    views: Mapping[str, int] = field(default_factory=dict)
    """{value of the first task's network: side of the grid} that the tasks are told apart by"""
    features: int = 0
    """number of features that the views make"""

    def __post_init__(self) -> None:
        # 0 and 0.0 are one number, but not the same bytes in model.json.
        for name in ("mean", "std"):
            object.__setattr__(self, name, tuple(float(each) for each in getattr(self, name)))


def read_spec(path: Path) -> tuple[ModelSpec, str]:
    """Read model.json. Returns the spec and the digest of the weights file that belongs to it.

    Raises ModelError that names the file, every field that is wrong, and what is allowed there.

    >>> spec, weights = read_spec(Path("model/model.json"))  # doctest: +SKIP
    """
    content = read_json(path, ModelError)
    if not isinstance(content, dict) or not _is_whole(content.get("format")) or content["format"] != FORMAT:
        raise ModelError(
            "this is not a model.json of a format that is known", where=str(path), allowed=f'"format": {FORMAT}'
        )
    full = {"tasks": [], "views": {}, "features": 0, **content}
    wrong = [f"{key} ({allowed})" for key, (allowed, fits) in _FIELDS.items() if key not in full or not fits(full[key])]
    if not wrong and not _is_consistent(full):
        wrong = ["one mean and std for each channel, tasks for all classes"]
    if wrong:
        raise ModelError(
            f"model.json lacks or garbles {'; '.join(wrong)}", where=str(path), fix="restore it (dvc checkout)"
        )
    return _spec(full), full["weights"]


def new_spec(
    factory: str,
    classes: Sequence[str],
    input_shape: Sequence[int],
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    arguments: Mapping[str, Any] | None,
) -> ModelSpec:
    """Return the spec of a model that is to be built, as model.json will keep it. mean, std: default 0.5 each.

    Raises ModelError that names every field that model.json could not keep, and what is allowed there.
    """
    shape = _plain(input_shape)
    channels = shape[0] if isinstance(shape, list) and shape and _is_whole(shape[0], 1) else 1
    content = {
        "factory": factory,
        "classes": _plain(classes),
        "input_shape": shape,
        "mean": [0.5] * channels if mean is None else _plain(mean),
        "std": [0.5] * channels if std is None else _plain(std),
        "arguments": _kept_arguments(arguments or {}),
        **{"kept": {}, "parent": None, "tasks": [], "views": {}, "features": 0},
    }
    wrong = [(key, _FIELDS[key]) for key in content if not _FIELDS[key][1](content[key])]
    for key, (allowed, _) in wrong[:1]:
        raise ModelError(f"{key} is {content[key]}", where=key, allowed=allowed)
    if not _is_consistent(content):
        raise ModelError(f"mean {content['mean']} and std {content['std']}", allowed=f"{channels} numbers each")
    return _spec(content)


def _plain(values: Any) -> Any:
    """Return arrays, tensors and any other sequence of values as a list of Python's own types."""
    try:
        return [getattr(value, "item", lambda value=value: value)() for value in values]
    except (TypeError, ValueError, RuntimeError):
        return values


def _kept_arguments(arguments: Mapping[str, Any]) -> Any:
    try:
        return json.loads(json.dumps(dict(arguments)))
    except (TypeError, ValueError) as problem:
        raise ModelError(
            f"model.json cannot keep the arguments: {problem}",
            where="arguments",
            allowed="texts, numbers, true or false, None, and lists of them",
            fix="write a factory of your own that fills in the others",
        ) from None


def _spec(content: Mapping[str, Any]) -> ModelSpec:
    channels, height, width = content["input_shape"]
    return ModelSpec(
        factory=content["factory"],
        classes=tuple(content["classes"]),
        input_shape=(channels, height, width),
        mean=tuple(content["mean"]),
        std=tuple(content["std"]),
        arguments=content["arguments"],
        kept=_indices(content["kept"]),
        parent=content["parent"],
        tasks=tuple(Task(each["classes"], _indices(each["kept"])) for each in content["tasks"]),
        views=content["views"],
        features=content["features"],
    )


def _indices(content: Mapping[str, list[int]]) -> dict[str, tuple[int, ...]]:
    return {layer: tuple(indices) for layer, indices in content.items()}


def _is_whole(value: Any, least: int = 0) -> bool:
    return type(value) is int and value >= least


def _is_number(value: Any, above: float = -math.inf) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and value > above


def _is_list(value: Any, fits: Callable[[Any], bool], least: int = 0) -> bool:
    return isinstance(value, list) and len(value) >= least and all(map(fits, value))


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and value != ""


def _are_names(value: Any) -> bool:
    return _is_list(value, _is_text, 2) and len(set(value)) == len(value)


def _are_indices(value: Any) -> bool:
    return isinstance(value, dict) and all(_is_list(indices, _is_whole, 1) for indices in value.values())


def _is_task(value: Any) -> bool:
    return isinstance(value, dict) and _is_whole(value.get("classes"), 1) and _are_indices(value.get("kept"))


def _is_consistent(content: Mapping[str, Any]) -> bool:
    channels, tasks = content["input_shape"][0], content["tasks"]
    learned = sum(each["classes"] for each in tasks) if tasks else len(content["classes"])
    return len(content["mean"]) == len(content["std"]) == channels and learned == len(content["classes"])


# Of each field, what is allowed in words and as a check.
_FIELDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "factory": ("package.module:callable", _is_text),
    "classes": ("at least two different names", _are_names),
    "input_shape": (
        "channels, height and width",
        lambda value: _is_list(value, lambda size: _is_whole(size, 1), 3) and len(value) == 3,
    ),
    "mean": ("a number for each channel", lambda value: _is_list(value, _is_number)),
    "std": ("a number above 0 for each channel", lambda value: _is_list(value, lambda each: _is_number(each, 0))),
    "arguments": ("keyword arguments of the factory", lambda value: isinstance(value, dict)),
    "kept": ("a list of channels for each layer", _are_indices),
    "parent": ("the digest of a model, or null", lambda value: value is None or isinstance(value, str)),
    "tasks": ("a list of classes and kept", lambda value: _is_list(value, _is_task)),
    "views": (
        "a whole number for each value",
        lambda value: isinstance(value, dict) and all(map(_is_whole, value.values())),
    ),
    "features": ("a whole number", _is_whole),
    "weights": ("the digest of model.safetensors", _is_text),
}
