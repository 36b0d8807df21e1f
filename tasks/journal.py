"""What the MLflow run of a stage holds: a pure function of the stage's outputs, its parameters and its key.

So a run can be made at any time: by the stage itself, or later from what lies on disk. matplotlib and the slices are
imported only when something is drawn: a run that finds everything cached draws nothing. What a stage logs beside its
files, settings and metrics stands in tasks/journal_stages.py and tasks/journal_models.py; what the gate adds to the
runs of the models that it judged, in tasks/journal_candidates.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from mlflow.entities import Run
from pydantic import BaseModel

from nss.files import read_json
from tasks import journal_models, journal_stages
from tasks.journal_candidates import NOTE, gate_note, log_candidates
from tasks.params import MAINTENANCE, Params
from tasks.pipeline import StageKey
from tasks.provenance import data_md5, provenance_tags
from tasks.reading import numbers_of
from tasks.reasons import triage_words
from tasks.tracking import Tracker
from tasks.workspace import Workspace

_CONTEXT = {
    "base": "training",
    "profile": "profiling",
    "slice": journal_stages.SLICING,
    "triage": "validation",
    "restructure": "validation",
    "readapt": "training",
    "extend": "training",
    "evaluate": "evaluation",
    "gate": "evaluation",
}
_WHAT = {
    "base": "The model that is maintained: trained here, or the pinned champion as it is.",
    "profile": "What each neuron does on the images of each class.",
    "slice": "Groups of classes that share neurons, and a smaller model for each.",
    "triage": "Which maintenance is needed.",
    "restructure": "The model made smaller.",
    "readapt": "The model tuned to follow new images of its classes.",
    "extend": "The model extended by new classes.",
    "evaluate": "All models on held-out images.",
    "gate": "Which candidate may become the champion.",
}
# What a maintenance stage measures itself is on other images than what the gate goes by: the validation split, or none.
_OWN_NAMES = {"accuracy": "val_accuracy", "images": "train_images"}


def begin(tracker: Tracker, workspace: Workspace, verb: str, key: StageKey, parent: str | None) -> Run:
    """Return the run of this stage for this key, running unless it has finished before."""
    tags = {"nss.kind": "stage", **provenance_tags(workspace, key)}
    return tracker.open(verb, {"stage": verb, "stage_key": key.digest}, tags, parent)


def complete(tracker: Tracker, run: Run, workspace: Workspace, params: Params, verb: str, key: StageKey) -> None:
    """Log what the stage left on disk and end the run. A run that has finished before is left alone."""
    if run.info.status == "FINISHED":
        return
    folder = workspace.out(verb)
    tracker.log(run, params=dict(_settings(params.group(verb))), metrics=_metrics(workspace, verb))
    tracker.log(run, tags={NOTE: _note(workspace, verb)})
    tracker.log_data(run.info.run_id, "data", workspace.data, data_md5(workspace), _CONTEXT[verb])
    for path in sorted([*folder.glob("*.json"), *folder.glob("*.csv")]):
        tracker.client.log_artifact(run.info.run_id, str(path))
    if verb in _DETAILS and (verb not in MAINTENANCE or (folder / "model").exists()):
        _DETAILS[verb](tracker, run, workspace, key)
    tracker.end(run.info.run_id, "FINISHED")


def _metrics(workspace: Workspace, verb: str) -> dict[str, float]:
    found = numbers_of(read_json(workspace.out(verb) / "metrics.json"))
    names = _OWN_NAMES if verb in MAINTENANCE else {}
    return {names.get(name, name): value for name, value in found.items()}


def _note(workspace: Workspace, verb: str) -> str:
    """Describe the run: what the stage is for, and what came of it where the figures do not say it."""
    lines = [_WHAT[verb]]
    if (path := workspace.out(verb) / "result.json").exists():
        result = read_json(path)
        lines.append(f"{'Done' if result['done'] else 'Nothing to do'}: {result['why']}")
    if verb == "triage":
        lines += [f"{maintenance}: {words}" for maintenance, words in triage_words(workspace).items()]
    if verb == "gate":
        lines.append(gate_note(read_json(workspace.out("gate") / "gate.json")))
    return "\n\n".join(lines)


def _settings(group: BaseModel, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Name what lies in a group within the group too, like budgets.macs."""
    for name, value in group:
        if isinstance(value, BaseModel):
            yield from _settings(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def backfill(
    tracker: Tracker, workspace: Workspace, params: Params, verb: str, key: StageKey, parent: str | None
) -> str:
    """Return the id of the finished run of a stage whose outputs are on disk, making the run up when it is missing.

    The gate's verdict goes to the runs of the models that it judged, and to the cycle's, which is `parent`.
    """
    run = tracker.find(stage=verb, stage_key=key.digest)
    if run is None or run.info.status != "FINISHED":
        run = begin(tracker, workspace, verb, key, parent)
        complete(tracker, run, workspace, params, verb, key)
    elif verb == "gate":
        log_candidates(tracker, workspace, run)
    if verb == "gate" and parent:
        note = gate_note(read_json(workspace.out("gate") / "gate.json"))
        tracker.client.set_tag(parent, NOTE, note)
    return str(run.info.run_id)


_DETAILS = {
    "base": journal_stages.log_base,
    "slice": journal_stages.log_slice,
    "triage": journal_stages.log_triage,
    "restructure": journal_models.log_restructure,
    "readapt": journal_models.log_readapt,
    "extend": journal_models.log_extend,
    "evaluate": journal_stages.log_evaluate,
    "gate": journal_stages.log_gate,
}
