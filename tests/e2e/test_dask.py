"""Profiling on a Dask cluster of processes of its own, named by its address in params.yaml."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from ruamel.yaml import YAML

distributed = pytest.importorskip("distributed")
pytest.importorskip("prefect_dask")

# Run by a worker: whether it has seen the code of a shard.
HAS_PROFILED = "'tasks.fan_out' in __import__('sys').modules"


@pytest.fixture
def cluster(copy, tmp_path: Path, wait_for) -> Iterator[str]:
    """Start a scheduler and two workers as a user would; give the scheduler's address."""
    file = tmp_path / "scheduler.json"
    shared = ["--scheduler-file", str(file), "--no-dashboard"]
    commands = (
        ["dask", "scheduler", "--host", "127.0.0.1", "--port", "0", *shared],
        ["dask", "worker", "--host", "127.0.0.1", "--nworkers", "2", "--nthreads", "1", *shared],
    )
    with (tmp_path / "dask.log").open("wb") as log:
        started = [subprocess.Popen(each, cwd=tmp_path, env=copy.env, stdout=log, stderr=log) for each in commands]
    try:
        wait_for(file.exists, "the scheduler")
        address = json.loads(file.read_text())["address"]
        with distributed.Client(address) as client:
            client.wait_for_workers(2, timeout=120)
        yield address
    finally:
        for process in reversed(started):
            process.terminate()
            process.wait()


@pytest.mark.soak
def test_slices_from_a_dask_cluster_are_those_from_one_process(copy, cluster: str) -> None:
    one = (copy.root / "artifacts" / "slice" / "slices.json").read_bytes()
    yaml = YAML()
    params = yaml.load(copy.root / "params.yaml")
    params["profile"] |= {"shards": 3, "dask": cluster}
    yaml.dump(params, copy.root / "params.yaml")
    with distributed.Client(cluster) as client:
        assert not any(client.run(eval, HAS_PROFILED).values())
        printed = copy.run("dvc", "repro", "slice").out
        assert sum(client.run(eval, HAS_PROFILED).values()) == 2
    assert "Running stage 'profile'" in printed
    assert (copy.root / "artifacts" / "slice" / "slices.json").read_bytes() == one
