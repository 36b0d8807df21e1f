"""MLflow runs of processes that died, see tasks/recovery.py: they become KILLED."""

from __future__ import annotations

from mlflow.entities import Run

from tasks.processes import is_dead
from tasks.provenance import PROCESS
from tasks.registry import STORE_ERRORS
from tasks.sweep import swept
from tasks.tracking import Tracker, open_tracker
from tasks.workspace import Workspace


def end_runs(workspace: Workspace) -> list[str]:
    """End the runs of processes of this host that have died, and return a line for each; none without the store.

    >>> end_runs(find_workspace())  # doctest: +SKIP
    ['MLflow run 0b5e... (base) of a process that has died: KILLED']
    """
    return swept("MLflow runs", _end_runs, workspace, away=STORE_ERRORS)


def _end_runs(workspace: Workspace) -> list[str]:
    tracker = open_tracker(workspace)
    dead = [run for run in tracker.running() if is_dead(run.data.tags.get(PROCESS, ""))]
    return [_end_run(tracker, run) for run in dead]


def _end_run(tracker: Tracker, run: Run) -> str:
    tracker.end(run.info.run_id, "KILLED")
    return f"MLflow run {run.info.run_id} ({run.info.run_name}) of a process that has died: KILLED"
