"""A batch is dropped into the inbox of a real `nss serve` with real stages, on a real `prefect server start`."""

from __future__ import annotations

import importlib.util
import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tasks.provenance import data_md5
from tasks.workspace import Workspace

pytestmark = pytest.mark.soak


def _load(name: str, path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


service = _load("soak_service", Path(__file__).resolve().parents[1] / "e2e" / "test_service.py")
# A server with its services: schedules and triggers need them.
url = service.url


def test_a_batch_that_is_dropped_is_maintained_and_gated_within_a_minute_and_the_stage_times(settled, url: str) -> None:
    place = service.Place(settled.root, {**settled.env, "PREFECT_API_URL": url}, url)
    before = settled.json("artifacts/gate/gate.json")
    place.inbox.mkdir()
    place.serve()
    start = time.time()
    place.drop("monday.npz", 1, 40)
    service.wait(lambda: any(map(service.ended, place.runs())), f"the cycle\n{place.log}", 400)
    # The champion knew all there was before, so that no run came of the start. Before the stop: Prefect cancels what
    # has completed too, as long as its process is there.
    assert [run["state_name"] for run in place.runs()] == ["Completed"]
    assert place.stop() == 0
    cycle = max(settled.runs("cycle"), key=lambda run: run.info.start_time)
    assert (cycle.info.status, cycle.data.tags["nss.data_md5"]) == ("FINISHED", data_md5(Workspace(settled.root)))
    assert cycle.info.start_time / 1000 - start < 60
    assert {cycle.data.tags[f"nss.stage.{name}.outcome"] for name in ("triage", "evaluate", "gate")} == {"executed"}
    assert settled.json("artifacts/triage/readapt.json")["evidence"] != {}
    assert settled.json("artifacts/gate/gate.json") != before
    check_status(place, cycle)


def check_status(place: Any, cycle: Any) -> None:
    status = json.loads(place.nss("status", "--json"))
    assert status["last_cycle"]["run_id"] == cycle.info.run_id
    assert status["verdict"]["verdict"] == cycle.data.tags["nss.verdict"]
    assert status["champion"]["name"] == "digits"
    assert status["inbox"]["pending"] == []
