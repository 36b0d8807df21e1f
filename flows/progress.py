"""How far a longer command is: a bar on a terminal, plain lines elsewhere, nothing when JSON is asked for."""

from __future__ import annotations

import sys
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn


class Bar:
    """Counts steps and prints lines above itself.

    first: the title of the first step. is_quiet: neither bar nor lines.

    >>> with Bar(2, "base") as bar:
    ...     bar.step("base       Executed    4.1 s", "profile")
    """

    def __init__(self, steps: int, first: str = "", *, is_quiet: bool = False) -> None:
        self.console = Console(quiet=is_quiet, highlight=False, soft_wrap=True)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self.progress = Progress(
            *columns,
            console=self.console,
            transient=True,
            disable=is_quiet or not self.console.is_terminal,
            # Above the bar too, unless it goes to a file.
            redirect_stderr=sys.stderr.isatty(),
        )
        self.task = self.progress.add_task(first, total=steps)

    def __enter__(self) -> Bar:
        self.progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.progress.stop()

    def say(self, text: str) -> None:
        """Print a text above the bar."""
        self.console.print(text, markup=False, emoji=False)

    def step(self, text: str, following: str = "") -> None:
        """Print a text and count one step. following: the title of the next one."""
        self.say(text)
        self.progress.update(self.task, advance=1, description=following, refresh=True)
