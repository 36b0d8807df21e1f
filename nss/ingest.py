"""Adding batches to a data folder: all that is wrong with a source is listed at once, and then nothing changes.

The split of an image is a function of its bytes, unless its source brings a test split of its own or the image is in
the data set already, where it keeps the split it has: a held-out image never becomes a training image.
"""

from __future__ import annotations

import hashlib
import re
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from filelock import FileLock, Timeout
from numpy.typing import NDArray

from nss.data import (
    SPLITS,
    Batch,
    Dataset,
    batch_digest,
    describe,
    load_data,
    write_batch,
    write_description,
)
from nss.errors import BusyError, DataError
from nss.files import read_json
from nss.fitting import Options, can_scale, conflicts, fit_blocks, merge_classes
from nss.sources import DIGITS, Block, Source, read_source

TEST_SHARE = 0.20
VAL_SHARE = 0.10
PROBLEMS_SHOWN = 50
_LOCK_SECONDS = 60
# What a killed write leaves behind: a batch that dataset.json does not name, and the folders of nss.files.replacing.
_BATCH_FILE = re.compile(r"([0-9a-f]{32})\.safetensors")
_TEMPORARY = re.compile(r"\.([0-9a-f]{32}\.safetensors|dataset\.json)\..+")
_TRAIN, _VAL, _TEST = range(len(SPLITS))

Array = NDArray[Any]


@dataclass(frozen=True, eq=False)
class _Plan:
    """A batch that passed every check and the data set as it is to be with it."""

    batch: Batch
    data: Dataset
    added: bool
    repeated: int
    relabelled: int


@dataclass(frozen=True)
class Added:
    """What adding a source did.

    `digest` names the batch and `data` the whole data set after it; `already_present` says that nothing had to be
    added. `images` counts the batch, `splits` by split. `new_classes` were appended. `repeated` images were in the data
    set before, `relabelled` of them under another class.
    """

    digest: str
    data: str
    already_present: bool
    images: int
    splits: dict[str, int]
    new_classes: tuple[str, ...]
    repeated: int
    relabelled: int

    def to_dict(self) -> dict[str, Any]:
        """Return the fields, ready for JSON."""
        return asdict(self)


def add_batch(
    root: str | Path,
    source: str | Path,
    *,
    new_classes: bool = False,
    classes: Sequence[str] | None = None,
    resize: tuple[int, int] | None = None,
) -> Added:
    """Add what a source holds to the data folder `root` as one batch; the folder is made when it does not exist.

    `source` is a folder of class folders, an .npz, a folder of idx files, "fashion-mnist" or "torchvision:NAME".
    `new_classes` allows classes that the data set does not know: they are appended, sorted among themselves.
    `classes` gives the order of the classes of a new data set, instead of the source's own. `resize` is the
    (height, width) that images of another size are scaled to, bilinear.

    Raises DataError with every problem of the source, after which nothing has changed, and BusyError when somebody else
    is adding to the same folder.

    >>> add_batch("data", "photos/", resize=(32, 32)).splits  # doctest: +SKIP
    {'train': 70, 'val': 10, 'test': 20}
    """
    # Photographs at their own size may not fit into memory.
    root, found = Path(root), read_source(source, resize if resize and can_scale(resize) else None)
    with _locked(root):
        current = _current(root)
        plan = _plan(current, found, str(source), Options(new_classes, classes, resize))
        return _store(root, current, plan)


def demo(root: str | Path) -> Added:
    """Write scikit-learn's 1797 digits (8 x 8, grey) to the data folder `root`: the same bytes on every machine.

    Pixels 0..16 become round(255 x / 16). Nothing changes when the digits are there already; a damaged file of theirs
    is written again. Raises DataError when the folder holds another data set.

    >>> demo("data").images  # doctest: +SKIP
    1797
    """
    root = Path(root)
    with _locked(root):
        plan = _plan(None, _digits(), "digits", Options())
        current = _current_or_damaged_digits(root, plan)
        if current is not None and plan.batch.digest not in _digests(current):
            fix = "name an empty folder, or add to this one with `nss data add`"
            raise DataError("the folder holds another data set", where=str(root), fix=fix)
        return _store(root, current, plan if current is None else replace(plan, data=current, added=False))


def natural_split(image: bytes) -> str:
    """Return the split of an image, "train", "val" or "test", as a function of its bytes (uint8 [c, h, w]) alone.

    >>> natural_split(bytes(64)) == natural_split(bytes(64))
    True
    """
    return SPLITS[_split_of(_key(image), None)]


def _key(image: bytes | memoryview) -> bytes:
    return hashlib.blake2b(image, digest_size=16, person=b"nss image").digest()


def _split_of(key: bytes, held_out: bool | None) -> int:
    """Return the split by share; of a source with its own test split, the share that would be test stays in train."""
    if held_out:
        return _TEST
    share = int.from_bytes(key[:8], "big") / 2**64
    if share < TEST_SHARE:
        return _TEST if held_out is None else _TRAIN
    return _VAL if share < TEST_SHARE + VAL_SHARE else _TRAIN


def _keys(images: Array) -> list[bytes]:
    return [_key(row.data) for row in np.ascontiguousarray(images).reshape(len(images), -1)]


def _plan(current: Dataset | None, source: Source, name: str, options: Options) -> _Plan:
    """Return what adding the source would make of the data set, or list every problem."""
    shape = current.image_shape if current else None
    classes, problems = merge_classes(current, source, options)
    blocks, misfits = fit_blocks(source.blocks, shape, options.resize)
    keys = [_keys(block.images) for block in blocks]
    problems += [*source.problems, *misfits, *conflicts(blocks, keys, source.classes), *_untrained(current, source)]
    if problems or not blocks:
        _refuse(name, problems or ["it holds no image"])
    known = _known(current)
    batch = _pack(source.classes, classes, blocks, _splits(blocks, keys, known))
    before = current.batches if current else ()
    added = batch.digest not in [other.digest for other in before]
    data = Dataset(classes, _shape_of(batch.images), (*before, batch) if added else before)
    seen = [known.get(key) for block_keys in keys for key in block_keys]
    changed = [was is not None and was[1] != label for was, label in zip(seen, batch.labels.tolist(), strict=True)]
    return _Plan(batch, data, added, len(seen) - seen.count(None), sum(changed))


def _untrained(current: Dataset | None, source: Source) -> list[str]:
    """Name the new classes of which the source itself holds out every image: no stage could learn them."""
    if source.problems:
        # What could not be read may be what there is to train on.
        return []
    counts: dict[bool, Counter[int]] = {True: Counter(), False: Counter()}
    for block in source.blocks:
        counts[bool(block.held_out)].update(block.labels.tolist())
    known = current.classes if current else ()
    hint = "check the names of the class folders, or the labels, in train and test"
    return [
        f"class {source.classes[label]!r} has no training image ({count} in test): {hint}"
        for label, count in sorted(counts[True].items())
        if label not in counts[False] and source.classes[label] not in known
    ]


def _pack(own: Sequence[str], classes: Sequence[str], blocks: Sequence[Block], splits: Sequence[int]) -> Batch:
    """Return the blocks, whose labels index the source's `own` classes, as one batch of the data set's classes."""
    index = {name: number for number, name in enumerate(classes)}
    # A class that is not in the data set's is one of a list of names that no image has.
    to_index = np.array([index.get(name, -1) for name in own])
    labels = torch.from_numpy(to_index[np.concatenate([block.labels for block in blocks])])
    images = torch.from_numpy(np.concatenate([block.images for block in blocks]))
    split = torch.tensor(splits, dtype=torch.uint8)
    return Batch(batch_digest(images, labels, split, classes), images, labels, split)


def _known(current: Dataset | None) -> dict[bytes, tuple[int, int]]:
    """Return split and latest label of each image in the data set."""
    known: dict[bytes, tuple[int, int]] = {}
    for batch in current.batches if current else ():
        keys = _keys(batch.images.numpy())
        known.update(zip(keys, zip(batch.split.tolist(), batch.labels.tolist(), strict=True), strict=True))
    return known


def _splits(blocks: Sequence[Block], keys: Sequence[list[bytes]], known: dict[bytes, tuple[int, int]]) -> list[int]:
    held_out = {key for block, rows in zip(blocks, keys, strict=True) if block.held_out for key in rows}
    splits = []
    for block, rows in zip(blocks, keys, strict=True):
        for key in rows:
            own = True if key in held_out else block.held_out
            splits.append(known[key][0] if key in known else _split_of(key, own))
    return splits


def _refuse(name: str, problems: Sequence[str]) -> NoReturn:
    shown = list(problems[:PROBLEMS_SHOWN])
    if len(problems) > len(shown):
        shown.append(f"... and {len(problems) - len(shown)} more")
    error = DataError(f"{len(problems)} problems in the source; nothing was added", shown, where=name, fix="mend them")
    error.problems = tuple(problems)
    raise error


def _store(root: Path, current: Dataset | None, plan: _Plan) -> Added:
    """Write the batch, then the description that makes it part of the data set, then sweep what kills left behind."""
    if plan.added:
        write_batch(root, plan.batch)
        write_description(root, plan.data)
    _sweep(root, set(_digests(plan.data)))
    batch, known = plan.batch, current.classes if current else ()
    return Added(
        digest=batch.digest,
        data=plan.data.digest,
        already_present=not plan.added,
        images=len(batch),
        splits={name: len(batch.part(name)) for name in SPLITS},
        new_classes=plan.data.classes[len(known) :],
        repeated=plan.repeated,
        relabelled=plan.relabelled,
    )


def _sweep(root: Path, named: set[str]) -> None:
    for entry in [*root.iterdir(), *(root / "batches").iterdir()]:
        batch = _BATCH_FILE.fullmatch(entry.name)
        if batch and batch[1] not in named:
            entry.unlink()
        elif _TEMPORARY.fullmatch(entry.name):
            shutil.rmtree(entry)


def _current(root: Path) -> Dataset | None:
    """Return the data set at `root`, None when there is none yet; refuse a folder of something else."""
    if (root / "dataset.json").exists():
        return load_data(root)
    strange = [entry for entry in root.iterdir() if not _is_ours(entry)] if root.is_dir() else []
    if strange or (root.exists() and not root.is_dir()):
        what = f"the folder is not empty and holds no data set ({strange[0].name})" if strange else "this is no folder"
        raise DataError(what, where=str(root), fix="name a new or empty folder")
    return None


def _is_ours(entry: Path) -> bool:
    return entry.name == "batches" or entry.name.startswith(".")


def _current_or_damaged_digits(root: Path, digits: _Plan) -> Dataset | None:
    """Return the data set at `root`; None where there is none, or where it is the digits with a damaged batch."""
    try:
        return _current(root)
    except DataError:
        path = root / "dataset.json"
        if not path.is_file() or read_json(path, DataError) != describe(digits.data):
            raise
        return None


def _digests(data: Dataset) -> list[str]:
    return [batch.digest for batch in data.batches]


def _shape_of(images: torch.Tensor) -> tuple[int, int, int]:
    return images.shape[1], images.shape[2], images.shape[3]


def _digits() -> Source:
    # scikit-learn takes a second to import, and only the demo needs it.
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    # Whole numbers, so that rounding is the same everywhere.
    images = ((pixels.astype(np.int64) * 255 + 8) // 16).astype(np.uint8).reshape(-1, 1, 8, 8)
    return Source(DIGITS, (Block("digits", images, labels.astype(np.int64)),))


@contextmanager
def _locked(root: Path) -> Iterator[None]:
    """Hold the lock beside the folder: inside, it would be part of what DVC versions."""
    path = root.parent / f".{root.name}.lock"
    try:
        root.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path, timeout=_LOCK_SECONDS):
            yield
    except Timeout:
        fix = "wait until it has ended and try again"
        raise BusyError("another process is adding to this data set", where=str(path), fix=fix) from None
    except OSError as problem:
        raise DataError(f"the data folder cannot be written ({problem})", where=str(root), fix="mend this") from None
