"""The data verb: change data/ and commit its new version to data.dvc in one go."""

from __future__ import annotations

import shutil
from typing import Any

from nss.data import status as data_status
from nss.errors import DataError
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
    """Materialise scikit-learn's digits. When data.dvc names them already it stays as it is, byte for byte.

    Raises DataError when data.dvc names another data set, whose files may only be missing here: nothing has changed.
    """
    pipeline, was_there = Pipeline(workspace), workspace.data.exists()
    added = demo(workspace.data)
    if pipeline.names_other_data():
        if not was_there:
            shutil.rmtree(workspace.data)
        raise DataError(
            "data.dvc names another data set than the digits",
            where=str(workspace.root / "data.dvc"),
            fix="bring its files with `dvc pull`, or remove data.dvc to start over with the digits",
        )
    pipeline.add_data()
    return added


def status(workspace: Workspace) -> dict[str, Any]:
    """Return what `nss.data.status` does, `md5`, the version in data.dvc, and `committed`, whether data/ is it."""
    committed = Pipeline(workspace).has_changed_data() is False
    return {**data_status(workspace.data), "md5": data_md5(workspace), "committed": committed}
