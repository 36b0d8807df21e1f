"""Restructuring of networks that concatenate and attend: within the budget, near the original, for good."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_helpers import SWIN, VIT, error
from torch import Tensor, nn

import nss
from nss.errors import RestructureError
from nss.plan import LayerPlan
from nss.restructure import Restructured

RGB = (3, 32, 32)
MODELS: dict[str, dict[str, Any]] = {
    "DenseNet": {"growth_rate": 8, "block_config": [2, 2], "num_init_features": 16, "bn_size": 2},
    "VisionTransformer": VIT,
    "SwinTransformer": SWIN,
}
SHARES = {"SwinTransformer": 0.75}
"""Where attention, which keeps its units, has the most: half is out of reach."""


def pictures(count: int, seed: int) -> Tensor:
    """Blots of few frequencies, so that neighbouring neurons have much in common, as on photographs."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 5, 5, generator=generator)
    fine = nn.functional.interpolate(coarse, RGB[1:], mode="bicubic").clamp(0, 1)
    return (255 * fine).to(torch.uint8)


def built(name: str) -> nss.Classifier:
    model = nss.build_model(f"torchvision.models:{name}", list("abcd"), RGB, seed=0, arguments=MODELS[name])
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5, generator=generator)
            nn.init.normal_(module.bias, 0, 0.3, generator=generator)
    head = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
    nn.init.normal_(head.weight, 0, 0.3, generator=generator)
    model.train()
    with torch.no_grad():
        for start in range(3):
            model(pictures(64, start))
    return model.eval()


def restructured(model: nss.Classifier, share: float) -> Restructured:
    samples = pictures(128, 7), torch.arange(128) % 4
    known = nss.profile(model, samples, ("taylor",))
    slices = nss.semantic_slices(nss.critical_neurons(known, "taylor"), known)
    return nss.restructure(model, slices, samples, known, macs=share, cap=0.95)


def kept_of(plan: LayerPlan) -> Tensor:
    return torch.isin(torch.arange(plan.total), torch.tensor(plan.kept))


@pytest.mark.parametrize("name", MODELS)
def test_it_shrinks_to_the_budget_stays_near_its_answers_and_is_kept_and_trained_on(name: str, tmp_path: Path) -> None:
    model, share = built(name), SHARES.get(name, 0.5)
    found, unseen = restructured(model, share), pictures(128, 99)
    assert share - 0.02 <= nss.count_macs(found.model) / nss.count_macs(model) <= share
    cut = nss.remove(model, {layer: kept_of(plan) for layer, plan in found.plan.layers.items()})
    assert nss.count_macs(cut) == nss.count_macs(found.model)
    assert error(found.model, model, unseen) < 0.7 * error(cut, model, unseen)
    nss.save_model(found.model, tmp_path / "smaller")
    again, images = nss.load_model(tmp_path / "smaller"), pictures(16, 3)
    with torch.no_grad():
        assert torch.equal(again(images), found.model.eval()(images))
    nss.fine_tune(again, (images, torch.arange(16) % 4), steps=1, seed=0)
    with torch.no_grad():
        assert not torch.equal(again(images), found.model(images))


def test_what_attention_leaves_no_room_for_is_refused_with_what_is_possible() -> None:
    with pytest.raises(RestructureError, match=r"(?s)0\.2.*allowed"):
        restructured(built("VisionTransformer"), 0.2)
