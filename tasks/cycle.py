"""The MLflow run of a cycle, and all that a cycle does with MLflow, as far as the tracking store answers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

from tasks import journal, promotion, register
from tasks.params import Params
from tasks.pipeline import StageKey
from tasks.provenance import PROCESS, WORKSPACE, provenance_tags, workspace_id
from tasks.recorder import Closed, Opened, RegisteredVersion
from tasks.recovery_runs import end_runs
from tasks.register import Registered
from tasks.registry import STORE_ERRORS
from tasks.store_address import told, tracking_uri
from tasks.tracking import End, Tracker, open_tracker
from tasks.workspace import Workspace, with_packages

_Result = TypeVar("_Result")


class Cycle:
    """What `tasks.recorder.Recorder` calls, in this order: open, resume, backfill for each stage, close, end.

    tell: takes a line that people should read. Results are plain values, so that another process can have them.

    >>> Cycle(workspace, params, print).open("")  # doctest: +SKIP
    Opened(run_id='0b5e...', experiment_id='1')
    """

    def __init__(self, workspace: Workspace, params: Params, tell: Callable[[str], None]) -> None:
        self.workspace, self.params, self.tell = with_packages(workspace, params.base.packages), params, tell
        self.uri = tracking_uri(workspace)
        self.tracker: Tracker | None = None
        self.is_silent = False
        self.run_id, self.run_ids = "", dict[str, str]()

    def open(self, flow_run: str, process: str = "") -> Opened:
        """End the runs of processes that died and begin the cycle's.

        flow_run: id of Prefect's run, or nothing. process: whose cycle it is, by default this one's.
        """
        for line in end_runs(self.workspace):
            self.tell(line)
        self.run_id = self._try(lambda: self._begin(flow_run, process))
        return Opened(self.run_id, self.tracker.experiment_id if self.tracker else "")

    def _begin(self, flow_run: str, process: str) -> str:
        self.tracker = open_tracker(self.workspace)
        about = {WORKSPACE: workspace_id(self.workspace, make=True), **provenance_tags(self.workspace)}
        given = {"nss.prefect_flow_run": flow_run, PROCESS: process}
        tags = {"nss.kind": "cycle", **about, **{name: value for name, value in given.items() if value}}
        return str(self.tracker.client.create_run(self.tracker.experiment_id, tags=tags, run_name="cycle").info.run_id)

    def resume(self) -> None:
        """End the promotion or rollback that a process which was killed has begun."""
        self._keep(lambda tracker: self._warn(promotion.resume(self.workspace, tracker)[1]))

    def backfill(self, verb: str, key: StageKey) -> None:
        """Make sure that a stage whose outputs are on disk has its run."""

        def found() -> str:
            tracker: Any = self.tracker
            return journal.backfill(tracker, self.workspace, self.params, verb, key, self.run_id)

        self.run_ids[verb] = self._try(found)

    def close(self, outcomes: Mapping[str, str], figures: Mapping[str, float]) -> Closed:
        """Log what the stages came to, keep the gate's decision, and register what it promotes.

        outcomes: {stage: executed, restored or cached}. figures: {name of a metric: value}.
        """
        tags = {f"nss.stage.{verb}.run_id": run_id for verb, run_id in self.run_ids.items()}
        tags |= {f"nss.stage.{verb}.outcome": outcome for verb, outcome in outcomes.items()}
        self._try(lambda: self._log(metrics=figures, tags=tags))
        gate = register.record(self.workspace, self.run_id)
        self._warn(register.commit_cycle(self.workspace, self.params))
        done = self._keep(self._register)
        version = done.version if done else None
        return Closed(
            dict(self.run_ids),
            verdict=gate.verdict,
            promoted=gate.promoted,
            outcome=done.outcome if done else "",
            version=RegisteredVersion(version.name, version.number) if version else None,
            made_by=(version.run_id, done.verb) if done and version and done.verb else (),
            is_silent=self.is_silent,
        )

    def _register(self, tracker: Tracker) -> Registered:
        done = register.register(self.workspace, self.params, tracker, self.run_id)
        self._warn(done.warnings)
        tags = {"nss.verdict": done.verdict, "nss.outcome": done.outcome, "nss.promoted": done.verb or ""}
        if done.version:
            tags["nss.version"] = f"{done.version.name}/{done.version.number}"
        self._log(tags=tags)
        return done

    def _log(self, **values: Any) -> str:
        tracker: Any = self.tracker
        tracker.log(tracker.client.get_run(self.run_id), **values)
        return self.run_id

    def end(self, status: End) -> None:
        """End the run FINISHED, FAILED or KILLED."""
        if self.run_id and self.tracker:
            tracker = self.tracker

            def ended() -> str:
                tracker.end(self.run_id, status)
                return ""

            self._try(ended)

    def _keep(self, action: Callable[[Tracker], _Result]) -> _Result | None:
        """Like `_try`, but what is not the tracking store's fault is raised."""
        if self.tracker is None:
            return None
        try:
            return action(self.tracker)
        except STORE_ERRORS as error:
            self._silence(error)
            return None

    def _try(self, action: Callable[[], str]) -> str:
        """Return what the action does, or an empty text with one warning when the tracking store does not answer."""
        if self.is_silent:
            return ""
        try:
            return action()
        except Exception as error:
            self._silence(error)
            return ""

    def _silence(self, error: Exception) -> None:
        self._warn([f"not logged to MLflow ({told(error, self.uri)}); the next `nss run` makes up for it"])
        self.is_silent, self.tracker = True, None

    def _warn(self, problems: Iterable[str]) -> None:
        for problem in problems:
            self.tell(f"warning: {problem}")
