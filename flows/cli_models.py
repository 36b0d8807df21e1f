"""The commands about versions of the model: promote, rollback, lineage, compare."""

from __future__ import annotations

import json
import sys
from typing import Annotated, Any

import typer

_Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]
_Version = "NAME@ALIAS or NAME/NUMBER; without NAME, of the model that params.yaml names."


def add_commands(app: typer.Typer) -> None:
    """Add the commands to `nss`."""
    app.command(epilog='Examples:  nss promote   |   nss promote readapt --force --reason "the old lamp is gone"')(
        promote
    )
    app.command(epilog='Examples:  nss rollback   |   nss rollback --reason "complaints about class 8"')(rollback)
    app.command(epilog="Examples:  nss lineage   |   nss lineage digits/3 --json")(lineage)
    app.command(epilog="Examples:  nss compare previous champion   |   nss compare digits/2 digits/5")(compare)


def promote(
    verb: Annotated[
        str, typer.Argument(help="restructure, readapt, extend or base; default: what the gate promotes.")
    ] = "",
    force: Annotated[bool, typer.Option("--force", help="Also when the gate holds or rejects it.")] = False,
    reason: Annotated[str, typer.Option(help="Why; the ledger keeps it.")] = "",
    as_json: _Json = False,
) -> None:
    """Make a candidate of the last cycle the champion, from which the next cycle starts."""
    if force and not reason.strip():
        raise typer.BadParameter("--force needs a --reason: the ledger keeps it", param_hint="--reason")
    from flows import models
    from tasks import register
    from tasks.lock import exclusive

    with models.session() as now, exclusive(now.workspace):
        done = register.promote(
            now.workspace, now.params, now.tracker, verb or None, forced=force, reason=reason.strip()
        )
    _print(models.moved(done) if as_json else models.moved_text(done))


def rollback(
    reason: Annotated[str, typer.Option(help="Why; the ledger keeps it.")] = "", as_json: _Json = False
) -> None:
    """Make the previous champion the champion again, and this one the previous."""
    from flows import models
    from tasks import register
    from tasks.lock import exclusive

    with models.session() as now, exclusive(now.workspace):
        done = register.rollback(now.workspace, now.params, now.tracker, reason.strip())
    _print(models.moved(done) if as_json else models.moved_text(done))


def lineage(
    version: Annotated[str, typer.Argument(help=_Version)] = "champion",
    as_json: _Json = False,
) -> None:
    """Show which data, commit and run a version comes from, and its parents back to the first model."""
    from flows import models
    from tasks.lineage import find_version
    from tasks.lineage import lineage as trace

    with models.session() as now:
        found = trace(now.registry, find_version(now.registry, version))
    _print(models.lineage_json(found) if as_json else models.lineage_text(found))


def compare(
    first: Annotated[str, typer.Argument(help=_Version)],
    second: Annotated[str, typer.Argument(help=_Version)],
    as_json: _Json = False,
) -> None:
    """Show the figures of two versions side by side: metrics, accuracy of each class, size."""
    from flows import models
    from tasks.lineage import find_version

    with models.session() as now:
        pair = [find_version(now.registry, each) for each in (first, second)]
    _print(models.compared(*pair) if as_json else models.compared_text(*pair))


def _print(content: Any) -> None:
    text = content if isinstance(content, str) else json.dumps(content, indent=1, ensure_ascii=False)
    sys.stdout.write(f"{text}\n")
