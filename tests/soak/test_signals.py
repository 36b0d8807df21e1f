"""A cycle that is told to stop while it trains, once and twice."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time

import psutil
import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterTags
from prefect.settings import PREFECT_API_URL, temporary_settings

from tasks.warm import is_warm

pytestmark = pytest.mark.soak


def stages_of(copy) -> list[psutil.Process]:
    """`nss stage` and those who work in its place."""
    found = [each for each in psutil.process_iter(["cwd", "cmdline"]) if each.info["cwd"] == str(copy.root)]
    commands = [(each, each.info["cmdline"] or []) for each in found]
    return [each for each, command in commands if command[-2:-1] == ["stage"] or is_warm(command)]


def prefect_states(server: str, process: str) -> list[str]:
    """States of the runs of a process."""
    kind = FlowRunFilter(tags=FlowRunFilterTags(all_=[f"nss.process={process}"]))
    with temporary_settings({PREFECT_API_URL: server}), get_client(sync_client=True) as client:
        return [run.state_name for run in client.read_flow_runs(flow_run_filter=kind)]


@pytest.mark.parametrize("signals", [[signal.SIGTERM], [signal.SIGTERM, signal.SIGTERM], [signal.SIGINT]])
def test_a_cycle_that_is_stopped_while_it_trains_ends_killed_everywhere(
    copy, wait_for, server: str, signals: list[signal.Signals]
) -> None:
    copy.edit("params.yaml", "\n  epochs: 4\n", "\n  epochs: 4000\n")
    # In a group of its own, as a shell with job control starts it.
    process = subprocess.Popen(["nss", "run"], cwd=copy.root, env=copy.env, stdout=subprocess.DEVNULL, process_group=0)
    try:
        wait_for(lambda: bool(stages_of(copy)) and copy.root.joinpath("mlflow", "tracking.db").exists(), "the stage")
        wait_for(lambda: "RUNNING" in {run.info.status for run in copy.runs("stage")}, "its run")
        assert sum(is_warm(each.cmdline()) for each in stages_of(copy)) == 2, "one that forks, and one at work"
        for number in signals:
            # A terminal interrupts all that it has started.
            os.killpg(process.pid, number) if number == signal.SIGINT else process.send_signal(number)
            time.sleep(0.3)
        # A shell counts the first as 143.
        assert process.wait(300) in (-signals[0], 128 + signals[0])
        wait_for(lambda: not stages_of(copy), "the stage to end")
    finally:
        for each in [process, *stages_of(copy)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()
    runs = {run.data.tags["nss.kind"]: run for run in copy.runs()}
    assert {kind: run.info.status for kind, run in runs.items()} == {"cycle": "KILLED", "stage": "KILLED"}
    (state,) = prefect_states(server, runs["cycle"].data.tags["nss.process"])
    assert state not in ("Running", "Cancelling")
