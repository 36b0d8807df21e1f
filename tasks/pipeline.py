"""The stages as DVC sees them: order, keys, cleanliness, reproduction.

Only this module, tasks/dvc_damage.py and tasks/dvc_errors.py use DVC's inner parts.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, chdir, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import psutil
from dvc.dvcfile import is_git_ignored
from dvc.exceptions import CheckoutError, DvcException
from dvc.repo import Repo
from dvc.rwlock import rwlock
from dvc.stage.exceptions import StageCmdFailedError

from nss.errors import NssError, StageError
from tasks.dvc_damage import drop_broken_list, drop_cut_off_files, drop_damaged, drop_damaged_lists
from tasks.dvc_errors import failure, full_disk, listening, translate
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

_LINE_BYTES = 1000
# What nss versions without a stage, and what there is instead of bringing it from a remote. No batch is added while
# data.dvc names others: it would be the whole of the next version.
_POINTERS = {
    "data.dvc": (
        "a data set",
        ", or `nss data demo` for the digits; without a remote remove data.dvc, then `nss data add` all batches again "
        "in their old order: it is the same version when `git status` does not name data.dvc",
    ),
    "champion.dvc": ("a model", ""),
}


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


_working: list[Path] = []
"""the logs of the stages whose commands this process runs now"""


def last_line() -> str:
    """Return what the stage that works now has printed last; an empty text when nothing works, or it is silent yet."""
    try:
        with _working[-1].open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _LINE_BYTES))
            lines = file.read().decode(errors="replace").split("\n")
    except (IndexError, OSError):
        return ""
    # What follows the last end of a line is still being written.
    return lines[-2].strip() if len(lines) > 1 else ""


class Pipeline:
    """The stages of one workspace.

    >>> Pipeline(find_workspace()).stages()  # doctest: +SKIP
    ('base', 'profile', 'slice', 'evaluate')
    """

    def __init__(self, workspace: Workspace) -> None:
        self.workspace = workspace
        self._kept: _Kept | None = None

    @contextmanager
    def kept(self) -> Iterator[None]:
        """In this block dvc.yaml and dvc.lock are read once, and again only after one of them has changed."""
        self._kept = _Kept(self.workspace.root)
        try:
            yield
        finally:
            self._kept.close()
            self._kept = None

    def stages(self) -> tuple[str, ...]:
        """Names of the stages that have a command, each after those that it depends on."""
        with self._reading() as repo:
            return tuple(stage.name for stage in _in_order(repo))

    def stale(self) -> tuple[str, ...]:
        """Names of the stages whose inputs or outputs are not what dvc.lock records, in the same order."""
        with self._reading() as repo, repo.lock:
            return tuple(stage.name for stage in _in_order(repo) if stage.status(check_updates=True))

    def stage_key(self, name: str) -> StageKey:
        """Digest what the stage depends on, as it lies in the workspace now.

        Raises StageError when a dependency is missing.
        """
        with self._reading() as repo:
            return _key(_named(repo, name))

    def look(self, name: str) -> tuple[StageKey, bool]:
        """Return the stage's key, and whether inputs and outputs are what dvc.lock records."""
        with self._reading() as repo, repo.lock:
            stage = _named(repo, name)
            return _key(stage), not stage.status(check_updates=True)

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

    def require_repository(self) -> None:
        """Raise StageError where DVC versions nothing."""
        with self._repo():
            pass

    @contextmanager
    def holding_data(self) -> Iterator[None]:
        """Keep every stage and whoever else works by DVC off data/ in this block.

        Raises BusyError when one is at work on it, and StageError when git ignores data.dvc, which DVC refuses.
        """
        with ExitStack() as held:
            with self._repo() as repo, repo.lock:
                pointer = self.workspace.root / "data.dvc"
                if is_git_ignored(repo, str(pointer)):
                    fix = f"take out the line that does: `git check-ignore -v {pointer.name}` names it"
                    raise StageError("git ignores data.dvc", where=str(pointer), fix=fix)
                held.enter_context(_writing(repo, self.workspace.data))
            # It ends without DVC's lock: whoever has that one for long would make a failure of what is done.
            yield

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
            damaged = drop_damaged_lists(repo, pointer)
            if not damaged:
                self._check_out(repo, pointer)
                damaged = drop_damaged(repo, pointer)
        if damaged:
            raise StageError(
                f"DVC's cache is damaged: {', '.join(damaged)} has not the hash that {pointer} names",
                where=str(self.workspace.root / pointer),
                fix=f"bring it with `dvc pull {pointer}`{_POINTERS[pointer][1]}",
            )

    def _check_out(self, repo: Repo, pointer: str) -> None:
        try:
            repo.checkout(targets=[pointer])
        except CheckoutError as error:
            (stage,) = repo.stage.collect(pointer)
            if not any(out.changed_cache() for out in stage.outs):
                raise
            what, instead = _POINTERS[pointer]
            raise StageError(
                f"{pointer} names {what} whose files are not here",
                where=str(self.workspace.root / stage.outs[0].def_path),
                fix=f"bring them with `dvc pull {pointer}`{instead}",
            ) from error

    def drop_broken_files(self) -> list[str]:
        """Remove dvc.lock and DVC's list of who works where when a kill or a full disk has cut them off; name them.

        DVC writes both in place. Stages then come back from its run-cache. A lock file with a merge conflict is the
        user's, and stays. Raises BusyError when somebody is at work on them.
        """
        with self._repo(mend=False) as repo, repo.lock:
            broken = drop_cut_off_files(repo)
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
                damaged = drop_damaged(repo, name)
            if damaged:
                outcome = self._reproduce(name, env)
        return outcome

    def _reproduce(self, name: str, env: Mapping[str, str] | None) -> Outcome:
        children = _children()
        with tempfile.TemporaryDirectory(prefix="nss-") as folder:
            receipt, log = Path(folder, "receipt"), Path(folder, "log")
            run_env = {"PATH": _path(), RECEIPT: str(receipt), LOG: str(log), OWNER: process_id(), **(env or {})}
            _working.append(log)
            try:
                with self._repo() as repo:
                    drop_damaged_lists(repo, name)
                    done = repo.reproduce(targets=[name], single_item=True, run_env=run_env)
            except StageCmdFailedError as error:
                raise failure(name, str(error), log) from None
            except NssError:
                raise
            except BaseException:
                stop(_children() - children)
                raise
            finally:
                _working.remove(log)
            return "cached" if not done else "executed" if receipt.exists() else "restored"

    @contextmanager
    def _reading(self) -> Iterator[Repo]:
        """Yield a repository to look at, the one that is kept if one is."""
        if self._kept is None:
            with self._repo() as repo:
                yield repo
        else:
            with self._at_root():
                yield self._kept.repo()

    @contextmanager
    def _repo(self, *, mend: bool = True) -> Iterator[Repo]:
        with self._at_root(), Repo(str(self.workspace.root)) as repo:
            if mend:
                drop_broken_list(repo)
            yield repo

    @contextmanager
    def _at_root(self) -> Iterator[None]:
        """Have DVC's errors in our words. It reads names of stages, and its run-cache, relative to the folder."""
        root = self.workspace.root
        with listening() as heard:
            try:
                with chdir(root):
                    yield
            except (DvcException, OSError) as error:
                full = next(filter(None, (full_disk(each, root) for each in [error, *heard])), None)
                raise full or translate(error, root) from error


class _Kept:
    """A repository that is opened again when what says which stages there are, or what they were, has changed."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._repo: Repo | None = None
        self._seen: list[tuple[int, ...]] = []

    def repo(self) -> Repo:
        now = [_mark(self._root / name) for name in ("dvc.yaml", "dvc.lock", "params.yaml")]
        if self._repo is None or now != self._seen:
            self.close()
            self._repo, self._seen = Repo(str(self._root)), now
            drop_broken_list(self._repo)
        return self._repo

    def close(self) -> None:
        if self._repo is not None:
            self._repo.close()


def _mark(path: Path) -> tuple[int, ...]:
    try:
        found = path.stat()
    except FileNotFoundError:
        return ()
    return found.st_mtime_ns, found.st_size, found.st_ino


def _writing(repo: Repo, path: Path) -> AbstractContextManager[None]:
    """Have DVC note that this process writes the file or folder; what it does there by DVC meanwhile is let through."""
    hardlink = repo.config["core"].get("hardlink_lock", False)
    lock: AbstractContextManager[None] = rwlock(repo.tmp_dir, repo.fs, " ".join(sys.argv), [], [str(path)], hardlink)
    return lock


def _named(repo: Repo, name: str) -> Any:
    """Return the stage; DVC says what is wrong where there is none."""
    for stage in repo.index.stages:
        if getattr(stage, "name", None) == name:
            return stage
    (stage,) = repo.stage.collect(name)
    return stage


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
        # Not `save`, which would make what is there now what the stage is said to have seen.
        value = _hash(dep)
        yield dep.def_path, value if isinstance(value, str) else json.dumps(value, sort_keys=True)


def _hash(dep: Any) -> Any:
    if not dep.exists:
        raise dep.DoesNotExistError(dep)
    return dep.get_hash().value


def _digest(content: Any) -> str:
    return hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=16).hexdigest()


def _path() -> str:
    """PATH with this interpreter's folder first, so that a stage's `nss` is the one that runs now."""
    return os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])


def _children() -> set[psutil.Process]:
    return set(psutil.Process().children(recursive=True))
