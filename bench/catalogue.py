"""The benchmarks by name: what each is measured on, in full and for a look, and what must be quiet around it."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from bench.common import Settings, said

FASHION, DIGITS = "fashion-mnist", "digits"
VGG, RESNET, LENET, RESNET18 = "nss.zoo:vgg_small", "nss.zoo:resnet20", "nss.zoo:lenet", "torchvision.models:resnet18"
SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Entry:
    """What one benchmark is measured on when nothing else is asked for."""

    data: tuple[str, ...] = ()
    models: tuple[str, ...] = ()
    quick_data: tuple[str, ...] = (FASHION,)
    quick_models: tuple[str, ...] = (VGG,)
    alone: bool = False
    """it measures nothing but time, so that nothing else may run"""
    times: bool = False
    """it measures times besides, which can be left to a later run"""
    kept: bool = False
    """it takes hours, so that the rows of a subject can be kept in the repository"""


BENCHES = {
    "profile": Entry((FASHION,), (VGG, RESNET18), (FASHION,), (VGG, RESNET18), alone=True),
    "scale": Entry(quick_data=(), quick_models=(), alone=True),
    "pipeline": Entry(quick_data=(), quick_models=(), alone=True),
    "rq1": Entry((FASHION,), (VGG, RESNET)),
    "restructure": Entry((FASHION,), (VGG, RESNET), times=True, kept=True),
    "rq2": Entry((FASHION, "cifar10"), (VGG, RESNET), kept=True),
    "rq3": Entry((FASHION,), (VGG, RESNET), times=True, kept=True),
    "triage": Entry((DIGITS,), (LENET, VGG), (DIGITS,), (LENET,)),
    "rq4": Entry(("mnist", FASHION, "cifar10"), (VGG, RESNET), times=True, kept=True),
}


def settings_of(
    name: str,
    *,
    command: str,
    data: Sequence[str] = (),
    models: Sequence[str] = (),
    seeds: Sequence[int] = SEEDS,
    quick: bool = False,
    **more: bool,
) -> Settings:
    """Return what a benchmark is asked for; where nothing is said, what it is measured on by itself.

    more: `times`, `keep` and `stored` of the settings.
    """
    entry = BENCHES[name]
    own_data, own_models = (entry.quick_data, entry.quick_models) if quick else (entry.data, entry.models)
    return Settings(
        bench=name,
        data=tuple(data or own_data),
        models=tuple(models or own_models),
        seeds=tuple(seeds[:1] if quick else seeds),
        quick=quick,
        command=command,
        **more,
    )


def module_of(name: str) -> ModuleType:
    """Return the module of a benchmark: PROTOCOL, LEFT_OUT, COLUMNS, run, tables, draw."""
    return importlib.import_module(f"bench.{name}")


def protocol_of(settings: Settings) -> dict[str, Any]:
    """Return what the result file of these settings says under "protocol"."""
    module = module_of(settings.bench)
    return said(settings, module.PROTOCOL, module.LEFT_OUT)
