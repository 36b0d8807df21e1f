"""What the runs of base, slice, triage, evaluate and gate hold beside their files: figures, pictures, models, words."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlflow.entities import Run

from nss.files import read_json
from tasks.journal_candidates import NOTE, log_candidates
from tasks.pipeline import StageKey
from tasks.provenance import data_md5, provenance_tags
from tasks.reading import cells_of, count_confusion, numbers_of, read_csv
from tasks.tracking import Tracker
from tasks.workspace import Workspace

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SLICING = "validation"
"""What the data are used for when slices are scored."""


def log_base(tracker: Tracker, run: Run, workspace: Workspace, key: StageKey) -> None:
    """Log the training over epochs, and which champion it is when one is pinned."""
    from tasks import pictures
    from tasks.champion import read_champion

    folder, run_id = workspace.out("base"), run.info.run_id
    if champion := read_champion(workspace):
        tracker.log(run, tags={"nss.champion": f"{champion.name} version {champion.version}"})
    history = [{name: float(value) for name, value in row.items()} for row in read_csv(folder / "history.csv")]
    tracker.log(run, history=[{f"epoch_{name}": row[name] for name in row if name != "epoch"} for row in history])
    tracker.client.log_figure(run_id, pictures.training_curve(history), "training.png")
    tracker.log_model(run_id, "base", folder / "model", {"stage_key": key.digest})


@dataclass(frozen=True)
class _Slice:
    """What is logged about one semantic slice. kept, total: {layer: neurons}."""

    name: str
    categories: str
    kept: dict[str, int]
    total: dict[str, int]
    scores: dict[str, float]


def log_slice(tracker: Tracker, run: Run, workspace: Workspace, key: StageKey) -> None:
    """Log pictures of the slices, and a run of its own for each."""
    from nss.slice import SemanticSlices
    from tasks import pictures

    slices = SemanticSlices.load(workspace.out("slice") / "slices.json")
    groups = {each.name: each.categories for each in slices}
    parts = _slices(workspace.out("slice"), groups)
    drawn = {
        "dendrogram.png": pictures.dendrogram(slices.linkage, slices.classes, groups),
        "overlap.png": pictures.overlap(slices.distances, slices.linkage, slices.classes, groups),
        "kept_neurons.png": pictures.kept_neurons({part.name: part.kept for part in parts}, parts[0].total),
    }
    for name, figure in drawn.items():
        tracker.client.log_figure(run.info.run_id, figure, name)
    for part in parts:
        _log_part(tracker, run.info.run_id, workspace, key, part)


def _slices(folder: Path, groups: dict[str, tuple[str, ...]]) -> list[_Slice]:
    rows = read_csv(folder / "neurons.csv")
    total = {row["layer"]: int(row["total"]) for row in rows}
    scores = {each["name"]: numbers_of(each) for each in read_json(folder / "slices_val.json")["slices"]}
    return [
        _Slice(
            name=name,
            categories=", ".join(categories),
            kept={row["layer"]: int(row["kept"]) for row in rows if row["slice"] == name},
            total=total,
            scores=scores[name],
        )
        for name, categories in groups.items()
    ]


def _log_part(tracker: Tracker, parent: str, workspace: Workspace, key: StageKey, part: _Slice) -> None:
    from tasks import pictures

    note = f"The part of the model that tells the classes {part.categories} apart from the others."
    tags = {"nss.kind": "slice", "nss.categories": part.categories, NOTE: note, **provenance_tags(workspace)}
    run = tracker.open(part.name, {"slice": part.name, "parent_key": key.digest}, tags, parent)
    if run.info.status == "FINISHED":
        return
    whole = {"neurons_kept": sum(part.kept.values()), "neurons_total": sum(part.total.values())}
    layers = {f"kept/{layer}": count for layer, count in part.kept.items()}
    tracker.log(run, params={"categories": part.categories}, metrics={**whole, **layers, **part.scores})
    run_id = run.info.run_id
    tracker.log_data(run_id, "data", workspace.data, data_md5(workspace), SLICING)
    tracker.client.log_figure(run_id, pictures.kept_neurons({part.name: part.kept}, part.total), "kept_neurons.png")
    model = workspace.out("slice") / "models" / part.name
    tracker.log_model(run_id, part.name, model, {"categories": part.categories, "stage_key": key.digest})
    tracker.end(run_id, "FINISHED")


def log_evaluate(tracker: Tracker, run: Run, workspace: Workspace, key: StageKey) -> None:
    """Log the accuracy of each class, and how candidates compare with the champion."""
    folder = workspace.out("evaluate")
    accuracy = {row["class"]: float(row["accuracy"]) for row in read_csv(folder / "per_class.csv")}
    tracker.log(run, metrics={f"class/{name}": value for name, value in accuracy.items()})
    for name, figure in _evaluate_pictures(folder, accuracy).items():
        tracker.client.log_figure(run.info.run_id, figure, name)


def _evaluate_pictures(folder: Path, accuracy: dict[str, float]) -> dict[str, Figure]:
    from tasks import pictures

    counts = count_confusion(folder / "confusion.csv", list(accuracy))
    overall = float(read_json(folder / "metrics.json")["accuracy"])
    drawn = {
        "confusion.png": pictures.confusion(counts, list(accuracy)),
        "class_accuracy.png": pictures.class_accuracy(accuracy, overall),
    }
    rows = [(row["candidate"], cells_of(row, "candidate")) for row in read_csv(folder / "differences.csv")]
    if rows:
        found = [(name, cells["difference"], cells["low"], cells["high"]) for name, cells in rows]
        drawn["differences.png"] = pictures.differences(found)
    return drawn


def log_triage(tracker: Tracker, run: Run, workspace: Workspace, key: StageKey) -> None:
    """Log every number that the findings rest on, and what is needed."""
    verbs = ("extend", "readapt", "restructure")
    findings = {verb: read_json(workspace.out("triage") / f"{verb}.json") for verb in verbs}
    figures = {name: value for verb, each in findings.items() for name, value in _flat(each["evidence"], verb)}
    needed = [verb for verb, each in findings.items() if each["needed"]]
    tracker.log(run, metrics=figures, tags={"nss.needed": ", ".join(needed) or "nothing"})


def _flat(content: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, float]]:
    for name, value in content.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}/{name}")
        elif isinstance(value, int | float):
            yield f"{prefix}/{name}", float(value)


def log_gate(tracker: Tracker, run: Run, workspace: Workspace, key: StageKey) -> None:
    """Log verdicts as tags, the candidates' figures, and all reasons in words; to the candidates' own runs too."""
    from tasks.reasons import all_reasons

    decision = read_json(workspace.out("gate") / "gate.json")
    tags = {"nss.verdict": decision["verdict"], "nss.promoted": decision["promoted"] or "nothing"}
    tags |= {f"nss.verdict.{each['verb']}": each["verdict"] for each in decision["judgements"]}
    figures = {
        f"{verb}/{name}": value
        for verb, each in decision["candidates"].items()
        for name, value in each["figures"].items()
    }
    tracker.log(run, metrics=figures, tags=tags)
    tracker.client.log_text(run.info.run_id, all_reasons(decision), "reasons.md")
    log_candidates(tracker, workspace, run)
