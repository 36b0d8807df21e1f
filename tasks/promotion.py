"""Another champion: aliases in the registry, the pin, its weights in DVC, the ledger, a commit.

No store can change all of these at once. So what is going to be done is written down first, and each step gives the
same result again: whoever comes after a process that was killed does all steps of what is written down.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from nss.errors import StageError
from nss.files import read_json
from tasks.champion import Champion, load_champion, pin_champion, read_champion
from tasks.commits import PIN, commit
from tasks.ledger import append, locked, plan_path, read_ledger
from tasks.pipeline import Pipeline
from tasks.provenance import provenance_tags
from tasks.registry import CANDIDATE, CHAMPION, PREVIOUS, Registry, Version, fetch, version_key
from tasks.store_address import shown_uri
from tasks.tracking import Tracker
from tasks.workspace import Workspace

ROLLED_BACK = "nss.rolled_back"
"""Tag of a version that was champion and taken back: it is not promoted again by itself."""
RESTORED = "restored"
"""What is given as the verb of a champion that was registered again, in another registry than before."""


@dataclass(frozen=True)
class Move:
    """From one champion to another, by numbers of versions, so that doing it twice is doing it once.

    id: of the entry in the ledger. champion: the new one. previous: what a rollback leads back to, None for nothing.
    commit: whether to commit the pin. verdict, reasons: the gate's. forced, reason: by whom the gate was overruled.
    """

    id: str
    kind: Literal["promote", "rollback", "adopt"]
    name: str
    champion: int
    previous: int | None
    commit: bool
    verb: str
    verdict: str
    reasons: tuple[str, ...] = ()
    forced: bool = False
    reason: str = ""
    cycle_run_id: str = ""


def make(workspace: Workspace, tracker: Tracker, move: Move) -> list[str]:
    """Do all of a move; return warnings. Killed at any time, `resume` does what is left.

    Raises StageError when the model cannot be fetched or is another one, and then nothing has changed; BusyError when
    DVC is in use, and what MLflow raises.
    """
    with locked(workspace), _fetched(workspace, tracker, move) as (version, model):
        _write_down(workspace, move)
        return _do(workspace, tracker, move, version, model)


def pending(workspace: Workspace) -> Move | None:
    """Return the move that somebody has begun and not ended."""
    if not plan_path(workspace).exists():
        return None
    content = read_json(plan_path(workspace), StageError)
    return Move(**{**content, "reasons": tuple(content["reasons"])})


def resume(workspace: Workspace, tracker: Tracker) -> tuple[Move | None, list[str]]:
    """End the move that somebody has begun, if there is one; return it, and warnings. Raises what `make` does."""
    with locked(workspace):
        move = pending(workspace)
        if move is None:
            return None, []
        with _fetched(workspace, tracker, move) as (version, model):
            return move, _do(workspace, tracker, move, version, model)


@contextmanager
def _fetched(workspace: Workspace, tracker: Tracker, move: Move) -> Iterator[tuple[Version, Path]]:
    version = Registry(tracker, move.name).by_number(move.champion)
    if version is None:
        raise StageError(
            f"{move.name} version {move.champion} is not in the registry any more",
            where=shown_uri(tracker.uri),
            fix=f"remove {plan_path(workspace)}, if it is there, to give up this {move.kind}",
        )
    with tempfile.TemporaryDirectory(prefix="nss-") as folder:
        yield version, fetch(tracker, version.source, version.model, Path(folder), workspace.packages)


def _do(workspace: Workspace, tracker: Tracker, move: Move, version: Version, model: Path) -> list[str]:
    for step in _steps(workspace, Registry(tracker, move.name), move, version, model):
        step()
    problem = commit(workspace, _message(move), PIN) if move.commit else ""
    plan_path(workspace).unlink()
    return [problem] if problem else []


def _steps(
    workspace: Workspace, registry: Registry, move: Move, version: Version, model: Path
) -> tuple[Callable[[], None], ...]:
    return (
        lambda: registry.set_alias(PREVIOUS, move.previous),
        lambda: registry.set_alias(CHAMPION, move.champion),
        lambda: _clear_candidate(registry, move.champion),
        lambda: _mark(registry, move),
        lambda: _pin(workspace, version, model),
        lambda: version_champion(workspace),
        lambda: _enter(workspace, move, version),
    )


def _clear_candidate(registry: Registry, champion: int) -> None:
    candidate = registry.by_alias(CANDIDATE)
    if candidate and candidate.number == champion:
        registry.set_alias(CANDIDATE, None)


def _mark(registry: Registry, move: Move) -> None:
    registry.tag(move.champion, ROLLED_BACK, "")
    if move.kind == "rollback" and move.previous is not None:
        registry.tag(move.previous, ROLLED_BACK, move.reason or "yes")


def _pin(workspace: Workspace, version: Version, model: Path) -> None:
    pin_champion(workspace, Champion(version.name, version.number, version.model, version.batches), model)


def version_champion(workspace: Workspace) -> None:
    """Commit champion/ as it is to champion.dvc. Raises BusyError when DVC is in use."""
    Pipeline(workspace).add(workspace.champion)


def _enter(workspace: Workspace, move: Move, version: Version) -> None:
    if any(entry.get("id") == move.id for entry in read_ledger(workspace)):
        return
    content = asdict(move)
    for name in ("kind", "commit", "champion"):
        del content[name]
    append(workspace, move.kind, {**content, "version": move.champion, "model": version.model, **origin(workspace)})


def origin(workspace: Workspace) -> dict[str, str]:
    """Return what an entry of the ledger says about where it was made."""
    tags = provenance_tags(workspace)
    return {"data_md5": tags["nss.data_md5"], "git_sha": tags["nss.git_sha"]}


def _message(move: Move) -> str:
    title = f"Champion: {move.name} version {move.champion} ({move.verb})"
    return f"Champion: back to {move.name} version {move.champion}" if move.kind == "rollback" else title


def _write_down(workspace: Workspace, move: Move) -> None:
    plan = plan_path(workspace)
    # Always the same temporary name: a process that is killed leaves no heap of them.
    part = plan.with_suffix(".part")
    with part.open("w", encoding="utf-8") as file:
        json.dump(asdict(move), file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, plan)


def maintained(workspace: Workspace, registry: Registry) -> Version | None:
    """Return the registered version that is maintained: the pinned one, or else the champion by alias.

    The pin goes first: who pins by hand, or checks out an older commit, means it.
    """
    pin = read_champion(workspace)
    found = _version_of(registry, pin) if pin and pin.name == registry.name else None
    return found or registry.by_alias(CHAMPION)


def _version_of(registry: Registry, pin: Champion) -> Version | None:
    """Return the version that is pinned; another registry than the one that it was pinned from may number it anew."""
    found = registry.by_number(pin.version)
    if found and found.model == pin.model:
        return found
    same = [each for each in registry.having("nss.model", pin.model) if sorted(each.batches) == sorted(pin.batches)]
    return same[-1] if same else None


def restore(workspace: Workspace, registry: Registry) -> None:
    """Register the pinned champion where the registry does not have it: it is new, or the one of another machine.

    Without this nothing would lead back to that champion after the next promotion. It gets the next free number there,
    and the alias unless another version has it. Raises StageError when champion/ is missing or another model.
    """
    pin = read_champion(workspace)
    if pin is None or pin.name != registry.name:
        return
    version = _version_of(registry, pin) or _register_again(workspace, registry, pin)
    if registry.by_alias(CHAMPION) is None:
        registry.set_alias(CHAMPION, version.number)


def _register_again(workspace: Workspace, registry: Registry, pin: Champion) -> Version:
    load_champion(workspace, pin)
    tracker, key, origin = registry.tracker, version_key(pin.model, list(pin.batches), {}), f"{pin.name}/{pin.version}"
    tags = {"nss.model": pin.model, "nss.source": f"champion/, pinned as {origin}"}
    run_id = tracker.open(RESTORED, {"kind": RESTORED, "key": key}, tags).info.run_id
    model_id = tracker.log_model(run_id, "champion", workspace.champion, {"pinned_as": origin})
    tracker.end(run_id, "FINISHED")
    known = {"nss.verb": RESTORED, "nss.pinned_as": origin, "nss.batches": json.dumps(pin.batches)}
    return registry.add(key, run_id, model_id, {**tags, **known})


def place_of(workspace: Workspace, registry: Registry, version: Version) -> tuple[Version | None, Version | None]:
    """Return what is maintained before `version` is, and what a rollback is to lead back to then.

    A pinned champion must be registered: `restore`.
    """
    was = maintained(workspace, registry)
    # Unpinned by hand it may be the champion by alias already: what was before it stays what was before it.
    return was, registry.by_alias(PREVIOUS) if was and was.number == version.number else was
