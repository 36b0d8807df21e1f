from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import typer

from nss.errors import BusyError, CrashError, DataError, ParamsError, StageError

ROOT = Path(__file__).resolve().parents[2]
HEAVY = ("torch", "mlflow", "prefect", "dvc", "matplotlib", "sklearn", "nss")


def nss(*arguments: str, cwd: Path = ROOT, **env: str) -> subprocess.CompletedProcess[str]:
    code = "import sys; from flows.cli import main; sys.exit(main())"
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "MLFLOW_", "DVC_"))}
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=cwd,
        env=plain | {"PYTHONPATH": str(ROOT), "COLUMNS": "200"} | env,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def commands() -> dict[tuple[str, ...], Any]:
    """Every command by its words, for example ("data", "add")."""
    from flows.cli import app

    found: dict[tuple[str, ...], Any] = {}
    waiting = [((), typer.main.get_command(app))]
    while waiting:
        words, command = waiting.pop()
        children = getattr(command, "commands", {})
        waiting += [((*words, name), child) for name, child in children.items()]
        if not children:
            found[words] = command
    return found


COMMANDS = commands()
EXIT_CODES = ("0 done", "1 crashed", "2 a mistake", "75 somebody else", "130 interrupted", "143 stopped by SIGTERM")


def test_help_of_whatever_command_imports_nothing_heavy() -> None:
    """What `nss --help` costs is what it imports: half a second of CPU at most, which torch alone takes three times."""
    asked = [[*words, "--help"] for words in ((), ("data",), *COMMANDS)]
    code = f"""
import sys
from flows.cli import main
for arguments in {asked!r}:
    sys.argv = ["nss", *arguments]
    try:
        main()
    except SystemExit as ended:
        assert ended.code == 0, arguments
sys.stderr.write(",".join(name for name in {HEAVY!r} if name in sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("Usage: nss") == len(asked) > 15


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_help_of_every_command_has_examples_that_parse_and_the_exit_codes(words: tuple[str, ...]) -> None:
    title, _, rest = COMMANDS[words].epilog.partition("Examples:  ")
    examples, _, codes = rest.partition("\n\n")
    assert title == ""
    assert all(text in codes for text in EXIT_CODES)
    own = [shlex.split(each) for example in examples.split("   |   ") for each in example.split(" | ")[:1]]
    own = [example[1:] for example in own if example[0] == "nss"]
    assert own
    for example in own:
        assert tuple(example[: len(words)]) == words
        COMMANDS[words].make_context("nss", example[len(words) :])


def test_every_command_but_those_that_go_on_for_long_speaks_json() -> None:
    silent = {words for words, command in COMMANDS.items() if not any("--json" in each.opts for each in command.params)}
    assert silent == {("stage",), ("watch",), ("serve",)}


@pytest.mark.parametrize(("typed", "expected"), [("nss ", None), ("nss data ", {"add", "demo", "status"})])
def test_the_shell_completes_commands_without_importing_anything_heavy(typed: str, expected: set[str] | None) -> None:
    names = expected or {words[0] for words in COMMANDS}
    code = f"""
import sys
from flows.cli import main
try:
    main()
finally:
    sys.stderr.write(",".join(name for name in {HEAVY!r} if name in sys.modules))
"""
    asked = {"_NSS_COMPLETE": "complete_bash", "COMP_WORDS": typed, "COMP_CWORD": str(len(typed.split()))}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env={**os.environ, **asked}, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert set(done.stdout.split()) == names


def test_completion_can_be_installed() -> None:
    # The shell is that of the process above, which is make's when these tests are run by it: say which.
    done = nss("--show-completion", "bash", _TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION="1")
    assert done.returncode == 0, done.stderr
    assert "_NSS_COMPLETE=complete_bash" in done.stdout
    assert "complete -o default -F _nss_completion nss" in done.stdout


def test_help_documents_the_exit_codes() -> None:
    text = " ".join(nss("--help").stdout.split())
    for words in EXIT_CODES:
        assert words in text


@pytest.mark.parametrize("arguments", [["rum"], ["run", "--retries", "-1"], ["data", "add"]])
def test_a_mistake_in_the_command_line_is_two_without_a_traceback(arguments: list[str]) -> None:
    done = nss(*arguments)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert done.stderr


@pytest.mark.parametrize("size", ["32", "32x", "0x32", "axb"])
def test_a_wrong_size_says_what_is_allowed(size: str, tmp_path: Path) -> None:
    (tmp_path / "dvc.yaml").write_text("stages: {}\n")
    done = nss("data", "add", "x", "--resize", size, cwd=tmp_path)
    assert done.returncode == 2
    assert "HEIGHTxWIDTH" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("arguments", [["run"], ["data", "status"], ["stage", "base"]])
def test_outside_of_a_workspace_is_a_mistake_that_is_explained(arguments: list[str], tmp_path: Path) -> None:
    done = nss(*arguments, cwd=tmp_path, PREFECT_API_URL="http://127.0.0.1:9/api")
    assert done.returncode == 2
    assert "no workspace" in done.stderr
    assert "change into the repository" in done.stderr
    assert "Traceback" not in done.stderr


def test_an_unknown_stage_names_those_there_are() -> None:
    done = nss("stage", "bse")
    assert done.returncode == 2
    assert "there is no stage 'bse'" in done.stderr
    assert "base, profile, slice, triage, restructure, readapt, extend, evaluate, gate" in done.stderr


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (DataError("bad", ["one", "two"]), 2),
        (ParamsError("bad"), 2),
        (StageError("bad"), 2),
        (CrashError("it broke"), 1),
        (BusyError("in use"), 75),
    ],
)
def test_errors_of_ours_are_a_message_and_a_code(error: Exception, code: int, monkeypatch, capsys) -> None:
    from flows import cli

    def fail(**_: object) -> None:
        raise error

    monkeypatch.setattr(cli, "app", fail)
    assert cli.main() == code
    assert capsys.readouterr().err == f"error: {error}\n"


def test_other_errors_keep_their_traceback(monkeypatch) -> None:
    from flows import cli

    def fail(**_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(cli, "app", fail)
    with pytest.raises(ZeroDivisionError):
        cli.main()


def lay_out(root: Path) -> Path:
    """Make an empty workspace with the parameters of the repository."""
    (root / ".dvc").mkdir(parents=True)
    (root / ".dvc" / "config").write_text("[core]\n    analytics = false\n    autostage = false\n")
    for name in ("params.yaml", "dvc.yaml", "data.dvc", "champion.json"):
        (root / name).write_bytes((ROOT / name).read_bytes())
    subprocess.run(["git", "init", "-q"], cwd=root, check=True)
    return root


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    return lay_out(tmp_path / "workspace")


@pytest.fixture(scope="module")
def demo_made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """A workspace in which `nss data demo` was run, and how that ended. Not to be changed by tests."""
    root = lay_out(tmp_path_factory.mktemp("demo") / "workspace")
    return root, nss("data", "demo", "--json", cwd=root)


def test_the_demo_data_is_what_data_dvc_names_and_leaves_it_alone(demo_made) -> None:
    (workspace, done), before = demo_made, (ROOT / "data.dvc").read_bytes()
    assert (done.returncode, json.loads(done.stdout)["images"]) == (0, 1797), done.stderr
    assert (workspace / "data.dvc").read_bytes() == before
    status = json.loads(nss("data", "status", "--json", cwd=workspace).stdout)
    assert status["committed"] is True
    assert status["md5"] in before.decode()
    assert sum(status["images"].values()) == 1797
    again = nss("data", "demo", cwd=workspace)
    assert again.stdout.startswith("nothing new")


def test_the_demo_data_never_takes_the_place_of_another_data_set(workspace: Path) -> None:
    """A clone whose data has not been pulled yet: data.dvc is all there is of it."""
    other = (workspace / "data.dvc").read_text().replace("md5: ", "md5: 0000")
    (workspace / "data.dvc").write_text(other)
    done = nss("data", "demo", cwd=workspace)
    assert done.returncode == 2
    assert "data.dvc names another data set" in done.stderr
    assert "dvc pull" in done.stderr
    assert (workspace / "data.dvc").read_text() == other
    assert not (workspace / "data").exists()


def test_a_batch_is_added_and_committed_in_one_go(workspace: Path, make_folder) -> None:
    (workspace / "data.dvc").unlink()
    done = nss("data", "add", str(make_folder(workspace.parent / "photos", each=3)), "--json", cwd=workspace)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["new_classes"] == ["cat", "dog"]
    assert json.loads(nss("data", "status", "--json", cwd=workspace).stdout)["committed"] is True
    text = nss("data", "status", cwd=workspace).stdout
    assert "2 classes, images 3 x 4 x 4" in text or "2 classes, images 1 x 4 x 4" in text


def test_the_order_of_classes_is_that_of_a_file(workspace: Path, make_folder) -> None:
    (workspace / "data.dvc").unlink()
    photos, names = make_folder(workspace.parent / "photos", each=3), workspace.parent / "names.txt"
    names.write_text("dog\n\n  cat \n")
    done = nss("data", "add", str(photos), "--classes", str(names), cwd=workspace)
    assert done.returncode == 0, done.stderr
    assert list(json.loads(nss("data", "status", "--json", cwd=workspace).stdout)["classes"]) == ["dog", "cat"]
    # The second time there is an order.
    again = nss("data", "add", str(photos), "--classes", str(names), cwd=workspace)
    assert again.returncode == 2
    assert "the data set has one already" in again.stderr


@pytest.mark.parametrize(("content", "why"), [(None, "does not exist"), (b"\xff\xfe\x00", "cannot be read as text")])
def test_a_file_of_classes_that_cannot_be_read_is_a_mistake(
    workspace: Path, make_folder, content: bytes | None, why: str
) -> None:
    names = workspace.parent / "names.txt"
    if content is not None:
        names.write_bytes(content)
    done = nss("data", "add", str(make_folder(workspace.parent / "photos")), "--classes", str(names), cwd=workspace)
    assert (done.returncode, "Traceback" in done.stderr) == (2, False)
    assert why in " ".join(done.stderr.split())


def test_the_version_is_that_of_the_package() -> None:
    done = nss("--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"nss {version('nss')}\n", "")


def test_bad_input_lists_everything_and_changes_nothing(workspace: Path, make_folder, save_picture) -> None:
    (workspace / "data.dvc").unlink()
    folder = make_folder(workspace.parent / "photos")
    (folder / "cat" / "broken.png").write_bytes(b"\x89PNG not really")
    (folder / "dog" / "text.png").write_text("hello")
    (folder / "empty").mkdir()
    save_picture(folder / "dog" / "large.png", 7, (9, 9))
    done = nss("data", "add", str(folder), cwd=workspace)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    for name in ("broken.png", "text.png", "empty", "large.png"):
        assert name in done.stderr
    assert not (workspace / "data.dvc").exists()
    assert not (workspace / "data").exists()


@pytest.mark.parametrize("inbox", ["params.yaml", "params.yaml/inbox", "/proc/inbox"])
def test_an_inbox_that_cannot_be_made_is_a_mistake_that_is_explained(workspace: Path, inbox: str) -> None:
    done = nss("watch", "--once", "--inbox", inbox, cwd=workspace)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: the inbox cannot be made (")
    assert "--inbox" in done.stderr
    assert "Traceback" not in done.stderr


def test_doctor_finds_all_that_is_wrong_at_once(workspace: Path) -> None:
    (workspace / "params.yaml").write_text("base: 1\n")
    done = nss("doctor", "--json", cwd=workspace, PREFECT_API_URL="http://127.0.0.1:9/api")
    assert done.returncode == 1, done.stderr
    found = {row["check"]: row for row in json.loads(done.stdout)}
    assert {name for name, row in found.items() if not row["ok"]} == {"parameters", "data", "prefect"}
    assert "base: 1 is not allowed" in found["parameters"]["found"]
    assert "prefect server start" in found["prefect"]["fix"]
    assert str(workspace) in found["tracking"]["found"]


def test_doctor_says_ok_where_nothing_is_wrong(demo_made, tmp_path: Path) -> None:
    workspace = shutil.copytree(demo_made[0], tmp_path / "workspace", symlinks=True)
    for folder in ("nss", "tasks"):
        (workspace / folder).symlink_to(ROOT / folder)
    done = nss("doctor", cwd=workspace)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["ok"] * 9
    assert "1797 images of 10 classes" in done.stdout
