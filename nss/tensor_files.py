"""Tensors in files of the safetensors format, written and read as nss.files does it. Nothing is ever unpickled."""

from __future__ import annotations

import errno
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from nss.errors import NssError
from nss.files import replacing, unreadable

# safetensors keeps its metadata in an unordered map: with one key only, the bytes stay the same from run to run.
_META = "nss"


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], meta: Any) -> None:
    """Write tensors and JSON-able `meta` as one safetensors file: the same input gives the same bytes.

    Tensors that share memory are written one by one: read back, each has its own.
    """
    with replacing(path) as part:
        plain = _apart({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})
        try:
            save_file(plain, part, metadata={_META: json.dumps(meta)})
        except SafetensorError as problem:
            raise OSError(_number(problem), str(problem), str(path)) from None


def read_tensors(path: Path, error: type[NssError] = NssError) -> tuple[dict[str, torch.Tensor], Any]:
    """Read what `write_tensors` wrote, memory-mapped; a missing or damaged file raises `error` naming it."""
    try:
        with safe_open(path, framework="pt") as file:
            meta = json.loads((file.metadata() or {}).get(_META, "null"))
            names = list(file.keys())
            return {name: file.get_tensor(name) for name in names}, meta
    except FileNotFoundError:
        raise unreadable(error, "the file is missing", path) from None
    except (SafetensorError, OSError, ValueError, RecursionError) as problem:
        raise unreadable(error, f"the file is not a whole safetensors file ({problem})", path) from None


def _apart(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Copy all but the first of those that share memory, which safetensors does not take."""
    seen: set[int] = set()
    apart = {}
    for name, tensor in tensors.items():
        place = tensor.untyped_storage().data_ptr()
        apart[name] = tensor.clone() if place in seen else tensor
        seen.add(place)
    return apart


def _number(problem: SafetensorError) -> int:
    """Return the operating system's number of an error, which safetensors only tells in its text."""
    found = re.search(r"os error (\d+)", str(problem))
    return int(found[1]) if found else errno.EIO
