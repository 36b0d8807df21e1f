"""Pictures and folders for the tests of the data: made from a seed, saved as files, and seen byte for byte."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from PIL import Image

from nss.errors import DataError
from nss.ingest import add_batch

# Whoever is started in the background of a script ignores SIGINT, and so would all that the tests start and interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Who calls .venv/bin/pytest does not have our nss and dvc on the path of what the tests start.
os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])


def _picture(seed: int, shape: tuple[int, ...] = (4, 4)) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def _save_picture(path: Path, seed: int, shape: tuple[int, ...] = (4, 4)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(_picture(seed, shape)).save(path)
    return path


def _make_folder(root: Path, classes: Sequence[str] = ("cat", "dog"), each: int = 2, seed: int = 0) -> Path:
    for number, name in enumerate(classes):
        for index in range(each):
            _save_picture(root / name / f"{index}.png", seed + 100 * number + index)
    return root


def _snapshot(root: Path) -> dict[str, bytes | None]:
    return {str(path.relative_to(root)): path.read_bytes() if path.is_file() else None for path in root.rglob("*")}


def _problems_of(root: Path, source: Path | str, **options: Any) -> tuple[str, ...]:
    before, existed = _snapshot(root), root.exists()
    with pytest.raises(DataError) as caught:
        add_batch(root, source, **options)
    assert (_snapshot(root), root.exists()) == (before, existed)
    return caught.value.problems


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Trace the tests of the library alone: their coverage is what counts, and tracing takes time."""
    library = Path(__file__).parent / "nss"
    for item in items:
        if not item.path.is_relative_to(library):
            item.add_marker("no_cover")


@pytest.fixture(autouse=True)
def same_environment() -> Iterator[None]:
    """Undo what a test's commands set in this process's environment, which those of later tests would inherit."""
    with mock.patch.dict(os.environ):
        yield


@pytest.fixture(scope="session")
def picture() -> Callable[..., np.ndarray]:
    """Give a function that makes the pixels of a seed."""
    return _picture


@pytest.fixture(scope="session")
def save_picture() -> Callable[..., Path]:
    """Give a function that saves the picture of a seed."""
    return _save_picture


@pytest.fixture(scope="session")
def make_folder() -> Callable[..., Path]:
    """Give a function that makes a folder of class folders; image i of class k has the seed `seed` + 100 k + i."""
    return _make_folder


@pytest.fixture(scope="session")
def snapshot() -> Callable[[Path], dict[str, bytes | None]]:
    """Give a function that reads every file below a folder."""
    return _snapshot


@pytest.fixture(scope="session")
def problems_of() -> Callable[..., tuple[str, ...]]:
    """Give a function that adds what must be refused, sees that nothing changed, and returns the problems."""
    return _problems_of


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """Make a repository of git and DVC with nothing in it."""
    root = tmp_path / "repository"
    (root / ".dvc").mkdir(parents=True)
    (root / ".dvc" / "config").write_text("[core]\n    analytics = false\n")
    subprocess.run(["git", "init", "-q"], cwd=root, check=True)
    return root


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Make a folder of two pictures of each of "cat" and "dog"."""
    return _make_folder(tmp_path / "pictures")


@pytest.fixture
def pets(tmp_path: Path, pictures: Path) -> Path:
    """Make a data folder that holds `pictures`."""
    add_batch(tmp_path / "data", pictures)
    return tmp_path / "data"
