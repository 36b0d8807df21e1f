"""Whether data/ is the version of the data set that data.dvc names."""

from __future__ import annotations

from nss.errors import StageError
from tasks.pipeline import Pipeline


def require_committed(pipeline: Pipeline) -> None:
    """Raise StageError when data/, which is there, is not what data.dvc names. Data that nobody versions passes."""
    if pipeline.has_changed_data():
        raise StageError(
            "data/ is not what data.dvc names",
            where=str(pipeline.workspace.data),
            fix="`dvc add data` to take it as the new version, `dvc checkout data.dvc` to go back",
        )
