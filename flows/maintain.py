"""The maintenance cycle: every stage of the pipeline, one after another, as a Prefect flow and one MLflow run tree."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from prefect import flow, tags
from prefect.context import FlowRunContext

from nss.errors import StageError
from nss.files import read_json
from tasks import journal, promotion, register
from tasks.champion import read_champion
from tasks.committed import require_committed
from tasks.layout import refresh_code
from tasks.lock import exclusive
from tasks.params import Params, load_params
from tasks.pipeline import OWNER, Outcome, Pipeline
from tasks.prefect_stage import STATE_OF, run_stage
from tasks.processes import process_id
from tasks.provenance import WORKSPACE, provenance_tags, workspace_id
from tasks.recovery import process_mark, recover, unmarked
from tasks.register import Registered
from tasks.registry import STORE_ERRORS
from tasks.tracking import Tracker, open_tracker, shown_uri, told, tracking_uri
from tasks.warm import Warm, hand_over
from tasks.workspace import Workspace, with_packages

_Result = TypeVar("_Result")
# Somebody may be adding a batch, or only looking whether a cycle runs.
_PATIENCE_S = 10
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
class RegisteredVersion:
    """A version in MLflow's model registry."""

    name: str
    number: int


@dataclass(frozen=True)
class CycleReport:
    """How a cycle went. `run_id` is an empty text when the tracking store did not answer."""

    stages: tuple[StageReport, ...]
    run_id: str
    tracking_uri: str
    experiment_id: str
    flow_run_id: str
    verdict: str = ""
    """the gate's"""
    promoted: str | None = None
    """verb of the candidate that the gate promotes"""
    version: RegisteredVersion | None = None
    """of that candidate; None when nothing was registered"""
    outcome: str = ""
    """what `tasks.register` made of it; an empty text when the tracking store did not answer"""

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
    # Marked before it begins: whoever finds it Running can tell whether its process lives.
    with tags(process_mark()):
        return maintain(str(workspace.root), retries)


@flow(name="maintain", flow_run_name="maintain", persist_result=False, validate_parameters=False)
def maintain(root: str, retries: int = 0) -> CycleReport:
    """Bring every stage of the workspace up to date and keep one MLflow run of the cycle."""
    workspace = Workspace(Path(root))
    params = load_params(workspace.params)
    workspace = with_packages(workspace, params.base.packages)
    pipeline = Pipeline(workspace)
    warm = Warm(workspace.root, {OWNER: process_id()})
    with exclusive(workspace, wait_s=_PATIENCE_S), pipeline.kept(), unmarked(), warm:
        _note(recover(workspace))
        changed = refresh_code(workspace)
        if changed and (workspace.root / "dvc.lock").exists():
            _note([f"the code has changed, of nss or of your own modules, in {', '.join(changed)}"])
        require_data(pipeline)
        require_champion(pipeline)
        with _cycle(workspace) as cycle:
            cycle.resume(workspace)
            stages = tuple(_stage(pipeline, params, name, cycle, warm, retries) for name in pipeline.stages())
            cycle.finish(stages)
            gate = register.record(workspace, cycle.run_id)
            done = cycle.register(workspace, params)
            if any(each.outcome != "cached" for each in stages):
                cycle.try_to(lambda _: _log_report(cycle.run_id, workspace, done))
    return CycleReport(
        stages,
        cycle.run_id,
        shown_uri(tracking_uri(workspace)),
        cycle.experiment_id,
        _flow_run_id(),
        verdict=gate.verdict,
        promoted=gate.promoted,
        version=RegisteredVersion(done.version.name, done.version.number) if done and done.version else None,
        outcome=done.outcome if done else "",
    )


def _log_report(run_id: str, workspace: Workspace, done: Registered | None) -> str:
    """Log the page about the cycle, and the card of the version that it led to."""
    version = (done.version.run_id, done.verb) if done and done.version and done.verb else ()
    call = (str(workspace.root), run_id, *version)
    if begun := hand_over("tasks.report", "log_cycle", *call):
        if (code := begun.wait()) > 1:
            _warn([f"no report in MLflow (its process ended with {code}); `nss report` writes it"])
    else:
        # It draws: a cycle in which nothing ran need not import all that.
        from tasks.report import log_cycle

        log_cycle(*call)
    return run_id


def require_data(pipeline: Pipeline) -> None:
    """Make sure that data/ is what data.dvc names, restoring it from DVC's cache when it is gone.

    Raises StageError when there is none yet, when it differs or cannot be restored.
    """
    if pipeline.workspace.data.exists():
        require_committed(pipeline)
    elif pipeline.has_changed_data() is None:
        raise StageError(
            "there are no images yet",
            where=str(pipeline.workspace.data),
            fix="`nss data add FOLDER`, a folder of class folders",
        )
    else:
        pipeline.restore("data.dvc")


def require_champion(pipeline: Pipeline) -> None:
    """Restore champion/ from DVC's cache when it is gone. Raises StageError when it is not there."""
    workspace = pipeline.workspace
    gone = read_champion(workspace) is not None and not workspace.champion.exists()
    if gone and (workspace.root / "champion.dvc").is_file():
        pipeline.restore("champion.dvc")


def _stage(pipeline: Pipeline, params: Params, name: str, cycle: _Cycle, warm: Warm, retries: int) -> StageReport:
    start = time.monotonic()
    key, is_clean = pipeline.look(name)
    if not is_clean:
        warm.begin()
    task = run_stage.with_options(refresh_cache=not is_clean, retries=retries)
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
        self.run_id, self.experiment_id, self.uri = "", "", tracking_uri(workspace)
        self.tracker: Tracker | None = None
        self.is_silent = False
        self.try_to(lambda _: self._begin(workspace))

    def _begin(self, workspace: Workspace) -> str:
        self.tracker = open_tracker(workspace)
        tags = {"nss.kind": "cycle", WORKSPACE: workspace_id(workspace, make=True), **provenance_tags(workspace)}
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

    def resume(self, workspace: Workspace) -> None:
        """End the promotion or rollback that a process which was killed has begun."""
        self._keep(lambda tracker: _warn(promotion.resume(workspace, tracker)[1]))

    def register(self, workspace: Workspace, params: Params) -> Registered | None:
        """Register what the gate promotes and tag the run with it; None when the tracking store does not answer."""
        _warn(register.commit_cycle(workspace, params))
        return self._keep(lambda tracker: self._register(workspace, params, tracker))

    def _register(self, workspace: Workspace, params: Params, tracker: Tracker) -> Registered:
        done = register.register(workspace, params, tracker, self.run_id)
        _warn(done.warnings)
        tags = {"nss.verdict": done.verdict, "nss.outcome": done.outcome, "nss.promoted": done.verb or ""}
        if done.version:
            tags["nss.version"] = f"{done.version.name}/{done.version.number}"
        tracker.log(tracker.client.get_run(self.run_id), tags=tags)
        return done

    def _keep(self, action: Callable[[Tracker], _Result]) -> _Result | None:
        """Like `try_to`, but what is not the tracking store's fault is raised."""
        if self.tracker is None:
            return None
        try:
            return action(self.tracker)
        except STORE_ERRORS as error:
            self._silence(error)
            return None

    def end(self, status: str) -> None:
        """End the run FINISHED, FAILED or KILLED."""
        if self.run_id:
            self.try_to(lambda tracker: tracker.end(self.run_id, status) or "")

    def try_to(self, action: Callable[[Any], str]) -> str:
        """Return what the action does, or an empty text with one warning when the tracking store does not answer."""
        try:
            return action(self.tracker) if self.tracker or not self.is_silent else ""
        except Exception as error:
            self._silence(error)
            return ""

    def _silence(self, error: Exception) -> None:
        if not self.is_silent:
            _warn([f"not logged to MLflow ({told(error, self.uri)}); the next `nss run` makes up for it"])
        self.is_silent, self.tracker = True, None


def _warn(problems: Iterable[str]) -> None:
    for problem in problems:
        sys.stderr.write(f"warning: {problem}\n")


def _note(lines: Iterable[str]) -> None:
    for line in lines:
        sys.stderr.write(f"{line}\n")


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
