"""What one pass costs: all metrics and Gram matrices against a plain forward and backward, and against Captum."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, fx, nn

from bench.common import Report, Row, Settings, Table, dataset, said, show
from nss import operations as ops
from nss.anatomy import trace
from nss.model import Classifier, build_model
from nss.profile import METRICS, profile
from nss.sites import find_sites

BATCH = 128
REPEATS, QUICK_REPEATS = 5, 2
IMAGES, QUICK_IMAGES = 4 * BATCH, BATCH
PLAIN = "plain forward + backward"
FOUR = "avg, var, ens, taylor + Gram"
FIVE = "the same + deeplift"
ALONE = "deeplift alone"
CAPTUM = "Captum LayerDeepLift, layer by layer"
PROTOCOL = {
    "what": f"seconds for the same {IMAGES} images through each method, median of {REPEATS} after a warm-up, methods "
    "in turn",
    "batch": BATCH,
    "plain": "evaluation mode, cross-entropy, gradients of all parameters",
    "captum": "torch.fx graph with a ReLU of its own for every call (Captum refuses reused ones); one layer a call",
    "memory": "peak resident size of a fresh process at 1 and 8 times the images",
}
LEFT_OUT = f"{QUICK_IMAGES} images in place of {IMAGES}, {QUICK_REPEATS} repeats in place of {REPEATS}"
COLUMNS = (
    "seconds of one pass, ratio to a plain forward and backward; peak_mb of a process that sees eight times the "
    "images, memory_ratio to one that sees them once."
)


def run(settings: Settings) -> Report:
    """Measure every model on every data set."""
    report = Report(settings, said(settings, PROTOCOL, LEFT_OUT))
    for name in settings.data:
        for factory in settings.models:
            report.rows += _measure(name, factory, settings)
    report.summary = report.rows
    show(tables(report.summary))
    return report


def tables(summary: Sequence[Row]) -> list[Table]:
    """Return what is shown of a summary."""
    shown = ("data", "model", "method", "seconds", "ratio", "peak_mb", "memory_ratio")
    return [Table("cost of one pass", shown, summary)]


def _count(settings: Settings) -> int:
    return QUICK_IMAGES if settings.quick else IMAGES


def prepare(name: str, factory: str, count: int) -> tuple[Classifier, Tensor, Tensor]:
    """Return an untrained model and `count` images, in three channels where the factory needs them."""
    data = dataset(name)
    images, labels = data.images[:count], data.labels[:count]
    if factory.startswith("torchvision") and images.shape[1] == 1:
        images = images.expand(-1, 3, -1, -1).contiguous()
    shape = tuple(images.shape[1:])
    return build_model(factory, data.classes, shape, seed=0).eval(), images, labels


def _measure(name: str, factory: str, settings: Settings) -> list[Row]:
    model, images, labels = prepare(name, factory, _count(settings))
    methods: dict[str, Callable[[], object]] = {
        PLAIN: lambda: _plain(model, images, labels),
        FOUR: lambda: profile(model, (images, labels), METRICS[:4], batch_size=BATCH),
        FIVE: lambda: profile(model, (images, labels), METRICS, batch_size=BATCH),
        ALONE: lambda: profile(model, (images, labels), ["deeplift"], batch_size=BATCH, gram=False),
        CAPTUM: _captum(model, images, labels),
    }
    times = _in_turn(methods, QUICK_REPEATS if settings.quick else REPEATS)
    memory = _memory(name, factory, _count(settings))
    plain = statistics.median(times[PLAIN])
    rows = []
    for method, seconds in times.items():
        middle = statistics.median(seconds)
        row: Row = {"data": name, "model": factory, "method": method, "seconds": middle, "all_seconds": seconds}
        rows.append({**row, "ratio": middle / plain})
    once, eight = memory
    return [
        *rows,
        {
            "data": name,
            "model": factory,
            "method": "memory at 8x images",
            "peak_mb": eight,
            "memory_ratio": eight / once,
        },
    ]


def _in_turn(methods: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {method: [] for method in methods}
    for turn in range(repeats + 1):
        for method, call in methods.items():
            start = time.perf_counter()
            call()
            if turn:
                times[method].append(time.perf_counter() - start)
    return times


def _plain(model: nn.Module, images: Tensor, labels: Tensor) -> None:
    for batch, target in zip(images.split(BATCH), labels.split(BATCH), strict=True):
        model.zero_grad()
        F.cross_entropy(model(batch), target).backward()


def _captum(model: Classifier, images: Tensor, labels: Tensor) -> Callable[[], None]:
    from captum.attr import LayerDeepLift

    graph, places = _own_relus(model.network, model.spec.input_shape)
    layers = [LayerDeepLift(graph, graph.get_submodule(place)) for place in places]

    def call() -> None:
        for batch, target in zip(images.split(BATCH), labels.split(BATCH), strict=True):
            with torch.no_grad():
                inputs = model.normalise(batch)
            for layer in layers:
                layer.attribute(inputs, torch.zeros_like(inputs), target=target)

    return call


def _own_relus(network: nn.Module, shape: tuple[int, ...]) -> tuple[fx.GraphModule, list[str]]:
    """Give every ReLU call a module of its own; return the graph and the module behind each site."""
    graph = trace(network)
    ends = {site.node.name for site in find_sites(network, shape)}
    places = []
    for node in graph.graph.nodes:
        if isinstance(ops.module_of(node, graph), nn.ReLU) or node.target is F.relu:
            graph.add_submodule(f"own_{node.name}", nn.ReLU())
            node.op, node.target, node.args, node.kwargs = "call_module", f"own_{node.name}", node.args[:1], {}
        if node.name in ends and node.op == "call_module":
            places.append(str(node.target))
    graph.recompile()
    return graph.eval(), places


def _memory(name: str, factory: str, count: int) -> tuple[float, float]:
    """Peak MB of a fresh process that profiles the images once, and eight times as many."""
    return _peak(name, factory, count, 1), _peak(name, factory, count, 8)


def _peak(name: str, factory: str, count: int, times: int) -> float:
    code = f"from bench.profile import peak; peak({name!r}, {factory!r}, {count}, {times})"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    return float(json.loads(done.stdout.splitlines()[-1]))


def peak(name: str, factory: str, count: int, times: int) -> None:
    """Profile `count` images `times` times over, streamed; print the peak resident size in MB while it ran."""
    model, images, labels = prepare(name, factory, count)
    batches = list(zip(images.split(BATCH), labels.split(BATCH), strict=True))
    # Linux: forget the peak so far, which loading the data set made.
    Path("/proc/self/clear_refs").write_text("5")
    profile(model, (batch for _ in range(times) for batch in batches), METRICS, batch_size=BATCH)
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    sys.stdout.write(json.dumps(int(status["VmHWM"].split()[0]) / 1024) + "\n")


def draw(report: Report, path: Path) -> None:
    """Bars of the time of each method over a plain pass, for each model."""
    rows = [row for row in report.rows if "ratio" in row]
    figure = Figure(figsize=(8, 1.2 + 0.45 * len(rows)), layout="constrained")
    axes = figure.subplots()
    names = [f"{row['model'].partition(':')[2]}: {row['method']}" for row in rows]
    bars = axes.barh(names, [row["ratio"] for row in rows])
    axes.bar_label(bars, fmt=" %.2f")
    axes.set(xscale="log", xlabel="time over a plain forward + backward (log scale)")
    axes.invert_yaxis()
    figure.savefig(path, dpi=120)
