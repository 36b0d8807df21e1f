"""Pictures for README.md and docs/: measured figures from the result files, the stages from dvc.yaml.

Each PNG holds the digest of what it shows, so that a test can tell an old picture from a new one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
from ruamel.yaml import YAML

from bench.measured import Row, Source, find, short

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "docs" / "pictures"
DIGEST = "nss-shows"
"""the key of the digest in the PNG's metadata"""
OURS, PEERS = "C0", ("C1", "C2", "C3", "C4")
_WAYS = {
    "tp-magnitude-local": "magnitude, by layer",
    "tp-magnitude-global": "magnitude, over all layers",
    "tp-taylor-local": "Taylor, by layer",
    "tp-taylor-global": "Taylor, over all layers",
}
_BOX = 0.78, 0.5
_FILES = "data", "champion.json"
_MAINTENANCE = "restructure", "readapt", "extend"

Drawing = tuple[Any, Callable[[Any], Figure]]


def drawings() -> dict[str, Drawing]:
    """Return {file name: (what it shows, how it is drawn)}."""
    found: dict[str, Drawing] = {"stages.png": (stages(), draw_stages)}
    restructured = find("restructure")
    if restructured:
        found["alternatives.png"] = (restructure_curves(restructured), draw_curves)
    return found


def digest(content: Any) -> str:
    """Short digest of what a picture shows."""
    return hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=8).hexdigest()


def draw_all() -> list[Path]:
    """Write all pictures and return their paths."""
    FOLDER.mkdir(exist_ok=True)
    paths = []
    for name, (content, draw) in drawings().items():
        path = FOLDER / name
        draw(content).savefig(path, dpi=130, metadata={"Software": None, DIGEST: digest(content)})
        paths.append(path)
    return paths


def restructure_curves(source: Source) -> dict[str, Any]:
    """Return {network: {whole: accuracy, method: [[share of the multiply-adds, before, after, spreads], ..]}}."""
    methods = [method for method in source.different("method") if method == "nss" or method in _WAYS]
    return {
        short(model): {
            "whole": source.where(model=model)[0]["original"],
            **{method: _curve(source.where(model=model, method=method)) for method in methods},
        }
        for model in source.different("model")
    }


def _curve(rows: Sequence[Row]) -> list[list[float]]:
    names = ("macs", "accuracy_before", "accuracy_before_sd", "accuracy", "accuracy_sd")
    return sorted([row[name] for name in names] for row in rows)


def draw_curves(curves: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Accuracy over the share of the multiply-adds: without a gradient step, and fine-tuned."""
    figure = Figure(figsize=(11, 4), layout="constrained")
    grid = figure.subplots(1, 2 * len(curves), squeeze=False)[0]
    for place, (model, found) in enumerate(curves.items()):
        for column, title in ((0, "no gradient step"), (1, "fine-tuned alike")):
            axes = grid[2 * place + column]
            _panel(axes, found, 1 + 2 * column)
            axes.set_title(f"{model}: {title}", fontsize=10)
    grid[0].set_ylabel("accuracy on test images, %")
    figure.legend(
        *grid[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8.5, frameon=False
    )
    return figure


def _panel(axes: Axes, found: Mapping[str, Any], value: int) -> None:
    axes.axhline(100 * found["whole"], color="grey", linestyle=":", label="whole network")
    peers = iter(PEERS)
    for method, curve in found.items():
        if method == "whole":
            continue
        is_ours = method == "nss"
        name = method if is_ours else f"torch-pruning {_WAYS[method]}"
        axes.errorbar(
            [100 * point[0] for point in curve],
            [100 * point[value] for point in curve],
            [100 * point[value + 1] for point in curve],
            color=OURS if is_ours else next(peers),
            linewidth=2.2 if is_ours else 1,
            linestyle="-" if is_ours else "--",
            marker="o" if is_ours else ".",
            capsize=2,
            label=name,
        )
    axes.set_xlabel("multiply-adds left, %")
    axes.grid(alpha=0.25)


def stages() -> list[list[str]]:
    """Return [from, to] of every two stages of dvc.yaml of which one reads what the other writes, data included."""
    content = YAML(typ="safe").load(ROOT / "dvc.yaml")["stages"]
    outs = {_path(out): name for name, stage in content.items() for out in stage.get("outs", [])}
    edges = []
    for name, stage in content.items():
        for dep in map(_path, stage["deps"]):
            makers = [maker for out, maker in outs.items() if dep == out or dep.startswith(f"{out}/")]
            edges += [[maker, name] for maker in makers]
            edges += [[dep, name]] if dep in _FILES else []
    return list(map(list, dict.fromkeys(map(tuple, edges))))


def _path(entry: str | Mapping[str, Any]) -> str:
    return entry if isinstance(entry, str) else next(iter(entry))


def shown(edges: Sequence[Sequence[str]]) -> list[tuple[str, str]]:
    """Return the edges without those that a longer way says too: these would only be in the way."""
    after: dict[str, set[str]] = {}
    for start, end in edges:
        after.setdefault(start, set()).add(end)

    def reached(start: str) -> set[str]:
        return {each for end in after.get(start, ()) for each in {end} | reached(end)}

    longer = {start: {each for end in ends for each in reached(end)} for start, ends in after.items()}
    return [(start, end) for start, end in edges if end not in longer[start]]


def places(edges: Sequence[tuple[str, str]]) -> dict[str, tuple[int, float]]:
    """Return {name: (column, height)}: each as far right as those that read it allow, a column spread evenly.

    Who is alone in a column stands level with those that read it.
    """
    names = list(dict.fromkeys(name for edge in edges for name in edge))
    steps = dict.fromkeys(names, 0)
    for _ in names:
        for start, end in edges:
            steps[start] = max(steps[start], steps[end] + 1)
    columns: dict[int, list[str]] = {}
    for name in names:
        columns.setdefault(steps[name], []).append(name)
    height: dict[str, float] = {}
    for _, members in sorted(columns.items()):
        for place, name in enumerate(members):
            readers = [height[end] for start, end in edges if start == name]
            is_alone = len(members) == 1 and readers
            height[name] = sum(readers) / len(readers) if is_alone else (len(members) - 1) / 2 - place
    return {name: (max(steps.values()) - steps[name], height[name]) for name in names}


def draw_stages(edges: Sequence[Sequence[str]]) -> Figure:
    """The stages from left to right, an arrow where one reads what another writes."""
    figure = Figure(figsize=(11, 2.9), layout="constrained")
    axes = figure.subplots()
    arrows = shown(edges)
    at = places(arrows)
    for start, end in arrows:
        _arrow(axes, at[start], at[end])
    for name, (x, y) in at.items():
        _box(axes, name, x, y)
    axes.set(xlim=(-0.6, max(x for x, _ in at.values()) + 0.6), ylim=(-1.45, 1.45))
    axes.set_axis_off()
    return figure


def _arrow(axes: Axes, start: tuple[int, float], end: tuple[int, float]) -> None:
    ends = (start[0] + _BOX[0] / 2, start[1]), (end[0] - _BOX[0] / 2, end[1])
    axes.add_patch(FancyArrowPatch(*ends, arrowstyle="-|>", mutation_scale=11, color="#666666", shrinkA=1, shrinkB=1))


def _box(axes: Axes, name: str, x: float, y: float) -> None:
    is_file = name in _FILES
    color = "white" if is_file else "#fde8cf" if name in _MAINTENANCE else "#dbe9f6"
    corner = x - _BOX[0] / 2, y - _BOX[1] / 2
    style = "square,pad=0" if is_file else "round,pad=0,rounding_size=0.08"
    axes.add_patch(FancyBboxPatch(corner, *_BOX, boxstyle=style, facecolor=color, edgecolor="#444444"))
    axes.text(x, y, name, ha="center", va="center", fontsize=9.5, family="monospace" if is_file else None)
