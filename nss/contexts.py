"""Blocks that put back what they change: the modes of a network, the state of random generators."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put the model into evaluation mode, and every module back into its own mode afterwards."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def seeded(seed: int, device: torch.device | None = None) -> Iterator[None]:
    """Have what is drawn in this block, on the CPU and on `device`, follow from the seed; the caller's draws do not.

    torch.manual_seed would seed every other device as well, and nobody would put them back.

    >>> with seeded(0):
    ...     torch.rand(1)
    tensor([0.4963])
    """
    kind = device.type if device is not None and device.type != "cpu" else ""
    module = getattr(torch, kind, None)
    if module is None or not module.device_count():
        kind = ""  # PyTorch knows no generator of it
    with torch.random.fork_rng(devices=[device] if kind else [], device_type=kind or "cuda"):
        torch.default_generator.manual_seed(seed)
        if kind == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        elif kind:
            getattr(torch, kind).manual_seed(seed)
        yield
