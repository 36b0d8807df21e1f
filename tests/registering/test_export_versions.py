"""`nss export` of the champion and of versions in the registry: the file holds the model that was meant."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import flows.export
from flows import cli
from nss.ingest import add_batch
from nss.model import build_model, load_model, model_digest, save_model
from tasks.champion import unpin_champion

Nss = Callable[..., tuple[int, str, str]]
Pictures = Callable[..., Path]
OUT = Path("model.pt2")


@pytest.fixture
def nss(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Nss:
    """Give the function that runs a command in the current folder: exit code, stdout, stderr; few calls are timed."""

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(flows.export, "REPEATS", 1)
        monkeypatch.setattr("sys.argv", ["nss", *arguments])
        capsys.readouterr()
        try:
            code = cli.main()
        except SystemExit as end:
            code = int(end.code or 0)
        return (code, *capsys.readouterr())

    return run


@pytest.fixture
def images(tmp_path: Path, save_picture: Pictures) -> str:
    """Make a data folder that the shop's models fit, beside the workspace: its own holds no images."""
    for seed in range(40):
        save_picture(tmp_path / "pictures" / ("ant", "bee")[seed % 2] / f"{seed}.png", seed, (8, 8))
    add_batch(tmp_path / "images", tmp_path / "pictures")
    return str(tmp_path / "images")


def exported(nss: Nss, images: str, *model: str) -> tuple[str, str]:
    """Export; return what the command says it was, and the digest in the file."""
    code, out, err = nss("export", *model, str(OUT), "--data", images, "--json")
    assert code == 0, err
    return json.loads(out)["model"], written()


def written() -> str:
    about = {"nss": ""}
    torch.export.load(OUT, extra_files=about)
    return json.loads(about["nss"])["model"]


def digest(folder: Path) -> str:
    return model_digest(load_model(folder))


def test_after_a_promotion_the_new_champion_is_exported_and_not_what_base_still_holds(
    shop: Any, nss: Nss, images: str
) -> None:
    shop.cycle()
    before = digest(shop.workspace.out("base") / "model")
    assert exported(nss, images) == ("base", before)
    assert nss("promote")[0] == 0
    champion = digest(shop.workspace.champion)
    assert exported(nss, images) == ("champion: digits version 1", champion)
    assert champion == digest(shop.workspace.out("restructure") / "model")
    assert digest(shop.workspace.out("base") / "model") == before != champion


def test_after_a_rollback_the_earlier_champion_is_exported(two: Any, nss: Nss, images: str) -> None:
    first, second = (two.registry.by_number(number).model for number in (1, 2))
    assert first != second
    assert exported(nss, images) == ("champion: digits version 2", second)
    assert nss("rollback")[0] == 0
    assert exported(nss, images) == ("champion: digits version 1", first)


def test_with_nothing_pinned_base_is_exported_also_when_the_registry_has_a_champion(
    two: Any, nss: Nss, images: str
) -> None:
    unpin_champion(two.workspace)
    base = two.workspace.out("base") / "model"
    shutil.rmtree(base)
    save_model(build_model("nss.zoo:lenet", ("ant", "bee"), (1, 8, 8), seed=7), base)
    assert exported(nss, images) == ("base", digest(base))
    assert two.aliases() == {"champion": 2, "previous": 1}


@pytest.mark.parametrize(
    ("reference", "number"),
    [("models:/digits@champion", 2), ("models:/digits@previous", 1), ("models:/digits/1", 1), ("models:/digits/2", 2)],
)
def test_a_version_in_the_registry_is_exported_whatever_is_pinned(
    two: Any, nss: Nss, images: str, reference: str, number: int
) -> None:
    unpin_champion(two.workspace)
    assert exported(nss, images, reference) == (
        f"registry: digits version {number}",
        two.registry.by_number(number).model,
    )


def test_the_text_names_the_champion(two: Any, nss: Nss, images: str) -> None:
    code, out, _ = nss("export", str(OUT), "--data", images)
    assert (code, out.splitlines()[1]) == (0, "model     champion: digits version 2")


def refused(nss: Nss, *arguments: str) -> str:
    """Return the message of an export that ends as a mistake and writes nothing."""
    before = sorted(Path.cwd().iterdir())
    code, out, err = nss("export", *arguments, str(OUT))
    assert (code, out) == (2, "")
    assert sorted(Path.cwd().iterdir()) == before
    return err


@pytest.mark.parametrize(
    ("reference", "allowed"),
    [
        ("digits@staging", "digits@champion, digits@previous, digits/1, digits/2"),
        ("digits/9", "digits@champion, digits@previous, digits/1, digits/2"),
        ("cats@champion", "the registered models are digits"),
        ("digits", "digits@champion, digits@previous, digits/1, digits/2"),
    ],
)
def test_a_version_that_is_not_there_is_a_mistake_that_says_which_there_are(
    two: Any, nss: Nss, reference: str, allowed: str
) -> None:
    assert refused(nss, f"models:/{reference}").splitlines() == [
        f"error: there is no version {reference!r}",
        f"  where: {two.tracker.uri}",
        f"  allowed: {allowed}",
    ]


def test_a_version_that_nss_has_not_registered_is_refused_and_may_be_adopted(two: Any, nss: Nss) -> None:
    two.tracker.client.create_registered_model("cats")
    two.tracker.client.create_model_version("cats", str(two.workspace.champion))
    assert refused(nss, "models:/cats/1").splitlines() == [
        "error: cats version 1 was not registered by nss",
        f"  where: {two.tracker.uri}",
        "  fix: nss adopt models:/cats/1",
    ]


def test_a_champion_whose_weights_are_missing_is_refused_and_base_is_no_substitute(two: Any, nss: Nss) -> None:
    shutil.rmtree(two.workspace.champion)
    assert refused(nss).splitlines() == [
        "error: the weights of the champion, digits version 2, are missing",
        f"  where: {two.workspace.champion}",
        "  fix: dvc pull champion.dvc",
    ]


def test_a_champion_folder_that_holds_another_model_is_refused(two: Any, nss: Nss) -> None:
    shutil.rmtree(two.workspace.champion)
    shutil.copytree(two.workspace.out("base") / "model", two.workspace.champion)
    first, second = (two.registry.by_number(number).model for number in (1, 2))
    assert refused(nss).splitlines()[0] == (
        f"error: champion/ holds another model ({first}) than the champion, digits version 2 ({second})"
    )


def test_a_store_that_is_away_does_not_keep_the_champion_from_being_exported(
    two: Any, nss: Nss, images: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    assert exported(nss, images)[0] == "champion: digits version 2"
    OUT.unlink()
    err = refused(nss, "models:/digits@champion")
    assert err.startswith("error: the tracking store does not answer as it should (")
