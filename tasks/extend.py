"""Stage `extend`: learn the classes that have arrived since the base model was made, beside those that it knows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from nss.data import Dataset
from nss.evaluate import confusion_of
from nss.extend import ExtendReport, extend
from nss.extend_report import NOBODY, Told, judge_answers
from nss.files import replacing, write_json
from nss.model import Classifier, model_digest, save_model
from nss.predict import answers_of, predict
from nss.profile import Profile
from nss.slice import SemanticSlices
from tasks.batches import known_and_new, with_new_classes
from tasks.models import base_model
from tasks.params import ExtendParams
from tasks.tables import Rows, confusion_rows, write_nothing, write_tables
from tasks.wanted import is_wanted
from tasks.workspace import Workspace, require_same_source

_TABLES = {
    "curve.csv": ("epoch", "loss", "new"),
    "change.csv": ("class", "before", "after"),
    "capacity.csv": ("layer", "total", "old", "new", "free", "widened"),
    "confusion_before.csv": ("actual", "predicted"),
    "confusion_after.csv": ("actual", "predicted"),
}
# How long it took is another figure each time. Accuracies stand in metrics.json, on the images that the tables are on.
_LEFT_OUT = ("seconds", "accuracies", "before")


def run(params: ExtendParams, workspace: Workspace) -> None:
    """Write artifacts/extend: metrics.json, result.json, source.json, model/, and tables of accuracies and neurons.

    Learned are the new batches that hold a class that the model does not know; other new batches are left to `readapt`,
    and stay new. When there is nothing to do, the tables are empty and there is no model; result.json says why.
    """
    model = base_model(workspace, params.device)
    known, arrived = known_and_new(workspace, model.spec.classes)
    sources = {"data": known.digest, "model": model_digest(model)}
    require_same_source(workspace.out("slice"), **sources)
    new = with_new_classes(arrived, len(model.spec.classes))
    digests = {**sources, "new": arrived.digest}
    is_needed, why = is_wanted(workspace, "extend", params.when, **digests)
    why = _nothing_to_do(arrived, new, len(model.spec.classes)) if is_needed else why
    batches = [batch.digest for batch in (*known.batches, *(() if why else new.batches))]
    with replacing(workspace.out("extend")) as part:
        part.mkdir()
        write_json(part / "source.json", {**digests, "batches": batches})
        if why:
            write_nothing(part, _TABLES, why)
        else:
            _learn(part, params, workspace, model, known, new)


def _nothing_to_do(arrived: Dataset, new: Dataset, known: int) -> str:
    """Return why there is nothing to do, or an empty text."""
    if not len(arrived):
        return "no batch has arrived since the model was made"
    if not len(new):
        return "the new batches hold no class that the model does not know"
    counts = list(new.split("train").per_class_counts().items())[known:]
    missing = [name for name, count in counts if not count]
    return f"the new batches have no image to train on of {', '.join(missing)}" if missing else ""


def _learn(
    folder: Path, params: ExtendParams, workspace: Workspace, model: Classifier, known: Dataset, new: Dataset
) -> None:
    found = extend(
        model,
        SemanticSlices.load(workspace.out("slice") / "slices.json"),
        new,
        profile=Profile.load(workspace.out("profile") / "profile.safetensors"),
        old_data=known,
        **params.model_dump(exclude={"when", "device"}),
    )
    held_out = replace(new, batches=(*known.batches, *new.batches)).split("val")
    classes = len(model.spec.classes)
    before, confused_before = _judge(model, held_out, classes)
    after, confused_after = _judge(found.model, held_out, classes)
    images = int((new.split("train").labels >= classes).sum())
    save_model(found.model, folder / "model")
    write_json(folder / "metrics.json", {**_metrics(found.report, before, after), "images": images})
    write_json(folder / "result.json", _result(found.report))
    tables: Rows = {
        "curve.csv": [(each.epoch, each.loss, each.new_accuracy) for each in found.report.curve],
        "change.csv": [(name, before.per_class.get(name), after.per_class.get(name)) for name in new.classes],
        "capacity.csv": _capacity(found.report),
        "confusion_before.csv": confused_before,
        "confusion_after.csv": confused_after,
    }
    write_tables(folder, _TABLES, tables)


def _judge(model: Classifier, held_out: Dataset, known: int) -> tuple[Told, list[tuple[str, str]]]:
    """Judge a model on the classes that it knows, and list what it answers to all images."""
    if not len(held_out):
        return NOBODY, []
    logits, labels = predict(model, held_out)
    within = labels < logits.shape[1]
    confusion = confusion_of(answers_of(logits), labels, len(held_out.classes))
    return judge_answers(model, logits[within], labels[within], known), confusion_rows(confusion, held_out.classes)


def _metrics(report: ExtendReport, before: Told, after: Told) -> dict[str, Any]:
    """Summarise; accuracies are on held-out images, None where there are none."""
    return {
        "done": 1,
        "accuracy": after.overall,
        "original_old_accuracy": before.overall,
        "old_accuracy": after.old,
        "old_told_accuracy": after.old_told,
        "new_accuracy": after.new,
        "new_told_accuracy": after.new_told,
        "trained_share": report.trained_share,
        "shrinkage": report.shrinkage,
        "replayed": report.replayed,
        "steps": report.steps,
    }


def _result(report: ExtendReport) -> dict[str, Any]:
    details = {name: value for name, value in report.to_dict().items() if name not in _LEFT_OUT}
    return {"done": True, "why": f"new classes have arrived: {', '.join(report.classes)}", **details}


def _capacity(report: ExtendReport) -> list[Sequence[Any]]:
    return [
        (layer, each.total, sum(each.used[:-1]), each.used[-1], each.free, each.widened)
        for layer, each in report.capacity.items()
    ]
