"""The maintenance cycle: every stage of the pipeline, one after another, as a Prefect flow and one MLflow run tree."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from prefect import flow
from prefect.context import FlowRunContext

from nss.errors import StageError
from nss.files import read_json
from tasks import journal
from tasks.champion import read_champion
from tasks.params import Params, load_params
from tasks.pipeline import Outcome, Pipeline
from tasks.prefect_stage import STATE_OF, run_stage
from tasks.provenance import provenance_tags
from tasks.tracking import Tracker, open_tracker, tracking_uri
from tasks.workspace import Workspace

_OUTCOME: dict[str, Outcome] = {name: outcome for outcome, name in STATE_OF.items()}


@dataclass(frozen=True)
class StageReport:
    """How one stage went."""

    stage: str
    outcome: Outcome
    seconds: float
    run_id: str
    metrics: dict[str, float | None]
    """what could not be measured is None"""


@dataclass(frozen=True)
class CycleReport:
    """How a cycle went. `run_id` is an empty text when the tracking store did not answer."""

    stages: tuple[StageReport, ...]
    run_id: str
    tracking_uri: str
    experiment_id: str
    flow_run_id: str

    def to_dict(self) -> dict[str, Any]:
        """Return the fields, ready for JSON."""
        return asdict(self)


def ignore(_: StageReport) -> None:
    """Tell nobody about a stage."""


# Not a parameter of the flow: parameters go to Prefect's server.
_listener: ContextVar[Callable[[StageReport], None]] = ContextVar("listener", default=ignore)


def run_cycle(workspace: Workspace, *, retries: int = 0, tell: Callable[[StageReport], None] = ignore) -> CycleReport:
    """Run the flow in this process, with a Prefect server when PREFECT_API_URL names one, else with a temporary one.

    retries: how often a failing stage is tried again.
    tell: called with each stage as it ends.

    Raises what the stages raise: StageError, BusyError, ParamsError, DataError.
    """
    _listener.set(tell)
    return maintain(str(workspace.root), retries)


@flow(name="maintain", flow_run_name="maintain", persist_result=False, validate_parameters=False)
def maintain(root: str, retries: int = 0) -> CycleReport:
    """Bring every stage of the workspace up to date and keep one MLflow run of the cycle."""
    workspace = Workspace(Path(root))
    params = load_params(workspace.params)
    workspace = replace(workspace, packages=tuple(params.base.packages))
    pipeline = Pipeline(workspace)
    require_data(pipeline)
    require_champion(pipeline)
    with _cycle(workspace) as cycle:
        stages = tuple(_stage(pipeline, params, name, cycle, retries) for name in pipeline.stages())
        cycle.finish(stages)
    return CycleReport(stages, cycle.run_id, tracking_uri(workspace), cycle.experiment_id, _flow_run_id())


def require_data(pipeline: Pipeline) -> None:
    """Make sure that data/ is what data.dvc names, restoring it from DVC's cache when it is gone.

    Raises StageError when it differs or cannot be restored.
    """
    if not pipeline.has_changed_data():
        return
    if not pipeline.workspace.data.exists():
        pipeline.restore("data.dvc")
        return
    raise StageError(
        "data/ is not what data.dvc names",
        where=str(pipeline.workspace.data),
        fix="`dvc add data` to take it as the new version, `dvc checkout data.dvc` to go back",
    )


def require_champion(pipeline: Pipeline) -> None:
    """Restore champion/ from DVC's cache when it is gone. Raises StageError when it is not there."""
    workspace = pipeline.workspace
    gone = read_champion(workspace) is not None and not workspace.champion.exists()
    if gone and (workspace.root / "champion.dvc").is_file():
        pipeline.restore("champion.dvc")


def _stage(pipeline: Pipeline, params: Params, name: str, cycle: _Cycle, retries: int) -> StageReport:
    start = time.monotonic()
    key = pipeline.stage_key(name)
    task = run_stage.with_options(refresh_cache=not pipeline.is_clean(name), retries=retries)
    state = task(str(pipeline.workspace.root), name, key.digest, cycle.run_id, return_state=True)
    state.result()
    outcome = _OUTCOME[state.name]
    run_id = cycle.try_to(
        lambda tracker: journal.backfill(tracker, pipeline.workspace, params, name, key, cycle.run_id)
    )
    metrics = read_json(pipeline.workspace.out(name) / "metrics.json")
    report = StageReport(name, outcome, round(time.monotonic() - start, 2), run_id, metrics)
    _listener.get()(report)
    return report


class _Cycle:
    """The MLflow run of a cycle, as far as the tracking store answers."""

    def __init__(self, workspace: Workspace) -> None:
        self.run_id, self.experiment_id = "", ""
        self.tracker: Tracker | None = None
        self.is_silent = False
        self.try_to(lambda _: self._begin(workspace))

    def _begin(self, workspace: Workspace) -> str:
        self.tracker = open_tracker(workspace)
        tags = {"nss.kind": "cycle", **provenance_tags(workspace)}
        if flow_run := _flow_run_id():
            tags["nss.prefect_flow_run"] = flow_run
        self.experiment_id = self.tracker.experiment_id
        self.run_id = self.tracker.client.create_run(self.experiment_id, tags=tags, run_name="cycle").info.run_id
        return self.run_id

    def finish(self, stages: tuple[StageReport, ...]) -> None:
        """Log what the stages came to, and link their runs."""
        tags = {f"nss.stage.{each.stage}.run_id": each.run_id for each in stages}
        tags |= {f"nss.stage.{each.stage}.outcome": each.outcome for each in stages}
        metrics = figures_of(stages)

        def log(tracker: Tracker) -> str:
            tracker.log(tracker.client.get_run(self.run_id), metrics=metrics, tags=tags)
            return self.run_id

        self.try_to(log)

    def end(self, status: str) -> None:
        """End the run FINISHED, FAILED or KILLED."""
        if self.run_id:
            self.try_to(lambda tracker: tracker.end(self.run_id, status) or "")

    def try_to(self, action: Callable[[Any], str]) -> str:
        """Return what the action does, or an empty text with one warning when the tracking store does not answer."""
        try:
            return action(self.tracker) if self.tracker or not self.is_silent else ""
        except Exception as error:
            if not self.is_silent:
                reason = (str(error).strip() or type(error).__name__).splitlines()[0]
                sys.stderr.write(f"warning: not logged to MLflow ({reason}); the next `nss run` makes up for it\n")
            self.is_silent, self.tracker = True, None
            return ""


def figures_of(stages: tuple[StageReport, ...]) -> dict[str, float]:
    """Return the figures of all stages under one name each; those that could not be measured are left out.

    >>> figures_of((StageReport("base", "cached", 0.1, "", {"loss": 0.2, "val_accuracy": None}),))
    {'base/loss': 0.2}
    """
    figures = {f"{each.stage}/{name}": value for each in stages for name, value in each.metrics.items()}
    return {name: value for name, value in figures.items() if value is not None}


@contextmanager
def _cycle(workspace: Workspace) -> Iterator[_Cycle]:
    cycle = _Cycle(workspace)
    try:
        yield cycle
    except Exception:
        cycle.end("FAILED")
        raise
    except BaseException:
        # Ctrl-C, and what Prefect makes of SIGTERM.
        cycle.end("KILLED")
        raise
    cycle.end("FINISHED")


def _flow_run_id() -> str:
    context = FlowRunContext.get()
    return str(context.flow_run.id) if context and context.flow_run else ""
