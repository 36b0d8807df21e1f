from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
from httpx import ConnectError
from prefect.settings import PREFECT_API_URL, temporary_settings

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
