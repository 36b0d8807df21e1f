"""The inbox: what is dropped into a folder and has settled becomes a batch of data/, or is put aside with its problems.

Whatever step a kill hits, the next `take` completes it: a batch is named by its content, so adding it again does no
harm, and an entry leaves the inbox last. What changes while it is being read stays for the next look.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path, PurePath
from typing import Any

from nss.errors import DataError
from nss.ingest import Added
from tasks.data import add_all
from tasks.provenance import data_md5
from tasks.workspace import Workspace

DONE, REJECTED = ".done", ".rejected"
# How many times the settling time something settled waits for others that are still being copied.
_PATIENCE = 10
# Of a name in bytes: what file systems take, less what may follow it, as "-9999.problems.txt".
_LONGEST = 255 - 18
_LONGEST_ENDING = 20

Print = tuple[tuple[str, int, int, int], ...]


@dataclass(frozen=True)
class Arrived:
    """An entry that was taken: its batch, and whether that was in the data set before."""

    name: str
    digest: str
    images: int
    already_present: bool


@dataclass(frozen=True)
class Refused:
    """An entry that was put aside. `place` is where it lies now; a list of its problems lies beside it."""

    name: str
    problems: tuple[str, ...]
    place: str


@dataclass(frozen=True)
class Taken:
    """What became of the entries that were taken, and the version of data/ after it.

    stuck: of each entry that could not be moved out of the inbox, what was in the way.
    """

    arrived: tuple[Arrived, ...]
    refused: tuple[Refused, ...]
    data_md5: str
    stuck: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return the fields, ready for JSON."""
        return asdict(self)


class Inbox:
    """A folder whose entries, folders of class folders or .npz files, are sources. Hidden entries are left alone.

    settle: seconds for which no name, size or time below an entry may have changed.

    >>> Inbox(Path("inbox")).pending()  # doctest: +SKIP
    ('monday.npz', 'tuesday')
    """

    def __init__(self, folder: Path, settle: float = 5, clock: Callable[[], float] = time.monotonic) -> None:
        self.folder, self.settle, self._clock = folder, settle, clock
        self._seen: dict[str, tuple[Print, float]] = {}

    def pending(self) -> tuple[str, ...]:
        """Names of the entries that have not been taken."""
        return tuple(entry.name for entry in _entries(self.folder))

    def settled(self) -> tuple[Path, ...]:
        """Look, and return what has not changed over all looks of the last `settle` seconds.

        While something else is still being copied nothing is returned, so that what arrives together is taken
        together; but at most ten times as long.
        """
        now = self._clock()
        prints = {entry.name: _print(entry) for entry in _entries(self.folder)}
        self._seen = {name: (found, self._since(name, found, now)) for name, found in prints.items()}
        # A folder without a file is one whose files are still to come.
        ages = {name: now - since for name, (found, since) in self._seen.items() if found}
        ready = [name for name, age in ages.items() if age >= self.settle]
        is_quiet = len(ready) == len(ages)
        has_waited = max((ages[name] for name in ready), default=0) >= _PATIENCE * self.settle
        return tuple(self.folder / name for name in ready) if is_quiet or has_waited else ()

    def _since(self, name: str, found: Print, now: float) -> float:
        before = self._seen.get(name)
        return before[1] if before and before[0] == found else now


def take(
    workspace: Workspace,
    entries: Sequence[Path],
    *,
    new_classes: bool = False,
    resize: tuple[int, int] | None = None,
) -> Taken:
    """Add entries of an inbox to data/ as one version, then move each to .done/ or, with its problems, .rejected/.

    One that is another when it has been read, or gone, is neither: somebody wrote to it, or took it, meanwhile. One
    that cannot be moved is stuck: its batch is in, and it is found again; as arrived it counts the first time.

    Raises BusyError while a cycle or a stage runs, DataError when data/ itself cannot be used, and StageError when
    data.dvc cannot be written; then every entry stays.
    """
    arrived, refused, stuck = [], [], []
    prints = [_print(entry) for entry in entries]
    added = add_all(workspace, entries, new_classes=new_classes, resize=resize)
    for entry, before, done in zip(entries, prints, added, strict=True):
        if not before or _print(entry) != before:
            continue
        place, problem = _put_away(entry, done)
        if not place:
            stuck.append(f"{entry.name}: {problem}")
        if isinstance(done, DataError):
            refused += [Refused(entry.name, _problems(done), str(place))] if place else []
        elif place or not done.already_present:
            arrived.append(Arrived(entry.name, done.digest, done.images, done.already_present))
    return Taken(tuple(arrived), tuple(refused), data_md5(workspace), tuple(stuck))


def _put_away(entry: Path, done: Added | DataError) -> tuple[Path | None, str]:
    """Return where the entry lies now, or None and what was in the way."""
    try:
        if isinstance(done, Added):
            return _move(entry, entry.parent / DONE, f"{datetime.now():%Y%m%d-%H%M%S}-{entry.name}"), ""
        text = "\n".join(_problems(done))
        return _move(entry, entry.parent / REJECTED, entry.name, f"{text}\n"), ""
    except OSError as problem:
        return None, problem.strerror or str(problem)


def _problems(error: DataError) -> tuple[str, ...]:
    remedy = {"allowed": error.allowed, "fix": error.fix}
    return error.problems or (error.what, *(f"{name}: {text}" for name, text in remedy.items() if text))


def _move(entry: Path, folder: Path, name: str, problems: str = "") -> Path:
    """Rename the entry into the folder, under a further name when that one is taken; its problems are there first."""
    folder.mkdir(exist_ok=True)
    name = _fitting(name)
    place, number = folder / name, 2
    while os.path.lexists(place):
        place, number = folder / f"{name}-{number}", number + 1
    if problems:
        place.with_name(f"{place.name}.problems.txt").write_text(printable(problems), encoding="utf-8")
    return entry.rename(place)


def _fitting(name: str) -> str:
    """Cut a name that is too long in front of its ending, which says what it is when it is moved back."""
    encoded, ending = os.fsencode(name), os.fsencode(PurePath(name).suffix)
    if len(encoded) <= _LONGEST:
        return name
    ending = ending if len(ending) <= _LONGEST_ENDING else b""
    return (encoded[: _LONGEST - len(ending)] + ending).decode(errors="ignore")


def printable(text: str) -> str:
    r"""Return a text that any UTF-8 output takes: a name on the disk may hold bytes that are no text.

    >>> print(printable("caf\udce9"))
    caf\udce9
    """
    return text.encode(errors="backslashreplace").decode()


def _entries(folder: Path) -> Iterator[Path]:
    try:
        yield from sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
    except FileNotFoundError:
        return
    except OSError as problem:
        raise DataError(
            f"the inbox cannot be read ({problem.strerror})",
            where=str(folder),
            fix="make it a folder that nss may read",
        ) from None


def _print(entry: Path) -> Print:
    """Return name, size and both times of every file: a copy that keeps the old time of change still changes ctime."""
    return tuple(row for path in sorted(_files(entry)) for row in _row(path, entry))


def _files(entry: Path) -> Iterator[Path]:
    """Name all files below an entry, and what cannot be looked into: whoever reads it says why it is no good."""
    if not os.path.isdir(entry):
        yield entry
        return
    root, seen = os.path.realpath(entry), set[str]()
    closed: list[OSError] = []
    for top, folders, names in os.walk(entry, followlinks=True, onerror=closed.append):
        # A link that leads out of the entry is not followed, and one in a circle once.
        real = os.path.realpath(top)
        if real in seen or not Path(real).is_relative_to(root):
            folders.clear()
            yield Path(top)
        else:
            seen.add(real)
            yield from (Path(top, name) for name in names)
    yield from (Path(error.filename) for error in closed)


def _row(path: Path, entry: Path) -> Iterator[tuple[str, int, int, int]]:
    """Look at a file; a link to one counts as that one, as for whoever reads the source."""
    for look in (path.lstat,) if path.is_dir() else (path.stat, path.lstat):
        try:
            found = look()
        except OSError:
            # A link that leads nowhere; or it went away between listing and looking, and the next look differs.
            continue
        yield str(path.relative_to(entry)), found.st_size, found.st_mtime_ns, found.st_ctime_ns
        return
