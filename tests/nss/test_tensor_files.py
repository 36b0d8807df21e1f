"""Tensors in files: equal input gives equal bytes; damage is named."""

from __future__ import annotations

import errno
import resource
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from nss.errors import ModelError, NssError
from nss.tensor_files import read_tensors, write_tensors


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


def test_a_full_disk_is_told_as_the_operating_system_tells_it(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(OSError, match="os error 27") as caught:
            write_tensors(tmp_path / "x", {"a": torch.zeros(10_000)}, None)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert (caught.value.errno, caught.value.filename) == (errno.EFBIG, str(tmp_path / "x"))
    assert list(tmp_path.iterdir()) == []
