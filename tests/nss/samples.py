"""Images, masks and models that the tests of this folder share."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from nss.data import Batch, Dataset, batch_digest
from nss.model import Classifier, build_model
from nss.sites import find_sites

CLASSES = ("ant", "bee", "cow", "dog")
SHAPE = (1, 16, 16)


def plain_samples() -> tuple[Tensor, Tensor]:
    """Two images of each of two classes: conv means (1, 3), (3, 1) for class 0 and (2, 2), (0, 4) for class 1."""
    pixels = [[0, 0, 0, 4], [4, 4, 4, 0], [4, 4, 0, 0], [0, 0, 0, 0]]
    return torch.tensor(pixels, dtype=torch.float32).view(4, 1, 2, 2), torch.tensor([0, 0, 1, 1])


def numbered(count: int) -> Tensor:
    """Images for `Answers`: the first pixel of image i is i."""
    return torch.arange(count, dtype=torch.float32).view(-1, 1, 1, 1)


def randomise(network: nn.Module, seed: int) -> nn.Module:
    """Give every norm statistics and affine values of its own (in place), as training would."""
    generator = torch.Generator().manual_seed(seed)
    for module in network.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            size = module.num_features
            with torch.no_grad():
                module.running_mean.copy_(torch.randn(size, generator=generator) * 0.3)
                module.running_var.copy_(torch.rand(size, generator=generator) + 0.5)
                module.weight.copy_(torch.rand(size, generator=generator) + 0.5)
                module.bias.copy_(torch.randn(size, generator=generator) * 0.3)
    return network


def zoo_model(name: str, seed: int = 0, classes: tuple[str, ...] = CLASSES) -> Classifier:
    """A zoo model on small images with lived-in norms, in evaluation mode."""
    model = build_model(f"nss.zoo:{name}", classes, SHAPE, seed)
    randomise(model, seed)
    return model.eval()


def pictures(count: int, shape: tuple[int, ...] = SHAPE, seed: int = 0) -> Tensor:
    """Random images, uint8."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, *shape), dtype=torch.uint8, generator=generator)


def floats(count: int, shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """Random images, floats."""
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed))


def random_masks(network: nn.Module, shape: tuple[int, ...], seed: int, share: float = 0.5) -> dict[str, Tensor]:
    """Keep each neuron with probability `share`, at least one a layer."""
    generator = torch.Generator().manual_seed(seed)
    masks = {}
    for site in find_sites(network, shape):
        masks[site.name] = torch.rand(len(site), generator=generator) < share
        masks[site.name][int(torch.randint(len(site), (1,), generator=generator))] = True
    return masks


def coupled_masks(network: nn.Module, shape: tuple[int, ...], seed: int, share: float = 0.5) -> dict[str, Tensor]:
    """Keep or drop whole coupled groups, so that random choices do not all end up in a union of everything."""
    generator = torch.Generator().manual_seed(seed)
    sites = find_sites(network, shape)
    roots = sites.anatomy.classes.roots()
    lot = torch.rand(len(roots), generator=generator) < share
    masks = {site.name: lot[roots[site.ids]] for site in sites}
    for mask in masks.values():
        mask[0] |= not bool(mask.any())
    return masks


def coloured_data(count: int = 60, seed: int = 0, classes: int = 2) -> Dataset:
    """A data set that can be learned: class k is brighter in column k. Splits: train, val, test in turns of 4:1:1."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 60, (count, 1, 8, 8), dtype=torch.uint8, generator=generator)
    labels = torch.arange(count) % classes
    for index, label in enumerate(labels.tolist()):
        images[index, :, :, label * 2 : label * 2 + 2] += 150
    turn = torch.arange(count) // classes % 6
    split = torch.where(turn < 4, 0, turn - 3).to(torch.uint8)
    names = CLASSES[:classes]
    return Dataset(names, (1, 8, 8), (Batch(batch_digest(images, labels, split, names), images, labels, split),))


def largest_difference(left: nn.Module, right: nn.Module, images: Tensor) -> float:
    """Largest difference of two models' logits, as a share of the largest logit (at least 1)."""
    with torch.no_grad():
        a, b = left.eval()(images), right.eval()(images)
    return float((a - b).abs().max() / a.abs().max().clamp_min(1))


def hooked(network: nn.Module, masks: Mapping[str, Tensor], images: Tensor) -> Tensor:
    """Logits with the outputs of named modules multiplied by masks along axis 1: a masked view made of hooks alone."""
    handles = []
    for name, mask in masks.items():
        shape = (-1, 1, 1)

        def hold(_m: nn.Module, _i: object, out: Tensor, mask: Tensor = mask, shape: tuple[int, ...] = shape) -> Tensor:
            return out * (mask.view(shape) if out.dim() == 4 else mask)

        handles.append(network.get_submodule(name).register_forward_hook(hold))
    try:
        with torch.no_grad():
            return network(images)
    finally:
        for handle in handles:
            handle.remove()
