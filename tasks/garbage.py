"""How often Python looks for garbage in a process that imports much and lives for seconds."""

from __future__ import annotations

import atexit
import gc

_USUAL = gc.get_threshold()
_RARE = 50_000


def collect_rarely() -> None:
    """Look for garbage after 50,000 new objects, not 700: what a command imports, a million, is none.

    Imports take two thirds of the time then. Nor is it looked through once more when the process ends, for a second:
    the system takes it all back.
    """
    gc.set_threshold(_RARE, *_USUAL[1:])
    atexit.register(gc.freeze)


def collect_as_usual() -> None:
    """Look as often as Python does by itself, for work whose garbage may be large; what is there now is left out."""
    gc.freeze()
    gc.set_threshold(*_USUAL)
