"""What the tracking store adds to a report: links to the runs, and latencies, which no stage writes down."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from mlflow.entities import Run

from tasks.lineage import run_link
from tasks.pipeline import Pipeline
from tasks.registry import STORE_ERRORS
from tasks.store_address import tracking_uri
from tasks.tracking import Tracker, open_tracker
from tasks.workspace import Workspace

_STAGE = re.compile(r"nss\.stage\.(\w+)\.run_id")
_LATENCY = re.compile(r"(original_)?latency_ms_(\d+)")
_SQLITE = "sqlite:///"
_OTHER = "MLflow has no such cycle with the settings and code that there are now"


@dataclass(frozen=True)
class Runs:
    """links: {cycle or stage: address of its run, or its id where no server shows it}. latency: {verb: {images: ms}}.

    missing: why there are none, an empty text when there are.
    """

    links: Mapping[str, str] = field(default_factory=dict)
    latency: Mapping[str, Mapping[int, float]] = field(default_factory=dict)
    missing: str = ""


def find_runs(workspace: Workspace) -> Runs:
    """Return what the tracking store knows of the cycle in artifacts/; nothing is made there.

    >>> find_runs(find_workspace()).latency["restructure"][1]  # doctest: +SKIP
    0.61
    """
    uri = tracking_uri(workspace)
    if uri.startswith(_SQLITE) and not Path(uri.removeprefix(_SQLITE)).exists():
        return Runs(missing="nothing was logged to MLflow yet")
    try:
        tracker = open_tracker(workspace)
        gate = tracker.find(stage="gate", stage_key=Pipeline(workspace).stage_key("gate").digest)
        cycle = gate and tracker.find(kind="cycle", **{"stage.gate.run_id": gate.info.run_id})
        return runs_of(tracker, cycle) if cycle else Runs(missing=_OTHER)
    except STORE_ERRORS:
        return Runs(missing="the tracking store did not answer")


def runs_of(tracker: Tracker, cycle: Run) -> Runs:
    """Return what is known of a cycle by its run."""
    ids = {found[1]: run_id for name, run_id in cycle.data.tags.items() if (found := _STAGE.fullmatch(name)) and run_id}
    links = {"cycle": cycle.info.run_id, **ids}
    latency: dict[str, dict[int, float]] = {}
    measured = tracker.client.get_run(ids["restructure"]).data.metrics if "restructure" in ids else {}
    for name, value in sorted(measured.items()):
        if found := _LATENCY.fullmatch(name):
            latency.setdefault("base" if found[1] else "restructure", {})[int(found[2])] = value
    return Runs({name: run_link(tracker, run_id) for name, run_id in links.items()}, latency)
