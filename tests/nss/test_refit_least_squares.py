"""Refit: every layer gets the weights of the explicit least squares problem, in forward order."""

from __future__ import annotations

import copy
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from tiny_helpers import classifier, correlated, cut, error, first
from torch import Tensor, nn

from nss.refit import RIDGE, refit


def rows_read(x: Tensor, layer: nn.Module) -> Tensor:
    """What every output position reads, by loops: [n x positions, channels x kernel positions]."""
    if isinstance(layer, nn.Linear):
        return x.reshape(-1, x.shape[-1])
    (kh, kw), (sh, sw), (dh, dw), (ph, pw) = layer.kernel_size, layer.stride, layer.dilation, layer.padding
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    x = F.pad(x, (pw, pw, ph, ph), mode)
    rows = []
    for top in range(0, x.shape[2] - dh * (kh - 1), sh):
        for left in range(0, x.shape[3] - dw * (kw - 1), sw):
            patch = x[:, :, top : top + dh * (kh - 1) + 1 : dh, left : left + dw * (kw - 1) + 1 : dw]
            rows.append(patch.reshape(len(x), -1))
    return torch.stack(rows, 1).flatten(0, 1)


def rows_made(y: Tensor) -> Tensor:
    return y.flatten(2).transpose(1, 2).flatten(0, 1) if y.dim() == 4 else y


def least_squares(
    read: Tensor, wanted: Tensor, weight: Tensor, ridge: float, *, intercept: bool
) -> tuple[Tensor, Tensor]:
    """Minimise |wanted - read W^T - b|^2 / n + ridge * level * |W - weight|^2. Returns W and b (zero without one).

    level: the mean over inputs of what their second moment (their variance, where there is an intercept) is.
    """
    n = len(read)
    mean_read, mean_wanted = (each.mean(0) if intercept else torch.zeros_like(each[0]) for each in (read, wanted))
    x, y = read - mean_read, wanted - mean_wanted
    pull = (ridge * float(x.square().mean())) ** 0.5 * torch.eye(x.shape[1], dtype=x.dtype)
    left = torch.cat([x / n**0.5, pull])
    right = torch.cat([(y - x @ weight.T) / n**0.5, torch.zeros(len(pull), weight.shape[0], dtype=x.dtype)])
    found = weight + torch.linalg.lstsq(left, right).solution.T
    return found, mean_wanted - found @ mean_read


def refit_by_hand(
    layer: nn.Module, read: Tensor, wanted: Tensor, ridge: float = RIDGE, *, intercept: bool = True
) -> Tensor:
    """Give one layer, in place, the weights that give `wanted` [n, outputs, ..], group by group. Returns intercepts."""
    groups = getattr(layer, "groups", 1)
    inputs, outputs = rows_read(read, layer).chunk(groups, 1), rows_made(wanted).chunk(groups, 1)
    weights = layer.weight.detach().flatten(1).chunk(groups, 0)
    found = [
        least_squares(x, y, weight, ridge, intercept=intercept)
        for x, y, weight in zip(inputs, outputs, weights, strict=True)
    ]
    bias = torch.cat([each[1] for each in found])
    with torch.no_grad():
        layer.weight.copy_(torch.cat([each[0] for each in found]).view_as(layer.weight))
        if layer.bias is not None:
            layer.bias.copy_(bias)
    return bias


def assert_same_weights(found: nn.Module, expected: nn.Module) -> None:
    for (name, left), right in zip(found.state_dict().items(), expected.state_dict().values(), strict=True):
        torch.testing.assert_close(left, right, atol=1e-8, rtol=1e-6, msg=lambda text, name=name: f"{name}: {text}")


class Chain(nn.Module):
    """Convolution, convolution (of any kind), flattened map, head; every layer has a bias."""

    def __init__(self, middle: nn.Module, size: int = 4) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.middle = middle
        self.hidden = nn.Linear(6 * size, 5)
        self.head = nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.middle(F.relu(self.conv(x))))
        return self.head(F.relu(self.hidden(x.flatten(1))))


MIDDLES = {
    "plain": lambda: nn.Conv2d(8, 6, 3),
    "strided": lambda: nn.Conv2d(8, 6, (3, 2), stride=(1, 2), padding=(0, 1)),
    "dilated": lambda: nn.Conv2d(8, 6, 2, dilation=2),
    "pointwise": lambda: nn.Conv2d(8, 6, 1),
    "reflect": lambda: nn.Conv2d(8, 6, 3, padding=1, padding_mode="reflect"),
    "circular": lambda: nn.Conv2d(8, 6, 3, padding=1, padding_mode="circular"),
    "replicate": lambda: nn.Conv2d(8, 6, 3, padding=1, padding_mode="replicate"),
    "zeros": lambda: nn.Conv2d(8, 6, 3, padding=1),
    "grouped": lambda: nn.Conv2d(8, 6, 3, padding=1, groups=2),
}


@pytest.mark.parametrize("kind", MIDDLES)
def test_every_layer_gets_the_least_squares_weights_in_forward_order(kind: str) -> None:
    torch.manual_seed(2)
    middle = MIDDLES[kind]()
    size = middle(torch.zeros(1, 8, 4, 4)).flatten(2).shape[2]
    model = classifier(Chain(middle, size))
    images = correlated(60)
    keep = torch.tensor([1, 0, 1, 1, 0, 0, 1, 1]).bool() if kind != "grouped" else torch.tensor([1, 0, 1, 1] * 2).bool()
    smaller, left = cut(model, {"conv": keep})
    expected = copy.deepcopy(smaller)
    refit(model, smaller, left, images)

    theirs, ours = model.network, expected.network
    with torch.no_grad():
        x, z = theirs.conv(images), ours.conv(images)  # the image is the same: nothing to refit in `conv`
        y = theirs.middle(F.relu(x))
        refit_by_hand(ours.middle, F.relu(z), y)
        hidden = theirs.hidden(F.relu(y).flatten(1))
        refit_by_hand(ours.hidden, F.relu(ours.middle(F.relu(z))).flatten(1), hidden)
        logits = theirs.head(F.relu(hidden))
        refit_by_hand(ours.head, F.relu(ours.hidden(F.relu(ours.middle(F.relu(z))).flatten(1))), logits)
    assert_same_weights(smaller, expected)
    assert error(model, smaller, images) < error(model, cut(model, {"conv": keep})[0], images)


class Depthwise(nn.Module):
    """A layer that filters each of its channels on its own and makes two of each."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.hidden = nn.Conv2d(4, 4, 1)
        self.each = nn.Conv2d(4, 8, 3, padding=1, groups=4)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.each(F.relu(self.hidden(F.relu(self.conv(x))))))
        return self.head(x.mean((2, 3)))


def test_a_depthwise_layer_is_refitted_channel_by_channel() -> None:
    torch.manual_seed(3)
    model, images = classifier(Depthwise()), correlated(60)
    smaller, left = cut(model, {"conv": first(3, 4)})
    expected = copy.deepcopy(smaller)
    refit(model, smaller, left, images)
    theirs, ours = model.network, expected.network
    with torch.no_grad():
        x = theirs.hidden(F.relu(theirs.conv(images)))
        z = F.relu(ours.conv(images))
        refit_by_hand(ours.hidden, z, x)
        made = theirs.each(F.relu(x))
        refit_by_hand(ours.each, F.relu(ours.hidden(z)), made)
        logits = theirs.head(F.relu(made).mean((2, 3)))
        refit_by_hand(ours.head, F.relu(ours.each(F.relu(ours.hidden(z)))).mean((2, 3)), logits)
    assert_same_weights(smaller, expected)


class Sequence1d(nn.Module):
    """Convolutions over a sequence, then a linear layer at each of its places."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv1d(3, 6, 3, padding=1)
        self.conv2 = nn.Conv1d(6, 5, 3, stride=2, padding=1)
        self.each = nn.Linear(5, 6)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv2(F.relu(self.conv1(x.flatten(2)))))
        return self.head(F.relu(self.each(x.transpose(1, 2))).mean(1))


def test_convolutions_over_a_sequence_and_linear_layers_at_its_places_are_refitted() -> None:
    torch.manual_seed(3)
    model, images = classifier(Sequence1d(), (3, 2, 4)), correlated(60, (3, 2, 4))
    smaller, left = cut(model, {"conv1": first(4, 6), "conv2": first(4, 5)})
    expected = copy.deepcopy(smaller)
    refit(model, smaller, left, images)
    theirs, ours = model.network, expected.network
    with torch.no_grad():
        x, z = (F.relu(each.conv1(images.flatten(2))) for each in (theirs, ours))
        made = theirs.conv2(x)
        flat = nn.Conv2d(4, 4, (1, 3), stride=(1, 2), padding=(0, 1)).double()
        flat.weight.copy_(ours.conv2.weight[:, :, None])
        refit_by_hand(flat, z[:, :, None], made[:, :4, None])
        ours.conv2.weight.copy_(flat.weight[:, :, 0])
        ours.conv2.bias.copy_(flat.bias)
        x, z = F.relu(made).transpose(1, 2), F.relu(ours.conv2(z)).transpose(1, 2)
        refit_by_hand(ours.each, z, theirs.each(x).flatten(0, 1))
        x, z = F.relu(theirs.each(x)).mean(1), F.relu(ours.each(z)).mean(1)
        refit_by_hand(ours.head, z, theirs.head(x))
    assert_same_weights(smaller, expected)


def test_a_layer_called_twice_is_fitted_to_both_calls() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 6, 3)
            self.before = nn.Conv2d(6, 4, 1)
            self.shared = nn.Conv2d(4, 4, 3, padding=1)
            self.head = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = F.relu(self.before(F.relu(self.stem(x))))
            return self.head(F.relu(self.shared(F.relu(self.shared(x)))).mean((2, 3)))

    torch.manual_seed(4)
    model, images = classifier(Twice()), correlated(60)
    smaller, left = cut(model, {"stem": first(4, 6)})
    expected = copy.deepcopy(smaller)
    refit(model, smaller, left, images)
    theirs, ours = model.network, expected.network
    with torch.no_grad():
        x, z = F.relu(theirs.stem(images)), F.relu(ours.stem(images))
        refit_by_hand(ours.before, z, theirs.before(x))
        x, z = F.relu(theirs.before(x)), F.relu(ours.before(z))
        # The second call's input is taken before the layer is fitted.
        one, two = theirs.shared(x), theirs.shared(F.relu(theirs.shared(x)))
        read = torch.cat([z, F.relu(ours.shared(z))])
        refit_by_hand(ours.shared, read, torch.cat([one, two]))
        logits = theirs.head(F.relu(two).mean((2, 3)))
        refit_by_hand(ours.head, F.relu(ours.shared(F.relu(ours.shared(z)))).mean((2, 3)), logits)
    assert_same_weights(smaller, expected)


class Normed(nn.Module):
    """Convolutions without a bias; a BatchNorm behind the second alone."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, bias=False)
        self.conv2 = nn.Conv2d(8, 6, 3, bias=False)
        self.bn = nn.BatchNorm2d(6)
        self.conv3 = nn.Conv2d(6, 5, 1, bias=False)
        self.head = nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.conv2(F.relu(self.conv1(x)))))
        return self.head(F.relu(self.conv3(x)).mean((2, 3)))


def test_the_norm_behind_a_layer_takes_what_a_bias_would_and_without_either_there_is_no_intercept(
    networks: ModuleType,
) -> None:
    torch.manual_seed(5)
    model, images = classifier(networks.randomise(Normed(), 1)), correlated(60)
    smaller, left = cut(model, {"conv1": first(5, 8)})
    expected = copy.deepcopy(smaller)
    refit(model, smaller, left, images)
    theirs, ours = model.network, expected.network
    with torch.no_grad():
        x, z = (F.relu(each.conv1(images)) for each in (theirs, ours))
        made = theirs.conv2(x)
        ours.bn.running_mean -= refit_by_hand(ours.conv2, z, made)
        x, z = F.relu(theirs.bn(made)), F.relu(ours.bn(ours.conv2(z)))
        refit_by_hand(ours.conv3, z, theirs.conv3(x), intercept=False)
        x, z = (F.relu(each).mean((2, 3)) for each in (theirs.conv3(x), ours.conv3(z)))
        refit_by_hand(ours.head, z, theirs.head(x))
    assert_same_weights(smaller, expected)
