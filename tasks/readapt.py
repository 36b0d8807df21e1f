"""Stage `readapt`: follow the batches that have arrived since the base model was made, by tuning critical neurons."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from nss.data import Dataset
from nss.evaluate import Evaluation, evaluate
from nss.files import replacing, write_json
from nss.model import Classifier, model_digest, save_model
from nss.profile import Profile
from nss.readapt import ReadaptReport, readapt
from nss.slice import SemanticSlices
from tasks.batches import known_and_new
from tasks.models import base_model
from tasks.params import ReadaptParams
from tasks.tables import Rows, write_nothing, write_tables
from tasks.wanted import is_wanted
from tasks.workspace import Workspace, require_same_source

_CHANGE = ("old_before", "old_after", "new_before", "new_after")
_TABLES = {
    "curve.csv": ("epoch", "new", "old"),
    "tuned.csv": ("layer", "tuned", "total"),
    "change.csv": ("class", *_CHANGE),
}


def run(params: ReadaptParams, workspace: Workspace) -> None:
    """Write artifacts/readapt: metrics.json, result.json, source.json, curve.csv, change.csv, tuned.csv and model/.

    When there is nothing to do, the tables are empty and there is no model; result.json says why. Images of classes
    that the model does not know are left out, and the source lists no batch that has some: it stays new, for `extend`.
    """
    model = base_model(workspace, params.device)
    known, arrived = known_and_new(workspace, model.spec.classes)
    sources = {"data": known.digest, "model": model_digest(model)}
    require_same_source(workspace.out("slice"), **sources)
    digests = {**sources, "new": arrived.digest}
    is_needed, why = is_wanted(workspace, "readapt", params.when, **digests)
    why = _nothing_to_do(arrived, model.spec.classes) if is_needed else why
    learned = [] if why else _batches_within(arrived, len(model.spec.classes))
    batches = [batch.digest for batch in known.batches] + learned
    with replacing(workspace.out("readapt")) as part:
        part.mkdir()
        write_json(part / "source.json", {**digests, "batches": batches})
        if why:
            write_nothing(part, _TABLES, why)
        else:
            _follow(part, params, workspace, model, known, arrived)


def _nothing_to_do(arrived: Dataset, classes: Sequence[str]) -> str:
    """Return why there is nothing to do, or an empty text."""
    if not len(arrived):
        return "no batch has arrived since the model was made"
    new = arrived.of_classes(classes)
    if not len(new):
        return (
            f"the new images are all of classes that the model does not know: {', '.join(_unknown(arrived, classes))}"
        )
    return "" if len(new.split("train")) else "the new batches have no image to train on, all are held out"


def _unknown(arrived: Dataset, classes: Sequence[str]) -> dict[str, int]:
    """Return {class: images} of the classes that the model does not know."""
    return {name: count for name, count in arrived.per_class_counts().items() if count and name not in classes}


def _batches_within(arrived: Dataset, classes: int) -> list[str]:
    return [batch.digest for batch in arrived.batches if int(batch.labels.max()) < classes]


def _follow(
    folder: Path, params: ReadaptParams, workspace: Workspace, model: Classifier, known: Dataset, arrived: Dataset
) -> None:
    classes = model.spec.classes
    new = arrived.of_classes(classes)
    found = readapt(
        model,
        SemanticSlices.load(workspace.out("slice") / "slices.json"),
        new,
        known,
        profile=Profile.load(workspace.out("profile") / "profile.safetensors"),
        **params.model_dump(exclude={"when", "device"}),
    )
    scores = _scores((model, found.model), (known.split("val"), new.split("val")))
    save_model(found.model, folder / "model")
    write_json(folder / "metrics.json", {**_metrics(found.report, scores), "images": len(new.split("train"))})
    write_json(folder / "result.json", {**_result(found.report), "left_to_extend": _unknown(arrived, classes)})
    tables: Rows = {
        "curve.csv": [(each.epoch, each.new_accuracy, each.old_accuracy) for each in found.report.curve],
        "tuned.csv": [(layer, *counts) for layer, counts in found.report.neurons.items()],
        "change.csv": _change(classes, scores),
    }
    write_tables(folder, _TABLES, tables)


def _scores(models: Sequence[nn.Module], parts: Sequence[Dataset]) -> dict[str, Evaluation]:
    """Score the models before and after on held-out old and new images, as far as there are such images."""
    return {
        f"{name}_{when}": evaluate(model, part)
        for name, part in zip(("old", "new"), parts, strict=True)
        for when, model in zip(("before", "after"), models, strict=True)
        if len(part)
    }


def _metrics(report: ReadaptReport, scores: dict[str, Evaluation]) -> dict[str, Any]:
    """Summarise; accuracies are on held-out images, None where there are none."""
    names = {
        "original_new_accuracy": "new_before",
        "new_accuracy": "new_after",
        "original_old_accuracy": "old_before",
        "old_accuracy": "old_after",
    }
    accuracies = {name: scores[key].accuracy if key in scores else None for name, key in names.items()}
    shares = {"trained_share": report.trained_share, "moved_share": report.moved_share}
    return {"done": 1, **accuracies, **shares, "steps": report.steps, "kept_epoch": report.kept_epoch}


def _result(report: ReadaptReport) -> dict[str, Any]:
    # How long it took is another figure each time, and outputs are not.
    details = {name: value for name, value in report.to_dict().items() if name not in ("stopped", "seconds")}
    return {"done": True, "why": report.stopped, **details}


def _change(classes: Sequence[str], scores: dict[str, Evaluation]) -> list[Sequence[Any]]:
    """Return a row for each class; None where it has no held-out images."""
    columns = [scores[name].per_class if name in scores else {} for name in _CHANGE]
    return [(name, *(column.get(name) for column in columns)) for name in classes]
