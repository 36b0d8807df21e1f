"""What the runs of restructure, readapt and extend hold beside their files: curves, figures, pictures, the model.

For stages that had something to do: the others wrote no model.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from mlflow.entities import Run

from nss.files import read_json
from tasks.params import load_params
from tasks.pipeline import StageKey
from tasks.reading import cells_of, count_confusion, read_csv
from tasks.tracking import Tracker
from tasks.workspace import Workspace

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def log_restructure(tracker: Tracker, run: Run, workspace: Workspace, key: StageKey) -> None:
    """Log neurons kept by layer, what each class lost, bytes and latency."""
    folder, run_id = workspace.out("restructure"), run.info.run_id
    kept = {row["layer"]: int(row["kept"]) for row in read_csv(folder / "kept.csv")}
    change = {row["class"]: (float(row["before"]), float(row["after"])) for row in read_csv(folder / "change.csv")}
    changes = {f"val_class_change/{name}": after - before for name, (before, after) in change.items()}
    tracker.log(run, metrics={**{f"kept/{name}": count for name, count in kept.items()}, **changes})
    for name, figure in _restructure_pictures(folder, kept, change).items():
        tracker.client.log_figure(run_id, figure, name)
    tracker.log(run, metrics=_sizes_on_disk_and_in_time(workspace))
    tracker.log_model(run_id, "restructured", folder / "model", {"stage_key": key.digest})


def _restructure_pictures(
    folder: Path, kept: dict[str, int], change: dict[str, tuple[float, float]]
) -> dict[str, Figure]:
    from tasks import pictures

    total = {row["layer"]: int(row["total"]) for row in read_csv(folder / "kept.csv")}
    drawn = {"kept_neurons.png": pictures.kept_neurons({"restructured": kept}, total)}
    if change:  # there is a validation split
        curve = [(float(row["macs"]), float(row["accuracy"])) for row in read_csv(folder / "curve.csv")]
        drawn["size_curve.png"] = pictures.size_curve(curve, read_json(folder / "metrics.json")["macs_kept"])
        drawn["class_change.png"] = pictures.class_change(change)
    return drawn


def _sizes_on_disk_and_in_time(workspace: Workspace) -> dict[str, float]:
    """Measured here and not in the stage: a duration is another one each time, and outputs are not."""
    from nss.latency import random_pixels, time_calls
    from tasks.models import model_in

    device = load_params(workspace.params).restructure.device
    folders = {"original_": workspace.out("base") / "model", "": workspace.out("restructure") / "model"}
    models = {name: model_in(folder, workspace, device) for name, folder in folders.items()}
    latencies = time_calls(models, random_pixels(64, models[""].spec.input_shape))
    found: dict[str, float] = {
        f"{name}bytes": (folder / "model.safetensors").stat().st_size for name, folder in folders.items()
    }
    for name, latency in latencies.items():
        found |= {f"{name}latency_ms_{size}": each for size, each in latency.median_ms.items()}
    return found


def log_readapt(tracker: Tracker, run: Run, workspace: Workspace, key: StageKey) -> None:
    """Log accuracies over epochs, what each class gained and lost, neurons tuned by layer."""
    folder, run_id = workspace.out("readapt"), run.info.run_id
    curve = [cells_of(row) for row in read_csv(folder / "curve.csv")]
    steps = [{f"epoch_{name}": value for name, value in row.items() if name != "epoch"} for row in curve]
    # Step 0 is the original, step 1 the first epoch.
    tracker.log(run, metrics=steps[0], history=steps[1:])
    changes = _changes(folder)
    for part, change in changes.items():
        points = {f"val_class_change_{part}/{name}": after - before for name, (before, after) in change.items()}
        tracker.log(run, metrics=points)
    tuned = {row["layer"]: int(row["tuned"]) for row in read_csv(folder / "tuned.csv")}
    tracker.log(run, metrics={f"tuned/{name}": count for name, count in tuned.items()})
    for name, figure in _readapt_pictures(folder, curve, changes, tuned).items():
        tracker.client.log_figure(run_id, figure, name)
    tracker.log_model(run_id, "readapted", folder / "model", {"stage_key": key.digest})


def _changes(folder: Path) -> dict[str, dict[str, tuple[float, float]]]:
    """Return {"old", "new": {class: accuracy before and after}} for those classes that have held-out images."""
    rows = [(row["class"], cells_of(row, "class")) for row in read_csv(folder / "change.csv")]
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

    total = {row["layer"]: int(row["total"]) for row in read_csv(folder / "tuned.csv")}
    points = [(int(row["epoch"]), row.get("new"), row.get("old")) for row in curve]
    drawn = {
        "learning_curve.png": pictures.following_curve(points, read_json(folder / "metrics.json")["kept_epoch"]),
        "tuned_neurons.png": pictures.kept_neurons({"tuned": tuned}, total, "tuned"),
    }
    for part, change in changes.items():
        if change:
            drawn[f"class_change_{part}.png"] = pictures.class_change(change)
    return drawn


def log_extend(tracker: Tracker, run: Run, workspace: Workspace, key: StageKey) -> None:
    """Log loss and accuracy over epochs, what each class gained and lost, neurons used and free by layer."""
    folder, run_id = workspace.out("extend"), run.info.run_id
    curve = [cells_of(row) for row in read_csv(folder / "curve.csv")]
    tracker.log(run, history=[{f"epoch_{name}": row[name] for name in row if name != "epoch"} for row in curve])
    accuracies = {row["class"]: cells_of(row, "class") for row in read_csv(folder / "change.csv")}
    room = {row["layer"]: cells_of(row, "layer") for row in read_csv(folder / "capacity.csv")}
    forgetting = {name: (each["before"], each["after"]) for name, each in accuracies.items() if "before" in each}
    points = {f"val_class_change/{name}": after - before for name, (before, after) in forgetting.items()}
    points |= {f"val_class/{name}": each["after"] for name, each in accuracies.items() if "after" in each}
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
        counts = count_confusion(folder / f"{name}.csv", classes)
        if counts.any():
            drawn[f"{name}.png"] = pictures.confusion(counts, classes)
    return drawn
