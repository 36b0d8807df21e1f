from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
from httpx import ConnectError
from prefect.context import refresh_global_settings_context
from prefect.settings import PREFECT_API_URL, temporary_settings

from flows import launch
from flows.launch import Server
from nss.errors import NssError

URL = "http://prefect.example:4200/api"


@contextmanager
def answering(problem: Exception | None, asked: list[str]) -> Iterator[SimpleNamespace]:
    """A client of a Prefect server whose health is as told."""

    def healthcheck() -> Exception | None:
        asked.append("health")
        return problem

    yield SimpleNamespace(api_healthcheck=healthcheck)


@pytest.fixture
def named() -> Iterator[Server]:
    """The server that PREFECT_API_URL names."""
    with temporary_settings({PREFECT_API_URL: URL}):
        yield Server.prepare()


def test_a_named_server_that_is_away_is_a_mistake_before_anything_runs(named: Server, monkeypatch) -> None:
    monkeypatch.setattr("flows.deployment.get_client", lambda **_: answering(ConnectError("refused"), []))
    with pytest.raises(NssError) as caught:
        named.wait()
    assert str(caught.value) == (
        "no answer from the Prefect server (refused)\n"
        f"  where: {URL}\n"
        "  fix: start it with `prefect server start`, or unset PREFECT_API_URL"
    )


def test_a_named_server_that_answers_is_asked_once(named: Server, monkeypatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr("flows.deployment.get_client", lambda **_: answering(None, asked))
    named.wait()
    assert (asked, named.is_temporary) == (["health"], False)


@pytest.fixture
def spawned(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[subprocess.Popen[bytes]]]:
    """The processes that stand for temporary servers, where the user names none."""
    found: list[subprocess.Popen[bytes]] = []

    def spawn(port: int) -> subprocess.Popen[bytes]:
        found.append(subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE))
        return found[-1]

    monkeypatch.setattr(launch, "_spawn", spawn)
    monkeypatch.setattr(Server, "_own", None)
    # Set first, so that what is written over it is taken back.
    monkeypatch.setenv("PREFECT_API_URL", "")
    del os.environ["PREFECT_API_URL"]
    refresh_global_settings_context()
    yield found
    for process in found:
        process.kill()
        process.communicate()
    monkeypatch.undo()
    refresh_global_settings_context()


def test_a_temporary_server_that_lives_serves_the_next_cycle_of_the_process_too(
    spawned: list[subprocess.Popen[bytes]],
) -> None:
    first, second = Server.prepare(), Server.prepare()
    assert (second is first, second.is_temporary, len(spawned)) == (True, True, 1)
    assert os.environ["PREFECT_API_URL"] == PREFECT_API_URL.value() == first.url


def test_a_temporary_server_that_has_died_is_started_again(spawned: list[subprocess.Popen[bytes]]) -> None:
    Server.prepare()
    spawned[0].kill()
    spawned[0].wait()
    second = Server.prepare()
    assert (len(spawned), second.process, second.is_temporary) == (2, spawned[1], True)
    assert os.environ["PREFECT_API_URL"] == PREFECT_API_URL.value() == second.url
    assert Server.prepare() is second


def test_a_server_that_the_user_names_later_is_used_instead(spawned: list[subprocess.Popen[bytes]]) -> None:
    Server.prepare()
    with temporary_settings({PREFECT_API_URL: URL}):
        assert not Server.prepare().is_temporary
    assert len(spawned) == 1
