"""The tiny networks and what the tests share, under any import mode."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest


def _load(name: str, file: str) -> ModuleType:
    """Load a file of this folder as a module that a model's factory can name too."""
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(file))
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    return sys.modules[name]


@pytest.fixture(scope="session")
def networks() -> ModuleType:
    """Everything of networks.py and samples.py under one name."""
    both = ModuleType("networks")
    vars(both).update(vars(_load("tiny_networks", "networks.py")) | vars(_load("tiny_samples", "samples.py")))
    return both


# For helpers that tests import by name.
_load("tiny_helpers", "helpers.py")
