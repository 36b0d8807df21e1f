"""Code of the user's own that stages run: the modules that model factories come from (params.yaml, base.packages)."""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Iterable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from tasks.workspace import Workspace


def own_code(workspace: Workspace) -> bytes:
    """Return a digest of the packages of a workspace; nothing of them is imported. Empty when there are none.

    Of one that lies in the workspace every line counts, of one that is installed its version: what was installed is
    known by that, and may be large.

    >>> own_code(with_packages(find_workspace(), ["pets_net"])).hex()  # doctest: +SKIP
    '5f0c...'
    """
    if not workspace.packages:
        return b""
    parts = [each for name in sorted(workspace.packages) for each in (name.encode(), *_parts(workspace.root, name))]
    return hashlib.blake2b(b"\0".join(parts), digest_size=16).digest()


def _parts(root: Path, name: str) -> Iterator[bytes]:
    files = [path for path in _files(name) if path.is_relative_to(root)]
    if not files:
        yield _version(name).encode()
    for path in files:
        yield path.relative_to(root).as_posix().encode()
        # Git may end lines as the machine does.
        yield path.read_bytes().replace(b"\r\n", b"\n")


def _files(name: str) -> Iterable[Path]:
    """Return the files of a top-level module or package, where Python would find it."""
    try:
        spec = importlib.util.find_spec(name)
    except ValueError:
        return []
    if spec is None:
        return []
    if spec.submodule_search_locations is not None:
        return sorted(path.resolve() for each in spec.submodule_search_locations for path in Path(each).rglob("*.py"))
    return [Path(spec.origin).resolve()] if spec.has_location and spec.origin else []


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "unknown"
