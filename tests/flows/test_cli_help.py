"""What `nss --help` and the page of the command line show: the same commands, in the same groups and order."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from flows.cli import PANELS, app

ROOT = Path(__file__).resolve().parents[2]


def test_help_shows_the_commands_in_their_groups(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit):
        app(["--help"], prog_name="nss")
    text = capsys.readouterr().out
    found: dict[str, tuple[str, ...]] = {}
    for title, content in re.findall(r"╭─ ([^─]*) ─+╮\n(.*?)╰", text, re.DOTALL):
        found[title] = tuple(re.findall(r"^│ (\w+) ", content, re.MULTILINE))
    assert {title: names for title, names in found.items() if title != "Options"} == PANELS
    assert list(found) == ["Options", *PANELS]


def test_every_command_is_in_one_group() -> None:
    named = [entry.name or entry.callback.__name__ for entry in (*app.registered_commands, *app.registered_groups)]
    assert sorted(named) == sorted(name for names in PANELS.values() for name in names)


def test_the_page_has_the_same_groups_in_the_same_order() -> None:
    page = (ROOT / "docs" / "command-line.md").read_text(encoding="utf-8").partition("## Exit codes")[0]
    groups = [re.findall(r"^\| `nss (\w+)", table, re.MULTILINE) for table in page.split("\n\n") if table[:1] == "|"]
    assert [tuple(dict.fromkeys(names)) for names in groups] == list(PANELS.values())
