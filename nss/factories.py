"""Factories of networks: functions of allowed packages, imported by name; nothing else ever is."""

from __future__ import annotations

import functools
import importlib
import inspect
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from nss.contexts import evaluating, seeded
from nss.errors import ModelError, first_line
from nss.model_spec import ModelSpec

TRUSTED = ("nss.zoo", "torchvision.models")


def factory_network(spec: ModelSpec, classes: int, seed: int, allow: Sequence[str] | None) -> nn.Module:
    """Return what the factory of `spec` makes for so many classes. Raises ModelError when it fails.

    allow: None for the spec of a model in memory: its factory was allowed when it made the model.
    """
    call = find_factory(spec.factory, [spec.factory.partition(":")[0]] if allow is None else allow)
    parameters = inspect.signature(call).parameters
    named = {"num_classes": classes, "input_shape": spec.input_shape}
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    given = {
        name: value for name, value in named.items() if name in parameters or (takes_any and name == "num_classes")
    }
    with seeded(seed):
        try:
            network = call(**given, **spec.arguments)
        except Exception as problem:
            raise ModelError(
                f"the factory failed: {first_line(problem)}",
                where=spec.factory,
                allowed=f"arguments: {', '.join(parameters)}",
                fix="correct `arguments`",
            ) from problem
        if not isinstance(network, nn.Module):
            raise ModelError(
                f"the factory returned {type(network).__name__}", where=spec.factory, allowed="a torch.nn.Module"
            )
        _settle(network, spec)
    return network


def _settle(network: nn.Module, spec: ModelSpec) -> None:
    """Have lazy layers take the sizes that an image of the model's shape asks for."""
    if not any(is_lazy(each) for each in (*network.parameters(), *network.buffers())):
        return
    try:
        with evaluating(network), torch.no_grad():
            network(torch.zeros(1, *spec.input_shape))
    except Exception as problem:
        raise ModelError(
            f"lazy layers did not find their sizes: {first_line(problem)}",
            where=spec.factory,
            fix=f"make a network that takes images [n, {', '.join(map(str, spec.input_shape))}]",
        ) from problem
    if lazy := [name for name, each in (*network.named_parameters(), *network.named_buffers()) if is_lazy(each)]:
        raise ModelError(
            "lazy layers that an image does not come through have no size",
            where=f"{spec.factory}: {', '.join(lazy)}",
            fix="give them their sizes, or leave them out",
        )


def find_factory(factory: str, allow: Sequence[str] = ()) -> Any:
    """Import a factory by "package.module:callable" if its package is allowed; nothing else is ever imported."""
    module, _, name = factory.partition(":")
    trusted = (*TRUSTED, *allow)
    if not _is_of(module, trusted):
        raise ModelError(
            "the factory is not from an allowed package",
            where=factory,
            allowed=", ".join(trusted),
            fix="if you trust it, add its package to base.packages in params.yaml (in code: allow=[...])",
        )
    try:
        call = getattr(importlib.import_module(module), name)
        inspect.signature(call)
    except (TypeError, ValueError):
        raise ModelError("this is no factory", where=factory, allowed="a Python function or class") from None
    except (ImportError, AttributeError) as problem:
        raise _missing(factory, module, problem) from None
    # A trusted module also holds what it imports for itself, for example what downloads and unpickles a file.
    if not _is_of(_home(call), trusted):
        raise ModelError(
            f"the factory is imported from {_home(call)}, which is not an allowed package",
            where=factory,
            allowed=", ".join(trusted),
            fix="name the module that defines it; if you trust it, add its package to base.packages in params.yaml",
        )
    return call


def _missing(factory: str, module: str, error: Exception) -> ModelError:
    """Tell a factory that is not there from one whose module imports something that is not there."""
    name = error.name or "" if isinstance(error, ModuleNotFoundError) else ""
    if name and not _is_of(module, [name]):
        fix = _hidden(name) or f"pip install {name}, or put it beside params.yaml if it is yours"
        return ModelError(f"{module} imports {name}, which is not installed", where=factory, fix=fix)
    fix = _hidden(name) or f"put {name} beside params.yaml, or install its package" if name else ""
    if isinstance(error, ImportError) and not name:
        fix = f"correct what {module} imports, or install a version that has it"
    return ModelError(f"the factory does not exist: {error}", where=factory, allowed="package.module:callable", fix=fix)


def _hidden(name: str) -> str:
    """Return what to do about a module that is missing because another package has its name; else an empty text."""
    package, _, rest = name.partition(".")
    found = sys.modules.get(package) if rest else None
    place = next(iter(getattr(found, "__path__", None) or [getattr(found, "__file__", None)]))
    if place is None:
        return ""
    return f"`{package}` is {place} here: check what follows it; a package of yours that this hides needs another name"


def _is_of(module: str, packages: Sequence[str]) -> bool:
    return any(module == package or module.startswith(package + ".") for package in packages)


def _home(call: Any) -> str:
    """Return the module that defines a function or class, of a partial that of what it calls."""
    while isinstance(call, functools.partial):
        call = call.func
    return str(getattr(call, "__module__", ""))
