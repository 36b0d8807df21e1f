"""What processes that died left behind: runs that never ended, stages that nobody waits for, half-written files.

All of it is told by the identity of the process that began it (tasks/processes.py). What belongs to a living process or
to another host stays as it is, so any number of processes may recover at the same time.
"""

from __future__ import annotations

import os
import shutil
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import httpx
import psutil
from filelock import FileLock, Timeout
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterState, FlowRunFilterStateType
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.context import FlowRunContext, TagsContext
from prefect.settings import PREFECT_API_URL
from prefect.states import Crashed

from nss.errors import NssError
from nss.files import owner_of, read_json
from tasks.pipeline import OWNER, Pipeline
from tasks.processes import is_dead, process_id, stop
from tasks.provenance import DATA_MD5, PROCESS, data_md5
from tasks.sweep import swept
from tasks.warm import is_warm
from tasks.workspace import Workspace

DATA = f"{DATA_MD5}="
"""How the tag of a Prefect run begins that names the version of data/ which it works on."""

_PREFIX = f"{PROCESS}="
# Who gets the children of a process that died, beside process 1.
_ADOPTERS = ("systemd", "init")
_AGE_S = 3600


def recover(workspace: Workspace) -> list[str]:
    """Put in order what dead processes of this host left behind in the workspace; return a line for each thing done.

    Stages without a parent are ended, MLflow runs become KILLED, Prefect runs Crashed, temporary files are removed, and
    so are batches that `nss data add` was killed over. A store or server that does not answer is left for next time;
    what else goes wrong is a line too, and ends nothing. Inside a flow, its run is marked, so that it can be told when
    this process is the one that died, and which version of data/ it works on.

    >>> recover(find_workspace())  # doctest: +SKIP
    ['MLflow run 0b5e... (base) of a process that has died: KILLED']
    """
    # MLflow's client takes seconds to import: who has another process for that calls the two apart.
    from tasks.recovery_runs import end_runs

    return [*recover_here(workspace), *end_runs(workspace)]


def recover_here(workspace: Workspace) -> list[str]:
    """Do all of `recover` but for MLflow's runs."""
    return [line for what, sweep in _SWEEPS.items() for line in swept(what, sweep, workspace, away=httpx.HTTPError)]


def process_mark() -> str:
    """Return the tag by which Prefect's runs name this process.

    >>> with prefect.tags(process_mark()):  # doctest: +SKIP
    ...     maintain(root)
    """
    return f"{_PREFIX}{process_id()}"


def unmarked() -> TagsContext:
    """Return the block in which tasks do not take over our tags from their flow.

    Prefect asks its server for a place for each task that has tags, which takes two seconds when the server's database
    is busy for a moment.

    >>> with prefect.tags("nss.process=me", "mine"), unmarked():
    ...     sorted(TagsContext.get().current_tags)
    ['mine']
    """
    kept = {tag for tag in TagsContext.get().current_tags if not tag.startswith((_PREFIX, DATA))}
    return TagsContext(current_tags=kept)


def _end_orphans(workspace: Workspace) -> list[str]:
    orphans = [process for process in psutil.process_iter() if _is_orphan(process, workspace.root.resolve())]
    stop(orphans)
    processes = f"process{'es' if len(orphans) > 1 else ''} {', '.join(str(process.pid) for process in orphans)}"
    return [f"stage that worked on without its parent, {processes}: ended"] if orphans else []


def _is_orphan(process: psutil.Process, root: Path) -> bool:
    """Say whether this is `nss stage ...` in the workspace, or works for it, begun by a process that has died."""
    try:
        if not _is_stage(process.cmdline()):
            return False
        env = process.environ()
        if Path(process.cwd()) != root or process.pid == os.getpid():
            return False
        if owner := env.get(OWNER):
            return is_dead(owner)
        # Begun by `dvc repro`, which leaves no more than its own variable.
        return "DVC_STAGE" in env and _is_adopted(process)
    except (psutil.Error, OSError):
        return False


def _is_stage(command: Sequence[str]) -> bool:
    return is_warm(command) or (command[-2:-1] == ["stage"] and "nss" in [Path(word).name for word in command])


def _is_adopted(process: psutil.Process) -> bool:
    parents = process.parents()
    while parents and "stage" in " ".join(parents[0].cmdline()) and parents[0].name() in ("sh", "dash", "bash", "zsh"):
        parents = parents[1:]
    if not parents:
        return True
    is_adopter = parents[0].pid == 1 or parents[0].name() in _ADOPTERS
    return is_adopter and "dvc" not in " ".join(parents[0].cmdline())


def _remove_leftovers(workspace: Workspace) -> list[str]:
    """Remove the temporary folders of `nss.files.replacing`, bringing back what one had put aside."""
    lines = []
    for folder in _temporary_folders(workspace):
        name, host, pid = owner_of(folder) or ("", "", 0)
        if host == socket.gethostname() and _is_gone(pid, folder):
            what = f"temporary files of process {pid}, which has died, {folder.relative_to(workspace.root)}"
            lines.append(f"{what}: {_remove(folder, name)}")
    return lines


def _remove(folder: Path, name: str) -> str:
    """Say what became of a temporary folder: one that cannot be removed keeps no other one from it."""
    before, target = folder / "before", folder.parent / name
    try:
        if before.exists() and not target.exists():
            os.rename(before, target)
        shutil.rmtree(folder)
    except FileNotFoundError:
        # Somebody else recovers too.
        return "removed"
    except OSError as error:
        return f"cannot be removed ({error.strerror})"
    return "removed"


def _temporary_folders(workspace: Workspace) -> Iterator[Path]:
    flat = (workspace.root, workspace.store, workspace.data, workspace.data / "batches")
    deep = [folder for folder, _, _ in os.walk(workspace.root / "artifacts")]
    for folder in dict.fromkeys([*flat, *map(Path, deep)]):
        yield from [path for path in folder.glob(".*.*") if owner_of(path) and path.is_dir()]


def _is_gone(pid: int, folder: Path) -> bool:
    """Say whether the process that made this folder has died. One that began later has only got its number."""
    try:
        process = psutil.Process(pid)
        return bool(process.status() == psutil.STATUS_ZOMBIE or process.create_time() > folder.stat().st_ctime + 60)
    except psutil.NoSuchProcess:
        return True
    except (psutil.Error, OSError):
        return False


def _remove_half_batches(workspace: Workspace) -> list[str]:
    """Remove batches that dataset.json does not name: whoever wrote them never came to naming them."""
    folder = workspace.data / "batches"
    if not folder.is_dir():
        return []
    try:
        with FileLock(workspace.root / ".data.lock", timeout=0):
            named = set(read_json(workspace.data / "dataset.json")["batches"])
            half = [path for path in folder.glob("*.safetensors") if path.stem not in named]
            for path in half:
                path.unlink()
    except (NssError, Timeout, KeyError, TypeError):
        # Somebody adds, or nobody can tell which batches are named: a cycle says what is wrong with data/.
        return []
    return [f"batch that was never finished, data/batches/{path.name}: removed" for path in half]


def _remove_half_copies(workspace: Workspace) -> list[str]:
    """Remove what DVC had begun to copy into its cache; that bears no owner's name, so only what is an hour old."""
    lines = []
    for path in (workspace.root / ".dvc" / "cache" / "files" / "md5").glob("??/.*.tmp"):
        try:
            if time.time() - path.stat().st_mtime > _AGE_S:
                path.unlink()
                lines.append(f"half a copy in DVC's cache, {path.relative_to(workspace.root)}: removed")
        except FileNotFoundError:
            continue
    return lines


def _remove_broken_files(workspace: Workspace) -> list[str]:
    try:
        return [f"{name}, which was cut off: removed" for name in Pipeline(workspace).drop_broken_files()]
    except NssError:
        return []


def _crash_flow_runs(workspace: Workspace) -> list[str]:
    if not PREFECT_API_URL.value():
        return []
    with get_client(sync_client=True) as client:
        _mark_own(client, workspace)
        return crash_dead(client, _active(client))


def crash_dead(client: SyncPrefectClient, runs: Iterable[FlowRun]) -> list[str]:
    """Make those runs Crashed whose process on this host has died: they hold nobody's place. Return a line for each.

    >>> crash_dead(client, client.read_flow_runs())  # doctest: +SKIP
    ['Prefect run 0b5e... (maintain) of a process that has died: Crashed']
    """
    dead = [run for run in runs if any(is_dead(mark) for mark in _marks(run))]
    for run in dead:
        client.set_flow_run_state(run.id, Crashed(message="its process has died"), force=True)
    return [f"Prefect run {run.id} ({run.name}) of a process that has died: Crashed" for run in dead]


def _mark_own(client: SyncPrefectClient, workspace: Workspace) -> None:
    context = FlowRunContext.get()
    if context and context.flow_run:
        tags = set(client.read_flow_run(context.flow_run.id).tags)
        kept = {tag for tag in tags if not tag.startswith((_PREFIX, DATA))}
        own = {process_mark(), f"{DATA}{data_md5(workspace)}"}
        client.update_flow_run(context.flow_run.id, tags=sorted(kept | own))


def _active(client: SyncPrefectClient) -> list[FlowRun]:
    kind = FlowRunFilterStateType(any_=[StateType.RUNNING, StateType.CANCELLING])
    return client.read_flow_runs(flow_run_filter=FlowRunFilter(state=FlowRunFilterState(type=kind)))


def _marks(run: FlowRun) -> Iterator[str]:
    return (tag.removeprefix(_PREFIX) for tag in run.tags if tag.startswith(_PREFIX))


_SWEEPS: dict[str, Callable[[Workspace], list[str]]] = {
    # First: until its run is marked, nobody could tell that this process is the one that died.
    "Prefect runs": _crash_flow_runs,
    "stages without a parent": _end_orphans,
    "temporary files": _remove_leftovers,
    "batches that were never finished": _remove_half_batches,
    "half copies in DVC's cache": _remove_half_copies,
    "files of DVC that were cut off": _remove_broken_files,
}
