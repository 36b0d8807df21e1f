"""`nss export`: a model as a file for serving, checked on held-out images and timed beside the model."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nss.data import iter_batches, load_data
from nss.errors import ExportError, NssError, StageError
from nss.export import ONNX, PROGRAM, export_onnx, export_program, load_export
from nss.latency import Latency, random_pixels, time_calls
from nss.model import Classifier, load_model
from nss.size import count_macs, count_parameters
from tasks.champion import load_champion, read_champion
from tasks.models import base_model
from tasks.params import load_params
from tasks.workspace import Workspace, find_workspace, with_packages

LIMIT = 256
"""held-out images that an export is checked on"""
REPEATS = 50
_SUFFIX = {"onnx": ONNX, "program": PROGRAM}
_EXPORT = {"onnx": export_onnx, "program": export_program}
_REGISTERED = "models:/"


@dataclass(frozen=True)
class Exported:
    """What was written, how it was checked, and how long it takes."""

    path: Path
    kind: str
    """onnx or program"""
    model: str
    """what was exported: `champion: digits version 3`, `registry: digits version 2`, `base` or the folder"""
    bytes: int
    checked: int
    """images it was checked on; 0 when there are none"""
    difference: Mapping[int, float]
    """{batch size: largest difference of a logit from the model's}"""
    macs: int
    """multiply-adds for one image"""
    parameters: int
    latency: Mapping[str, Latency]
    """of the model and of the export, by the names `torch` and `export`"""

    def to_dict(self) -> dict[str, Any]:
        """Return the fields, ready for JSON."""
        return {
            "path": str(self.path),
            "format": self.kind,
            "model": self.model,
            "bytes": self.bytes,
            "checked": self.checked,
            "difference": {str(size): value for size, value in self.difference.items()},
            "macs": self.macs,
            "parameters": self.parameters,
            "latency": {name: each.to_dict() for name, each in self.latency.items()},
        }


def export(model: str | None, out: Path, kind: str | None, data: Path | None) -> Exported:
    """Export a model to `out`; nothing is written if it is wrong.

    model: a model folder, models:/NAME@ALIAS or models:/NAME/VERSION; by default the pinned champion, or the base model
    where nothing is pinned. kind: onnx or program (default: by the name of `out`). data: a data folder whose held-out
    images it is checked on (default: the workspace's, if there is one). Raises NssError outside of a workspace unless
    `model` is a folder.
    """
    kind = kind or _kind_of(out)
    workspace = _workspace()
    label, network = _load(workspace, model)
    images = _held_out(workspace, data)
    difference = _EXPORT[kind](network, out, images)
    calls: dict[str, Callable[[Tensor], object]] = {"torch": network, "export": load_export(out)}
    return Exported(
        path=out,
        kind=kind,
        model=label,
        bytes=out.stat().st_size,
        checked=0 if images is None else len(images),
        difference=difference,
        macs=count_macs(network),
        parameters=count_parameters(network),
        latency=time_calls(calls, random_pixels(64, network.spec.input_shape), repeats=REPEATS),
    )


def text(done: Exported) -> str:
    """What was exported, for a terminal."""
    first = next(iter(done.latency.values()))
    lines = [
        f"exported  {done.path} ({done.kind}, {done.bytes:,} bytes)",
        f"model     {done.model}",
        f"checked   {_checked(done)}",
        f"size      {done.macs:,} multiply-adds for an image, {done.parameters:,} parameters",
        f"latency   in milliseconds on {first.device}, PyTorch's threads: {first.threads}; median (95th percentile)",
    ]
    for name, each in done.latency.items():
        sizes = (f"batch {size}: {each.median_ms[size]:.2f} ({each.p95_ms[size]:.2f})" for size in each.median_ms)
        lines.append(f"  {name:<7} {'   '.join(sizes)}")
    return "\n".join(lines)


def _checked(done: Exported) -> str:
    if not done.checked:
        return "NOT CHECKED: there are no held-out images; name a data folder with --data"
    sizes = ", ".join(map(str, done.difference))
    worst = max(done.difference.values())
    return f"{done.checked} held-out images in batches of {sizes}: logits differ by at most {worst:.1e}"


def _kind_of(out: Path) -> str:
    for kind, suffix in _SUFFIX.items():
        if out.suffix == suffix:
            return kind
    raise ExportError(
        f"the name {out.name} does not say the format", allowed=f"names ending in {ONNX} or {PROGRAM}", where=str(out)
    )


def _workspace() -> Workspace | None:
    try:
        found = find_workspace()
    except NssError:
        return None
    return with_packages(found, load_params(found.params).base.packages)


def _load(workspace: Workspace | None, model: str | None) -> tuple[str, Classifier]:
    """Return the model and how texts name it."""
    if model is None:
        return _maintained(workspace or find_workspace())
    if model.startswith(_REGISTERED):
        return _registered(model)
    return model, load_model(model, workspace.packages if workspace else ())


def _maintained(workspace: Workspace) -> tuple[str, Classifier]:
    # Not what `base` has copied: that is the champion before until the next run.
    champion = read_champion(workspace)
    if champion is None:
        return "base", base_model(workspace)
    return f"champion: {champion.name} version {champion.version}", load_champion(workspace, champion)


def _registered(reference: str) -> tuple[str, Classifier]:
    # MLflow, which nobody needs who exports a folder.
    from flows.models import session
    from tasks.lineage import find_version
    from tasks.registry import fetch
    from tasks.store_address import shown_uri

    with session() as now, tempfile.TemporaryDirectory(prefix="nss-") as folder:
        version = find_version(now.registry, reference.removeprefix(_REGISTERED))
        if not version.model:
            raise StageError(
                f"{version.label} was not registered by nss",
                where=shown_uri(now.tracker.uri),
                fix=f"nss adopt {reference}",
            )
        found = fetch(now.tracker, version.source, version.model, Path(folder), now.workspace.packages)
        return f"registry: {version.label}", load_model(found, now.workspace.packages)


def _held_out(workspace: Workspace | None, data: Path | None) -> Tensor | None:
    """Images that no training has seen: of the test split first, then of the validation split."""
    if data is None:
        if workspace is None or not (workspace.data / "dataset.json").exists():
            return None
        data = workspace.data
    whole = load_data(data)
    firsts = (islice(iter_batches(whole.split(name), LIMIT), 1) for name in ("test", "val"))
    pieces = [images for first in firsts for images, _ in first]
    return torch.cat(pieces)[:LIMIT] if pieces else None
