"""Files of DVC's that a kill, a full disk or a bad one has damaged: found by reading and hashing them, and removed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from dvc.repo import Repo
from dvc.schema import COMPILED_LOCKFILE_SCHEMA
from dvc_data.hashfile.tree import Tree
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError
from voluptuous import Invalid

# DVC's list of who works where, in its folder for temporary files.
_RWLOCK = "rwlock"


def drop_cut_off_files(repo: Repo) -> list[Path]:
    """Remove dvc.lock and DVC's list of who works where when they are cut off, and return their paths.

    A lock file with a merge conflict is the user's, and stays.
    """
    files: dict[Path, Callable[[str], Any]] = {
        Path(repo.tmp_dir, _RWLOCK): json.loads,
        Path(repo.root_dir, "dvc.lock"): _read_lock,
    }
    broken = [path for path, read in files.items() if path.is_file() and _is_broken(path, read)]
    for path in broken:
        path.unlink()
    return broken


def _read_lock(text: str) -> None:
    if "<<<<<<<" not in text:
        COMPILED_LOCKFILE_SCHEMA(YAML(typ="safe").load(text))


def _is_broken(path: Path, read: Callable[[str], Any]) -> bool:
    try:
        read(path.read_text(encoding="utf-8"))
    except (ValueError, YAMLError, Invalid):
        return True
    return False


def drop_broken_list(repo: Repo) -> None:
    """Remove DVC's list of who works where when a kill has cut it off: nothing else in DVC works until then."""
    path = Path(repo.tmp_dir, _RWLOCK)
    if path.is_file() and _is_broken(path, json.loads):
        # Whoever is writing it holds this lock.
        with repo.lock:
            if path.is_file() and _is_broken(path, json.loads):
                path.unlink()


def drop_damaged(repo: Repo, name: str) -> list[str]:
    """Return the files of a stage's outputs that are not what their hashes say, after removing them and their source.

    DVC takes a file of its cache for good when it is read-only, and never hashes it again.
    """
    (stage,) = repo.stage.collect(name)
    damaged = {out: {path: oid for path, oid in _hashes(out) if _md5(path) != oid} for out in stage.outs}
    for out, files in damaged.items():
        for oid in files.values():
            cached = Path(out.cache.oid_to_path(oid))
            if cached.exists() and _md5(cached) != oid:
                cached.unlink()
        if files:
            out.remove()
    return [str(path.relative_to(repo.root_dir)) for files in damaged.values() for path in files]


def drop_damaged_lists(repo: Repo, name: str) -> list[str]:
    """Return the folders of a stage's outputs whose list of files in DVC's cache is damaged, after removing it."""
    (stage,) = repo.stage.collect(name)
    damaged = []
    for out in stage.outs:
        if out.use_cache and out.hash_info and out.hash_info.isdir:
            cached = Path(out.cache.oid_to_path(out.hash_info.value))
            if cached.exists() and f"{_md5(cached)}.dir" != out.hash_info.value:
                cached.unlink()
                damaged.append(out.def_path)
    return damaged


def _hashes(out: Any) -> Iterator[tuple[Path, str]]:
    """Give the files of an output that DVC caches, and the hashes they should have."""
    content = out.get_obj() if out.use_cache and out.hash_name == "md5" else None
    if isinstance(content, Tree):
        yield from ((Path(out.fs_path, *key), info.value) for key, _, info in content)
    elif content is not None:
        yield Path(out.fs_path), out.hash_info.value


def _md5(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "md5").hexdigest()
