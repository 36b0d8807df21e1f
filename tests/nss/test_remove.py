"""Physical removal: the logits of the masked view from smaller tensors, ready to train, save and cut again."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
import torchvision
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from nss.errors import SiteError
from nss.evaluate import count_parameters
from nss.model import Classifier, model_digest, save_model
from nss.remove import remove
from nss.sites import find_sites
from nss.sliced import sliced

ZOO = ("lenet", "vgg_small", "resnet20", "mobilenet_small")
RGB = (3, 6, 6)
few = settings(max_examples=4, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@pytest.mark.parametrize("name", ZOO)
@given(seed=st.integers(0, 10_000), share=st.sampled_from([0.15, 0.5, 0.9]))
@few
def test_removing_equals_masking_on_the_zoo(networks: ModuleType, name: str, seed: int, share: float) -> None:
    model = networks.zoo_model(name, seed)
    images = networks.pictures(8, seed=seed)
    for choose in (networks.random_masks, networks.coupled_masks):
        masks = choose(model.network, networks.SHAPE, seed, share)
        smaller = remove(model, masks)
        assert networks.largest_difference(sliced(model, masks), smaller, images) < 1e-5


@pytest.mark.parametrize("name", ZOO)
def test_whole_coupled_groups_leave_and_every_layer_shrinks_to_what_is_kept(networks: ModuleType, name: str) -> None:
    model = networks.zoo_model(name)
    masks = networks.coupled_masks(model.network, networks.SHAPE, 5, 0.4)
    kept = find_sites(model.network, networks.SHAPE).couple(masks)
    smaller = remove(model, masks)
    assert count_parameters(smaller) < 0.6 * count_parameters(model)
    for layer, mask in kept.neurons.items():
        assert smaller.network.get_submodule(layer).weight.shape[0] == int(mask.sum()) < len(mask)
        assert smaller.spec.kept[layer] == tuple(mask.nonzero()[:, 0].tolist())


@pytest.mark.parametrize(
    "name", ["resnet18", "mobilenet_v2", "mobilenet_v3_small", "efficientnet_b0", "densenet121", "shufflenet_v2_x0_5"]
)
def test_removing_equals_masking_on_torchvision_models(networks: ModuleType, name: str) -> None:
    torch.manual_seed(0)
    network = networks.randomise(getattr(torchvision.models, name)(num_classes=10), 1).eval()
    masks = networks.coupled_masks(network, (3, 32, 32), 2, 0.6)
    smaller = remove(network, masks, (3, 32, 32))
    images = networks.floats(4, (3, 32, 32))
    assert networks.largest_difference(sliced(network, masks, (3, 32, 32)), smaller, images) < 1e-4
    assert networks.largest_difference(network, smaller, images) > 1e-3
    assert count_parameters(smaller) < 0.95 * count_parameters(network)


Masks = dict[str, torch.Tensor]


def check(networks: ModuleType, network: nn.Module, masks: Masks, shape: tuple[int, ...]) -> nn.Module:
    """Removed equals masked; returns the removed network."""
    smaller = remove(network, masks, shape)
    assert networks.largest_difference(sliced(network, masks, shape), smaller, networks.floats(7, shape)) < 1e-5
    return smaller


def without(size: int, *gone: int) -> torch.Tensor:
    mask = torch.ones(size, dtype=torch.bool)
    mask[list(gone)] = False
    return mask


def test_nothing_leaves_a_grouped_convolution_that_the_other_group_needs(networks: ModuleType) -> None:
    network = networks.Grouped().eval()
    smaller = check(networks, network, {"conv": without(16, 0, 1, 2)}, RGB)
    assert smaller.conv.weight.shape == (16, 3, 1, 1)
    zero_rows = (smaller.conv.weight == 0).flatten(1).all(1) & (smaller.conv.bias == 0)
    assert zero_rows.nonzero()[:, 0].tolist() == [0, 1, 2]


def test_what_leaves_every_group_alike_is_removed_and_the_rest_masked(networks: ModuleType) -> None:
    network = networks.Grouped().eval()
    smaller = check(networks, network, {"conv": without(16, 0, 1, 8), "grouped": without(16, 3, 11, 4)}, RGB)
    assert (smaller.conv.out_channels, smaller.grouped.in_channels, smaller.grouped.out_channels) == (14, 14, 14)
    assert smaller.grouped.groups == 2
    assert smaller.grouped.weight.shape == (14, 7, 3, 3)
    assert smaller.head.in_features == 14
    assert torch.equal(smaller.conv.weight[1:7], network.conv.weight[2:8])
    assert not smaller.conv.weight[0].any()  # channel 1, whose partner 9 stays


def test_a_masked_channel_that_cannot_leave_is_zero_behind_a_sigmoid_too(networks: ModuleType) -> None:
    network = networks.Grouped(nn.Sigmoid).eval()
    check(networks, network, {"conv": without(16, 0, 1, 2)}, RGB)


def test_a_residual_keeps_the_union_of_both_sides(networks: ModuleType) -> None:
    network = networks.Residual().eval()
    masks = {"conv_a": torch.arange(8) < 3, "conv_b": torch.arange(8) == 5}
    smaller = check(networks, network, masks, RGB)
    assert smaller.conv_a.out_channels == smaller.conv_b.out_channels == smaller.head.in_features == 4
    assert torch.equal(smaller.conv_a.weight, network.conv_a.weight[[0, 1, 2, 5]])
    assert torch.equal(smaller.conv_b.bias, network.conv_b.bias[[0, 1, 2, 5]])
    assert torch.equal(smaller.head.weight, network.head.weight[:, [0, 1, 2, 5]])


def test_squeeze_excite_and_depthwise_shrink_together(networks: ModuleType) -> None:
    network = networks.randomise(networks.Squeeze(), 3).eval()
    keep = torch.arange(8) % 3 == 0
    masks = {"wide": keep, "depthwise": keep, "excite": keep, "squeeze": torch.tensor([False, True])}
    smaller = check(networks, network, masks, RGB)
    assert (smaller.wide.out_channels, smaller.depthwise.groups, smaller.excite.out_channels) == (3, 3, 3)
    assert (smaller.bn2.num_features, smaller.squeeze.in_channels, smaller.squeeze.out_channels) == (3, 3, 1)
    assert smaller.narrow.in_channels == 3


def test_concat_offsets_and_the_norm_behind_them_are_right(networks: ModuleType) -> None:
    network = networks.randomise(networks.Concat(), 4).eval()
    masks = {"conv1": torch.tensor([1, 0, 0, 1]).bool(), "conv2": torch.tensor([0, 1, 0, 1, 1]).bool()}
    smaller = check(networks, network, masks, RGB)
    joined = [1, 3, 4, 5, 6, 7, 8, 11]  # conv2's 1, 3, 4; the image's three; conv1's 0, 3
    assert torch.equal(smaller.bn.running_mean, network.bn.running_mean[joined])
    assert torch.equal(smaller.last.weight, network.last.weight[:, joined])


@pytest.mark.parametrize("how", ["nothing", "norm", "sigmoid", "plus", "minus", "clamp"])
def test_what_moves_zero_between_two_layers_makes_no_difference(networks: ModuleType, how: str) -> None:
    torch.manual_seed(1)
    network = networks.randomise(networks.Shifted(how), 5).eval()
    smaller = check(networks, network, {"conv": torch.arange(6) % 2 == 0}, RGB)
    assert smaller.conv.out_channels == 3


def test_a_norm_over_groups_of_channels_makes_no_difference(networks: ModuleType) -> None:
    network = networks.GroupNormed().eval()
    check(networks, network, networks.coupled_masks(network, RGB, 3), RGB)


@pytest.mark.parametrize("shift", [0.0, 0.7])
def test_hidden_units_over_tokens_leave(networks: ModuleType, shift: float) -> None:
    network = networks.Tokens(shift).eval()
    smaller = check(networks, network, {"hidden": torch.arange(10) < 4}, (2, 3, 8))
    assert (smaller.hidden.out_features, smaller.head.in_features) == (4, 4)


def test_a_view_with_a_fixed_number_of_features_still_works(networks: ModuleType) -> None:
    network = networks.FixedView().eval()
    smaller = check(networks, network, {"conv": torch.arange(8) % 2 == 0, "hidden": torch.arange(6) < 4}, (3, 8, 8))
    assert smaller(networks.floats(3, (3, 8, 8))).shape == (3, 4)
    assert smaller.hidden.out_features == 4


def test_maps_joined_along_the_height_and_pooled_still_work(networks: ModuleType) -> None:
    network = networks.Stacked().eval()
    check(networks, network, networks.random_masks(network, RGB, 3), RGB)


def test_a_layer_used_twice_is_cut_once(networks: ModuleType) -> None:
    network = networks.Twice().eval()
    keep = torch.tensor([True, False, True, False])
    smaller = check(networks, network, {"stem": keep, "shared": keep, "shared#2": keep}, (1, 6, 6))
    assert torch.equal(smaller.shared.weight, network.shared.weight[keep][:, keep])


def test_a_transformer_loses_hidden_units_and_its_logits_change_as_masked(networks: ModuleType) -> None:
    torch.manual_seed(0)
    vit = torchvision.models.VisionTransformer(16, 4, 2, 4, 64, 96, num_classes=5).eval()
    nn.init.normal_(vit.heads.head.weight)  # torchvision starts the head at zero
    name = "encoder.layers.encoder_layer_0.mlp.0"
    keep = torch.arange(96) % 4 == 0
    images = networks.floats(3, (3, 16, 16))
    smaller = check(networks, vit, {name: keep}, (3, 16, 16))
    assert networks.largest_difference(vit, smaller, images) > 1e-3
    assert smaller.get_submodule(name).out_features == 24
    mlp = vit.get_submodule("encoder.layers.encoder_layer_0.mlp")
    expected = networks.hooked(vit, {"encoder.layers.encoder_layer_0.mlp.1": keep}, images)
    assert isinstance(mlp[1], nn.GELU)
    assert torch.allclose(smaller(images), expected, atol=1e-5)


def test_removal_twice_names_the_original_channels(networks: ModuleType) -> None:
    model = networks.zoo_model("lenet")
    first = remove(model, {"conv1": torch.arange(16) % 2 == 1, "fc2": torch.arange(84) >= 4})
    second = remove(first, {"conv1": torch.arange(8) >= 3})
    assert second.spec.kept == {"conv1": (7, 9, 11, 13, 15), "fc2": tuple(range(4, 84))}
    both = torch.isin(torch.arange(16), torch.tensor([7, 9, 11, 13, 15]))
    at_once = remove(model, {"conv1": both, "fc2": torch.arange(84) >= 4})
    assert model_digest(second) == model_digest(at_once)
    assert second.spec.parent == model_digest(first)
    assert first.spec.parent == model_digest(model)


def test_the_model_stays_as_it_was_and_the_copy_keeps_its_modes(networks: ModuleType) -> None:
    model = networks.zoo_model("vgg_small").train()
    model.network.features[1].eval()
    before, modes = model_digest(model), {name: module.training for name, module in model.named_modules()}
    smaller = remove(model, {"hidden": torch.arange(256) < 9})
    assert model_digest(model) == before
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert {name: module.training for name, module in smaller.named_modules()} == modes
    assert not model.spec.kept


def test_frozen_weights_stay_frozen(networks: ModuleType) -> None:
    model = networks.zoo_model("resnet20")
    model.network.stem.requires_grad_(False)
    smaller = remove(model, networks.coupled_masks(model.network, networks.SHAPE, 0))
    assert [p.requires_grad for p in smaller.parameters()] == [p.requires_grad for p in model.parameters()]


@pytest.mark.parametrize("name", ZOO)
def test_training_steps_with_a_fresh_optimizer_move_every_weight_and_lower_the_loss(
    networks: ModuleType, name: str
) -> None:
    model = networks.zoo_model(name)
    smaller = remove(model, networks.coupled_masks(model.network, networks.SHAPE, 1)).train()
    weights = [parameter for parameter in smaller.parameters() if parameter.dim() > 1]
    before = [weight.detach().clone() for weight in weights]
    images, labels = networks.pictures(16), torch.arange(16) % 4
    optimizer = torch.optim.SGD(smaller.parameters(), 0.05)
    losses = []
    for _ in range(3):
        loss = F.cross_entropy(smaller(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert all(not torch.equal(old, new) for old, new in zip(before, weights, strict=True))
    assert losses[-1] < losses[0]


SCRIPT = """
import json, sys
import torch
from nss.model import load_model
images = torch.load(sys.argv[1], weights_only=True)
for folder in sys.argv[2:]:
    model = load_model(folder)
    with torch.no_grad():
        torch.save(model(images), folder + ".logits")
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    before = float(torch.nn.functional.cross_entropy(model(images), torch.arange(len(images)) % 4))
    for _ in range(2):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(images), torch.arange(len(images)) % 4).backward()
        optimizer.step()
    print(json.dumps([before, float(torch.nn.functional.cross_entropy(model(images), torch.arange(len(images)) % 4))]))
"""


def test_a_removed_model_gives_equal_logits_in_a_new_process_and_trains_there(
    networks: ModuleType, tmp_path: Path
) -> None:
    images = networks.pictures(256)
    torch.save(images, tmp_path / "images.pt")
    logits, folders = {}, []
    for name in ZOO:
        model = networks.zoo_model(name, seed=7)
        once = remove(model, networks.coupled_masks(model.network, networks.SHAPE, 3, 0.7))
        twice = remove(once, networks.coupled_masks(once.network, networks.SHAPE, 4, 0.7))
        folders.append(str(tmp_path / name))
        save_model(twice, folders[-1])
        with torch.no_grad():
            logits[folders[-1]] = twice.eval()(images)
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "images.pt"), *folders]
    run = subprocess.run(command, check=True, capture_output=True, text=True)
    for folder in folders:
        assert torch.equal(torch.load(folder + ".logits", weights_only=True), logits[folder])
    losses = [json.loads(line) for line in run.stdout.splitlines()]
    assert len(losses) == 4
    assert all(after < before for before, after in losses)


def test_a_removed_classifier_stays_one_and_a_plain_module_stays_plain(networks: ModuleType) -> None:
    model = networks.zoo_model("lenet")
    assert isinstance(remove(model, {}), Classifier)
    assert isinstance(remove(networks.Residual(), {}, RGB), networks.Residual)


def test_wrong_neurons_are_refused_and_nothing_is_cut(networks: ModuleType) -> None:
    model = networks.zoo_model("lenet")
    before = model_digest(model)
    with pytest.raises(SiteError, match="no neuron of 'fc1' is kept"):
        remove(model, {"conv1": torch.arange(16) < 3, "fc1": torch.zeros(120, dtype=torch.bool)})
    assert model_digest(model) == before


class Squeezed(nn.Module):
    """`squeeze` drops the axes of size one, of a single image that of the images too."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.hidden, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.adaptive_avg_pool2d(F.relu(self.conv(x)), 1).squeeze()
        return self.head(F.relu(self.hidden(x)))


def test_a_network_that_squeezes_its_maps_loses_channels_and_no_images(networks: ModuleType) -> None:
    network, images = Squeezed().eval(), networks.floats(16, RGB)
    masks = {"conv": torch.arange(8) % 3 == 0, "hidden": torch.arange(16) < 8}
    view, smaller = sliced(network, masks, RGB), remove(network, masks, RGB)
    assert [(site.name, len(site)) for site in find_sites(network, RGB)] == [("conv", 8), ("hidden", 16)]
    assert networks.largest_difference(view, smaller, images) < 1e-6
    assert tuple(view(images[:7]).shape) == (7, 4)
    hidden = F.relu(network.hidden(F.relu(network.conv(images)).mean((2, 3)) * masks["conv"])) * masks["hidden"]
    torch.testing.assert_close(smaller(images), network.head(hidden))
