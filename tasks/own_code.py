"""Code of the user's own that stages run: the modules that model factories come from (params.yaml, base.packages)."""

from __future__ import annotations

import hashlib
import importlib.util
import sysconfig
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
    root = workspace.root.resolve()
    parts = [each for name in sorted(workspace.packages) for each in (name.encode(), *_parts(root, name))]
    return hashlib.blake2b(b"\0".join(parts), digest_size=16).digest()


def _parts(root: Path, name: str) -> Iterator[bytes]:
    places = [place for place in _places(name) if _is_own(root, place)]
    if not places:
        yield _version(name).encode()
    for path in sorted(path for place in places for path in _files(place)):
        yield path.relative_to(root).as_posix().encode()
        # Git may end lines as the machine does.
        yield path.read_bytes().replace(b"\r\n", b"\n")


def _places(name: str) -> list[Path]:
    """Return the folders of a top-level package, or the file of a module, where Python would find it."""
    try:
        spec = importlib.util.find_spec(name)
    except ValueError:
        spec = None
    if spec is None:
        return []
    found = spec.submodule_search_locations or ([spec.origin] if spec.has_location and spec.origin else [])
    return [Path(each).resolve() for each in found]


def _is_own(root: Path, place: Path) -> bool:
    """Say whether a place lies in the workspace, but not among what is installed: its environment may lie there too."""
    installed = [Path(sysconfig.get_path(kind)).resolve() for kind in ("purelib", "platlib")]
    return place.is_relative_to(root) and not any(place.is_relative_to(each) for each in installed)


def _files(place: Path) -> Iterable[Path]:
    if not place.is_dir():
        return [place]
    # Editors put files of their own beside the one that is open, such as Emacs' link .#net.py, which leads nowhere.
    return (path for path in place.rglob("*.py") if path.is_file() and not path.name.startswith("."))


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "unknown"
