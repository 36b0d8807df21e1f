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


def cached_files(toy: Workspace) -> list[Path]:
    return [path for path in (toy.root / ".dvc" / "cache" / "files").rglob("*") if path.is_file()]


@pytest.mark.parametrize("missing", ["content of x", "relpath", ""], ids=["a file", "the list", "all"])
@pytest.mark.parametrize(
    ("name", "says", "fix"),
    [
        ("data", "data.dvc names a data set", "`dvc pull data.dvc`, or `nss data demo` for the digits"),
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
