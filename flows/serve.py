"""`nss serve`: the flow `maintain` as a deployment that this process runs, and a watcher beside it.

Runs come from the clock, from the event that `nss data add` emits, and from the watcher. At most one is going; a
newcomer is cancelled, and the watcher makes the run again when the data asks for it.
"""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any
from zoneinfo import available_timezones

from prefect.client.schemas.objects import ConcurrencyLimitConfig, ConcurrencyLimitStrategy
from prefect.client.schemas.schedules import CronSchedule
from prefect.events import DeploymentEventTrigger
from prefect.runner import Runner
from prefect.settings import PREFECT_API_URL
from prefect.types.entrypoint import EntrypointType
from pydantic import ValidationError

from flows.deployment import EVENT, FLOW, WANTED, Deployment, answering, require_server, resource
from flows.maintain import maintain
from flows.watch import Tell, There, Watcher, Watching, undisturbed
from nss.errors import NssError, first_line
from tasks.lock import exclusive, is_held
from tasks.recovery import recover
from tasks.workspace import Workspace

# Events that come within so many seconds of each other make one run, which starts so many seconds after the first.
_TOGETHER = timedelta(seconds=5)
_AGAIN_S = 10
_LAST_STEP_S = 60


@dataclass(frozen=True)
class Serving:
    """What to serve. name: of the deployment. cron: when to run anyway, in `timezone`; empty: never."""

    name: str
    watching: Watching
    cron: str = ""
    timezone: str = "UTC"
    retries: int = 0


def serve(workspace: Workspace, serving: Serving, tell: Tell) -> None:
    """Serve until stopped by SIGTERM or Ctrl-C. A server that goes away is waited for.

    Raises NssError without a Prefect server, for a wrong cron or time zone, and when the name is another workspace's;
    BusyError when this workspace is served already.
    """
    require_server("nss serve")
    tell = undisturbed(tell)
    options, served = deployment_options(workspace, serving), Deployment(serving.name, workspace.root)
    with exclusive(workspace, what="serve"):
        for line in recover(workspace):
            tell(line)
        # Another workspace's is refused before ours would replace it.
        served.find()
        with answering():
            runner = _runner(serving.name, options)
        if not is_held(workspace):
            for run in served.sweep():
                tell(f"flow run {run} was left over by a service that died: crashed")
        tell(f"serving {FLOW}/{serving.name} on {PREFECT_API_URL.value()}; inbox {serving.watching.inbox}")
        tell(_what_next(serving))
        stop = threading.Event()
        watcher = Watcher(workspace, serving.watching, There(workspace, served, tell), tell)
        thread = threading.Thread(target=watcher.run, args=(stop,), name="watcher", daemon=True)
        thread.start()
        try:
            _run(runner, lambda: _runner(serving.name, options), stop, tell)
        except KeyboardInterrupt:
            pass
        finally:
            stop.set()
            thread.join(_LAST_STEP_S)
            tell("stopped; schedules stay, and what arrives meanwhile is found at the next start")


def deployment_options(workspace: Workspace, serving: Serving) -> dict[str, Any]:
    """Return parameters, schedule, trigger and limit of the deployment. Raises NssError for a wrong cron or time zone.

    >>> deployment_options(workspace, Serving("digits", Watching(Path("inbox")), cron="0 3 * * *"))  # doctest: +SKIP
    {'parameters': {'root': '/repo', 'retries': 0}, ...}
    """
    about = resource(serving.name)
    trigger = DeploymentEventTrigger(
        name=f"{about} arrived",
        expect={EVENT},
        match={"prefect.resource.id": about, "nss.run": WANTED},
        for_each={"prefect.resource.id"},
        threshold=1,
        within=_TOGETHER,
        schedule_after=_TOGETHER,
    )
    return {
        "parameters": {"root": str(workspace.root), "retries": serving.retries},
        "schedules": _schedules(serving),
        "triggers": [trigger],
        "concurrency_limit": ConcurrencyLimitConfig(limit=1, collision_strategy=ConcurrencyLimitStrategy.CANCEL_NEW),
        "description": "Keeps the model of a workspace maintained: every stage whose inputs changed.",
        "entrypoint_type": EntrypointType.MODULE_PATH,
    }


def _schedules(serving: Serving) -> list[CronSchedule]:
    if not serving.cron:
        return []
    if serving.timezone not in available_timezones():
        raise NssError(
            f"{serving.timezone!r} is no time zone",
            where="--timezone",
            allowed="a name of the IANA database, for example Europe/Berlin",
        )
    try:
        return [CronSchedule(cron=serving.cron, timezone=serving.timezone)]
    except ValidationError as error:
        raise NssError(
            f"{serving.cron!r} is no cron line ({error.errors()[0]['msg']})",
            where="--cron",
            allowed='minute hour day month weekday, for example "0 3 * * *"',
        ) from None


def _runner(name: str, options: dict[str, Any]) -> Runner:
    runner = Runner(name, pause_on_shutdown=False)
    runner.add_flow(maintain, name, **options)
    return runner


def _run(runner: Runner | None, renew: Callable[[], Runner], stop: threading.Event, tell: Tell) -> None:
    """Run what is due until stopped. A runner gives up when the server is away for long: another one goes on."""
    said = ""
    while not stop.is_set():
        try:
            runner = runner or renew()
            asyncio.run(runner.start())
            return
        except Exception as error:
            reason = _reason(error)
            if reason != said:
                tell(f"error: the Prefect server does not answer ({reason}); asked again every {_AGAIN_S} seconds")
            runner, said = None, reason
            # The runner that gave up does not listen to it any more.
            signal.signal(signal.SIGTERM, lambda *_: stop.set())
            stop.wait(_AGAIN_S)


def _reason(error: BaseException) -> str:
    """Return the first line of an error, or of the first that its group holds."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return first_line(error)


def _what_next(serving: Serving) -> str:
    clock = f'by the clock ("{serving.cron}", {serving.timezone}), ' if serving.cron else ""
    return f"a cycle runs {clock}when data settles in the inbox, and after `nss data add`"
