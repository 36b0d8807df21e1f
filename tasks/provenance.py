"""Where a run comes from: data version, commit, parameters, code."""

from __future__ import annotations

import os
import subprocess
import uuid
from pathlib import Path

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from nss.errors import StageError
from nss.files import replacing
from tasks.dvc_errors import conflict
from tasks.pipeline import StageKey
from tasks.processes import process_id
from tasks.workspace import Workspace

PROCESS = "nss.process"
"""The tag that names the process of a run, see `tasks.processes.process_id`."""

DATA_MD5 = "nss.data_md5"
"""The tag that names the version of data/ which a run works on."""

WORKSPACE = "nss.workspace"
"""The tag that names the workspace of a cycle, see `workspace_id`."""

_UNKNOWN = "unknown"
_SHORT = 12


def provenance_tags(workspace: Workspace, key: StageKey | None = None) -> dict[str, str]:
    """Return the tags that every run of this workspace carries; with a stage's key, those of the stage too.

    >>> provenance_tags(find_workspace())["nss.data_md5"]  # doctest: +SKIP
    '9f0c1e8a....dir'
    """
    tags = {PROCESS: process_id(), DATA_MD5: data_md5(workspace), **_git_tags(workspace.root)}
    if key is not None:
        tags |= {"nss.stage_key": key.digest, "nss.params_digest": key.params, "nss.code_digest": key.code}
    if experiment := os.environ.get("DVC_EXP_NAME"):
        tags["nss.dvc_experiment"] = experiment
    return tags


def workspace_id(workspace: Workspace, *, make: bool = False) -> str:
    """Return what tells the workspaces apart that share a tracking store, wherever they are moved to or mounted.

    make: give it one when it has none; without, that is an empty text.

    >>> workspace_id(find_workspace())  # doctest: +SKIP
    '5f0c1e8a9b7d'
    """
    path = workspace.root / ".dvc" / "tmp" / "nss-workspace.txt"
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        if not make:
            return ""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as part:
        part.write_text(uuid.uuid4().hex[:_SHORT], encoding="utf-8")
    return path.read_text(encoding="utf-8")


def data_md5(workspace: Workspace) -> str:
    """Return the hash of the data set in data.dvc, or 'unknown' when the data is not versioned.

    Raises StageError when data.dvc cannot be read, as after a merge with a conflict in it.
    """
    path = workspace.root / "data.dvc"
    try:
        content = YAML(typ="safe").load(path.read_text(encoding="utf-8"))
        return str(content["outs"][0]["md5"])
    except (YAMLError, UnicodeDecodeError) as problem:
        raise conflict(workspace.root) or StageError(
            f"data.dvc is no YAML ({str(problem).splitlines()[0]})",
            where=str(path),
            fix="`git checkout data.dvc`, then `dvc checkout data.dvc`",
        ) from None
    except (OSError, KeyError, IndexError, TypeError):
        return _UNKNOWN


def judged_data_md5(workspace: Workspace) -> str:
    """Return the hash of the data set that the candidates were last judged on, by dvc.lock; 'unknown' without one."""
    try:
        content = YAML(typ="safe").load((workspace.root / "dvc.lock").read_text(encoding="utf-8"))
        deps = content["stages"]["evaluate"]["deps"]
        return str(next(each["md5"] for each in deps if each["path"] == "data"))
    except (YAMLError, OSError, UnicodeDecodeError, KeyError, TypeError, StopIteration):
        return _UNKNOWN


def _git_tags(root: Path) -> dict[str, str]:
    commit = _git(root, "rev-parse", "--verify", "--quiet", "HEAD")
    if not commit:
        return {"nss.git_sha": _UNKNOWN}
    dirty = bool(_git(root, "status", "--porcelain", "--untracked-files=no"))
    return {"nss.git_sha": commit, "nss.git_dirty": str(dirty).lower(), "mlflow.source.git.commit": commit}


def _git(root: Path, *arguments: str) -> str:
    try:
        done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
