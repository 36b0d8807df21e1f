"""Masks of weights hold: in copies, folders, other processes, training, tracing, profiling, removal and export."""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from nss.errors import ModelError, RestructureError
from nss.files import file_digest
from nss.finetune import fine_tune
from nss.model import Classifier, build_model, load_model, model_digest, save_model
from nss.profile import profile
from nss.prune_weights import prune_weights
from nss.remove import remove
from nss.sites import find_sites
from nss.size import count_macs, count_parameters
from nss.sliced import sliced
from nss.weight_masks import (
    apply_masks,
    count_masked,
    count_prunable,
    plain_state,
    refuse_masks,
    weight_masks,
    without_masks,
)

ZOO = ("lenet", "vgg_small", "resnet20", "mobilenet_small")


def masked(networks: ModuleType, name: str = "lenet", sparsity: float = 0.6) -> Classifier:
    pruned = prune_weights(networks.zoo_model(name), "global", sparsity)
    assert isinstance(pruned, Classifier)
    return pruned


def masked_weights(model: nn.Module) -> Tensor:
    modules = dict(model.named_modules())
    return torch.cat([modules[name].weight.detach()[~mask] for name, mask in weight_masks(model).items()])


def one_layer() -> nn.Linear:
    layer = nn.Linear(3, 2)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]))
        layer.bias.zero_()
    apply_masks(layer, {"": torch.tensor([[True, False, True], [False, False, True]])})
    return layer


# -- what a mask is ----------------------------------------------------------------------------------------------------


def test_a_masked_weight_is_zero_to_whoever_reads_it() -> None:
    layer = one_layer()
    assert layer.weight.tolist() == [[1, 0, 3], [0, 0, 6]]
    assert layer(torch.tensor([1.0, 10.0, 100.0])).tolist() == [301, 600]
    assert isinstance(layer, nn.Linear)
    assert sorted(parameter.abs().sum().item() for parameter in layer.parameters()) == [0, 10]


def test_counts_are_of_weights_and_parameters_stay_the_dense_ones(networks: ModuleType) -> None:
    layer = one_layer()
    assert (count_masked(layer), count_prunable(layer), count_parameters(layer)) == (3, 6, 8)
    assert count_masked(nn.Linear(3, 2)) == 0
    model = networks.zoo_model("resnet20")
    pruned = masked(networks, "resnet20")
    assert count_parameters(pruned) == count_parameters(model)
    assert count_prunable(pruned) == count_prunable(model) == sum(p.numel() for p in model.parameters() if p.dim() > 1)
    assert count_macs(pruned) == count_macs(model)


def test_no_weight_hides_behind_a_mask_even_if_it_is_not_a_number() -> None:
    layer = one_layer()
    with torch.no_grad():
        layer.parametrizations.weight.original[0, 1] = float("nan")
    assert layer.weight.tolist() == [[1, 0, 3], [0, 0, 6]]


def test_a_new_mask_takes_the_place_of_the_old_one() -> None:
    layer = one_layer()
    apply_masks(layer, {"": torch.tensor([[True, True, False], [True, True, True]])})
    assert count_masked(layer) == 1
    assert layer.weight.tolist() == [[1, 0, 0], [0, 0, 6]]
    assert len(layer.parametrizations.weight) == 1


def test_without_masks_zeros_are_ordinary_and_the_original_and_its_copies_keep_theirs() -> None:
    layer = one_layer()
    twin = copy.deepcopy(layer)
    plain = without_masks(layer)
    assert type(plain) is nn.Linear
    assert count_masked(plain) == 0
    assert sorted(plain.state_dict()) == ["bias", "weight"]
    assert plain.weight.tolist() == [[1, 0, 3], [0, 0, 6]]
    F.mse_loss(plain(torch.ones(3)), torch.ones(2)).backward()
    assert bool((plain.weight.grad != 0).all())
    for each in (layer, twin):
        assert each.weight.tolist() == [[1, 0, 3], [0, 0, 6]]
        assert count_masked(each) == 3


def test_a_copy_is_independent(networks: ModuleType) -> None:
    model = masked(networks)
    twin = copy.deepcopy(model)
    assert model_digest(twin) == model_digest(model)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.add_(1)
    assert not bool(masked_weights(twin).any())
    assert model_digest(twin) != model_digest(model)
    images = networks.pictures(4)
    with torch.no_grad():
        assert networks.largest_difference(model, without_masks(model), images) < 1e-5


def test_writing_to_a_masked_weight_is_refused_instead_of_lost() -> None:
    with pytest.raises((KeyError, RuntimeError)):
        one_layer().weight = nn.Parameter(torch.ones(2, 3))


def test_what_would_undo_masks_can_be_refused_with_the_ways_out() -> None:
    refuse_masks(nn.Linear(2, 2), "restructuring", RestructureError)
    with pytest.raises(RestructureError, match="3 weights of the model are masked, and restructuring") as caught:
        refuse_masks(one_layer(), "restructuring", RestructureError)
    assert "without_masks" in caught.value.fix


# -- training ----------------------------------------------------------------------------------------------------------


def warm_sgd(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    optimizer = torch.optim.SGD(parameters, 0.1, 0.9, weight_decay=0.1, nesterov=True)
    for parameter in parameters:
        optimizer.state[parameter]["momentum_buffer"] = torch.ones_like(parameter)
    return optimizer


def warm_adamw(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW(parameters, 0.1, weight_decay=0.1)
    for parameter in parameters:
        state = {"step": torch.tensor(3.0), "exp_avg": torch.ones_like(parameter)}
        optimizer.state[parameter] = {**state, "exp_avg_sq": torch.ones_like(parameter)}
    return optimizer


@pytest.mark.parametrize("optimizer_of", [warm_sgd, warm_adamw])
@pytest.mark.parametrize("name", ["lenet", "resnet20"])
def test_masked_weights_stay_zero_with_warm_momentum_weight_decay_and_adamw(
    networks: ModuleType, name: str, optimizer_of: object
) -> None:
    model = masked(networks, name).train()
    before = {key: value.clone() for key, value in plain_state(model).items()}
    optimizer = optimizer_of(list(model.parameters()))
    for _ in range(5):
        optimizer.zero_grad()
        F.cross_entropy(model(networks.pictures(8)), torch.arange(8) % 4).backward()
        optimizer.step()
    assert torch.equal(masked_weights(model), torch.zeros(count_masked(model)))
    after = plain_state(model)
    for layer, mask in weight_masks(model).items():
        assert torch.equal(after[f"{layer}.weight_mask"], before[f"{layer}.weight_mask"])
        assert bool((after[f"{layer}.weight"] != before[f"{layer}.weight"])[mask].any())


def test_fine_tuning_a_masked_model_trains_the_rest(networks: ModuleType) -> None:
    model = masked(networks)
    count, before = count_masked(model), model_digest(model)
    fine_tune(model, (networks.pictures(16), torch.arange(16) % 4), 3, 0, batch_size=8)
    assert count_masked(model) == count
    assert not bool(masked_weights(model).any())
    assert model_digest(model) != before


# -- folders -----------------------------------------------------------------------------------------------------------

SCRIPT = """
import sys, torch
import torch.nn.functional as F
from nss.model import load_model, model_digest
from nss.weight_masks import count_masked, weight_masks
images = torch.load(sys.argv[1], weights_only=True)
for folder in sys.argv[2:]:
    model = load_model(folder)
    with torch.no_grad():
        found = {"logits": model(images), "digest": model_digest(model), "masked": count_masked(model)}
    optimizer = torch.optim.AdamW(model.parameters(), 0.1, weight_decay=0.1)
    F.cross_entropy(model.train()(images), torch.arange(len(images)) % 4).backward()
    optimizer.step()
    modules = dict(model.named_modules())
    held = [not bool(modules[name].weight[~mask].any()) for name, mask in weight_masks(model).items()]
    torch.save({**found, "held": all(held), "moved": model_digest(model) != found["digest"]}, folder + ".pt")
"""


def test_a_masked_model_is_bit_identical_in_a_new_process_and_trains_on(networks: ModuleType, tmp_path: Path) -> None:
    images = networks.pictures(64)
    torch.save(images, tmp_path / "images.pt")
    models = {str(tmp_path / name): masked(networks, name) for name in ZOO}
    for folder, model in models.items():
        save_model(model, folder)
    subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path / "images.pt"), *models], check=True, capture_output=True
    )
    for folder, model in models.items():
        found = torch.load(folder + ".pt", weights_only=True)
        with torch.no_grad():
            assert torch.equal(found["logits"], model(images)), folder
        assert found["digest"] == model_digest(model)
        assert found["masked"] == count_masked(model) > 0
        assert found["held"]
        assert found["moved"]


def test_a_folder_has_ordinary_names_and_the_same_bytes_again(networks: ModuleType, tmp_path: Path) -> None:
    model = masked(networks)
    save_model(model, tmp_path / "a")
    stored = load_file(tmp_path / "a" / "model.safetensors")
    dense = networks.zoo_model("lenet").state_dict()
    masks = {f"{layer}.weight_mask" for layer in weight_masks(model)}
    assert stored.keys() == dense.keys() | masks
    assert sum(int((stored[name.removesuffix("_mask")] == 0).sum()) for name in masks) == count_masked(model)
    again = load_model(tmp_path / "a")
    save_model(again, tmp_path / "b")
    for name in ("model.json", "model.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert again.spec == model.spec


def test_numbers_behind_a_mask_belong_to_nothing(networks: ModuleType, tmp_path: Path) -> None:
    model, moved = masked(networks), masked(networks)
    with torch.no_grad():
        moved.network.conv1.parametrizations.weight.original[~moved.network.conv1.parametrizations.weight[0].mask] = 7
    assert model_digest(moved) == model_digest(model)
    assert model_digest(without_masks(moved)) == model_digest(without_masks(model))
    save_model(moved, tmp_path / "m")
    assert model_digest(load_model(tmp_path / "m")) == model_digest(model)


def test_masks_belong_to_the_digest(networks: ModuleType) -> None:
    model = masked(networks)
    assert model_digest(without_masks(model)) != model_digest(model)


def damaged(folder: Path, source: Path, **tensors: Tensor) -> Path:
    """A copy of a model folder with tensors added or changed, whose digest is right."""
    shutil.copytree(source, folder)
    stored = load_file(folder / "model.safetensors")
    save_file({**stored, **tensors}, folder / "model.safetensors")
    content = json.loads((folder / "model.json").read_text())
    content["weights"] = file_digest(folder / "model.safetensors")
    (folder / "model.json").write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize(
    ("name", "mask", "message"),
    [
        ("network.conv1.weight_mask", torch.ones(16, 1, 5, 5), "float32"),
        ("network.conv1.weight_mask", torch.ones(16, 1, 5, 5, dtype=torch.uint8), "uint8"),
        ("network.conv1.weight_mask", torch.ones(16, 1, 5, 4, dtype=torch.bool), r"\[16, 1, 5, 4\]"),
        ("network.conv9.weight_mask", torch.ones(16, 1, 5, 5, dtype=torch.bool), "conv9"),
        ("network.relu1.weight_mask", torch.ones(1, dtype=torch.bool), "relu1"),
        ("network.conv1.bias_mask", torch.ones(16, dtype=torch.bool), "bias_mask"),
    ],
)
def test_masks_that_do_not_fit_are_refused(
    networks: ModuleType, tmp_path: Path, name: str, mask: Tensor, message: str
) -> None:
    save_model(masked(networks), tmp_path / "m")
    with pytest.raises(ModelError, match=message) as caught:
        load_model(damaged(tmp_path / "d", tmp_path / "m", **{name: mask}))
    assert str(tmp_path / "d") in caught.value.where


class OwnMask(nn.Linear):
    """A layer with a buffer of its own that happens to be called weight_mask."""

    def __init__(self, num_classes: int) -> None:
        super().__init__(4, num_classes)
        self.register_buffer("weight_mask", torch.full((num_classes, 4), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.flatten(1), self.weight * self.weight_mask, self.bias)


def test_a_buffer_that_the_network_itself_calls_weight_mask_is_no_mask(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    home = ModuleType("own_masks")
    home.factory = lambda num_classes: nn.Sequential(OwnMask(num_classes))
    home.factory.__module__ = "own_masks"
    monkeypatch.setitem(sys.modules, "own_masks", home)
    model = build_model("own_masks:factory", ("a", "b"), (1, 2, 2), 0, allow=["own_masks"]).eval()
    save_model(model, tmp_path / "m")
    loaded = load_model(tmp_path / "m", allow=["own_masks"])
    assert weight_masks(loaded) == {}
    assert model_digest(loaded) == model_digest(model)
    assert loaded.network[0].weight_mask.tolist() == [[0.5] * 4] * 2


# -- tracing, profiling, removal, export -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ZOO)
def test_neurons_and_profiles_are_those_of_the_model_with_ordinary_zeros(networks: ModuleType, name: str) -> None:
    model = masked(networks, name)
    plain = without_masks(model)
    left, right = (find_sites(each.network, networks.SHAPE) for each in (model, plain))
    assert [(site.name, len(site)) for site in left] == [(site.name, len(site)) for site in right]
    data = networks.pictures(8), torch.arange(8) % 4
    found, expected = (profile(each, data, ("taylor", "deeplift")) for each in (model, plain))
    for metric in ("taylor", "deeplift"):
        for layer, scores in expected.scores(metric).items():
            torch.testing.assert_close(found.scores(metric)[layer], scores, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("name", ZOO)
def test_removing_neurons_cuts_weights_and_masks_together(networks: ModuleType, name: str, tmp_path: Path) -> None:
    model = masked(networks, name)
    masks = networks.coupled_masks(model.network, networks.SHAPE, 3, 0.5)
    smaller = remove(model, masks)
    assert networks.largest_difference(sliced(model, masks), smaller, networks.pictures(8)) < 1e-5
    assert 0 < count_masked(smaller) < count_masked(model)
    assert count_parameters(smaller) < count_parameters(model)
    expected = remove(without_masks(model), masks)
    modules = dict(expected.named_modules())
    for layer, mask in weight_masks(smaller).items():
        assert torch.equal(mask, modules[layer].weight != 0), layer
    save_model(smaller, tmp_path / "m")
    assert model_digest(load_model(tmp_path / "m")) == model_digest(smaller)
    fine_tune(smaller, (networks.pictures(8), torch.arange(8) % 4), 2, 0, batch_size=8)
    assert not bool(masked_weights(smaller).any())
    assert count_masked(model) == count_masked(masked(networks, name))


def test_masks_of_a_grouped_convolution_are_cut_with_it(networks: ModuleType) -> None:
    network = networks.randomise(networks.Grouped(), 0).eval()
    pruned = prune_weights(network, "global", 0.5)
    left = torch.ones(16, dtype=torch.bool)
    left[[1, 2, 9, 10]] = False  # two of each half
    smaller = remove(pruned, {"conv": left, "grouped": left}, (3, 6, 6))
    own = weight_masks(pruned)["grouped"][left]
    inside = left.view(2, 8)
    expected = torch.cat([own[:6][:, inside[0]], own[6:][:, inside[1]]])
    assert torch.equal(weight_masks(smaller)["grouped"], expected)
    assert torch.equal(weight_masks(smaller)["conv"], weight_masks(pruned)["conv"][left])


def test_the_model_can_be_exported(networks: ModuleType) -> None:
    model, images = masked(networks), networks.pictures(2)
    exported = torch.export.export(model, (images,), dynamic_shapes=({0: torch.export.Dim("images")},))
    more = networks.pictures(5)
    with torch.no_grad():
        torch.testing.assert_close(exported.module()(more), model(more))
