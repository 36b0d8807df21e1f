"""`nss demo`: three cycles in a workspace of their own: a model shrinks, learns new classes, and follows a drift."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits

from flows import show
from flows.maintain import CycleReport, StageReport, run_cycle
from nss.drift import shifted
from nss.files import read_json
from tasks.data import add
from tasks.layout import lay_out, set_params
from tasks.reasons import triage_words, verdict_words
from tasks.workspace import Workspace

# Of the digits: first the old classes of the first pictures, then the new ones of them, then what comes in bad light.
# 0 and 6 look least like other digits: with so few held-out pictures, two that are mistaken are too many for the gate.
NEW, FIRST = (0, 6), 1200
STRENGTH = 2
SETTINGS = {
    "slice.n_slices": 4,
    "triage.budgets.macs": 2_200_000,
    "register.promote": "auto",
    "readapt.guard": 10.0,
    # The gate forgives one picture in a hundred, and there are few: what tells the old classes stays as it is, and
    # every fifth of the old pictures, which are at hand, is trained on again; every second where what tells them moves.
    "extend.share": 1.0,
    "extend.replay": 0.2,
    "readapt.replay": 0.5,
}


@dataclass(frozen=True)
class Chapter:
    """One cycle of the story. needed: the maintenance that triage is to find."""

    title: str
    batch: str
    needed: str


CHAPTERS = (
    Chapter("a model of all digits but 0 and 6 is trained, and is too large for its budget", "old", "restructure"),
    Chapter("pictures of 0 and 6 arrive: classes that it does not know", "new", "extend"),
    Chapter("the light fades: pictures of all ten digits arrive darker", "dark", "readapt"),
)


def tell_story(
    root: Path,
    begin: Callable[[Chapter], None],
    tell: Callable[[StageReport], None],
) -> Iterator[tuple[Chapter, Workspace, CycleReport]]:
    """Lay out a workspace at `root` and run the three cycles in it, each when the next one is asked for.

    begin: called before each cycle; tell: with each stage as it ends. Raises StageError when `root` is a workspace
    already.

    >>> for chapter, workspace, report in tell_story(Path("demo"), print, print): ...  # doctest: +SKIP
    """
    workspace = lay_out(root, "digits").workspace
    set_params(workspace.params, SETTINGS)
    sources = write_batches(root / "inbox" / ".story")
    for chapter in CHAPTERS:
        begin(chapter)
        add(workspace, str(sources[chapter.batch]), new_classes=True)
        yield chapter, workspace, run_cycle(workspace, tell=tell)


def write_batches(folder: Path) -> dict[str, Path]:
    """Write the pictures of the three chapters as .npz files, {chapter's batch: file}."""
    pixels, labels = load_digits(return_X_y=True)
    images = np.rint(pixels * 255 / 16).astype(np.uint8).reshape(-1, 8, 8)
    old, early = ~np.isin(labels, NEW), np.arange(len(labels)) < FIRST
    dark = shifted(torch.from_numpy(images[~early])[:, None], "brightness", STRENGTH, seed=0)[:, 0].numpy()
    parts = {
        "old": (images[early & old], labels[early & old]),
        "new": (images[early & ~old], labels[early & ~old]),
        "dark": (dark, labels[~early]),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, (x, y) in parts.items():
        np.savez(folder / f"{name}.npz", x=x, y=y)
    return {name: folder / f"{name}.npz" for name in parts}


def chapter_lines(workspace: Workspace, report: CycleReport) -> list[str]:
    """Return what came out of one cycle: what triage found, what the gate said, and who is champion now."""
    judgements = read_json(workspace.out("gate") / "gate.json")["judgements"]
    return [
        *(f"triage      {verb}: {why}" for verb, why in triage_words(workspace).items()),
        *(f"gate        {each['verb']}: {each['verdict']}, {verdict_words(each)}" for each in judgements),
        *show.registered_lines(report),
    ]
