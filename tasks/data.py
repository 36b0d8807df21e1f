"""The data verb: change data/ and commit its new version to data.dvc in one go."""

from __future__ import annotations

from typing import Any

from nss.data import status as data_status
from nss.ingest import Added, add_batch, demo
from tasks.pipeline import Pipeline
from tasks.provenance import data_md5
from tasks.workspace import Workspace


def add(
    workspace: Workspace, source: str, *, new_classes: bool = False, resize: tuple[int, int] | None = None
) -> Added:
    """Add a source as one batch and commit data.dvc. Raises DataError with all problems; then nothing has changed."""
    added = add_batch(workspace.data, source, new_classes=new_classes, resize=resize)
    Pipeline(workspace).add_data()
    return added


def add_demo(workspace: Workspace) -> Added:
    """Materialise scikit-learn's digits. When data.dvc names them already it stays as it is, byte for byte."""
    added = demo(workspace.data)
    Pipeline(workspace).add_data()
    return added


def status(workspace: Workspace) -> dict[str, Any]:
    """Return what `nss.data.status` does, `md5`, the version in data.dvc, and `committed`, whether data/ is it."""
    committed = Pipeline(workspace).has_changed_data() is False
    return {**data_status(workspace.data), "md5": data_md5(workspace), "committed": committed}
