"""A workspace in a user's own repository: whole, nothing overwritten, and its stages follow the installed code."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from dvc.exceptions import InitError
from PIL import Image
from ruamel.yaml import YAML

from nss.errors import NssError, StageError
from tasks import layout
from tasks.data import add
from tasks.layout import CODE, code_digests, lay_out, refresh_code, set_params
from tasks.params import load_params
from tasks.pipeline import Pipeline
from tasks.workspace import Workspace, find_workspace, with_packages

ROOT = Path(__file__).resolve().parents[2]
FILES = {".dvc/config", ".dvcignore", ".gitignore", "champion.json", "dvc.yaml", CODE, "params.yaml"}


def read(path: Path) -> dict:
    return YAML(typ="safe").load(path.read_text(encoding="utf-8"))


def git(root: Path, *arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=root, check=True, capture_output=True, text=True).stdout


def everything(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_a_new_folder_becomes_a_repository_whose_stages_dvc_reads(tmp_path: Path) -> None:
    made = lay_out(tmp_path / "cats", "cats")
    root = made.workspace.root
    assert made.is_new_repository
    assert set(made.files) == FILES
    assert all((root / name).is_file() for name in FILES)
    own = read(ROOT / "dvc.yaml")["stages"]
    assert set(Pipeline(made.workspace).stages()) == set(own)
    stages = read(root / "dvc.yaml")["stages"]
    for verb, stage in stages.items():
        assert [dep for dep in stage["deps"] if dep.endswith(".py")] == []
        assert stage["deps"] == [dep for dep in own[verb]["deps"] if not dep.endswith(".py")]
        assert stage["params"] == [*own[verb].get("params", []), {CODE: [verb]}]
        assert (stage["cmd"], stage["outs"]) == (own[verb]["cmd"], own[verb]["outs"])


def test_where_there_is_no_workspace_it_is_said_how_to_lay_one_out(tmp_path: Path) -> None:
    with pytest.raises(NssError, match="no workspace") as caught:
        find_workspace(tmp_path)
    assert caught.value.fix == "change into the repository, or lay a workspace out with `nss init`"
    assert find_workspace(lay_out(tmp_path).workspace.root / "inbox").root == tmp_path


def test_the_settings_are_those_of_the_repository_but_for_what_suits_the_digits(tmp_path: Path) -> None:
    made = lay_out(tmp_path / "cats", "cats")
    ours, theirs = load_params(ROOT / "params.yaml").model_dump(), load_params(made.workspace.params).model_dump()
    assert theirs["register"].pop("name") == "cats"
    assert set(theirs["triage"].pop("budgets").values()) == {None}
    # Two classes cannot be four slices.
    assert theirs["slice"].pop("n_slices") is None
    ours["register"].pop("name")
    ours["triage"].pop("budgets")
    ours["slice"].pop("n_slices")
    assert theirs == ours
    # The comments say what is allowed: they come along.
    comments = [line for line in (ROOT / "params.yaml").read_text().splitlines() if "#" in line]
    assert len([line for line in made.workspace.params.read_text().splitlines() if "#" in line]) == len(comments)


def test_git_ignores_what_is_made_and_tracks_what_is_laid_out(tmp_path: Path) -> None:
    root = lay_out(tmp_path / "cats", "cats").workspace.root
    for name in (
        "data/x",
        "champion/model.json",
        "artifacts/base/x",
        "mlflow/tracking.db",
        "inbox/x",
        "mlflow/ledger.jsonl",
    ):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("x")
    git(root, "add", "-A")
    tracked = set(git(root, "ls-files").splitlines())
    assert tracked >= FILES
    assert {name.partition("/")[0] for name in tracked - FILES} <= {".dvc"}


def test_a_folder_of_a_repository_is_laid_out_within_it(tmp_path: Path) -> None:
    git(tmp_path, "init", "-q")
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / ".gitignore").write_text("secrets\n")
    made = lay_out(tmp_path / "models", "cats")
    assert not made.is_new_repository
    assert not (tmp_path / "models" / ".git").exists()
    assert (tmp_path / "models" / ".gitignore").read_text().splitlines()[:2] == ["secrets", "__pycache__/"]
    assert Pipeline(made.workspace).stages()


def test_a_folder_that_git_ignores_gets_a_repository_of_its_own(tmp_path: Path) -> None:
    git(tmp_path, "init", "-q")
    (tmp_path / ".gitignore").write_text("/demo/\n")
    assert lay_out(tmp_path / "demo", "digits").is_new_repository


@pytest.mark.parametrize("name", ["dvc.yaml", "params.yaml", "champion.json", CODE])
def test_nothing_is_overwritten(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("mine\n")
    before = everything(tmp_path)
    with pytest.raises(StageError, match=f"the folder holds {name} already"):
        lay_out(tmp_path, "cats")
    assert everything(tmp_path) == before


@pytest.mark.parametrize("name", ["inbox", ".dvc", "data", "champion"])
def test_a_file_with_the_name_of_a_folder_of_the_workspace_is_named_and_nothing_changes(
    tmp_path: Path, name: str
) -> None:
    git(tmp_path, "init", "-q")
    (tmp_path / name).write_text("mine\n")
    before = everything(tmp_path)
    with pytest.raises(StageError, match=f"the folder holds a file {name} already"):
        lay_out(tmp_path, "cats")
    assert everything(tmp_path) == before


@pytest.mark.parametrize("is_tracked", [False, True])
def test_photos_in_data_are_to_get_another_name_first_and_can_then_be_added(tmp_path: Path, is_tracked: bool) -> None:
    git(tmp_path, "init", "-q")
    pixels = np.random.default_rng(0).integers(0, 255, (20, 8, 8), dtype=np.uint8)
    for number, image in enumerate(pixels):
        photo = tmp_path / "data" / ("cat", "dog")[number % 2] / f"{number}.png"
        photo.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(photo)
    if is_tracked:
        git(tmp_path, "add", "-A")
    before = everything(tmp_path)
    with pytest.raises(StageError, match="data/ holds cat, dog") as caught:
        lay_out(tmp_path, "cats")
    assert everything(tmp_path) == before
    move = "git mv data photos" if is_tracked else "mv data photos"
    assert caught.value.fix == f"give it another name: `{move}`, then `nss init` and `nss data add photos`"
    subprocess.run(move.split(), cwd=tmp_path, check=True)
    assert add(lay_out(tmp_path, "cats").workspace, str(tmp_path / "photos")).images == 20


def test_of_what_is_in_a_folder_that_is_in_the_way_a_few_names_are_said(tmp_path: Path) -> None:
    for name in "dacb":
        (tmp_path / "champion" / name).mkdir(parents=True)
    with pytest.raises(StageError, match=r"champion/ holds a, b, c, \.\.\.") as caught:
        lay_out(tmp_path, "cats")
    assert caught.value.fix == "give it another name: `mv champion my-champion`, then `nss init`"


@pytest.mark.parametrize(("folder", "mark"), [("data", "dataset.json"), ("champion", "model.json")])
def test_a_folder_that_nss_itself_wrote_is_kept(tmp_path: Path, folder: str, mark: str) -> None:
    (tmp_path / folder).mkdir()
    (tmp_path / folder / mark).write_text("{}")
    assert Pipeline(lay_out(tmp_path, "cats").workspace).stages()
    assert (tmp_path / folder / mark).read_text() == "{}"


def test_other_code_is_another_digest_for_the_stages_that_run_it(tmp_path: Path, monkeypatch) -> None:
    template = tmp_path / "package"
    (template / "tasks").mkdir(parents=True)
    (template / "nss").mkdir()
    stages = {"one": ["nss/a.py", "data"], "two": ["nss/a.py", "tasks/b.py"]}
    text = {verb: {"cmd": "x", "deps": deps, "outs": [verb]} for verb, deps in stages.items()}
    with (template / "dvc.yaml").open("w") as file:
        YAML().dump({"stages": text}, file)
    for name in ("nss/a.py", "tasks/b.py"):
        (template / name).write_text("x = 1\n")
    monkeypatch.setattr(layout, "__file__", str(template / "tasks" / "layout.py"))
    before = code_digests(Workspace(tmp_path))
    (template / "tasks" / "b.py").write_text("x = 2\n")
    after = code_digests(Workspace(tmp_path))
    assert (before["one"], before["two"] == after["two"]) == (after["one"], False)


def test_an_upgrade_names_the_stages_it_changes_once(tmp_path: Path, monkeypatch) -> None:
    workspace = lay_out(tmp_path / "cats", "cats").workspace
    assert refresh_code(workspace) == ()
    for out in ("artifacts/base/model", "artifacts/base/source.json", "artifacts/profile/profile.safetensors"):
        (workspace.root / out).parent.mkdir(parents=True, exist_ok=True)
        (workspace.root / out).touch()
    (workspace.root / "artifacts" / "profile" / "source.json").touch()
    before = Pipeline(workspace).stage_key("slice").code
    current = {**code_digests(workspace), "slice": "another"}
    monkeypatch.setattr(layout, "code_digests", lambda _: current)
    assert refresh_code(workspace) == ("slice",)
    assert read(workspace.root / CODE) == current
    assert Pipeline(workspace).stage_key("slice").code != before
    assert refresh_code(workspace) == ()


TORN = "<<<<<<< HEAD\nbase: a\n=======\nbase: b\n>>>>>>> theirs\n"


@pytest.mark.parametrize("content", [TORN.encode(), b"base: \xff\n", b"- base\n", b"base: [\n", b"text\n", b""])
def test_digests_that_cannot_be_read_are_written_anew(tmp_path: Path, content: bytes) -> None:
    workspace = lay_out(tmp_path / "cats", "cats").workspace
    whole = (workspace.root / CODE).read_bytes()
    (workspace.root / CODE).write_bytes(content)
    assert refresh_code(workspace) == tuple(code_digests(workspace))
    assert (workspace.root / CODE).read_bytes() == whole
    assert refresh_code(workspace) == ()


def test_a_module_of_the_users_own_is_code_of_every_stage(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])
    bare = lay_out(tmp_path / "cats", "cats").workspace
    recorded = read(bare.root / CODE)
    module = bare.root / "cats_net.py"
    module.write_text("raise SystemExit('nothing of it is imported')\n")
    assert refresh_code(bare) == ()
    workspace = with_packages(bare, ["cats_net"])
    assert refresh_code(workspace) == tuple(recorded)
    assert refresh_code(workspace) == ()
    module.write_text("WIDTH = 3\n")
    assert refresh_code(workspace) == tuple(recorded)
    module.write_bytes(b"WIDTH = 3\r\n")
    assert refresh_code(workspace) == ()
    assert refresh_code(bare) == tuple(recorded)
    assert read(bare.root / CODE) == recorded


def test_a_workspace_that_lists_its_files_itself_is_left_alone(tmp_path: Path) -> None:
    workspace = lay_out(tmp_path / "cats", "cats").workspace
    (workspace.root / CODE).unlink()
    assert refresh_code(workspace) == ()
    assert not (workspace.root / CODE).exists()


def test_settings_are_changed_in_place_and_comments_stay(tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    path.write_text("base:\n  epochs: 8 # many\n  cap: null # none\n  deep: {a: 1}\n")
    set_params(path, {"base.epochs": 3, "base.deep.a": None})
    assert path.read_text() == "base:\n  epochs: 3 # many\n  cap: null # none\n  deep: {a: null}\n"


@pytest.mark.parametrize("name", ["base.epoch", "bases.epochs", "epochs", "base.epochs.more"])
def test_a_setting_that_is_not_there_is_named_and_nothing_changes(tmp_path: Path, name: str) -> None:
    path = tmp_path / "params.yaml"
    path.write_text("base:\n  epochs: 8\n")
    with pytest.raises(StageError, match=f"there is no setting {name}"):
        set_params(path, {"base.epochs": 3, name: 1})
    assert path.read_text() == "base:\n  epochs: 8\n"


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        ("kätzchen ü", "kätzchen-ü"),
        ("a:b@c", "a-b-c"),
        (".-cats v1.0", "cats-v1.0"),
        ("...", "model"),
        ("2024-01-01", "2024-01-01"),
        ("1e3", "1e3"),
        ("null", "null"),
    ],
)
def test_a_model_without_a_name_has_its_folders_made_one_that_is_allowed(
    tmp_path: Path, folder: str, name: str
) -> None:
    made = lay_out(tmp_path / "within" / folder)
    assert load_params(made.workspace.params).register.name == name


@pytest.mark.parametrize("name", ["a/b", "kätzchen ü", "cats@2", "-cats", "cats\n", " "])
def test_a_name_that_mlflow_does_not_take_is_refused_and_nothing_changes(tmp_path: Path, name: str) -> None:
    with pytest.raises(StageError) as caught:
        lay_out(tmp_path / "new" / "cats", name)
    assert caught.value.what == f"the name {name!r} is not allowed"
    assert (caught.value.where, caught.value.allowed) == (
        "--name",
        "letters, digits, _, . and -: a name in MLflow's model registry",
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("folder", "says"), [("file", "File exists"), ("file/sub", "Not a directory")])
def test_a_file_where_the_folder_should_be_is_said(tmp_path: Path, folder: str, says: str) -> None:
    (tmp_path / "file").write_text("mine\n")
    with pytest.raises(StageError) as caught:
        lay_out(tmp_path / folder, "cats")
    assert caught.value.what == f"the workspace cannot be laid out ({says})"
    assert caught.value.where == str(tmp_path / folder)
    assert everything(tmp_path) == {"file": b"mine\n"}


def test_a_folder_that_cannot_be_written_is_said(tmp_path: Path, monkeypatch) -> None:
    def refuse(self: Path, *_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr("pathlib.Path.mkdir", refuse)
    with pytest.raises(StageError) as caught:
        lay_out(tmp_path / "cats")
    assert caught.value.what == "the workspace cannot be laid out (Permission denied)"
    assert caught.value.where == str(tmp_path / "cats")


@pytest.mark.parametrize("name", [".gitignore", ".dvcignore"])
def test_an_ignore_file_that_is_not_utf8_is_named_and_nothing_changes(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes("größe\n".encode("latin-1"))
    before = everything(tmp_path)
    with pytest.raises(StageError) as caught:
        lay_out(tmp_path, "cats")
    assert (caught.value.what, caught.value.where) == ("the file is not UTF-8", str(tmp_path / name))
    assert (everything(tmp_path), [path.name for path in tmp_path.iterdir()]) == (before, [name])


@pytest.mark.parametrize(
    ("line", "ignored"),
    [
        ("*.dvc", ".dvc/config, data.dvc, champion.dvc"),
        (".dvc/", ".dvc/config"),
        ("*.lock", "dvc.lock"),
        ("data*", "data.dvc"),
        ("*.yaml", "dvc.yaml, nss-code.yaml, params.yaml"),
        ("*.json", "champion.json"),
    ],
)
@pytest.mark.parametrize("is_repository", [False, True])
def test_what_dvc_or_a_clone_needs_and_git_ignores_is_named_and_nothing_changes(
    tmp_path: Path, line: str, ignored: str, is_repository: bool
) -> None:
    if is_repository:
        git(tmp_path, "init", "-q")
    (tmp_path / ".gitignore").write_text(f"{line}\n")
    before = everything(tmp_path)
    with pytest.raises(StageError) as caught:
        lay_out(tmp_path, "cats")
    assert caught.value.what == f"git ignores {ignored}"
    assert caught.value.fix.startswith("take out the line that does: `git check-ignore -v ")
    assert everything(tmp_path) == before
    assert (tmp_path / ".git").exists() == is_repository
    (tmp_path / ".gitignore").write_text("secrets\n")
    assert Pipeline(lay_out(tmp_path, "cats").workspace).stages()


def test_a_disk_that_is_full_at_the_last_file_leaves_nothing_behind(tmp_path: Path, monkeypatch) -> None:
    real = layout._write

    def full(path: Path, text: str) -> None:
        if path.name == "dvc.yaml":
            raise OSError(28, "No space left on device", str(path))
        real(path, text)

    git(tmp_path, "init", "-q")
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / ".gitignore").write_text("secrets")
    monkeypatch.setattr(layout, "_write", full)
    with pytest.raises(StageError, match=r"the workspace cannot be laid out \(No space left on device\)"):
        lay_out(tmp_path / "models", "cats")
    with pytest.raises(StageError, match=r"\(No space left on device\)"):
        lay_out(tmp_path / "new" / "cats", "cats")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".git", "models"]
    assert everything(tmp_path / "models") == {".gitignore": b"secrets"}


@pytest.mark.parametrize("is_staged", [False, True])
def test_what_fails_late_leaves_gits_index_as_it_was(tmp_path: Path, monkeypatch, is_staged: bool) -> None:
    def full(path: Path, *_: object) -> None:
        raise OSError(28, "No space left on device", str(path))

    git(tmp_path, "init", "-q")
    if is_staged:
        (tmp_path / "mine.txt").write_text("mine\n")
        git(tmp_path, "add", "mine.txt")
    before = git(tmp_path, "status", "--short")
    monkeypatch.setattr(layout, "write_json", full)
    with pytest.raises(StageError, match="No space left on device"):
        lay_out(tmp_path / "models", "cats")
    assert git(tmp_path, "status", "--short") == before
    assert (tmp_path / ".git" / "index").exists() == is_staged


def test_what_dvc_refuses_is_said_in_one_line_and_nothing_is_left(tmp_path: Path, monkeypatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise InitError("no good\nand more")

    monkeypatch.setattr(layout.Repo, "init", refuse)
    with pytest.raises(StageError) as caught:
        lay_out(tmp_path / "cats")
    assert caught.value.what == "the workspace cannot be laid out (no good)"
    assert list(tmp_path.iterdir()) == []
