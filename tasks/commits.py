"""Commits of exactly the files that a cycle or a promotion changed."""

from __future__ import annotations

import subprocess

from tasks.workspace import Workspace

CYCLE = ("data.dvc", "dvc.lock", "nss-code.yaml")
PIN = ("champion.json", "champion.dvc")


def commit(workspace: Workspace, message: str, names: tuple[str, ...]) -> str:
    """Commit these files as they lie in the workspace, and nothing else: what else is staged stays staged.

    Returns an empty text, also when there is nothing to commit, or what git says against it.

    >>> commit(find_workspace(), "New data", CYCLE)  # doctest: +SKIP
    ''
    """
    present = [name for name in names if (workspace.root / name).is_file()]
    status = _git(workspace, "status", "--porcelain", "--", *present)
    if status.returncode or not status.stdout.strip():
        return _problem(status, present)
    # git commits only what it knows: champion.dvc is new the first time.
    added = _git(workspace, "add", "--", *present)
    if added.returncode:
        return _problem(added, present)
    return _problem(_git(workspace, "commit", "--quiet", "--only", "-m", message, "--", *present), present)


def _problem(done: subprocess.CompletedProcess[str], names: list[str]) -> str:
    if not done.returncode:
        return ""
    reason = (done.stderr or done.stdout).strip().splitlines() or ["no reason given"]
    return f"git did not commit {' '.join(names)}: {reason[0]}"


def _git(workspace: Workspace, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = ["git", *arguments]
    try:
        return subprocess.run(
            command, cwd=workspace.root, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
        )
    except FileNotFoundError:
        return subprocess.CompletedProcess(command, 127, "", "git is not installed")
