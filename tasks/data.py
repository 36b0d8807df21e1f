"""The data verb: change data/ and commit its new version to data.dvc in one go."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from nss.data import status as data_status
from nss.errors import DataError
from nss.ingest import Added, add_batch, demo
from tasks.lock import exclusive
from tasks.pipeline import Pipeline
from tasks.provenance import data_md5
from tasks.workspace import Workspace


def add(
    workspace: Workspace, source: str, *, new_classes: bool = False, resize: tuple[int, int] | None = None
) -> Added:
    """Add a source as one batch and commit data.dvc.

    Raises DataError with all problems, and BusyError while a cycle runs; then nothing has changed.
    """
    (done,) = add_all(workspace, [source], new_classes=new_classes, resize=resize)
    if isinstance(done, DataError):
        raise done
    return done


def add_all(
    workspace: Workspace,
    sources: Iterable[str | Path],
    *,
    new_classes: bool = False,
    resize: tuple[int, int] | None = None,
) -> list[Added | DataError]:
    """Add each source as one batch, and commit data.dvc once. Returns for each what was done, or what is wrong with it.

    Raises BusyError while a cycle runs, and DataError when it is data/ itself that cannot be used.
    """
    done: list[Added | DataError] = []
    with exclusive(workspace):
        pipeline = Pipeline(workspace)
        # A data.dvc that cannot be read is found now, not when the batch is in.
        pipeline.has_changed_data()
        _require_present(pipeline)
        for source in sources:
            try:
                done.append(add_batch(workspace.data, source, new_classes=new_classes, resize=resize))
            except DataError as error:
                if Path(error.where).is_relative_to(workspace.data):
                    raise
                done.append(error)
        if any(isinstance(each, Added) for each in done):
            pipeline.add_data()
    return done


def _require_present(pipeline: Pipeline) -> None:
    """Have what data.dvc names in data/: a batch added to an empty folder would be the whole of the next version."""
    workspace = pipeline.workspace
    if not workspace.data.exists() and (workspace.root / "data.dvc").is_file():
        try:
            pipeline.restore("data.dvc")
        except Exception as error:
            raise DataError(
                "data.dvc names a data set whose files are not here",
                where=str(workspace.data),
                fix="bring them with `dvc pull data.dvc`, or `nss data demo` for the digits",
            ) from error


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
