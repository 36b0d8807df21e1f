"""`nss report --out` where no file can be written: a mistake that is explained."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from flows import cli_report
from nss.errors import StageError
from tasks import report as module


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A workspace in which a cycle has ended; what its page says does not matter here."""
    (tmp_path / "dvc.yaml").write_text("stages: {}\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(module, "read_facts", lambda _: SimpleNamespace(verdict="HOLD", promoted=None))
    monkeypatch.setattr(module, "find_runs", lambda _: None)
    monkeypatch.setattr(module, "page", lambda *_: "<p>\n")
    return tmp_path


@pytest.mark.parametrize(("out", "says"), [("afile/x.html", "File exists"), ("afile/sub/x.html", "Not a directory")])
def test_a_file_where_the_folder_should_be_is_said(folder: Path, out: str, says: str) -> None:
    (folder / "afile").write_text("mine\n")
    with pytest.raises(StageError) as caught:
        cli_report.report(Path(out))
    assert caught.value.what == f"the page cannot be written ({says})"
    assert caught.value.where == out
    assert caught.value.fix == "name a file in a folder that you may write to with --out"
    assert sorted(path.name for path in folder.iterdir()) == ["afile", "dvc.yaml"]


@pytest.mark.parametrize(("out", "where"), [("x.html", "x.html"), (None, "report")])
def test_a_folder_that_may_not_be_written_is_said(
    folder: Path, monkeypatch: pytest.MonkeyPatch, out: str | None, where: str
) -> None:
    def refuse(self: Path, *_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr("pathlib.Path.mkdir", refuse)
    with pytest.raises(StageError) as caught:
        cli_report.report(out and Path(out))
    assert caught.value.what == "the page cannot be written (Permission denied)"
    assert caught.value.where == (where if out else str(folder / where))


def test_where_it_can_be_written_it_is(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cli_report.report(Path("new/x.html"))
    assert (folder / "new" / "x.html").read_text() == "<p>\n"
    assert capsys.readouterr().out == "HOLD: nothing is promoted\nsee new/x.html (4 bytes)\n"
