"""Where the tracking store is, and how its address may be printed; its client takes seconds to import."""

from __future__ import annotations

import os
import re

from nss.errors import first_line
from tasks.workspace import Workspace

SQLITE = "sqlite:///"
"""how the address of an sqlite store begins, before its absolute path"""

# An address of any kind may hold a password, before the host or as a parameter like sslpassword.
_PASSWORD = re.compile(
    r"(://[^:/?#@]*:).*@|([?&](?:\w*(?:pass|pwd|token|secret)\w*|odbc_connect)=)[^&#]*", re.IGNORECASE
)


def tracking_uri(workspace: Workspace) -> str:
    """Return MLFLOW_TRACKING_URI, or the workspace's own sqlite file."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"{SQLITE}{workspace.store / 'tracking.db'}"


def shown_uri(uri: str) -> str:
    """Return a store's address as it may be printed, without its password.

    >>> shown_uri("postgresql://me:secret@host/db")
    'postgresql://me:***@host/db'
    """
    return _PASSWORD.sub(lambda found: f"{found[1]}***@" if found[1] else f"{found[2]}***", uri)


def told(error: BaseException, uri: str) -> str:
    """Return the first line of an error of the store at `uri`, without the password: the clients repeat the address.

    >>> told(OSError("no answer from http://me:secret@host/api"), "http://me:secret@host")
    'no answer from http://me:***@host/api'
    """
    line = first_line(error).replace(uri.rstrip("/"), shown_uri(uri).rstrip("/"))
    # What lies below the store's address may be spelled in another way than the user's.
    return " ".join(shown_uri(word) for word in line.split(" "))
