"""The whole way on architectures that people use: profile, choose, merge, mask, remove, save, load in a new process."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_helpers import SWIN, VIT
from torch import nn

from nss import (
    Classifier,
    build_model,
    count_macs,
    count_parameters,
    critical_neurons,
    plan_removal,
    profile,
    remove,
    save_model,
    semantic_slices,
    sliced,
)
from nss.sites import find_sites

NO_AUXILIARY = {"aux_logits": False, "init_weights": False}
MODELS: dict[str, dict[str, Any]] = {
    "resnet18": {},
    "resnet50": {},
    "vgg11_bn": {},
    "densenet121": {},
    "mobilenet_v2": {},
    "mobilenet_v3_small": {},
    "efficientnet_b0": {},
    "shufflenet_v2_x0_5": {},
    "googlenet": NO_AUXILIARY,
    "convnext_tiny": {},
    "VisionTransformer": {**VIT, "mlp_dim": 128},
    "SwinTransformer": SWIN,
}
# Channel shuffles fix how many channels two branches have: those neurons get zero weights instead.
MASKED_ONLY = {"shufflenet_v2_x0_5"}
SCRIPT = """
import json, sys, torch, nss
folders = sys.argv[1:]
images = torch.load(folders.pop(), weights_only=True)
with torch.inference_mode():
    print(json.dumps({folder: nss.load_model(folder)(images).double().sum(1).tolist() for folder in folders}))
"""


def built(name: str) -> Classifier:
    """A model whose norms have something to say: untrained ones would be too regular to catch a mistake."""
    model = build_model(f"torchvision.models:{name}", list("abcd"), (3, 32, 32), 0, arguments=MODELS[name])
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.2, generator=generator)
            module.running_var.uniform_(0.5, 2, generator=generator)
            nn.init.uniform_(module.weight, 0.5, 1.5, generator=generator)
            nn.init.normal_(module.bias, 0, 0.3, generator=generator)
    head = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
    nn.init.normal_(head.weight, 0, 0.1, generator=generator)
    for parameter_name, parameter in model.named_parameters():
        if "layer_scale" in parameter_name:
            nn.init.constant_(parameter, 0.5)
    return model.eval()


@pytest.fixture(scope="module")
def logits(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[list[float], Path]]:
    """What each removed model answered here, and the folder it was saved in; filled by the tests below."""
    return {}


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("name", MODELS)
def test_a_removed_slice_equals_the_masked_one_and_is_smaller(
    name: str,
    images: torch.Tensor,
    logits: dict[str, tuple[list[float], Path]],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    model = built(name)
    labels = torch.arange(8) % 4
    found = profile(model, (images, labels), ["taylor", "deeplift"], gram=False)
    critical = critical_neurons(found, "deeplift", "cumulative", 0.5)
    chosen = semantic_slices(critical, found, n_slices=4)[0]
    sites = find_sites(model.network, (3, 32, 32))
    coupled = sites.couple(chosen.neurons)
    smaller = remove(model, chosen.neurons)
    assert isinstance(smaller, Classifier)
    with torch.inference_mode():
        masked, removed, original = sliced(model, chosen.neurons)(images), smaller(images), model(images)
    scale = float(masked.abs().max())
    torch.testing.assert_close(removed, masked, atol=1e-4 * scale, rtol=0)
    assert float((original - masked).abs().max()) > 1e-2 * scale
    assert count_parameters(smaller) < count_parameters(model)
    assert count_macs(smaller) < count_macs(model)
    plan = plan_removal(model, chosen.neurons).layers
    masked = {layer: each for layer, each in plan.items() if each.masked}
    assert bool(masked) == (name in MASKED_ONLY)
    assert all("fixes the number of channels" in each.reason for each in masked.values())
    assert {layer: each.kept for layer, each in plan.items()} == {k: int(v.sum()) for k, v in coupled.neurons.items()}
    assert sum(each.removed for each in plan.values()) > 0
    folder = tmp_path_factory.mktemp(name) / "model"
    save_model(smaller, folder)
    with torch.inference_mode():
        logits[name] = smaller(images).double().sum(1).tolist(), folder


def test_removed_models_answer_the_same_in_a_new_process(
    logits: dict[str, tuple[list[float], Path]], images: torch.Tensor, tmp_path: Path
) -> None:
    assert set(logits) == set(MODELS)
    torch.save(images, tmp_path / "images.pt")
    folders = [str(folder) for _, folder in logits.values()]
    command = [sys.executable, "-W", "ignore", "-c", SCRIPT, *folders, str(tmp_path / "images.pt")]
    answers = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    for here, folder in logits.values():
        assert answers[str(folder)] == here, folder


def test_only_mlp_units_of_transformers_are_neurons() -> None:
    for name, part in (("VisionTransformer", "mlp.0"), ("SwinTransformer", "mlp.0")):
        sites = find_sites(built(name).network, (3, 32, 32))
        assert [site.name for site in sites if not site.name.endswith(part)] == []
        assert len(sites) >= 2
