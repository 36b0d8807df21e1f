"""Readers of image sources: a folder of class folders, an .npz, idx files, or a torchvision data set by name.

A reader changes nothing and knows nothing of the data set that the images will join. It returns a `Source`: blocks of
images of one shape, labels that index the source's own classes, and every problem found on the way.
"""

from __future__ import annotations

import gzip
import math
import os
import unicodedata
import zipfile
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from nss.data import class_name_problem
from nss.errors import DataError
from nss.images import read_image, scale

Array = NDArray[Any]
T = TypeVar("T")

DIGITS = tuple("0123456789")
FASHION = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
# torchvision's data sets that hold one label an image, and our class names where theirs are missing or unhandy.
TORCHVISION: dict[str, tuple[str, ...] | None] = {
    "MNIST": DIGITS, "FashionMNIST": FASHION, "KMNIST": None, "USPS": DIGITS,
    "CIFAR10": None, "CIFAR100": None, "SVHN": DIGITS, "STL10": None,
}  # fmt: skip
ALLOWED = "a folder of class folders, an .npz, a folder of idx files, fashion-mnist, or torchvision:NAME"
_FOLDERS = "CLASS/IMAGE, or train/CLASS/IMAGE and test/CLASS/IMAGE"
# What the folder of held-out images is called, the first that is there.
_HELD_OUT = ("test", "val", "valid", "validation")
_DEBIAN_FASHION = Path("/usr/share/datasets/fashion-mnist")
_IDX = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
_NPZ = "x, y or x_train, y_train, x_test, y_test, and classes beside them if wanted"


@dataclass(frozen=True, eq=False)
class Block:
    """Images of one shape that are named together: one file of a folder, or one array.

    `images` is uint8 [n, c, h, w], `labels` int64 [n] into the classes of the source; `held_out` says whether the
    source itself puts them in its test split, None when it has none.
    """

    name: str
    images: Array
    labels: Array
    held_out: bool | None = None

    def place(self, row: int) -> str:
        """Return how to name one image in a message."""
        return self.name if len(self.images) == 1 else f"{self.name}[{row}]"


@dataclass(frozen=True, eq=False)
class Source:
    """What a source holds: its classes in its own order, the images that could be read, and what is wrong with it.

    `unused` are the classes that an array of names lists though no image has them.
    """

    classes: tuple[str, ...]
    blocks: tuple[Block, ...]
    problems: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()


def read_source(source: str | Path, size: tuple[int, int] | None = None) -> Source:
    """Read a source of any kind; raises DataError when there is nothing of a known kind at all.

    size: (height, width) that image files are scaled to, each as it is read.

    >>> read_source("photos/").classes  # doctest: +SKIP
    ('cat', 'dog')
    """
    text, path = str(source), _expanded(Path(source))
    if text.startswith("torchvision:"):
        return _read_torchvision(text.removeprefix("torchvision:"))
    if text == "fashion-mnist" and not path.exists():
        path = _DEBIAN_FASHION
        if not path.exists():
            fix = "install Debian's package dataset-fashion-mnist, or use torchvision:FashionMNIST"
            raise DataError("the files of fashion-mnist are not installed", where=str(path), fix=fix)
    try:
        return _read_path(path, size)
    except OSError as problem:
        raise DataError(
            f"the source cannot be read ({problem.strerror})", where=text, fix="check its permissions"
        ) from None


def _expanded(path: Path) -> Path:
    try:
        return path.expanduser()
    except RuntimeError:
        raise DataError("there is no such user's home folder", where=str(path), fix="name the folder") from None


def _read_path(path: Path, size: tuple[int, int] | None) -> Source:
    if path.is_dir():
        names = {entry.name.removesuffix(".gz") for entry in path.iterdir()}
        return _read_idx(path) if names & set(_IDX) else _read_folder(path.resolve(), size)
    if path.is_file() and path.suffix == ".npz":
        return _read_npz(path)
    what = "this is neither a folder nor an .npz" if path.exists() else "the source does not exist"
    raise DataError(what, where=str(path), allowed=ALLOWED, fix="name one of these")


def _read_folder(root: Path, size: tuple[int, int] | None) -> Source:
    problems: list[str] = []
    found: list[tuple[str, Path, bool | None]] = []
    for folder, held_out in _split_folders(root, problems):
        for entry in _entries(folder, root, problems):
            if entry.is_dir():
                found.append((unicodedata.normalize("NFC", entry.name), entry, held_out))
            else:
                problems.append(f"{_shown(entry, root)}: a file outside the class folders")
    classes = tuple(sorted({name for name, _, _ in found}))
    problems += [problem for problem in map(class_name_problem, classes) if problem]
    index = {name: number for number, name in enumerate(classes)}
    blocks: list[Block] = []
    for name, folder, held_out in found:
        entries = _class_entries(folder, root, problems)
        for place, image in _read_images(entries, root, size, problems):
            blocks.append(Block(place, image, np.array([index[name]]), held_out))
    if not found:
        problems.append(f"no class folder; allowed: {_FOLDERS}")
    return Source(classes, tuple(blocks), tuple(problems))


def _split_folders(root: Path, problems: list[str]) -> Iterable[tuple[Path, bool | None]]:
    """Return the folders that hold class folders: the root, or its train/ and the one of what is held out.

    That is test/, or val/ where there is no test/.
    """
    train, *others = (root / name for name in ("train", *_HELD_OUT))
    held_out = next(filter(_holds_folders, others), None)
    if held_out is None or not _holds_folders(train):
        return [(root, None)]
    for entry in _entries(root, root, problems):
        if entry not in (train, held_out):
            hint = "validation images are chosen from train by their content"
            more = ": move these there" if entry in others else ""
            problems.append(f"{entry.name}: an unknown split; allowed: train, {held_out.name} ({hint}{more})")
    return [(train, False), (held_out, True)]


def _holds_folders(folder: Path) -> bool:
    return folder.is_dir() and any(entry.is_dir() for entry in _visible(folder))


def _class_entries(folder: Path, root: Path, problems: list[str]) -> list[Path]:
    entries = _entries(folder, root, problems)
    if not entries:
        problems.append(f"{_shown(folder, root)}: a class folder without images")
    return entries


def _read_images(
    entries: Sequence[Path], root: Path, size: tuple[int, int] | None, problems: list[str]
) -> Iterable[tuple[str, Array]]:
    """Yield the name of each image that can be read, and its pixels [1, c, h, w]."""
    for entry in entries:
        name = _shown(entry, root)
        image = _attempt(problems, name, _read_entry, entry)
        if image is not None:
            yield name, scale(image[None], size) if size else image[None]


def _read_entry(entry: Path) -> Array:
    if entry.is_dir():
        raise ValueError(f"a folder inside a class folder; allowed: {_FOLDERS}")
    if not entry.is_file():
        raise ValueError("not a regular file")
    return read_image(entry)


def _shown(entry: Path, root: Path) -> str:
    """Return the path inside the source; bytes that are no text are escaped, so that it can be printed."""
    return str(entry.relative_to(root)).encode("utf-8", "backslashreplace").decode()


def _visible(folder: Path) -> list[Path]:
    return sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))


def _entries(folder: Path, root: Path, problems: list[str]) -> list[Path]:
    """Return what is visible in a folder; links that are broken or lead out of the source are left out, as problems."""
    inside = []
    for entry in _visible(folder):
        target = Path(os.path.realpath(entry))
        if target.exists() and target.is_relative_to(root):
            inside.append(entry)
        else:
            problems.append(f"{_shown(entry, root)}: a link that is broken or leads out of the source")
    return inside


def _read_npz(path: Path) -> Source:
    arrays = _npz_arrays(path)
    pairs = sorted(set(arrays) - {"classes"})
    if pairs == ["x", "y"]:
        parts = [_Part("x", arrays["x"], "y", arrays["y"], None)]
    elif pairs == ["x_test", "x_train", "y_test", "y_train"]:
        parts = [
            _Part(f"x_{name}", arrays[f"x_{name}"], f"y_{name}", arrays[f"y_{name}"], name == "test")
            for name in ("train", "test")
        ]
    else:
        what = f"the file holds the arrays {', '.join(arrays) or 'none'}; another split or name is unknown"
        raise DataError(what, where=str(path), allowed=_NPZ, fix="rename or remove what is not among these")
    problems: list[str] = []
    names = None
    if "classes" in arrays:
        names = _attempt(problems, "classes", _class_names, arrays["classes"])
    source = _array_source(parts, names, problems)
    # With its names refused, nobody knows which classes the labels mean.
    return Source((), (), source.problems) if "classes" in arrays and names is None else source


def _npz_arrays(path: Path) -> dict[str, Array]:
    if not zipfile.is_zipfile(path):
        raise DataError("the file is not a whole .npz", where=str(path), fix="write it with numpy.savez_compressed")
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    # numpy, zipfile and the decompressors raise nearly anything on damaged files, MemoryError for a false shape too.
    except Exception as problem:
        what = f"the file cannot be read ({problem}); arrays of Python objects are never unpickled"
        raise DataError(what, where=str(path), fix="write plain arrays with numpy.savez_compressed") from None
    strange = [name for name, array in arrays.items() if not isinstance(array, np.ndarray)]
    if strange:
        raise DataError(f"{', '.join(strange)} in the file is no array", where=str(path), allowed=_NPZ)
    return arrays


def _class_names(array: Array) -> tuple[str, ...]:
    if array.ndim != 1 or array.dtype.kind != "U":
        raise ValueError(f"{array.dtype} {list(array.shape)}; allowed: a list of texts")
    names = tuple(unicodedata.normalize("NFC", name) for name in array.tolist())
    wrong = [problem for problem in map(class_name_problem, names) if problem]
    twice = [f"{name!r} is listed twice" for name in sorted(set(names)) if names.count(name) > 1]
    if wrong or twice:
        raise ValueError("; ".join(wrong + twice))
    return names


def _read_idx(folder: Path) -> Source:
    problems: list[str] = []
    arrays = [_attempt(problems, name, _idx_array, folder, name) for name in _IDX]
    parts = [
        _Part(_IDX[at], images, _IDX[at + 1], labels, at == 2)
        for at in (0, 2)
        if (images := arrays[at]) is not None and (labels := arrays[at + 1]) is not None
    ]
    fashion = folder.resolve().name.lower().replace("-", "").replace("_", "") == "fashionmnist"
    return _array_source(parts, FASHION if fashion else None, problems)


def _idx_array(folder: Path, name: str) -> Array:
    packed, plain = folder / f"{name}.gz", folder / name
    try:
        content = gzip.decompress(packed.read_bytes()) if packed.exists() else plain.read_bytes()
    except (OSError, EOFError, zlib.error) as problem:
        raise ValueError(f"the file is missing or damaged ({problem})") from None
    axes = 3 if "idx3" in name else 1
    start = 4 + 4 * axes
    shape = tuple(int.from_bytes(content[at : at + 4], "big") for at in range(4, start, 4))
    if content[:4] != bytes([0, 0, 8, axes]) or len(content) != start + math.prod(shape):
        raise ValueError(f"the file is not a whole idx{axes} file of unsigned bytes")
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


def _read_torchvision(name: str) -> Source:
    """Read a data set through torchvision's own loader, which downloads it into the cache the first time."""
    if name not in TORCHVISION:
        raise DataError(
            f"{name!r} is no torchvision data set we read", where="torchvision:", allowed=", ".join(TORCHVISION)
        )
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nss" / "torchvision"
    # torchvision takes seconds to import, and no other source needs it.
    import torchvision

    loader = getattr(torchvision.datasets, name)
    try:
        loaded = [loader(root=str(cache), download=True, **_split_argument(name, test)) for test in (False, True)]
    except (OSError, RuntimeError) as problem:
        fix = f"check the network and try again, or put the files of {name} into {cache}, or add an .npz instead"
        reason = " ".join(str(problem).split())
        what = f"torchvision could not download or read {name} ({reason})"
        raise DataError(what, where=f"torchvision:{name}", fix=fix) from None
    parts = [
        _Part(f"{name} {part}", np.asarray(data.data), f"{name} {part} labels", _targets(data), part == "test")
        for part, data in zip(("train", "test"), loaded, strict=True)
    ]
    return _array_source(parts, TORCHVISION[name] or tuple(loaded[0].classes), [])


def _split_argument(name: str, test: bool) -> dict[str, Any]:
    return {"split": "test" if test else "train"} if name in ("SVHN", "STL10") else {"train": not test}


def _targets(data: Any) -> Array:
    return np.asarray(data.targets if hasattr(data, "targets") else data.labels)


@dataclass(frozen=True, eq=False)
class _Part:
    """An array of images and its array of labels, as a source gives them."""

    x_name: str
    x: Array
    y_name: str
    y: Array
    held_out: bool | None


def _array_source(parts: Sequence[_Part], names: tuple[str, ...] | None, problems: list[str]) -> Source:
    checked = []
    for part in parts:
        images = _attempt(problems, part.x_name, _array_images, part.x)
        labels = _attempt(problems, part.y_name, _array_labels, part.y, names)
        if images is not None and labels is not None:
            if len(images) == len(labels):
                checked.append(Block(part.x_name, images, labels, part.held_out))
            else:
                problems.append(f"{part.x_name}: {len(images)} images, but {len(labels)} labels in {part.y_name}")
    values = np.unique(np.concatenate([block.labels for block in checked])) if checked else np.array([], np.int64)
    if names is not None:
        used = set(values.tolist())
        # Where an array was refused, its labels are not known.
        unused = () if problems else tuple(name for index, name in enumerate(names) if index not in used)
        return Source(names, tuple(checked), tuple(problems), unused)
    # Without names each label is its own name, in the order of the numbers: 2 before 10.
    blocks = (
        Block(block.name, block.images, np.searchsorted(values, block.labels), block.held_out) for block in checked
    )
    return Source(tuple(str(value) for value in values.tolist()), tuple(blocks), tuple(problems))


def _array_images(array: Array) -> Array:
    """Return images as uint8 [n, c, h, w] from uint8 or floats in 0..1, [n, h, w], [n, h, w, c] or [n, c, h, w]."""
    if array.ndim not in (3, 4) or 0 in array.shape:
        raise ValueError(f"shape {list(array.shape)}; allowed: [n, h, w], [n, h, w, c] or [n, c, h, w], not empty")
    pixels = array if array.dtype == np.uint8 else _float_pixels(array)
    if pixels.ndim == 3:
        return np.ascontiguousarray(pixels[:, None])
    first, last = pixels.shape[1] in (1, 3), pixels.shape[3] in (1, 3)
    if first == last:
        raise ValueError(f"shape {list(array.shape)} does not say where its channels are; allowed: one axis of 1 or 3")
    return np.ascontiguousarray(pixels if first else pixels.transpose(0, 3, 1, 2))


def _float_pixels(array: Array) -> Array:
    """Return floats in 0..1 as the nearest of the 256 levels, round(255 x); refuse any other number."""
    if array.dtype.kind != "f":
        raise ValueError(f"dtype {array.dtype}; allowed: uint8, or floats in 0..1")
    for wrong, name in ((np.isnan(array), "NaN"), (~((array >= 0) & (array <= 1)), "values outside 0..1")):
        rows = np.unique(np.nonzero(wrong)[0])
        if len(rows):
            raise ValueError(
                f"{len(rows)} images hold {name}, first image {rows[0]}; allowed: uint8, or floats in 0..1"
            )
    return np.rint(array.astype(np.float64) * 255).astype(np.uint8)


def _array_labels(array: Array, names: tuple[str, ...] | None) -> Array:
    labels = array[:, 0] if array.ndim == 2 and array.shape[1] == 1 else array
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        raise ValueError(f"{array.dtype} {list(array.shape)}; allowed: whole numbers [n]")
    highest = len(names) - 1 if names is not None else np.iinfo(np.int64).max
    wrong = np.nonzero((labels < 0) | (labels > highest))[0]
    if len(wrong):
        allowed = f"0..{highest}" if names is not None else "0 and above"
        rows = f"{len(wrong)} images have an unknown label, first {labels[wrong[0]]} of image {wrong[0]}"
        raise ValueError(f"{rows}; allowed: {allowed}")
    return labels.astype(np.int64)


def _attempt(problems: list[str], name: str, function: Callable[..., T], *arguments: Any) -> T | None:
    """Call a reader; when it refuses, note why under `name` and return None."""
    try:
        return function(*arguments)
    except ValueError as reason:
        problems.append(f"{name}: {reason}")
        return None
