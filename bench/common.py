"""What all benchmarks share: data, cached base models, resumable rows, tables, the result file (design, section 12)."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from rich.console import Console
from rich.table import Table
from torch import nn

from nss.base import train
from nss.critical import critical_neurons
from nss.data import Data, Dataset, load_data
from nss.files import read_json, replacing, write_json
from nss.ingest import add_batch, demo
from nss.model import Classifier, build_model, load_model, save_model
from nss.profile import Profile, profile
from nss.slice import SemanticSlices, semantic_slices

CACHE = Path(os.environ.get("NSS_BENCH_CACHE", Path.home() / ".cache" / "nss-bench"))
NPZ = Path(os.environ.get("NSS_BENCH_DATA", Path.home() / ".cache" / "nss-datasets"))
# Epochs of the base models: few enough for two cores, the same for every method.
EPOCHS = {"digits": 15, "cifar10": 12}
DEFAULT_EPOCHS = 5
SHOWN = ("torch", "torchvision", "numpy", "scikit-learn", "captum", "torch-pruning")

Row = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """What the command line asked for."""

    bench: str
    data: tuple[str, ...]
    models: tuple[str, ...]
    seeds: tuple[int, ...]
    quick: bool
    command: str

    def subjects(self) -> Iterator[tuple[str, str, int]]:
        """Yield each data set, factory and seed."""
        return itertools.product(self.data, self.models, self.seeds)


@dataclass
class Report:
    """Rows of one benchmark with what was fixed before the runs."""

    settings: Settings
    protocol: Mapping[str, Any]
    rows: list[Row] = field(default_factory=list)
    summary: list[Row] = field(default_factory=list)

    def write(self, path: Path, *, rows: bool = True) -> None:
        """Write the result file, with or without the rows that the summary is made of."""
        write_json(
            path,
            {
                "bench": self.settings.bench,
                "command": self.settings.command,
                "versions": versions(),
                "machine": machine(),
                "protocol": dict(self.protocol),
                "rows": self.rows if rows else [],
                "summary": _rounded(self.summary),
            },
        )


def _rounded(rows: Iterable[Row]) -> list[Row]:
    """Six significant digits: what is behind them differs between machines, and files that are kept stay small."""
    return [
        {name: float(f"{value:.6g}") if isinstance(value, float) else value for name, value in row.items()}
        for row in rows
    ]


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that the numbers depend on."""
    found = {"python": platform.python_version()}
    for name in SHOWN:
        try:
            found[name] = version(name)
        except ModuleNotFoundError:
            found[name] = "absent"
    return found


def machine() -> dict[str, Any]:
    """What the numbers were taken on."""
    return {"system": platform.system(), "processor": platform.machine(), "threads": torch.get_num_threads()}


def dataset(name: str) -> Dataset:
    """Return "digits", an .npz by path, or one by name from the folder of downloaded sets; packed once."""
    folder = CACHE / "data" / Path(name).stem
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not (folder / "dataset.json").exists():
            if name == "digits":
                demo(folder)
            else:
                add_batch(folder, _npz(name))
    return load_data(folder)


def _npz(name: str) -> Path:
    path = Path(name) if name.endswith(".npz") else NPZ / f"{name}.npz"
    if not path.exists():
        raise SystemExit(f"bench: {path} does not exist: bring the data set as .npz, or pass --data PATH.npz")
    return path


def base_model(data: Dataset, name: str, factory: str, seed: int) -> Classifier:
    """Return the base model of (data, factory, seed), trained once and kept for all benchmarks."""
    epochs = EPOCHS.get(name, DEFAULT_EPOCHS)
    mean, std = data.pixel_statistics()
    key = digest({"data": data.digest, "factory": factory, "seed": seed, "epochs": epochs})
    folder = CACHE / "models" / f"{Path(name).stem}-{factory.partition(':')[2]}-{seed}-{key}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            model = build_model(factory, data.classes, data.image_shape, seed, mean=mean, std=std)
            train(model, data, epochs, seed, batch_size=128, learning_rate=0.1)
            save_model(model, folder)
    return load_model(folder)


@dataclass
class Subject:
    """One base model and its data, made when they are first asked for."""

    name: str
    factory: str
    seed: int

    @cached_property
    def data(self) -> Dataset:
        """The whole data set."""
        return dataset(self.name)

    @cached_property
    def model(self) -> Classifier:
        """The base model, trained once for all benchmarks."""
        return base_model(self.data, self.name, self.factory, self.seed)


def knowledge(model: nn.Module, train: Data, per_class: int, *, windows: int = 0) -> tuple[Profile, SemanticSlices]:
    """Return what maintenance needs to know of a model: a profile of some images of each class, and slices by it."""
    found = profile(model, train, ("taylor",), samples_per_class=per_class, windows=windows)
    return found, semantic_slices(critical_neurons(found, "taylor", "cumulative", 0.95), found)


def interleaved(runs: Mapping[str, Callable[[], int]], turns: int, warm_up: int) -> dict[str, float]:
    """Return the median milliseconds of a step, the runs taken in turn so that other work hits all alike.

    runs: {name: a run of some steps that returns their number}. warm_up: turns before those that count.
    """
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(warm_up + turns):
        for name, run in runs.items():
            start = time.perf_counter()
            steps = run()
            taken[name].append(1000 * (time.perf_counter() - start) / steps)
    return {name: statistics.median(each[warm_up:]) for name, each in taken.items()}


def digest(content: Any) -> str:
    """Short digest of JSON-able content."""
    return hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=6).hexdigest()


def resumed(bench: str, key: Mapping[str, Any], measure: Callable[[], list[Row]]) -> list[Row]:
    """Return the rows of one finished measurement, or measure now and keep them."""
    path = CACHE / "rows" / bench / f"{digest(key)}.json"
    if path.exists():
        rows: list[Row] = read_json(path)["rows"]
        return rows
    rows = measure()
    with replacing(path) as part:
        part.write_text(json.dumps({"key": key, "rows": rows}, indent=1) + "\n", encoding="utf-8")
    return rows


def mean_and_spread(rows: Iterable[Row], by: Sequence[str], values: Sequence[str]) -> list[Row]:
    """Mean and standard deviation of `values` over the seeds of rows that agree in `by`."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row.get(name) for name in by), []).append(row)
    summary = []
    for key, members in groups.items():
        entry: Row = dict(zip(by, key, strict=True))
        entry["seeds"] = len({member.get("seed") for member in members})
        for name in values:
            numbers = [member[name] for member in members if member.get(name) is not None]
            if numbers:
                entry[name] = statistics.fmean(numbers)
                entry[f"{name}_sd"] = statistics.stdev(numbers) if len(numbers) > 1 else 0.0
        summary.append(entry)
    return summary


def show(title: str, rows: Sequence[Row], columns: Sequence[str]) -> None:
    """Print rows as a table."""
    table = Table(title=title)
    for column in columns:
        table.add_column(column, justify="right" if rows and isinstance(rows[0].get(column), (int, float)) else "left")
    for row in rows:
        table.add_row(*(_text(row.get(column)) for column in columns))
    Console(width=160).print(table)


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return "" if value is None else str(value)
