"""Weights that were trained elsewhere: a .safetensors or .pt file put into a network, every number in its place."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nss.errors import ModelError, first_line
from nss.model import Classifier
from nss.tensor_files import read_tensors

SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")
# What training scripts call the weights among other things that they save.
_NESTED = ("state_dict", "model_state_dict", "model", "net")
# What wrappers put before the names: DataParallel, torch.compile, Lightning.
_PREFIXES = ("module.", "_orig_mod.", "model.", "network.")
# Norms count their batches since PyTorch 0.4.1; older weights lack it and torch fills it in.
_COUNTER = "num_batches_tracked"
_SHOWN = 5


def fill(model: Classifier, weights: str | Path) -> Classifier:
    """Put the weights of a file into `model`, in place, and return it in evaluation mode.

    weights: .safetensors, or a .pt file with a state dict, alone or as one of a dict of things; nothing in it is run:
    what is no plain tensor is refused. Names may have the prefix of a wrapper. Every weight of the network must be
    there, in its shape, and nothing else.
    Raises ModelError for a file that is missing, damaged or of another kind, that holds code, or does not fit.

    >>> model = nss.build_model("torchvision.models:resnet18", classes, (3, 224, 224), seed=0)
    >>> nss.fill(model, "resnet18-cats.pt")  # doctest: +SKIP
    """
    path = Path(weights)
    found = _unwrapped(_read(path), set(model.network.state_dict()))
    _check(model.network.state_dict(), found, path)
    model.network.load_state_dict(found)
    return model.eval()


def _read(path: Path) -> dict[str, Tensor]:
    if path.suffix not in SUFFIXES:
        raise ModelError(f"{path.name} is no file of weights", where=str(path), allowed=", ".join(SUFFIXES))
    if not path.is_file():
        raise ModelError("there is no such file", where=str(path), fix="check its name")
    if path.suffix == ".safetensors":
        return read_tensors(path, ModelError)[0]
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise ModelError(
            "the file holds more than plain tensors, and what it holds may run code when it is loaded",
            where=str(path),
            allowed="a state dict: torch.save(model.state_dict(), path)",
            fix="save that, or better safetensors.torch.save_file(model.state_dict(), path), where it was trained",
        ) from None
    except (RuntimeError, EOFError, ValueError, KeyError) as error:
        first = first_line(error)
        raise ModelError(f"the file is damaged or no file of weights: {first}", where=str(path)) from None
    return _state_dict(content, path)


def _state_dict(content: Any, path: Path) -> dict[str, Tensor]:
    """Return the state dict that a file holds, by itself or under one of the usual names."""
    if isinstance(content, Mapping):
        for name in _NESTED:
            if isinstance(content.get(name), Mapping):
                return _state_dict(content[name], path)
        if content and all(isinstance(value, Tensor) for value in content.values()):
            return dict(content)
    kind = type(content).__name__
    held = (
        f"a {kind} with {', '.join(map(str, list(content)[:_SHOWN]))}" if isinstance(content, Mapping) else f"a {kind}"
    )
    raise ModelError(
        f"the file holds {held}, no state dict",
        where=str(path),
        allowed=f"tensors by name, alone or under one of {', '.join(_NESTED)}",
    )


def _unwrapped(found: dict[str, Tensor], wanted: set[str]) -> dict[str, Tensor]:
    """Take off prefixes that all names have, until they are those of the network."""
    while found and not set(found) & wanted:
        prefix = next((each for each in _PREFIXES if all(name.startswith(each) for name in found)), None)
        if prefix is None:
            break
        found = {name.removeprefix(prefix): value for name, value in found.items()}
    return found


def _check(own: Mapping[str, Tensor], found: Mapping[str, Tensor], path: Path) -> None:
    other = {name: found[name] for name in own if name in found and found[name].shape != own[name].shape}
    problems = [
        *_listed("missing", sorted(name for name in set(own) - set(found) if not name.endswith(_COUNTER))),
        *_listed("not of this network", sorted(set(found) - set(own))),
        *_listed(
            "of another shape",
            [f"{name} {list(value.shape)} instead of {list(own[name].shape)}" for name, value in other.items()],
        ),
    ]
    if problems:
        raise ModelError(
            f"the weights do not fit the network: {'; '.join(problems)}",
            where=str(path),
            fix="name the factory and the arguments that the network was built with, and as many classes",
        )


def _listed(what: str, names: list[str]) -> list[str]:
    if not names:
        return []
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return [f"{what} {', '.join(names[:_SHOWN])}{more}"]
