"""What a layer's window sees together: second moments over kernel positions, not over channels alone (method.md 6).

Neighbouring pixels are alike, so a change of a kernel whose positions add up does far more than one whose positions
cancel: a Gram matrix of channels cannot tell them apart. What two positions of a kernel see depends, borders aside, on
how far apart they are, so it is enough to keep one matrix for each lag: 13 of them for 3 x 3, not 81 / 2.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from nss.precision import in_double
from nss.surgery import Layer

WIDEST = 4608
"""inputs of a linear layer up to which they are taken together; beyond, positions of a flattened map count apart"""
WIDE = 1152
"""inputs of a kernel of several positions up to which they are taken together, 128 channels at 3 x 3; beyond, channels
and positions count apart: a step in their coordinates would take longer than the network does on small maps"""

Lag = tuple[int, ...]


def chosen_by_content(images: Tensor, one_in: int) -> Tensor:
    """Choose about one image in `one_in` by what it holds, so that it is the same in whatever batch or shard it comes.

    images: [n, ..] of any type. Returns bool [n].
    """
    raw = images.detach().cpu().contiguous().flatten(1).view(torch.uint8)
    return raw.sum(1, dtype=torch.int64) % one_in == 0


def correlations(x: Tensor, layer: Layer, channels: int) -> Tensor:
    """Sum over samples and positions what the channels that enter `layer` do together, by lag.

    x: what enters it [n, inputs, ..]. channels: of a linear layer, those that its inputs are, each at several positions
    of a flattened map. A channel of ones is the last. Returns float64 [lags, groups, channels + 1, channels + 1], by
    the lags of `lags_of`.
    """
    rows = _rows(in_double(x.detach()), layer, channels)
    found = [_correlation(rows, lag) for lag in lags_of(layer)]
    return torch.stack(found).cpu()


def positions_of(x: Tensor, layer: Layer, channels: int) -> int:
    """Return over how many samples and positions `correlations` adds up."""
    return x.numel() // (channels if isinstance(layer, nn.Linear) else x.shape[1])


def lags_of(layer: Layer) -> list[Lag]:
    """Return one of each two opposite lags between kernel positions, in pixels; the first is none at all."""
    kernel = _kernel(layer)
    every = itertools.product(*(range(-(size - 1) * step, size * step, step) for size, step in kernel))
    return sorted(lag for lag in every if lag >= (0,) * len(kernel))


def window_moment(mean: Tensor, layer: Layer) -> Tensor:
    """Return E[z z^T] of what a window of `layer` sees, z all channels at all kernel positions and a last one for bias.

    mean: `correlations` over the number of positions. Returns [groups, inputs + 1, inputs + 1] of its type, inputs in
    the order of a flattened row of the layer's weight. Not for wide layers (`is_wide`).
    """
    by_lag = dict(zip(lags_of(layer), mean, strict=True))
    kernel, (groups, size) = _kernel(layer), mean.shape[1:3]
    places = _places(layer)
    centre, channels = tuple(size // 2 * step for size, step in kernel), size - 1
    result = mean.new_zeros(groups, channels, len(places), channels, len(places))
    ones = mean.new_zeros(groups, channels, len(places))
    for (row, first), (column, second) in itertools.product(enumerate(places), repeat=2):
        lag = _minus(second, first)
        both = by_lag[lag] if lag in by_lag else by_lag[_minus(first, second)].mT
        result[:, :, row, :, column] = both[:, :-1, :-1]
        if first == centre:
            ones[:, :, column] = both[:, -1, :-1]
    inputs = channels * len(places)
    whole = mean.new_zeros(groups, inputs + 1, inputs + 1)
    whole[:, :-1, :-1] = result.reshape(groups, inputs, inputs)
    whole[:, -1, :-1] = whole[:, :-1, -1] = ones.reshape(groups, inputs)
    whole[:, -1, -1] = mean[0, :, -1, -1]
    return whole


def is_wide(layer: Layer, channels: int) -> bool:
    """Say whether channels, so many that one row reads, and positions are to be taken apart."""
    inputs = layer.weight[0].numel()
    return inputs > channels and (isinstance(layer, nn.Linear) or inputs > WIDE)


def position_moment(mean: Tensor, layer: Layer) -> Tensor:
    """Return what positions of a kernel do together, over all channels: [positions, positions], the type of `mean`.

    Each with itself is 1, or 0 where nothing is read. Positions of a flattened map have nothing in common.
    mean: `correlations` over the number of positions.
    """
    if isinstance(layer, nn.Linear):
        return torch.eye(layer.weight.shape[1] // (mean.shape[-1] - 1)).to(mean)
    power = mean[..., :-1, :-1].diagonal(dim1=-2, dim2=-1).sum((1, 2))
    shares = torch.where(power[0] > 0, power / power[0], 0)
    by_lag = dict(zip(lags_of(layer), shares, strict=True))
    places = torch.tensor(_places(layer))
    lags, which = (places - places[:, None]).flatten(0, 1).unique(dim=0, return_inverse=True)
    # Either of two opposite lags: the trace of a matrix is that of its transpose.
    of_lags = torch.stack([by_lag[max(tuple(lag), tuple(-part for part in lag))] for lag in lags.tolist()])
    return of_lags[which].view(len(places), len(places))


def together(layer: Layer, channels: int) -> int:
    """Return how many channels `correlations` is to take of a layer that reads `channels`, a flattened map or not."""
    inputs = layer.weight.shape[1]
    return inputs if isinstance(layer, nn.Linear) and inputs <= WIDEST else channels


def _kernel(layer: Layer) -> list[tuple[int, int]]:
    """Return size and dilation along each axis; a linear layer has a kernel of one place."""
    if isinstance(layer, nn.Linear):
        return [(1, 1)]
    return list(zip(layer.kernel_size, layer.dilation, strict=True))


def _places(layer: Layer) -> list[Lag]:
    """Return the positions of a kernel in pixels, in the order of a flattened kernel."""
    return list(itertools.product(*(range(0, size * step, step) for size, step in _kernel(layer))))


def _minus(one: Lag, other: Lag) -> Lag:
    return tuple(a - b for a, b in zip(one, other, strict=True))


def _rows(x: Tensor, layer: Layer, channels: int) -> Tensor:
    """Return [groups, channels + 1, n, ..map], the last channel ones."""
    if isinstance(layer, nn.Linear):
        x = x.reshape(-1, channels, layer.weight.shape[1] // channels)
    groups = int(getattr(layer, "groups", 1))
    x = x.unflatten(1, (groups, -1)).movedim(0, 2)
    return torch.cat([x, torch.ones_like(x[:, :1])], 1)


def _correlation(rows: Tensor, lag: Sequence[int]) -> Tensor:
    """rows: [groups, channels, n, ..map]. Returns the sum of x(s) x(s + lag)^T, zeros outside: [groups, c, c]."""
    here, there = rows, rows
    for axis, shift in enumerate(lag, 3):
        length = max(0, rows.shape[axis] - abs(shift))
        here = here.narrow(axis, min(max(0, -shift), rows.shape[axis] - length), length)
        there = there.narrow(axis, min(max(0, shift), rows.shape[axis] - length), length)
    return here.flatten(2) @ there.flatten(2).mT
