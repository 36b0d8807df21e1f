"""`nss export`: what it writes, checks, measures and prints, and the mistakes it explains."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import flows.export
import nss.export
from flows import cli
from nss.data import load_data
from nss.export import load_export
from nss.ingest import demo
from nss.model import build_model, load_model, save_model
from nss.predict import predict
from nss.size import count_macs, count_parameters
from tasks.champion import unpin_champion
from tasks.workspace import Workspace

ROOT = Path(__file__).resolve().parents[2]
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace with parameters, the digits, a base model and no champion."""
    root = tmp_path_factory.mktemp("made") / "workspace"
    root.mkdir()
    (root / "dvc.yaml").write_text("stages: {}\n")
    shutil.copy(ROOT / "params.yaml", root)
    unpin_champion(Workspace(root))
    demo(root / "data")
    save_model(build_model("nss.zoo:lenet", list("0123456789"), (1, 8, 8), seed=0), root / "artifacts/base/model")
    return root


@pytest.fixture
def workspace(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of `made`, and the current folder."""
    shutil.copytree(made, tmp_path / "workspace")
    monkeypatch.chdir(tmp_path / "workspace")
    return tmp_path / "workspace"


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Give a function that runs `nss export` and returns exit code, output and errors; few calls are timed."""

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(flows.export, "REPEATS", 2)
        monkeypatch.setattr(sys, "argv", ["nss", "export", *arguments])
        monkeypatch.setenv("COLUMNS", "200")
        try:
            code = cli.main()
        except SystemExit as ended:
            code = int(ended.code or 0)
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return call


def test_without_a_champion_the_base_model_is_exported_checked_on_held_out_images_and_timed(
    workspace: Path, run: Run
) -> None:
    code, out, err = run("model.onnx", "--json")
    assert code == 0, err
    found = json.loads(out)
    model = load_model("artifacts/base/model")
    images = load_data("data").split("test").images[:256]
    answers = load_export("model.onnx")(images)
    difference = float((answers - predict(model, (images, torch.zeros(256, dtype=torch.int64)))[0]).abs().max())
    assert (found["path"], found["format"], found["model"], found["checked"]) == ("model.onnx", "onnx", "base", 256)
    assert found["bytes"] == Path("model.onnx").stat().st_size
    assert found["difference"].keys() == {"1", "7", "64"}
    assert found["difference"]["64"] == pytest.approx(difference, abs=1e-5)
    assert (found["macs"], found["parameters"]) == (count_macs(model), count_parameters(model))
    assert found["latency"].keys() == {"torch", "export"}
    for each in found["latency"].values():
        assert (each["device"], each["repeats"], each["batch"].keys()) == ("cpu", 2, {"1", "64"})
        assert all(0 < times["median_ms"] <= times["p95_ms"] for times in each["batch"].values())


def test_a_named_model_goes_to_a_program_by_its_name_and_the_text_says_all(workspace: Path, run: Run) -> None:
    shutil.move("artifacts/base/model", "mine")
    code, out, err = run("mine", "small.pt2")
    assert code == 0, err
    lines = out.splitlines()
    size = Path("small.pt2").stat().st_size
    assert lines[0] == f"exported  small.pt2 (program, {size:,} bytes)"
    assert lines[1] == "model     mine"
    assert lines[2].startswith("checked   256 held-out images in batches of 1, 7, 64: logits differ by at most ")
    model = load_model("mine")
    assert (
        lines[3]
        == f"size      {count_macs(model):,} multiply-adds for an image, {count_parameters(model):,} parameters"
    )
    assert "on cpu" in lines[4]
    assert [line.split()[:3] for line in lines[5:]] == [["torch", "batch", "1:"], ["export", "batch", "1:"]]


def test_outside_of_a_workspace_a_named_model_is_exported_and_not_checked(
    made: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, _ = run(str(made / "artifacts/base/model"), "model.pt2")
    assert (code, out.splitlines()[2].split(":")[0]) == (0, "checked   NOT CHECKED")
    code, out, _ = run(str(made / "artifacts/base/model"), "model.pt2", "--data", str(made / "data"), "--json")
    assert (code, json.loads(out)["checked"]) == (0, 256)


def test_without_a_data_set_the_json_says_that_nothing_was_checked(workspace: Path, run: Run) -> None:
    shutil.rmtree("data")
    code, out, _ = run("model.pt2", "--json")
    found = json.loads(out)
    assert (code, found["checked"], found["difference"]) == (0, 0, {})


def test_where_the_test_images_are_few_validation_images_are_taken_too(
    workspace: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = load_data("data")
    held_out = torch.cat([data.split("test").images, data.split("val").images])
    assert 373 == len(data.split("test")) < 400 < len(held_out)
    given: list[torch.Tensor] = []
    monkeypatch.setattr(flows.export, "LIMIT", 400)
    exporters = {"program": lambda model, out, images: (given.append(images), nss.export.export_program(model, out))[1]}
    monkeypatch.setattr(flows.export, "_EXPORT", exporters)
    assert run("model.pt2", "--json")[0] == 0
    assert torch.equal(given[0], held_out[:400])


def test_an_export_that_is_wrong_ends_with_two_and_no_file(
    workspace: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = build_model("nss.zoo:lenet", list("0123456789"), (1, 8, 8), seed=1).eval()
    make = nss.export._program_bytes
    monkeypatch.setattr(nss.export, "_program_bytes", lambda _, metadata: make(other, metadata))
    code, out, err = run("model.pt2")
    assert (code, out) == (2, "")
    assert "the export answers differently: a logit by" in err
    assert not Path("model.pt2").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "Missing argument"),
        (["a", "b", "c.onnx"], "one model and one file"),
        (["model.bin"], "names ending in .onnx or .pt2"),
        (["model.pt2", "--format", "onnx"], "a file ending in .onnx"),
        (["model.onnx", "--format", "tflite"], "tflite"),
        (["nowhere", "model.onnx"], "the file is missing"),
        (["model.onnx", "--data", "nowhere"], "nowhere"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_is_two_a_message_and_no_file(arguments: list[str], words: str, workspace: Path, run: Run) -> None:
    before = sorted(workspace.rglob("*"))
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert words in err
    assert "Traceback" not in err
    assert sorted(workspace.rglob("*")) == before


@pytest.mark.parametrize("model", [[], ["models:/digits@champion"]], ids=["the default", "a version"])
def test_without_a_model_folder_a_workspace_is_needed(
    model: list[str], tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, _, err = run(*model, "model.onnx")
    assert (code, "no workspace" in err) == (2, True)


def test_help_has_examples(run: Run) -> None:
    code, out, _ = run("--help")
    assert (code, "nss export model.onnx" in out, "[MODEL] OUT" in out) == (0, True, True)
