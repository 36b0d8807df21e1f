"""Small networks that train on two cores: a classic, a plain, a residual and a depthwise one.

Each factory takes the number of classes and the image shape (channels, height, width), and returns an untrained module.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import nn


def _norm_conv(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(outputs)]


def lenet(num_classes: int, input_shape: tuple[int, int, int]) -> nn.Module:
    """Two convolutions and three linear layers after LeCun et al. 1998, with ReLU and max pooling.

    >>> lenet(10, (1, 28, 28))(torch.zeros(2, 1, 28, 28)).shape
    torch.Size([2, 10])
    """
    channels, height, width = input_shape
    return nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(channels, 16, 5, padding=2),
            relu1=nn.ReLU(),
            pool1=nn.MaxPool2d(2),
            conv2=nn.Conv2d(16, 32, 5, padding=2),
            relu2=nn.ReLU(),
            pool2=nn.MaxPool2d(2),
            flatten=nn.Flatten(),
            fc1=nn.Linear(32 * (height // 4) * (width // 4), 120),
            relu3=nn.ReLU(),
            fc2=nn.Linear(120, 84),
            relu4=nn.ReLU(),
            fc3=nn.Linear(84, num_classes),
        )
    )


def vgg_small(num_classes: int, input_shape: tuple[int, int, int]) -> nn.Module:
    """Six convolutions with BatchNorm in three stages, one hidden linear layer: 585,000 parameters at 28x28.

    >>> vgg_small(10, (1, 28, 28))(torch.zeros(2, 1, 28, 28)).shape
    torch.Size([2, 10])
    """
    channels, height, width = input_shape
    features: list[nn.Module] = []
    for stage in (32, 64, 128):
        for _ in range(2):
            features += [*_norm_conv(channels, stage, 3), nn.ReLU()]
            channels = stage
        features.append(nn.MaxPool2d(2))
    return nn.Sequential(
        OrderedDict(
            features=nn.Sequential(*features),
            flatten=nn.Flatten(),
            hidden=nn.Linear(channels * (height // 8) * (width // 8), 256),
            relu=nn.ReLU(),
            head=nn.Linear(256, num_classes),
        )
    )


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with a path around them (He et al. 2016), a 1x1 convolution on it where shapes differ."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = _norm_conv(inputs, outputs, 3, stride)
        self.conv2, self.bn2 = _norm_conv(outputs, outputs, 3)
        same = stride == 1 and inputs == outputs
        self.shortcut = nn.Identity() if same else nn.Sequential(*_norm_conv(inputs, outputs, 1, stride))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [n, inputs, h, w]. Returns [n, outputs, h / stride, w / stride]."""
        inner = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(inner)) + self.shortcut(x))


def resnet20(num_classes: int, input_shape: tuple[int, int, int]) -> nn.Module:
    """ResNet-20 for small images (He et al. 2016, section 4.2): 16, 32, 64 channels, 272,000 parameters.

    >>> resnet20(10, (3, 32, 32))(torch.zeros(2, 3, 32, 32)).shape
    torch.Size([2, 10])
    """
    blocks, width = [], 16
    for stage, outputs in enumerate((16, 32, 64)):
        for block in range(3):
            blocks.append(BasicBlock(width, outputs, stride=2 if stage and not block else 1))
            width = outputs
    return nn.Sequential(
        OrderedDict(
            stem=nn.Sequential(*_norm_conv(input_shape[0], 16, 3), nn.ReLU()),
            blocks=nn.Sequential(*blocks),
            pool=nn.AdaptiveAvgPool2d(1),
            flatten=nn.Flatten(),
            head=nn.Linear(width, num_classes),
        )
    )


class InvertedResidual(nn.Module):
    """Widen, filter each channel on its own, narrow (Sandler et al. 2018), with a path around where shapes agree."""

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int) -> None:
        super().__init__()
        wide = inputs * expansion
        self.body = nn.Sequential(
            *_norm_conv(inputs, wide, 1),
            nn.ReLU6(),
            *_norm_conv(wide, wide, 3, stride, groups=wide),
            nn.ReLU6(),
            *_norm_conv(wide, outputs, 1),
        )
        self.around = stride == 1 and inputs == outputs

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [n, inputs, h, w]. Returns [n, outputs, h / stride, w / stride]."""
        inner: torch.Tensor = self.body(x)
        return x + inner if self.around else inner


def mobilenet_small(num_classes: int, input_shape: tuple[int, int, int]) -> nn.Module:
    """Inverted residuals with depthwise convolutions for small images: 64,000 parameters.

    >>> mobilenet_small(10, (3, 32, 32))(torch.zeros(2, 3, 32, 32)).shape
    torch.Size([2, 10])
    """
    plan = [(16, 1, 1), (24, 2, 4), (24, 1, 4), (40, 2, 4), (40, 1, 4), (64, 1, 4)]
    blocks, width = [], 16
    for outputs, stride, expansion in plan:
        blocks.append(InvertedResidual(width, outputs, stride, expansion))
        width = outputs
    return nn.Sequential(
        OrderedDict(
            stem=nn.Sequential(*_norm_conv(input_shape[0], 16, 3), nn.ReLU6()),
            blocks=nn.Sequential(*blocks),
            last=nn.Sequential(*_norm_conv(width, 160, 1), nn.ReLU6()),
            pool=nn.AdaptiveAvgPool2d(1),
            flatten=nn.Flatten(),
            head=nn.Linear(160, num_classes),
        )
    )
