"""Stage `gate`: judge every candidate by what the evaluation measured, and choose at most one."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from nss.compare import Comparison
from nss.errors import StageError
from nss.files import read_json, replacing, text_digest, write_json
from nss.gate import Candidate, Decision, GateSettings, Verdict, decide
from tasks.params import GateParams
from tasks.workspace import Workspace


def run(params: GateParams, workspace: Workspace) -> None:
    """Write artifacts/gate: gate.json, metrics.json, source.json.

    gate.json is the decision with its reasons, and beside it, for whoever registers a model, {verb: model, parent,
    batches, figures} of each candidate.
    """
    content = read_json(workspace.out("evaluate") / "candidates.json", StageError)
    candidates = [_candidate(each) for each in content]
    decision = decide(candidates, GateSettings(**params.model_dump()))
    described = {
        each["verb"]: {
            **{name: each[name] for name in ("model", "parent", "batches")},
            "figures": figures_of(candidate),
        }
        for each, candidate in zip(content, candidates, strict=True)
    }
    with replacing(workspace.out("gate")) as part:
        part.mkdir()
        write_json(part / "gate.json", {**decision.to_dict(), "candidates": described})
        write_json(part / "metrics.json", _metrics(decision))
        write_json(part / "source.json", {"candidates": text_digest(json.dumps(content))})


def figures_of(candidate: Candidate) -> dict[str, float]:
    """Return what was measured of a candidate as flat numbers; what is missing or not finite lacks.

    >>> figures_of(Candidate("base", 200, 0.9, {"cat": 0.8, "dog": 1.0}, size={"macs": 1000}))
    {'images': 200, 'accuracy': 0.9, 'worst_class_accuracy': 0.8, 'macs': 1000}
    """
    found: dict[str, Any] = {"images": candidate.images, "accuracy": candidate.accuracy}
    found["worst_class_accuracy"] = min((candidate.per_class or {}).values(), default=None)
    for name, each in (("known", candidate.known), ("arrived", candidate.arrived)):
        found |= _compared(name, each) if each else {}
    found |= candidate.size
    return {name: value for name, value in found.items() if value is not None and math.isfinite(value)}


def _compared(name: str, comparison: Comparison) -> dict[str, float]:
    """Leave out what no image tells."""
    overall, new = comparison.overall, comparison.new_classes.values()
    found = {}
    if overall.images:
        found["accuracy"] = overall.candidate_accuracy
        found["difference"] = overall.difference
        found["p_value"] = overall.p_value
    if new:
        found["new_classes_accuracy"] = sum(each.right for each in new) / sum(each.images for each in new)
    return {f"{name}_{figure}": value for figure, value in found.items()}


def _candidate(content: Mapping[str, Any]) -> Candidate:
    known, arrived = (content[name] and Comparison.from_dict(content[name]) for name in ("known", "arrived"))
    plain = {name: content[name] for name in ("verb", "images", "accuracy", "per_class", "size", "champion_size")}
    return Candidate(**plain, known=known, arrived=arrived)


def _metrics(decision: Decision) -> dict[str, int]:
    verdicts = [each.verdict for each in decision.judgements]
    return {
        "promoted": int(decision.promoted is not None),
        "candidates": len(verdicts),
        "held": verdicts.count(Verdict.HOLD),
        "rejected": verdicts.count(Verdict.REJECT),
    }
