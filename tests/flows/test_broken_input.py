"""Broken and hostile input through the command line: a message, code 2, no traceback, nothing changed, nothing run."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from flows import cli
from nss.files import file_digest
from nss.ingest import add_batch
from nss.model import build_model, save_model

ROOT = Path(__file__).resolve().parents[2]
X = np.random.default_rng(0).integers(0, 256, (20, 8, 8)).astype(np.uint8)
Y = np.arange(20) % 2
DEEP = "[" * 100_000


class Payload:
    """Whoever unpickles this makes the file `ran`."""

    def __init__(self, ran: Path) -> None:
        self.ran = ran

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.ran),)


@dataclass
class Place:
    """A workspace with data of two classes, and beside it a model folder that one case may break."""

    root: Path

    @property
    def workspace(self) -> Path:
        return self.root / "workspace"

    @property
    def model(self) -> Path:
        return self.root / "model"

    @property
    def ran(self) -> Path:
        """There only if something that came with the input was run."""
        return self.root / "ran"

    def npz(self, **arrays: Any) -> list[str]:
        np.savez(self.root / "new.npz", **arrays)
        return self.add("new.npz")

    def packed(self, x: bytes, kind: int = zipfile.ZIP_STORED) -> list[str]:
        """Add an .npz whose member x.npy is `x` and whose labels are right."""
        labels = io.BytesIO()
        np.lib.format.write_array(labels, Y)
        with zipfile.ZipFile(self.root / "new.npz", "w", kind) as file:
            file.writestr("x.npy", x)
            file.writestr("y.npy", labels.getvalue())
        return self.add("new.npz")

    def add(self, name: str, *options: str) -> list[str]:
        return ["data", "add", str(self.root / name), *options]

    def folder(self, **files: bytes) -> list[str]:
        """Add a folder of two good pictures and these files in the class folder cat."""
        for name in ("cat", "dog"):
            (self.root / "photos" / name).mkdir(parents=True)
            Image.fromarray(X[len(name)]).save(self.root / "photos" / name / f"{name}.png")
        for name, content in files.items():
            (self.root / "photos" / "cat" / name.replace("_", ".")).write_bytes(content)
        return self.add("photos")

    def spec(self, **changes: Any) -> list[str]:
        """Export the model folder after changing its model.json."""
        content = json.loads((self.model / "model.json").read_text())
        (self.model / "model.json").write_text(json.dumps({**content, **changes}))
        return ["export", str(self.model), str(self.root / "out.onnx")]

    def json(self, text: str) -> list[str]:
        (self.model / "model.json").write_text(text)
        return ["export", str(self.model), str(self.root / "out.onnx")]

    def weights(self, content: bytes) -> list[str]:
        """Export the model folder with other bytes as weights, and model.json naming just these."""
        (self.model / "model.safetensors").write_bytes(content)
        return self.spec(weights=file_digest(self.model / "model.safetensors"))

    def dataset(self, text: str) -> list[str]:
        (self.workspace / "data" / "dataset.json").write_text(text)
        return self.npz(x=X, y=Y)

    def batch(self, change: Callable[[bytes], bytes]) -> list[str]:
        (path,) = (self.workspace / "data" / "batches").iterdir()
        path.write_bytes(change(path.read_bytes()))
        return self.npz(x=X, y=Y)

    def params(self, old: str, new: str) -> list[str]:
        path = self.workspace / "params.yaml"
        assert old in path.read_text()
        path.write_text(path.read_text().replace(old, new, 1))
        return ["export", str(self.model), str(self.root / "out.onnx")]


def header(shape: str) -> bytes:
    """Start of an .npy that says it is so large."""
    text = f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}, }}".encode()
    text += b" " * (63 - len(text) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array(file, array)
    return file.getvalue()


def png(width: int, height: int) -> bytes:
    """A grey PNG that says it is so large and holds next to nothing."""
    parts = {b"IHDR": struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0), b"IDAT": zlib.compress(bytes(9))}
    chunks = (struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in parts.items())
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def picture(mode: str) -> bytes:
    file = io.BytesIO()
    Image.new(mode, (8, 8)).save(file, "TIFF")
    return file.getvalue()


def cut(place: Place, name: str, arguments: list[str]) -> list[str]:
    content = (place.root / name).read_bytes()
    (place.root / name).write_bytes(content[: len(content) // 2])
    return arguments


def encrypted(place: Place) -> list[str]:
    arguments = place.npz(x=X, y=Y)
    content = bytearray((place.root / "new.npz").read_bytes())
    for mark, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        at = -1
        while (at := content.find(mark, at + 1)) >= 0:
            content[at + offset] |= 1
    (place.root / "new.npz").write_bytes(content)
    return arguments


def damaged_lzma(place: Place) -> list[str]:
    arguments = place.packed(npy(X), zipfile.ZIP_LZMA)
    content = bytearray((place.root / "new.npz").read_bytes())
    content[100:400] = bytes(300)
    (place.root / "new.npz").write_bytes(content)
    return arguments


def linked_out(place: Place) -> list[str]:
    arguments = place.folder()
    (place.root / "photos" / "cat" / "link.png").symlink_to("/etc/hostname")
    return arguments


def idx(place: Place) -> list[str]:
    for part in ("train", "t10k"):
        for kind in ("images-idx3", "labels-idx1"):
            (place.root / "idx").mkdir(exist_ok=True)
            (place.root / "idx" / f"{part}-{kind}-ubyte").write_bytes(b"\0\0\x08\x03\xff\xff\xff")
    return place.add("idx")


def downloader(place: Place) -> list[str]:
    """A model.json that names what torchvision imports for itself: it fetches a file and unpickles it."""
    torch.save(Payload(place.ran), place.root / "payload.pth")
    given = {"url": (place.root / "payload.pth").as_uri(), "model_dir": str(place.root), "weights_only": False}
    return place.spec(factory="torchvision.models._api:load_state_dict_from_url", arguments=given)


def own_module(place: Place) -> list[str]:
    """A module beside the weights and in the current folder, which only running code could import."""
    for folder in (place.model, place.workspace):
        (folder / "evil.py").write_text(
            f"import os\nos.mkdir({str(place.ran)!r})\n\ndef build(num_classes):\n    pass\n"
        )
    return place.spec(factory="evil:build")


def tagged(place: Place) -> list[str]:
    return place.params("seed: 0", f"seed: !!python/object/apply:os.mkdir [{place.ran}]")


DATA: dict[str, tuple[Callable[[Place], list[str]], str]] = {
    "no such source": (lambda p: p.add("missing"), "does not exist"),
    "home of nobody": (lambda p: ["data", "add", "~nosuchuser/photos"], "no such user's home"),
    "a name that is too long": (lambda p: p.add("x" * 5000), "cannot be read"),
    "half an npz": (lambda p: cut(p, "new.npz", p.npz(x=X, y=Y)), "not a whole .npz"),
    "a pickle in an npz": (lambda p: p.npz(x=np.array([Payload(p.ran)] * 20), y=Y), "never unpickled"),
    "a shape of 700 TB": (lambda p: p.packed(header("(1000000000000, 28, 28)")), "cannot be read"),
    "a shape beyond numbers": (lambda p: p.packed(header(f"({10**30}, 8, 8)")), "cannot be read"),
    "a header without end": (lambda p: p.packed(header("(" * 4000)), "cannot be read"),
    "an encrypted npz": (encrypted, "encrypted"),
    "damaged lzma": (damaged_lzma, "cannot be read"),
    "labels without images": (lambda p: p.npz(y=Y), "another split or name is unknown"),
    "fewer labels than images": (lambda p: p.npz(x=X, y=Y[:5]), "20 images, but 5 labels"),
    "labels of time": (lambda p: p.npz(x=X, y=Y.astype("M8[s]")), "whole numbers"),
    "NaN": (lambda p: p.npz(x=np.full((20, 8, 8), np.nan), y=Y), "NaN"),
    "a class name that moves the cursor": (lambda p: p.npz(x=X, y=Y, classes=np.array(["a\x1b[2J", "b"])), "printed"),
    "an unknown class": (lambda p: p.npz(x=X, y=Y, classes=np.array(["cat", "cow"])), "'cow' is unknown"),
    "an image of 2 gigapixels": (lambda p: p.folder(bomb_png=png(46000, 46000)), "bomb.png: the image cannot be read"),
    "an image of size 0": (lambda p: p.folder(none_png=png(0, 0)), "none.png: the file is no image"),
    "text as an image": (lambda p: p.folder(text_png=b"hello"), "text.png: the file is no image"),
    "an empty file": (lambda p: p.folder(empty_png=b""), "empty.png: the file is empty"),
    "CMYK": (lambda p: p.folder(print_tif=picture("CMYK")), "print.tif: mode CMYK"),
    "a link out of the source": (linked_out, "leads out of the source"),
    "idx files of 7 bytes": (idx, "not a whole idx3 file"),
    "a path in dataset.json": (lambda p: p.dataset(described(batches=["../../../ran"])), "is no digest"),
    "dataset.json without end": (lambda p: p.dataset(DEEP), "not JSON"),
    "a number of 5000 digits": (lambda p: p.dataset('{"format": ' + "1" * 5000 + "}"), "not JSON"),
    "half a batch": (lambda p: p.batch(lambda content: content[:-9]), "not a whole safetensors file"),
    "an altered batch": (lambda p: p.batch(lambda content: content[:-1] + b"\x01"), "was altered"),
    "a batch that is a pickle": (lambda p: p.batch(lambda _: pickle.dumps(Payload(p.ran))), "not a whole safetensors"),
}


def described(**changes: Any) -> str:
    content = {"format": 1, "classes": ["cat", "dog"], "image_shape": [1, 8, 8], "batches": ["0" * 32]}
    return json.dumps({**content, **changes})


MODELS: dict[str, tuple[Callable[[Place], list[str]], str]] = {
    "no model.json": (lambda p: ["export", str(p.workspace), "out.onnx"], "model.json"),
    "model.json without end": (lambda p: p.json(DEEP), "not JSON"),
    "model.json of another kind": (lambda p: p.json("[]"), "not a model.json"),
    "another format": (lambda p: p.spec(format=2), "not a model.json"),
    "half the weights": (lambda p: cut(p, "model/model.safetensors", p.spec()), "not a whole safetensors file"),
    "weights of another model": (lambda p: p.spec(weights="0" * 32), "not those that model.json names"),
    "a pickle as weights": (lambda p: p.weights(pickle.dumps(Payload(p.ran))), "not a whole safetensors file"),
    "weights of the wrong shape": (lambda p: p.spec(input_shape=[1, 16, 16]), "weights do not fit"),
    "classes in one text": (lambda p: p.spec(classes="ab"), "garbles classes"),
    "a class twice": (lambda p: p.spec(classes=["a", "a"]), "garbles classes"),
    "two sides": (lambda p: p.spec(input_shape=[8, 8]), "garbles input_shape"),
    "a negative side": (lambda p: p.spec(input_shape=[1, -8, 8]), "garbles input_shape"),
    "a side beyond numbers": (lambda p: p.spec(input_shape=[1, 10**12, 10**12]), "the factory failed"),
    "a mean of text": (lambda p: p.spec(mean=["x"]), "garbles mean"),
    "a mean of NaN": (lambda p: p.spec(mean=[float("nan")]), "garbles mean"),
    "a std of 0": (lambda p: p.spec(std=[0.0]), "garbles std"),
    "three means for grey": (lambda p: p.spec(mean=[0.5] * 3, std=[0.5] * 3), "for each channel"),
    "a path as a layer": (lambda p: p.spec(kept={"../../ran": [0]}), "../../ran"),
    "a neuron that is not there": (lambda p: p.spec(kept={"conv1": [999]}), "conv1"),
    "tasks of other classes": (lambda p: p.spec(tasks=[{"classes": 5, "kept": {}}]), "tasks for all classes"),
    "a router of 8 TB": (
        lambda p: p.spec(tasks=[{"classes": 1, "kept": {}}] * 2, views={"relu1": 0}, features=10**12),
        "router",
    ),
    "arguments the factory lacks": (lambda p: p.spec(arguments={"width": 3}), "the factory failed"),
    "the shell as a factory": (
        lambda p: p.spec(factory="os:system", arguments={"command": "ls"}),
        "not from an allowed",
    ),
    "a path as a factory": (lambda p: p.spec(factory="nss.zoo/../../evil:build"), "not from an allowed"),
    "dots out of the package": (lambda p: p.spec(factory="torchvision.models...os:mkdir"), "does not exist"),
    "a module as a factory": (lambda p: p.spec(factory="nss.zoo:torch"), "no factory"),
    "a downloader that unpickles": (downloader, "imported from torch.hub"),
    "a module beside the weights": (own_module, "not from an allowed"),
}

PARAMS: dict[str, tuple[Callable[[Place], list[str]], str]] = {
    "an object in params.yaml": (tagged, "not readable as YAML"),
    "not YAML": (lambda p: p.params("base:", "base: ["), "not readable as YAML"),
    "a NUL byte": (lambda p: p.params("base:", "base:\0"), "not readable as YAML"),
    "a key twice": (lambda p: p.params("  epochs: 8", "  epochs: 8\n  epochs: 9"), "not readable as YAML"),
    "an unknown key": (lambda p: p.params("  epochs: 8", "  epoch: 8"), "did you mean epochs?"),
    "a text for a number": (lambda p: p.params("epochs: 8", "epochs: eight"), "base.epochs: 'eight' is not allowed"),
    "not a number": (lambda p: p.params("threshold: 0.97", "threshold: .nan"), "slice.threshold"),
    "a path as a factory": (lambda p: p.params("nss.zoo:vgg_small", "../evil:build"), "base.factory"),
    "a path as a package": (lambda p: p.params("packages: []", "packages: [../evil]"), "base.packages"),
}
CASES = {**{f"data, {k}": v for k, v in DATA.items()}, **{f"model, {k}": v for k, v in MODELS.items()}}
CASES |= {f"params, {k}": v for k, v in PARAMS.items()}
# One of each, as a process of its own too.
PROCESSES = ("data, half an npz", "model, a pickle as weights", "params, an object in params.yaml")


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = Place(tmp_path_factory.mktemp("broken") / "template")
    (place.workspace / ".dvc").mkdir(parents=True)
    (place.workspace / ".dvc" / "config").write_text(
        "[core]\n    analytics = false\n    autostage = false\n    no_scm = true\n"
    )
    for name in ("params.yaml", "dvc.yaml", "champion.json"):
        shutil.copy(ROOT / name, place.workspace / name)
    np.savez(place.root / "first.npz", x=255 - X, y=Y, classes=np.array(["cat", "dog"]))
    add_batch(place.workspace / "data", place.root / "first.npz")
    save_model(build_model("nss.zoo:lenet", ["cat", "dog"], (1, 8, 8), seed=0), place.model)
    return place.root


@pytest.fixture
def place(template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    found = Place(shutil.copytree(template, tmp_path / "place"))
    monkeypatch.chdir(found.workspace)
    return found


def nss(*arguments: str) -> int:
    """Run the command line in this process and return its exit code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["nss", *arguments])
        try:
            return cli.main()
        except SystemExit as ended:
            return int(ended.code or 0)


def files(root: Path) -> dict[str, bytes]:
    """Everything but locks: the one beside data/, and those in DVC's folder for such."""
    found = {str(path.relative_to(root)): path for path in root.rglob("*") if path.is_file()}
    return {
        name: path.read_bytes()
        for name, path in found.items()
        if path.name != ".data.lock" and "/.dvc/tmp/" not in name
    }


def test_what_is_not_broken_is_taken(place: Place) -> None:
    assert nss("export", str(place.model), str(place.root / "out.onnx")) == 0
    add_batch(place.workspace / "data", place.root / "first.npz")
    assert Path(place.npz(x=X, y=Y, classes=np.array(["cat", "dog"]))[-1]).is_file()
    assert add_batch(place.workspace / "data", place.root / "new.npz").images == 20


def test_the_payload_runs_when_it_is_unpickled(place: Place) -> None:
    call, arguments = Payload(place.ran).__reduce__()
    call(*arguments)
    assert place.ran.exists()


@pytest.mark.parametrize("name", CASES)
def test_broken_input_is_a_message_and_changes_nothing(name: str, place: Place, capsys: pytest.CaptureFixture) -> None:
    make, words = CASES[name]
    arguments = make(place)
    before = files(place.root)
    assert nss(*arguments) == 2
    printed = capsys.readouterr()
    assert words in printed.err
    assert printed.err.startswith("error: ")
    assert len(printed.err) < 10_000
    assert printed.out == ""
    assert "Traceback" not in printed.err
    assert files(place.root) == before
    assert not place.ran.exists()
    assert "evil" not in sys.modules


@pytest.mark.parametrize("name", PROCESSES)
def test_broken_input_to_a_process_of_its_own(name: str, place: Place) -> None:
    make, words = CASES[name]
    arguments = make(place)
    before = files(place.root)
    code = "import sys; from flows.cli import main; sys.exit(main())"
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert files(place.root) == before
    assert not place.ran.exists()
