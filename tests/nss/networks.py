"""Tiny networks whose numbers can be worked out by hand; importable by a factory as `tiny_networks`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Plain(nn.Module):
    """A 1x1 convolution, a hidden layer, a head. With pixels 0..4 both logits are equal, so every probability is 1/2.

    conv: channel 0 is the pixel, channel 1 is 4 - pixel; their means m0 + m1 = 4. hidden: m0 + m1 = 4, 4, m0.
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 1)
        self.hidden = nn.Linear(2, 3)
        self.head = nn.Linear(3, 2)
        fill(self.conv, [[[[1.0]]], [[[-1.0]]]], [0.0, 4.0])
        fill(self.hidden, [[1.0, 1.0], [0.0, 0.0], [1.0, 0.0]], [0.0, 4.0, 0.0])
        fill(self.head, [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]], [0.0, 0.0])

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.hidden(F.relu(self.conv(x)).mean((2, 3)))))


class Opposed(nn.Module):
    """Reads two pixels with opposite signs: what channel 0 contributes at its two places cancels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 1)
        self.head = nn.Linear(4, 2)
        fill(self.conv, [[[[1.0]]], [[[1.0]]]], [0.0, 0.0])
        fill(self.head, [[1.0, -1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0]], [-4.0, 0.0])

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.conv(x)).flatten(1))


class Smooth(nn.Module):
    """Tanh keeps signs, so |mean|, mean of |.|, and sums over space differ from each other."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(2, 3, 3, padding=1)
        self.conv2 = nn.Conv2d(3, 4, 3)
        self.hidden = nn.Linear(4 * 2 * 2, 5)
        self.head = nn.Linear(5, 3)

    def parts(self, x: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """All activations, written out, and the logits."""
        one = torch.tanh(self.conv1(x))
        two = torch.tanh(self.conv2(one))
        three = torch.tanh(self.hidden(two.reshape(len(x), -1)))
        return {"conv1": one, "conv2": two, "hidden": three}, self.head(three)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.conv2(torch.tanh(self.conv1(x))))
        return self.head(torch.tanh(self.hidden(x.flatten(1))))


class Residual(nn.Module):
    """y = conv_a(x) + conv_b(x): one kept set for both (cases.md 2)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_a = nn.Conv2d(3, 8, 3, padding=1)
        self.conv_b = nn.Conv2d(3, 8, 1)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.conv_a(x) + self.conv_b(x)).mean((2, 3)))


class InPlace(nn.Module):
    """In-place ReLU and `out += x`: what was measured is overwritten right afterwards."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1)
        self.conv1 = nn.Conv2d(4, 4, 3, padding=1)
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1)
        self.bn = nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=True)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.stem(x))
        out = self.relu(self.conv1(x))
        out = self.bn(self.conv2(out))
        out += x
        return self.head(self.relu(out).mean((2, 3)))

    def parts(self, x: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """The same without anything in place."""
        stem = self.stem(x).clamp(min=0)
        one = self.conv1(stem).clamp(min=0)
        two = self.bn(self.conv2(one))
        logits = self.head((two + stem).clamp(min=0).mean((2, 3)))
        return {"stem": stem, "conv1": one, "conv2": two}, logits


class DropThenAdd(nn.Module):
    """Dropout hands its input on in evaluation mode: `out += x` then overwrites what the norm returned."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1)
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.drop = nn.Dropout2d(0.5)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        out = self.drop(self.conv(x))
        out += x
        return self.head(F.relu(out).mean((2, 3)))

    def parts(self, x: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """The same without anything in place, in evaluation mode."""
        stem = F.relu(self.stem(x))
        two = self.conv(stem)
        return {"stem": stem, "conv": two}, self.head(F.relu(two + stem).mean((2, 3)))


class ViewThenRelu(nn.Module):
    """A ReLU that writes through a view into what the convolution returned."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 3, 3)
        self.relu = nn.ReLU(inplace=True)
        self.head = nn.Linear(12, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.relu(self.conv(x).flatten(1)))

    def parts(self, x: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """The same without anything in place. The site ends before the flattening."""
        one = self.conv(x)
        return {"conv": one}, self.head(F.relu(one.flatten(1)))


class OneRelu(nn.Module):
    """One nn.ReLU used twice and F.relu once (cases.md 7)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 3, 3, padding=1)
        self.conv2 = nn.Conv2d(3, 4, 3, padding=1)
        self.conv3 = nn.Conv2d(4, 5, 3, padding=1)
        self.relu = nn.ReLU()
        self.head = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.conv2(self.relu(self.conv1(x))))
        return self.head(F.relu(self.conv3(x)).mean((2, 3)))

    def parts(self, x: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Each call on its own."""
        one = self.conv1(x).clamp(min=0)
        two = self.conv2(one).clamp(min=0)
        three = self.conv3(two).clamp(min=0)
        return {"conv1": one, "conv2": two, "conv3": three}, self.head(three.mean((2, 3)))


class Twice(nn.Module):
    """One layer called twice: two sites."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1)
        self.shared = nn.Conv2d(4, 4, 3, padding=1)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = F.relu(self.shared(x))
        return self.head(F.relu(self.shared(x)).mean((2, 3)))

    def parts(self, x: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Each call on its own."""
        stem = self.stem(x).clamp(min=0)
        one = self.shared(stem).clamp(min=0)
        two = self.shared(one).clamp(min=0)
        return {"stem": stem, "shared": one, "shared#2": two}, self.head(two.mean((2, 3)))


class Grouped(nn.Module):
    """Conv1x1(3, 16) -> Conv3x3(16, 16, groups=2) (cases.md 1)."""

    def __init__(self, activation: type[nn.Module] = nn.ReLU) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 1)
        self.activation = activation()
        self.grouped = nn.Conv2d(16, 16, 3, padding=1, groups=2)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.grouped(self.activation(self.conv(x)))).mean((2, 3)))


class Squeeze(nn.Module):
    """Widen, filter by channel, weight the channels, narrow: depthwise and squeeze-excite (cases.md 3)."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Conv2d(3, 8, 1)
        self.bn1 = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.bn2 = nn.BatchNorm2d(8)
        self.squeeze = nn.Conv2d(8, 2, 1)
        self.excite = nn.Conv2d(2, 8, 1)
        self.narrow = nn.Conv2d(8, 5, 1)
        self.head = nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.bn1(self.wide(x)))
        x = F.silu(self.bn2(self.depthwise(x)))
        gate = F.relu(self.squeeze(F.adaptive_avg_pool2d(x, 1)))
        x = torch.sigmoid(self.excite(gate)) * x
        return self.head(self.narrow(x).mean((2, 3)))


class Concat(nn.Module):
    """Three tensors joined, normalised together and read by one layer (cases.md 4)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, padding=1)
        self.conv2 = nn.Conv2d(4, 5, 3, padding=1)
        self.bn = nn.BatchNorm2d(12)
        self.last = nn.Conv2d(12, 6, 1)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        one = F.relu(self.conv1(x))
        two = F.relu(self.conv2(one))
        joined = F.relu(self.bn(torch.cat([two, x, one], 1)))
        return self.head(F.relu(self.last(joined)).mean((2, 3)))


class FixedView(nn.Module):
    """Flattens as PyTorch's own tutorial does: x.view(-1, features) names how many features there are."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.hidden = nn.Linear(8 * 4 * 4, 6)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.conv(x)), 2).view(-1, 8 * 4 * 4)
        return self.head(F.relu(self.hidden(x)))


class Shifted(nn.Module):
    """`how` moves zeros of a masked channel before the next layer reads them."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.conv = nn.Conv2d(3, 6, 3, padding=1)
        self.bn = nn.BatchNorm2d(6)
        self.last = nn.Conv2d(6, 5, 1)
        self.head = nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv(x))
        if self.how == "norm":
            x = self.bn(x)
        elif self.how == "sigmoid":
            x = torch.sigmoid(x)
        elif self.how == "plus":
            x = x + 1.5
        elif self.how == "minus":
            x = 1.5 - x
        elif self.how == "clamp":
            x = torch.clamp(x, min=0.3)
        return self.head(F.relu(self.last(x)).mean((2, 3)))


class GroupNormed(nn.Module):
    """A norm that averages over groups of channels: a channel at zero before it is not one at zero behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.GroupNorm(2, 8)
        self.last = nn.Conv2d(8, 5, 1)
        self.head = nn.Linear(5, 4)
        with torch.no_grad():
            self.norm.bias.copy_(torch.linspace(0.2, 1, 8))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.last(F.relu(self.norm(self.conv(x))))).mean((2, 3)))


class Tokens(nn.Module):
    """A hidden layer over a sequence, its channels on the last axis."""

    def __init__(self, shift: float = 0.0) -> None:
        super().__init__()
        self.shift = shift
        self.embed = nn.Linear(8, 6)
        self.hidden = nn.Linear(6, 10)
        self.head = nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.hidden(F.relu(self.embed(x.flatten(1, 2)))))
        return self.head((x + self.shift if self.shift else x).mean(1))


class Stacked(nn.Module):
    """Two maps one below the other, pooled: the channels of one place are not those of another."""

    def __init__(self) -> None:
        super().__init__()
        self.top = nn.Conv2d(3, 6, 3, padding=1)
        self.bottom = nn.Conv2d(3, 6, 3, padding=1)
        self.last = nn.Conv2d(6, 5, 1)
        self.head = nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(torch.cat([self.top(x), self.bottom(x)], 2)), 2)
        return self.head(F.relu(self.last(x)).mean((2, 3)))


class Three(nn.Module):
    """Three convolutions of 16 channels, the middle one's weights x 1e-3 (cases.md 5)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 3, padding=1)
        self.conv2 = nn.Conv2d(16, 16, 3, padding=1)
        self.conv3 = nn.Conv2d(16, 16, 3, padding=1)
        self.head = nn.Linear(16, 2)
        with torch.no_grad():
            self.conv2.weight *= 1e-3
            self.conv2.bias *= 1e-3

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv3(F.relu(self.conv2(F.relu(self.conv1(x))))))
        return self.head(x.mean((2, 3)))


class Branching(nn.Module):
    """Cannot be traced: its forward asks the data."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.head = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        if x.sum() > 0:
            x = -x
        return self.head(x.mean((2, 3)))


class Answers(nn.Module):
    """Answers with rows of a table: the image's first pixel says which."""

    def __init__(self, logits: list[list[float]]) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.tensor(logits))

    def forward(self, x: Tensor) -> Tensor:
        return self.logits[x[:, 0, 0, 0].long()]


def tower(num_classes: int, width: int = 4, depth: int = 1) -> nn.Module:
    """A factory with arguments of its own."""
    layers: list[nn.Module] = []
    for index in range(depth):
        layers += [nn.Conv2d(3 if not index else width, width, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, num_classes))


def fill(layer: nn.Module, weight: list[object], bias: list[float]) -> None:
    """Write a layer's numbers."""
    with torch.no_grad():
        layer.weight.copy_(torch.tensor(weight))
        layer.bias.copy_(torch.tensor(bias))
