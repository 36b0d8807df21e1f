"""The memory that a run takes at its worst moment, counted by torch: no allocator's hoard is in it."""

from __future__ import annotations

import itertools
from collections.abc import Callable

from torch import nn
from torch.profiler import ProfilerActivity, profile


def peak_megabytes(model: nn.Module, run: Callable[[], object]) -> float:
    """Return the most that tensors take at any moment of `run`: the model's own, and those that the run makes, in MB.

    Tensors on the CPU only.

    >>> peak_megabytes(nn.Linear(1000, 1000), lambda: torch.zeros(500, 1000).add_(1))
    6.004
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        run()
    events = seen.profiler.kineto_results.events()
    changes = sorted((each.start_ns(), each.nbytes()) for each in events if each.name() == "[memory]")
    own = sum(each.numel() * each.element_size() for each in itertools.chain(model.parameters(), model.buffers()))
    return (own + max(itertools.accumulate((size for _, size in changes), initial=0))) / 1e6
