"""Fitting a source to a data set: one order of classes, one image shape, no image with two labels."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nss.data import CLASS_LIMIT, Dataset, class_name_problem
from nss.images import scale
from nss.sources import Block, Source

Array = NDArray[Any]
LARGEST = 4096
"""side that images may be scaled to: at most 48 MB for an image"""


@dataclass(frozen=True)
class Options:
    """What the caller of `nss.ingest.add_batch` allows: see there."""

    new_classes: bool = False
    classes: Sequence[str] | None = None
    resize: tuple[int, int] | None = None


def merge_classes(current: Dataset | None, source: Source, options: Options) -> tuple[tuple[str, ...], list[str]]:
    """Return the classes with those of the source, and problems: the known keep their index, the new follow, sorted."""
    problems = []
    if current is None:
        classes = source.classes if options.classes is None else tuple(options.classes)
        problems += _order_problems(classes, source.classes)
    else:
        unknown = sorted(set(source.classes) - set(current.classes))
        classes = (*current.classes, *unknown)
        if options.classes is not None:
            problems.append("an order of classes is given, but the data set has one already; leave it out")
        if unknown and not options.new_classes:
            remedy = "allow it with new_classes=True (--new-classes)"
            problems += [f"class {name!r} is unknown to the data set; {remedy}" for name in unknown]
    known = set(current.classes) if current else set()
    problems += [f"class {name!r} is listed, but no image has it" for name in source.unused if name not in known]
    if len(classes) > CLASS_LIMIT:
        problems.insert(0, f"{len(classes)} classes; allowed: at most {CLASS_LIMIT}")
    if len(classes) == 1:
        problems.append(f"{classes[0]!r} is the only class; allowed: at least 2")
    return classes, problems


def _order_problems(classes: tuple[str, ...], found: tuple[str, ...]) -> list[str]:
    problems = [problem for problem in map(class_name_problem, classes) if problem]
    problems += [f"class {name!r} is missing in the given order" for name in found if name not in set(classes)]
    problems += [f"class {name!r} of the given order has no image" for name in classes if name not in set(found)]
    return problems + [f"class {name!r} is listed {n} times" for name, n in Counter(classes).items() if n > 1]


def can_scale(size: tuple[int, int]) -> bool:
    """Say whether images may be scaled to this (height, width).

    >>> can_scale((224, 224)), can_scale((0, 5000))
    (True, False)
    """
    return 1 <= min(size) <= max(size) <= LARGEST


def fit_blocks(
    blocks: Sequence[Block], shape: tuple[int, int, int] | None, resize: tuple[int, int] | None
) -> tuple[list[Block], list[str]]:
    """Return the blocks with one shape, that of the data set, and name those that cannot have it.

    A new data set is RGB if any image is, and has the most frequent size, the first of equally frequent ones.
    """
    if not blocks:
        return [], []
    if resize is not None and not can_scale(resize):
        return [], [f"resize is {resize}; allowed: height and width from 1 to {LARGEST}"]
    if resize is not None and shape is not None and resize != shape[1:]:
        return [], [f"resize is {resize}, but the images of the data set are {_size(shape[1:])}"]
    channels = shape[0] if shape else max(block.images.shape[1] for block in blocks)
    size = resize or (shape[1:] if shape else _most_frequent_size(blocks))
    fitting, problems = [], []
    for block in blocks:
        wrong = _misfit(block.images, channels, size, resize is not None)
        if wrong:
            problems.append(f"{block.name}: {wrong}")
        else:
            images = scale(block.images, size)
            colours = images if images.shape[1] == channels else np.repeat(images, channels, axis=1)
            fitting.append(replace(block, images=colours))
    return fitting, problems


def _misfit(images: Array, channels: int, size: tuple[int, int], may_scale: bool) -> str:
    if images.shape[1] > channels:
        return "the image is RGB, those of the data set are grey"
    height, width = images.shape[2:]
    if (height, width) != size and not may_scale:
        return f"the image is {height} x {width}, those of the data set are {_size(size)}; or scale it (--resize)"
    return ""


def _most_frequent_size(blocks: Sequence[Block]) -> tuple[int, int]:
    counts: Counter[tuple[int, int]] = Counter()
    for block in blocks:
        counts[block.images.shape[2], block.images.shape[3]] += len(block.images)
    return counts.most_common(1)[0][0]


def _size(size: Sequence[int]) -> str:
    return f"{size[0]} x {size[1]} (height x width)"


def conflicts(blocks: Sequence[Block], keys: Sequence[list[bytes]], classes: Sequence[str]) -> list[str]:
    """Name the images that are the same byte for byte but have different labels."""
    first: dict[bytes, tuple[int, str]] = {}
    problems = []
    for block, block_keys in zip(blocks, keys, strict=True):
        for row, (key, label) in enumerate(zip(block_keys, block.labels.tolist(), strict=True)):
            other, place = first.setdefault(key, (label, block.place(row)))
            if other != label:
                labels = f"{classes[label]!r}, but {classes[other]!r}"
                problems.append(f"{block.place(row)}: the same image as {place}, labelled {labels} there")
    return problems
