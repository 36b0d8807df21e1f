"""Stage `evaluate`: score the model, its semantic slices and what the maintenance made of it on held-out images."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from nss.data import Dataset
from nss.errors import StageError
from nss.evaluate import Evaluation, SlicesEvaluation, evaluate_slices
from nss.files import read_json, replacing, write_json
from nss.model import model_digest
from nss.slice import SemanticSlices
from tasks.batches import known_and_new
from tasks.candidates import Answers, Scores, candidate
from tasks.models import base_model, model_in
from tasks.params import EvaluateParams
from tasks.tables import confusion_rows, write_csv
from tasks.workspace import Workspace, require_same_source

# What the maintenance stages call their models.
_CANDIDATES = {"restructure": "restructured", "readapt": "readapted", "extend": "extended"}
_DIFFERENCES = ("candidate", "difference", "low", "high", "p_value", "images")


def run(params: EvaluateParams, workspace: Workspace) -> None:
    """Write artifacts/evaluate: metrics.json, evaluation.json, candidates.json, source.json, and tables.

    The tables are per_class.csv, confusion.csv and differences.csv. Batches that have arrived since the model was made
    are scored apart, as far as each model knows their classes. candidates.json is what the gate decides by.
    """
    model = base_model(workspace, params.device)
    known, arrived = known_and_new(workspace, model.spec.classes)
    sources = {"data": known.digest, "model": model_digest(model)}
    for verb in ("slice", *_CANDIDATES):
        require_same_source(workspace.out(verb), **sources)
    for verb in ("readapt", "extend"):
        require_same_source(workspace.out(verb), new=arrived.digest)
    old, new = known.split(params.split), arrived.split(params.split)
    base = _scores(workspace, "base", old, new, params)
    made = {verb: _scores(workspace, verb, old, new, params) for verb in _candidates(workspace)}
    parts = _slices(workspace, old, params)
    candidates = [candidate(verb, scores, base) for verb, scores in made.items()]
    if read_json(workspace.out("base") / "champion.json", StageError) is None:
        candidates.append(candidate("base", base, base))
    with replacing(workspace.out("evaluate")) as part:
        part.mkdir()
        write_json(part / "source.json", {**sources, "new": arrived.digest})
        write_json(part / "metrics.json", _metrics(base, parts, made, candidates))
        write_json(part / "evaluation.json", _evaluation(base, parts, made))
        write_json(part / "candidates.json", candidates)
        _write_tables(part, base, candidates)


def _scores(workspace: Workspace, verb: str, old: Dataset, new: Dataset, params: EvaluateParams) -> Scores:
    folder = workspace.out(verb)
    model = model_in(folder / "model", workspace, params.device)
    batches = read_json(folder / "source.json", StageError)["batches"]
    known, arrived = (Answers.of(model, part, params.batch_size) for part in (old, new))
    return Scores(folder / "model", known, arrived, batches)


def _candidates(workspace: Workspace) -> list[str]:
    """Return the stages that made a model; one that had nothing to do made none."""
    return [verb for verb in _CANDIDATES if (workspace.out(verb) / "model").exists()]


def _slices(workspace: Workspace, held_out: Dataset, params: EvaluateParams) -> SlicesEvaluation:
    slices = SemanticSlices.load(workspace.out("slice") / "slices.json")
    folder = workspace.out("slice") / "models"
    models = [model_in(folder / each.name, workspace, params.device) for each in slices]
    return evaluate_slices(slices, models, held_out, params.batch_size)


def _metrics(
    base: Scores, parts: SlicesEvaluation, made: Mapping[str, Scores], candidates: Sequence[Mapping[str, Any]]
) -> dict[str, float]:
    """Summarise; figures without images lack."""
    found = {**_accuracies("", base), "images": _on_known(base).images}
    found |= {"vote_accuracy": parts.vote_accuracy, "told_accuracy": parts.told_accuracy}
    if base.new.evaluation:
        found["new_images"] = base.new.evaluation.images
    for verb, scores in made.items():
        found |= _accuracies(f"{_CANDIDATES[verb]}_", scores)
    for each in candidates:
        for part, name in (("known", ""), ("arrived", "new_")):
            if each[part] and each[part]["overall"]["images"]:
                overall = each[part]["overall"]
                found[f"{_CANDIDATES[each['verb']]}_{name}difference"] = overall["difference"]
                found[f"{_CANDIDATES[each['verb']]}_{name}p_value"] = overall["p_value"]
    return found


def _accuracies(prefix: str, scores: Scores) -> dict[str, float]:
    old, new = _on_known(scores), scores.new.evaluation
    found = {"accuracy": old.accuracy, "worst_accuracy": old.worst_accuracy}
    found |= {"new_accuracy": new.accuracy} if new else {}
    return {f"{prefix}{name}": value for name, value in {**found, **_told(scores)}.items()}


def _on_known(scores: Scores) -> Evaluation:
    found = scores.old.evaluation
    # Without such images the slices could not be scored, and nothing is written.
    assert found is not None
    return found


def _told(scores: Scores) -> dict[str, float]:
    """Return nothing for a model that learned all its classes at once: there is nothing to tell it."""
    if not scores.model.spec.tasks:
        return {}
    found = {"told_accuracy": scores.old.told_accuracy, "new_told_accuracy": scores.new.told_accuracy}
    return {name: value for name, value in found.items() if value is not None}


def _evaluation(base: Scores, parts: SlicesEvaluation, made: Mapping[str, Scores]) -> dict[str, Any]:
    old, new = _on_known(base), base.new.evaluation
    found = {"model": old.to_dict(), "new": new and new.to_dict(), "slices": parts.to_dict()}
    return {**found, "candidates": {_CANDIDATES[verb]: _described(scores) for verb, scores in made.items()}}


def _described(scores: Scores) -> dict[str, Any]:
    old, new = _on_known(scores), scores.new.evaluation
    return {"old": old.to_dict(), "new": new and new.to_dict(), **_told(scores)}


def _write_tables(folder: Path, base: Scores, candidates: Sequence[Mapping[str, Any]]) -> None:
    scores = _on_known(base)
    write_csv(folder / "per_class.csv", ["class", "accuracy"], scores.per_class.items())
    write_csv(folder / "confusion.csv", ["actual", "predicted"], confusion_rows(scores.confusion, scores.classes))
    write_csv(folder / "differences.csv", _DIFFERENCES, [row for each in candidates for row in _differences(each)])


def _differences(candidate: Mapping[str, Any]) -> Iterator[Sequence[Any]]:
    """A row for the known and one for the new images that it was compared on with the champion."""
    for part, name in (("known", "known images"), ("arrived", "new images")):
        found = candidate[part]
        if found and found["overall"]["images"]:
            overall = found["overall"]
            figures = (overall["difference"], *found["interval"], overall["p_value"], overall["images"])
            yield f"{candidate['verb']}, {name}", *figures
