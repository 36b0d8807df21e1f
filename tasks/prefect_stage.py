"""The Prefect task around a DVC stage. One cache, DVC's: Prefect only remembers which keys it has seen clean."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prefect import task
from prefect.cache_policies import CacheKeyFnPolicy
from prefect.client.schemas.objects import State
from prefect.context import TaskRunContext
from prefect.states import Completed

from nss.files import text_digest
from tasks.pipeline import Outcome, Pipeline
from tasks.stage import CYCLE
from tasks.workspace import Workspace

STATE_OF: dict[Outcome, str] = {"executed": "Completed", "restored": "Restored", "cached": "Cached"}
"""The name of the state a stage's task ends in. A hit in Prefect's own cache is named Cached too."""


def cache_key(context: TaskRunContext, parameters: dict[str, Any]) -> str:
    """Return the key under which Prefect remembers a stage: workspace, stage, and the digest of its inputs."""
    return f"nss-{text_digest(parameters['root'])[:12]}-{parameters['stage']}-{parameters['key']}"


@task(
    name="stage",
    task_run_name="{stage}",
    cache_policy=CacheKeyFnPolicy(cache_key_fn=cache_key),
    persist_result=True,
    result_serializer="json",
)
def run_stage(root: str, stage: str, key: str, cycle: str) -> State[dict[str, str]]:
    """Bring one stage up to date through DVC.

    root: of the workspace.
    key: digest of the stage's inputs, see `Pipeline.stage_key`.
    cycle: id of the MLflow run to show the stage's run under; an empty text for none.

    Raises StageError or BusyError as `Pipeline.reproduce` does.
    """
    outcome = Pipeline(Workspace(Path(root))).reproduce(stage, {CYCLE: cycle} if cycle else {})
    return Completed(name=STATE_OF[outcome], data={"stage": stage, "key": key, "outcome": outcome})
