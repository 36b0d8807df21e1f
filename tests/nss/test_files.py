"""Whole or not at all; equal input gives equal bytes; damage is named."""

from __future__ import annotations

import errno
import os
import resource
import socket
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from nss.errors import ModelError, NssError
from nss.files import (
    file_digest,
    owner_of,
    read_json,
    read_tensors,
    replacing,
    text_digest,
    write_json,
    write_tensors,
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


def test_a_full_disk_is_told_as_the_operating_system_tells_it(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(OSError, match="os error 27") as caught:
            write_tensors(tmp_path / "x", {"a": torch.zeros(10_000)}, None)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert (caught.value.errno, caught.value.filename) == (errno.EFBIG, str(tmp_path / "x"))
    assert entries(tmp_path) == []


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


def test_tensors_of_every_kind_read_back_equal_with_their_description(tmp_path: Path) -> None:
    tensors = {
        "b": torch.arange(6).view(2, 3).t(),
        "a": torch.tensor([1.5], dtype=torch.float64),
        "flags": torch.tensor([True, False]),
        "scalar": torch.tensor(3),
        "empty": torch.zeros(0, 4),
    }
    write_tensors(tmp_path / "t", tensors, {"format": 1, "layers": ["z", "a"]})
    found, meta = read_tensors(tmp_path / "t")
    assert meta == {"format": 1, "layers": ["z", "a"]}
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)


def test_equal_tensors_give_equal_bytes_in_any_order(tmp_path: Path) -> None:
    tensors = {f"layer{i}": torch.full((i + 1,), float(i)) for i in range(20)}
    write_tensors(tmp_path / "a", tensors, {"x": 1, "y": 2})
    write_tensors(tmp_path / "b", dict(reversed(tensors.items())), {"x": 1, "y": 2})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize("damage", ["missing", "cut", "empty", "text", "folder"])
def test_unreadable_tensors_raise_the_error_asked_for(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "t"
    write_tensors(path, {"a": torch.zeros(100)}, None)
    whole = path.read_bytes()
    path.unlink()
    if damage == "folder":
        path.mkdir()
    elif damage != "missing":
        path.write_bytes({"cut": whole[:-1], "empty": b"", "text": b"not tensors at all"}[damage])
    with pytest.raises(ModelError) as caught:
        read_tensors(path, ModelError)
    assert caught.value.where == str(path)


@pytest.mark.parametrize("garbled", ["{", "[" * 100_000])
def test_tensors_without_our_description_have_none_and_a_garbled_one_is_refused(tmp_path: Path, garbled: str) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "plain")
    assert read_tensors(tmp_path / "plain")[1] is None
    save_file({"a": torch.zeros(1)}, tmp_path / "garbled", metadata={"nss": garbled})
    with pytest.raises(NssError, match="not a whole safetensors file"):
        read_tensors(tmp_path / "garbled")


def test_digests_are_those_of_blake2b(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"abc")
    # b2sum -l 128 <<< of the three bytes "abc"
    assert file_digest(tmp_path / "x") == text_digest("abc") == "cf4ab791c62b8d2b2109c90275287816"
    assert text_digest("abd") != text_digest("abc")
