"""Factories of networks: which are imported, and that lazy layers find their sizes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from nss.errors import ModelError
from nss.factories import find_factory
from nss.model import Classifier, build_model, load_model, model_digest, save_model

HERE = __name__
SHAPE = (3, 8, 6)


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """A package of the user's that imports what it needs, as all code does."""
    code = (
        "import functools\n"
        "from subprocess import run\n"
        "from nss.zoo import lenet\n"
        "def make(num_classes):\n    return None\n"
        "small = functools.partial(make, num_classes=2)\n"
        "shell = functools.partial(run, ['ls'])\n"
    )
    (tmp_path / "factories_of_a_user.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    return lambda name: f"factories_of_a_user:{name}"


def test_a_name_that_a_factorys_module_imports_in_vain_is_told_with_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "nets_importing_a_name.py").write_text("from nss.zoo import no_such_net\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ModelError, match=r"cannot import name 'no_such_net' from 'nss\.zoo'") as caught:
        find_factory("nets_importing_a_name:Net", ["nets_importing_a_name"])
    assert caught.value.fix == "correct what nets_importing_a_name imports, or install a version that has it"


@pytest.mark.parametrize("name", ["make", "small", "lenet"])
def test_what_an_allowed_package_defines_is_a_factory(package: Callable[[str], str], name: str) -> None:
    assert callable(find_factory(package(name), ["factories_of_a_user"]))


@pytest.mark.parametrize("name", ["run", "shell"])
def test_what_an_allowed_package_only_imports_is_none(package: Callable[[str], str], name: str) -> None:
    with pytest.raises(ModelError, match="imported from subprocess, which is not an allowed package") as caught:
        find_factory(package(name), ["factories_of_a_user"])
    assert caught.value.allowed == "nss.zoo, torchvision.models, factories_of_a_user"


def test_what_torchvision_imports_to_download_weights_is_no_factory() -> None:
    with pytest.raises(ModelError, match=r"imported from torch\.hub"):
        find_factory("torchvision.models._api:load_state_dict_from_url")


class Lazy(nn.Module):
    """Layers that find out by the first image how much they read."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.conv = nn.LazyConv2d(5, 3, padding=1)
        self.norm = nn.LazyBatchNorm2d()
        self.drop = nn.Dropout(0.5)
        self.head = nn.LazyLinear(num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.drop(torch.relu(self.norm(self.conv(x)))).flatten(1))


class Aside(Lazy):
    """One more lazy layer that no image comes through."""

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes)
        self.other = nn.LazyLinear(2)


class AsideNorm(Lazy):
    """One more norm, without parameters, that no image comes through."""

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes)
        self.other = nn.LazyBatchNorm2d(affine=False)


class Vectors(nn.Module):
    """Takes vectors of 7, no images."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.first = nn.Linear(7, 4)
        self.head = nn.LazyLinear(num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.first(x))


def build(network: type[nn.Module], seed: int = 0) -> Classifier:
    return build_model(f"{HERE}:{network.__name__}", ("a", "b"), SHAPE, seed, allow=[HERE])


def test_lazy_layers_find_their_sizes_and_the_model_is_one_like_any_other(tmp_path: Path) -> None:
    model = build(Lazy)
    sizes = {name: tuple(each.shape) for name, each in model.network.named_parameters()}
    assert sizes == {
        "conv.weight": (5, 3, 3, 3),
        "conv.bias": (5,),
        "norm.weight": (5,),
        "norm.bias": (5,),
        "head.weight": (2, 240),
        "head.bias": (2,),
    }
    assert all(each.training for each in model.modules())
    assert torch.equal(model.network.norm.running_mean, torch.zeros(5))
    save_model(model, tmp_path / "model")
    again = load_model(tmp_path / "model", allow=[HERE])
    assert model_digest(again) == model_digest(model)
    images = torch.rand(3, *SHAPE, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(again(images), model.eval()(images), rtol=0, atol=0)


def test_lazy_layers_follow_the_seed_and_leave_the_callers_draws_alone() -> None:
    state = torch.get_rng_state()
    digests = [model_digest(build(Lazy, seed)) for seed in (1, 1, 2)]
    assert digests[0] == digests[1] != digests[2]
    assert torch.equal(torch.get_rng_state(), state)


def test_a_lazy_layer_that_no_image_comes_through_is_named() -> None:
    with pytest.raises(ModelError, match="no size") as caught:
        build(Aside)
    assert caught.value.where == f"{HERE}:Aside: other.weight, other.bias"
    with pytest.raises(ModelError, match="no size") as caught:
        build(AsideNorm)
    assert caught.value.where == f"{HERE}:AsideNorm: other.running_mean, other.running_var"


def test_a_lazy_network_that_takes_no_such_image_is_refused_in_words() -> None:
    with pytest.raises(ModelError, match="lazy layers did not find their sizes: mat1 and mat2") as caught:
        build(Vectors)
    assert caught.value.fix == "make a network that takes images [n, 3, 8, 6]"
