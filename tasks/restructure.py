"""Stage `restructure`: make the base model smaller within a budget, and say what that costs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nss.data import Dataset
from nss.errors import RestructureError, StageError, first_line
from nss.files import read_json, replacing, write_json
from nss.model import Classifier, model_digest, save_model
from nss.profile import Profile
from nss.restructure import Point, Restructured, restructure
from nss.slice import SemanticSlices
from tasks.batches import known_data
from tasks.models import base_model
from tasks.params import RestructureParams
from tasks.tables import write_nothing, write_tables
from tasks.wanted import is_wanted
from tasks.workspace import Workspace, require_same_source

_TABLES = {
    "curve.csv": ("model", "macs", "parameters", "accuracy"),
    "kept.csv": ("layer", "kept", "total"),
    "change.csv": ("class", "before", "after"),
}
# What triage calls what restructure.budget names.
_BUDGETS = {"macs": "macs", "params": "parameters", "latency_ms": "latency_ms"}


def run(params: RestructureParams, workspace: Workspace) -> None:
    """Write artifacts/restructure: metrics.json, result.json, source.json, model/, plan.json, and tables.

    When there is nothing to do, the tables are empty and there is no model and no plan; result.json says why.
    """
    model = base_model(workspace, params.device)
    data = known_data(workspace, model.spec.classes)
    sources = {"data": data.digest, "model": model_digest(model)}
    require_same_source(workspace.out("slice"), **sources)
    is_needed, why = is_wanted(workspace, "restructure", params.when, **sources)
    batches = read_json(workspace.out("base") / "source.json", StageError)["batches"]
    with replacing(workspace.out("restructure")) as part:
        part.mkdir()
        write_json(part / "source.json", {**sources, "batches": batches})
        if not is_needed:
            write_nothing(part, _TABLES, why)
            return
        found, hint = _smaller(params, workspace, model, data)
        _write(part, found, f"{why}{hint}")


def _smaller(
    params: RestructureParams, workspace: Workspace, model: Classifier, data: Dataset
) -> tuple[Restructured, str]:
    """Return the smaller model, and what to add to the reason for it."""
    target = _target(params, workspace)
    try:
        return _made(params, workspace, model, data, target), ""
    except RestructureError as error:
        # A budget that nobody can meet must not end every cycle from now on.
        if target == params.target:
            raise
        hint = f"; that cannot be met ({first_line(error)}, {error.where}), so restructure.target counts"
        return _made(params, workspace, model, data, params.target), hint


def _made(
    params: RestructureParams, workspace: Workspace, model: Classifier, data: Dataset, target: float
) -> Restructured:
    # A setting names the parameter, so its type cannot be checked against that of one.
    budget: dict[str, Any] = {params.budget: target}
    return restructure(
        model,
        SemanticSlices.load(workspace.out("slice") / "slices.json"),
        data,
        Profile.load(workspace.out("profile") / "profile.safetensors"),
        **budget,
        cap=params.cap,
        multiple=params.multiple,
        fine_tune_steps=params.fine_tune_steps,
        learning_rate=params.learning_rate,
        distil=params.distil,
        level=params.level,
        curve=params.curve,
        seed=params.seed,
    )


def _target(params: RestructureParams, workspace: Workspace) -> float:
    """Return what is to be left: no more than what the exceeded budget of triage allows, where it is of this kind."""
    if params.when != "triage":
        return params.target
    evidence = read_json(workspace.out("triage") / "restructure.json", StageError)["evidence"]
    budget = evidence.get(_BUDGETS.get(params.budget, ""))
    if budget is None:
        return params.target
    is_share = params.budget != "latency_ms"
    allowed: float = budget["allowed"] / budget["found"] if is_share else budget["allowed"]
    return min(params.target, allowed)


def _write(folder: Path, found: Restructured, why: str) -> None:
    """Write model/, plan.json, curve.csv, kept.csv and change.csv beside them; accuracies are on validation."""
    save_model(found.model, folder / "model")
    found.plan.save(folder / "plan.json")
    first, last = found.report[0], found.report[-1]
    points = sorted({point.macs: point for point in (*found.curve, *found.report)}.values(), key=lambda each: each.macs)
    rows = [(each.name, each.macs / first.macs, each.parameters / first.parameters, each.accuracy) for each in points]
    layers = [(name, len(each.kept), each.total) for name, each in found.plan.layers.items()]
    write_tables(folder, _TABLES, {"curve.csv": rows, "kept.csv": layers, "change.csv": _change(first, last)})
    write_json(folder / "metrics.json", _metrics(found.report))
    write_json(folder / "result.json", {"done": True, "why": why, "offsets": found.offsets})


def _change(before: Point, after: Point) -> list[tuple[str, float, float]]:
    return [(name, value, (after.per_class or {})[name]) for name, value in (before.per_class or {}).items()]


def _metrics(report: Sequence[Point]) -> dict[str, float | None]:
    """Summarise; accuracies are None when there is no validation split."""
    first, last = report[0], report[-1]
    return {
        "done": 1,
        "macs": last.macs,
        "parameters": last.parameters,
        "macs_kept": last.macs / first.macs,
        "parameters_kept": last.parameters / first.parameters,
        "original_accuracy": first.accuracy,
        "refitted_accuracy": report[1].accuracy,
        "accuracy": last.accuracy,
    }
