"""The zoo: sizes, shapes, and forward passes against the layers written out one by one."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nss import zoo

SHAPES = [(1, 28, 28), (3, 32, 32), (1, 8, 8), (3, 17, 23)]


@pytest.mark.parametrize("name", ["lenet", "vgg_small", "resnet20", "mobilenet_small"])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_network_takes_every_image_shape(name: str, shape: tuple[int, int, int]) -> None:
    network = getattr(zoo, name)(7, shape).eval()
    with torch.no_grad():
        assert network(torch.zeros(2, *shape)).shape == (2, 7)


@pytest.mark.parametrize(
    ("name", "shape", "low", "high"),
    [
        ("vgg_small", (1, 28, 28), 584_000, 586_000),
        ("resnet20", (3, 32, 32), 271_000, 273_000),
        ("mobilenet_small", (3, 32, 32), 63_000, 65_000),
        ("lenet", (1, 28, 28), 200_000, 220_000),
    ],
)
def test_sizes_are_those_that_the_documentation_names(
    name: str, shape: tuple[int, int, int], low: int, high: int
) -> None:
    assert low <= sum(parameter.numel() for parameter in getattr(zoo, name)(10, shape).parameters()) <= high


def test_resnet20_has_the_parameters_of_its_paper() -> None:
    # 3x3 convolutions without bias, two norm values a channel, 1x1 convolutions where shapes differ, the head.
    convs = 3 * 16 * 9 + 6 * 16 * 16 * 9 + 16 * 32 * 9 + 5 * 32 * 32 * 9 + 32 * 64 * 9 + 5 * 64 * 64 * 9
    norms = 2 * (16 * 7 + 32 * 7 + 64 * 7)
    head = 64 * 10 + 10
    found = sum(parameter.numel() for parameter in zoo.resnet20(10, (3, 32, 32)).parameters())
    assert found == convs + norms + head + 16 * 32 + 32 * 64


def normed(conv: nn.Conv2d, norm: nn.BatchNorm2d, x: Tensor, stride: int, groups: int = 1) -> Tensor:
    x = F.conv2d(x, conv.weight, None, stride, conv.kernel_size[0] // 2, groups=groups)
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    return (x - norm.running_mean.view(-1, 1, 1)) * scale.view(-1, 1, 1) + norm.bias.view(-1, 1, 1)


def test_resnet20_is_three_stages_of_three_blocks_with_a_path_around_each(networks: ModuleType) -> None:
    network = networks.randomise(zoo.resnet20(5, (3, 16, 16)), 1).eval()
    x = networks.floats(3, (3, 16, 16))
    with torch.no_grad():
        found = network(x)
        a = normed(network.stem[0], network.stem[1], x, 1).clamp(min=0)
        for index, block in enumerate(network.blocks):
            stride = 2 if index in (3, 6) else 1
            inner = normed(block.conv1, block.bn1, a, stride).clamp(min=0)
            around = normed(block.shortcut[0], block.shortcut[1], a, stride) if stride == 2 else a
            a = (normed(block.conv2, block.bn2, inner, 1) + around).clamp(min=0)
        assert a.shape == (3, 64, 4, 4)
        expected = a.mean((2, 3)) @ network.head.weight.T + network.head.bias
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_mobilenet_widens_filters_each_channel_and_narrows(networks: ModuleType) -> None:
    network = networks.randomise(zoo.mobilenet_small(5, (3, 16, 16)), 2).eval()
    x = networks.floats(3, (3, 16, 16))
    with torch.no_grad():
        found = network(x)
        a = normed(network.stem[0], network.stem[1], x, 1).clamp(0, 6)
        for index, block in enumerate(network.blocks):
            stride = 2 if index in (1, 3) else 1
            wide = normed(block.body[0], block.body[1], a, 1).clamp(0, 6)
            filtered = normed(block.body[3], block.body[4], wide, stride, groups=wide.shape[1]).clamp(0, 6)
            narrow = normed(block.body[6], block.body[7], filtered, 1)
            a = a + narrow if index in (0, 2, 4) else narrow
        a = normed(network.last[0], network.last[1], a, 1).clamp(0, 6)
        expected = a.mean((2, 3)) @ network.head.weight.T + network.head.bias
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_vgg_and_lenet_are_plain_chains() -> None:
    vgg = zoo.vgg_small(10, (1, 28, 28))
    widths = [module.out_channels for module in vgg.modules() if isinstance(module, nn.Conv2d)]
    assert widths == [32, 32, 64, 64, 128, 128]
    assert (vgg.hidden.in_features, vgg.hidden.out_features) == (128 * 3 * 3, 256)
    lenet = zoo.lenet(10, (1, 28, 28))
    sizes = [tuple(module.weight.shape) for module in lenet.modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
    assert sizes == [(16, 1, 5, 5), (32, 16, 5, 5), (120, 32 * 49), (84, 120), (10, 84)]
