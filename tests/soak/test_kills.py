"""kill -9 at any moment, again and again: nothing is lost, nothing is left, nothing is there twice."""

from __future__ import annotations

import contextlib
import json
import random
import shutil
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterState, FlowRunFilterStateType
from prefect.client.schemas.objects import StateType
from prefect.settings import PREFECT_API_URL, temporary_settings

from nss.data import load_data
from tasks.recovery import recover
from tasks.workspace import Workspace

pytestmark = pytest.mark.soak
KILLS = 20


class Started:
    """A command whose output goes to files: a stage that outlives it would keep a pipe open."""

    def __init__(self, copy, folder: Path, *command: str) -> None:
        self.out, self.err = folder / "out", folder / "err"
        with self.out.open("wb") as out, self.err.open("wb") as err:
            self.process = subprocess.Popen(command, cwd=copy.root, env=copy.env, stdout=out, stderr=err)

    def is_killed(self, seconds: float, *, with_children: bool) -> bool:
        """Kill it after so many seconds. Returns whether it was still there; it must have done well if not."""
        try:
            code = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self._kill(with_children=with_children)
            return True
        assert code == 0, self.err.read_text()
        return False

    def _kill(self, *, with_children: bool) -> None:
        """Kill it as a failing machine does, or only it, which leaves its stage working."""
        family = psutil.Process(self.process.pid).children(recursive=True) if with_children else []
        self.process.kill()
        for each in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()
        self.process.wait()


def running(server: str) -> int:
    """How many flow runs Prefect takes for running."""
    kind = FlowRunFilterStateType(any_=[StateType.RUNNING, StateType.CANCELLING])
    with temporary_settings({PREFECT_API_URL: server}), get_client(sync_client=True) as client:
        return len(client.read_flow_runs(flow_run_filter=FlowRunFilter(state=FlowRunFilterState(type=kind))))


def forget(copy) -> None:
    """Throw away all results that can be computed again, so that there is something to kill."""
    for path in (copy.root / "artifacts", copy.root / ".dvc" / "cache" / "runs"):
        shutil.rmtree(path)
    (copy.root / "dvc.lock").unlink()


def test_twenty_kills_of_a_cycle_leave_what_undisturbed_ones_do(
    copy, undisturbed, settle, check_like, server: str, tmp_path: Path
) -> None:
    moments, killed = random.Random(0), 0
    for number in range(3 * KILLS):
        run = Started(copy, tmp_path, "nss", "run", "--json")
        if run.is_killed(moments.uniform(0.05, 0.3) * undisturbed.seconds, with_children=number % 2 == 0):
            killed += 1
        elif all(stage["outcome"] == "cached" for stage in json.loads(run.out.read_text())["stages"]):
            forget(copy)
        if killed == KILLS:
            break
    assert killed == KILLS
    settle(copy)
    check_like(copy, undisturbed.settled)
    assert running(server) == 0


def test_twenty_kills_of_data_add_leave_one_whole_batch_or_none(copy, fresh, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    source = tmp_path / "more.npz"
    np.savez(source, x=rng.integers(0, 256, (20_000, 8, 8), np.uint8), y=rng.integers(0, 10, 20_000))
    add = ("nss", "data", "add", str(source))
    whole = replace(copy, root=shutil.copytree(copy.root, tmp_path / "whole", symlinks=True))
    begun = time.monotonic()
    whole.run(*add)
    seconds = time.monotonic() - begun
    moments, before = random.Random(0), (copy.root / "data.dvc").read_bytes()
    for _ in range(KILLS):
        Started(copy, tmp_path, *add).is_killed(moments.uniform(0.5, 1) * seconds, with_children=True)
        # Whatever the kill hit: all that is named is there, and nothing of it is damaged.
        count = len(load_data(copy.root / "data").batches)
        assert count in (1, 2)
        if (copy.root / "data.dvc").read_bytes() != before:
            assert count == 2
            shutil.rmtree(copy.root / "data")
            shutil.copytree(fresh.root / "data", copy.root / "data")
            (copy.root / "data.dvc").write_bytes(before)
    copy.run(*add)
    assert (copy.root / "data.dvc").read_bytes() == (whole.root / "data.dvc").read_bytes()
    recover(Workspace(copy.root))
    assert names(copy.root / "data") == names(whole.root / "data")
    assert copy.run("dvc", "status", "data.dvc").out.strip() == "Data and pipelines are up to date."


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_half_a_batch_of_a_data_add_that_was_killed_is_not_in_the_way_of_a_cycle(settled) -> None:
    half = settled.root / "data" / "batches" / f"{'0' * 32}.safetensors"
    half.write_bytes(b"half")
    assert set(settled.nss_run().outcomes.values()) == {"cached"}
    assert not half.exists()
