"""The stages as DVC sees them: order, keys, cleanliness, reproduction. The only module that uses DVC's inner parts."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import chdir, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import psutil
from dvc.exceptions import DvcException, NotDvcRepoError
from dvc.lock import LockError
from dvc.repo import Repo
from dvc.stage.exceptions import StageCmdFailedError

from nss.errors import BusyError, NssError, StageError
from tasks.workspace import Workspace

Outcome = Literal["executed", "restored", "cached"]

RECEIPT = "NSS_STAGE_RECEIPT"
"""Environment variable naming the file that `nss stage` writes when it starts."""
LOG = "NSS_STAGE_LOG"
"""Environment variable naming the file that takes what a stage prints."""

_HOLDER = re.compile(r"\(PID (\d+)\): (.*)")
# Exit codes of a stage that Ctrl-C ended: its own, and the signal itself.
_INTERRUPTED = ("130", "-2")
_PATIENCE_S = 20

# DVC's messages come back as exceptions; what is left would be progress bars between our lines.
logging.getLogger("dvc").setLevel(logging.CRITICAL)
logging.getLogger("dvc_data").setLevel(logging.CRITICAL)


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
            graph = repo.index.graph
            # Edges lead from a stage to what it needs; of several that could come next it is the first in dvc.yaml, as
            # DVC itself has it: dvc.lock lists stages in the order in which they ran.
            waiting = {stage: set(graph.successors(stage)) for stage in graph}
            order: list[str] = []
            while waiting:
                ready = next(stage for stage, needs in waiting.items() if not needs)
                del waiting[ready]
                for needs in waiting.values():
                    needs.discard(ready)
                order += [ready.name] if ready.cmd else []
            return tuple(order)

    def stage_key(self, name: str) -> StageKey:
        """Digest what the stage depends on, as it lies in the workspace now.

        Raises StageError when a dependency is missing.
        """
        with self._repo() as repo:
            (stage,) = repo.stage.collect(name)
            rows = sorted(_dependency_rows(stage))
        return StageKey(
            digest=_digest([stage.cmd, rows]),
            data=next((value for path, value in rows if path == "data"), ""),
            code=_digest([row for row in rows if row[0].endswith(".py")]),
            params=_digest([row for row in rows if row[0].endswith("params.yaml")]),
        )

    def is_clean(self, name: str) -> bool:
        """Say whether the stage's inputs and outputs are what dvc.lock records."""
        with self._repo() as repo:
            return not repo.status(targets=[name])

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
        if self.has_changed_data() is False:
            return
        with self._repo() as repo:
            repo.add([str(self.workspace.data)])

    def restore(self, pointer: str) -> None:
        """Bring back what a file like data.dvc names from DVC's cache. Raises StageError when it is not there."""
        with self._repo() as repo:
            repo.checkout(targets=[pointer])

    def reproduce(self, name: str, env: Mapping[str, str] | None = None) -> Outcome:
        """Bring the stage's outputs up to date, by its command only where neither they nor DVC's run-cache have them.

        Raises BusyError when somebody else works on them, StageError with the last lines printed when the command
        fails, KeyboardInterrupt when the command was interrupted.
        """
        children = _children()
        with tempfile.TemporaryDirectory(prefix="nss-") as folder:
            receipt, log = Path(folder, "receipt"), Path(folder, "log")
            run_env = {"PATH": _path(), RECEIPT: str(receipt), LOG: str(log), **(env or {})}
            try:
                with self._repo() as repo:
                    done = repo.reproduce(targets=[name], single_item=True, run_env=run_env)
            except StageCmdFailedError as error:
                raise _failure(name, str(error), log) from None
            except NssError:
                raise
            except BaseException:
                _stop(_children() - children)
                raise
            return "cached" if not done else "executed" if receipt.exists() else "restored"

    @contextmanager
    def _repo(self) -> Iterator[Repo]:
        try:
            # DVC reads names of stages, and stages out of its run-cache, relative to the current folder.
            with chdir(self.workspace.root), Repo(str(self.workspace.root)) as repo:
                yield repo
        except DvcException as error:
            raise _translate(error, self.workspace.root) from error


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


def _stop(processes: set[psutil.Process]) -> None:
    """End the stage's processes, which outlive DVC when this process is told to stop."""
    for process in processes:
        try:
            process.terminate()
        except psutil.NoSuchProcess:
            continue
    for process in psutil.wait_procs(processes, timeout=_PATIENCE_S)[1]:
        process.kill()


def _translate(error: DvcException, root: Path) -> Exception:
    """Make DVC's error one of ours, by the deepest cause that says something."""
    causes: list[BaseException] = [error]
    while causes[-1].__cause__ is not None:
        causes.append(causes[-1].__cause__)
    for cause in causes:
        if isinstance(cause, NssError | StageCmdFailedError):
            return cause
        if isinstance(cause, LockError):
            return _busy(str(cause), root)
        if isinstance(cause, NotDvcRepoError):
            return StageError("this is no DVC repository", where=str(root), fix="dvc init")
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
