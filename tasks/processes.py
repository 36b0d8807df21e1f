"""Which process began something, and whether it still lives: by host, process id and start time, as ids are reused."""

from __future__ import annotations

import socket
from collections.abc import Iterable

import psutil

_PATIENCE_S = 20


def process_id(pid: int | None = None) -> str:
    """Return host:pid:start of a process, of this one by default. Raises psutil.NoSuchProcess when there is none.

    start: seconds from the machine's start to the process's own, which no correction of the clock changes.

    >>> process_id()  # doctest: +SKIP
    'laptop:4711:8230.15'
    """
    process = psutil.Process(pid)
    return f"{socket.gethostname()}:{process.pid}:{process.create_time() - psutil.boot_time():.2f}"


def is_dead(identity: str) -> bool:
    """Say whether this is a process of this host that has ended. Of other hosts' and of no process's text: no.

    >>> is_dead(process_id())
    False
    """
    host, pid = [*identity.split(":"), ""][:2]
    if host != socket.gethostname() or not pid.isdigit():
        return False
    try:
        return psutil.Process(int(pid)).status() == psutil.STATUS_ZOMBIE or process_id(int(pid)) != identity
    except psutil.NoSuchProcess:
        return True
    except psutil.Error:
        return False


def stop(processes: Iterable[psutil.Process]) -> None:
    """End processes: politely, and after 20 seconds by force."""
    asked = list(processes)
    for process in asked:
        try:
            process.terminate()
        except psutil.NoSuchProcess:
            continue
    for process in psutil.wait_procs(asked, timeout=_PATIENCE_S)[1]:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
