"""Convolutions whose weight gradients the CPU kernels get wrong, and how to go around that.

With channels last, the kernels for the weights of a 1x1 convolution that skips positions and reads fewer channels than
a block (8 with AVX2, 16 with AVX-512) write past their memory: gradients are wrong, or the process ends (oneDNN issue
6035, open in PyTorch 2.14). Small residual networks have such shortcuts, above all restructured ones and new columns.
The positions that are not skipped, picked out before, give the same sums by another kernel.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, TypeGuard

import torch.nn.functional as F
from torch import Tensor, nn

BLOCK = 16
"""channels from which on every kernel is right"""


@contextmanager
def sound_gradients(model: nn.Module) -> Iterator[None]:
    """Run forward passes within, and the weight gradients of their graphs are right, on every CPU.

    The model is left as it was. Source: oneDNN issue 6035.

    >>> with sound_gradients(model):
    ...     loss = F.cross_entropy(model(images), labels)
    >>> loss.backward()
    """
    with ExitStack() as stack:
        for module in model.modules():
            if _is_hit(module):
                vars(module)["forward"] = partial(_forward, module)
                stack.callback(vars(module).pop, "forward")
        yield


def picked(x: Tensor, stride: Sequence[int]) -> Tensor:
    """Return the positions of maps x [n, channels, ..] that a 1x1 convolution of this stride reads.

    >>> picked(torch.arange(5.0).view(1, 1, 5, 1), (2, 1)).flatten()
    tensor([0., 2., 4.])
    """
    places: tuple[Any, ...] = (..., *(slice(None, None, each) for each in stride))
    return x[places]


def skips(kernel: Sequence[int], stride: Sequence[int], padding: str | Sequence[int], channels: int) -> bool:
    """Say whether a convolution is one of those. channels: what one of its kernels reads."""
    # A string leaves no border to a kernel of one position either.
    bare = isinstance(padding, str) or not any(padding)
    return bare and set(kernel) == {1} and max(stride) > 1 and channels < BLOCK


def _is_hit(module: nn.Module) -> TypeGuard[nn.Conv2d]:
    if not isinstance(module, nn.Conv2d) or type(module).forward is not nn.Conv2d.forward or "forward" in vars(module):
        return False
    return skips(module.kernel_size, module.stride, module.padding, module.in_channels // module.groups)


def _forward(layer: nn.Conv2d, x: Tensor) -> Tensor:
    return F.conv2d(picked(x, layer.stride), layer.weight, layer.bias, groups=layer.groups)
