"""Pictures of a report as addresses that hold them: drawings as SVG, example images as PNG."""

from __future__ import annotations

import io
from base64 import b64encode
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import matplotlib as mpl
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from nss.data import Dataset
from nss.files import read_json
from nss.slice import SemanticSlices
from tasks import pictures
from tasks.reading import cells_of, read_csv
from tasks.report_facts import Facts, Judged
from tasks.workspace import Workspace

EACH = 3
"""example images of a category"""
MOST_CATEGORIES = 8
"""of a slice, that examples are shown of"""
_SIDE = 64
# The same drawing gives the same bytes; texts stay texts, and what a class is called is no formula.
_PLAIN: dict[Any, Any] = {"svg.hashsalt": "nss", "svg.fonttype": "none", "text.parse_math": False}


@dataclass(frozen=True)
class Picture:
    """address: a data: URL. alt: what is to be seen, for those who do not see it."""

    address: str
    alt: str
    title: str = ""


def cycle_pictures(workspace: Workspace, facts: Facts) -> dict[str, list[Picture]]:
    """Draw what a report shows, {place in the report: pictures}."""
    slices = SemanticSlices.load(workspace.out("slice") / "slices.json")
    groups = {each.name: each.categories for each in slices}
    merged = "; ".join(f"{name}: {', '.join(categories)}" for name, categories in groups.items())
    kept = {each.name: each.kept for each in facts.slices}
    found = {
        "dendrogram": [
            _drawn(
                lambda: pictures.dendrogram(slices.linkage, slices.classes, groups), f"How categories merge. {merged}"
            )
        ],
        "neurons": [
            _drawn(
                lambda: pictures.kept_neurons(kept, facts.layers),
                "Neurons kept by layer in each slice; the same numbers are in the table",
            )
        ],
    }
    for judged in facts.judged:
        found[judged.verb] = list(_class_pictures(judged))
    for name, draw in _STAGE_PICTURES.items():
        found[f"stage {name}"] = draw(workspace) if (workspace.out(name) / "model").exists() else []
    return found


def _class_pictures(judged: Judged) -> Iterator[Picture]:
    for part in judged.compared:
        change = {each.name: (each.before, each.after) for each in part.classes if each.before is not None}
        if any(before != after for before, after in change.values()):
            yield _drawn(
                partial(pictures.class_change, change),
                f"Change of each class on {part.where}; the same numbers are in the table",
                f"on {part.where}",
            )
    if not judged.compared and judged.accuracy is not None and judged.classes:
        accuracy = {each.name: each.after for each in judged.classes}
        overall = judged.accuracy
        text = "Accuracy of each class; the same numbers are in the table"
        yield _drawn(lambda: pictures.class_accuracy(accuracy, overall), text)


def _restructured(workspace: Workspace) -> list[Picture]:
    rows = [cells_of(row, "model") for row in read_csv(workspace.out("restructure") / "curve.csv")]
    points = [(row["macs"], row["accuracy"]) for row in rows if "accuracy" in row]
    if not points:
        return []  # there is no validation split
    chosen = _metric(workspace, "restructure", "macs_kept")
    listed = "; ".join(f"{accuracy:.1%} at {share:.0%}" for share, accuracy in points)
    text = f"Accuracy on validation by the share of the multiply-adds that is left: {listed}"
    return [_drawn(lambda: pictures.size_curve(points, chosen), text)]


def _followed(workspace: Workspace) -> list[Picture]:
    rows = [cells_of(row) for row in read_csv(workspace.out("readapt") / "curve.csv")]
    points = [(int(row["epoch"]), row.get("new"), row.get("old")) for row in rows]
    epoch = int(_metric(workspace, "readapt", "kept_epoch"))
    text = f"Accuracy on new and on old held-out images over {len(points) - 1} epochs; that of epoch {epoch} was kept"
    return [_drawn(lambda: pictures.following_curve(points, epoch), text)]


def _learned(workspace: Workspace) -> list[Picture]:
    rows = {row["layer"]: cells_of(row, "layer") for row in read_csv(workspace.out("extend") / "capacity.csv")}
    used = {layer: (int(each["total"]), int(each["old"]), int(each["new"])) for layer, each in rows.items()}
    listed = "; ".join(f"{layer}: {old} and {new} of {total}" for layer, (total, old, new) in used.items())
    return [_drawn(lambda: pictures.capacity(used), f"Neurons used by old and by new classes. {listed}")]


_STAGE_PICTURES: Mapping[str, Callable[[Workspace], list[Picture]]] = {
    "restructure": _restructured,
    "readapt": _followed,
    "extend": _learned,
}


def _metric(workspace: Workspace, verb: str, name: str) -> float:
    return float(read_json(workspace.out(verb) / "metrics.json")[name])


def _drawn(draw: Callable[[], Figure], alt: str, title: str = "") -> Picture:
    out = io.BytesIO()
    with mpl.rc_context(_PLAIN):
        draw().savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    return Picture(_address("svg+xml", out.getvalue()), alt, title)


def examples(data: Dataset, known: Sequence[str], categories: Sequence[str]) -> dict[str, list[Picture]]:
    """Return the first few images of each category in the batches that the model knows, {category: pictures}."""
    batches = data.known_and_new(known)[0].batches
    found: dict[str, list[Picture]] = {}
    for category in categories[:MOST_CATEGORIES]:
        label, images = data.classes.index(category), list[Tensor]()
        for batch in batches:
            places = torch.nonzero(batch.labels == label).flatten()[: EACH - len(images)].tolist()
            images += [batch.read(place, place + 1)[0][0] for place in places]
        found[category] = [
            Picture(_png(image), f"example {number} of {category}") for number, image in enumerate(images, start=1)
        ]
    return found


def _png(image: Tensor) -> str:
    """image: uint8 [channels, height, width]; of channels that are no colours the first is shown."""
    colours = image.permute(1, 2, 0) if len(image) == 3 else image[0]
    picture = Image.fromarray(colours.contiguous().numpy())
    picture.thumbnail((_SIDE, _SIDE))
    out = io.BytesIO()
    picture.save(out, "PNG", optimize=True)
    return _address("png", out.getvalue())


def _address(kind: str, content: bytes) -> str:
    return f"data:image/{kind};base64,{b64encode(content).decode()}"
