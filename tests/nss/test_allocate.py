"""Budgets: one monotone path, no group emptied, nothing above a target and no further unit that would fit."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_helpers import Joined
from torch import Tensor, nn

from nss.allocate import find_path, kept_units
from nss.cost import cost_model
from nss.merge import Order
from nss.sites import Sites, find_sites
from nss.units import Units, find_units

RGB = (3, 4, 4)
few = settings(max_examples=15, deadline=None)


def chain(*widths: int) -> tuple[nn.Module, Sites, Units]:
    """A group of so many units for each width."""
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise((3, *widths)):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU()]
    network = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], 4))
    sites = find_sites(network, RGB)
    return network, sites, find_units(sites)


def falling(count: int, generator: torch.Generator, *, convex: bool = False) -> Tensor:
    """Errors when so many units are kept: 0 for all of them."""
    steps = torch.rand(count, generator=generator, dtype=torch.float64)
    if convex:
        steps = steps.sort().values
    return torch.cat([torch.zeros(1, dtype=torch.float64), steps.cumsum(0)]).flip(0)


def shuffled(units: Units, generator: torch.Generator) -> list[Order]:
    """Some order of each group's units."""
    orders = []
    for group in units.groups:
        turn = torch.randperm(len(group.units), generator=generator)
        orders.append(Order(group.units[turn], torch.linspace(1, 0, len(turn) + 1, dtype=torch.float64)))
    return orders


def priced(sites: Sites, prices: Sequence[int], base: int = 0) -> Callable[[Tensor], int]:
    """Every neuron of a layer costs the same."""

    def size(stay: Tensor) -> int:
        return base + sum(price * int(stay[site.ids].sum()) for site, price in zip(sites, prices, strict=True))

    return size


@given(seed=st.integers(0, 10_000), cap=st.sampled_from([0.25, 0.5, 0.9, 0.99]))
@few
def test_the_path_takes_from_one_group_at_a_time_until_each_has_lost_its_share(seed: int, cap: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    network, sites, units = chain(7, 12, 1, 60)
    errors = [falling(len(group.units), generator) for group in units.groups]
    path = find_path(units, shuffled(units, generator), errors, cost_model(network, sites, RGB).macs, cap)
    assert path.counts[0] == (7, 12, 1, 60)
    for before, after in itertools.pairwise(path.counts):
        fewer = [old - new for old, new in zip(before, after, strict=True)]
        assert sorted(fewer) == [0, 0, 0, 1]  # 2 % of 60 is one unit too
    for start, end in zip(path.counts[0], path.counts[-1], strict=True):
        assert end >= 1
        assert (start - end) / start <= cap
        assert end == 1 or (start - end + 1) / start > cap
    assert list(path.sizes) == sorted(path.sizes, reverse=True)
    cost = cost_model(network, sites, RGB)
    for counts, size in zip(path.counts, path.sizes, strict=True):
        assert size == cost.macs(units.channels(path.kept(counts)))


def test_a_large_group_loses_a_fiftieth_of_its_units_at_a_time() -> None:
    _, sites, units = chain(200, 10)
    generator = torch.Generator().manual_seed(0)
    errors = [falling(len(group.units), generator) for group in units.groups]
    path = find_path(units, shuffled(units, generator), errors, priced(sites, (1, 1)), 0.5)
    wide = sorted({counts[0] for counts in path.counts}, reverse=True)
    assert wide == list(range(200, 99, -4))
    assert sorted({counts[1] for counts in path.counts}, reverse=True) == [10, 9, 8, 7, 6, 5]


def naive_path(
    orders: list[Order], errors: list[Tensor], size: Callable[[list[int]], int], floors: Sequence[int]
) -> list[list[int]]:
    """Every price anew at every step; the cheapest, and of equal ones the first, gives up a unit."""
    now = [len(order.units) for order in orders]
    path = [list(now)]
    while True:
        prices = []
        for group, count in enumerate(now):
            if count > floors[group]:
                fewer = [each - (place == group) for place, each in enumerate(now)]
                error = float(errors[group][count - 1] - errors[group][count])
                prices.append((error / max(1, size(now) - size(fewer)), group))
        if not prices:
            return path
        now[min(prices)[1]] -= 1
        path.append(list(now))


@given(seed=st.integers(0, 10_000))
@few
def test_the_path_is_that_of_computing_every_price_anew(seed: int) -> None:
    """Multiply-adds: what a unit saves depends on how many units its neighbours still have."""
    generator = torch.Generator().manual_seed(seed)
    network, sites, units = chain(5, 8, 6)
    cost = cost_model(network, sites, RGB)
    errors = [falling(len(group.units), generator) for group in units.groups]
    orders = shuffled(units, generator)

    def size(counts: list[int]) -> int:
        a, b, c = counts
        return 16 * 9 * (3 * a + a * b + b * c) + 4 * c

    path = find_path(units, orders, errors, cost.macs, 0.9)
    expected = naive_path(orders, errors, size, [1, 1, 1])
    assert [list(counts) for counts in path.counts] == expected
    assert list(path.sizes) == [size(counts) for counts in expected]


@given(seed=st.integers(0, 10_000), share=st.floats(0, 1), cap=st.sampled_from([0.5, 0.9]))
@few
def test_a_budget_is_never_exceeded_and_no_further_unit_fits_into_it(seed: int, share: float, cap: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    network, sites, units = chain(5, 8, 6)
    size = cost_model(network, sites, RGB).macs
    errors = [falling(len(group.units), generator) for group in units.groups]
    path = find_path(units, shuffled(units, generator), errors, size, cap)
    target = path.sizes[-1] + share * (path.sizes[0] - path.sizes[-1])
    counts = path.within(target)
    assert size(units.channels(path.kept(counts))) <= target
    for group, count in enumerate(counts):
        assert path.counts[-1][group] <= count <= path.counts[0][group]
        if count < path.counts[0][group]:
            more = [each + (place == group) for place, each in enumerate(counts)]
            assert size(units.channels(path.kept(more))) > target


def test_the_ends_of_the_path_are_within_their_own_sizes() -> None:
    network, sites, units = chain(5, 8, 6)
    generator = torch.Generator().manual_seed(1)
    errors = [falling(len(group.units), generator) for group in units.groups]
    path = find_path(units, shuffled(units, generator), errors, cost_model(network, sites, RGB).macs, 0.5)
    assert path.within(path.sizes[0]) == (5, 8, 6)
    assert path.within(path.sizes[0] + 1e9) == (5, 8, 6)
    assert path.within(path.sizes[-1]) == path.counts[-1]


@given(seed=st.integers(0, 10_000))
@few
def test_convex_errors_at_equal_costs_get_the_least_error_there_is(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    _, sites, units = chain(5, 3, 4)
    errors = [falling(len(group.units), generator, convex=True) for group in units.groups]
    path = find_path(units, shuffled(units, generator), errors, priced(sites, (2, 2, 2)), 0.99)
    for target in range(6, 25):
        counts = path.within(target)
        choices = itertools.product(range(1, 6), range(1, 4), range(1, 5))
        least = min(
            sum(float(error[k]) for error, k in zip(errors, each, strict=True))
            for each in choices
            if 2 * sum(each) <= target
        )
        assert sum(float(error[k]) for error, k in zip(errors, counts, strict=True)) == pytest.approx(least)


@given(seed=st.integers(0, 10_000), share=st.floats(0, 1), multiple=st.sampled_from([2, 3, 8]))
@few
def test_all_layers_but_one_keep_a_multiple_and_the_budget_holds_all_the_same(
    seed: int, share: float, multiple: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    network, sites, units = chain(9, 16, 12)
    size = cost_model(network, sites, RGB).macs
    errors = [falling(len(group.units), generator) for group in units.groups]
    path = find_path(units, shuffled(units, generator), errors, size, 0.9)
    target = path.sizes[-1] + share * (path.sizes[0] - path.sizes[-1])
    counts, least = path.within(target, multiple), path.counts[-1]
    assert size(units.channels(path.kept(counts))) <= target
    assert all(low <= count for low, count in zip(least, counts, strict=True))
    odd = [
        place
        for place, (count, whole, low) in enumerate(zip(counts, (9, 16, 12), least, strict=True))
        if count % multiple and count not in (whole, low) and count > multiple
    ]
    assert len(odd) <= 1
    for place in odd or range(3):
        more = [count + (each == place) for each, count in enumerate(counts)]
        if more[place] <= (9, 16, 12)[place]:
            assert size(units.channels(path.kept(more))) > target


def test_multiples_by_hand() -> None:
    """Two layers of 8, units of 1 and of 2, errors such that the path takes one of each in turn."""
    _, sites, units = chain(8, 8)
    errors = [torch.arange(8, -1, -1).double() ** 2, 2 * torch.arange(8, -1, -1).double() ** 2]
    orders = [Order(group.units, torch.linspace(1, 0, 9).double()) for group in units.groups]
    path = find_path(units, orders, errors, priced(sites, (1, 2)), 0.9)
    assert path.within(17) == (5, 6)
    # These become 4: 12 of 17 are spent. A block of the first (4) fits, one of the second (8) does not.
    assert path.within(17, 4) == (8, 4)
    assert path.within(15, 4) == (7, 4)


def test_a_small_unit_that_fits_comes_back() -> None:
    """Units of 1 and of 4: the first small one left for very little, and its place within 7 is free again."""
    _, sites, units = chain(3, 3)
    errors = [torch.tensor(each).double() for each in ([9, 1.2, 0.1, 0], [9, 4, 2, 0])]
    orders = [Order(group.units, torch.linspace(1, 0, 4).double()) for group in units.groups]
    path = find_path(units, orders, errors, priced(sites, (1, 4)), 0.9)
    assert path.counts == ((3, 3), (2, 3), (2, 2), (2, 1), (1, 1))
    assert path.sizes == (15, 14, 10, 6, 5)
    assert path.within(7) == (3, 1)
    assert path.within(6.9) == (2, 1)
    assert path.within(13) == (3, 2)


def test_of_several_units_that_fit_the_one_with_the_most_error_for_its_size_comes_back() -> None:
    """At (1, 1, 1), size 10, one small unit fits within 11: of the third group, which saves more error."""
    _, sites, units = chain(2, 2, 2)
    errors = [torch.tensor(each).double() for each in ([9, 0.8, 0], [9, 0.3, 0], [9, 0.5, 0])]
    orders = [Order(group.units, torch.linspace(1, 0, 3).double()) for group in units.groups]
    path = find_path(units, orders, errors, priced(sites, (8, 1, 1)), 0.5)
    assert path.counts == ((2, 2, 2), (1, 2, 2), (1, 1, 2), (1, 1, 1))
    assert path.within(11) == (1, 1, 2)
    assert path.within(19) == (1, 2, 2)
    assert path.within(10) == (1, 1, 1)


def test_error_is_weighed_against_size_when_units_come_back() -> None:
    """At (1, 1, 1), size 12, either small unit fits within 15: .08 for a size of 1 is more than .15 for 3."""
    _, sites, units = chain(2, 2, 2)
    errors = [torch.tensor(each).double() for each in ([9, 0.8, 0], [9, 0.08, 0], [9, 0.15, 0])]
    orders = [Order(group.units, torch.linspace(1, 0, 3).double()) for group in units.groups]
    path = find_path(units, orders, errors, priced(sites, (8, 1, 3)), 0.5)
    assert path.counts == ((2, 2, 2), (2, 2, 1), (2, 1, 1), (1, 1, 1))
    assert path.within(15) == (1, 2, 1)
    assert path.within(16) == (1, 2, 2)


def test_equal_prices_take_from_the_first_group() -> None:
    _, sites, units = chain(2, 2)
    errors = [torch.tensor([2.0, 1.0, 0.0]).double()] * 2
    orders = [Order(group.units, torch.linspace(1, 0, 3).double()) for group in units.groups]
    assert find_path(units, orders, errors, priced(sites, (1, 1)), 0.5).counts == ((2, 2), (1, 2), (1, 1))


def test_the_first_units_of_each_order_are_kept_with_all_that_cannot_leave() -> None:
    class Halves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 1)
            self.free = nn.Conv2d(4, 3, 1)
            self.head = nn.Linear(3, 4)

        def forward(self, x: Tensor) -> Tensor:
            left, right = self.conv(x).chunk(2, 1)
            return self.head(F.relu(self.free(left * right)).mean((2, 3)))

    network = Halves()
    sites = find_sites(network, RGB)
    units = find_units(sites)
    stuck, free = units.groups
    orders = [Order(stuck.units, torch.ones(1).double()), Order(free.units[[2, 0, 1]], torch.ones(4).double())]
    kept = kept_units(units, orders, (0, 2))
    assert bool(kept[~units.removable].all())
    assert kept[free.units].tolist() == [True, False, True]
    errors = [torch.zeros(1).double(), torch.tensor([3.0, 2.0, 1.0, 0.0]).double()]
    path = find_path(units, orders, errors, cost_model(network, sites, RGB).macs, 0.9)
    assert path.counts == ((0, 3), (0, 2), (0, 1))


@pytest.mark.parametrize("cap", [0.5, 0.75, 0.9])
def test_every_layer_of_a_group_keeps_its_own_share(cap: float) -> None:
    """The order prefers the units of `right`: taken alone, it would empty `left`."""
    network = Joined()
    sites = find_sites(network, RGB)
    units = find_units(sites)
    (group,) = units.groups
    orders = [Order(group.units.flip(0), torch.linspace(1, 0, 9).double())]
    path = find_path(units, orders, [orders[0].missing], cost_model(network, sites, RGB).macs, cap)
    for counts in path.counts:
        stay = units.channels(path.kept(counts))
        for site in sites:
            left = int(stay[site.ids].sum())
            assert left >= 1
            assert (len(site) - left) / len(site) <= cap
