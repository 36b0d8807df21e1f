"""The commands of the unattended service: watch, serve, status."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import threading
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from flows.watch import Trigger, Watcher, Watching
    from tasks.workspace import Workspace

_MISTAKE = 2

Inbox = Annotated[Path | None, typer.Option("--inbox", help="The folder to watch; default: inbox/ of the repository.")]
Poll = Annotated[float, typer.Option(min=0.1, help="Seconds between two looks.")]
Settle = Annotated[float, typer.Option(min=0, help="Seconds for which an entry must not have changed.")]
NewClasses = Annotated[bool, typer.Option("--new-classes", help="Allow classes the data set lacks.")]
Resize = Annotated[str, typer.Option(help="HEIGHTxWIDTH to scale images of another size to.")]
Retries = Annotated[int, typer.Option(min=0, max=10, help="How often a failing stage is tried again.")]
Name = Annotated[str, typer.Option("--name", help="Of the deployment; default: the repository's folder.")]


def add_commands(app: typer.Typer) -> None:
    """Add the commands to `nss`."""
    app.command(epilog="Examples:  nss watch   |   nss watch --once --inbox /srv/upload --new-classes")(watch)
    app.command(epilog='Examples:  nss serve   |   nss serve --cron "0 3 * * *" --timezone Europe/Berlin')(serve)
    app.command(epilog="Examples:  nss status   |   nss status --json | jq .verdict")(status)


def watch(
    once: Annotated[bool, typer.Option("--once", help="Look once, then end; 2 when something was refused.")] = False,
    inbox: Inbox = None,
    poll: Poll = 5,
    settle: Settle = 5,
    new_classes: NewClasses = False,
    resize: Resize = "",
    retries: Retries = 0,
    name: Name = "",
) -> None:
    """Take what settles in the inbox, and run a cycle for each new version of the data.

    With PREFECT_API_URL the cycles are runs of the deployment that `nss serve` or `prefect deploy` made.
    """
    _quieten()
    from flows.watch import Watcher
    from tasks.workspace import find_workspace

    workspace = find_workspace()
    watching = _watching(workspace, inbox, poll, settle, new_classes, resize)
    watcher = Watcher(workspace, watching, _trigger(workspace, name, retries), _tell)
    with _cut_off_by_sigterm():
        if once:
            taken = watcher.once()
            raise typer.Exit(_MISTAKE if taken and taken.refused else 0)
        _watch(watcher)


def serve(
    cron: Annotated[str, typer.Option(help='When to run anyway, for example "0 3 * * *".')] = "",
    timezone: Annotated[str, typer.Option(help="Of the cron, for example Europe/Berlin.")] = "UTC",
    inbox: Inbox = None,
    poll: Poll = 5,
    settle: Settle = 5,
    new_classes: NewClasses = False,
    resize: Resize = "",
    retries: Retries = 0,
    name: Name = "",
) -> None:
    """Serve the cycle on a Prefect server: by the clock, by events, and for what arrives in the inbox."""
    _quieten()
    from flows.deployment import require_name, require_server
    from tasks.workspace import find_workspace

    workspace = find_workspace()
    require_server("nss serve")
    require_name(name or workspace.root.name)
    from flows.serve import Serving
    from flows.serve import serve as serve_until_stopped

    watching = _watching(workspace, inbox, poll, settle, new_classes, resize)
    serving = Serving(name or workspace.root.name, watching, cron, timezone, retries)
    serve_until_stopped(workspace, serving, _tell)


def status(
    inbox: Inbox = None,
    name: Name = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")] = False,
) -> None:
    """Show champion, data, last cycle, verdict, what waits in the inbox and what runs."""
    from flows import status as module
    from flows.deployment import require_name
    from tasks.workspace import find_workspace

    workspace = find_workspace()
    if name:
        require_name(name)
    content = module.status(workspace, _inbox(workspace, inbox), name or workspace.root.name)
    sys.stdout.write(f"{json.dumps(content, indent=1) if as_json else module.text(content)}\n")


def announce(workspace: Workspace, name: str = "") -> None:
    """Tell a Prefect server, where one is named and knows the workspace, that data has arrived: a run is wanted."""
    from flows.deployment import WANTED, Deployment, has_server, is_name

    if not has_server():
        return
    from flows.watch import version_of
    from nss.errors import NssError
    from tasks.provenance import data_md5

    deployment = Deployment(name or workspace.root.name, workspace.root)
    try:
        # By a name that no deployment has none is known.
        if is_name(deployment.name) and deployment.find():
            deployment.emit(version_of(workspace, data_md5(workspace)), WANTED)
    except NssError as error:
        sys.stderr.write(f"warning: {error.what}; a watcher finds the new data without the event\n  fix: {error.fix}\n")


def size_of(text: str) -> tuple[int, int] | None:
    """Read what --resize takes. Raises typer.BadParameter for what is no size."""
    if not text:
        return None
    height, _, width = text.partition("x")
    if not all(re.fullmatch("[1-9][0-9]{0,5}", side) for side in (height, width)):
        raise typer.BadParameter(
            f"{text!r} is no size; allowed: HEIGHTxWIDTH, for example 32x32", param_hint="--resize"
        )
    return int(height), int(width)


def lines_of(path: Path) -> list[str]:
    """Read what --classes takes: the lines that are not empty. Raises typer.BadParameter for a file that is no text."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as problem:
        raise typer.BadParameter(f"{path} cannot be read as text ({problem})", param_hint="--classes") from None
    return [unicodedata.normalize("NFC", line.strip()) for line in lines if line.strip()]


def _quieten() -> None:
    os.environ.setdefault("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "ERROR")
    os.environ.setdefault("PREFECT_RUNNER_POLL_FREQUENCY", "2")


def _watch(watcher: Watcher) -> None:
    """Watch until stopped by SIGTERM, after which nothing begins, or by Ctrl-C."""
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    watcher.tell(f"watching {watcher.watching.inbox}")
    with suppress(KeyboardInterrupt):
        watcher.run(stop)
    watcher.tell("stopped")


@contextmanager
def _cut_off_by_sigterm() -> Iterator[None]:
    """Die by SIGTERM, as `nss run` does, when it has ended a cycle."""
    from prefect.exceptions import TerminationSignal

    from flows.watch import undisturbed

    try:
        yield
    except TerminationSignal:
        # A full disk under the log must not change how the process ends.
        undisturbed(_tell)("stopped")
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGTERM)


def _trigger(workspace: Workspace, name: str, retries: int) -> Trigger:
    from flows.deployment import Deployment, has_server, require_name
    from flows.watch import Here, There

    if has_server():
        require_name(name or workspace.root.name)
        return There(workspace, Deployment(name or workspace.root.name, workspace.root), _tell)
    return Here(workspace, retries, _tell)


def _watching(
    workspace: Workspace, inbox: Path | None, poll: float, settle: float, new_classes: bool, resize: str
) -> Watching:
    from flows.watch import Watching
    from nss.errors import DataError

    folder = _inbox(workspace, inbox)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        raise DataError(
            f"the inbox cannot be made ({problem.strerror})",
            where=str(folder),
            fix="name a folder that you may write to with --inbox",
        ) from None
    return Watching(folder, poll, settle, new_classes, size_of(resize))


def _inbox(workspace: Workspace, inbox: Path | None) -> Path:
    from nss.errors import DataError, first_line

    if inbox is None:
        return workspace.root / "inbox"
    try:
        return inbox.expanduser().resolve()
    except RuntimeError as problem:
        raise DataError(
            f"the inbox cannot be found ({first_line(problem).rstrip('.')})",
            where=str(inbox),
            fix="name a folder with --inbox",
        ) from None


def _tell(line: str) -> None:
    sys.stdout.write(f"{datetime.now():%Y-%m-%d %H:%M:%S} {line}\n")
    sys.stdout.flush()
