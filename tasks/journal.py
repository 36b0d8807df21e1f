"""What the MLflow run of a stage holds: a pure function of the stage's outputs, its parameters and its key.

So a run can be made at any time: by the stage itself, or later from what lies on disk. matplotlib and the slices are
imported only when something is drawn: a run that finds everything cached draws nothing.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from mlflow.entities import Run

from nss.files import read_json
from tasks.params import Params
from tasks.pipeline import StageKey
from tasks.provenance import data_md5, provenance_tags
from tasks.tracking import Tracker
from tasks.workspace import Workspace

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_CONTEXT = {
    "base": "training",
    "profile": "profiling",
    "slice": "validation",
    "restructure": "validation",
    "readapt": "training",
    "extend": "training",
    "evaluate": "evaluation",
}


def begin(tracker: Tracker, workspace: Workspace, verb: str, key: StageKey, parent: str | None) -> Run:
    """Return the run of this stage for this key, running unless it has finished before."""
    tags = {"nss.kind": "stage", **provenance_tags(workspace, key)}
    return tracker.open(verb, {"stage": verb, "stage_key": key.digest}, tags, parent)


def complete(tracker: Tracker, run: Run, workspace: Workspace, params: Params, verb: str, key: StageKey) -> None:
    """Log what the stage left on disk and end the run. A run that has finished before is left alone."""
    if run.info.status == "FINISHED":
        return
    folder = workspace.out(verb)
    tracker.log(run, params=params.group(verb).model_dump(), metrics=_numbers(read_json(folder / "metrics.json")))
    tracker.log_data(run.info.run_id, "data", workspace.data, data_md5(workspace), _CONTEXT[verb])
    for path in sorted([*folder.glob("*.json"), *folder.glob("*.csv")]):
        tracker.client.log_artifact(run.info.run_id, str(path))
    if verb in _DETAILS:
        _DETAILS[verb](tracker, run, workspace, key)
    tracker.end(run.info.run_id, "FINISHED")


def backfill(
    tracker: Tracker, workspace: Workspace, params: Params, verb: str, key: StageKey, parent: str | None
) -> str:
    """Return the id of the finished run of a stage whose outputs are on disk, making the run up when it is missing."""
    run = tracker.find(stage=verb, stage_key=key.digest)
    if run is None or run.info.status != "FINISHED":
        run = begin(tracker, workspace, verb, key, parent)
        complete(tracker, run, workspace, params, verb, key)
    return run.info.run_id


def _log_base(tracker: Tracker, run: Run, workspace: Workspace, key: StageKey) -> None:
    from tasks import pictures
    from tasks.champion import read_champion

    folder, run_id = workspace.out("base"), run.info.run_id
    if champion := read_champion(workspace):
        tracker.log(run, tags={"nss.champion": f"{champion.name} version {champion.version}"})
    history = [{name: float(value) for name, value in row.items()} for row in _table(folder / "history.csv")]
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


def _log_slice(tracker: Tracker, run: Run, workspace: Workspace, key: StageKey) -> None:
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
    rows = _table(folder / "neurons.csv")
    total = {row["layer"]: int(row["total"]) for row in rows}
    scores = {each["name"]: _numbers(each) for each in read_json(folder / "slices_val.json")["slices"]}
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

    tags = {"nss.kind": "slice", "nss.categories": part.categories, **provenance_tags(workspace)}
    run = tracker.open(part.name, {"slice": part.name, "parent_key": key.digest}, tags, parent)
    if run.info.status == "FINISHED":
        return
    whole = {"neurons_kept": sum(part.kept.values()), "neurons_total": sum(part.total.values())}
    layers = {f"kept/{layer}": count for layer, count in part.kept.items()}
    tracker.log(run, params={"categories": part.categories}, metrics={**whole, **layers, **part.scores})
    run_id = run.info.run_id
    tracker.log_data(run_id, "data", workspace.data, data_md5(workspace), _CONTEXT["slice"])
    tracker.client.log_figure(run_id, pictures.kept_neurons({part.name: part.kept}, part.total), "kept_neurons.png")
    model = workspace.out("slice") / "models" / part.name
    tracker.log_model(run_id, part.name, model, {"categories": part.categories, "stage_key": key.digest})
    tracker.end(run_id, "FINISHED")


def _log_restructure(tracker: Tracker, run: Run, workspace: Workspace, key: StageKey) -> None:
    folder, run_id = workspace.out("restructure"), run.info.run_id
    if not (folder / "model").exists():
        return  # restructure.when is never
    kept = {row["layer"]: int(row["kept"]) for row in _table(folder / "kept.csv")}
    change = {row["class"]: (float(row["before"]), float(row["after"])) for row in _table(folder / "change.csv")}
    changes = {f"class_change/{name}": after - before for name, (before, after) in change.items()}
    tracker.log(run, metrics={**{f"kept/{name}": count for name, count in kept.items()}, **changes})
    for name, figure in _restructure_pictures(folder, kept, change).items():
        tracker.client.log_figure(run_id, figure, name)
    tracker.log(run, metrics=_sizes_on_disk_and_in_time(workspace))
    tracker.log_model(run_id, "restructured", folder / "model", {"stage_key": key.digest})


def _restructure_pictures(
    folder: Path, kept: dict[str, int], change: dict[str, tuple[float, float]]
) -> dict[str, Figure]:
    from tasks import pictures

    total = {row["layer"]: int(row["total"]) for row in _table(folder / "kept.csv")}
    drawn = {"kept_neurons.png": pictures.kept_neurons({"restructured": kept}, total)}
    if change:  # there is a validation split
        curve = [(float(row["macs"]), float(row["accuracy"])) for row in _table(folder / "curve.csv")]
        drawn["size_curve.png"] = pictures.size_curve(curve, read_json(folder / "metrics.json")["macs_kept"])
        drawn["class_change.png"] = pictures.class_change(change)
    return drawn


def _sizes_on_disk_and_in_time(workspace: Workspace) -> dict[str, float]:
    """Measured here and not in the stage: a duration is another one each time, and outputs are not."""
    from nss.latency import random_pixels, time_calls
    from nss.model import load_model

    folders = {"original_": workspace.out("base") / "model", "": workspace.out("restructure") / "model"}
    models = {name: load_model(folder, workspace.packages) for name, folder in folders.items()}
    latencies = time_calls(models, random_pixels(64, models[""].spec.input_shape))
    found = {f"{name}bytes": (folder / "model.safetensors").stat().st_size for name, folder in folders.items()}
    for name, latency in latencies.items():
        found |= {f"{name}latency_ms_{size}": each for size, each in latency.median_ms.items()}
    return found


def _log_readapt(tracker: Tracker, run: Run, workspace: Workspace, key: StageKey) -> None:
    folder, run_id = workspace.out("readapt"), run.info.run_id
    if not (folder / "model").exists():
        return  # there was nothing to do
    curve = [_numbers_of(row) for row in _table(folder / "curve.csv")]
    steps = [{f"epoch_{name}": value for name, value in row.items() if name != "epoch"} for row in curve]
    # Step 0 is the original, step 1 the first epoch.
    tracker.log(run, metrics=steps[0], history=steps[1:])
    changes = _changes(folder)
    for part, change in changes.items():
        points = {f"class_change_{part}/{name}": after - before for name, (before, after) in change.items()}
        tracker.log(run, metrics=points)
    tuned = {row["layer"]: int(row["tuned"]) for row in _table(folder / "tuned.csv")}
    tracker.log(run, metrics={f"tuned/{name}": count for name, count in tuned.items()})
    for name, figure in _readapt_pictures(folder, curve, changes, tuned).items():
        tracker.client.log_figure(run_id, figure, name)
    tracker.log_model(run_id, "readapted", folder / "model", {"stage_key": key.digest})


def _changes(folder: Path) -> dict[str, dict[str, tuple[float, float]]]:
    """Return {"old", "new": {class: accuracy before and after}} for those classes that have held-out images."""
    rows = [(row["class"], _numbers_of(row, "class")) for row in _table(folder / "change.csv")]
    return {
        part: {name: (row[f"{part}_before"], row[f"{part}_after"]) for name, row in rows if f"{part}_before" in row}
        for part in ("old", "new")
    }


def _readapt_pictures(
    folder: Path,
    curve: list[dict[str, float]],
    changes: dict[str, dict[str, tuple[float, float]]],
    tuned: dict[str, int],
) -> dict[str, Figure]:
    from tasks import pictures

    total = {row["layer"]: int(row["total"]) for row in _table(folder / "tuned.csv")}
    points = [(int(row["epoch"]), row.get("new"), row.get("old")) for row in curve]
    drawn = {
        "learning_curve.png": pictures.following_curve(points, read_json(folder / "metrics.json")["kept_epoch"]),
        "tuned_neurons.png": pictures.kept_neurons({"tuned": tuned}, total, "tuned"),
    }
    for part, change in changes.items():
        if change:
            drawn[f"class_change_{part}.png"] = pictures.class_change(change)
    return drawn


def _log_extend(tracker: Tracker, run: Run, workspace: Workspace, key: StageKey) -> None:
    folder, run_id = workspace.out("extend"), run.info.run_id
    if not (folder / "model").exists():
        return  # there was nothing to do
    curve = [_numbers_of(row) for row in _table(folder / "curve.csv")]
    tracker.log(run, history=[{f"epoch_{name}": row[name] for name in row if name != "epoch"} for row in curve])
    accuracies = {row["class"]: _numbers_of(row, "class") for row in _table(folder / "change.csv")}
    room = {row["layer"]: _numbers_of(row, "layer") for row in _table(folder / "capacity.csv")}
    forgetting = {name: (each["before"], each["after"]) for name, each in accuracies.items() if "before" in each}
    points = {f"class_change/{name}": after - before for name, (before, after) in forgetting.items()}
    points |= {f"class/{name}": each["after"] for name, each in accuracies.items() if "after" in each}
    for layer, each in room.items():
        points |= {f"used/{layer}": each["old"] + each["new"], f"free/{layer}": each["free"]}
    tracker.log(run, metrics=points)
    for name, figure in _extend_pictures(folder, curve, forgetting, room, list(accuracies)).items():
        tracker.client.log_figure(run_id, figure, name)
    tracker.log_model(run_id, "extended", folder / "model", {"stage_key": key.digest})


def _extend_pictures(
    folder: Path,
    curve: list[dict[str, float]],
    forgetting: dict[str, tuple[float, float]],
    room: dict[str, dict[str, float]],
    classes: list[str],
) -> dict[str, Figure]:
    from tasks import pictures

    points = [(int(row["epoch"]), row["loss"], row.get("new")) for row in curve]
    used = {layer: (int(each["total"]), int(each["old"]), int(each["new"])) for layer, each in room.items()}
    drawn = {"learning_curve.png": pictures.learning_curve(points), "capacity.png": pictures.capacity(used)}
    if forgetting:
        drawn["class_change.png"] = pictures.class_change(forgetting)
    for name in ("confusion_before", "confusion_after"):
        counts = _confusion(folder / f"{name}.csv", classes)
        if counts.any():
            drawn[f"{name}.png"] = pictures.confusion(counts, classes)
    return drawn


def _log_evaluate(tracker: Tracker, run: Run, workspace: Workspace, key: StageKey) -> None:
    from tasks import pictures

    folder, run_id = workspace.out("evaluate"), run.info.run_id
    accuracy = {row["class"]: float(row["accuracy"]) for row in _table(folder / "per_class.csv")}
    overall = float(read_json(folder / "metrics.json")["accuracy"])
    counts = _confusion(folder / "confusion.csv", list(accuracy))
    tracker.log(run, metrics={f"class/{name}": value for name, value in accuracy.items()})
    tracker.client.log_figure(run_id, pictures.confusion(counts, list(accuracy)), "confusion.png")
    tracker.client.log_figure(run_id, pictures.class_accuracy(accuracy, overall), "class_accuracy.png")


def _confusion(path: Path, classes: list[str]) -> np.ndarray:
    """Count the rows of a table of actual and predicted classes, [actual, predicted]."""
    places = {name: place for place, name in enumerate(classes)}
    counts = np.zeros((len(places), len(places)), dtype=int)
    for row in _table(path):
        counts[places[row["actual"]], places[row["predicted"]]] += 1
    return counts


_DETAILS = {
    "base": _log_base,
    "slice": _log_slice,
    "restructure": _log_restructure,
    "readapt": _log_readapt,
    "extend": _log_extend,
    "evaluate": _log_evaluate,
}


def _table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def _numbers_of(row: dict[str, str], *texts: str) -> dict[str, float]:
    """Return the numbers in a row of a table, without the columns named and the cells that are empty."""
    return {name: float(cell) for name, cell in row.items() if name not in texts and cell}


def _numbers(content: dict[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in content.items() if isinstance(value, int | float)}
