"""Networks written in ways of their own: a frozen copy answers as they do, or is refused by name."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nss.errors import SiteError
from nss.freeze import freeze, thaw

SHAPE = (1, 6, 6)
IMAGES = torch.rand(5, *SHAPE, generator=torch.Generator().manual_seed(1))
FREE = {"conv": torch.arange(4) < 2, "hidden": torch.arange(6) % 2 == 0}


class Plain(nn.Module):
    """One of each kind, put together as `forward` of its children says."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(1, 4, 3)
        self.norm: nn.Module = nn.BatchNorm2d(4)
        self.hidden = nn.Linear(4, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.hidden(F.relu(self.norm(self.conv(x))).mean((2, 3)))))


class NormAndReLU(nn.BatchNorm2d):
    """A BatchNorm with a forward of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)) - 1


class OwnNorm(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.norm = NormAndReLU(4)
        nn.init.uniform_(self.norm.running_mean, -1, 1)


class Asking(Plain):
    """Asks its layers for their sizes, types and weights."""

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.conv(x.to(self.conv.weight.dtype)))).mean((2, 3))
        x = F.relu(self.hidden(x.view(-1, self.hidden.in_features)))
        return self.head(x) / self.head.weight.norm()


class Indexed(Plain):
    """A max pool that tells where it found what, behind a ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.relu, self.pool = nn.ReLU(), nn.MaxPool2d(2, return_indices=True)

    def forward(self, x: Tensor) -> Tensor:
        found, _ = self.pool(self.relu(self.norm(self.conv(x))))
        return self.head(F.relu(self.hidden(found.mean((2, 3)))))


class Elsewhere(Plain):
    """Calls its layers from a plain list, which nothing registers."""

    def __init__(self) -> None:
        super().__init__()
        self.order = [self.conv, self.norm]

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.order:
            x = F.relu(layer(x))
        return self.head(F.relu(self.hidden(x.mean((2, 3)))))


@pytest.mark.parametrize("kind", [Plain, OwnNorm, Asking, Indexed])
def test_a_frozen_copy_answers_as_the_network_does(kind: type[nn.Module]) -> None:
    network = kind().eval()
    frozen = freeze(network, FREE, SHAPE)
    assert next(tuple(each.shape) for each in frozen.parameters()) == (2, 1, 3, 3)
    torch.testing.assert_close(frozen(IMAGES), network(IMAGES), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", [Plain, OwnNorm, Asking, Indexed])
def test_thawed_it_answers_as_the_moved_copy_does(kind: type[nn.Module]) -> None:
    network = kind().eval()
    frozen = freeze(network, FREE, SHAPE)
    with torch.no_grad():
        for parameter in frozen.parameters():
            parameter += 0.3
    plain = thaw(frozen)
    assert float((plain(IMAGES) - network(IMAGES)).detach().abs().max()) > 0.05
    torch.testing.assert_close(plain(IMAGES), frozen(IMAGES), rtol=1e-5, atol=1e-6)


def test_a_norm_with_a_forward_of_its_own_keeps_its_numbers() -> None:
    network = OwnNorm().eval()
    frozen = freeze(network, FREE, SHAPE)
    assert "norm.layer.weight" in dict(frozen.named_buffers())
    with torch.no_grad():
        for parameter in frozen.parameters():
            parameter += 0.3
    frozen.train()(IMAGES)
    moved = {
        name for name, each in thaw(frozen).state_dict().items() if not torch.equal(each, network.state_dict()[name])
    }
    assert moved == {"conv.weight", "conv.bias", "hidden.weight", "hidden.bias"}


def test_a_layer_that_is_called_past_its_place_is_refused_by_name() -> None:
    with pytest.raises(SiteError, match="the network calls it from elsewhere") as caught:
        freeze(Elsewhere(), FREE, SHAPE)
    assert caught.value.where == "conv, norm"


def test_a_copy_that_would_answer_otherwise_is_refused() -> None:
    class Random(Plain):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + torch.rand(())

    with pytest.raises(SiteError, match="frozen, the network answers otherwise"):
        freeze(Random(), FREE, SHAPE)


class Wrapped(Plain):
    """Answers a dict."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"logits": super().forward(x)}


def test_a_network_that_answers_more_than_a_tensor_is_refused() -> None:
    with pytest.raises(SiteError, match=r"the network answers a dict[\s\S]*Wrapped[\s\S]*return the logits alone"):
        freeze(Wrapped(), FREE, SHAPE)
