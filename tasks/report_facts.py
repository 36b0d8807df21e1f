"""What a report tells about the cycle that lies in artifacts/, gathered from the files of its stages."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nss.data import Dataset, load_data
from nss.errors import StageError
from nss.files import read_json, text_digest
from nss.tensor_files import read_tensors
from nss.weight_masks import MASK
from tasks.params import MAINTENANCE
from tasks.reading import read_csv
from tasks.reasons import verdict_words
from tasks.workspace import Workspace

_SLICED = ("slice", "triage", *MAINTENANCE)


@dataclass(frozen=True)
class ClassChange:
    """One class before and after, accuracies as shares of 1; before is None where nothing was compared."""

    name: str
    images: int | None
    before: float | None
    after: float

    @property
    def change(self) -> float | None:
        """What the class gained, or lost when below 0."""
        return None if self.before is None else self.after - self.before


@dataclass(frozen=True)
class Compared:
    """A candidate beside what it is compared with, on the same held-out images.

    difference: None when all classes are new.
    """

    where: str
    images: int
    difference: float | None
    low: float
    high: float
    p_value: float
    classes: tuple[ClassChange, ...]


@dataclass(frozen=True)
class Model:
    """A model and its figures of size: parameters, macs, bytes, masked weights."""

    verb: str
    size: Mapping[str, float]


@dataclass(frozen=True)
class Judged(Model):
    """A candidate and what the gate says of it.

    words: what decided. reasons: every check, {check, verdict, text}. classes: on all of its held-out images.
    """

    verdict: str
    words: str
    reasons: tuple[Mapping[str, str], ...]
    model: str
    parent: str | None
    batches: tuple[str, ...]
    images: int | None
    accuracy: float | None
    classes: tuple[ClassChange, ...]
    compared: tuple[Compared, ...]

    @property
    def worst(self) -> ClassChange | None:
        """The class that is answered worst."""
        return min(self.classes, key=lambda each: each.after, default=None)


@dataclass(frozen=True)
class Maintained:
    """A maintenance verb: what triage found, and what its stage did. figures: the stage's metrics."""

    verb: str
    needed: bool
    finding: str
    done: bool
    why: str
    figures: Mapping[str, Any]


@dataclass(frozen=True)
class BatchFacts:
    """A batch of data/. classes: those that it has images of."""

    digest: str
    is_new: bool
    splits: Mapping[str, int]
    classes: tuple[str, ...]


@dataclass(frozen=True)
class SliceFacts:
    """A semantic slice, scored on held-out images. kept: {layer: neurons}."""

    name: str
    categories: tuple[str, ...]
    recall: float
    false_positive_rate: float
    parameters: int
    kept: Mapping[str, int]


@dataclass(frozen=True)
class Facts:
    """A whole cycle.

    champion: name and version, None when the model was trained in this cycle. layers: {layer: neurons}, all there are.
    data: the data set, None when data/ is not there or not what the cycle read; batches is empty then.
    """

    verdict: str
    promoted: str | None
    champion: str | None
    classes: tuple[str, ...]
    factory: str
    input_shape: tuple[int, ...]
    data: Dataset | None
    data_digest: str
    known: tuple[str, ...]
    batches: tuple[BatchFacts, ...]
    base: Model
    accuracy: ClassChange
    class_accuracy: tuple[ClassChange, ...]
    judged: tuple[Judged, ...]
    maintained: tuple[Maintained, ...]
    slices: tuple[SliceFacts, ...]
    layers: Mapping[str, int]

    @property
    def reference(self) -> str:
        """What candidates are compared with."""
        return self.champion or "the base model"


def read_facts(workspace: Workspace) -> Facts:
    """Gather the facts of the cycle in artifacts/.

    Raises StageError when there is none, or when its stages are of different cycles.

    >>> read_facts(find_workspace()).verdict  # doctest: +SKIP
    'PROMOTE'
    """
    _require_one_cycle(workspace)
    decision = read_json(workspace.out("gate") / "gate.json", StageError)
    evaluated = read_json(workspace.out("evaluate") / "evaluation.json", StageError)["model"]
    champion = read_json(workspace.out("base") / "champion.json", StageError)
    spec = read_json(workspace.out("base") / "model" / "model.json", StageError)
    source = read_json(workspace.out("base") / "source.json", StageError)
    data = _data(workspace, source, spec["classes"])
    judged = tuple(_judged(workspace, decision))
    rows = read_csv(workspace.out("slice") / "neurons.csv")
    return Facts(
        verdict=decision["verdict"],
        promoted=decision["promoted"],
        champion=champion and f"{champion['name']} version {champion['version']}",
        classes=tuple(spec["classes"]),
        factory=spec["factory"],
        input_shape=tuple(spec["input_shape"]),
        data=data,
        data_digest=source["data"],
        known=tuple(source["batches"]),
        batches=tuple(_batches(data, source["batches"])) if data else (),
        base=Model("base", _base_size(workspace)),
        accuracy=ClassChange("all", evaluated["images"], None, evaluated["accuracy"]),
        class_accuracy=_classes(evaluated["per_class"]),
        judged=judged,
        maintained=tuple(_maintained(workspace, verb) for verb in MAINTENANCE),
        slices=tuple(_slices(workspace, rows)),
        layers={row["layer"]: int(row["total"]) for row in rows},
    )


def _require_one_cycle(workspace: Workspace) -> None:
    """Refuse what a cycle that stopped on its way has left: some stages speak of another model than the others."""
    if not (workspace.out("gate") / "gate.json").is_file():
        raise StageError("no cycle has come to its end here", where=str(workspace.out("gate")), fix="nss run")
    candidates = read_json(workspace.out("evaluate") / "candidates.json", StageError)
    evaluated = _source(workspace, "evaluate")
    sources = {verb: _source(workspace, verb) for verb in _SLICED}
    other = [verb for verb, each in sources.items() if any(each[name] != evaluated[name] for name in ("data", "model"))]
    other += ["base"] if _source(workspace, "base")["data"] != evaluated["data"] else []
    other += ["gate"] if _source(workspace, "gate")["candidates"] != text_digest(json.dumps(candidates)) else []
    if other:
        raise StageError(
            f"the last cycle has not come to its end: {', '.join(other)} and evaluate are about different models",
            where=str(workspace.out("evaluate")),
            fix="nss run",
        )


def _source(workspace: Workspace, verb: str) -> dict[str, Any]:
    found: dict[str, Any] = read_json(workspace.out(verb) / "source.json", StageError)
    return found


def _data(workspace: Workspace, source: Mapping[str, Any], classes: list[str]) -> Dataset | None:
    """Return the data set when it still has what the base model knows."""
    if not (workspace.data / "dataset.json").is_file():
        return None
    data = load_data(workspace.data)
    digests = {batch.digest for batch in data.batches}
    is_same = digests >= set(source["batches"]) and list(data.classes[: len(classes)]) == classes
    return data if is_same else None


def _batches(data: Dataset, known: list[str]) -> Iterator[BatchFacts]:
    for batch in data.batches:
        labels = sorted(set(batch.labels.tolist()))
        splits = {name: len(batch.part(name)) for name in ("train", "val", "test")}
        yield BatchFacts(batch.digest, batch.digest not in known, splits, tuple(data.classes[each] for each in labels))


def _base_size(workspace: Workspace) -> dict[str, float]:
    """Return the sizes of the base model as the evaluation measured them; of no candidate it knows the weights only."""
    folder = workspace.out("base") / "model"
    for each in read_json(workspace.out("evaluate") / "candidates.json", StageError):
        found = each["champion_size"] or (each["size"] if each["verb"] == "base" else {})
        if found:
            return {**found, "masked": _masked(folder)}
    parameters = read_json(workspace.out("base") / "metrics.json", StageError)["parameters"]
    weights = (folder / "model.safetensors").stat().st_size
    return {"parameters": parameters, "bytes": weights, "masked": _masked(folder)}


def _masked(folder: Path) -> int:
    tensors, _ = read_tensors(folder / "model.safetensors", StageError)
    return sum(int((~mask).sum()) for name, mask in tensors.items() if name.endswith(f".{MASK}"))


def _judged(workspace: Workspace, decision: Mapping[str, Any]) -> Iterator[Judged]:
    judgements = {each["verb"]: each for each in decision["judgements"]}
    candidates = read_json(workspace.out("evaluate") / "candidates.json", StageError)
    for each in sorted(candidates, key=lambda each: list(judgements).index(each["verb"])):
        judgement = judgements[each["verb"]]
        parts = {"known batches": each["known"], "new batches": each["arrived"]}
        yield Judged(
            verb=each["verb"],
            size={**each["size"], "masked": _masked(workspace.out(each["verb"]) / "model")},
            verdict=judgement["verdict"],
            words=verdict_words(judgement),
            reasons=tuple(judgement["reasons"]),
            model=each["model"],
            parent=each["parent"],
            batches=tuple(each["batches"]),
            images=each["images"],
            accuracy=each["accuracy"],
            classes=_classes(each["per_class"] or {}),
            compared=tuple(_compared(where, part) for where, part in parts.items() if part),
        )


def _classes(accuracy: Mapping[str, float]) -> tuple[ClassChange, ...]:
    return tuple(ClassChange(name, None, None, value) for name, value in accuracy.items())


def _compared(where: str, part: Mapping[str, Any]) -> Compared:
    overall, (low, high) = part["overall"], part["interval"]
    both = [
        ClassChange(name, each["images"], each["champion_accuracy"], each["candidate_accuracy"])
        for name, each in part["per_class"].items()
    ]
    new = [ClassChange(name, each["images"], None, each["accuracy"]) for name, each in part["new_classes"].items()]
    return Compared(where, overall["images"], overall["difference"], low, high, overall["p_value"], (*both, *new))


def _maintained(workspace: Workspace, verb: str) -> Maintained:
    finding = read_json(workspace.out("triage") / f"{verb}.json", StageError)
    result = read_json(workspace.out(verb) / "result.json", StageError)
    figures = read_json(workspace.out(verb) / "metrics.json", StageError)
    return Maintained(verb, finding["needed"], finding["why"], result["done"], result["why"], figures)


def _slices(workspace: Workspace, rows: list[dict[str, str]]) -> Iterator[SliceFacts]:
    scores = read_json(workspace.out("evaluate") / "evaluation.json", StageError)["slices"]
    for each in scores["slices"]:
        yield SliceFacts(
            name=each["name"],
            categories=tuple(each["categories"]),
            recall=each["recall"],
            false_positive_rate=each["false_positive_rate"],
            parameters=each["parameters"],
            kept={row["layer"]: int(row["kept"]) for row in rows if row["slice"] == each["name"]},
        )
