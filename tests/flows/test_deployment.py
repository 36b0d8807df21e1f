"""Which deployment is used, two workspaces having one name on one Prefect server, and which of its runs has worked."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from uuid import uuid4

import pytest
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.states import Completed, State, exception_to_failed_state
from prefect.types import WITHOUT_BANNED_CHARACTERS

from flows.deployment import MADE, Cover, Deployment, Version, cover, require_name
from flows.watch import There, Watcher, Watching
from nss.errors import BusyError, NssError, StageError
from tasks.lock import exclusive
from tasks.workspace import Workspace

URL = "http://prefect.example:4200/api"
VERSION = Version("one.dir", datetime(2026, 1, 1, 12, tzinfo=UTC))


class Server:
    """A Prefect server that knows one deployment, of the workspace at `root`; a run of it has completed."""

    def __init__(self, root: str | None) -> None:
        self.parameters = {} if root is None else {"root": root}
        self.used: list[str] = []

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None: ...

    def read_deployment_by_name(self, name: str) -> SimpleNamespace:
        return SimpleNamespace(id=uuid4(), name=name, parameters=self.parameters)

    def read_flow_runs(self, **_: object) -> list[FlowRun]:
        self.used.append("runs")
        return [self.run()]

    def create_flow_run_from_deployment(self, *_: object, **__: object) -> FlowRun:
        self.used.append("made")
        return self.run()

    @staticmethod
    def run() -> FlowRun:
        done = {"state": Completed(), "state_type": StateType.COMPLETED, "start_time": datetime.now(UTC)}
        return FlowRun(id=uuid4(), flow_id=uuid4(), **done)


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Callable[[str | None], Server]:
    """Give a function that starts a server, whose deployment is of the workspace at the root that is told."""

    def start(root: str | None) -> Server:
        server = Server(root)
        monkeypatch.setattr("flows.deployment.get_client", lambda **_: server)
        return server

    return start


@pytest.fixture
def digits(tmp_path: Path) -> Path:
    """A workspace that is called digits, as another one is."""
    root = tmp_path / "b" / "digits"
    (root / "inbox").mkdir(parents=True)
    (root / "data.dvc").write_text("outs:\n- md5: one.dir\n  path: data\n")
    return root


USES = [
    Deployment.find,
    Deployment.runs,
    Deployment.reap,
    Deployment.sweep,
    lambda deployment: deployment.make_run(VERSION),
]


@pytest.mark.parametrize("use", USES)
def test_the_deployment_of_another_workspace_is_refused_and_its_owner_named(
    serve, digits: Path, use: Callable[[Deployment], Any]
) -> None:
    server = serve("/a/digits")
    with temporary_settings({PREFECT_API_URL: URL}), pytest.raises(NssError) as caught:
        use(Deployment("digits", digits))
    assert str(caught.value) == (
        "the deployment maintain/digits is that of another workspace, /a/digits\n"
        f"  where: {URL}\n"
        "  fix: choose another name with --name, or rename this workspace's folder; "
        "if nobody needs that one any more, `prefect deployment delete maintain/digits`"
    )
    assert server.used == []


@pytest.mark.parametrize("kind", ["own", "a link to it", "none"])
def test_a_deployment_of_this_workspace_is_found_by_whatever_path_and_one_of_no_workspace_too(
    serve, digits: Path, kind: str
) -> None:
    link = digits.parent / "link"
    link.symlink_to(digits)
    serve({"own": str(digits), "a link to it": str(link), "none": None}[kind])
    assert Deployment("digits", digits).find().name == "maintain/digits"


def test_data_is_not_taken_for_maintained_because_another_workspaces_deployment_ran(serve, digits: Path) -> None:
    server, said = serve("/a/digits"), []
    there = There(Workspace(digits), Deployment("digits", digits), said.append, grace=0)
    watcher = Watcher(Workspace(digits), Watching(digits / "inbox", settle=0), there, said.append)
    for _ in range(2):
        with pytest.raises(NssError, match="another workspace, /a/digits"):
            watcher.step()
    (digits / "inbox" / "monday.npz").write_bytes(b"x")
    watcher.inbox.settled()
    with pytest.raises(NssError, match="another workspace, /a/digits"):
        watcher.step()
    assert (digits / "inbox" / "monday.npz").exists()
    assert (server.used, said) == ([], [])


@pytest.mark.parametrize("use", [*USES, lambda deployment: deployment.emit(VERSION, MADE)])
def test_a_name_that_prefect_refuses_is_said_before_the_server_is_asked(
    serve, digits: Path, use: Callable[[Deployment], Any]
) -> None:
    server = serve(str(digits))
    with pytest.raises(NssError) as caught:
        use(Deployment("R&D", digits))
    assert str(caught.value) == (
        "no deployment can be called 'R&D'\n"
        "  where: --name\n"
        "  allowed: characters that can be printed, but for / % & > < ? #\n"
        "  fix: name another one with --name NAME; by default it is called as the workspace's folder"
    )
    assert server.used == []


@pytest.mark.parametrize("name", ["", "a/b", "50%", "a>b", "<a", "what?", "a#1", "a\nb", "\udcff"])
def test_what_is_no_name_of_a_deployment(name: str) -> None:
    with pytest.raises(NssError, match="no deployment can be called"):
        require_name(name)


@pytest.mark.parametrize("name", ["digits", "kätzchen ü", "a:b@c", "v1.0", "it's", "a\\b", "(1)"])
def test_what_prefect_takes_for_a_name_is_one(name: str) -> None:
    assert re.match(WITHOUT_BANNED_CHARACTERS, name)
    require_name(name)


def failed(error: Exception) -> State:
    """The state in which the flow engine ends a run that raised this."""
    return asyncio.run(exception_to_failed_state(error, message="Flow run encountered an exception:"))


def ended(state: State) -> FlowRun:
    noon = VERSION.committed
    return FlowRun(id=uuid4(), flow_id=uuid4(), state=state, state_type=state.type, start_time=noon)


def test_a_run_that_found_the_workspace_busy_covers_nothing(tmp_path: Path) -> None:
    (tmp_path / ".dvc").mkdir()
    with exclusive(Workspace(tmp_path)), pytest.raises(BusyError) as busy, exclusive(Workspace(tmp_path)):
        pytest.fail("two at once")
    state = failed(busy.value)
    assert state.message.startswith("Flow run encountered an exception: BusyError: process ")
    assert cover(VERSION, [ended(state)]) is Cover.WANTED


def test_a_stage_that_printed_of_somebody_at_work_has_worked() -> None:
    state = failed(StageError("the stage 'base' failed with exit code 1\n  | own_net.BusyError: the camera"))
    assert "BusyError" in state.message
    assert cover(VERSION, [ended(state)]) is Cover.DONE
