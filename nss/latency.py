"""How long a model takes to answer, measured."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nss.contexts import evaluating
from nss.errors import ModelError
from nss.model import Classifier, device_of, shape_of

LATENCY_BATCH = 64
"""images in a batch of which a budget in milliseconds speaks"""
TURN = 5
"""calls in a row of one model with one batch: most of them find their weights in the caches, as in steady use"""


@dataclass(frozen=True)
class Latency:
    """Milliseconds that one call takes, {batch size: milliseconds}."""

    median_ms: Mapping[int, float]
    p95_ms: Mapping[int, float]
    device: str
    threads: int
    """of PyTorch on the CPU"""
    repeats: int

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain numbers and texts."""
        rows = {str(size): {"median_ms": self.median_ms[size], "p95_ms": self.p95_ms[size]} for size in self.median_ms}
        return {"batch": rows, "device": self.device, "threads": self.threads, "repeats": self.repeats}


def measure_latency(
    model: nn.Module,
    batch_sizes: Sequence[int] = (1, 64),
    *,
    repeats: int = 30,
    warmup: int = 5,
    input_shape: Sequence[int] | None = None,
) -> Latency:
    """Time `model` in evaluation mode where it is, without gradients, on random images: pixels if it takes them.

    What was not made by `build_model` gets floats from 0 to 1, in the precision of its weights.
    Median and 95th percentile over `repeats` calls of each batch size, after `warmup` calls that do not count.
    input_shape: (channels, height, width), needed for models not made by `build_model`. The model is left in its mode.
    Raises ModelError for sizes or numbers of calls below 1.

    >>> nss.measure_latency(model).median_ms[64]
    3.1
    """
    if not batch_sizes or min(batch_sizes) < 1:
        raise ModelError(f"batch_sizes {list(batch_sizes)}", allowed="sizes from 1")
    shape, device = shape_of(model, input_shape), device_of(model)
    pixels = random_pixels(max(batch_sizes), shape).to(device)
    # What was not made by build_model has no normalisation of its own and takes floats.
    images = pixels if isinstance(model, Classifier) else (pixels / 255).to(_precision_of(model))
    with evaluating(model):
        return time_calls({"model": model}, images, batch_sizes, repeats=repeats, warmup=warmup)["model"]


def measured_latency(model: nn.Module) -> float:
    """Return the median milliseconds for a batch of LATENCY_BATCH images: what budgets are compared with."""
    return measure_latency(model, batch_sizes=(LATENCY_BATCH,)).median_ms[LATENCY_BATCH]


def time_calls(
    calls: Mapping[str, Callable[[Tensor], object]],
    images: Tensor,
    batch_sizes: Sequence[int] = (1, 64),
    *,
    repeats: int = 30,
    warmup: int = 5,
) -> dict[str, Latency]:
    """Time several models against each other, without gradients. Returns {name: latency}.

    They take turns of a few calls, sizes too, so that what else the machine does falls on all of them. calls: what
    takes a batch of images. images: [n, ...] on the device that is used, at least the largest batch size of them.
    Raises ModelError for numbers of calls below 1.

    >>> time_calls({"before": model, "after": smaller}, images)["after"].median_ms[1]
    0.4
    """
    if repeats < 1 or warmup < 0:
        raise ModelError(f"repeats {repeats}, warmup {warmup}", allowed="repeats from 1, warmup from 0")
    jobs = [(name, size) for size in batch_sizes for name in calls]
    times: dict[tuple[str, int], list[float]] = {job: [] for job in jobs}
    turns = [warmup, *(min(TURN, repeats - start) for start in range(0, repeats, TURN))]
    with torch.inference_mode():
        for turn, count in enumerate(turns):
            # To and fro: whoever always came after a long call would always be the one that is interrupted.
            for name, size in jobs if turn % 2 else reversed(jobs):
                times[name, size] += [_time(calls[name], images[:size]) for _ in range(count)]
    counted = {name: {size: times[name, size][warmup:] for size in batch_sizes} for name in calls}
    return {name: _summary(by_size, images.device, repeats) for name, by_size in counted.items()}


def random_pixels(count: int, shape: Sequence[int]) -> Tensor:
    """Return random images uint8 [count, *shape], always the same."""
    return torch.randint(0, 256, (count, *shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def _precision_of(model: nn.Module) -> torch.dtype:
    return next((each.dtype for each in model.parameters() if each.is_floating_point()), torch.get_default_dtype())


def _summary(times: Mapping[int, Sequence[float]], device: torch.device, repeats: int) -> Latency:
    """times: {batch size: seconds of each call}."""
    median = {size: 1000 * float(np.median(spent)) for size, spent in times.items()}
    slow = {size: 1000 * float(np.percentile(spent, 95)) for size, spent in times.items()}
    return Latency(median, slow, _name(device), torch.get_num_threads(), repeats)


def _name(device: torch.device) -> str:
    return f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)


def _time(call: Callable[[Tensor], object], batch: Tensor) -> float:
    _wait(batch.device)
    start = time.perf_counter()
    call(batch)
    _wait(batch.device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    """A GPU answers before it has worked."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
