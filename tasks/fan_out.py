"""Profiling mapped over shards of the data by Prefect: in threads of this process, or on a Dask cluster by address.

Nothing but numbers, paths and settings crosses Prefect; each shard's state is a file in a folder that all workers see.
"""

from __future__ import annotations

import tempfile
from functools import reduce
from pathlib import Path
from typing import Any

from prefect import flow, task, unmapped
from prefect.cache_policies import NO_CACHE
from prefect.task_runners import TaskRunner, ThreadPoolTaskRunner

from nss.errors import NssError
from nss.profile import Profile
from tasks.params import ProfileParams
from tasks.profile import profile_shard
from tasks.workspace import Workspace, with_packages

_PATIENCE_S = 15


def profile_in_shards(params: ProfileParams, workspace: Workspace) -> Profile:
    """Profile the base model in `params.shards` parts at once and merge their states, in order.

    Raises NssError when `params.dask` is set and prefect-dask is not installed or no scheduler answers there.
    """
    with tempfile.TemporaryDirectory(dir=workspace.root / "artifacts", prefix=".shards-") as scratch:
        mapped = flow(name="profile-shards", task_runner=_runner(params), log_prints=False)(_map)
        paths = mapped(params.model_dump(mode="json"), str(workspace.root), list(workspace.packages), scratch)
        return reduce(Profile.merge, [Profile.load(path) for path in paths])


def _runner(params: ProfileParams) -> TaskRunner[Any]:
    if params.dask is None:
        return ThreadPoolTaskRunner(max_workers=params.shards)
    try:
        from distributed import Client
        from prefect_dask.task_runners import DaskTaskRunner
    except ImportError:
        raise NssError(
            "a Dask cluster is named, but prefect-dask is not installed",
            where="profile.dask",
            fix="pip install prefect-dask, or set profile.dask to null",
        ) from None
    try:
        # Asked first: an OSError of the flow would leave open whether the scheduler or a shard's file was missing.
        Client(params.dask, timeout=_PATIENCE_S).close()
    except OSError as problem:
        raise NssError(
            f"the Dask scheduler at {params.dask} does not answer: {problem}",
            where="profile.dask",
            fix="start it, correct the address, or set profile.dask to null",
        ) from None
    return DaskTaskRunner(address=params.dask)


def _map(params: dict[str, Any], root: str, packages: list[str], scratch: str) -> list[str]:
    """Body of the flow: one task for each shard."""
    numbers = list(range(params["shards"]))
    futures = _shard.map(numbers, unmapped(params), unmapped(root), unmapped(packages), unmapped(scratch))
    return [future.result() for future in futures]


@task(name="profile-shard", task_run_name="profile-shard-{number}", cache_policy=NO_CACHE, persist_result=False)
def _shard(number: int, params: dict[str, Any], root: str, packages: list[str], scratch: str) -> str:
    """Profile one shard and write its state. Returns the path of the file."""
    state = profile_shard(ProfileParams.model_validate(params), with_packages(Workspace(Path(root)), packages), number)
    path = Path(scratch) / f"{number}.safetensors"
    state.save(path)
    return str(path)
