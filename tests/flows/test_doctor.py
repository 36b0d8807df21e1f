"""`nss doctor` looks at the network that would be trained: what a stage would stumble over is said before."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from flows import doctor
from flows.doctor import Finding
from nss.files import write_json
from nss.model import fastest_device
from tasks.layout import set_params
from tasks.workspace import Workspace

ROOT = Path(__file__).resolve().parents[2]
GROUPS = "base, profile, slice, triage, restructure, readapt, extend, evaluate, gate, register"
NET = """\
from torch import nn


class Net(nn.Sequential):
    def __init__(self, num_classes: int, input_shape: tuple[int, int, int], width: int = 4) -> None:
        if width < 0:
            raise ValueError("no such width")
        channels = input_shape[0]
        layers = [nn.Conv2d(channels, width, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
        super().__init__(*layers, nn.Linear(width, num_classes))


class Deciding(Net):
    def forward(self, x):
        return super().forward(x) if x.sum() > 0 else x.mean((2, 3))


class Deep(Net):
    def forward(self, x):
        return super().forward(x[:, :, :1, :1])


class Fixed(Net):
    def __init__(self, input_shape: tuple[int, int, int], outputs: int = 10) -> None:
        super().__init__(outputs, input_shape)


class Wrapped(Net):
    def forward(self, x):
        return {"logits": super().forward(x)}


number = 3
"""


@pytest.fixture
def workspace(tmp_path: Path, pets: Path, monkeypatch: pytest.MonkeyPatch) -> Workspace:
    """A workspace with images of cats and dogs and a module own_net, which nothing else has imported."""
    (tmp_path / "params.yaml").write_bytes((ROOT / "params.yaml").read_bytes())
    set_params(tmp_path / "params.yaml", {"base.arguments": {}, "base.packages": ["own_net"], "slice.n_slices": None})
    (tmp_path / "own_net.py").write_text(NET)
    write_json(tmp_path / "champion.json", {"version": None})
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.delitem(sys.modules, "own_net", raising=False)
    return Workspace(tmp_path)


def look(workspace: Workspace, factory: str) -> Finding:
    set_params(workspace.params, {"base.factory": factory})
    try:
        return doctor._run("parameters", lambda: doctor._params(workspace))
    finally:
        sys.modules.pop("own_net", None)


@pytest.mark.parametrize("factory", ["own_net:Net", "nss.zoo:lenet"])
def test_a_network_that_can_be_made_and_read_is_no_fault(workspace: Workspace, factory: str) -> None:
    assert look(workspace, factory) == Finding("parameters", True, GROUPS)


@pytest.mark.parametrize(
    ("factory", "found", "fix"),
    [
        ("own_net:Nothing", "the factory does not exist: module 'own_net' has no attribute 'Nothing'", ""),
        ("own_net:number", "this is no factory", ""),
        ("other_net:Net", "the factory is not from an allowed package", "add its package to base.packages"),
        ("own_net:Deciding", "the forward of Deciding cannot be traced: ", "replace `if`/`for` on tensors"),
        ("own_net:Deep", "the network does not take a (1, 4, 4) image: ", ""),
        ("own_net:Fixed", "the network answers [2, 10], the data has 2 classes", "give its last layer `num_classes`"),
        ("own_net:Wrapped", "the network answers a dict", "return the logits alone from its forward"),
    ],
)
def test_what_is_wrong_with_the_network_is_said_before_a_stage_does(
    workspace: Workspace, factory: str, found: str, fix: str
) -> None:
    finding = look(workspace, factory)
    assert not finding.ok
    assert finding.found.startswith(found)
    assert "\n" not in finding.found
    assert fix in finding.fix


def test_a_module_that_is_not_there_is_named(workspace: Workspace) -> None:
    (workspace.root / "own_net.py").unlink()
    found = "the factory does not exist: No module named 'own_net'"
    fix = "put own_net beside params.yaml, or install its package"
    assert look(workspace, "own_net:Net") == Finding("parameters", False, found, fix)


def test_what_the_module_imports_in_vain_is_told_from_the_module(workspace: Workspace) -> None:
    (workspace.root / "own_net.py").write_text(f"import no_such_layers\n{NET}")
    found = "own_net imports no_such_layers, which is not installed"
    fix = "pip install no_such_layers, or put it beside params.yaml if it is yours"
    assert look(workspace, "own_net:Net") == Finding("parameters", False, found, fix)


def test_outputs_that_arguments_set_right_are_no_fault(workspace: Workspace) -> None:
    set_params(workspace.params, {"base.arguments": {"outputs": 2}})
    assert look(workspace, "own_net:Fixed") == Finding("parameters", True, GROUPS)


@pytest.mark.parametrize(("asked", "ok"), [(1, True), (2, True), (3, False)])
def test_more_slices_than_classes_are_said(workspace: Workspace, asked: int, ok: bool) -> None:
    set_params(workspace.params, {"slice.n_slices": asked})
    found = GROUPS if ok else "slice.n_slices is 3, the data has 2 classes"
    fix = "" if ok else "set it to null, or to 1 to 2, in params.yaml"
    assert look(workspace, "nss.zoo:lenet") == Finding("parameters", ok, found, fix)


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        ({"width": -1}, "the factory failed: no such width"),
        ({"wide": 4}, "the factory failed: Net.__init__() got an unexpected keyword argument 'wide'"),
    ],
)
def test_arguments_that_the_network_does_not_take_are_said(
    workspace: Workspace, arguments: dict[str, int], found: str
) -> None:
    set_params(workspace.params, {"base.arguments": arguments})
    assert look(workspace, "own_net:Net") == Finding("parameters", False, found, "correct `arguments`")


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("class Net(:\n", "SyntaxError: invalid syntax (own_net.py, line 1)"),
        ("raise RuntimeError('not today')\n", "RuntimeError: not today"),
        ("raise SystemExit(3)\n", "SystemExit: 3"),
    ],
)
def test_a_module_that_cannot_be_imported_is_a_finding(workspace: Workspace, code: str, found: str) -> None:
    (workspace.root / "own_net.py").write_text(code)
    assert look(workspace, "own_net:Net") == Finding("parameters", False, found)


@pytest.mark.parametrize("content", [None, "{"])
def test_without_images_it_is_only_asked_whether_the_factory_is_there(
    workspace: Workspace, content: str | None
) -> None:
    description = workspace.data / "dataset.json"
    description.unlink() if content is None else description.write_text(content)
    assert look(workspace, "own_net:Deciding") == Finding("parameters", True, GROUPS)
    assert not look(workspace, "own_net:Nothing").ok


@pytest.mark.parametrize("pin", [{"name": "pets", "version": 1, "model": "aaaa", "batches": ["bbbb"]}, {"name": 1}])
def test_a_network_that_nobody_trains_is_not_asked_for(workspace: Workspace, pin: dict[str, object]) -> None:
    """A champion is pinned, or meant to be: its own check says whether it can be used."""
    write_json(workspace.pin, pin)
    assert look(workspace, "own_net:Nothing") == Finding("parameters", True, GROUPS)


@pytest.mark.parametrize("verbs", [("base",), ("profile",), ("extend",), ("base", "evaluate")])
def test_a_device_that_is_not_there_is_said(workspace: Workspace, verbs: tuple[str, ...]) -> None:
    missing, fastest = ("mps", "cuda") if torch.cuda.is_available() else ("cuda", fastest_device().type)
    asked = [f"{verb}.device: {missing}" for verb in verbs]
    set_params(workspace.params, {f"{verb}.device": missing for verb in verbs})
    assert look(workspace, "nss.zoo:lenet") == Finding(
        "parameters", False, f"{', '.join(asked)} is not there", f"{fastest} or auto, in params.yaml"
    )


def test_devices_of_a_cluster_are_not_looked_for_here(workspace: Workspace) -> None:
    missing = "mps" if torch.cuda.is_available() else "cuda"
    set_params(workspace.params, {"profile.device": missing, "profile.dask": "tcp://127.0.0.1:8786"})
    assert look(workspace, "nss.zoo:lenet") == Finding("parameters", True, GROUPS)
