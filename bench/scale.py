"""How long merging many categories of many neurons takes, and how much memory."""

from __future__ import annotations

import resource
import time
from pathlib import Path

import torch
from matplotlib.figure import Figure

from bench.common import Report, Settings, show
from nss.critical import critical_neurons
from nss.profile import Profile
from nss.slice import semantic_slices

LAYERS, WIDTH = 30, 1000
PROTOCOL = {
    "what": "cumulative rule at 0.95, distances over all layers, average linkage, best silhouette; a made-up profile",
    "neurons": LAYERS * WIDTH,
}


def run(settings: Settings) -> Report:
    """Measure 100, 300 and 1000 categories; the peak is that of the process after each."""
    report = Report(settings, PROTOCOL)
    for categories in (100, 300) if settings.quick else (100, 300, 1000):
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
    show(f"merging, {LAYERS * WIDTH} neurons", report.rows, ["categories", "slices", "seconds", "peak_mb"])
    return report


def draw(report: Report, path: Path) -> None:
    """Seconds over the number of categories."""
    figure = Figure(figsize=(4, 3), layout="constrained")
    axes = figure.subplots()
    axes.plot([row["categories"] for row in report.rows], [row["seconds"] for row in report.rows], marker="o")
    axes.set(xlabel="categories", ylabel="seconds", xscale="log", yscale="log")
    figure.savefig(path, dpi=110)
