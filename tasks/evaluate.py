"""Stage `evaluate`: score the model, its semantic slices and what the maintenance made of it on held-out images."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from nss.data import Dataset
from nss.evaluate import Evaluation, SlicesEvaluation, evaluate, evaluate_slices
from nss.extend_report import told_accuracy
from nss.files import replacing, write_json
from nss.model import Classifier, load_model, model_digest
from nss.slice import SemanticSlices
from tasks.batches import known_and_new
from tasks.params import EvaluateParams
from tasks.tables import confusion_rows, write_csv
from tasks.workspace import Workspace, require_same_source

# What the maintenance stages call their models.
_CANDIDATES = {"restructure": "restructured", "readapt": "readapted", "extend": "extended"}


@dataclass(frozen=True)
class _Scores:
    """Of one model: on images like those it was made for, and on those of new batches, if there are any."""

    old: Evaluation
    new: Evaluation | None
    told: dict[str, float] = field(default_factory=dict)
    """told which classes were learned together with the image's, {name of the metric: accuracy}"""

    def metrics(self, prefix: str) -> dict[str, float]:
        found = {f"{prefix}accuracy": self.old.accuracy, f"{prefix}worst_accuracy": self.old.worst_accuracy}
        found |= {f"{prefix}new_accuracy": self.new.accuracy} if self.new else {}
        return found | {f"{prefix}{name}": value for name, value in self.told.items()}

    def to_dict(self) -> dict[str, Any]:
        return {"old": self.old.to_dict(), "new": self.new and self.new.to_dict(), **self.told}


def run(params: EvaluateParams, workspace: Workspace) -> None:
    """Write artifacts/evaluate: metrics.json, per_class.csv, confusion.csv, evaluation.json, source.json.

    Batches that have arrived since the model was made are scored apart, as far as each model knows their classes.
    """
    model = load_model(workspace.out("base") / "model", workspace.packages)
    known, arrived = known_and_new(workspace, model.spec.classes)
    sources = {"data": known.digest, "model": model_digest(model)}
    for verb in ("slice", *_CANDIDATES):
        require_same_source(workspace.out(verb), **sources)
    for verb in ("readapt", "extend"):
        require_same_source(workspace.out(verb), new=arrived.digest)
    old = known.split(params.split)
    whole = _scores(model, old, arrived, params)
    parts = _slices(workspace, old, params)
    candidates = {
        name: replace(_scores(each, old, arrived, params), told=_told(each, old, arrived, params))
        for name, each in _candidates(workspace).items()
    }
    with replacing(workspace.out("evaluate")) as part:
        part.mkdir()
        write_json(part / "metrics.json", _metrics(whole, parts, candidates))
        write_csv(part / "per_class.csv", ["class", "accuracy"], whole.old.per_class.items())
        answers = confusion_rows(whole.old.confusion, whole.old.classes)
        write_csv(part / "confusion.csv", ["actual", "predicted"], answers)
        found = {"model": whole.old.to_dict(), "new": whole.new and whole.new.to_dict(), "slices": parts.to_dict()}
        found["candidates"] = {name: each.to_dict() for name, each in candidates.items()}
        write_json(part / "evaluation.json", found)
        write_json(part / "source.json", {**sources, "new": arrived.digest})


def _scores(model: Classifier, old: Dataset, arrived: Dataset, params: EvaluateParams) -> _Scores:
    scores, new = evaluate(model, old, batch_size=params.batch_size), _new(model, arrived, params)
    return _Scores(scores, evaluate(model, new, batch_size=params.batch_size) if len(new) else None)


def _new(model: Classifier, arrived: Dataset, params: EvaluateParams) -> Dataset:
    return arrived.of_classes(model.spec.classes).split(params.split)


def _told(model: Classifier, old: Dataset, arrived: Dataset, params: EvaluateParams) -> dict[str, float]:
    """Return nothing for a model that learned all its classes at once: there is nothing to tell it."""
    if not model.spec.tasks:
        return {}
    parts = {"told_accuracy": old, "new_told_accuracy": _new(model, arrived, params)}
    return {name: told_accuracy(model, part)["all"][0] for name, part in parts.items() if len(part)}


def _slices(workspace: Workspace, held_out: Dataset, params: EvaluateParams) -> SlicesEvaluation:
    slices = SemanticSlices.load(workspace.out("slice") / "slices.json")
    models = [load_model(workspace.out("slice") / "models" / each.name, workspace.packages) for each in slices]
    return evaluate_slices(slices, models, held_out, params.batch_size)


def _candidates(workspace: Workspace) -> dict[str, Classifier]:
    """Return what the maintenance stages made; one that had nothing to do made none."""
    folders = {name: workspace.out(verb) / "model" for verb, name in _CANDIDATES.items()}
    return {name: load_model(each, workspace.packages) for name, each in folders.items() if each.exists()}


def _metrics(whole: _Scores, parts: SlicesEvaluation, candidates: dict[str, _Scores]) -> dict[str, float]:
    votes = {"vote_accuracy": parts.vote_accuracy, "told_accuracy": parts.told_accuracy}
    found = {**whole.metrics(""), "images": whole.old.images, **votes}
    if whole.new:
        found["new_images"] = whole.new.images
    for name, each in candidates.items():
        found |= each.metrics(f"{name}_")
    return found
