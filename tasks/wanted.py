"""Whether a maintenance stage shall work: its setting `when`, and what triage has found."""

from __future__ import annotations

from nss.errors import StageError
from nss.files import read_json
from tasks.workspace import Workspace, require_same_source


def is_wanted(workspace: Workspace, verb: str, when: str, **digests: str) -> tuple[bool, str]:
    """Return whether the stage `verb` shall work, and why.

    when: always, never or triage. digests: what the stage reads. Raises StageError when triage has read something else.

    >>> is_wanted(workspace, "readapt", "triage", model="5d1c...")  # doctest: +SKIP
    (False, 'triage: no new images')
    """
    if when != "triage":
        return when == "always", f"{verb}.when is {when}"
    require_same_source(workspace.out("triage"), **digests)
    finding = read_json(workspace.out("triage") / f"{verb}.json", StageError)
    return finding["needed"], f"triage: {finding['why']}"
