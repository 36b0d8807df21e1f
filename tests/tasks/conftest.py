"""A small DVC workspace whose stages are shell commands, and one in which a small model was trained and sliced."""

from __future__ import annotations

import importlib
import shutil
import subprocess
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from nss.data import Batch, Dataset, batch_digest, load_data, write_batch, write_description
from nss.files import read_json
from tasks.champion import unpin_champion
from tasks.params import Params, load_params
from tasks.workspace import Workspace

DVC_YAML = """\
stages:
  second:
    cmd: cat first.txt > second.txt
    deps: [first.txt]
    outs: [second.txt]
  first:
    cmd: {first}
    deps: [in.txt, code.py]
    params: [group]
    outs: [first.txt]
"""
FIRST = 'touch "$NSS_STAGE_RECEIPT"; echo working; cat in.txt > first.txt; echo run >> count.log'


@pytest.fixture
def toy(tmp_path: Path) -> Workspace:
    """Stages first (in.txt, code.py, params group) and second; count.log has a line for each time first ran."""
    root = tmp_path / "toy"
    (root / ".dvc").mkdir(parents=True)
    (root / ".dvc" / "config").write_text("[core]\n    analytics = false\n    autostage = false\n")
    subprocess.run(["git", "init", "-q"], cwd=root, check=True)
    (root / "in.txt").write_text("one\n")
    (root / "code.py").write_text("x = 1\n")
    (root / "params.yaml").write_text("group: {a: 1}\nother: {b: 2}\n")
    set_command(root, FIRST)
    return Workspace(root)


def set_command(root: Path, command: str) -> None:
    """Write dvc.yaml with this command for the first stage."""
    (root / "dvc.yaml").write_text(DVC_YAML.format(first="|\n      " + command))


@pytest.fixture
def command():
    """Give the function that changes the first stage's command."""
    return set_command


ROOT = Path(__file__).resolve().parents[2]
CLASSES = ("ant", "bee", "cow", "dog")
# Settings of the repository, but for a small network and little time.
SMALL: dict[str, dict[str, Any]] = {
    "base": {"factory": "nss.zoo:lenet", "epochs": 3, "batch_size": 16},
    "profile": {"windows": 1},
    "slice": {"metric": "taylor", "rule": "cumulative", "threshold": 0.9, "n_slices": 2},
    "restructure": {"when": "never"},
    "readapt": {"when": "always", "epochs": 6, "batch_size": 16},
    "extend": {"when": "always", "epochs": 6, "batch_size": 16, "replay": 0.05},
}


@dataclass(frozen=True)
class Small:
    """A workspace on bright stripes, and parameters; stages run in this process, without DVC."""

    workspace: Workspace
    params: Params

    def run(self, verb: str, **changes: object) -> dict[str, Any]:
        """Run a stage, with some of its settings changed. Returns its metrics."""
        group = type(self.params.group(verb)).model_validate({**self.params.group(verb).model_dump(), **changes})
        importlib.import_module(f"tasks.{verb}").run(group, self.workspace)
        return self.read(verb, "metrics.json")

    def read(self, verb: str, name: str) -> Any:
        """Read what a stage wrote: JSON, or the lines of a table."""
        path = self.workspace.out(verb) / name
        return read_json(path) if path.suffix == ".json" else path.read_text(encoding="utf-8").splitlines()

    def files(self, verb: str) -> dict[str, bytes]:
        """All that a stage wrote."""
        folder = self.workspace.out(verb)
        return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    def add(self, labels: list[int], seed: int, *, negative: bool = False, new_classes: tuple[str, ...] = ()) -> str:
        """Append classes, and a batch with an image of each label: class k is bright in columns 2k and 2k + 1.

        Splits are train, train, train, train, val and test in turns of 4 images. negative: bright is dark and dark
        bright. Returns the batch's digest.
        """
        data, count = self._data, len(labels)
        classes = data.classes + new_classes
        images = torch.randint(0, 60, (count, 1, 8, 8), generator=torch.Generator().manual_seed(seed))
        for image, label in zip(images, labels, strict=True):
            image[:, :, 2 * label : 2 * label + 2] += 150
        images = (255 - images if negative else images).to(torch.uint8)
        split = torch.tensor([max(0, turn // 4 % 6 - 3) for turn in range(count)], dtype=torch.uint8)
        digest = batch_digest(images, torch.tensor(labels), split, classes)
        batch = Batch(digest, images, torch.tensor(labels), split)
        write_batch(self.workspace.data, batch)
        write_description(self.workspace.data, replace(data, classes=classes, batches=(*data.batches, batch)))
        return digest

    @property
    def _data(self) -> Dataset:
        return load_data(self.workspace.data) if self.workspace.data.exists() else Dataset((), (1, 8, 8), ())


@pytest.fixture(scope="session")
def sliced(tmp_path_factory: pytest.TempPathFactory) -> Small:
    """Three classes are learned, profiled and sliced. Not to be changed by tests."""
    workspace = Workspace(tmp_path_factory.mktemp("small"))
    params = load_params(ROOT / "params.yaml")
    groups = {name: {**group, **SMALL.get(name, {})} for name, group in params.model_dump().items()}
    found = Small(workspace, Params.model_validate(groups))
    unpin_champion(workspace)
    found.add([0, 1, 2] * 80, 0, new_classes=CLASSES[:3])
    for verb in ("base", "profile", "slice"):
        found.run(verb)
    return found


@pytest.fixture
def small(sliced: Small, tmp_path: Path) -> Small:
    """A copy of it for one test."""
    root = shutil.copytree(sliced.workspace.root, tmp_path / "small")
    return replace(sliced, workspace=Workspace(root))
