"""The deployment of the flow `maintain` on a Prefect server: what runs, which run covers a data version, new runs.

A run covers a data version when it started after that version was committed, and says of no other that it saw it. So it
does not matter who made the run: the clock, an event, a person, or the poll. One that dies on the way is made again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from itertools import count
from pathlib import Path

import httpx
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import DeploymentFilter, DeploymentFilterId, FlowRunFilter
from prefect.client.schemas.filters import FlowRunFilterExpectedStartTime as StartFilter
from prefect.client.schemas.objects import TERMINAL_STATES, FlowRun, State, StateType
from prefect.client.schemas.responses import DeploymentResponse
from prefect.client.schemas.sorting import FlowRunSort
from prefect.events.schemas.events import Event
from prefect.exceptions import ObjectNotFound
from prefect.settings import PREFECT_API_URL
from prefect.states import Crashed
from prefect.types import BANNED_CHARACTERS

from nss.errors import BusyError, NssError, first_line
from tasks.recovery import DATA, crash_dead

FLOW = "maintain"
EVENT = "nss.data.arrived"
WANTED, MADE = "wanted", "made"
"""What an event says of the run: that one is wanted, which the deployment's trigger then makes; or that it was made."""
TRIES = 3
"""How often a run for one data version may crash; one that was cancelled with the service is made again each time."""

_GOING = (StateType.PENDING, StateType.RUNNING, StateType.CANCELLING)
# What Prefect's runner says of the runs that it takes along when it is stopped.
_SHUT_DOWN = "Runner is shutting down"
# Prefect's client asks by an address that ends in the name, as it is.
_NOT_IN_A_NAME = (*BANNED_CHARACTERS, "?", "#")
_RUNS_READ = 100
# A run that is to start so soon is as good as going.
_SOON = timedelta(seconds=30)


class Cover(StrEnum):
    """How a data version stands with the runs of the deployment."""

    DONE = "done"
    """a run saw it, and has ended"""
    WAIT = "wait"
    """a run is seeing it, or something else runs, or is about to"""
    WANTED = "wanted"
    """a run is to be made"""


@dataclass(frozen=True)
class Version:
    """A version of data/. committed: when data.dvc came to name it."""

    md5: str
    committed: datetime


def resource(name: str) -> str:
    """Return what events about the data of the deployment `name` are about."""
    return f"nss.data.{name}"


def has_server() -> bool:
    """Say whether PREFECT_API_URL, or the Prefect profile, names a server."""
    return bool(PREFECT_API_URL.value())


def require_server(who: str) -> None:
    """Raise NssError when no Prefect server is named. who: the command that needs it."""
    if not has_server():
        raise NssError(
            f"{who} needs a Prefect server",
            where="PREFECT_API_URL",
            fix="start one with `prefect server start` and set PREFECT_API_URL=http://127.0.0.1:4200/api; "
            "`nss watch` works without one",
        )


def is_name(name: str) -> bool:
    """Say whether a deployment can have this name.

    >>> is_name("digits"), is_name("R&D")
    (True, False)
    """
    return name.isprintable() and name != "" and not any(each in name for each in _NOT_IN_A_NAME)


def require_name(name: str) -> None:
    """Raise NssError for a name that no deployment can have.

    >>> require_name("digits")
    """
    if not is_name(name):
        raise NssError(
            f"no deployment can be called {name!r}",
            where="--name",
            allowed=f"characters that can be printed, but for {' '.join(_NOT_IN_A_NAME)}",
            fix="name another one with --name NAME; by default it is called as the workspace's folder",
        )


def require_answer() -> None:
    """Raise NssError when the Prefect server that is named does not answer."""
    with _client() as client:
        if problem := client.api_healthcheck():
            raise problem


def is_going(run: FlowRun) -> bool:
    """Say whether the run has begun and not ended."""
    return run.state_type in _GOING


def cover(version: Version, runs: Sequence[FlowRun]) -> Cover:
    """Say whether a run covers the version. Runs that were cut off, or found the workspace busy, do not.

    >>> cover(version_of(workspace, data_md5(workspace)), Deployment("digits", workspace.root).runs())  # doctest: +SKIP
    <Cover.DONE: 'done'>
    """
    if any(is_going(run) or run.state_type is StateType.SCHEDULED for run in runs):
        return Cover.WAIT
    return Cover.DONE if any(_saw(run, version) for run in runs) else Cover.WANTED


def _saw(run: FlowRun, version: Version) -> bool:
    if run.start_time is None or run.start_time < version.committed:
        return False
    # The clocks of the server and of this machine may differ; a run that came to its work says what it worked on.
    said = {tag for tag in run.tags if tag.startswith(DATA)}
    return said <= {f"{DATA}{version.md5}"} and _has_worked(run)


def _has_worked(run: FlowRun) -> bool:
    """Say whether it began, was not cut off, and did not find somebody else at work."""
    message = (run.state and run.state.message) or ""
    is_cut = run.state_type is StateType.CRASHED or _SHUT_DOWN in message
    # Below its first line a message may quote what a stage printed.
    is_busy = run.state_type is StateType.FAILED and BusyError.__name__ in message.partition("\n")[0]
    return run.start_time is not None and not is_cut and not is_busy


class Deployment:
    """The deployment `maintain/NAME` of the workspace at `root`; one of that name with another root is never used.

    Everything but `emit` raises NssError for such a one, and all for a name that no deployment can have, and without an
    answer from the server.

    >>> Deployment("digits", Path("/srv/digits")).runs()  # doctest: +SKIP
    [FlowRun(...)]
    """

    def __init__(self, name: str, root: Path) -> None:
        self.name, self.root = name, root

    def find(self) -> DeploymentResponse | None:
        """Return what the server knows of it, None when it does not know it."""
        with self._asking() as client:
            return self._own(client)

    def runs(self) -> list[FlowRun]:
        """Return its newest runs, without those that are to start later. Raises NssError when it does not exist."""
        with self._asking() as client:
            return _runs(client, self._required(client))

    def make_run(self, version: Version) -> FlowRun | None:
        """Return the run for a data version, made when there is none; None when it crashed too often.

        One that has done its work is not made again, whatever the clocks say.
        """
        crashes = 0
        with self._asking() as client:
            deployment = self._required(client)
            for number in count():
                # Keys count for all deployments of the flow, and two of them may hold the same data; and a version
                # that comes back is committed anew.
                key = f"{self.name}:{version.md5}:{version.committed.timestamp():.0f}:{number}"
                run = client.create_flow_run_from_deployment(deployment.id, idempotency_key=key)
                if run.state_type not in TERMINAL_STATES or _has_worked(run):
                    return run
                crashes += run.state_type is StateType.CRASHED
                if crashes == TRIES:
                    break
        return None

    def reap(self) -> list[str]:
        """Mark its runs whose process on this host has died as crashed; return a line for each."""
        with self._asking() as client:
            return crash_dead(client, filter(is_going, _runs(client, self._required(client))))

    def sweep(self) -> list[str]:
        """Mark all runs that have begun as crashed and return their ids: whoever ran them is dead."""
        with self._asking() as client:
            going = [run for run in _runs(client, self._required(client)) if is_going(run)]
            for run in going:
                state: State[None] = Crashed(message="the process was gone when the service started")
                client.set_flow_run_state(run.id, state, force=True)
            return [str(run.id) for run in going]

    def emit(self, version: Version, run: str) -> None:
        """Tell the server that data has arrived. run: WANTED or MADE. Raises NssError when it does not take it."""
        about = {"prefect.resource.id": resource(self.name), "nss.run": run}
        # Validated, not called: Prefect makes objects of its own of these plain values.
        content = {"resource": about, "payload": {"data_md5": version.md5}, "occurred": datetime.now(UTC)}
        event = Event.model_validate({"event": EVENT, **content})
        with self._asking() as client:
            client.request("POST", "/events", json=[event.model_dump(mode="json")])

    @contextmanager
    def _asking(self) -> Iterator[SyncPrefectClient]:
        require_name(self.name)
        with _client() as client:
            yield client

    def _own(self, client: SyncPrefectClient) -> DeploymentResponse | None:
        try:
            found = client.read_deployment_by_name(f"{FLOW}/{self.name}")
        except ObjectNotFound:
            return None
        other = found.parameters.get("root")
        if other and Path(other).resolve() != self.root.resolve():
            raise NssError(
                f"the deployment {FLOW}/{self.name} is that of another workspace, {other}",
                where=str(PREFECT_API_URL.value()),
                fix="choose another name with --name, or rename this workspace's folder; "
                f"if nobody needs that one any more, `prefect deployment delete {FLOW}/{self.name}`",
            )
        return found

    def _required(self, client: SyncPrefectClient) -> DeploymentResponse:
        found = self._own(client)
        if found is None:
            raise NssError(
                f"the Prefect server knows no deployment {FLOW}/{self.name}",
                where=str(PREFECT_API_URL.value()),
                fix="start `nss serve` for this workspace, or `prefect deploy` it, or name another with --name",
            )
        return found


@contextmanager
def answering() -> Iterator[None]:
    """Raise NssError for what comes of a Prefect server that does not answer.

    >>> with answering():  # doctest: +SKIP
    ...     runner.add_flow(maintain, "digits")
    """
    try:
        yield
    except (httpx.HTTPError, RuntimeError) as error:
        reason = first_line(error)
        raise NssError(
            f"no answer from the Prefect server ({reason})",
            where=str(PREFECT_API_URL.value()),
            fix="start it with `prefect server start`, or unset PREFECT_API_URL",
        ) from error


@contextmanager
def _client() -> Iterator[SyncPrefectClient]:
    with answering(), get_client(sync_client=True) as client:
        yield client


def _runs(client: SyncPrefectClient, deployment: DeploymentResponse) -> list[FlowRun]:
    start = StartFilter.model_validate({"before_": datetime.now(UTC) + _SOON})
    return client.read_flow_runs(
        deployment_filter=DeploymentFilter(id=DeploymentFilterId(any_=[deployment.id])),
        flow_run_filter=FlowRunFilter(expected_start_time=start),
        sort=FlowRunSort.EXPECTED_START_TIME_DESC,
        limit=_RUNS_READ,
    )
