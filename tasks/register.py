"""After the gate: keep its decision, register what it promotes, and make that the champion.

No DVC stage, since its effects are outside: in the ledger, in MLflow's registry, in the pin.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from nss.errors import StageError
from nss.files import read_json, text_digest
from tasks import journal
from tasks.champion import is_about_the_champion, read_champion
from tasks.commits import CYCLE, commit
from tasks.ledger import append, locked, read_ledger
from tasks.params import Params
from tasks.pipeline import Pipeline
from tasks.promotion import ROLLED_BACK, Move, maintained, make, origin, place_of, restore, resume
from tasks.provenance import provenance_tags
from tasks.registry import CANDIDATE, PREVIOUS, Registry, Version, figure_tags, version_key
from tasks.store_address import shown_uri
from tasks.tracking import Tracker
from tasks.workspace import Workspace

Outcome = Literal["promoted", "candidate", "kept", "outdated"]
"""A new champion; a version that waits for `nss promote`; the champion stays; the decision is about another champion
than the one that is pinned now."""


@dataclass(frozen=True)
class Gate:
    """What the stage `gate` left on disk.

    candidates: {verb: model, parent, batches, figures, verdict, reasons}. digest: of the whole decision.
    """

    verdict: str
    promoted: str | None
    candidates: Mapping[str, Mapping[str, Any]]
    digest: str


@dataclass(frozen=True)
class Registered:
    """What came of a decision.

    verb: whose model was registered. version: its version. was: the champion before. warnings: what went wrong beside.
    """

    verdict: str
    outcome: Outcome
    verb: str | None = None
    version: Version | None = None
    was: Version | None = None
    warnings: tuple[str, ...] = ()


def read_gate(workspace: Workspace) -> Gate:
    """Return the decision in artifacts/gate. Raises StageError when there is none.

    >>> read_gate(find_workspace()).promoted  # doctest: +SKIP
    'extend'
    """
    path = workspace.out("gate") / "gate.json"
    if not path.is_file():
        raise StageError("the gate has not decided anything yet", where=str(path), fix="nss run")
    content = read_json(path, StageError)
    judged = {
        each["verb"]: {"verdict": each["verdict"], "reasons": [reason["text"] for reason in each["reasons"]]}
        for each in content["judgements"]
    }
    candidates = {verb: {**each, **judged[verb]} for verb, each in content["candidates"].items()}
    return Gate(content["verdict"], content["promoted"], candidates, text_digest(json.dumps(content)))


def record(workspace: Workspace, cycle_run_id: str) -> Gate:
    """Enter the decision in the ledger, unless it was entered before and no other has been since; return it."""
    gate = read_gate(workspace)
    with locked(workspace):
        entered = [entry for entry in read_ledger(workspace) if entry["kind"] == "gate"]
        if not entered or entered[-1]["id"] != gate.digest:
            append(workspace, "gate", _entry(workspace, gate, cycle_run_id))
    return gate


def _entry(workspace: Workspace, gate: Gate, cycle_run_id: str) -> dict[str, Any]:
    said = {
        verb: {name: each[name] for name in ("verdict", "model", "reasons")} for verb, each in gate.candidates.items()
    }
    model = gate.candidates[gate.promoted]["model"] if gate.promoted else None
    content = {"id": gate.digest, "verdict": gate.verdict, "verb": gate.promoted, "model": model, "version": None}
    return {**content, "reasons": said, "cycle_run_id": cycle_run_id, **origin(workspace)}


def commit_cycle(workspace: Workspace, params: Params) -> list[str]:
    """Commit data.dvc and dvc.lock when register.commit asks for it; return warnings. Before the pin changes."""
    if not params.register.commit:
        return []
    problem = commit(workspace, f"Cycle on the data {origin(workspace)['data_md5'][:8]}", CYCLE)
    return [problem] if problem else []


def register(workspace: Workspace, params: Params, tracker: Tracker, cycle_run_id: str) -> Registered:
    """Register what the gate promotes; with register.promote auto it is the champion then, else the candidate.

    Doing it again, after whatever end, changes nothing that is done already. Raises what `tasks.promotion.make` does.
    """
    with locked(workspace):
        _, warnings = resume(workspace, tracker)
        gate = read_gate(workspace)
        if gate.promoted is None:
            return Registered(gate.verdict, "kept", warnings=tuple(warnings))
        if not is_about_the_champion(workspace):
            return Registered(gate.verdict, "outdated", warnings=tuple(warnings))
        version = add_version(workspace, params, tracker, gate, gate.promoted)
        if params.register.promote == "auto" and not version.tags.get(ROLLED_BACK):
            return move_to(workspace, params, tracker, gate, version, cycle_run_id=cycle_run_id)
        Registry(tracker, version.name).set_alias(CANDIDATE, version.number)
        return Registered(gate.verdict, "candidate", gate.promoted, version, warnings=tuple(warnings))


def add_version(workspace: Workspace, params: Params, tracker: Tracker, gate: Gate, verb: str) -> Version:
    """Return the version of a candidate, registered with where it comes from when it is not yet.

    The champion goes first, where the registry does not have it: what was made of it names it.
    """
    registry = Registry(tracker, params.register.name)
    restore(workspace, registry)
    each, pipeline = gate.candidates[verb], Pipeline(workspace)
    figures = {**each["figures"], **_per_class(workspace, verb)}
    key = version_key(each["model"], each["batches"], figures)
    with pipeline.kept():
        stage_key, base_key = pipeline.stage_key(verb), pipeline.stage_key("base")
    run_id = journal.backfill(tracker, workspace, params, verb, stage_key, None)
    outputs = tracker.client.get_run(run_id).outputs
    if not (outputs and outputs.model_outputs):
        raise StageError(f"the MLflow run of {verb} has no model", where=run_id, fix="delete this run, then `nss run`")
    base = tracker.find(stage="base", stage_key=base_key.digest)
    tags = {
        **provenance_tags(workspace, stage_key),
        **figure_tags(figures),
        **_parent(workspace, registry, each),
        "nss.verb": verb,
        "nss.verdict": each["verdict"],
        "nss.model": each["model"],
        "nss.batches": json.dumps(each["batches"]),
        "nss.decision": gate.digest,
        "nss.base_run": base.info.run_id if base else "",
    }
    return registry.add(key, run_id, outputs.model_outputs[0].model_id, tags)


def _per_class(workspace: Workspace, verb: str) -> dict[str, float]:
    candidates = read_json(workspace.out("evaluate") / "candidates.json", StageError)
    found = next((each["per_class"] for each in candidates if each["verb"] == verb), None) or {}
    return {f"class/{name}": value for name, value in found.items()}


def _parent(workspace: Workspace, registry: Registry, candidate: Mapping[str, Any]) -> dict[str, str]:
    if candidate["parent"] in (None, candidate["model"]):
        return {}
    pin, was = read_champion(workspace), maintained(workspace, registry)
    version = f"{pin.name}/{pin.version}" if pin else ""
    if was and was.model == candidate["parent"]:
        # By the number that it has here: another registry than the one that it was pinned from may have given another.
        version = f"{was.name}/{was.number}"
    return {"nss.parent": candidate["parent"], **({"nss.parent_version": version} if version else {})}


def move_to(
    workspace: Workspace,
    params: Params,
    tracker: Tracker,
    gate: Gate,
    version: Version,
    *,
    forced: bool = False,
    reason: str = "",
    cycle_run_id: str = "",
) -> Registered:
    """Make a version of one of the gate's candidates the champion."""
    verb = version.tags["nss.verb"]
    judged = gate.candidates[verb]
    was, previous = place_of(workspace, Registry(tracker, version.name), version)
    move = Move(
        id=uuid.uuid4().hex,
        kind="promote",
        name=version.name,
        champion=version.number,
        previous=previous.number if previous else None,
        commit=params.register.commit,
        verb=verb,
        verdict=judged["verdict"],
        reasons=tuple(judged["reasons"]),
        forced=forced,
        reason=reason,
        cycle_run_id=cycle_run_id,
    )
    warnings = make(workspace, tracker, move)
    return Registered(gate.verdict, "promoted", verb, version, was, tuple(warnings))


def promote(
    workspace: Workspace,
    params: Params,
    tracker: Tracker,
    verb: str | None = None,
    *,
    forced: bool = False,
    reason: str = "",
) -> Registered:
    """Make a candidate of the last cycle the champion: the one that the gate promotes, or that of `verb`.

    forced: also when the gate holds or rejects it, for a reason.

    Raises StageError when there is no such candidate, when the gate is against it, or when it is no longer about the
    data, the code and the champion that there are now; nothing has changed then.
    """
    with locked(workspace):
        resume(workspace, tracker)
        gate = read_gate(workspace)
        chosen = _choose(gate, verb, forced)
        if already := _already(workspace, tracker, gate, chosen):
            return already
        _require_current(workspace)
        version = add_version(workspace, params, tracker, gate, chosen)
        return move_to(workspace, params, tracker, gate, version, forced=forced, reason=reason)


def _already(workspace: Workspace, tracker: Tracker, gate: Gate, verb: str) -> Registered | None:
    """Return what was done before, when the pin names this candidate: then the stages are no longer up to date."""
    pin = read_champion(workspace)
    if pin is None or pin.model != gate.candidates[verb]["model"]:
        return None
    registry = Registry(tracker, pin.name)
    version = registry.by_number(pin.version)
    is_of_this_gate = version is not None and version.tags.get("nss.decision") == gate.digest
    return Registered(gate.verdict, "promoted", verb, version, registry.by_alias(PREVIOUS)) if is_of_this_gate else None


def _choose(gate: Gate, verb: str | None, forced: bool) -> str:
    made = ", ".join(gate.candidates) or "none"
    chosen = verb or gate.promoted
    if chosen is None:
        raise StageError(
            f"the gate promotes nothing ({gate.verdict})",
            allowed=f"a candidate of the last cycle by name, with --force and --reason: {made}",
            fix="see why in artifacts/gate/gate.json",
        )
    if chosen not in gate.candidates:
        raise StageError(f"the last cycle made no candidate '{chosen}'", allowed=made)
    judged = gate.candidates[chosen]
    if judged["verdict"] != "PROMOTE" and not forced:
        reasons = "\n".join(f"  - {reason}" for reason in judged["reasons"])
        raise StageError(
            f"the gate says {judged['verdict']} to {chosen}\n{reasons}", fix="--force --reason TEXT promotes it anyway"
        )
    return chosen


def _require_current(workspace: Workspace) -> None:
    pipeline = Pipeline(workspace)
    changed = next(iter(pipeline.stale()), None)
    if pipeline.has_changed_data():
        changed = "data"
    if changed is None and is_about_the_champion(workspace):
        return
    what = f"'{changed}' has changed" if changed else "another champion has been pinned"
    raise StageError(
        f"the gate's decision is not about what is there now: {what} since",
        where=str(workspace.out("gate") / "gate.json"),
        fix="nss run, then look at its verdict",
    )


def rollback(workspace: Workspace, params: Params, tracker: Tracker, reason: str = "") -> Registered:
    """Make the previous champion the champion again, and this one the previous.

    Raises StageError when there is none before.
    """
    with locked(workspace):
        done, warnings = resume(workspace, tracker)
        if done is None or done.kind != "rollback":
            done = _rollback_move(workspace, params, tracker, reason)
            warnings = make(workspace, tracker, done)
        registry = Registry(tracker, done.name)
        was = registry.by_number(done.previous) if done.previous else None
        return Registered("", "promoted", done.verb, registry.by_number(done.champion), was, tuple(warnings))


def _rollback_move(workspace: Workspace, params: Params, tracker: Tracker, reason: str) -> Move:
    pin = read_champion(workspace)
    registry = Registry(tracker, pin.name if pin else params.register.name)
    now, previous = maintained(workspace, registry), registry.by_alias(PREVIOUS)
    if previous is None or (now and previous.number == now.number):
        raise StageError(
            f"{registry.name} has no previous champion to go back to",
            where=shown_uri(tracker.uri),
            fix="there is one after the second promotion; `nss lineage` shows where the champion comes from",
        )
    return Move(
        id=uuid.uuid4().hex,
        kind="rollback",
        name=registry.name,
        champion=previous.number,
        previous=now.number if now else None,
        commit=params.register.commit,
        verb=previous.tags.get("nss.verb", ""),
        verdict=previous.tags.get("nss.verdict", ""),
        reason=reason,
    )
