"""How long merging many categories of many neurons takes, and how much memory."""

from __future__ import annotations

import resource
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from matplotlib.figure import Figure

from bench.common import Report, Row, Settings, Table, said, show
from nss.critical import critical_neurons
from nss.profile import Profile
from nss.slice import semantic_slices

LAYERS, WIDTH = 30, 1000
CATEGORIES = (100, 300, 1000)
PROTOCOL = {
    "what": "cumulative rule at 0.95, distances over all layers, average linkage, best silhouette; a made-up profile",
    "neurons": LAYERS * WIDTH,
}
LEFT_OUT = f"{CATEGORIES[-1]} categories"
COLUMNS = (
    "the number of categories and of slices they were merged into, seconds, and the peak_mb of the process after each."
)


def run(settings: Settings) -> Report:
    """Measure each number of categories; the peak is that of the process after each."""
    report = Report(settings, said(settings, PROTOCOL, LEFT_OUT))
    for categories in CATEGORIES[:-1] if settings.quick else CATEGORIES:
        generator = torch.Generator().manual_seed(settings.seeds[0])
        sums = {
            f"layer{number}": torch.rand(categories, WIDTH, generator=generator, dtype=torch.float64) ** 4
            for number in range(LAYERS)
        }
        made_up = Profile(
            classes=tuple(str(number) for number in range(categories)),
            layers=dict.fromkeys(sums, WIDTH),
            counts=torch.ones(categories, dtype=torch.int64),
            sums={"taylor": sums},
            model="made up",
        )
        start = time.perf_counter()
        slices = semantic_slices(critical_neurons(made_up, "taylor"), made_up)
        seconds = time.perf_counter() - start
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        report.rows.append({"categories": categories, "slices": len(slices), "seconds": seconds, "peak_mb": peak})
    report.summary = report.rows
    show(tables(report.summary))
    return report


def tables(summary: Sequence[Row]) -> list[Table]:
    """Return what is shown of a summary."""
    return [Table(f"merging, {LAYERS * WIDTH} neurons", ("categories", "slices", "seconds", "peak_mb"), summary)]


def draw(report: Report, path: Path) -> None:
    """Seconds over the number of categories."""
    figure = Figure(figsize=(4, 3), layout="constrained")
    axes = figure.subplots()
    axes.plot([row["categories"] for row in report.rows], [row["seconds"] for row in report.rows], marker="o")
    axes.set(xlabel="categories", ylabel="seconds", xscale="log", yscale="log")
    figure.savefig(path, dpi=110)
