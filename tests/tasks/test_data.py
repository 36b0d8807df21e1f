"""The data verb: data/ and data.dvc change together or not at all, whoever else works by DVC meanwhile."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from nss.errors import BusyError, DataError, StageError
from nss.ingest import Added
from tasks.data import add, add_all, add_demo, status
from tasks.lock import exclusive
from tasks.pipeline import Pipeline
from tasks.workspace import Workspace

Add = Callable[[Workspace, Path], object]
ADDS: dict[str, Add] = {
    "add": lambda workspace, source: add(workspace, str(source)),
    "demo": lambda workspace, _: add_demo(workspace),
}
# A stage that reads data/ until somebody lets it end.
READS = """\
stages:
  reads:
    cmd: touch begun; while ! test -e go; do sleep 0.05; done; cat data/dataset.json > out.txt
    deps: [data]
    outs: [out.txt]
"""


@pytest.fixture
def workspace(repository: Path) -> Workspace:
    """A repository of git and DVC without images."""
    return Workspace(repository)


@pytest.fixture
def filled(workspace: Workspace, tmp_path: Path) -> Workspace:
    """The same with one batch in it."""
    add(workspace, str(images(tmp_path / "first.npz", 0)))
    return workspace


def images(path: Path, seed: int) -> Path:
    """Write 20 images whose pixels are drawn with that seed."""
    pixels = np.random.default_rng(seed).integers(0, 255, (20, 8, 8), dtype=np.uint8)
    np.savez(path, x=pixels, y=np.arange(20) % 2)
    return path


def versioned(workspace: Workspace) -> dict[str, bytes]:
    """What is in data/, and data.dvc."""
    paths = [workspace.root / "data.dvc", *workspace.data.rglob("*")]
    return {str(path.relative_to(workspace.root)): path.read_bytes() for path in paths if path.is_file()}


def repro(workspace: Workspace) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "dvc", "repro", "reads"]
    return subprocess.Popen(
        command, cwd=workspace.root, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ.copy()
    )


def wait_for(path: Path) -> None:
    end = time.monotonic() + 120
    while not path.exists():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.parametrize("verb", ADDS)
def test_while_dvc_runs_a_stage_that_reads_data_nothing_changes_and_the_stage_ends_well(
    filled: Workspace, tmp_path: Path, verb: str
) -> None:
    (filled.root / "dvc.yaml").write_text(READS)
    before, source = versioned(filled), images(tmp_path / "more.npz", 1)
    running = repro(filled)
    wait_for(filled.root / "begun")
    with pytest.raises(BusyError, match=rf"the repository is in use by process {running.pid} \(.*repro reads\)"):
        ADDS[verb](filled, source)
    assert versioned(filled) == before
    (filled.root / "go").touch()
    said = running.communicate(timeout=120)[0]
    assert running.returncode == 0, said
    assert (filled.root / "out.txt").read_bytes() == before["data/dataset.json"]


def test_a_stage_that_would_begin_while_data_changes_is_refused_by_dvc(filled: Workspace) -> None:
    (filled.root / "dvc.yaml").write_text(READS)
    with Pipeline(filled).holding_data():
        running = repro(filled)
        said = running.communicate(timeout=120)[0]
    assert running.returncode != 0
    assert "is busy, it is being blocked by" in said
    assert f"(PID {os.getpid()})" in said
    assert not (filled.root / "begun").exists()
    marks = json.loads((filled.root / ".dvc" / "tmp" / "rwlock").read_text())
    assert {kind: found for kind, found in marks.items() if found} == {}


@pytest.mark.parametrize("verb", ADDS)
@pytest.mark.parametrize("line", ["data*", "*.dvc"])
def test_where_git_ignores_the_pointer_nothing_is_written(
    workspace: Workspace, tmp_path: Path, verb: str, line: str
) -> None:
    (workspace.root / ".gitignore").write_text(f"{line}\n")
    with pytest.raises(StageError) as caught:
        ADDS[verb](workspace, images(tmp_path / "more.npz", 1))
    assert (caught.value.what, caught.value.where) == ("git ignores data.dvc", str(workspace.root / "data.dvc"))
    assert caught.value.fix == "take out the line that does: `git check-ignore -v data.dvc` names it"
    assert not workspace.data.exists()


@pytest.mark.parametrize("error", [BusyError("in use"), OSError(28, "No space left on device"), StageError("no")])
@pytest.mark.parametrize("is_written", [False, True], ids=["before data.dvc", "after data.dvc"])
def test_what_could_not_be_committed_is_taken_back(
    filled: Workspace, tmp_path: Path, monkeypatch, error: Exception, is_written: bool
) -> None:
    before, source, real = versioned(filled), images(tmp_path / "more.npz", 1), Pipeline.add_data

    def fail(self: Pipeline) -> None:
        assert len(status(filled)["batches"]) == 2
        if is_written:
            real(self)
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(Pipeline, "add_data", fail)
        with pytest.raises(type(error)) as caught:
            add(filled, str(source))
    assert caught.value is error
    assert versioned(filled) == before
    assert status(filled)["committed"] is True
    assert add(filled, str(source)).already_present is False


@pytest.mark.parametrize("verb", ADDS)
def test_the_first_batch_that_could_not_be_committed_leaves_no_folder(
    workspace: Workspace, tmp_path: Path, monkeypatch, verb: str
) -> None:
    def fail(_: Pipeline) -> None:
        assert (workspace.data / "dataset.json").exists()
        raise BusyError("in use")

    monkeypatch.setattr(Pipeline, "add_data", fail)
    with pytest.raises(BusyError):
        ADDS[verb](workspace, images(tmp_path / "more.npz", 1))
    assert not workspace.data.exists()
    assert not (workspace.root / "data.dvc").exists()


def test_of_several_sources_none_is_kept_when_data_itself_cannot_be_used(
    filled: Workspace, tmp_path: Path, monkeypatch
) -> None:
    from nss.ingest import add_batch

    before, done = versioned(filled), []

    def second_fails(root: Path, source: Path, **options: object) -> Added:
        if done:
            raise DataError("the data folder cannot be written", where=str(root))
        done.append(add_batch(root, source, **options))
        return done[0]

    monkeypatch.setattr("tasks.data.add_batch", second_fails)
    with pytest.raises(DataError, match="the data folder cannot be written"):
        add_all(filled, [images(tmp_path / f"{seed}.npz", seed) for seed in (1, 2)])
    assert done[0].already_present is False
    assert versioned(filled) == before


@pytest.mark.parametrize("verb", ADDS)
def test_nothing_is_written_while_a_cycle_runs(workspace: Workspace, tmp_path: Path, verb: str) -> None:
    source = images(tmp_path / "more.npz", 1)
    with exclusive(workspace), pytest.raises(BusyError, match="is at work in this workspace"):
        ADDS[verb](workspace, source)
    assert not workspace.data.exists()


@pytest.mark.parametrize("verb", ADDS)
def test_a_folder_that_dvc_does_not_version_is_left_as_it_is(tmp_path: Path, verb: str) -> None:
    (tmp_path / "bare").mkdir()
    with pytest.raises(StageError, match="this is no DVC repository"):
        ADDS[verb](Workspace(tmp_path / "bare"), images(tmp_path / "more.npz", 1))
    assert list((tmp_path / "bare").iterdir()) == []


@pytest.mark.parametrize("verb", ADDS)
def test_where_there_is_no_git_nothing_is_written(workspace: Workspace, tmp_path: Path, verb: str) -> None:
    shutil.rmtree(workspace.root / ".git")
    with pytest.raises(StageError, match="is not a git repository"):
        ADDS[verb](workspace, images(tmp_path / "more.npz", 1))
    assert not workspace.data.exists()


def test_images_that_are_gone_for_good_come_back_as_the_same_version_by_what_the_refusal_says(
    filled: Workspace, tmp_path: Path
) -> None:
    sources = [tmp_path / "first.npz", images(tmp_path / "more.npz", 1)]
    add(filled, str(sources[1]))
    before = versioned(filled)
    shutil.rmtree(filled.data)
    shutil.rmtree(filled.root / ".dvc" / "cache")
    with pytest.raises(DataError) as caught:
        add(filled, str(sources[0]))
    assert "without a remote remove data.dvc, then `nss data add` all batches again" in caught.value.fix
    assert versioned(filled) == {"data.dvc": before["data.dvc"]}
    (filled.root / "data.dvc").unlink()
    for source in sources:
        add(filled, str(source))
    assert versioned(filled) == before


def test_the_digits_twice_are_one_version(workspace: Workspace) -> None:
    first = add_demo(workspace)
    before = versioned(workspace)
    again = add_demo(workspace)
    assert (first.already_present, again.already_present, first.images) == (False, True, 1797)
    assert versioned(workspace) == before
    assert status(workspace)["committed"] is True
