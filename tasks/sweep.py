"""One kind of leftovers that recovery puts in order, see tasks/recovery.py."""

from __future__ import annotations

from collections.abc import Callable

from nss.errors import first_line
from tasks.workspace import Workspace

Kinds = type[Exception] | tuple[type[Exception], ...]


def swept(what: str, sweep: Callable[[Workspace], list[str]], workspace: Workspace, *, away: Kinds) -> list[str]:
    """Return a line for each thing that was put in order; what goes wrong is a line too, and ends nothing.

    away: what comes of a store or server that does not answer. Whoever needs it says so; here it is left for next time.

    >>> swept("lamps", lambda _: ["lamp: off"], Workspace(Path("/repo")), away=OSError)
    ['lamp: off']
    """
    try:
        return sweep(workspace)
    except away:
        return []
    except Exception as error:
        return [f"not put in order: {what} ({first_line(error)}); the next cycle tries again"]
