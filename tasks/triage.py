"""Stage `triage`: say which maintenance the base model needs, and why, from what has arrived and from its size."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from nss.files import replacing, write_json
from nss.latency import measured_latency
from nss.model import Classifier, model_digest
from nss.triage import TriageSettings, triage
from tasks.batches import known_and_new
from tasks.models import base_model
from tasks.params import MAINTENANCE, TriageParams
from tasks.sizes import sizes_of
from tasks.workspace import Workspace


def run(params: TriageParams, workspace: Workspace) -> None:
    """Write artifacts/triage: a finding for each maintenance, metrics.json and source.json.

    A finding is a file of its own: that a batch has arrived leaves restructure.json as it was, and nothing is
    restructured again for it.
    """
    model = base_model(workspace, params.device)
    known, arrived = known_and_new(workspace, model.spec.classes)
    settings = _settings(params)
    found = triage(
        model,
        known,
        arrived if len(arrived) else None,
        sizes=_sizes(model, workspace.out("base") / "model", settings),
        settings=settings,
    )
    findings = {verb: asdict(getattr(found, verb)) for verb in MAINTENANCE}
    with replacing(workspace.out("triage")) as part:
        part.mkdir()
        for verb, finding in findings.items():
            write_json(part / f"{verb}.json", finding)
        write_json(part / "metrics.json", {verb: int(finding["needed"]) for verb, finding in findings.items()})
        sources = {"data": known.digest, "model": model_digest(model), "new": arrived.digest}
        write_json(part / "source.json", sources)


def _settings(params: TriageParams) -> TriageSettings:
    budgets = {name: allowed for name, allowed in params.budgets.model_dump().items() if allowed is not None}
    return TriageSettings(**params.model_dump(exclude={"budgets", "device"}), budgets=budgets)


def _sizes(model: Classifier, folder: Path, settings: TriageSettings) -> dict[str, float]:
    """Return the sizes of the model; its latency only where that has a budget, since it is another one each time."""
    sizes: dict[str, float] = dict(sizes_of(model, folder))
    if "latency_ms" in settings.budgets:
        sizes["latency_ms"] = measured_latency(model)
    return sizes
