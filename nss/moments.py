"""What a change of a layer's rows changes in what it computed on old data, and coordinates in which that is a length.

Rows are flat here: the weights of a neuron, and last what is added to it, where anything is.
"""

from __future__ import annotations

from functools import cached_property
from typing import Protocol, cast

import torch
from torch import Tensor

from nss.errors import ReadaptError
from nss.surgery import Layer
from nss.windows import is_wide, position_moment, window_moment

# Of the mean of the diagonal of the moments; ten times as much or as little chooses neurons that are as good.
DAMPING = 0.1
FAINTEST = 1e-12
"""mean moment of a layer that old images leave without input"""


class Moments(Protocol):
    """x^T G x of the rows x of a layer: G the second moment of what they read on old data.

    Rows are [rows, inputs + 1], or [rows, inputs] where nothing is added to them. The damped G is G + d I = L L^T, d
    DAMPING of the mean of the diagonal of G.
    """

    def times(self, rows: Tensor) -> Tensor:
        """Return G x, not damped."""
        ...

    def damped_times(self, rows: Tensor) -> Tensor:
        """Return (G + d I) x."""
        ...

    def whiten(self, gradient: Tensor) -> Tensor:
        """Return L^-1 g: the gradient for v = L^T x, of which x^T (G + d I) x is the squared length."""
        ...

    def colour(self, white: Tensor) -> Tensor:
        """Return x = L^-T v."""
        ...

    def bare(self) -> Moments:
        """Return the moments of the same rows where nothing that is added to them moves."""
        ...


def flat_rows(weight: Tensor, shift: Tensor | None) -> Tensor:
    """Return rows [rows, ..] and what is added to them [rows] as [rows, inputs + 1]; [rows, inputs] without a shift."""
    rows = weight.reshape(len(weight), -1)
    return rows if shift is None else torch.cat([rows, shift[:, None]], 1)


class Groups:
    """Rows of a layer by the group of channels that they read; of a plain layer there is one."""

    def __init__(self, rows: Tensor, outputs: int, groups: int) -> None:
        """rows: int64 [rows], ascending, of the `outputs` that a layer has in so many groups."""
        of_row = rows.cpu() // (outputs // groups)
        self.present, inverse, counts = of_row.unique(return_inverse=True, return_counts=True)
        self._width = int(counts.max())
        slots = inverse * self._width + torch.arange(len(rows)) - (counts.cumsum(0) - counts)[inverse]
        self._slots = slots.to(rows.device)

    def split(self, rows: Tensor) -> Tensor:
        """Return [rows, inputs] as [groups, most rows of a group, inputs], zeros where a group has fewer."""
        if len(self.present) == 1:
            return rows[None]
        filled = rows.new_zeros(len(self.present) * self._width, rows.shape[1])
        filled[self._slots] = rows
        return filled.view(-1, self._width, rows.shape[1])

    def join(self, parts: Tensor) -> Tensor:
        """Undo `split`."""
        return parts[0] if len(self.present) == 1 else parts.flatten(0, 1).index_select(0, self._slots)


class Whole:
    """All inputs of a row together. L is that of Cholesky."""

    def __init__(self, moment: Tensor, groups: Groups) -> None:
        """moment: of the groups present, [groups, inputs + 1, inputs + 1], or without the last where nothing is added.

        Its type is that of the rows.
        """
        self._moment, self._groups = moment, groups

    @cached_property
    def _root(self) -> Tensor:
        return root_of(self._moment.cpu()).to(self._moment.device)

    def bare(self) -> Whole:
        """See `Moments`."""
        return Whole(self._moment[:, :-1, :-1], self._groups)

    def times(self, rows: Tensor) -> Tensor:
        """See `Moments`."""
        return self._groups.join(self._groups.split(rows) @ self._moment)

    def damped_times(self, rows: Tensor) -> Tensor:
        """See `Moments`."""
        return self._groups.join(self._groups.split(rows) @ self._root @ self._root.mT)

    def whiten(self, gradient: Tensor) -> Tensor:
        """See `Moments`."""
        return self._solved(self._root, gradient, upper=False)

    def colour(self, white: Tensor) -> Tensor:
        """See `Moments`."""
        return self._solved(self._root.mT, white, upper=True)

    def _solved(self, triangle: Tensor, rows: Tensor, *, upper: bool) -> Tensor:
        columns = self._groups.split(rows).mT
        return self._groups.join(torch.linalg.solve_triangular(triangle, columns, upper=upper).mT)


class Product:
    """Channels and positions apart, and what is added to a row: G is the product of a matrix of each.

    With n channels at k positions a product takes n + k multiplications for each weight where all together take n k,
    and n^2 numbers in place of (n k)^2. L is that of the eigenvectors, so that d counts as it does for all together.
    """

    def __init__(self, channels: Tensor, positions: Tensor, groups: Groups, *, shifted: bool) -> None:
        """channels: of the groups present, [groups, n + 1, n + 1], the last of them ones. positions: [k, k]."""
        self._seen, self._positions, self._groups, self._shifted = channels, positions, groups, shifted
        self._channels, self._ones = channels[:, :-1, :-1], channels[:, -1:, -1:]
        # Of all pairs of a channel and a position, and of what is added.
        power = self._channels.diagonal(dim1=-2, dim2=-1).sum(-1) * positions.trace()
        entries = self._channels.shape[-1] * len(positions) + int(shifted)
        mean = (power + self._ones[:, 0, 0] * int(shifted)) / entries
        self._damping = DAMPING * mean.clamp_min(FAINTEST)[:, None, None]

    @cached_property
    def _axes(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return directions of channels [groups, n, n], of positions [k, k], and L of all entries along them.

        L: [groups, 1, n k + 1], or without the last where nothing is added.
        """
        of_channels, channels = torch.linalg.eigh(self._channels.cpu().double())
        of_positions, positions = torch.linalg.eigh(self._positions.cpu().double())
        spread = (of_channels.clamp_min(0)[:, :, None] * of_positions.clamp_min(0)).flatten(1)[:, None]
        if self._shifted:
            spread = torch.cat([spread, self._ones.cpu()], -1)
        root = (spread + self._damping.cpu()).sqrt()
        return channels.to(self._channels), positions.to(self._channels), root.to(self._channels)

    def bare(self) -> Product:
        """See `Moments`."""
        return Product(self._seen, self._positions, self._groups, shifted=False)

    def times(self, rows: Tensor) -> Tensor:
        """See `Moments`."""
        return self._groups.join(self._times(self._groups.split(rows)))

    def damped_times(self, rows: Tensor) -> Tensor:
        """See `Moments`."""
        split = self._groups.split(rows)
        return self._groups.join(self._times(split) + self._damping * split)

    def whiten(self, gradient: Tensor) -> Tensor:
        """See `Moments`."""
        channels, positions, root = self._axes
        return self._groups.join(_turned(self._groups.split(gradient), channels, positions) / root)

    def colour(self, white: Tensor) -> Tensor:
        """See `Moments`."""
        channels, positions, root = self._axes
        return self._groups.join(_turned(self._groups.split(white) / root, channels.mT, positions.T))

    def _times(self, split: Tensor) -> Tensor:
        return _turned(split, self._channels, self._positions, self._ones)


def _turned(split: Tensor, channels: Tensor, positions: Tensor, ones: Tensor | float = 1.0) -> Tensor:
    """Return C^T W P of the weights W [n, k] of each row, and what is added to it, if anything, times `ones`."""
    count = channels.shape[-1] * len(positions)
    apart = split[..., :count].unflatten(-1, (-1, len(positions)))
    weights = torch.einsum("gnm,grnk,kl->grml", channels, apart, positions).flatten(-2)
    return torch.cat([weights, split[..., count:] * ones], -1)


def moments_of(mean: Tensor, layer: Layer, rows: Tensor, *, shifted: bool) -> Moments:
    """Return the moments of some rows of a layer, float32, on their device.

    mean: `Profile.window` of what the layer reads. rows: int64 [rows], ascending. shifted: whether anything is added to
    them. Of wide layers (`windows.is_wide`) channels and positions count apart.
    Raises ReadaptError when the moments are not finite, in float32.
    """
    if not bool(mean.float().isfinite().all()):
        raise ReadaptError(
            "what a layer reads is not finite",
            where="profile",
            fix="profile this model, in single precision, on images without NaN or infinite numbers",
        )
    groups = Groups(rows, len(layer.weight), mean.shape[1])
    if is_wide(layer, mean.shape[-1] - 1):
        channels, positions = mean[0, groups.present], position_moment(mean, layer)
        return Product(channels.float().to(rows.device), positions.float().to(rows.device), groups, shifted=shifted)
    whole = Whole(window_moment(mean[:, groups.present], layer).float().to(rows.device), groups)
    return whole if shifted else whole.bare()


def root_of(moment: Tensor) -> Tensor:
    """Return the lower triangle L with L L^T = G + d I, d DAMPING of the mean of the diagonal of G.

    moment: G [.., n, n]. Rounded, it may be none of second moments: then d is ten times as much, and again, until there
    is such an L. Returns the shape and type of `moment`.
    """
    one = torch.eye(moment.shape[-1]).to(moment)
    mean = moment.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None].clamp_min(FAINTEST)
    damping, failed = DAMPING * mean, True
    while failed:
        factor, info = torch.linalg.cholesky_ex(moment + damping * one)
        damping, failed = damping * 10, bool(info.any())
    return cast(Tensor, factor)


def gains(gradient: Tensor, moments: Moments, outputs: int) -> Tensor:
    """Return for each row outputs * g^T (G + d I)^-1 g, g the gradient of the loss for it: what tuning it is worth.

    Of all changes x of a row, g.x less the guard's x^T G x / outputs is largest, 1/4 of that, at half of
    outputs * G^-1 g: so much does the loss fall, to first order, where the guard allows it. What old images show
    nothing of would be worth anything without d.
    gradient: for the rows of the layer with the norm behind it folded in. outputs: of the whole layer. Returns [rows].
    """
    return outputs * moments.whiten(gradient).square().sum(1)
