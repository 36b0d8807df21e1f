"""The stage base refuses what it would train in vain, before the first epoch and without a trace."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

import tasks.base
from nss.errors import ModelError
from nss.files import write_json
from tasks.params import load_params
from tasks.workspace import Workspace, with_packages

ROOT = Path(__file__).resolve().parents[2]
NET = """\
from torch import nn


def ten():
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 10))
"""


def test_a_network_with_another_number_of_outputs_than_classes_is_not_trained(
    tmp_path: Path, pets: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert pets == tmp_path / "data"
    (tmp_path / "ten_net.py").write_text(NET)
    write_json(tmp_path / "champion.json", {"version": None})
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(tasks.base, "train", lambda *_, **__: pytest.fail("it was trained"))
    workspace = with_packages(Workspace(tmp_path), ["ten_net"])
    changes = {"factory": "ten_net:ten", "packages": ["ten_net"], "arguments": {}}
    with pytest.raises(ModelError, match=r"the network answers \[2, 10\], the data has 2 classes") as caught:
        tasks.base.run(load_params(ROOT / "params.yaml").base.model_copy(update=changes), workspace)
    assert "last layer `num_classes` outputs" in caught.value.fix
    assert not workspace.out("base").exists()
