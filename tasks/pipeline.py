"""The stages as DVC sees them: order, keys, cleanliness, reproduction. The only module that uses DVC's inner parts."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import chdir, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import psutil
from dvc.exceptions import DvcException, NotDvcRepoError
from dvc.lock import LockError
from dvc.repo import Repo
from dvc.schema import COMPILED_LOCKFILE_SCHEMA
from dvc.stage.exceptions import StageCmdFailedError
from dvc_data.hashfile.tree import Tree
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError
from voluptuous import Invalid

from nss.errors import BusyError, NssError, StageError
from tasks.layout import CODE
from tasks.processes import process_id, stop
from tasks.workspace import Workspace

Outcome = Literal["executed", "restored", "cached"]

RECEIPT = "NSS_STAGE_RECEIPT"
"""Environment variable naming the file that `nss stage` writes when it starts."""
LOG = "NSS_STAGE_LOG"
"""Environment variable naming the file that takes what a stage prints."""
OWNER = "NSS_STAGE_OWNER"
"""Environment variable of a stage that says which process began it, see `tasks.processes.process_id`."""

_HOLDER = re.compile(r"\(PID (\d+)\): (.*)")
# Exit codes of a stage that Ctrl-C ended: its own, and the signal itself.
_INTERRUPTED = ("130", "-2")
# DVC's list of who works where, in its folder for temporary files.
_RWLOCK = "rwlock"
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FULL_WORDS = ("No space left on device", "Disk quota exceeded", "disk is full", "File too large")

# DVC's messages come back as exceptions; what is left would be progress bars between our lines.
logging.getLogger("dvc").setLevel(logging.CRITICAL)
_COPYING = logging.getLogger("dvc_data")
_COPYING.propagate = False
_COPYING.handlers.clear()


@dataclass(frozen=True)
class StageKey:
    """What a stage would be computed from. Equal `digest`, equal outputs.

    digest: of the command, the hashes of all dependencies and the values of the parameters.
    data, code, params: digests of these parts alone; an empty text when the stage has no such dependency.
    """

    digest: str
    data: str
    code: str
    params: str


class Pipeline:
    """The stages of one workspace.

    >>> Pipeline(find_workspace()).stages()  # doctest: +SKIP
    ('base', 'profile', 'slice', 'evaluate')
    """

    def __init__(self, workspace: Workspace) -> None:
        self.workspace = workspace

    def stages(self) -> tuple[str, ...]:
        """Names of the stages that have a command, each after those that it depends on."""
        with self._repo() as repo:
            return tuple(stage.name for stage in _in_order(repo))

    def stale(self) -> tuple[str, ...]:
        """Names of the stages whose inputs or outputs are not what dvc.lock records, in the same order."""
        with self._repo() as repo, repo.lock:
            return tuple(stage.name for stage in _in_order(repo) if stage.status(check_updates=True))

    def stage_key(self, name: str) -> StageKey:
        """Digest what the stage depends on, as it lies in the workspace now.

        Raises StageError when a dependency is missing.
        """
        with self._repo() as repo:
            (stage,) = repo.stage.collect(name)
            return _key(stage)

    def look(self, name: str) -> tuple[StageKey, bool]:
        """Return the stage's key, and whether inputs and outputs are what dvc.lock records; dvc.yaml is read once."""
        with self._repo() as repo, repo.lock:
            (stage,) = repo.stage.collect(name)
            # Before the key, for which the dependencies are hashed as they are now.
            is_clean = not stage.status(check_updates=True)
            return _key(stage), is_clean

    def has_changed_data(self) -> bool | None:
        """Say whether data/ differs from data.dvc; None when nobody versions it."""
        if not (self.workspace.root / "data.dvc").is_file():
            return None
        with self._repo() as repo:
            return bool(repo.status(targets=["data.dvc"]))

    def names_other_data(self) -> bool:
        """Say whether data.dvc names other bytes than those in data/, be they in DVC's cache or not."""
        if not (self.workspace.root / "data.dvc").is_file():
            return False
        with self._repo() as repo:
            (stage,) = repo.stage.collect("data.dvc")
            return any(out.changed_checksum() for out in stage.outs)

    def add_data(self) -> None:
        """Commit data/ as it is to data.dvc. An equal data set leaves data.dvc as it was, byte for byte."""
        if self.has_changed_data() is not False:
            self.add(self.workspace.data)

    def add(self, path: Path) -> None:
        """Version a file or folder as it is. Raises BusyError when DVC is in use."""
        with self._repo() as repo:
            repo.add([str(path)])

    def restore(self, pointer: str) -> None:
        """Bring back what a file like data.dvc names from DVC's cache.

        Raises StageError when it is not there, or damaged: then nothing is brought back.
        """
        with self._repo() as repo:
            damaged = _drop_damaged_lists(repo, pointer)
            if not damaged:
                repo.checkout(targets=[pointer])
                damaged = _drop_damaged(repo, pointer)
        if damaged:
            raise StageError(
                f"DVC's cache is damaged: {', '.join(damaged)} has not the hash that {pointer} names",
                where=str(self.workspace.root / pointer),
                fix=f"`dvc pull {pointer}` where there is a remote, or make it again: `nss data add`, `nss data demo`",
            )

    def drop_broken_files(self) -> list[str]:
        """Remove dvc.lock and DVC's list of who works where when a kill or a full disk has cut them off; name them.

        DVC writes both in place. Stages then come back from its run-cache. A lock file with a merge conflict is the
        user's, and stays. Raises BusyError when somebody is at work on them.
        """
        with self._repo(mend=False) as repo, repo.lock:
            files = {Path(repo.tmp_dir, _RWLOCK): json.loads, self.workspace.root / "dvc.lock": _read_lock}
            broken = [path for path, read in files.items() if path.is_file() and _is_broken(path, read)]
            for path in broken:
                path.unlink()
        return [str(path.relative_to(self.workspace.root)) for path in broken]

    def reproduce(self, name: str, env: Mapping[str, str] | None = None) -> Outcome:
        """Bring the stage's outputs up to date, by its command only where neither they nor DVC's run-cache have them.

        Raises BusyError when somebody else works on them, StageError with the last lines printed when the command
        fails, KeyboardInterrupt when the command was interrupted. What DVC restores is hashed: where its cache is
        damaged, the command runs.
        """
        outcome = self._reproduce(name, env)
        if outcome == "restored":
            with self._repo() as repo:
                damaged = _drop_damaged(repo, name)
            if damaged:
                outcome = self._reproduce(name, env)
        return outcome

    def _reproduce(self, name: str, env: Mapping[str, str] | None) -> Outcome:
        children = _children()
        with tempfile.TemporaryDirectory(prefix="nss-") as folder:
            receipt, log = Path(folder, "receipt"), Path(folder, "log")
            run_env = {"PATH": _path(), RECEIPT: str(receipt), LOG: str(log), OWNER: process_id(), **(env or {})}
            try:
                with self._repo() as repo:
                    _drop_damaged_lists(repo, name)
                    done = repo.reproduce(targets=[name], single_item=True, run_env=run_env)
            except StageCmdFailedError as error:
                raise _failure(name, str(error), log) from None
            except NssError:
                raise
            except BaseException:
                stop(_children() - children)
                raise
            return "cached" if not done else "executed" if receipt.exists() else "restored"

    @contextmanager
    def _repo(self, *, mend: bool = True) -> Iterator[Repo]:
        root = self.workspace.root
        with _listening() as heard:
            try:
                # DVC reads names of stages, and stages out of its run-cache, relative to the current folder.
                with chdir(root), Repo(str(root)) as repo:
                    if mend:
                        _drop_broken_list(repo)
                    yield repo
            except (DvcException, OSError) as error:
                full = next(filter(None, (full_disk(each, root) for each in [error, *heard])), None)
                raise full or _translate(error, root) from error


@contextmanager
def _listening() -> Iterator[list[BaseException]]:
    """Gather the errors that DVC only logs when it fails to copy a file into its cache."""
    heard: list[BaseException] = []
    handler = logging.Handler(logging.ERROR)
    handler.emit = lambda record: heard.extend(filter(None, (record.exc_info or ())[1:2]))
    _COPYING.addHandler(handler)
    try:
        yield heard
    finally:
        _COPYING.removeHandler(handler)


def _in_order(repo: Repo) -> Iterator[Any]:
    """Yield the stages that have a command, each after those that it depends on."""
    graph = repo.index.graph
    # Edges lead from a stage to what it needs; of several that could come next it is the first in dvc.yaml, as DVC
    # itself has it: dvc.lock lists stages in the order in which they ran.
    waiting = {stage: set(graph.successors(stage)) for stage in graph}
    while waiting:
        ready = next(stage for stage, needs in waiting.items() if not needs)
        del waiting[ready]
        for needs in waiting.values():
            needs.discard(ready)
        if ready.cmd:
            yield ready


def _key(stage: Any) -> StageKey:
    rows = sorted(_dependency_rows(stage))
    return StageKey(
        digest=_digest([stage.cmd, rows]),
        data=next((value for path, value in rows if path == "data"), ""),
        code=_digest([row for row in rows if row[0].endswith((".py", CODE))]),
        params=_digest([row for row in rows if row[0].endswith("params.yaml")]),
    )


def _dependency_rows(stage: Any) -> Iterator[tuple[str, str]]:
    for dep in stage.deps:
        dep.save()
        value = dep.hash_info.value
        yield dep.def_path, value if isinstance(value, str) else json.dumps(value, sort_keys=True)


def _digest(content: Any) -> str:
    return hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=16).hexdigest()


def _path() -> str:
    """PATH with this interpreter's folder first, so that a stage's `nss` is the one that runs now."""
    return os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])


def _children() -> set[psutil.Process]:
    return set(psutil.Process().children(recursive=True))


def _read_lock(text: str) -> None:
    if "<<<<<<<" not in text:
        COMPILED_LOCKFILE_SCHEMA(YAML(typ="safe").load(text))


def _is_broken(path: Path, read: Callable[[str], Any]) -> bool:
    try:
        read(path.read_text(encoding="utf-8"))
    except (ValueError, YAMLError, Invalid):
        return True
    return False


def _drop_broken_list(repo: Repo) -> None:
    """Remove DVC's list of who works where when a kill has cut it off: nothing else in DVC works until then."""
    path = Path(repo.tmp_dir, _RWLOCK)
    if path.is_file() and _is_broken(path, json.loads):
        # Whoever is writing it holds this lock.
        with repo.lock:
            if path.is_file() and _is_broken(path, json.loads):
                path.unlink()


def _drop_damaged(repo: Repo, name: str) -> list[str]:
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


def _drop_damaged_lists(repo: Repo, name: str) -> list[str]:
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


def full_disk(error: BaseException, root: Path) -> StageError | None:
    """Return what to tell a user whose disk is full, None when the error has another reason."""
    cause: BaseException | None = error
    seen: set[int] = set()
    # An exception that is raised again while it is handled may be its own context.
    while cause is not None and id(cause) not in seen:
        seen.add(id(cause))
        if getattr(cause, "errno", None) in _FULL or any(words in str(cause) for words in _FULL_WORDS):
            return StageError(
                f"there is no room left on the disk ({cause})",
                where=str(getattr(cause, "filename", None) or root),
                fix="free some, then run again; `dvc gc --workspace` removes what older versions left in DVC's cache",
            )
        cause = cause.__cause__ or cause.__context__
    return None


def _translate(error: DvcException | OSError, root: Path) -> Exception:
    """Make DVC's error one of ours, by the deepest cause that says something."""
    causes: list[BaseException] = [error]
    while causes[-1].__cause__ is not None and causes[-1].__cause__ not in causes:
        causes.append(causes[-1].__cause__)
    for cause in causes:
        if isinstance(cause, NssError | StageCmdFailedError):
            return cause
        if isinstance(cause, LockError):
            return _busy(str(cause), root)
        if isinstance(cause, NotDvcRepoError):
            return StageError("this is no DVC repository", where=str(root), fix="dvc init")
    if isinstance(error, OSError):
        return error
    return StageError(f"DVC: {causes[-1]}", where=str(root), fix="see `dvc status` and `dvc doctor`")


def _busy(message: str, root: Path) -> BusyError:
    found = _HOLDER.search(message)
    holder = f"process {found[1]} ({found[2]})" if found else _lock_owner(root)
    return BusyError(
        f"the repository is in use by {holder}", where=str(root), fix="wait until it has ended, or stop it"
    )


def _lock_owner(root: Path) -> str:
    try:
        pid = int((root / ".dvc" / "tmp" / "lock").read_text().strip())
        return f"process {pid} ({' '.join(psutil.Process(pid).cmdline())})"
    except (OSError, ValueError, psutil.Error):
        return "another DVC process"


def _failure(name: str, message: str, log: Path) -> BaseException:
    code = message.rpartition(" ")[2]
    if code in _INTERRUPTED:
        return KeyboardInterrupt()
    printed = log.read_text(encoding="utf-8", errors="replace").strip() if log.exists() else ""
    tail = "\n".join(f"  | {line}" for line in printed.splitlines()[-30:])
    return StageError(
        f"the stage '{name}' failed with exit code {code}" + (f"\n{tail}" if tail else ""),
        where=f"dvc.yaml, stage {name}",
        fix=f"mend what it says, then run again; finished stages are kept (`dvc repro {name}` prints everything)",
    )
