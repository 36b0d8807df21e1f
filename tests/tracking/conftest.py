"""A tracking store of its own for each test: made once, then copied, since making one takes seconds."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tasks.tracking import Tracker, create_database


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty store."""
    folder = tmp_path_factory.mktemp("store")
    create_database(folder / "tracking.db", folder / "artifacts")
    return folder / "tracking.db"


@pytest.fixture
def tracker(template: Path, tmp_path: Path) -> Tracker:
    """A tracker on a store of its own; artifacts of all stores lie in the template's folder, under their run."""
    shutil.copy2(template, tmp_path / "tracking.db")
    return Tracker(f"sqlite:///{tmp_path / 'tracking.db'}", tmp_path / "artifacts")
