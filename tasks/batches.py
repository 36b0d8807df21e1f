"""Which batches of data/ the base model knows, and which have arrived since.

Batches are named by their content, so a stage that reads known batches only depends on artifacts/base/source.json,
which lists them, and not on data/: it has nothing to do when a further batch arrives.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from nss.data import Dataset, load_data
from nss.errors import StageError
from nss.files import read_json
from tasks.workspace import Workspace


def known_data(workspace: Workspace, classes: Sequence[str]) -> Dataset:
    """Return the batches that the base model knows, with its classes.

    Raises DataError when data/ lacks one of them, or has other classes.

    >>> known_data(workspace, model.spec.classes).split("train")  # doctest: +SKIP
    """
    return known_and_new(workspace, classes)[0]


def known_and_new(workspace: Workspace, classes: Sequence[str]) -> tuple[Dataset, Dataset]:
    """Return the batches that the base model knows, with its classes, and those that it does not, with all classes."""
    source = read_json(workspace.out("base") / "source.json", StageError)
    known, new = load_data(workspace.data).known_and_new(source["batches"])
    return known.of_classes(classes), new


def with_new_classes(data: Dataset, known: int) -> Dataset:
    """Return a view of the batches that hold a class whose index is `known` or above: one that the model lacks.

    >>> with_new_classes(arrived, len(model.spec.classes)).batches  # doctest: +SKIP
    """
    return replace(data, batches=tuple(each for each in data.batches if int(each.labels.max()) >= known))
