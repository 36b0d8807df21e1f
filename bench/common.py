"""What all benchmarks share: data, cached base models, resumable rows, tables, the result file (design, section 12)."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import platform
import resource
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import rich.table
import torch
from filelock import FileLock
from rich.console import Console
from torch import nn

import nss
from nss.base import train
from nss.critical import critical_neurons
from nss.data import Data, Dataset, load_data
from nss.files import file_digest, read_json, replacing, write_json
from nss.ingest import add_batch, demo
from nss.model import Classifier, build_model, load_model, save_model
from nss.profile import Profile, profile
from nss.slice import SemanticSlices, semantic_slices

CACHE = Path(os.environ.get("NSS_BENCH_CACHE", Path.home() / ".cache" / "nss-bench"))
NPZ = Path(os.environ.get("NSS_BENCH_DATA", Path.home() / ".cache" / "nss-datasets"))
# Epochs of the base models: few enough for two cores, the same for every method.
EPOCHS = {"digits": 15, "cifar10": 12}
DEFAULT_EPOCHS = 5
BATCH, RATE = 128, 0.1
LATER = "left to a later run"
# {what a row names of its subject: those that were asked for, in a protocol}
SUBJECT = {"data": "data", "model": "models", "seed": "seeds"}
# How slices are made that maintenance works with.
KNOWLEDGE: dict[str, Any] = {"metric": "taylor", "rule": "cumulative", "threshold": 0.95}
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
    times: bool = True
    """whether what takes a quiet machine is measured: latencies, times of steps and to a target"""
    keep: bool = False
    """whether the rows of a finished subject are kept in the repository"""
    stored: bool = False
    """whether only subjects whose rows are kept there are taken, and nothing is measured"""

    def subjects(self) -> Iterator[tuple[str, str, int]]:
        """Yield each data set, factory and seed."""
        return itertools.product(self.data, self.models, self.seeds)


@dataclass(frozen=True)
class Table:
    """Some rows of a summary, as they are shown to people."""

    title: str
    columns: tuple[str, ...]
    rows: Sequence[Row]

    def filled(self) -> tuple[str, ...]:
        """Return the columns that have a value in any row, each with how many seeds have one where not all do."""
        names = (name for column in self.columns for name in (column, f"{column}_seeds"))
        return tuple(name for name in names if any(row.get(name) is not None for row in self.rows))


@dataclass
class Report:
    """Rows of one benchmark with what was fixed before the runs."""

    settings: Settings
    protocol: Mapping[str, Any]
    rows: list[Row] = field(default_factory=list)
    summary: list[Row] = field(default_factory=list)
    stored: list[Row] = field(default_factory=list)
    """of each subject whose rows came from the repository: what it was measured with"""

    def write(self, path: Path, *, rows: bool = True, spent: Mapping[str, float] | None = None) -> None:
        """Write the result file, with or without the rows that the summary is made of. spent: seconds it took.

        It is the end of a run, so that what was taken of other code is said here.
        """
        content = {
            "bench": self.settings.bench,
            "command": self.settings.command,
            "versions": versions(),
            "machine": machine(),
            "spent": rounded(dict(spent or {})),
            "protocol": dict(self.protocol),
            "measured": measured(self.rows),
            "stored": self.stored,
            "rows": self.rows if rows else [],
            "summary": rounded(self.summary),
        }
        write_json(path, {name: value for name, value in content.items() if value or name not in ("spent", "stored")})
        say_other_code()


def said(settings: Settings, protocol: Mapping[str, Any], left_out: str) -> dict[str, Any]:
    """Return a protocol with the subjects that were asked for and what a quick run, or one without times, left out."""
    subjects = {"data": settings.data, "models": settings.models, "seeds": settings.seeds}
    quick = {"quick": left_out} if settings.quick else {}
    times = {} if settings.times else {"times": LATER}
    return {**protocol, "subjects": {name: list(each) for name, each in subjects.items()}, **quick, **times}


def measured(rows: Iterable[Row]) -> list[Row]:
    """Return the subjects that rows are of, each once: the data, model and seed, as far as the rows name them."""
    named = ({name: row[name] for name in SUBJECT if name in row} for row in rows)
    return [dict(each) for each in dict.fromkeys(tuple(subject.items()) for subject in named if subject)]


def subjects_of(result: Mapping[str, Any]) -> list[Row]:
    """Return the subjects that a result file has rows of.

    One that does not say it is older: only when it was made of kept rows alone may it lack any that was asked for.
    """
    if "measured" in result:
        found: list[Row] = result["measured"]
        return found
    return measured(result["stored"]) if "--stored" in result["command"].split() else asked_for(result)


def asked_for(result: Mapping[str, Any]) -> list[Row]:
    """Return the subjects that a result file was asked for."""
    subjects = result["protocol"].get("subjects", {})
    every = itertools.product(*(subjects.get(kind, ()) for kind in SUBJECT.values()))
    return [dict(zip(SUBJECT, each, strict=True)) for each in every]


def missing(result: Mapping[str, Any]) -> list[Row]:
    """Return the subjects that a result file was asked for and has no rows of. Rows may be of all seeds alike."""
    found = [each.items() for each in subjects_of(result)]
    return [subject for subject in asked_for(result) if not any(each <= subject.items() for each in found)]


def is_quick(result: Mapping[str, Any]) -> bool:
    """Say whether a result file is of a quick run."""
    return "--quick" in result["command"].split()


def used(seconds: float) -> dict[str, float]:
    """Return what a run took: wall seconds, as given, and CPU seconds of this process and of those it started."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return {"seconds": seconds, "cpu_seconds": sum(each.ru_utime + each.ru_stime for each in usages)}


def spent_before(path: Path, protocol: Mapping[str, Any], spent: Mapping[str, float]) -> dict[str, float]:
    """Return what a result took, with what the run took whose times it completes, if that is what lies there."""
    before: Mapping[str, float] = {}
    if "times" not in protocol and path.exists():
        found = read_json(path)
        before = found["spent"] if found["protocol"] == {**protocol, "times": LATER} else {}
    return {name: value + before.get(name, 0.0) for name, value in spent.items()}


def rounded(content: Any) -> Any:
    """Six significant digits: what is behind them differs between machines, and files that are kept stay small."""
    if isinstance(content, float):
        return float(f"{content:.6g}")
    if isinstance(content, Mapping):
        return {name: rounded(value) for name, value in content.items()}
    return [rounded(each) for each in content] if isinstance(content, list | tuple) else content


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
    """Return "digits", an .npz by path, or one by name from the folder of downloaded sets; packed once.

    A file is packed under its name and its content, so that it is never taken for another of the same name.
    """
    source = None if name == "digits" else _npz(name)
    folder = CACHE / "data" / (f"{source.stem}-{file_digest(source)[:12]}" if source else name)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not (folder / "dataset.json").exists():
            if source:
                add_batch(folder, source)
            else:
                demo(folder)
    return load_data(folder)


def _npz(name: str) -> Path:
    path = Path(name) if name.endswith(".npz") else NPZ / f"{name}.npz"
    if not path.exists():
        raise SystemExit(f"bench: {path} does not exist: bring the data set as .npz, or pass --data PATH.npz")
    return path


def training(name: str) -> dict[str, Any]:
    """Return how base models of a data set are trained."""
    return {"epochs": EPOCHS.get(name, DEFAULT_EPOCHS), "batch_size": BATCH, "learning_rate": RATE}


def base_model(data: Dataset, name: str, factory: str, seed: int) -> Classifier:
    """Return the base model of (data, factory, seed), trained once and kept for all benchmarks."""
    how = training(name)
    mean, std = data.pixel_statistics()
    key = digest({"data": data.digest, "factory": factory, "seed": seed, "epochs": how["epochs"]})
    folder = CACHE / "models" / f"{Path(name).stem}-{factory.partition(':')[2]}-{seed}-{key}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            model = build_model(factory, data.classes, data.image_shape, seed, mean=mean, std=std)
            train(model, data, seed=seed, **how)
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
    found = profile(model, train, (KNOWLEDGE["metric"],), samples_per_class=per_class, windows=windows)
    return found, semantic_slices(critical_neurons(found, **KNOWLEDGE), found)


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


def digest_of_code(package: Path) -> str:
    """Short digest of the Python files of a package."""
    return digest({path.relative_to(package).as_posix(): file_digest(path) for path in package.rglob("*.py")})


# Of what this process runs: the files may be edited while it measures for hours.
CODE = digest_of_code(Path(nss.__file__).parent)
OTHER_CODE: Counter[Path] = Counter()
"""how many entries of a folder were taken that other code has measured"""


def note_code(folder: Path, code: str | None) -> None:
    """Note by what code an entry was measured that is taken from a folder; None: nobody knows."""
    if code != CODE:
        OTHER_CODE[folder] += 1


def say_other_code() -> None:
    """Say what was taken of other code, a line for each folder: it still counts, and whoever reads it shall know."""
    for folder, count in OTHER_CODE.items():
        say(f"{folder}: {count} taken of other or unknown code of nss, remove them there to measure again")
    OTHER_CODE.clear()


def say(message: str) -> None:
    """Write a line to standard error."""
    sys.stderr.write(f"bench: {message}\n")


def resumed(bench: str, key: Mapping[str, Any], measure: Callable[[], list[Row]]) -> list[Row]:
    """Return the rows of one finished measurement, or measure now and keep them. What other code measured counts."""
    path = CACHE / "rows" / bench / f"{digest(key)}.json"
    if path.exists():
        entry = read_json(path)
        note_code(path.parent, entry.get("code"))
        rows: list[Row] = entry["rows"]
        return rows
    rows = measure()
    with replacing(path) as part:
        part.write_text(json.dumps({"key": key, "code": CODE, "rows": rows}, indent=1) + "\n", encoding="utf-8")
    return rows


def mean_and_spread(rows: Iterable[Row], by: Sequence[str], values: Sequence[str]) -> list[Row]:
    """Mean and standard deviation of `values` over the seeds of rows that agree in `by`.

    >>> mean_and_spread([{"seed": 0, "seconds": 3.0}, {"seed": 1, "seconds": None}], (), ["seconds"])
    [{'seeds': 2, 'seconds': 3.0, 'seconds_sd': None, 'seconds_seeds': 1}]
    """
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row.get(name) for name in by), []).append(row)
    summary = []
    for key, members in groups.items():
        entry: Row = {**dict(zip(by, key, strict=True)), "seeds": _seeds(members)}
        for name in values:
            entry |= _column(members, name)
        summary.append(entry)
    return summary


def _seeds(rows: Iterable[Row]) -> int:
    return len({row.get("seed") for row in rows})


def _column(members: Sequence[Row], name: str) -> Row:
    """Return mean and spread. Where seeds have no value, the number of those that do: the spread would be of fewer."""
    having = [member for member in members if member.get(name) is not None]
    if not having:
        return {}
    numbers = [member[name] for member in having]
    mean = {name: statistics.fmean(numbers)}
    if (seeds := _seeds(having)) < _seeds(members):
        return {**mean, f"{name}_sd": None, f"{name}_seeds": seeds}
    return {**mean, f"{name}_sd": statistics.stdev(numbers) if len(numbers) > 1 else 0.0}


def show(tables: Iterable[Table]) -> None:
    """Print tables."""
    for table in tables:
        printed = rich.table.Table(title=table.title)
        for column in table.filled():
            printed.add_column(column, justify="right" if is_number(table, column) else "left")
        for row in table.rows:
            printed.add_row(*(text(row.get(column)) for column in table.filled()))
        Console(width=160).print(printed)


def is_number(table: Table, column: str) -> bool:
    """Say whether a column holds numbers."""
    return any(isinstance(row.get(column), int | float) for row in table.rows)


def text(value: Any) -> str:
    """Return what is shown of a value: four significant digits of a number, nothing where there is none."""
    if isinstance(value, float):
        return f"{value:.4g}"
    return "" if value is None else str(value)
