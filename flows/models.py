"""Versions of the model for people: what a promotion or rollback changed, lineage, comparison; as text and as JSON."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from tasks.lineage import Ancestor, Difference, differences
from tasks.params import Params, load_params
from tasks.register import Registered
from tasks.registry import Registry, Version, store_errors
from tasks.store_address import tracking_uri
from tasks.tracking import Tracker, open_tracker
from tasks.workspace import Workspace, find_workspace, with_packages


@dataclass(frozen=True)
class Session:
    """What the commands work with."""

    workspace: Workspace
    params: Params
    tracker: Tracker

    @property
    def registry(self) -> Registry:
        """The registered model that params.yaml names."""
        return Registry(self.tracker, self.params.register.name)


@contextmanager
def session() -> Iterator[Session]:
    """Open the workspace of the current folder and its tracking store.

    Raises StageError when the store does not answer, and what the workspace raises.
    """
    workspace = find_workspace()
    params = load_params(workspace.params)
    workspace = with_packages(workspace, params.base.packages)
    with store_errors(tracking_uri(workspace)):
        yield Session(workspace, params, open_tracker(workspace))


def moved(done: Registered) -> dict[str, Any]:
    """What a promotion or a rollback changed, ready for JSON."""
    return {
        "name": done.version and done.version.name,
        "version": done.version and done.version.number,
        "was": done.was and done.was.number,
        "verb": done.verb,
        **_plain(differences(done.was, done.version)),
        "warnings": list(done.warnings),
    }


def moved_text(done: Registered) -> str:
    """The same as lines."""
    assert done.version is not None
    was = f", in place of version {done.was.number}" if done.was and done.was.number != done.version.number else ""
    lines = [f"the champion is {done.version.label} ({done.verb}){was}", f"model {done.version.model}"]
    if was:
        lines += _table(differences(done.was, done.version), f"version {done.was.number}", "now") if done.was else []
    lines += [f"warning: {each}" for each in done.warnings]
    lines += ["`nss run` goes on from it; commit champion.json and champion.dvc, and `dvc push` the weights"]
    return "\n".join(lines)


def compared(first: Version, second: Version) -> dict[str, Any]:
    """Two versions side by side, ready for JSON."""
    sides = [
        {"name": each.name, "version": each.number, "verb": each.tags.get("nss.verb", ""), "model": each.model}
        for each in (first, second)
    ]
    return {"first": sides[0], "second": sides[1], **_plain(differences(first, second))}


def compared_text(first: Version, second: Version) -> str:
    """The same as a table."""
    sides = [f"{each.name}/{each.number}" for each in (first, second)]
    return "\n".join(_table(differences(first, second), *sides))


def lineage_text(ancestors: Sequence[Ancestor]) -> str:
    """The newest first, each with what made it."""
    return "\n".join(line for each in ancestors for line in _ancestor(each))


def lineage_json(ancestors: Sequence[Ancestor]) -> list[dict[str, Any]]:
    """The same, ready for JSON."""
    return [asdict(each) for each in ancestors]


def _ancestor(each: Ancestor) -> list[str]:
    title = f"{each.name} version {each.version}" if each.version else "not registered"
    if not each.created:
        return [title, f"  model    {each.model}", "  nothing more is known of it"]
    verdict = f", {each.verdict}" if each.verdict else ""
    dirty = " and changes without a commit" if each.is_dirty else ""
    return [
        f"{title}: {each.verb}{verdict}, {each.created}",
        f"  model    {each.model}",
        f"  data     {each.data_md5}",
        f"  commit   {each.git_sha}{dirty}",
        f"  run      {each.run_url}",
    ]


def _plain(found: dict[str, list[Difference]]) -> dict[str, Any]:
    return {
        part: {each.name: {"first": each.first, "second": each.second, "change": each.change} for each in rows}
        for part, rows in found.items()
    }


def _table(found: dict[str, list[Difference]], first: str, second: str) -> list[str]:
    rows: list[tuple[str, ...]] = [("", first, second, "change")]
    for part, differing in found.items():
        rows += [(part, "", "", "")] if differing else []
        rows += [(f"  {each.name}", *map(_number, (each.first, each.second, each.change))) for each in differing]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    return [
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        ).rstrip()
        for row in rows
    ]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
