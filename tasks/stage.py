"""`nss stage VERB`, the command of a DVC stage: run it, and keep its MLflow run."""

from __future__ import annotations

import importlib
import json
import logging
import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

from nss.errors import NssError, StageError
from tasks.dvc_errors import full_disk
from tasks.garbage import collect_as_usual
from tasks.params import STAGES, Params, load_params
from tasks.pipeline import LOG, RECEIPT, Pipeline, StageKey
from tasks.store_address import told, tracking_uri
from tasks.workspace import Workspace, find_workspace, with_packages

if TYPE_CHECKING:
    from mlflow.entities import Run

    from tasks.tracking import End, Tracker

CYCLE = "NSS_CYCLE_RUN_ID"
"""Environment variable with the id of the MLflow run that stages are shown under."""

OK, CRASH, MISTAKE, INTERRUPTED, TERMINATED = 0, 1, 2, 130, 143


class Terminated(BaseException):
    """The process was asked to end by SIGTERM."""


def main(verb: str) -> int:
    """Run one stage in the workspace of the current folder and return its exit code.

    0 done; 1 crashed (traceback on stderr); 2 a user's mistake, or a full disk (message on stderr); 130 Ctrl-C;
    143 SIGTERM.
    """
    signal.signal(signal.SIGTERM, _terminate)
    record: Record | None = None
    try:
        _announce(verb)
        _tell_progress()
        if verb not in STAGES:
            raise StageError(f"there is no stage '{verb}'", allowed=", ".join(STAGES))
        workspace = find_workspace()
        params = load_params(workspace.params)
        workspace = with_packages(workspace, params.base.packages)
        key = Pipeline(workspace).stage_key(verb)
        record = Record(workspace, params, verb, key)
        _work(workspace, params, verb, key)
        record.complete()
        return OK
    except BaseException as error:
        code, status = _judge(error)
        if record is not None:
            record.end(status)
        return code


class Record:
    """The stage's MLflow run, while a tracking store answers; without one the stage goes on and says so.

    The outputs are on disk then, and the next `nss run` makes the run up from them.
    """

    def __init__(self, workspace: Workspace, params: Params, verb: str, key: StageKey) -> None:
        self.stage = (workspace, params, verb, key)
        self.begun: tuple[Tracker, Run] | None = None
        self._try(self._begin)

    def complete(self) -> None:
        """Log the outputs and end the run FINISHED."""
        if self.begun is None:
            self._try(self._begin)
        if self.begun is not None:
            tracker, run = self.begun
            self._try(lambda: self._complete(tracker, run))

    def end(self, status: End) -> None:
        """End the run FAILED or KILLED."""
        if self.begun is None:
            return
        tracker, run = self.begun
        if run.info.status != "FINISHED":
            self._try(lambda: tracker.end(run.info.run_id, status))

    def _begin(self) -> None:
        from tasks import journal
        from tasks.tracking import open_tracker

        workspace, _, verb, key = self.stage
        tracker = open_tracker(workspace)
        self.begun = tracker, journal.begin(tracker, workspace, verb, key, os.environ.get(CYCLE))

    def _complete(self, tracker: Tracker, run: Run) -> None:
        from tasks import journal

        journal.complete(tracker, run, *self.stage)

    def _try(self, action: Callable[[], object]) -> None:
        try:
            action()
        except Exception as error:
            reason = told(error, tracking_uri(self.stage[0]))
            _say(f"warning: not logged to MLflow ({reason}); the next `nss run` makes up for it")


def _work(workspace: Workspace, params: Params, verb: str, key: StageKey) -> None:
    module = importlib.import_module(f"tasks.{verb}")
    collect_as_usual()
    module.run(params.group(verb), workspace)
    if Pipeline(workspace).stage_key(verb) != key:
        # DVC hashes inputs after the command: it would record the new input with the old result.
        raise StageError(
            "an input changed while the stage ran, so its result was thrown away", where=verb, fix="run again"
        )


def _announce(verb: str) -> None:
    if log := os.environ.get(LOG):
        with open(log, "ab", buffering=0) as file:
            sys.stdout.flush()
            sys.stderr.flush()
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
    if receipt := os.environ.get(RECEIPT):
        Path(receipt).write_text(json.dumps({"stage": verb, "pid": os.getpid()}), encoding="utf-8")


def _tell_progress() -> None:
    """Print what the library says of long work, a line an epoch or so."""
    logger = logging.getLogger("nss")
    logger.handlers = [logging.StreamHandler(sys.stderr)]
    logger.setLevel(logging.INFO)
    logger.propagate = False


def _terminate(signum: int, frame: FrameType | None) -> NoReturn:
    # Once is enough: a second signal must not interrupt the ending of the run.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise Terminated


def _judge(error: BaseException) -> tuple[int, End]:
    """Tell the exit code and the status of the run, and print what the user needs."""
    if isinstance(error, Terminated):
        _say("stopped by SIGTERM")
        return TERMINATED, "KILLED"
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED, "KILLED"
    if known := error if isinstance(error, NssError) else full_disk(error, Path.cwd()):
        _say(str(known))
        return MISTAKE, "FAILED"
    traceback.print_exception(error)
    return CRASH, "FAILED"


def _say(text: str) -> None:
    sys.stderr.write(f"{text}\n")
