"""Models for serving: ONNX files and exported programs, which take pixels in batches of any size.

Both hold the normalisation, so that whoever serves them needs neither nss nor its statistics. What they take, what they
answer, and the class names in the order of the logits are in their metadata as JSON under the key `nss`.
"""

from __future__ import annotations

import importlib
import json
import warnings
from collections.abc import Callable, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from nss.errors import ExportError, first_line
from nss.files import replacing
from nss.mask import ChannelMask
from nss.model import Classifier, model_digest
from nss.weight_masks import without_masks

ONNX, PROGRAM = ".onnx", ".pt2"
META = "nss"
ONNX_LIMIT = 2**31 - 2**20
"""bytes of weights: one protobuf message holds 2 GiB, the graph included"""
CHECKED_BATCHES = (1, 7, 64)
TOLERANCE = 1e-4
LARGE = 50.0
"""of logits above it as much more may differ: float32 holds some seven digits, whatever their size"""
_ANY_BATCH = ({0: torch.export.Dim("batch", min=1)},)

Call = Callable[[Tensor], Tensor]


def export_onnx(model: nn.Module, path: str | Path, images: Tensor | None = None) -> dict[int, float]:
    """Write `model` as an ONNX file (.onnx): input `images` uint8 [batch, c, h, w], output `logits` [batch, classes].

    With `images` (real ones, uint8 [n, c, h, w]) the file is checked as `check_export` does before it gets its name,
    and what that returns is returned. Evaluation mode; `model` itself, its mode and device stay as they are. The same
    model and packages give the same bytes. Raises ExportError for models not made by `build_model`, masked views, other
    weights than float32, what cannot be traced, answers that differ, and missing packages; nothing is written then.

    >>> export_onnx(model, "model.onnx", data.split("test").images)
    {1: 2.1e-06, 7: 2.1e-06, 64: 1.9e-06}
    """
    twin = _twin(model)
    size = sum(tensor.numel() * tensor.element_size() for tensor in twin.state_dict().values())
    if size > ONNX_LIMIT:
        raise ExportError(f"the weights take {size:,} bytes", allowed=f"{ONNX_LIMIT:,}", fix="export a program (.pt2)")
    for package in ("onnx", "onnxscript"):
        _package(package)
    return _publish(twin, path, ONNX, lambda: _onnx_bytes(twin, _metadata(model)), images)


def export_program(model: nn.Module, path: str | Path, images: Tensor | None = None) -> dict[int, float]:
    """Write `model` as an exported program (.pt2) for `torch.export.load`; all else is as in `export_onnx`.

    It needs PyTorch, but neither nss nor the code of the network.

    >>> export_program(model, "model.pt2")
    {}
    >>> torch.export.load("model.pt2").module()(images).shape
    torch.Size([64, 10])
    """
    twin = _twin(model)
    return _publish(twin, path, PROGRAM, lambda: _program_bytes(twin, _metadata(model)), images)


def check_export(
    model: nn.Module,
    path: str | Path,
    images: Tensor,
    batch_sizes: Sequence[int] = CHECKED_BATCHES,
    tolerance: float = TOLERANCE,
) -> dict[int, float]:
    """Compare the logits of an exported file with those of `model` on the CPU, on all images in batches of each size.

    images: uint8 [n, c, h, w], repeated where they are fewer than a batch. Returns {batch size: largest difference}.
    Raises ExportError, with the largest difference, when one is above `tolerance` (or is no number). Where the largest
    logit is above 50, as those of extended models are, it may be as many times more.

    >>> check_export(model, "model.onnx", images, batch_sizes=(1,))
    {1: 2.1e-06}
    """
    return _compare(_twin(model), load_export(path), images, batch_sizes, tolerance, Path(path))


def load_export(path: str | Path) -> Call:
    """Return an exported file as a function: images uint8 [n, c, h, w] to logits [n, classes], on the CPU.

    It uses as many threads as PyTorch does. `torch.export.load` may unpickle what a foreign .pt2 says: load only your
    own. Raises ExportError for a missing, damaged or other file, and for missing packages.

    >>> load_export("model.onnx")(images).argmax(1)
    tensor([3, 1])
    """
    path = Path(path)
    open_file = {ONNX: _open_onnx, PROGRAM: _open_program}.get(path.suffix)
    if open_file is None:
        raise ExportError(f"{path.name} is no export", where=str(path), allowed=f"names ending in {ONNX} or {PROGRAM}")
    if not path.is_file():
        raise ExportError("the file is missing", where=str(path), fix="export the model again")
    try:
        return open_file(path)
    except ExportError:
        raise
    except Exception as problem:
        raise ExportError(
            f"the file cannot be read: {first_line(problem)}", where=str(path), fix="export the model again"
        ) from None


def describe(model: Classifier) -> dict[str, Any]:
    """Return what an export says about itself: input, output, classes, factory and the digest of the model."""
    return {
        "format": 1,
        "input": {"name": "images", "dtype": "uint8", "shape": ["batch", *model.spec.input_shape], "values": "0..255"},
        "output": {"name": "logits", "dtype": "float32", "shape": ["batch", len(model.spec.classes)]},
        "classes": list(model.spec.classes),
        "factory": model.spec.factory,
        "model": model_digest(model),
    }


def _metadata(model: nn.Module) -> str:
    """Say it of the model that is exported: its copy without masks has another digest, which nobody knows."""
    assert isinstance(model, Classifier)
    return json.dumps(describe(model))


def _twin(model: nn.Module) -> Classifier:
    """Return a copy in evaluation mode on the CPU, with masked weights as ordinary zeros."""
    if not isinstance(model, Classifier):
        raise ExportError(
            f"{type(model).__name__} does not say which images it takes",
            allowed="models made by nss.build_model or nss.load_model",
            fix='make a factory for it and call nss.build_model("package.module:callable", ...)',
        )
    if any(isinstance(module, ChannelMask) for module in model.modules()):
        raise ExportError("a masked view is as large as the whole model", fix="export nss.remove(model, neurons)")
    other = {str(tensor.dtype) for tensor in model.state_dict().values() if tensor.is_floating_point()}
    if other - {"torch.float32"}:
        raise ExportError(
            f"the weights are {', '.join(sorted(other))}", allowed="torch.float32", fix="export model.float()"
        )
    twin = without_masks(model).cpu().eval()
    assert isinstance(twin, Classifier)
    return twin


def _publish(
    twin: Classifier, path: str | Path, suffix: str, make: Callable[[], bytes], images: Tensor | None
) -> dict[int, float]:
    """Write what `make` returns, and check it before it gets its name."""
    path = Path(path)
    if path.suffix != suffix or path.is_dir():
        raise ExportError(
            f"{path.name} is no name for this export", where=str(path), allowed=f"a file ending in {suffix}"
        )
    try:
        content = make()
    except Exception as problem:
        raise ExportError(
            f"PyTorch cannot export this network: {first_line(problem)}",
            where=twin.spec.factory,
            fix="its forward must not branch on the values of tensors, nor on the batch size",
        ) from problem
    try:
        with replacing(path) as part:
            part.write_bytes(content)
            if images is None:
                return {}
            return _compare(twin, load_export(part), images, CHECKED_BATCHES, TOLERANCE, path)
    except OSError as problem:
        raise ExportError(f"the file cannot be written ({problem.strerror})", where=str(path)) from None


def _trace(twin: Classifier) -> torch.export.ExportedProgram:
    # A batch of one would be taken for a constant: two stand for any number.
    example = torch.zeros(2, *twin.spec.input_shape, dtype=torch.uint8)
    program = torch.export.export(twin, (example,), dynamic_shapes=_ANY_BATCH, strict=False)
    # Where the code lies on this machine is nobody's business, and would make other bytes elsewhere.
    for module in program.graph_module.modules():
        for node in module.graph.nodes if isinstance(module, fx.GraphModule) else ():
            node.meta.pop("stack_trace", None)
    return program


def _program_bytes(twin: Classifier, metadata: str) -> bytes:
    buffer = BytesIO()  # a file's name would be inside the archive
    with warnings.catch_warnings():
        # Said of every weight that is stored channels last; each has a storage of its own.
        warnings.filterwarnings("ignore", message="No complete tensor found")
        torch.export.save(_trace(twin), buffer, extra_files={META: metadata})
    return buffer.getvalue()


def _onnx_bytes(twin: Classifier, metadata: str) -> bytes:
    program = torch.onnx.export(
        _trace(twin),
        dynamo=True,
        input_names=["images"],
        output_names=["logits"],
        dynamic_shapes=_ANY_BATCH,
        verbose=False,
    )
    assert program is not None
    proto = program.model_proto
    proto.metadata_props.add(key=META, value=metadata)
    content: bytes = proto.SerializeToString(deterministic=True)
    return content


def _open_onnx(path: Path) -> Call:
    runtime = _package("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # errors
    session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    (name,) = [each.name for each in session.get_inputs()]

    def run(images: Tensor) -> Tensor:
        (logits,) = session.run(None, {name: images.numpy()})
        return torch.from_numpy(logits)

    return run


def _open_program(path: Path) -> Call:
    program: Call = torch.export.load(path).module()
    return program


def _compare(
    twin: Classifier, export: Call, images: Tensor, batch_sizes: Sequence[int], tolerance: float, path: Path
) -> dict[int, float]:
    shape = twin.spec.input_shape
    if images.dtype != torch.uint8 or tuple(images.shape[1:]) != shape or not len(images):
        kind = f"{str(images.dtype).removeprefix('torch.')} {list(images.shape)}"
        raise ExportError(f"the images to check with are {kind}", allowed=f"uint8 [n, {', '.join(map(str, shape))}]")
    found, wrong = {}, {}
    for size in batch_sizes:
        found[size], largest = _largest_difference(twin, export, images, size, path)
        if not found[size] <= tolerance * max(1.0, largest / LARGE):
            wrong[size] = found[size]
    if wrong:
        size, worst = max(wrong.items(), key=lambda item: item[1] if item[1] == item[1] else float("inf"))
        raise ExportError(
            f"the export answers differently: a logit by {worst:.2g} in batches of {size}",
            where=str(path),
            allowed=f"at most {tolerance:g}",
            fix=f"export this network in the other format ({ONNX} or {PROGRAM})",
        )
    return found


def _largest_difference(twin: Classifier, export: Call, images: Tensor, size: int, path: Path) -> tuple[float, float]:
    """Return the largest difference of a logit, and the largest logit."""
    enough = images.repeat(-(-size // len(images)), 1, 1, 1)[: max(size, len(images))]
    worst = largest = torch.tensor(0.0)
    with torch.inference_mode():
        for batch in enough.cpu().contiguous().split(size):
            wanted = twin(batch)
            try:
                logits = export(batch)
            except Exception as problem:
                raise ExportError(
                    f"the export fails on a batch of {len(batch)}: {first_line(problem)}", where=str(path)
                ) from None
            if logits.shape != wanted.shape:
                raise ExportError(
                    f"the export answers {list(logits.shape)}", where=str(path), allowed=str(list(wanted.shape))
                )
            worst = torch.maximum(worst, (logits - wanted).abs().max())  # nan stays nan
            largest = torch.maximum(largest, wanted.abs().max())
    return float(worst), float(largest)


def _package(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise ExportError(
            f"ONNX needs the package {name}, which is not installed", fix="pip install onnx onnxscript onnxruntime"
        ) from None
