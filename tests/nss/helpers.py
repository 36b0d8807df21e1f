"""Tiny models, cuts and masks that several tests of this folder share: `from tiny_helpers import ..`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nss.model import Classifier, ModelSpec
from nss.remove import remove
from nss.sites import find_sites
from nss.weight_masks import weight_masks

RGB = (3, 6, 6)
# Arguments of torchvision's transformers for images of 32 x 32.
VIT = {"image_size": 32, "patch_size": 8, "num_layers": 2, "num_heads": 4, "hidden_dim": 64, "mlp_dim": 256}
SWIN = {"patch_size": [2, 2], "embed_dim": 24, "depths": [2, 2], "num_heads": [2, 4], "window_size": [4, 4]}


class Joined(nn.Module):
    """Two layers side by side, added to a third: a group of eight units, four of each of the first two."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Conv2d(3, 4, 1)
        self.right = nn.Conv2d(3, 4, 1)
        self.both = nn.Conv2d(3, 8, 1)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.left(x), self.right(x)], 1) + self.both(x)
        return self.head(F.relu(x).mean((2, 3)))


def classifier(network: nn.Module, shape: tuple[int, int, int] = RGB) -> Classifier:
    """The network reads images as they are, in float64, in evaluation mode."""
    spec = ModelSpec("tiny:network", ("a", "b", "c", "d"), shape, (0.0,) * shape[0], (1.0,) * shape[0])
    return Classifier(network, spec).double().eval()


def correlated(count: int, shape: tuple[int, ...] = RGB, seed: int = 0, rank: int = 12) -> Tensor:
    """Images of few degrees of freedom, as real ones are, and not of mean zero."""
    generator = torch.Generator().manual_seed(seed)
    size = int(torch.tensor(shape).prod())
    mixed = torch.randn(count, rank, generator=generator) @ torch.randn(rank, size, generator=generator) / rank**0.5
    return (mixed + 0.4).view(count, *shape).double()


def cut(model: Classifier, neurons: dict[str, Tensor]) -> tuple[Classifier, dict[str, Tensor]]:
    """Returns the smaller model and which outputs of each call of a layer are left."""
    sites = find_sites(model.network, model.spec.input_shape)
    stay = sites.couple(neurons).ids
    smaller = remove(model, neurons)
    assert isinstance(smaller, Classifier)
    return smaller, {each.name: stay[each.out_ids] for each in sites.anatomy.producers}


def first(count: int, of: int) -> Tensor:
    return torch.arange(of) < count


def error(model: nn.Module, other: nn.Module, images: Tensor) -> float:
    with torch.no_grad():
        return float((model(images) - other(images)).square().mean())


def network_of_shapes(sizes: list[tuple[int, ...]], seed: int) -> nn.Sequential:
    """Layers with weights of these shapes; it is never run."""
    generator = torch.Generator().manual_seed(seed)
    layers = [nn.Linear(s[1], s[0]) if len(s) == 2 else nn.Conv2d(s[1], s[0], (s[2], s[3])) for s in sizes]
    with torch.no_grad():
        for index, layer in enumerate(layers):
            layer.weight.copy_(torch.randn(layer.weight.shape, generator=generator) * 3.0 ** -(index % 3))
    return nn.Sequential(*layers)


def kept(model: nn.Module) -> list[list[bool]]:
    masks = weight_masks(model)
    return [
        masks[name].flatten().tolist() if name in masks else [True] * layer.weight.numel()
        for name, layer in model.named_modules()
        if isinstance(layer, (nn.Conv2d, nn.Linear))
    ]


def counts(model: nn.Module) -> list[int]:
    return [sum(row) for row in kept(model)]
