"""DeepLIFT against Captum where Captum is right, and against completeness where it is not."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision import models

from nss import zoo
from nss.anatomy import trace
from nss.deeplift import Way, refer, rescaling
from nss.functional import without_inplace
from nss.profile import profile
from nss.sites import find_sites
from nss.taps import Tap, with_modules

captum_attr = pytest.importorskip("captum.attr")


class FunctionalRelu(nn.Module):
    """Captum sees no F.relu."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(1, 3, 3), nn.Linear(3 * 16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.relu(self.conv(x)).flatten(1))


class PooledRelu(nn.Module):
    """ReLU, then overlapping max pooling, with biases that move."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.relu, self.pool, self.fc = nn.Conv2d(1, 3, 3), nn.ReLU(), nn.MaxPool2d(3, 1), nn.Linear(12, 4)
        nn.init.normal_(self.conv.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.pool(self.relu(self.conv(x))).flatten(1))


class OneReluTwice(nn.Module):
    """Captum refuses a module that is called twice; here it also overwrites its input."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2, self.fc = nn.Conv2d(1, 3, 3), nn.Conv2d(3, 3, 3), nn.Linear(12, 4)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.conv1(x))
        return self.fc(self.relu(self.conv2(x)).flatten(1))


class Gated(nn.Module):
    """A product of two activations, as in squeeze-excite, and pooling to one value."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 3, 3), nn.Conv2d(3, 3, 1)
        self.pool, self.fc = nn.AdaptiveMaxPool2d(1), nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.conv1(x))
        return self.fc(self.pool(x * torch.sigmoid(self.conv2(x))).flatten(1))


def contributions(network: nn.Module, x: Tensor, reference: Tensor, target: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """(a - a0) * multiplier of every site, and f(x) - f(x0) of the target logit."""
    sites = find_sites(network, tuple(x.shape[1:]))
    graph, way, seen = without_inplace(sites.anatomy.graph), Way(True), {}
    nodes = {node.name: node for node in graph.graph.nodes}

    def keep(name: str) -> Tap:
        return Tap(lambda value: seen.setdefault(name, value))

    tapped = with_modules(graph, {nodes[site.node.name]: keep(site.name) for site in sites}, "tap")
    lifted = rescaling(tapped, way)
    refer(lifted, way, reference[None])
    bases = list(seen.values())
    seen.clear()
    chosen = lifted(x.clone().requires_grad_()).gather(1, target[:, None])
    multipliers = torch.autograd.grad(chosen.sum(), list(seen.values()))
    found = {
        name: ((value - base) * each).detach()
        for (name, value), base, each in zip(seen.items(), bases, multipliers, strict=True)
    }
    return found, (chosen.detach() - network(reference[None])[0, target, None].detach())[:, 0]


def samples(shape: tuple[int, int, int]) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, *shape, generator=generator, dtype=torch.float64)
    return x, 0.3 * torch.randn(shape, generator=generator, dtype=torch.float64), torch.tensor([0, 1, 2, 3, 0])


@pytest.mark.parametrize("build", [FunctionalRelu, PooledRelu, OneReluTwice, Gated])
def test_contributions_are_complete_where_captum_is_wrong_or_refuses(build: type[nn.Module]) -> None:
    torch.manual_seed(1)
    network = build().double().eval()
    x, reference, target = samples((1, 6, 6))
    found, change = contributions(network, x, reference, target)
    last = list(found)[-1] if build is not Gated else "conv1"
    whole = [name for name in found if build is not Gated or name == "conv1"]
    assert last in whole
    for name in whole:
        torch.testing.assert_close(found[name].flatten(1).sum(1), change, atol=1e-9, rtol=0)
    assert float(change.abs().min()) > 1e-3


@pytest.mark.parametrize("factory", [zoo.lenet, zoo.vgg_small])
@pytest.mark.parametrize("zeros", [True, False], ids=["zeros", "random reference"])
def test_contributions_of_every_layer_are_complete_in_plain_networks(factory, zeros: bool) -> None:
    torch.manual_seed(1)
    network = factory(4, (1, 28, 28)).double().eval()
    x, reference, target = samples((1, 28, 28))
    found, change = contributions(network, x, torch.zeros_like(reference) if zeros else reference, target)
    for name, each in found.items():
        torch.testing.assert_close(each.flatten(1).sum(1), change, atol=1e-9, rtol=1e-7, msg=name)


def test_contributions_equal_captums_where_captum_is_right() -> None:
    torch.manual_seed(1)
    network = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Sigmoid(), nn.Flatten(), nn.Linear(16, 8)
    )
    network = nn.Sequential(*network, nn.Tanh(), nn.Linear(8, 4)).double().eval()
    x, reference, target = samples((1, 6, 6))
    found, _ = contributions(network, x, reference, target)
    assert list(found) == ["0", "2", "5"]
    for name, end in {"0": 1, "2": 3, "5": 6}.items():
        expected = captum_attr.LayerDeepLift(network, network[end]).attribute(x, reference[None], target=target)
        torch.testing.assert_close(found[name], expected.detach(), atol=1e-6, rtol=1e-6)


def test_captum_really_is_incomplete_on_pooled_relu() -> None:
    """The reason why it is an oracle only elsewhere."""
    torch.manual_seed(1)
    network = PooledRelu().double().eval()
    x, reference, target = samples((1, 6, 6))
    _, change = contributions(network, x, reference, target)
    theirs = captum_attr.LayerDeepLift(network, network.conv).attribute(x, reference[None], target=target)
    assert float((theirs.flatten(1).sum(1) - change).abs().max()) > 1e-4


def test_the_profile_adds_up_the_size_of_contributions_by_category() -> None:
    torch.manual_seed(1)
    network = PooledRelu().double().eval()
    x, reference, target = samples((1, 6, 6))
    found, _ = contributions(network, x, reference, target)
    expected = torch.zeros(4, 3, dtype=torch.float64)
    for row, label in zip(found["conv"].sum((2, 3)).abs(), target, strict=True):
        expected[label] += row
    names, shape = list("abcd"), (1, 6, 6)
    state = profile(network, (x, target), ["deeplift"], reference=reference, classes=names, input_shape=shape)
    torch.testing.assert_close(state.sums["deeplift"]["conv"], expected, atol=1e-9, rtol=0)


def test_the_same_graph_still_gives_plain_derivatives() -> None:
    torch.manual_seed(1)
    network = models.mobilenet_v3_small(weights=None, num_classes=4).double().eval()
    x, _, target = samples((3, 32, 32))
    graph = rescaling(without_inplace(find_sites(network, (3, 32, 32)).anatomy.graph), Way(False))
    plain, ours = (x.clone().requires_grad_() for _ in range(2))
    network(plain).gather(1, target[:, None]).sum().backward()
    graph(ours).gather(1, target[:, None]).sum().backward()
    torch.testing.assert_close(ours.grad, plain.grad, atol=1e-12, rtol=1e-9)


class Folded(nn.Module):
    """Takes the pixels of an image for rows of a batch, as windows of attention do; then multiplies two of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.gate, self.head = nn.Linear(2, 3), nn.Linear(2, 3), nn.Linear(3 * 36, 4)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(2).transpose(1, 2).reshape(-1, 2)
        return self.head((F.silu(self.inner(rows)) * torch.sigmoid(self.gate(rows))).reshape(-1, 3 * 36))


def pooled(pool: nn.Module, entries: int) -> nn.Module:
    return nn.Sequential(nn.Tanh(), pool, nn.Flatten(), nn.Linear(entries, 4))


@pytest.mark.parametrize(
    ("network", "shape"),
    [
        (Folded(), (2, 6, 6)),
        (pooled(nn.MaxPool1d(3, 2), 3 * 4), (3, 9)),
        (pooled(nn.MaxPool2d(3, 2, 1, ceil_mode=True), 3 * 16), (3, 7, 6)),
        (pooled(nn.MaxPool2d(2, dilation=2), 3 * 4), (3, 6, 6)),
        (pooled(nn.MaxPool3d(2), 2 * 8), (2, 4, 4, 4)),
        (pooled(nn.AdaptiveMaxPool2d((2, 3)), 3 * 6), (3, 7, 6)),
    ],
    ids=["folded", "1d", "overlapping", "dilated", "3d", "adaptive"],
)
@pytest.mark.parametrize("last", [False, True], ids=["channels first", "channels last"])
def test_contributions_of_the_input_are_complete(network: nn.Module, shape: tuple[int, ...], last: bool) -> None:
    network, generator = network.double().eval(), torch.Generator().manual_seed(2)
    x, reference = (torch.randn(count, *shape, generator=generator, dtype=torch.float64) for count in (5, 1))
    if last and x.dim() == 4:
        x, reference = (each.to(memory_format=torch.channels_last) for each in (x, reference))
    way = Way(True)
    lifted = rescaling(trace(network), way)
    refer(lifted, way, reference)
    given = x.clone().requires_grad_()
    multipliers = torch.autograd.grad(lifted(given)[:, 1].sum(), given)[0]
    change = (network(x) - network(reference))[:, 1].detach()
    torch.testing.assert_close(((x - reference) * multipliers).flatten(1).sum(1), change, atol=1e-12, rtol=1e-9)


def test_contributions_are_the_same_in_whatever_parts_they_are_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(1)
    network = Gated().double().eval()
    x, reference, target = samples((1, 6, 6))
    x, target = torch.cat([x, -x[:3]]), torch.cat([target, target[:3]])
    whole, _ = contributions(network, x, reference, target)
    monkeypatch.setattr("nss.deeplift.PART", 100)  # an image behind the first convolution has 48 entries
    for name, each in contributions(network, x, reference, target)[0].items():
        torch.testing.assert_close(each, whole[name], atol=1e-15, rtol=1e-12)


def test_values_that_are_overwritten_and_read_again_keep_their_meaning() -> None:
    class Overwrites(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = x * 2
            F.relu(y, inplace=True)
            z = y + 1
            z += y
            z.mul_(3)
            torch.sigmoid_(z)
            return y + z

    x = torch.linspace(-2, 2, 9, dtype=torch.float64)
    expected = Overwrites()(x.clone())
    calm = without_inplace(trace(Overwrites()))
    before = x.clone()
    torch.testing.assert_close(calm(x), expected, atol=0, rtol=0)
    assert torch.equal(x, before)
    assert not [node for node in calm.graph.nodes if str(getattr(node.target, "__name__", node.target)).endswith("_")]
