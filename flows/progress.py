"""How far a longer command is: a bar on a terminal, plain lines elsewhere, nothing when JSON is asked for."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn


class Bar:
    """Counts steps and prints lines above itself.

    >>> with Bar(10) as bar:
    ...     bar.step("base       Completed    4.1 s")
    """

    def __init__(self, steps: int, *, is_quiet: bool = False) -> None:
        self.console = Console(quiet=is_quiet, highlight=False, soft_wrap=True)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self.progress = Progress(*columns, console=self.console, transient=True, disable=not self.console.is_terminal)
        self.task = self.progress.add_task("", total=steps)

    def __enter__(self) -> Bar:
        self.progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.progress.stop()

    def say(self, text: str) -> None:
        """Print a text above the bar."""
        self.console.print(text, markup=False)

    def step(self, text: str) -> None:
        """Print a text and count one step."""
        self.say(text)
        self.progress.advance(self.task)

    def name(self, title: str) -> None:
        """Put a title beside the bar."""
        self.progress.update(self.task, description=title)
