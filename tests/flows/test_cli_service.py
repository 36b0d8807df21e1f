from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
from prefect.settings import PREFECT_API_URL, temporary_settings

from flows.cli import main
from flows.cli_service import announce
from tasks.workspace import Workspace

ROOT = Path(__file__).resolve().parents[2]
URL = "http://prefect.example:4200/api"
# SIGTERM comes at the place in the first argument; what runs afterwards is written down.
WATCH = """
import os
import signal
import sys

from flows import watch
from flows.cli import main

place = sys.argv.pop(1)


def at(name, answer):
    def reached(*_, **__):
        print(name, flush=True)
        if name == place:
            os.kill(os.getpid(), signal.SIGTERM)
        return answer

    return reached


watch.Inbox.settled = at("look", ())
watch.is_up_to_date = at("compare", False)
watch.Here._run = at("cycle", None)
sys.exit(main())
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A workspace with a version of data that no cycle has seen."""
    (tmp_path / "dvc.yaml").write_text("stages: {}\n")
    (tmp_path / "data.dvc").write_text("outs:\n- md5: one.dir\n  path: data\n")
    return tmp_path


def watch(place: str, *options: str, cwd: Path) -> tuple[int, list[str], str]:
    """Watch until SIGTERM comes; return the exit status, what was reached and said, and what went wrong."""
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "MLFLOW_", "DVC_"))}
    done = subprocess.run(
        [sys.executable, "-c", WATCH, place, "watch", "--poll", "0.1", "--settle", "0", *options],
        cwd=cwd,
        env=plain | {"PYTHONPATH": str(ROOT), "PREFECT_HOME": str(cwd / "prefect")},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    return done.returncode, [line.split()[-1] for line in done.stdout.splitlines()], done.stderr


def test_sigterm_between_two_cycles_ends_the_watcher_and_no_cycle_begins(folder: Path) -> None:
    inbox = str(folder / "inbox")
    assert watch("look", cwd=folder) == (0, [inbox, "look", "stopped"], "")


@pytest.mark.parametrize("place", ["compare", "cycle"])
def test_sigterm_in_a_cycle_ends_the_watcher_by_the_signal_and_without_a_traceback(folder: Path, place: str) -> None:
    reached = ["compare", "cycle"][: 1 + (place == "cycle")]
    inbox = str(folder / "inbox")
    assert watch(place, cwd=folder) == (-signal.SIGTERM, [inbox, "look", *reached, "stopped"], "")


def test_sigterm_in_the_cycle_of_a_single_look_is_no_traceback_either(folder: Path) -> None:
    expected = ["look", "look", "compare", "cycle", "stopped"]
    assert watch("cycle", "--once", cwd=folder) == (-signal.SIGTERM, expected, "")


def test_new_data_is_not_announced_to_another_workspaces_deployment(folder: Path, monkeypatch, capsys) -> None:
    sent: list[object] = []

    @contextmanager
    def client(**_: object) -> Iterator[SimpleNamespace]:
        found = SimpleNamespace(parameters={"root": "/a/digits"})
        yield SimpleNamespace(
            read_deployment_by_name=lambda _: found, request=lambda *_, **content: sent.append(content)
        )

    monkeypatch.setattr("flows.deployment.get_client", client)
    with temporary_settings({PREFECT_API_URL: URL}):
        announce(Workspace(folder), "digits")
    assert sent == []
    assert capsys.readouterr().err == (
        "warning: the deployment maintain/digits is that of another workspace, /a/digits; "
        "a watcher finds the new data without the event\n"
        "  fix: choose another name with --name, or rename this workspace's folder; "
        "if nobody needs that one any more, `prefect deployment delete maintain/digits`\n"
    )


@pytest.fixture
def nss(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Give a function that runs a command in the workspace, by default with a Prefect server that nobody may ask."""

    def run(*arguments: str, url: str | None = URL) -> int:
        monkeypatch.setattr(sys, "argv", ["nss", *arguments])
        with temporary_settings({PREFECT_API_URL: url}):
            try:
                return main()
            except SystemExit as ended:
                return int(ended.code or 0)

    (folder / "champion.json").write_text('{"version": null}')
    (folder / "R&D").mkdir()
    for each in [*folder.iterdir()]:
        if each.is_file():
            each.rename(folder / "R&D" / each.name)
    monkeypatch.chdir(folder / "R&D")
    monkeypatch.setattr("flows.status._last_cycle", lambda _: None)
    monkeypatch.setattr("flows.deployment.get_client", lambda **_: pytest.fail("asked"))
    return run


REFUSED = (
    "error: no deployment can be called {name!r}\n"
    "  where: --name\n"
    "  allowed: characters that can be printed, but for / % & > < ? #\n"
    "  fix: name another one with --name NAME; by default it is called as the workspace's folder\n"
)


@pytest.mark.parametrize("command", [["serve"], ["watch"], ["watch", "--once"], ["status"], ["status", "--json"]])
def test_a_name_that_prefect_refuses_is_a_mistake(nss, capsys, command: list[str]) -> None:
    assert nss(*command, "--name", "a/b") == 2
    assert capsys.readouterr() == ("", REFUSED.format(name="a/b"))


@pytest.mark.parametrize("command", [["serve"], ["watch"], ["watch", "--once"]])
def test_a_folder_whose_name_prefect_refuses_asks_for_another_name(nss, capsys, command: list[str]) -> None:
    assert nss(*command) == 2
    assert capsys.readouterr() == ("", REFUSED.format(name="R&D"))


def test_in_a_folder_whose_name_prefect_refuses_status_shows_the_rest(nss, capsys) -> None:
    assert nss("status", "--json") == 0
    content = json.loads(capsys.readouterr().out)
    assert content.pop("server") == {"error": "no deployment can be called 'R&D'"}
    assert (content["data_md5"], content["champion"], content["is_working"]) == ("one.dir", None, False)


def test_in_a_folder_whose_name_prefect_refuses_new_data_is_taken_without_a_word(nss, capsys) -> None:
    """Its deployment, if there is one, has a name of its own, and its watcher finds the data."""
    with temporary_settings({PREFECT_API_URL: URL}):
        announce(Workspace(Path.cwd()))
    assert capsys.readouterr() == ("", "")


def test_status_shows_the_rest_where_nobody_can_tell_who_is_at_work(nss, capsys) -> None:
    # What may not be read is in test_lock.py; a file in the way of the folder is no lock either.
    Path(".dvc").touch()
    assert nss("status", "--json", url=None) == 0
    content = json.loads(capsys.readouterr().out)
    assert (content["is_working"], content["data_md5"]) == ("unknown", "one.dir")
    assert nss("status", url=None) == 0
    assert "at work     unknown: the lock cannot be read" in capsys.readouterr().out.splitlines()


@pytest.mark.parametrize("command", ["serve", "watch", "status"])
def test_an_inbox_in_the_home_folder_of_nobody_is_a_mistake(nss, capsys, command: str) -> None:
    assert nss(command, "--inbox", "~nosuchuser/in", "--name", "digits") == 2
    assert capsys.readouterr() == (
        "",
        "error: the inbox cannot be found (Could not determine home directory)\n"
        "  where: ~nosuchuser/in\n"
        "  fix: name a folder with --inbox\n",
    )
