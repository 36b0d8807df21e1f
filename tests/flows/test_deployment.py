"""Whose a deployment is: two workspaces with one name on one Prefect server."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from uuid import uuid4

import pytest
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.states import Completed

from flows.deployment import Deployment, Version
from flows.watch import There, Watcher, Watching
from nss.errors import NssError
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


@pytest.mark.parametrize(
    "use",
    [
        Deployment.find,
        Deployment.runs,
        Deployment.reap,
        Deployment.sweep,
        lambda deployment: deployment.make_run(VERSION),
    ],
)
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
