"""The packed data set: classes in a fixed order and immutable batches of images, loaded memory-mapped and checked.

On disk, `data/dataset.json` holds the classes in index order (append only), the image shape and the batches in order of
arrival; `data/batches/<digest>.safetensors` holds images uint8 [n, c, h, w], labels int64 [n] and split uint8 [n].
A batch is named by the digest of its content, so a batch that was altered is noticed.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from nss.errors import DataError
from nss.files import read_json, text_digest, write_json
from nss.pixels import joined_images
from nss.tensor_files import read_tensors, write_tensors

FORMAT = 1
SPLITS = ("train", "val", "test")
CLASS_LIMIT = 10_000
_KEYS = ("format", "classes", "image_shape", "batches")
_DIGEST = re.compile(r"[0-9a-f]{32}")
_RESTORE = "restore the folder (dvc checkout), or make it again with `nss data demo` or `nss data add SOURCE`"


class Batch:
    """One immutable batch, or a view of some of its rows that reads them when asked.

    `digest` names the stored batch, also in a view; `images` is uint8 [n, c, h, w], `labels` int64 [n] and `split`
    uint8 [n] (0 train, 1 val, 2 test). Without `rows` the tensors are those given (memory-mapped when loaded).

    >>> images, labels = torch.zeros(2, 1, 1, 1, dtype=torch.uint8), torch.tensor([0, 1])
    >>> len(Batch("0" * 32, images, labels, torch.tensor([0, 2], dtype=torch.uint8)).part("test"))
    1
    """

    __slots__ = ("_digest", "_images", "_labels", "_rows", "_split")

    def __init__(self, digest: str, images: Tensor, labels: Tensor, split: Tensor, rows: Tensor | None = None) -> None:
        self._digest, self._rows = digest, rows
        self._images, self._labels, self._split = images, labels, split

    @property
    def digest(self) -> str:
        """Digest of the whole stored batch, 32 hexadecimal characters."""
        return self._digest

    @property
    def images(self) -> Tensor:
        """Images, uint8 [n, c, h, w]: the stored tensor itself, or a copy of the rows of a view."""
        return self._pick(self._images)

    @property
    def labels(self) -> Tensor:
        """Class indices, int64 [n]."""
        return self._pick(self._labels)

    @property
    def split(self) -> Tensor:
        """Index into `SPLITS` of each image, uint8 [n]."""
        return self._pick(self._split)

    def __len__(self) -> int:
        return len(self._labels if self._rows is None else self._rows)

    def part(self, name: str) -> Batch:
        """Return a view of the rows whose split is `name`."""
        return self.pick(self.split == SPLITS.index(name))

    def pick(self, wanted: Tensor) -> Batch:
        """Return a view of the rows that are wanted, bool [n]."""
        rows = torch.nonzero(wanted).flatten() if self._rows is None else self._rows[wanted]
        return Batch(self._digest, self._images, self._labels, self._split, rows)

    def read(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Return images and labels of the rows from `start` to before `stop`, reading no others."""
        if self._rows is None:
            return self._images[start:stop], self._labels[start:stop]
        rows = self._rows[start:stop]
        return self._images[rows], self._labels[rows]

    def _pick(self, stored: Tensor) -> Tensor:
        return stored if self._rows is None else stored[self._rows]


@dataclass(frozen=True, eq=False)
class Dataset:
    """Labelled images in batches, in order of arrival.

    `classes` are the class names in index order, `image_shape` is (c, h, w), `part` is the split that this is a view of
    ("" for all). Images are only read from the mapped files when asked for.

    >>> data = load_data("data")  # doctest: +SKIP
    >>> data.split("train").images.shape  # doctest: +SKIP
    """

    classes: tuple[str, ...]
    image_shape: tuple[int, int, int]
    batches: tuple[Batch, ...]
    part: str = ""

    def __len__(self) -> int:
        return sum(len(batch) for batch in self.batches)

    @property
    def images(self) -> Tensor:
        """All images, uint8 [n, c, h, w]; a whole data set of one batch gives the mapped tensor, all else a copy."""
        if len(self.batches) == 1:
            return self.batches[0].images
        empty = torch.empty((0, *self.image_shape), dtype=torch.uint8)
        return torch.cat([empty, *(batch.images for batch in self.batches)])

    @property
    def labels(self) -> Tensor:
        """All class indices, int64 [n]."""
        return torch.cat([torch.empty(0, dtype=torch.int64), *(batch.labels for batch in self.batches)])

    @property
    def digest(self) -> str:
        """Digest of the content: classes, image shape, batches and the split that this is a view of."""
        return text_digest(json.dumps([*describe(self).values(), self.part]))

    def split(self, name: str) -> Dataset:
        """Return a view of the images of one split: "train", "val" or "test"; another name raises DataError."""
        if name not in SPLITS:
            raise DataError(f"{name!r} is no split", allowed=", ".join(SPLITS), fix="name one of them")
        if self.part:
            raise DataError(f"this is already the {self.part} split", fix="call split() on the whole data set")
        return replace(self, batches=tuple(batch.part(name) for batch in self.batches), part=name)

    def known_and_new(self, digests: Iterable[str]) -> tuple[Dataset, Dataset]:
        """Return views of the batches with these digests and of all others; a digest of no batch raises DataError."""
        known = set(digests)
        if missing := sorted(known - {batch.digest for batch in self.batches}):
            raise DataError("the data set lacks batches that are known", missing, fix=_RESTORE)
        parts = ([batch for batch in self.batches if (batch.digest in known) is side] for side in (True, False))
        old, new = (replace(self, batches=tuple(part)) for part in parts)
        return old, new

    def of_classes(self, classes: Sequence[str]) -> Dataset:
        """Return a view of the images of these classes; they must be the first of the data set, else DataError."""
        names = tuple(classes)
        if names != self.classes[: len(names)]:
            raise DataError(f"the classes {list(names)} are not the first", allowed=f"{list(self.classes)}, in order")
        if names == self.classes:
            return self
        batches = tuple(batch.pick(batch.labels < len(names)) for batch in self.batches)
        return replace(self, classes=names, batches=batches)

    def pixel_statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Return mean and standard deviation (of the population) of each channel, pixels scaled to 0..1.

        Counted in whole numbers, so order and batches make no difference. No image raises DataError.
        """
        counts = torch.zeros(self.image_shape[0], 256, dtype=torch.float64)
        for images, _ in iter_batches(self, 4096):
            channels = images.transpose(0, 1).flatten(1)
            counts += torch.stack([torch.bincount(channel, minlength=256) for channel in channels])
        if not len(self):
            raise DataError("there is no image to take statistics of", where=self.part or "the data set")
        values, shares = torch.arange(256, dtype=torch.float64) / 255, counts / counts.sum(1, keepdim=True)
        mean = shares @ values
        std = (shares * (values - mean[:, None]) ** 2).sum(1).sqrt()
        return tuple(mean.tolist()), tuple(std.tolist())

    def per_class_counts(self) -> dict[str, int]:
        """Return the number of images of each class, in index order, zeros included."""
        counts = torch.bincount(self.labels, minlength=len(self.classes))
        return dict(zip(self.classes, counts.tolist(), strict=True))


Data = Dataset | tuple[Tensor, Tensor] | Iterable[tuple[Tensor, Tensor]]


def train_part(data: Data) -> Data:
    """Return what to train on: of a whole Dataset its train split, anything else as it is."""
    return data.split("train") if isinstance(data, Dataset) and not data.part else data


def val_part(data: Data) -> Dataset | None:
    """Return what to judge on while training: of a whole Dataset its val split, if it has images; else None."""
    held_out = data.split("val") if isinstance(data, Dataset) and not data.part else None
    return held_out or None


def iter_batches(data: Data, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Return an iterator over (images, labels) in the order given, `size` rows at a time, fewer only in the last.

    `data` is a Dataset (streamed from its mapped batches), a pair of tensors, or any iterable of such pairs, for
    example a DataLoader, whose own batches may have any size. Images are passed on as they are, labels become
    int64 [n] on the CPU. What is none of these raises DataError, and so does an iterator that was read before.

    >>> [len(labels) for _, labels in iter_batches((torch.zeros(5, 1, 2, 2), torch.arange(5)), 2)]
    [2, 2, 1]
    """
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise DataError(f"the batch size is {size!r}", allowed="a whole number of at least 1")
    return _regroup(_pieces(data, size), size)


def batch_digest(images: Tensor, labels: Tensor, split: Tensor, classes: Sequence[str]) -> str:
    """Return the digest that names a batch: of its shape, images, labels, splits and the names of the classes it uses.

    `classes` are the names of the whole data set in index order. 32 hexadecimal characters (BLAKE2b).
    """
    used = [classes[index] for index in torch.unique(labels).tolist()]
    digest = hashlib.blake2b(json.dumps([list(images.shape), used]).encode(), digest_size=16)
    digest.update(images.numpy().reshape(-1).data)
    digest.update(labels.numpy().astype("<i8").data)
    digest.update(split.numpy().reshape(-1).data)
    return digest.hexdigest()


def batch_path(root: Path, digest: str) -> Path:
    """Return the file of a batch."""
    return root / "batches" / f"{digest}.safetensors"


def write_batch(root: Path, batch: Batch) -> None:
    """Write one batch in one rename. It belongs to the data set only once dataset.json names it."""
    tensors = {"images": batch.images, "labels": batch.labels, "split": batch.split}
    write_tensors(batch_path(root, batch.digest), tensors, {"format": FORMAT})


def write_description(root: Path, data: Dataset) -> None:
    """Write dataset.json in one rename: from then on the data set is what `data` says."""
    write_json(root / "dataset.json", describe(data))


def describe(data: Dataset) -> dict[str, Any]:
    """Return the content of dataset.json: format, classes, image_shape and the digests of the batches."""
    digests = [batch.digest for batch in data.batches]
    return dict(zip(_KEYS, (FORMAT, list(data.classes), list(data.image_shape), digests), strict=True))


def load_data(path: str | Path, verify: bool = True) -> Dataset:
    """Load a data folder, memory-mapped; with `verify` each batch is hashed against its name.

    Raises DataError naming the file when dataset.json or a batch is missing, damaged or was altered.

    >>> data = load_data("data")  # doctest: +SKIP
    """
    root = Path(path)
    if not (root / "dataset.json").is_file():
        raise DataError("there is no data set here: dataset.json is missing", where=str(root), fix=_RESTORE)
    content = read_json(root / "dataset.json", DataError)
    if problems := _problems_of(content):
        where = str(root / "dataset.json")
        raise DataError("dataset.json is not what it should be", problems, where=where, fix=_RESTORE)
    classes, shape = tuple(content["classes"]), tuple(content["image_shape"])
    batches = tuple(_load_batch(root, digest, classes, shape, verify) for digest in content["batches"])
    return Dataset(classes, cast("tuple[int, int, int]", shape), batches)


def status(root: str | Path) -> dict[str, Any]:
    """Return what a data folder holds, ready for JSON.

    Keys: digest, classes, image_shape, images {split: n}, batches [{digest, images, train, val, test}],
    per_class {class: {split: n}}. Raises DataError as `load_data` does.
    """
    data = load_data(root)
    parts = {name: data.split(name) for name in SPLITS}
    counts = {name: part.per_class_counts() for name, part in parts.items()}
    return {
        "digest": data.digest,
        "classes": list(data.classes),
        "image_shape": list(data.image_shape),
        "images": {name: len(part) for name, part in parts.items()},
        "batches": [
            {"digest": batch.digest, "images": len(batch), **{name: len(batch.part(name)) for name in SPLITS}}
            for batch in data.batches
        ],
        "per_class": {label: {name: counts[name][label] for name in SPLITS} for label in data.classes},
    }


def class_name_problem(name: object) -> str:
    """Return why `name` cannot be a class name, or "" when it can."""
    if not isinstance(name, str) or not name:
        return f"class name {name!r} is no text"
    if name != name.strip() or not name.isprintable():
        return f"class name {name!r} has space around it or a character that cannot be printed"
    return ""


def _problems_of(content: Any) -> list[str]:
    if not isinstance(content, dict) or set(content) != set(_KEYS):
        return [f"it must be an object with exactly the keys {', '.join(_KEYS)}"]
    if type(content["format"]) is not int or content["format"] != FORMAT:
        return [f"format is {content['format']!r}; this version reads format {FORMAT}"]
    return [
        *_class_problems(content["classes"]),
        *_shape_problems(content["image_shape"]),
        *_digest_problems(content["batches"]),
    ]


def _class_problems(classes: Any) -> list[str]:
    if not isinstance(classes, list) or not 2 <= len(classes) <= CLASS_LIMIT:
        return [f"classes must be a list of 2 to {CLASS_LIMIT} names"]
    problems = [problem for problem in map(class_name_problem, classes) if problem]
    if not problems and len(set(classes)) < len(classes):
        return [f"class {name!r} is listed twice" for name in sorted(set(classes)) if classes.count(name) > 1]
    return problems


def _shape_problems(shape: Any) -> list[str]:
    whole = isinstance(shape, list) and len(shape) == 3 and all(type(side) is int and side > 0 for side in shape)
    if whole and shape[0] in (1, 3):
        return []
    return [f"image_shape is {shape!r}; it must be [channels (1 or 3), height, width]"]


def _digest_problems(digests: Any) -> list[str]:
    if not isinstance(digests, list) or not digests:
        return ["batches must be a list of at least one digest"]
    if wrong := [digest for digest in digests if not (isinstance(digest, str) and _DIGEST.fullmatch(digest))]:
        return [f"batch {digest!r} is no digest of 32 hexadecimal characters" for digest in wrong]
    return [] if len(set(digests)) == len(digests) else ["a batch is listed twice"]


def _load_batch(root: Path, digest: str, classes: tuple[str, ...], shape: tuple[int, ...], verify: bool) -> Batch:
    path = batch_path(root, digest)
    tensors, meta = read_tensors(path, DataError)
    if problem := _batch_problem(tensors, meta, len(classes), shape):
        raise DataError(f"batch {digest} is not what it should be: {problem}", where=str(path), fix=_RESTORE)
    batch = Batch(digest, tensors["images"], tensors["labels"], tensors["split"])
    if verify and batch_digest(batch.images, batch.labels, batch.split, classes) != digest:
        what = f"batch {digest} was altered: its content, or the names of its classes, no longer give its digest"
        raise DataError(what, where=str(path), fix=_RESTORE)
    return batch


def _batch_problem(tensors: dict[str, Tensor], meta: Any, classes: int, shape: tuple[int, ...]) -> str:
    if meta != {"format": FORMAT} or set(tensors) != {"images", "labels", "split"}:
        return f"it must hold images, labels and split in format {FORMAT}"
    images, labels, split = tensors["images"], tensors["labels"], tensors["split"]
    n = len(labels) if labels.ndim else 0
    if n == 0 or images.dtype != torch.uint8 or tuple(images.shape) != (n, *shape):
        return f"images are {images.dtype} {list(images.shape)}, not uint8 {[n, *shape]}"
    if labels.dtype != torch.int64 or labels.ndim != 1 or int(labels.min()) < 0 or int(labels.max()) >= classes:
        return f"labels must be int64 in 0..{classes - 1}"
    if split.dtype != torch.uint8 or tuple(split.shape) != (n,) or int(split.max()) >= len(SPLITS):
        return "split must be uint8 in 0..2, one an image"
    return ""


def _pieces(data: Data, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    if isinstance(data, Dataset):
        for batch in data.batches:
            for start in range(0, len(batch), size):
                yield batch.read(start, start + size)
    else:
        pair, empty = isinstance(data, tuple) and len(data) == 2 and isinstance(data[0], Tensor), True
        for piece in [data] if pair else cast("Iterable[object]", data):
            empty = False
            yield _checked(piece)
        if empty and isinstance(data, Iterator):
            fix = "give a list of batches, a DataLoader or a Dataset: a generator can be read only once"
            raise DataError("the iterator of batches is empty, or was read before", where="data", fix=fix)


def _checked(piece: object) -> tuple[Tensor, Tensor]:
    if not (isinstance(piece, list | tuple) and len(piece) == 2 and all(isinstance(part, Tensor) for part in piece)):
        allowed = "a Dataset, a pair (images, labels) of tensors, or an iterable of such pairs"
        raise DataError(f"the data holds {type(piece).__name__}, not images and labels", allowed=allowed)
    images, labels = piece
    if images.ndim < 2 or labels.ndim != 1 or len(images) != len(labels) or labels.is_floating_point():
        what = f"images {list(images.shape)} and labels {labels.dtype} {list(labels.shape)} do not fit each other"
        raise DataError(what, allowed="images [n, c, h, w] and whole-number labels [n]")
    return images, labels.cpu().long()


def _regroup(pieces: Iterator[tuple[Tensor, Tensor]], size: int) -> Iterator[tuple[Tensor, Tensor]]:
    held: list[tuple[Tensor, Tensor]] = []
    missing = size
    for images, labels in pieces:
        start = 0
        while len(labels) - start >= missing:
            yield _join([*held, (images[start : start + missing], labels[start : start + missing])])
            held, start, missing = [], start + missing, size
        if start < len(labels):
            held.append((images[start:], labels[start:]))
            missing -= len(labels) - start
    if held:
        yield _join(held)


def _join(pieces: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    if len(pieces) == 1:
        return pieces[0]
    return joined_images([images for images, _ in pieces]), torch.cat([labels for _, labels in pieces])
