"""How far a longer command is: a bar on a terminal, plain lines elsewhere, nothing when JSON is asked for."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeElapsedColumn
from rich.table import Column
from rich.text import Text


class _Note(ProgressColumn):
    """What there is to say of the step at work, as far as there is room."""

    def __init__(self, note: Callable[[], str]) -> None:
        super().__init__(Column(no_wrap=True, overflow="ellipsis", ratio=1))
        self.note = note

    def render(self, task: Task) -> Text:
        """Return what is said now."""
        # Colours, and whatever else a stage tells a terminal, would be cut off in the middle.
        return Text(Text.from_ansi(self.note()).plain, style="dim")


class Bar:
    """Counts steps and prints lines above itself.

    first: the title of the first step. is_quiet: neither bar nor lines. note: asked ten times a second for a line that
    is shown beside the bar.

    >>> with Bar(2, "base") as bar:
    ...     bar.step("base       Executed    4.1 s", "profile")
    """

    def __init__(self, steps: int, first: str = "", *, is_quiet: bool = False, note: Callable[[], str] = str) -> None:
        self.console = Console(quiet=is_quiet, highlight=False, soft_wrap=True)
        columns = (TextColumn("{task.description}"), BarColumn(bar_width=16), MofNCompleteColumn(), TimeElapsedColumn())
        self.progress = Progress(
            *columns,
            _Note(note),
            expand=True,
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
