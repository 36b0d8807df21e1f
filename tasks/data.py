"""The data verb: change data/ and commit its new version to data.dvc in one go."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nss.data import status as data_status
from nss.errors import DataError, StageError
from nss.files import replacing
from nss.ingest import Added, add_batch, demo
from tasks.lock import exclusive
from tasks.pipeline import Pipeline
from tasks.provenance import data_md5
from tasks.workspace import Workspace


def add(
    workspace: Workspace,
    source: str,
    *,
    new_classes: bool = False,
    resize: tuple[int, int] | None = None,
    classes: Sequence[str] | None = None,
) -> Added:
    """Add a source as one batch and commit data.dvc. See `nss.ingest.add_batch` for what may be said of it.

    Raises DataError with all problems, BusyError while a cycle or a stage runs, and StageError for what DVC or git is
    in the way of; then nothing has changed.
    """
    (done,) = add_all(workspace, [source], new_classes=new_classes, resize=resize, classes=classes)
    if isinstance(done, DataError):
        raise done
    return done


def add_all(
    workspace: Workspace,
    sources: Iterable[str | Path],
    *,
    new_classes: bool = False,
    resize: tuple[int, int] | None = None,
    classes: Sequence[str] | None = None,
) -> list[Added | DataError]:
    """Add each source as one batch, and commit data.dvc once. Returns for each what was done, or what is wrong with it.

    Raises BusyError while a cycle or a stage runs, DataError when it is data/ itself that cannot be used, and
    StageError when data.dvc cannot be written; then nothing has changed.
    """
    done: list[Added | DataError] = []
    allowed: dict[str, Any] = {"new_classes": new_classes, "resize": resize, "classes": classes}
    with _changing(workspace) as pipeline:
        for source in sources:
            try:
                done.append(add_batch(workspace.data, source, **allowed))
            except DataError as error:
                if Path(error.where).is_relative_to(workspace.data):
                    raise
                done.append(error)
        if any(isinstance(each, Added) for each in done):
            pipeline.add_data()
    return done


def add_demo(workspace: Workspace) -> Added:
    """Materialise scikit-learn's digits. When data.dvc names them already it stays as it is, byte for byte.

    Raises BusyError while a cycle or a stage runs, and DataError when data.dvc names another data set, whose files may
    only be missing here: nothing has changed.
    """
    with _changing(workspace, restore=False) as pipeline:
        added = demo(workspace.data)
        if pipeline.names_other_data():
            raise DataError(
                "data.dvc names another data set than the digits",
                where=str(workspace.root / "data.dvc"),
                fix="bring its files with `dvc pull`, or remove data.dvc to start over with the digits",
            )
        pipeline.add_data()
    return added


@contextmanager
def _changing(workspace: Workspace, *, restore: bool = True) -> Iterator[Pipeline]:
    """Have data/ to oneself in this block; when it raises, data/ and data.dvc are what they were before.

    restore: whether what data.dvc names is brought back first where data/ is gone.
    """
    pipeline = Pipeline(workspace)
    # Before the lock is taken, which makes a folder .dvc where there is none.
    pipeline.require_repository()
    with exclusive(workspace), pipeline.holding_data():
        # A data.dvc that cannot be read is found now, not when the batch is in.
        pipeline.has_changed_data()
        if restore:
            _require_present(pipeline)
        with _whole_or_nothing(workspace):
            yield pipeline


def _require_present(pipeline: Pipeline) -> None:
    """Have what data.dvc names in data/: a batch added to an empty folder would be the whole of the next version."""
    workspace = pipeline.workspace
    if not workspace.data.exists() and (workspace.root / "data.dvc").is_file():
        try:
            pipeline.restore("data.dvc")
        except StageError as error:
            raise DataError(error.what, where=error.where, fix=error.fix) from error
        except OSError as error:
            raise DataError(f"data/ cannot be brought back ({error.strerror})", where=str(workspace.data)) from error


@contextmanager
def _whole_or_nothing(workspace: Workspace) -> Iterator[None]:
    """Take back what the block has written when it raises. What a kill leaves is taken up by the next addition."""
    folder, was_there, batches = workspace.data, workspace.data.exists(), _batches(workspace)
    files = {path: _content(path) for path in (workspace.root / "data.dvc", folder / "dataset.json")}
    try:
        yield
    except Exception:
        # First what names the batches: whatever a kill leaves of this is a whole data set.
        for path, content in files.items():
            _put_back(path, content)
        for path in _batches(workspace) - batches:
            path.unlink()
        if not was_there:
            shutil.rmtree(folder, ignore_errors=True)
        raise


def _batches(workspace: Workspace) -> set[Path]:
    return set((workspace.data / "batches").glob("*.safetensors"))


def _content(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None


def _put_back(path: Path, content: bytes | None) -> None:
    if content is None:
        path.unlink(missing_ok=True)
    elif content != _content(path):
        with replacing(path) as part:
            part.write_bytes(content)


def status(workspace: Workspace) -> dict[str, Any]:
    """Return what `nss.data.status` does, `md5`, the version in data.dvc, and `committed`, whether data/ is it."""
    committed = Pipeline(workspace).has_changed_data() is False
    return {**data_status(workspace.data), "md5": data_md5(workspace), "committed": committed}
