"""Pictures of what stages found, readable from two to a hundred categories. No global state: each returns a Figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

Groups = Mapping[str, Sequence[str]]
"""{slice name: its categories}"""

# Names of classes are no formulas.
matplotlib.rcParams["text.parse_math"] = False
_GREY, _DARK, _BAD = "#d9dde3", "#4a5260", "#c8403c"
# Above these numbers, figures in cells and one bar for each slice are too small to read.
_MOST_CELL_TEXTS, _MOST_BARS = 12, 8


def dendrogram(linkage: np.ndarray, classes: Sequence[str], slices: Groups) -> Figure:
    """Draw how categories merge, branches and labels of one semantic slice in one colour.

    linkage: [classes - 1, 4], scipy's format.
    classes: category names in index order.

    >>> dendrogram(np.array([[0, 1, 0.3, 2]]), ["cat", "dog"], {"slice-0": ["cat", "dog"]}).axes[0].get_xlabel()
    'distance of critical neurons'
    """
    count = len(classes)
    figure, axes = _figure(7.5, max(2.4, 0.26 * count + 1.3))
    owner = {category: name for name, categories in slices.items() for category in categories}
    colours = _colours(slices)
    order = leaf_order(linkage, count)
    at = {leaf: (0.0, float(row)) for row, leaf in enumerate(order)}
    below = {leaf: {owner.get(classes[leaf])} for leaf in range(count)}
    for row, (left, right, height, _) in enumerate(linkage):
        node, pair = count + row, (int(left), int(right))
        below[node] = below[pair[0]] | below[pair[1]]
        (x0, y0), (x1, y1) = at[pair[0]], at[pair[1]]
        single = len(below[node]) == 1
        colour = colours.get(next(iter(below[node])), _DARK) if single else _DARK
        axes.plot([x0, height, height, x1], [y0, y0, y1, y1], color=colour, linewidth=2 if single else 1.2)
        at[node] = (float(height), (y0 + y1) / 2)
    axes.set_yticks(range(count), [classes[leaf] for leaf in order], fontsize=_label_size(count))
    for label, leaf in zip(axes.get_yticklabels(), order, strict=True):
        label.set_color(colours.get(owner.get(classes[leaf]), _DARK))
    axes.set_ylim(count - 0.5, -0.5)
    axes.set_xlim(left=0)
    axes.set_xlabel("distance of critical neurons")
    axes.set_title(f"{count} categories in {len(slices)} semantic slices", loc="left")
    _bare(axes, "left", "top", "right")
    return figure


def overlap(distances: np.ndarray, linkage: np.ndarray, classes: Sequence[str], slices: Groups) -> Figure:
    """Draw the overlap of critical neurons, 1 - distance, between categories; semantic slices are framed.

    distances: [classes, classes], 0..1.
    """
    order = leaf_order(linkage, len(classes))
    figure, axes = _matrix(1 - distances[np.ix_(order, order)], [classes[leaf] for leaf in order], "Greys", "{:.2f}")
    owner = {category: name for name, categories in slices.items() for category in categories}
    names = [owner.get(classes[leaf]) for leaf in order]
    for start, stop, name in _spans(names):
        frame = Rectangle((start - 0.5, start - 0.5), stop - start, stop - start, fill=False, linewidth=2.2)
        frame.set_edgecolor(_colours(slices).get(name, _DARK))
        axes.add_patch(frame)
    axes.set_title("overlap of critical neurons", loc="left")
    return figure


def kept_neurons(kept: Mapping[str, Mapping[str, int]], total: Mapping[str, int], verb: str = "kept") -> Figure:
    """Draw neurons kept (or what else was done with them) by layer, slices against all there are.

    kept: {slice: {layer: neurons}}; from nine slices on, their mean with the range from least to most is drawn.
    total: {layer: neurons}.
    """
    layers = list(total)
    figure, axes = _figure(max(6.0, 0.75 * len(layers) + 2), 4.2)
    at = np.arange(len(layers))
    axes.bar(at, [total[layer] for layer in layers], width=0.9, color=_GREY, label="all neurons")
    if len(kept) > _MOST_BARS:
        table = np.array([[row[layer] for layer in layers] for row in kept.values()])
        mean = table.mean(axis=0)
        spread = np.stack([mean - table.min(axis=0), table.max(axis=0) - mean])
        axes.bar(at, mean, width=0.5, yerr=spread, capsize=3, label=f"mean and range of {len(kept)} slices")
    else:
        width = 0.8 / max(1, len(kept))
        for place, (name, row) in enumerate(kept.items()):
            shift = (place - (len(kept) - 1) / 2) * width
            colour = _colours(kept)[name]
            axes.bar(at + shift, [row[layer] for layer in layers], width=width * 0.9, color=colour, label=name)
    axes.set_xticks(at, layers, rotation=40, ha="right", fontsize=_label_size(len(layers)))
    axes.set_ylabel("neurons")
    axes.set_title(f"neurons {verb} by layer", loc="left")
    axes.legend(frameon=False, fontsize=8, ncols=2)
    _bare(axes, "top", "right")
    return figure


def training_curve(history: Sequence[Mapping[str, float]]) -> Figure:
    """Draw loss and accuracies over epochs.

    history: rows with epoch, loss, train_accuracy, val_accuracy.
    """
    figure = Figure(figsize=(8.5, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    epochs = [row["epoch"] for row in history]
    left.plot(epochs, [row["loss"] for row in history], color=_DARK, marker=".")
    left.set_title("loss", loc="left")
    for name, colour in (("train_accuracy", "#9aa5b5"), ("val_accuracy", "#1f6fb4")):
        right.plot(epochs, [row[name] for row in history], marker=".", color=colour, label=name.replace("_", " "))
    right.set_title(f"accuracy, at last {history[-1]['val_accuracy']:.1%} on validation", loc="left")
    right.legend(frameon=False)
    for axes in (left, right):
        axes.set_xlabel("epoch")
        axes.xaxis.get_major_locator().set_params(integer=True)
        _bare(axes, "top", "right")
    return figure


def confusion(counts: np.ndarray, classes: Sequence[str]) -> Figure:
    """Draw the share of each actual class (row) that was predicted as each class (column).

    counts: [actual, predicted] images.
    """
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    figure, axes = _matrix(shares, classes, "Blues", "{:.0%}")
    axes.set_xlabel("predicted")
    axes.set_ylabel("actual")
    axes.set_title("confusion", loc="left")
    return figure


def class_accuracy(accuracy: Mapping[str, float], overall: float) -> Figure:
    """Draw the accuracy of each class, worst on top and in red, against the overall one."""
    rows = sorted(accuracy.items(), key=lambda row: row[1])
    figure, axes = _figure(6.5, max(2.4, 0.24 * len(rows) + 1.2))
    colours = [_BAD, *["#1f6fb4"] * (len(rows) - 1)]
    axes.barh(range(len(rows)), [value for _, value in rows], color=colours, height=0.7)
    axes.axvline(overall, color=_DARK, linewidth=1, linestyle="--")
    axes.set_yticks(range(len(rows)), [name for name, _ in rows], fontsize=_label_size(len(rows)))
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlim(0, 1)
    axes.set_xlabel("accuracy")
    axes.set_title(f"worst class {rows[0][0]} {rows[0][1]:.1%}, overall {overall:.1%}", loc="left")
    _bare(axes, "top", "right")
    return figure


def size_curve(points: Sequence[tuple[float, float]], chosen: float) -> Figure:
    """Draw accuracy over the share of multiply-adds that is left; the chosen model is marked.

    points: (share, accuracy), in order of size; chosen: the share of one of them.
    """
    figure, axes = _figure(6.0, 3.6)
    axes.plot([share for share, _ in points], [accuracy for _, accuracy in points], marker=".", color=_DARK)
    accuracy = dict(points)[chosen]
    axes.plot(chosen, accuracy, marker="o", color="#1f6fb4", markersize=9)
    axes.set_title(f"{accuracy:.1%} at {chosen:.0%} of the multiply-adds", loc="left")
    axes.set_xlim(0, 1.05)
    axes.set_xlabel("share of the multiply-adds")
    axes.set_ylabel("accuracy on validation")
    _bare(axes, "top", "right")
    return figure


def following_curve(points: Sequence[tuple[int, float | None, float | None]], kept: int) -> Figure:
    """Draw accuracy on new and on old held-out images over epochs; the epoch whose weights were kept is marked.

    points: (epoch, new, old) from epoch 0, the original; accuracies are None where there are no such images.
    """
    figure, axes = _figure(6.0, 3.6)
    for place, name, colour in ((1, "new", "#1f6fb4"), (2, "old", _DARK)):
        if points[0][place] is not None:
            values = [np.nan if value is None else value for value in (row[place] for row in points)]
            axes.plot([row[0] for row in points], values, ".-", color=colour, label=name)
    axes.axvline(kept, color=_GREY, linewidth=5, zorder=0, label="kept")
    axes.set_title(f"accuracy while following new images, epoch {kept} kept", loc="left")
    axes.set_xlabel("epoch")
    axes.set_ylabel("accuracy on held-out images")
    axes.xaxis.get_major_locator().set_params(integer=True)  # type: ignore[call-arg]  # that of a linear axis takes it
    axes.legend(frameon=False)
    _bare(axes, "top", "right")
    return figure


def differences(rows: Sequence[tuple[str, float, float, float]]) -> Figure:
    """Draw how much better (or worse, red) each candidate is than the champion, with the interval of the difference.

    rows: (name, difference of accuracy, low and high end of its interval), shares of 1.
    """
    figure, axes = _figure(6.5, max(2.0, 0.4 * len(rows) + 1.2))
    for place, (_, *values) in enumerate(rows):
        middle, low, high = (100 * value for value in values)
        colour = _BAD if middle < 0 else "#1f6fb4"
        axes.plot([low, high], [place, place], color=colour, linewidth=2)
        axes.plot(middle, place, "o", color=colour)
    axes.axvline(0, color=_DARK, linewidth=1)
    axes.set_yticks(range(len(rows)), [name for name, *_ in rows], fontsize=_label_size(len(rows)))
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlabel("difference of accuracy to the champion, points")
    axes.set_title("candidates against the champion", loc="left")
    _bare(axes, "top", "right")
    return figure


def class_change(change: Mapping[str, tuple[float, float]]) -> Figure:
    """Draw what each class gained or lost, the worst loss on top; losses are red.

    change: {class: accuracy before and after}, shares of 1.
    """
    rows = sorted(((after - before, name) for name, (before, after) in change.items()), key=lambda row: row[0])
    figure, axes = _figure(6.5, max(2.4, 0.24 * len(rows) + 1.2))
    colours = [_BAD if points < 0 else "#1f6fb4" for points, _ in rows]
    axes.barh(range(len(rows)), [100 * points for points, _ in rows], color=colours, height=0.7)
    axes.axvline(0, color=_DARK, linewidth=1)
    axes.set_yticks(range(len(rows)), [name for _, name in rows], fontsize=_label_size(len(rows)))
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlabel("change of accuracy, points")
    axes.set_title(f"worst change: {rows[0][1]} {100 * rows[0][0]:+.1f} points", loc="left")
    _bare(axes, "top", "right")
    return figure


def learning_curve(points: Sequence[tuple[int, float, float | None]]) -> Figure:
    """Draw the loss while new classes are learned, and the accuracy on them where there are held-out images.

    points: (epoch, loss, accuracy told the task).
    """
    figure = Figure(figsize=(8.5, 3.4), layout="constrained")
    epochs = [epoch for epoch, _, _ in points]
    titles = ("loss", "accuracy on new classes, told the task")
    for axes, place, title in zip(figure.subplots(1, 2), (1, 2), titles, strict=True):
        axes.plot(epochs, [np.nan if row[place] is None else row[place] for row in points], ".-", color=_DARK)
        axes.set_title(title, loc="left")
        axes.set_xlabel("epoch")
        axes.xaxis.get_major_locator().set_params(integer=True)
        _bare(axes, "top", "right")
    return figure


def capacity(rows: Mapping[str, tuple[int, int, int]]) -> Figure:
    """Draw the neurons of each layer: used by the old classes, by the new ones on top, before all the factory gives.

    rows: {layer: total, used by old, used by new}.
    """
    figure, axes = _figure(max(6.0, 0.75 * len(rows) + 2), 4.2)
    total, old, new = np.array(list(rows.values())).T
    at = np.arange(len(rows))
    axes.bar(at, total, width=0.9, color=_GREY, label="all neurons of the factory's network")
    axes.bar(at, old, width=0.5, color=_DARK, label="old classes")
    axes.bar(at, new, bottom=old, width=0.5, color="#1f6fb4", label="new classes")
    axes.set_xticks(at, list(rows), rotation=40, ha="right", fontsize=_label_size(len(rows)))
    axes.set_ylabel("neurons")
    free = np.maximum(total - old - new, 0).sum()
    axes.set_title(f"neurons used by layer, {free / total.sum():.0%} free", loc="left")
    axes.legend(frameon=False, fontsize=8, ncols=3)
    _bare(axes, "top", "right")
    return figure


def leaf_order(linkage: np.ndarray, count: int) -> list[int]:
    """Return the categories in the order in which no branches of the dendrogram cross.

    >>> leaf_order(np.array([[0, 2, 0.1, 2], [1, 3, 0.5, 3]]), 3)
    [1, 0, 2]
    """
    leaves = {leaf: [leaf] for leaf in range(count)}
    for row, (left, right, *_) in enumerate(linkage):
        leaves[count + row] = leaves.pop(int(left)) + leaves.pop(int(right))
    return [leaf for part in leaves.values() for leaf in part]


def _matrix(values: np.ndarray, names: Sequence[str], colours: str, text: str) -> tuple[Figure, Axes]:
    side = min(14.0, max(4.2, 0.42 * len(names) + 2))
    figure, axes = _figure(side + 0.8, side)
    image = axes.imshow(values, cmap=colours, vmin=0, vmax=1)
    figure.colorbar(image, ax=axes, shrink=0.8)
    axes.set_xticks(range(len(names)), names, rotation=60, ha="right", fontsize=_label_size(len(names)))
    axes.set_yticks(range(len(names)), names, fontsize=_label_size(len(names)))
    if len(names) <= _MOST_CELL_TEXTS:
        for (row, column), value in np.ndenumerate(values):
            red, green, blue, _ = image.cmap(image.norm(value))
            ink = "black" if 0.3 * red + 0.6 * green + 0.1 * blue > 0.5 else "white"
            axes.text(column, row, text.format(value), ha="center", va="center", fontsize=7, color=ink)
    return figure, axes


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def _colours(names: Mapping[str, object]) -> dict[str | None, str]:
    """One colour a name: ten distinct ones, beyond that a walk around the colour circle."""
    if len(names) <= 10:
        palette = colormaps["tab10"](range(10))
    else:
        palette = colormaps["turbo"](np.linspace(0.05, 0.95, len(names)))
    return {name: to_hex(palette[place]) for place, name in enumerate(names)}


def _spans(names: Sequence[str | None]) -> list[tuple[int, int, str | None]]:
    starts = [place for place in range(len(names)) if place == 0 or names[place] != names[place - 1]]
    return [(start, stop, names[start]) for start, stop in zip(starts, [*starts[1:], len(names)], strict=True)]


def _label_size(count: int) -> float:
    return 9 if count <= 20 else 7 if count <= 50 else 5.5


def _bare(axes: Axes, *sides: str) -> None:
    axes.spines[list(sides)].set_visible(False)
