"""The peers of the benchmarks are run as they should be: the size asked for, whole groups, statistics taken again."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.peers import PEERS, prune, taylor_gradients
from nss.model import Classifier, ModelSpec, model_digest
from nss.remove import remove
from nss.size import count_macs
from nss.statistics import retake_statistics

WIDE = 160  # one channel is less than 0.01 of the multiply-adds


class Residual(nn.Module):
    """A convolution, one with a path around it, a hidden layer, a head. The two convolutions lose the same channels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(1, WIDE, 3, padding=1), nn.BatchNorm2d(WIDE)
        self.conv2, self.bn2 = nn.Conv2d(WIDE, WIDE, 3, padding=1), nn.BatchNorm2d(WIDE)
        self.hidden, self.head = nn.Linear(WIDE * 4, 20), nn.Linear(20, 3)

    def forward(self, x: Tensor) -> Tensor:
        first = F.relu(self.bn1(self.conv1(x)))
        second = F.relu(self.bn2(self.conv2(first)) + first)
        return self.head(F.relu(self.hidden(F.max_pool2d(second, 2).flatten(1))))


@pytest.fixture
def model() -> Classifier:
    torch.manual_seed(0)
    network = Residual()
    for norm in (network.bn1, network.bn2):
        nn.init.uniform_(norm.weight, 0.2, 2.0)
        nn.init.normal_(norm.running_mean)
    spec = ModelSpec("nss.zoo:lenet", ("a", "b", "c"), (1, 4, 4), (0.5,), (0.25,))
    return Classifier(network, spec).eval()


@pytest.fixture
def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return (
        torch.randint(0, 256, (40, 1, 4, 4), dtype=torch.uint8, generator=generator),
        torch.arange(40) % 3,
    )


@pytest.mark.parametrize("method", PEERS)
@pytest.mark.parametrize("budget", [0.5, 0.25])
def test_peers_reach_the_multiply_adds_that_are_asked(
    model: Classifier, data: tuple[Tensor, Tensor], method: str, budget: float
) -> None:
    before = model_digest(model)
    smaller = prune(model, method, budget, taylor_gradients(model, *data), data[0])
    assert abs(count_macs(smaller) / count_macs(model) - budget) <= 0.01
    assert smaller(data[0]).shape == (40, 3)
    assert model_digest(model) == before


@pytest.mark.parametrize("method", PEERS)
def test_peers_lose_whole_coupled_groups_and_what_is_left_is_named(
    model: Classifier, data: tuple[Tensor, Tensor], method: str
) -> None:
    smaller = prune(model, method, 0.4, taylor_gradients(model, *data), data[0])
    kept = smaller.spec.kept
    assert kept["conv1"] == kept["conv2"]
    assert set(kept) == {"conv1", "conv2", "hidden"}
    sizes = {"conv1": WIDE, "conv2": WIDE, "hidden": 20}
    masks = {name: torch.isin(torch.arange(size), torch.tensor(kept[name])) for name, size in sizes.items()}
    ours = remove(model, masks)
    retake_statistics(ours, data[0])
    torch.testing.assert_close(smaller(data[0]), ours(data[0]))


def test_statistics_of_peers_are_those_of_the_images(model: Classifier, data: tuple[Tensor, Tensor]) -> None:
    smaller = prune(model, "tp-magnitude-local", 0.5, {}, data[0])
    network = smaller.network
    pixels = (data[0] / 255 - 0.5) / 0.25
    first = network.conv1(pixels)
    second = network.conv2(F.relu(_normed(first, network.bn1)))
    for norm, seen in ((network.bn1, first), (network.bn2, second)):
        torch.testing.assert_close(norm.running_mean, seen.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(norm.running_var, seen.var((0, 2, 3)), rtol=1e-4, atol=1e-5)


def _normed(seen: Tensor, norm: nn.BatchNorm2d) -> Tensor:
    scale = norm.weight / (seen.var((0, 2, 3), unbiased=False) + norm.eps).sqrt()
    return (seen - seen.mean((0, 2, 3))[:, None, None]) * scale[:, None, None] + norm.bias[:, None, None]


def test_a_layer_that_ranks_last_everywhere_is_cut_to_a_tenth_instead_of_left_whole(model: Classifier) -> None:
    with torch.no_grad():
        for weight in (model.network.hidden.weight, model.network.head.weight):
            weight.mul_(torch.rand(weight.shape) < 0.5)  # importances of equal mean, some near 0
        model.network.hidden.weight[1:] *= 1e-4
        model.network.head.weight[:, 1:] *= 1e-4
    smaller = prune(model, "tp-magnitude-global", 0.5, {}, torch.zeros(2, 1, 4, 4))
    assert smaller.network.hidden.out_features == 2


def test_what_no_ratio_reaches_is_refused(model: Classifier, data: tuple[Tensor, Tensor]) -> None:
    with pytest.raises(ValueError, match="comes no nearer"):
        prune(model, "tp-magnitude-local", -0.01, {}, data[0])


def test_taylor_gradients_are_added_up_over_batches_and_leave_the_model_alone(
    model: Classifier, data: tuple[Tensor, Tensor]
) -> None:
    found = taylor_gradients(model, *data, batch_size=20)
    halves = [slice(0, 20), slice(20, 40)]
    loss = sum((F.cross_entropy(model(data[0][half]), data[1][half]) for half in halves), torch.zeros(()))
    weights = dict(model.network.named_parameters())
    for name, expected in zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True):
        torch.testing.assert_close(found[name], expected)
    assert all(weight.grad is None for weight in weights.values())
