"""Networks written in unusual ways: keywords instead of positions, names that mislead, modules made in the forward."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from nss.errors import SiteError
from nss.profile import profile
from nss.remove import plan_removal, remove
from nss.sites import find_sites
from nss.sliced import sliced

SHAPE = (3, 6, 6)
FIRST = torch.arange(8) % 4 == 0


class Net(nn.Module):
    """Convolutions `a` and `b` of eight channels, a norm, a head over means, and a forward that is given."""

    def __init__(self, between: Callable[[Any, Tensor], Tensor], **more: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.norm, self.head = nn.BatchNorm2d(8), nn.Linear(8, 4)
        nn.init.uniform_(self.norm.running_mean, -0.2, 0.2)
        for name, module in more.items():
            self.add_module(name, module)
        self.between = between
        self.double().eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.between(self, x).mean((2, 3)))


def images(count: int = 8) -> Tensor:
    return torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def scores(network: nn.Module, metric: str = "deeplift") -> dict[str, Tensor]:
    data = images(), torch.arange(8) % 4
    return profile(network, data, [metric], classes=list("abcd"), input_shape=SHAPE).scores(metric)


def removed_differs_by(network: nn.Module, neurons: dict[str, Tensor]) -> float:
    """How far the smaller network is from the masked one."""
    with torch.no_grad():
        masked, smaller = sliced(network, neurons, SHAPE)(images()), remove(network, neurons, SHAPE)(images())
        assert float((network(images()) - masked).abs().max()) > 1e-3
    return float((smaller - masked).abs().max())


def assert_same_scores(network: nn.Module, other: nn.Module) -> None:
    assert torch.equal(network(images()), other(images()))
    for metric in ("taylor", "deeplift"):
        found, expected = scores(network, metric), scores(other, metric)
        assert found.keys() == expected.keys()
        for name, values in expected.items():
            assert float(values.sum()) > 0
            torch.testing.assert_close(found[name], values, atol=0, rtol=0, msg=f"{metric} of {name}")


# -- names of attributes say nothing about what the module does ------------------------------------------------


@pytest.mark.parametrize("name", ["relu", "mul", "max_pool2d"])
@pytest.mark.parametrize("kind", [nn.LeakyReLU, nn.GELU, partial(nn.Hardtanh, 0.0, 0.2), nn.Tanh])
def test_an_activation_is_what_it_is_whatever_its_attribute_is_called(name: str, kind: Callable[[], nn.Module]) -> None:
    def between(called: str) -> Callable[[Any, Tensor], Tensor]:
        return lambda self, x: getattr(self, called)(self.b(getattr(self, called)(self.a(x))))

    assert_same_scores(Net(between(name), **{name: kind()}), Net(between("act"), act=kind()))


def test_a_layer_called_as_a_function_is_a_layer() -> None:
    network = Net(lambda self, x: F.relu(self.b(self.add(F.relu(self.a(x))))), add=nn.Conv2d(8, 8, 1))
    assert [site.name for site in find_sites(network, SHAPE)] == ["a", "add", "b"]
    assert removed_differs_by(network, {"a": FIRST, "add": FIRST, "b": FIRST}) < 1e-6


def mul(x: Tensor, y: Tensor) -> Tensor:
    """Not what torch.mul does."""
    return x.cumsum(1) - y


fx.wrap("mul")


def test_a_function_of_the_users_is_not_known_by_its_name() -> None:
    network = Net(lambda self, x: F.relu(mul(F.relu(self.b(F.relu(self.a(x)))), self.c(x))), c=nn.Conv2d(3, 8, 1))
    assert [site.name for site in find_sites(network, SHAPE)] == ["a"]
    assert removed_differs_by(network, {"a": FIRST}) < 1e-6


# -- pools that are functions ----------------------------------------------------------------------------------

POOLS: dict[str, Callable[[Tensor], Tensor]] = {
    "torch": lambda x: torch.max_pool2d(x, 2),
    "torch with settings": lambda x: torch.max_pool2d(x, [2, 2], stride=2),
    "torch by keyword": lambda x: torch.max_pool2d(input=x, kernel_size=2),
    "F by keyword": lambda x: F.max_pool2d(input=x, kernel_size=2),
    "F": lambda x: F.max_pool2d(x, 2),
    "one axis at a time": lambda x: F.max_pool2d(torch.max_pool2d(x, (2, 1)), (1, 2)),
    "size asked of the map": lambda x: F.max_pool2d(x, kernel_size=x.shape[2] // 3),
}


@pytest.mark.parametrize("how", POOLS)
def test_max_pooling_by_function_scores_as_the_module_does(how: str) -> None:
    function = Net(lambda self, x: F.relu(self.b(POOLS[how](F.relu(self.a(x))))))
    module = Net(lambda self, x: F.relu(self.b(self.pool(F.relu(self.a(x))))), pool=nn.MaxPool2d(2))
    assert torch.equal(function(images()), module(images()))
    for metric in ("taylor", "deeplift"):
        found, expected = scores(function, metric), scores(module, metric)
        for name in ("a", "b"):
            torch.testing.assert_close(found[name], expected[name], atol=1e-14, rtol=0)
    assert removed_differs_by(function, {"a": FIRST, "b": FIRST}) < 1e-6


@pytest.mark.parametrize("asked_by", ["module", "function"])
def test_a_pool_that_also_says_where_is_profiled_and_what_it_reads_is_no_neuron(asked_by: str) -> None:
    def between(self: Any, x: Tensor) -> Tensor:
        x = F.relu(self.b(F.relu(self.a(x))))
        if asked_by == "module":
            return self.pool(x)[0]
        return torch.adaptive_max_pool1d(x.flatten(2), 3)[0].unsqueeze(3)

    network = Net(between, pool=nn.MaxPool2d(2, return_indices=True))
    assert [site.name for site in find_sites(network, SHAPE)] == ["a"]
    assert torch.isfinite(scores(network)["a"]).all()
    assert removed_differs_by(network, {"a": FIRST}) < 1e-6


# -- keywords instead of positions -----------------------------------------------------------------------------

Way = Callable[[Any, Tensor, Tensor], Tensor]
# What is done with relu(a(x)) and b of it: once by keyword, once by position.
WAYS: dict[str, tuple[Way, Way]] = {
    "add, other": (lambda self, x, y: torch.add(x, other=y), lambda self, x, y: x + y),
    "add, both": (lambda self, x, y: torch.add(input=x, other=y), lambda self, x, y: x + y),
    "add, turned": (lambda self, x, y: torch.add(other=y, input=x), lambda self, x, y: x + y),
    "add, method": (lambda self, x, y: x.add(other=y), lambda self, x, y: x + y),
    "add, scaled": (lambda self, x, y: torch.add(x, alpha=2, other=y), lambda self, x, y: torch.add(x, y, alpha=2)),
    "sub": (lambda self, x, y: torch.sub(input=x, other=y), lambda self, x, y: x - y),
    "mul": (lambda self, x, y: torch.mul(x, other=y), lambda self, x, y: x * y),
    "mul, method": (lambda self, x, y: x.mul(other=y), lambda self, x, y: x * y),
    "square": (lambda self, x, y: torch.mul(input=y, other=y), lambda self, x, y: y * y),
    "div": (lambda self, x, y: torch.div(input=y, other=2.0), lambda self, x, y: y / 2.0),
    "shift": (lambda self, x, y: torch.add(y, other=1.5), lambda self, x, y: y + 1.5),
    "cat": (
        lambda self, x, y: self.both(torch.cat(dim=1, tensors=[x, y])),
        lambda self, x, y: self.both(torch.cat([x, y], 1)),
    ),
    "stack": (
        lambda self, x, y: self.both(torch.stack(tensors=(x, y), dim=1).flatten(start_dim=1, end_dim=2)),
        lambda self, x, y: self.both(torch.stack((x, y), 1).flatten(1, 2)),
    ),
    "norm": (lambda self, x, y: self.norm(input=y), lambda self, x, y: self.norm(y)),
    "layer": (lambda self, x, y: self.c(input=y), lambda self, x, y: self.c(y)),
    "relu": (lambda self, x, y: torch.relu(input=y), lambda self, x, y: y.relu()),
    "relu in place": (lambda self, x, y: F.relu(input=y, inplace=True) + x, lambda self, x, y: F.relu(y) + x),
    "leaky": (lambda self, x, y: F.leaky_relu(negative_slope=0.2, input=y), lambda self, x, y: F.leaky_relu(y, 0.2)),
    "module": (lambda self, x, y: self.act(input=y), lambda self, x, y: self.act(y)),
    "mean": (
        lambda self, x, y: x * torch.mean(input=y, dim=(2, 3), keepdim=True),
        lambda self, x, y: x * y.mean((2, 3), True),
    ),
    "flatten": (
        lambda self, x, y: torch.flatten(input=y, start_dim=2).unsqueeze(dim=3),
        lambda self, x, y: torch.flatten(y, 2).unsqueeze(3),
    ),
    "transpose": (
        lambda self, x, y: torch.transpose(input=y, dim0=2, dim1=3),
        lambda self, x, y: y.transpose(2, 3),
    ),
}  # fmt: skip


def keyword_net(way: Way) -> Net:
    def between(self: Any, x: Tensor) -> Tensor:
        x = F.relu(self.a(x))
        return F.relu(self.last(way(self, x, self.b(x))))

    more = {"both": nn.Conv2d(16, 8, 1), "c": nn.Conv2d(8, 8, 1), "act": nn.SiLU(), "last": nn.Conv2d(8, 8, 1)}
    network = Net(between, **more)
    torch.manual_seed(2)
    for layer in more.values():
        if isinstance(layer, nn.Conv2d):
            layer.reset_parameters()
    return network


@pytest.mark.parametrize("name", WAYS)
def test_arguments_by_keyword_mean_what_they_mean_by_position(name: str) -> None:
    keyword, position = (keyword_net(way) for way in WAYS[name])
    assert_same_scores(keyword, position)
    neurons = {"a": FIRST, "b": FIRST.roll(1), "last": FIRST}
    assert removed_differs_by(keyword, neurons) < 1e-6
    plans = [plan_removal(network, neurons, SHAPE) for network in (keyword, position)]
    assert plans[0] == plans[1]
    assert sum(each.removed for each in plans[0].layers.values()) >= 8


@pytest.mark.parametrize("name", ["reshape", "view"])
def test_a_shape_by_keyword_follows_the_channels_that_are_left(name: str) -> None:
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.head = nn.Conv2d(3, 8, 3), nn.Linear(128, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = F.relu(self.a(x))
            x = x.view(size=(len(images()), -1)) if name == "view" else torch.reshape(input=x, shape=(-1, 128))
            return self.head(x)

    network = Flat().double().eval()
    sites = find_sites(network, SHAPE) if name == "reshape" else None
    if sites is not None:
        # The view names 128 values: a channel can be masked, but it cannot leave.
        assert not bool(sites.removable(sites.couple({"a": FIRST}).ids).any())
        assert removed_differs_by(network, {"a": FIRST}) < 1e-6


def test_channels_that_something_is_divided_by_are_no_neurons() -> None:
    network = Net(lambda self, x: F.relu(self.b(F.relu(self.a(x)) / self.c(x).sigmoid())), c=nn.Conv2d(3, 8, 1))
    assert [site.name for site in find_sites(network, SHAPE)] == ["b"]
    assert removed_differs_by(network, {"b": FIRST}) < 1e-6


def test_limits_that_are_values_of_the_network_are_passed_on_by_their_derivative() -> None:
    def between(self: Any, x: Tensor) -> Tensor:
        return self.b(torch.clamp(self.a(x), max=self.c(x).mean()))

    network = Net(between, c=nn.Conv2d(3, 8, 1))
    found = scores(network)
    assert all(bool(torch.isfinite(each).all()) and float(each.sum()) > 0 for each in found.values())


# -- grouped convolutions beside the image ---------------------------------------------------------------------


def test_channels_that_a_grouped_convolution_reads_beside_the_image_are_masked_and_never_leave() -> None:
    network = Net(
        lambda self, x: F.relu(self.last(F.relu(self.grouped(torch.cat([x, F.relu(self.a6(x))], 1))))),
        a6=nn.Conv2d(3, 6, 3, padding=1),
        grouped=nn.Conv2d(9, 9, 3, padding=1, groups=3),
        last=nn.Conv2d(9, 8, 1),
    )
    neurons = {"a6": torch.arange(6) < 3, "grouped": torch.arange(9) % 3 == 0, "last": FIRST}
    plan = plan_removal(network, neurons, SHAPE).layers
    # Groups read image, image, image; a 0..2; a 3..5: no column of the three has neurons in all groups.
    assert (plan["a6"].removed, plan["a6"].masked) == (0, 3)
    assert "grouped convolution" in plan["a6"].reason
    # Of the outputs, which are all neurons, every group loses the second and the third.
    assert (plan["grouped"].removed, plan["grouped"].masked) == (6, 0)
    assert removed_differs_by(network, neurons) < 1e-6


def test_columns_of_neurons_alone_still_leave_a_grouped_convolution_that_reads_the_image_in_another() -> None:
    network = Net(
        lambda self, x: F.relu(self.last(F.relu(self.grouped(torch.cat([self.a9(x), x[:, :1]], 1))))),
        a9=nn.Conv2d(3, 9, 3, padding=1),
        grouped=nn.Conv2d(10, 8, 3, padding=1, groups=2),
        last=nn.Conv2d(8, 8, 1),
    )
    neurons = {"a9": torch.tensor([True, False, True, True, False, True, False, True, True])}
    plan = plan_removal(network, neurons, SHAPE).layers
    # Columns (0, 5), (1, 6), (2, 7), (3, 8), (4, image): only the second leaves.
    assert (plan["a9"].removed, plan["a9"].masked) == (2, 1)
    assert removed_differs_by(network, neurons) < 1e-6


# -- what the tracing says -------------------------------------------------------------------------------------


def test_a_module_made_in_the_forward_is_refused_with_the_right_remedy() -> None:
    network = Net(lambda self, x: nn.ReLU()(self.a(x)))
    with pytest.raises(SiteError, match="the forward calls a ReLU that is no submodule of Net") as caught:
        find_sites(network, SHAPE)
    assert "__init__" in caught.value.fix
    assert "F.relu" in caught.value.fix
    assert "torch.where" not in str(caught.value)


def test_layers_in_a_plain_list_are_refused_with_the_right_remedy() -> None:
    layers = [nn.Conv2d(8, 8, 1).double()]
    with pytest.raises(SiteError, match="calls a Conv2d that is no submodule of Net") as caught:
        find_sites(Net(lambda self, x: layers[0](F.relu(self.a(x)))), SHAPE)
    assert "nn.ModuleList" in caught.value.fix


class Flags(nn.Module):
    """Does something else when asked to."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Linear(8, 4)

    def forward(
        self, x: Tensor, features: bool = False, mask: Tensor | None = None, times: int = 1, *, scale: float = 1.0
    ) -> Tensor:
        x = F.relu(self.a(x))
        for _ in range(times):
            x = F.relu(self.b(x))
        if mask is not None:
            x = x * mask
        if features:
            return x
        return self.head(x.mean((2, 3))) * scale


def test_arguments_with_a_default_have_it_while_the_network_is_traced() -> None:
    network = Flags().double().eval()
    sites = find_sites(network, SHAPE)
    assert [site.name for site in sites] == ["a", "b"]
    graph = sites.anatomy.graph
    assert [node.name for node in graph.graph.nodes if node.op == "placeholder"] == ["x"]
    assert torch.equal(graph(images()), network(images()))
    assert removed_differs_by(network, {"a": FIRST, "b": FIRST}) < 1e-6


def test_an_image_that_has_a_default_is_still_the_image() -> None:
    class Optional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 4)

        def forward(self, x: Tensor | None = None) -> Tensor:
            return self.head(F.relu(self.a(x)).mean((2, 3)))

    assert [site.name for site in find_sites(Optional(), SHAPE)] == ["a"]
