"""What the gate adds to the runs of the models that it judged, so that MLflow's pages put them side by side.

What a stage itself measured of its classes is on the validation split, and its names begin with val_. What the gate
went by has the same names for every candidate and for the champion: accuracy, class/NAME, macs.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from mlflow.entities import Run

from nss.files import read_json
from tasks.pipeline import Pipeline
from tasks.reasons import reason_lines, verdict_words
from tasks.tracking import Tracker
from tasks.workspace import Workspace

NOTE = "mlflow.note.content"
"""the tag that MLflow shows as a run's description, Markdown"""
JUDGED_BY = "nss.judged_by"
"""the tag that names the gate's run whose figures a candidate's run holds"""


@dataclass(frozen=True)
class _Model:
    """What the gate went by. verb: the stage that made the model."""

    verb: str
    metrics: Mapping[str, float]
    tags: Mapping[str, str]


def log_candidates(tracker: Tracker, workspace: Workspace, gate: Run) -> None:
    """Log to the run of each candidate, and of the champion, what the gate's run `gate` judged by.

    Doing it again changes nothing. Where another gate's run has judged the model in between, the newest figures count.

    >>> log_candidates(tracker, workspace, tracker.find(stage="gate"))  # doctest: +SKIP
    """
    pipeline = Pipeline(workspace)
    for model in _models(workspace):
        # Nearly always it is the newest run, and the key takes a look at all that the stage depends on.
        newest = tracker.find(stage=model.verb)
        if newest is None or _is_judged(newest, gate):
            continue
        run = tracker.find(stage=model.verb, stage_key=pipeline.stage_key(model.verb).digest)
        if run is not None and not _is_judged(run, gate):
            _log(tracker, run, model, gate)


def _is_judged(run: Run, gate: Run) -> bool:
    return bool(run.data.tags.get(JUDGED_BY) == gate.info.run_id)


def _log(tracker: Tracker, run: Run, model: _Model, gate: Run) -> None:
    # Not the run's own time, as for what it made itself: of two values MLflow shows the one logged later.
    tracker.log(run, metrics=model.metrics, when=int(time.time() * 1000))
    # Last, since it says that all is there.
    tracker.log(run, tags={**model.tags, JUDGED_BY: gate.info.run_id})


def _models(workspace: Workspace) -> Iterator[_Model]:
    decision = read_json(workspace.out("gate") / "gate.json")
    if not decision["judgements"]:
        return
    candidates = {each["verb"]: each for each in read_json(workspace.out("evaluate") / "candidates.json")}
    for judgement in decision["judgements"]:
        verb = judgement["verb"]
        figures = decision["candidates"][verb]["figures"]
        tags = {"nss.role": "candidate", "nss.verdict": judgement["verdict"], NOTE: _candidate_note(judgement)}
        yield _Model(verb, {**figures, **_by_class(candidates[verb]["per_class"] or {})}, tags)
    if "base" not in candidates:
        tags = {"nss.role": "champion", NOTE: "The champion, which the candidates of this cycle are compared with."}
        size = next(iter(candidates.values()))["champion_size"]
        yield _Model("base", {**size, **_champion_figures(workspace)}, tags)


def _champion_figures(workspace: Workspace) -> dict[str, float]:
    """Return how the champion does on all held-out images of classes that it knows, those that have arrived too."""
    found = read_json(workspace.out("evaluate") / "evaluation.json")
    confusion = np.sum([each["confusion"] for each in (found["model"], found["new"]) if each], axis=0)
    names = read_json(workspace.out("base") / "model" / "model.json")["classes"]
    rows = zip(names, confusion.diagonal().tolist(), confusion.sum(axis=1).tolist(), strict=True)
    accuracy = {name: right / images for name, right, images in rows if images}
    overall = {"images": int(confusion.sum()), "accuracy": float(confusion.trace() / confusion.sum())}
    return {**overall, "worst_class_accuracy": min(accuracy.values()), **_by_class(accuracy)}


def _by_class(accuracy: Mapping[str, float]) -> dict[str, float]:
    return {f"class/{name}": value for name, value in accuracy.items()}


def gate_note(decision: Mapping[str, Any]) -> str:
    """Return the verdict on every candidate, one line each, as Markdown.

    >>> gate_note({"verdict": "HOLD", "promoted": None, "judgements": []})
    '**HOLD**: no candidate is promoted'
    """
    lines = [f"**{decision['verdict']}**: {decision['promoted'] or 'no candidate'} is promoted"]
    lines += [f"{each['verb']}: {each['verdict']}, {verdict_words(each)}" for each in decision["judgements"]]
    return "\n\n".join(lines)


def _candidate_note(judgement: Mapping[str, Any]) -> str:
    return "\n".join([f"**{judgement['verdict']}**: {verdict_words(judgement)}", "", *reason_lines(judgement)])
