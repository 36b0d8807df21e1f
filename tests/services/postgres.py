"""An empty PostgreSQL server for tests: `python tests/services/postgres.py` prints its address, runs until stdin ends.

Own data folder, own port, no password, nothing kept. As root it installs PostgreSQL with apt-get if there is none.
Where there can be no server it says why and ends with code 77.
"""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

IMPOSSIBLE = 77
_HOST, _USER = "127.0.0.1", "postgres"
_PATIENCE_S = 60


class ImpossibleError(Exception):
    """There can be no server on this machine."""


def main() -> int:
    """Serve until the end of stdin, Ctrl-C or SIGTERM."""
    signal.signal(signal.SIGTERM, _stop)
    try:
        with running() as url:
            sys.stdout.write(f"{url}\n")
            sys.stdout.flush()
            sys.stdin.read()
    except ImpossibleError as reason:
        sys.stderr.write(f"{reason}\n")
        return IMPOSSIBLE
    except KeyboardInterrupt:
        pass
    return 0


@contextmanager
def running() -> Iterator[str]:
    """Yield the address of a new server without a database's name: postgresql://postgres@127.0.0.1:PORT."""
    programs, owner = _programs(), _owner()
    folder = Path(tempfile.mkdtemp(prefix="nss-postgres-"))
    try:
        if owner:
            os.chown(folder, owner["user"], owner["group"])
        _call([programs / "initdb", "-D", folder / "data", "-U", _USER, "-A", "trust", "-E", "UTF8", "-N"], **owner)
        with socket.socket() as probe:
            probe.bind((_HOST, 0))
            port = probe.getsockname()[1]
        settings = {"listen_addresses": _HOST, "unix_socket_directories": folder, "fsync": "off"}
        options = [word for name, value in settings.items() for word in ("-c", f"{name}={value}")]
        command = [programs / "postgres", "-D", folder / "data", "-p", str(port), *options]
        with (folder / "log").open("wb") as log:
            server = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd="/", **owner)
        try:
            _wait(server, [programs / "pg_isready", "-q", "-h", _HOST, "-p", str(port)], folder / "log")
            yield f"postgresql://{_USER}@{_HOST}:{port}"
        finally:
            # Fast shutdown: connections that are still open are closed.
            server.send_signal(signal.SIGINT)
            server.wait()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _programs() -> Path:
    """Return the folder of initdb and postgres, after installing them if that is possible."""
    found = _installed()
    if found is None:
        if os.geteuid() != 0 or shutil.which("apt-get") is None:
            raise ImpossibleError("PostgreSQL is not installed, and only root can install it, with apt-get")
        environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}

        for arguments in (["update"], ["install", "-y", "--no-install-recommends", "postgresql"]):
            _call(["apt-get", *arguments], env=environment)
        found = _installed()
    if found is None:
        raise ImpossibleError("apt-get installed PostgreSQL, but there is no initdb")
    return found


def _installed() -> Path | None:
    versions = Path("/usr/lib/postgresql").glob("*/bin/initdb")
    newest = max(versions, key=lambda path: float(path.parts[-3]), default=None)
    found = newest or shutil.which("initdb")
    return Path(found).parent if found else None


def _owner() -> dict[str, Any]:
    """Return who is to run the server, as arguments of a process: PostgreSQL refuses to run as root."""
    if os.geteuid() != 0:
        return {}
    try:
        user = pwd.getpwnam(_USER)
    except KeyError:
        raise ImpossibleError(f"there is no user {_USER}, and PostgreSQL refuses to run as root") from None
    return {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}


def _call(command: list[Any], **options: Any) -> None:
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, **{"cwd": "/", **options}
    )
    if done.returncode != 0:
        last = (done.stderr or done.stdout).strip().splitlines()[-1:] or ["no message"]
        raise ImpossibleError(f"{Path(command[0]).name} {command[1]} failed: {last[0]}")


def _wait(server: subprocess.Popen[bytes], question: list[Any], log: Path) -> None:
    deadline = time.monotonic() + _PATIENCE_S
    while subprocess.run(question, check=False).returncode != 0:
        if server.poll() is not None or time.monotonic() > deadline:
            raise ImpossibleError(f"PostgreSQL did not start: {log.read_text(errors='replace')[-500:]}")
        time.sleep(0.05)


def _stop(signum: int, frame: object) -> NoReturn:
    sys.exit(128 + signum)


if __name__ == "__main__":
    sys.exit(main())
