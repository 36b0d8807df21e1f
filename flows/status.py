"""`nss status`: where a workspace stands."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flows.deployment import Deployment, has_server, is_going
from nss.errors import NssError
from nss.files import read_json
from tasks.champion import is_about_the_champion, read_champion
from tasks.inbox import Inbox, printable
from tasks.lock import is_held
from tasks.provenance import data_md5, judged_data_md5, workspace_id
from tasks.registry import store_errors
from tasks.store_address import told, tracking_uri
from tasks.tracking import open_tracker
from tasks.workspace import Workspace

_AT_WORK = {True: "a cycle or an arrival", False: "nobody", "unknown": "unknown: the lock cannot be read"}


def status(workspace: Workspace, inbox: Path, name: str) -> dict[str, Any]:
    """Return champion, version of data/, last cycle, verdict, entries of the inbox and what is running.

    name: of the deployment. What there is not is None: no champion, no cycle yet, no server. A store or a server that
    does not answer is {"error": why}.
    """
    champion = read_champion(workspace)
    return {
        "champion": champion and {"name": champion.name, "version": champion.version, "model": champion.model},
        "data_md5": data_md5(workspace),
        "last_cycle": _last_cycle(workspace),
        "verdict": _verdict(workspace, champion.model if champion else ""),
        "inbox": {"folder": str(inbox), "pending": list(Inbox(inbox).pending())},
        "is_working": is_held(workspace),
        "server": _server(workspace, name) if has_server() else None,
    }


def _last_cycle(workspace: Workspace) -> dict[str, Any] | None:
    """Return this workspace's newest cycle in the tracking store, None when there is none, or why it does not answer.

    Whatever the error is: who looks where a workspace stands is to be told the rest all the same.
    """
    uri = tracking_uri(workspace)
    try:
        with store_errors(uri):
            tracker, own = open_tracker(workspace), workspace_id(workspace)
            run = tracker.find(kind="cycle", workspace=own) if own else None
    except NssError as error:
        return {"error": error.what}
    except Exception as error:
        return {"error": f"the tracking store does not answer as it should ({told(error, uri)})"}
    if run is None:
        return None
    head, tail = "nss.stage.", ".outcome"
    outcomes = {
        key.removeprefix(head).removesuffix(tail): value
        for key, value in run.data.tags.items()
        if key.startswith(head) and key.endswith(tail)
    }
    return {
        "run_id": run.info.run_id,
        "status": run.info.status,
        "started": run.info.start_time,
        "ended": run.info.end_time,
        "data_md5": run.data.tags.get("nss.data_md5", ""),
        "outcomes": outcomes,
    }


def _verdict(workspace: Workspace, champion: str) -> dict[str, Any] | None:
    """Return verdict, the candidate that is promoted, whether it waits, and whether it is about what is there now.

    It waits when it is not the champion, by its digest, and can become it.
    """
    path = workspace.out("gate") / "gate.json"
    if not path.is_file():
        return None
    decision = read_json(path)
    verb = decision["promoted"]
    current = _is_of_now(workspace)
    waits = current and verb is not None and decision["candidates"][verb]["model"] != champion
    return {"verdict": decision["verdict"], "promoted": verb, "waits": waits, "is_current": current}


def _is_of_now(workspace: Workspace) -> bool:
    """Say whether the gate judged the data that is there and the pinned champion; settings and code take longer."""
    now, judged = data_md5(workspace), judged_data_md5(workspace)
    made = (workspace.out("base") / "champion.json").is_file()
    return now == judged and made and is_about_the_champion(workspace)


def _server(workspace: Workspace, name: str) -> dict[str, Any]:
    """Return what the Prefect server knows of the deployment, or the error that kept it from answering."""
    deployment = Deployment(name, workspace.root)
    try:
        found = deployment.find()
        runs = deployment.runs() if found else []
    except NssError as error:
        return {"error": error.what}
    going = next((run for run in runs if is_going(run)), None)
    return {
        "deployment": found and found.name,
        "schedules": [_schedule(each) for each in found.schedules if each.active] if found else [],
        "running": going and {"name": going.name, "id": str(going.id), "state": going.state_name},
    }


def _schedule(each: Any) -> str:
    cron = getattr(each.schedule, "cron", "")
    return f"{cron} {each.schedule.timezone}" if cron else str(each.schedule)


def text(content: dict[str, Any]) -> str:
    """Return it as lines."""
    champion, cycle, verdict = content["champion"], content["last_cycle"], content["verdict"]
    pending = content["inbox"]["pending"]
    lines = [
        f"champion    {champion['name']} version {champion['version']}" if champion else "champion    none is pinned",
        f"data        {content['data_md5']}",
        f"last cycle  {_cycle_words(cycle, content['data_md5'])}" if cycle else "last cycle  none",
        f"verdict     {_verdict_words(verdict)}" if verdict else "verdict     none yet",
        f"inbox       {len(pending)} waiting{': ' if pending else ''}{printable(', '.join(pending))}",
        f"at work     {_AT_WORK[content['is_working']]}",
    ]
    return "\n".join([*lines, *_server_lines(content["server"])])


def _cycle_words(cycle: dict[str, Any], md5: str) -> str:
    if "error" in cycle:
        return str(cycle["error"])
    counts: dict[str, int] = {}
    for outcome in cycle["outcomes"].values():
        counts[outcome] = counts.get(outcome, 0) + 1
    stages = ", ".join(f"{count} {outcome}" for outcome, count in counts.items())
    what = "of this data" if cycle["data_md5"] == md5 else f"of data {cycle['data_md5']}"
    return f"{cycle['status']}, {what}{f' ({stages})' if stages else ''}, MLflow run {cycle['run_id']}"


def _verdict_words(verdict: dict[str, Any]) -> str:
    what: str = verdict["verdict"] + (f" of {verdict['promoted']}" if verdict["promoted"] else "")
    if not verdict["is_current"]:
        return f"{what}, of other data or another champion: `nss run` judges anew"
    return what + ("; it waits, `nss promote` makes it the champion" if verdict["waits"] else "")


def _server_lines(server: dict[str, Any] | None) -> list[str]:
    if server is None:
        return ["Prefect     no server is named"]
    if "error" in server:
        return [f"Prefect     {server['error']}"]
    if not server["deployment"]:
        return ["Prefect     the deployment is not known there"]
    running = server["running"]
    lines = [f"Prefect     {running['name']}, {running['state']}" if running else "Prefect     nothing runs"]
    return [*lines, *(f"schedule    {each}" for each in server["schedules"])]
