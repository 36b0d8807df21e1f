"""Errors at the output: measured as by hand, of the slice that suffers most, and a power law between the points."""

from __future__ import annotations

import copy
import math
from types import ModuleType

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from nss.merge import Order, Reading, fold, order_units, readings
from nss.model import Classifier, ModelSpec, model_digest
from nss.profile import profile
from nss.remove import remove
from nss.sensitivity import measure_errors, power_law
from nss.sites import Sites, find_sites
from nss.statistics import retake_statistics
from nss.units import Units, find_units

RGB = (3, 6, 6)


# -- the power law ------------------------------------------------------------------------------------------------


@given(a=st.floats(1e-3, 50), p=st.floats(0.5, 4.0), places=st.sets(st.integers(1, 9), min_size=2))
@settings(max_examples=30, deadline=None)
def test_points_on_a_power_law_give_it_back(a: float, p: float, places: set[int]) -> None:
    missing = torch.linspace(1, 0.01, 11, dtype=torch.float64)
    points = {k: a * float(missing[k]) ** p for k in places if a * float(missing[k]) ** p > 1e-9}
    if len(points) < 2:
        return
    assert power_law(missing, points).tolist() == pytest.approx([a * m**p for m in missing.tolist()], rel=1e-6)


@pytest.mark.parametrize(("p", "held"), [(7.0, 4.0), (0.1, 0.5), (-1.0, 0.5)])
def test_a_power_out_of_range_is_held_and_the_curve_runs_amid_the_points(p: float, held: float) -> None:
    missing = torch.tensor([1.0, 0.8, 0.5, 0.2, 0.0]).double()
    points = {1: 0.8**p, 3: 0.2**p}
    found = power_law(missing, points)
    level = math.log(0.8**p * 0.2**p) / 2 - held * math.log(0.8 * 0.2) / 2
    assert found.tolist() == pytest.approx([math.exp(level) * m**held for m in missing.tolist()])


def test_points_that_lie_on_no_curve_are_fitted_by_least_squares_of_logarithms() -> None:
    missing = torch.tensor([1.0, 0.7, 0.4, 0.3, 0.1, 0.0]).double()
    points = {1: 0.9, 2: 0.2, 3: 0.25, 4: 0.01}
    slope, level = np.polyfit([math.log(float(missing[k])) for k in points], [math.log(e) for e in points.values()], 1)
    assert 0.5 < slope < 4
    expected = [math.exp(level) * m**slope for m in missing.tolist()]
    assert power_law(missing, points).tolist() == pytest.approx(expected)


def test_one_point_gives_a_straight_line() -> None:
    missing = torch.tensor([1.0, 0.5, 0.25, 0.0]).double()
    assert power_law(missing, {2: 3.0}).tolist() == pytest.approx([12, 6, 3, 0])
    assert power_law(missing, {2: 3.0, 3: 7.0}).tolist() == pytest.approx([12, 6, 3, 0])  # nothing is missing at 3


def test_without_a_usable_point_the_error_is_what_is_missing() -> None:
    missing = torch.tensor([1.0, 0.0, 0.0]).double()
    found = power_law(missing, {1: 0.4})
    assert found.tolist() == [1, 0, 0]
    found[0] = 5
    assert missing.tolist() == [1, 0, 0]


def test_an_error_of_zero_is_no_error_but_a_finite_logarithm() -> None:
    missing = torch.tensor([1.0, 0.5, 0.25, 0.0]).double()
    found = power_law(missing, {1: 0.0, 2: -1e-12})
    assert bool(torch.isfinite(found).all())
    assert float(found.max()) < 1e-6


# -- measuring ----------------------------------------------------------------------------------------------------


class Measured:
    """Everything that `measure_errors` is given for a network."""

    def __init__(self, network: nn.Module, images: Tensor) -> None:
        spec = ModelSpec("tiny:network", ("a", "b", "c", "d"), RGB, (0.0,) * 3, (1.0,) * 3)
        self.model, self.images = Classifier(network, spec).eval(), images
        self.sites: Sites = find_sites(network, RGB)
        self.units: Units = find_units(self.sites)
        sums = profile(self.model, (images, torch.arange(len(images)) % 4), ("avg",), batch_size=64)
        self.read: list[Reading] = list(readings(network, self.sites, sums))
        even = torch.ones(len(self.units.removable), dtype=torch.float64)
        self.orders: list[Order] = [
            order_units(group.units, self.units.of, self.read, even[group.units]) for group in self.units.groups
        ]

    def errors(self, parts: list[Tensor]) -> dict[str, Tensor]:
        found = measure_errors(self.model, self.sites, self.units, self.orders, self.read, self.images, parts)
        return {group.name: error for group, error in zip(self.units.groups, found, strict=True)}

    def divergence(self, group: int, kept: int) -> list[float]:
        """Kullback-Leibler divergence of each image when a group keeps its first units, statistics taken again."""
        flags = torch.ones(len(self.units.removable), dtype=torch.bool)
        flags[self.orders[group].units[kept:]] = False
        stay = self.units.channels(flags)
        folded = copy.deepcopy(self.model)
        for each in self.read:
            fold(folded.network, each, stay)
        smaller = remove(folded, {site.name: stay[site.ids] for site in self.sites})
        retake_statistics(smaller, self.images)
        with torch.no_grad():
            p, q = (F.softmax(each(self.images).double(), 1) for each in (self.model, smaller))
        return [
            sum(a * (math.log(a) - math.log(b)) for a, b in zip(*rows, strict=True))
            for rows in zip(p.tolist(), q.tolist(), strict=True)
        ]


class Small(nn.Module):
    """Ten channels and two, with a norm, and a head that is sure of itself."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 10, 3)
        self.bn = nn.BatchNorm2d(10)
        self.conv2 = nn.Conv2d(10, 2, 3)
        self.one = nn.Conv2d(2, 1, 1)
        self.head = nn.Linear(1, 4)
        with torch.no_grad():
            for layer in (self.conv2, self.one, self.head):
                layer.weight *= 4

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.conv2(F.relu(self.bn(self.conv1(x)))))
        return self.head(torch.tanh(self.one(x)).mean((2, 3)))


@pytest.fixture
def small(networks: ModuleType) -> Measured:
    torch.manual_seed(0)
    return Measured(networks.randomise(Small(), 0), networks.floats(40, RGB))


def halves(count: int) -> list[Tensor]:
    return [torch.arange(count) < count // 2, torch.arange(count) >= count // 2]


def test_the_measured_points_and_the_curve_between_them_are_those_of_removing_by_hand(small: Measured) -> None:
    parts = [*halves(40), torch.arange(40) % 5 == 0]
    found = small.errors(parts)
    points = {}
    for kept in (8, 6, 4, 2):  # round(10 * .35) is 4, round(10 * .15) is 2: halves go to the even number
        each = torch.tensor(small.divergence(0, kept))
        points[kept] = max(float(each[part].mean()) for part in parts)
    missing = small.orders[0].missing
    x, y = ([math.log(float(missing[k])) for k in points], [math.log(max(e, 1e-9)) for e in points.values()])
    slope = min(4.0, max(0.5, np.polyfit(x, y, 1)[0]))
    level = np.mean(y) - slope * np.mean(x)
    expected = [math.exp(level) * m**slope for m in missing.tolist()]
    assert found["conv1"].tolist() == pytest.approx(expected, rel=1e-3)


def test_errors_fall_with_every_unit_that_is_kept_and_are_as_many_as_the_units_and_one(small: Measured) -> None:
    for group, error in zip(small.units.groups, small.errors(halves(40)).values(), strict=True):
        values = error.tolist()
        assert error.dtype == torch.float64
        assert len(values) == len(group.units) + 1
        assert values == sorted(values, reverse=True)
        assert values[-1] == pytest.approx(0, abs=1e-6)
        assert values[0] > 0


def test_the_slice_that_suffers_most_decides(small: Measured) -> None:
    """A group of two has one point, so what is fitted is a straight line through it."""
    first, second = halves(40)
    alone = [float(small.errors([part])["conv2"][1]) for part in (first, second)]
    both = float(small.errors([first, second])["conv2"][1])
    mean = float(small.errors([first | second])["conv2"][1])
    assert alone[0] != pytest.approx(alone[1], rel=0.01)
    assert both == pytest.approx(max(alone))
    assert mean == pytest.approx(sum(alone) / 2)
    each = torch.tensor(small.divergence(1, 1))
    assert alone == pytest.approx([float(each[part].mean()) for part in (first, second)], rel=1e-3)


def test_the_order_in_which_the_images_come_is_no_matter(networks: ModuleType) -> None:
    """More than one batch of them, class by class: the last class would be in no batch, and none would be mixed."""
    torch.manual_seed(0)
    labels = torch.arange(4).repeat_interleave(75)
    images = networks.floats(300, RGB) + labels.view(-1, 1, 1, 1)
    measured = Measured(networks.randomise(Small(), 0), images)
    by_class = measured.errors([labels < 2, labels >= 2])
    order = torch.randperm(300, generator=torch.Generator().manual_seed(1))
    measured.images = images[order]
    shuffled = measured.errors([labels[order] < 2, labels[order] >= 2])
    for left, right in zip(by_class.values(), shuffled.values(), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-9)


def test_statistics_are_taken_again_from_all_images_and_each_batch_is_of_all_classes(
    networks: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    labels = torch.arange(4).repeat_interleave(65)
    images = networks.floats(260, RGB)
    measured, seen = Measured(networks.randomise(Small(), 0), images), list[Tensor]()
    of_image = {image.numpy().tobytes(): number for number, image in enumerate(images)}

    def watched(network: nn.Module, given: Tensor, **settings: bool) -> None:
        watch = network.register_forward_pre_hook(lambda _m, inputs: seen.append(inputs[0]))
        retake_statistics(network, given, **settings)
        watch.remove()

    monkeypatch.setattr("nss.sensitivity.retake_statistics", watched)
    measured.errors([labels < 2, labels >= 2])
    numbers = [[of_image[image.numpy().tobytes()] for image in batch] for batch in seen[:2]]
    assert [len(each) for each in numbers] == [130, 130]
    assert sorted(numbers[0] + numbers[1]) == list(range(260))
    for each in numbers:
        assert min(torch.bincount(labels[each], minlength=4).tolist()) >= 20


def test_a_slice_without_images_has_no_say(small: Measured) -> None:
    nobody = torch.zeros(40, dtype=torch.bool)
    for left, right in zip(
        small.errors(halves(40)).values(), small.errors([nobody, *halves(40)]).values(), strict=True
    ):
        assert torch.equal(left, right)


def test_a_layer_of_one_unit_cannot_be_measured_and_keeps_it(small: Measured) -> None:
    assert small.errors(halves(40))["one"].tolist() == [1, 0]


class Unequal(nn.Module):
    """Two branches; of one of them the rest hears next to nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.loud = nn.Conv2d(3, 8, 3)
        self.quiet = nn.Conv2d(3, 8, 3)
        self.after_loud = nn.Conv2d(8, 4, 3)
        self.after_quiet = nn.Conv2d(8, 4, 3)
        self.head = nn.Linear(4, 4)
        with torch.no_grad():
            self.after_quiet.weight *= 1e-3
            self.head.weight *= 10

    def forward(self, x: Tensor) -> Tensor:
        x = self.after_loud(torch.tanh(self.loud(x))) + self.after_quiet(torch.tanh(self.quiet(x)))
        return self.head(torch.tanh(x).mean((2, 3)))


def test_a_layer_that_hardly_matters_has_far_smaller_errors_than_one_that_does(networks: ModuleType) -> None:
    torch.manual_seed(1)
    measured = Measured(Unequal(), networks.floats(40, RGB))
    errors = measured.errors(halves(40))
    assert float(errors["quiet"][4]) < 1e-3 * float(errors["loud"][4])


def test_measuring_changes_neither_the_model_nor_what_it_is_given(small: Measured) -> None:
    before = model_digest(small.model)
    missing = [order.missing.clone() for order in small.orders]
    small.model.train()
    first = small.errors(halves(40))
    assert model_digest(small.model) == before
    assert all(module.training for module in small.model.modules())
    assert all(torch.equal(order.missing, each) for order, each in zip(small.orders, missing, strict=True))
    for left, right in zip(first.values(), small.errors(halves(40)).values(), strict=True):
        assert torch.equal(left, right)
