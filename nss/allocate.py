"""How many units each layer keeps for a budget: error at the output for each multiply-add (or weight) saved.

One path leads from the whole network to its smallest form, a few units at a time, always where the least error is paid
for what is saved; every budget is a point on it.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nss.merge import Order
from nss.units import Group, Units

STEP = 0.02
"""share of a layer's units that leave in one step, at least one"""


@dataclass(frozen=True)
class Path:
    """Counts of kept units for each group, from all of them to the fewest that the cap allows."""

    units: Units
    orders: tuple[Order, ...]
    errors: tuple[Tensor, ...]
    """for each group float64 [units + 1]: error at the output when only the first k units are kept"""
    size: Callable[[Tensor], int]
    """what is to be saved, as a function of the channels that stay, bool [channels of the anatomy]"""
    counts: tuple[tuple[int, ...], ...]
    sizes: tuple[int, ...]

    def kept(self, counts: Sequence[int]) -> Tensor:
        """Return the units that stay, bool [units]."""
        return kept_units(self.units, self.orders, counts)

    def within(self, target: float, multiple: int = 1) -> tuple[int, ...]:
        """Return counts whose size is at most `target` and as near as whole units come.

        The first point of the path that is small enough, and then back what fits, the most error for its size first.
        target: not below `sizes[-1]`. multiple: the counts are multiples of it, but for groups that are whole, smaller
        than it or at the least that the cap allows, and for one that takes up what is left of the target.
        """
        counts = self.counts[next(index for index, size in enumerate(self.sizes) if size <= target)]
        groups = range(len(counts))
        if multiple == 1:
            return self._grown(counts, target, 1, groups)
        aligned = tuple(self._aligned(group, count, multiple) for group, count in enumerate(counts))
        aligned = self._grown(aligned, target, multiple, groups)
        return max((self._grown(aligned, target, 1, [group]) for group in groups), key=self._size)

    def _aligned(self, group: int, count: int, multiple: int) -> int:
        whole = count == len(self.orders[group].units)
        return count if whole or count < multiple else max(self.counts[-1][group], count - count % multiple)

    def _grown(self, start: Sequence[int], target: float, block: int, groups: Sequence[int]) -> tuple[int, ...]:
        """Take back, in some groups, units that fit, `block` at a time."""
        counts = list(start)
        while True:
            now = self._size(counts)
            best: tuple[float, list[int]] | None = None
            for group in groups:
                larger = min(len(self.orders[group].units), (counts[group] // block + 1) * block)
                if larger == counts[group]:
                    continue
                more = [larger if each == group else count for each, count in enumerate(counts)]
                size = self._size(more)
                error = float(self.errors[group][counts[group]] - self.errors[group][larger])
                if size <= target and (best is None or error / max(1, size - now) > best[0]):
                    best = error / max(1, size - now), more
            if best is None:
                return tuple(counts)
            counts = best[1]

    def _size(self, counts: Sequence[int]) -> int:
        return self.size(self.units.channels(self.kept(counts)))


def kept_units(units: Units, orders: Sequence[Order], counts: Sequence[int]) -> Tensor:
    """Return the first `counts` units of each group, and all that cannot leave. Returns bool [units]."""
    kept = torch.ones(len(units.removable), dtype=torch.bool)
    for order, count in zip(orders, counts, strict=True):
        kept[order.units[count:]] = False
    return kept


def find_path(
    units: Units,
    orders: Sequence[Order],
    errors: Sequence[Tensor],
    size: Callable[[Tensor], int],
    cap: float,
) -> Path:
    """Take units away until some layer of each group has lost the share `cap` of its own (one always stays).

    The price of a step only rises as other layers get smaller (their readers save less), so a price that was computed
    before is a lower bound, and only the cheapest is computed anew.
    """
    now = [len(order.units) for order in orders]
    floors = [_floor(group, order, cap) for group, order in zip(units.groups, orders, strict=True)]
    counts, sizes = [tuple(now)], [size(units.channels(kept_units(units, orders, now)))]

    def priced(group: int) -> tuple[float, int, int] | None:
        fewer = max(floors[group], now[group] - max(1, round(STEP * len(orders[group].units))))
        if fewer >= now[group]:
            return None
        with_fewer = [fewer if each == group else count for each, count in enumerate(now)]
        saved = sizes[-1] - size(units.channels(kept_units(units, orders, with_fewer)))
        error = float(errors[group][fewer] - errors[group][now[group]])
        return error / max(1, saved), group, fewer

    queue = [price for price in map(priced, range(len(orders))) if price is not None]
    heapq.heapify(queue)
    while queue:
        price = priced(heapq.heappop(queue)[1])
        if price is None:
            continue
        if queue and price[0] > queue[0][0]:
            heapq.heappush(queue, price)
            continue
        _, group, now[group] = price
        counts.append(tuple(now))
        sizes.append(size(units.channels(kept_units(units, orders, now))))
        following = priced(group)
        if following is not None:
            heapq.heappush(queue, following)
    return Path(units, tuple(orders), tuple(errors), size, tuple(counts), tuple(sizes))


def _floor(group: Group, order: Order, cap: float) -> int:
    """Return how many of the first units must stay for every layer of the group to keep its share."""
    most = 0
    for units in group.members:
        least = max(1, len(units) - int(cap * len(units)))
        leaving = torch.isin(order.units, units)
        missing = least - (len(units) - int(leaving.sum()))
        if missing > 0:
            most = max(most, 1 + int((leaving.cumsum(0) >= missing).nonzero()[0, 0]))
    return most
