"""The maintenance cycle: every stage of the pipeline, one after another, as a Prefect flow and one MLflow run tree."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from prefect import flow, tags
from prefect.context import FlowRunContext
from prefect.settings import PREFECT_FLOWS_HEARTBEAT_FREQUENCY, temporary_settings

from nss.errors import NssError, StageError
from nss.files import read_json
from tasks.champion import read_champion
from tasks.committed import require_committed
from tasks.layout import refresh_code
from tasks.ledger import plan_path
from tasks.lock import exclusive
from tasks.params import Params, load_params
from tasks.pipeline import OWNER, Outcome, Pipeline, StageKey
from tasks.prefect_stage import STATE_OF, run_stage
from tasks.processes import process_id
from tasks.recorder import Closed, Here, Opened, Recorder, RegisteredVersion
from tasks.recovery import process_mark, recover_here, unmarked
from tasks.store_address import shown_uri, told, tracking_uri
from tasks.warm import Warm, hand_over
from tasks.workspace import Workspace, with_packages

# Somebody may be adding a batch, or only looking whether a cycle runs.
_PATIENCE_S = 10
_OUTCOME: dict[str | None, Outcome] = {name: outcome for outcome, name in STATE_OF.items()}


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


# No parameters of the flow: those go to Prefect's server.
_listener: ContextVar[Callable[[StageReport], None]] = ContextVar("listener", default=ignore)
_recorder: ContextVar[Recorder | None] = ContextVar("recorder", default=None)


def run_cycle(
    workspace: Workspace,
    *,
    retries: int = 0,
    tell: Callable[[StageReport], None] = ignore,
    recorder: Recorder | None = None,
) -> CycleReport:
    """Run the flow in this process, with a Prefect server when PREFECT_API_URL names one, else with a temporary one.

    retries: how often a failing stage is tried again.
    tell: called with each stage as it ends; it has no run id yet.
    recorder: who keeps the MLflow run; by default this process.

    Raises what the stages raise: StageError, BusyError, ParamsError, DataError.
    """
    _listener.set(tell)
    _recorder.set(recorder)
    # Marked before it begins: whoever finds it Running can tell whether its process lives. Prefect's own sign of life
    # would make each run wait for up to a second at its end; who wants it beside says how often.
    with temporary_settings(set_defaults={PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None}), tags(process_mark()):
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
        _note(recover_here(workspace))
        changed = refresh_code(workspace)
        if changed and (workspace.root / "dvc.lock").exists():
            _note([f"the code has changed, of nss or of your own modules, in {', '.join(changed)}"])
        _require_sources(pipeline)
        with _cycle(workspace, params) as cycle:
            stages = tuple(_stage(pipeline, name, cycle, warm, retries) for name in pipeline.stages())
            closed = cycle.close(stages)
            if any(each.outcome != "cached" for each in stages) and not closed.is_silent:
                _log_report(cycle.opened.run_id, workspace, closed)
    return CycleReport(
        tuple(replace(each, run_id=closed.run_ids[each.stage]) for each in stages),
        cycle.opened.run_id,
        shown_uri(tracking_uri(workspace)),
        cycle.opened.experiment_id,
        _flow_run_id(),
        verdict=closed.verdict,
        promoted=closed.promoted,
        version=closed.version,
        outcome=closed.outcome,
    )


def _log_report(run_id: str, workspace: Workspace, closed: Closed) -> None:
    """Log the page about the cycle, and the card of the version that it led to."""
    call = (str(workspace.root), run_id, *closed.made_by)
    try:
        if begun := hand_over("tasks.report", "log_cycle", *call):
            if (code := begun.wait()) > 1:
                _warn([f"no report in MLflow (its process ended with {code}); `nss report` writes it"])
            return
        # It draws: a cycle in which nothing ran need not import all that.
        from tasks.report import log_cycle

        log_cycle(*call)
    except Exception as error:
        _warn([f"no report in MLflow ({told(error, tracking_uri(workspace))}); `nss report` writes it"])


def _require_sources(pipeline: Pipeline) -> None:
    try:
        require_data(pipeline)
        require_champion(pipeline)
    except NssError:
        # No cycle begins, which would have put MLflow's runs in order.
        from tasks.recovery_runs import end_runs

        _note(end_runs(pipeline.workspace))
        raise


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


def _stage(pipeline: Pipeline, name: str, cycle: _Cycle, warm: Warm, retries: int) -> StageReport:
    start = time.monotonic()
    key, is_clean = pipeline.look(name)
    if not is_clean:
        warm.begin()
    task = run_stage.with_options(refresh_cache=not is_clean, retries=retries)
    # What is not executed has a run already, or gets it below.
    parent = "" if is_clean else cycle.opened.run_id
    state = task(str(pipeline.workspace.root), name, key.digest, parent, return_state=True)
    state.result()
    outcome = _OUTCOME[state.name]
    cycle.backfill(name, key)
    metrics = read_json(pipeline.workspace.out(name) / "metrics.json")
    report = StageReport(name, outcome, round(time.monotonic() - start, 2), "", metrics)
    _listener.get()(report)
    return report


class _Cycle:
    """The MLflow run of a cycle, as the recorder keeps it; what it answers is waited for when it is needed."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder, self._opened = recorder, recorder.call("open", _flow_run_id(), process_id())

    @cached_property
    def opened(self) -> Opened:
        opened: Opened = self._opened()
        return opened

    def backfill(self, name: str, key: StageKey) -> None:
        self._recorder.call("backfill", name, key)

    def close(self, stages: tuple[StageReport, ...]) -> Closed:
        outcomes = {each.stage: each.outcome for each in stages}
        closed: Closed = self._recorder.call("close", outcomes, figures_of(stages))()
        return closed


@contextmanager
def _cycle(workspace: Workspace, params: Params) -> Iterator[_Cycle]:
    recorder = _recorder.get() or Here()
    recorder.start(workspace, params)
    try:
        cycle = _Cycle(recorder)
        if plan_path(workspace).exists():
            # The stages are to see the champion that it leads to.
            recorder.call("resume")()
        yield cycle
    except Exception:
        recorder.end("FAILED")
        raise
    except BaseException:
        # Ctrl-C, and what Prefect makes of SIGTERM.
        recorder.end("KILLED")
        raise
    recorder.end("FINISHED")


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


def _flow_run_id() -> str:
    context = FlowRunContext.get()
    return str(context.flow_run.id) if context and context.flow_run else ""
