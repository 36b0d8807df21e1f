"""Where a version comes from, and how two versions differ: read from their tags in the registry."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from nss.errors import StageError
from nss.gate import SIZES
from tasks.registry import Registry, Version
from tasks.store_address import shown_uri
from tasks.tracking import Tracker

_CLASS = "class/"


@dataclass(frozen=True)
class Ancestor:
    """One model of a lineage. version is None for a model that was trained in a cycle and never registered.

    model: its digest. verb: the stage that made it. run_url: a link, or the run's id when no server shows runs.
    """

    name: str
    version: int | None
    model: str
    verb: str
    verdict: str
    data_md5: str
    git_sha: str
    is_dirty: bool
    """whether there were changes that no commit holds"""
    run_id: str
    run_url: str
    created: str
    """in UTC; an empty text for what is gone from the registry"""


def find_version(registry: Registry, reference: str) -> Version:
    """Return the version NAME@ALIAS, NAME/NUMBER, or by alias or number alone that of `registry`.

    Raises StageError that says which there are.

    >>> find_version(registry, "digits@champion").number  # doctest: +SKIP
    3
    """
    name, mark, rest = reference.partition("@") if "@" in reference else reference.rpartition("/")
    found = Registry(registry.tracker, name or registry.name)
    # After a slash only numbers, after an @ only aliases; alone, whichever it is.
    is_number = rest.isdecimal() and mark != "@"
    version = found.by_number(int(rest)) if is_number else None if mark == "/" else found.by_alias(rest)
    if version is None:
        raise StageError(
            f"there is no version {reference!r}",
            where=shown_uri(registry.tracker.uri),
            allowed=_allowed(registry, found.name),
        )
    return version


def _allowed(registry: Registry, name: str) -> str:
    client = registry.tracker.client
    names = {each.name: each for each in client.search_registered_models()}
    if name not in names:
        return f"the registered models are {', '.join(names) or 'none: see `nss promote`'}"
    versions = sorted(int(each.version) for each in client.search_model_versions(f"name = '{name}'"))
    aliases = [f"{name}@{alias}" for alias in client.get_registered_model(name).aliases]
    return ", ".join([*aliases, *(f"{name}/{number}" for number in versions)]) or f"{name} has no versions"


def lineage(registry: Registry, version: Version) -> list[Ancestor]:
    """Return the version, what it was made of, and so on back to the first model."""
    found = [_of_version(registry.tracker, version)]
    seen = {(version.name, version.number)}
    while parent := version.tags.get("nss.parent"):
        name, _, number = version.tags.get("nss.parent_version", "").rpartition("/")
        if not name:
            # Registered later than what was made of it, perhaps.
            later = registry.having("nss.model", parent)
            if not later:
                return [*found, _of_run(registry.tracker, parent, version.tags.get("nss.base_run", ""))]
            name, number = later[0].name, str(later[0].number)
        above = Registry(registry.tracker, name).by_number(int(number))
        if above is None or (above.name, above.number) in seen:
            return [*found, Ancestor(name, int(number), parent, "", "", "", "", False, "", "", "")]
        version = above
        seen.add((version.name, version.number))
        found.append(_of_version(registry.tracker, version))
    return found


def _of_version(tracker: Tracker, version: Version) -> Ancestor:
    tags = version.tags
    return Ancestor(
        name=version.name,
        version=version.number,
        model=version.model,
        verb=tags.get("nss.verb", ""),
        verdict=tags.get("nss.verdict", ""),
        created=_time(version.created),
        **_origin(tracker, dict(tags), version.run_id),
    )


def _of_run(tracker: Tracker, model: str, run_id: str) -> Ancestor:
    run = tracker.client.get_run(run_id) if run_id else None
    tags, created = (run.data.tags, _time(run.info.start_time)) if run else ({}, "")
    return Ancestor("", None, model, "base", "", created=created, **_origin(tracker, tags, run_id))


def _origin(tracker: Tracker, tags: dict[str, str], run_id: str) -> dict[str, Any]:
    return {
        "data_md5": tags.get("nss.data_md5", ""),
        "git_sha": tags.get("nss.git_sha", ""),
        "is_dirty": tags.get("nss.git_dirty") == "true",
        "run_id": run_id,
        "run_url": run_link(tracker, run_id),
    }


def run_link(tracker: Tracker, run_id: str) -> str:
    """Return the address of a run on a server, or its id when no server shows it."""
    if not run_id or not tracker.uri.startswith("http"):
        return run_id
    return f"{shown_uri(tracker.uri).rstrip('/')}/#/experiments/{tracker.experiment_id}/runs/{run_id}"


def _time(milliseconds: int) -> str:
    return datetime.fromtimestamp(milliseconds / 1000, UTC).isoformat(timespec="seconds")


@dataclass(frozen=True)
class Difference:
    """One figure of two versions; None where it was not measured."""

    name: str
    first: float | None
    second: float | None

    @property
    def change(self) -> float | None:
        """The second less the first."""
        return None if self.first is None or self.second is None else self.second - self.first


def differences(first: Version | None, second: Version | None) -> dict[str, list[Difference]]:
    """Return the figures of two versions side by side: {"metrics", "classes", "size": differences}.

    >>> differences(old, new)["size"][0]  # doctest: +SKIP
    Difference(name='parameters', first=61000, second=30000)
    """
    before, after = (each.figures if each else {} for each in (first, second))
    found: dict[str, list[Difference]] = {"metrics": [], "classes": [], "size": []}
    for name in {**before, **after}:
        part = "classes" if name.startswith(_CLASS) else "size" if name in SIZES else "metrics"
        found[part].append(Difference(name.removeprefix(_CLASS), before.get(name), after.get(name)))
    return found
