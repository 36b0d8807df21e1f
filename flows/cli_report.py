"""The command report: one page about the last cycle."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer


def add_commands(app: typer.Typer) -> None:
    """Add the command to `nss`."""
    app.command(epilog="Examples:  nss report   |   nss report --out cycle.html   |   nss report --json | jq .path")(
        report
    )


def report(
    out: Annotated[
        Path | None, typer.Option(help="The file; default: report/index.html.", show_default=False, dir_okay=False)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")] = False,
) -> None:
    """Write a page about the last cycle: what changed, the verdict and why, classes, slices, size, lineage.

    It is one file that needs no network.
    """
    from nss.errors import StageError
    from tasks.report import write_report
    from tasks.workspace import find_workspace

    try:
        path, facts = write_report(find_workspace(), out)
    except OSError as error:
        raise StageError(
            f"the page cannot be written ({error.strerror})",
            where=str(out or error.filename or ""),
            fix="name a file in a folder that you may write to with --out",
        ) from error
    size = path.stat().st_size
    if as_json:
        content = {"path": str(path.resolve()), "bytes": size, "verdict": facts.verdict, "promoted": facts.promoted}
        sys.stdout.write(f"{json.dumps(content, indent=1)}\n")
    else:
        sys.stdout.write(f"{facts.verdict}: {facts.promoted or 'nothing'} is promoted\nsee {path} ({size:,} bytes)\n")
