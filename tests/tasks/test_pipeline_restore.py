"""What data.dvc and champion.dvc name is brought back, or it is said how to bring it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from dvc.exceptions import CheckoutError
from dvc.repo import Repo

from nss.errors import StageError
from tasks.pipeline import Pipeline
from tasks.workspace import Workspace

WITHOUT_A_REMOTE = (
    ", or `nss data demo` for the digits; without a remote remove data.dvc, then `nss data add` all batches again in "
    "their old order: it is the same version when `git status` does not name data.dvc"
)


def cached_files(toy: Workspace) -> list[Path]:
    return [path for path in (toy.root / ".dvc" / "cache" / "files").rglob("*") if path.is_file()]


@pytest.mark.parametrize("missing", ["content of x", "relpath", ""], ids=["a file", "the list", "all"])
@pytest.mark.parametrize(
    ("name", "says", "fix"),
    [
        ("data", "data.dvc names a data set", f"`dvc pull data.dvc`{WITHOUT_A_REMOTE}"),
        ("champion", "champion.dvc names a model", "`dvc pull champion.dvc`"),
    ],
)
def test_a_clone_without_the_files_is_told_to_pull_them(
    toy: Workspace, name: str, says: str, fix: str, missing: str
) -> None:
    pipeline, folder = Pipeline(toy), toy.root / name
    folder.mkdir()
    (folder / "x").write_text("content of x")
    (folder / "y").write_text("content of y")
    pipeline.add(folder)
    for path in cached_files(toy):
        if missing in path.read_text():
            path.unlink()
    shutil.rmtree(folder)
    with pytest.raises(StageError) as caught:
        pipeline.restore(f"{name}.dvc")
    assert caught.value.what == f"{says} whose files are not here"
    assert (caught.value.where, caught.value.fix) == (str(folder), f"bring them with {fix}")
    assert not folder.exists()


@pytest.mark.parametrize(("name", "instead"), [("data", WITHOUT_A_REMOTE), ("champion", "")])
def test_where_the_cache_is_damaged_the_same_way_out_is_said(toy: Workspace, name: str, instead: str) -> None:
    pipeline, folder = Pipeline(toy), toy.root / name
    folder.mkdir()
    (folder / "x").write_text("content of x")
    pipeline.add(folder)
    shutil.rmtree(folder)
    for path in cached_files(toy):
        if path.read_text() == "content of x":
            path.chmod(0o644)
            path.write_text("content of y")
            path.chmod(0o444)
    with pytest.raises(StageError, match="DVC's cache is damaged") as caught:
        pipeline.restore(f"{name}.dvc")
    assert caught.value.fix == f"bring it with `dvc pull {name}.dvc`{instead}"


def test_a_checkout_that_fails_for_another_reason_is_not_blamed_on_missing_files(
    toy: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = Pipeline(toy)
    toy.data.mkdir()
    (toy.data / "x").write_text("content of x")
    pipeline.add_data()
    shutil.rmtree(toy.data)

    def fail(*_: object, **__: object) -> None:
        raise CheckoutError(["data"], {})

    monkeypatch.setattr(Repo, "checkout", fail)
    with pytest.raises(StageError, match="DVC: Checkout failed"):
        pipeline.restore("data.dvc")
