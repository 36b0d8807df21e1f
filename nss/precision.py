"""Double precision, wherever a tensor is."""

from __future__ import annotations

from torch import Tensor


def in_double(x: Tensor) -> Tensor:
    """Return `x` in float64: where it is, or on the CPU when its device has none, as on a Mac (MPS)."""
    return (x.cpu() if x.device.type == "mps" else x).double()
