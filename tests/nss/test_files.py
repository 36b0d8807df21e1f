"""Whole or not at all; equal input gives equal bytes; damage is named."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from nss.errors import ModelError
from nss.files import (
    file_digest,
    owner_of,
    read_json,
    replacing,
    text_digest,
    write_json,
)


def entries(folder: Path) -> list[str]:
    return sorted(each.name for each in folder.iterdir())


def test_a_file_appears_only_when_the_block_ends(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "a.txt"
    with replacing(path) as part:
        part.write_text("new")
        assert not path.exists()
        assert part.parent.parent == path.parent  # one file system, so the rename cannot be a copy
    assert path.read_text() == "new"
    assert entries(path.parent) == ["a.txt"]


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_an_exception_leaves_what_was_there_and_nothing_else(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "target"
    if kind == "folder":
        path.mkdir()
        (path / "old").write_text("old")
    else:
        path.write_text("old")

    def fail(part: Path) -> None:
        if kind == "folder":
            part.mkdir()
            (part / "half").write_text("half")
        else:
            part.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), replacing(path) as part:
        fail(part)
    assert entries(tmp_path) == ["target"]
    assert (path / "old" if kind == "folder" else path).read_text() == "old"


def test_a_folder_is_replaced_whole(tmp_path: Path) -> None:
    for content in ("one", "two"):
        with replacing(tmp_path / "folder") as part:
            part.mkdir()
            (part / content).write_text(content)
    assert entries(tmp_path) == ["folder"]
    assert entries(tmp_path / "folder") == ["two"]


def test_the_old_folder_survives_a_rename_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "old").write_text("old")

    def refuse(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OSError, match="no space left"), replacing(folder) as part:
        part.mkdir()
    assert (folder / "old").read_text() == "old"


@pytest.mark.parametrize("name", ["a.txt", "dataset.json", ".profile", "folder"])
def test_a_temporary_folder_names_what_it_stands_for_and_who_made_it(tmp_path: Path, name: str) -> None:
    with replacing(tmp_path / name) as part:
        part.touch()
        assert owner_of(part.parent) == (name, socket.gethostname(), os.getpid())
    assert owner_of(tmp_path / name) is None


@pytest.mark.parametrize(
    "name", [".a.txt", ".a.txt.x3k_9a1q", "a.txt.host~1.x3k_9a1q", ".git", ".a.txt.host~x.x3k_9a1q"]
)
def test_other_files_have_no_owner(name: str) -> None:
    assert owner_of(Path(name)) is None


def test_json_keeps_its_order_and_reads_back(tmp_path: Path) -> None:
    content = {"b": [1, 2.5, None, True], "a": "Grüße"}
    write_json(tmp_path / "x.json", content)
    text = (tmp_path / "x.json").read_text(encoding="utf-8")
    assert text.index('"b"') < text.index('"a"')
    assert "Grüße" in text
    assert text.endswith("}\n")
    assert read_json(tmp_path / "x.json") == content


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "is missing"),
        (b"{", "is not JSON"),
        (b"\xff\xfe\x00", "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (b"1" * 5000, "is not JSON"),
    ],
)
def test_unreadable_json_raises_the_error_asked_for(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "x.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ModelError, match=message) as caught:
        read_json(path, ModelError)
    assert caught.value.where == str(path)


def test_digests_are_those_of_blake2b(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"abc")
    # b2sum -l 128 <<< of the three bytes "abc"
    assert file_digest(tmp_path / "x") == text_digest("abc") == "cf4ab791c62b8d2b2109c90275287816"
    assert text_digest("abd") != text_digest("abc")
