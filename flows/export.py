"""`nss export`: a model folder as a file for serving, checked on held-out images and timed beside the model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nss.data import iter_batches, load_data
from nss.errors import ExportError, NssError
from nss.export import ONNX, PROGRAM, export_onnx, export_program, load_export
from nss.latency import Latency, random_pixels, time_calls
from nss.model import load_model
from nss.size import count_macs, count_parameters
from tasks.params import load_params
from tasks.workspace import Workspace, find_workspace, with_packages

LIMIT = 256
"""held-out images that an export is checked on"""
REPEATS = 50
_SUFFIX = {"onnx": ONNX, "program": PROGRAM}
_EXPORT = {"onnx": export_onnx, "program": export_program}


@dataclass(frozen=True)
class Exported:
    """What was written, how it was checked, and how long it takes."""

    path: Path
    kind: str
    """onnx or program"""
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
            "bytes": self.bytes,
            "checked": self.checked,
            "difference": {str(size): value for size, value in self.difference.items()},
            "macs": self.macs,
            "parameters": self.parameters,
            "latency": {name: each.to_dict() for name, each in self.latency.items()},
        }


def export(model: Path | None, out: Path, kind: str | None, data: Path | None) -> Exported:
    """Export the model folder (default: the base model of the workspace) to `out`; nothing is written if it is wrong.

    kind: onnx or program (default: by the name of `out`). data: a data folder whose held-out images it is checked on
    (default: the workspace's, if there is one). Raises NssError outside of a workspace when there is no `model`.
    """
    kind = kind or _kind_of(out)
    workspace = _workspace(required=model is None)
    folder = model or find_workspace().out("base") / "model"
    if workspace:
        workspace = with_packages(workspace, load_params(workspace.params).base.packages)
    network = load_model(folder, workspace.packages if workspace else ())
    images = _held_out(workspace, data)
    difference = _EXPORT[kind](network, out, images)
    calls = {"torch": network, "export": load_export(out)}
    return Exported(
        path=out,
        kind=kind,
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


def _workspace(*, required: bool) -> Workspace | None:
    try:
        return find_workspace()
    except NssError:
        if required:
            raise
        return None


def _held_out(workspace: Workspace | None, data: Path | None) -> Tensor | None:
    """Images that no training has seen: of the test split first, then of the validation split."""
    if data is None and (workspace is None or not (workspace.data / "dataset.json").exists()):
        return None
    whole = load_data(data or workspace.data)
    firsts = (islice(iter_batches(whole.split(name), LIMIT), 1) for name in ("test", "val"))
    pieces = [images for first in firsts for images, _ in first]
    return torch.cat(pieces)[:LIMIT] if pieces else None
