"""Layers whose weights are not numbers of their own: whoever would write to them refuses, and says how to mend it."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

import nss
from nss.errors import ExtendError, ModelError, NssError, PruneError, ReadaptError, RestructureError, SiteError
from nss.weight_masks import refuse_unowned

pytestmark = pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning")
KEEP = {"conv1": torch.arange(6) < 3}


class TwoConvolutions(nn.Module):
    def __init__(self, num_classes: int, kind: str) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 6, 3, padding=1)
        self.conv2 = WAYS[kind](nn.Conv2d(6, 6, 3, padding=1))
        self.last = nn.Conv2d(6, 6, 3, padding=1)
        if kind == "tied":
            self.last.weight = self.conv2.weight
        self.head = nn.Linear(6, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv2(F.relu(self.conv1(x))))
        return self.head(F.relu(self.last(x)).mean((2, 3)))


def biased(layer: nn.Module) -> nn.Module:
    parametrize.register_parametrization(layer, "bias", nn.Tanh())
    return layer


WAYS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "old weight_norm": nn.utils.weight_norm,
    "old spectral_norm": nn.utils.spectral_norm,
    "bias": biased,
    "tied": lambda layer: layer,
}
SAYS = dict.fromkeys(WAYS, ("conv2", "computed from others", "remove_parametrizations")) | {
    "tied": ("last", "'conv2' and 'last' share a weight", "call one layer twice")
}
Kit = tuple[str, nss.Classifier, nss.SemanticSlices, nss.Profile, nss.Dataset]


@pytest.fixture(scope="module", params=list(WAYS))
def kit(request: pytest.FixtureRequest, networks: ModuleType) -> Kit:
    data = networks.coloured_data(24)
    model = nss.build_model(
        f"{__name__}:TwoConvolutions",
        data.classes,
        data.image_shape,
        0,
        arguments={"kind": request.param},
        allow=[__name__],
    )
    nss.train(model, data, 1, 0)  # the old ways cannot be copied once they have computed a weight
    found = nss.profile(model, data, windows=1)
    return request.param, model, nss.semantic_slices(nss.critical_neurons(found), found), found, data


def new_images(data: nss.Dataset) -> tuple[Tensor, Tensor]:
    return data.images[:8], torch.full((8,), 2)


VERBS: dict[str, tuple[type[NssError], Callable[[Kit], object]]] = {
    "remove": (SiteError, lambda kit: nss.remove(kit[1], KEEP)),
    "plan_removal": (SiteError, lambda kit: nss.plan_removal(kit[1], KEEP)),
    "freeze": (SiteError, lambda kit: nss.freeze(kit[1], KEEP)),
    "prune_weights": (PruneError, lambda kit: nss.prune_weights(kit[1], sparsity=0.5)),
    "readapt": (ReadaptError, lambda kit: nss.readapt(kit[1], kit[2], kit[4], profile=kit[3], epochs=1)),
    "restructure": (RestructureError, lambda kit: nss.restructure(kit[1], kit[2], kit[4], kit[3], macs=0.6)),
    "extend": (
        ExtendError,
        lambda kit: nss.extend(kit[1], kit[2], new_images(kit[4]), old_data=kit[4], classes=["new"], epochs=1),
    ),
    "mutate": (ModelError, lambda kit: nss.mutate(kit[1], kit[4], drop=0.1, seed=0)),
}


@pytest.mark.parametrize("verb", list(VERBS))
def test_every_verb_that_writes_to_layers_refuses_by_name_and_says_how_to_mend_it(kit: Kit, verb: str) -> None:
    error, call = VERBS[verb]
    where, what, fix = SAYS[kit[0]]
    before = {name: tensor.clone() for name, tensor in kit[1].state_dict().items()}
    with pytest.raises(NssError, match=what) as caught:
        call(kit)
    assert type(caught.value) is error
    assert caught.value.where == where
    assert fix in caught.value.fix
    assert all(torch.equal(tensor, before[name]) for name, tensor in kit[1].state_dict().items())


@pytest.mark.parametrize("kind", ["weight_norm", "old weight_norm"])
def test_the_mended_layer_is_cut_as_any_other(networks: ModuleType, kind: str) -> None:
    network = TwoConvolutions(4, kind).eval()
    images = networks.floats(5, (1, 6, 6))
    with torch.no_grad():
        before = network(images)
    if kind == "weight_norm":
        parametrize.remove_parametrizations(network.conv2, "weight")
    else:
        nn.utils.remove_weight_norm(network.conv2)
    with torch.no_grad():
        assert torch.allclose(network(images), before, atol=1e-6)
    smaller = nss.remove(network, {**KEEP, "conv2": torch.arange(6) < 2}, (1, 6, 6))
    masked = nss.sliced(network, {**KEEP, "conv2": torch.arange(6) < 2}, (1, 6, 6))
    assert smaller.conv2.weight.shape == (2, 3, 3, 3)
    assert networks.largest_difference(masked, smaller, images) < 1e-6


@pytest.mark.parametrize("kind", list(WAYS))
def test_such_a_model_still_says_what_its_neurons_do(networks: ModuleType, kind: str) -> None:
    network = TwoConvolutions(4, kind).eval()
    images = networks.floats(5, (1, 6, 6))
    masked = nss.sliced(network, KEEP, (1, 6, 6))
    expected = networks.hooked(network, KEEP, images)
    with torch.no_grad():
        assert torch.allclose(masked(images), expected, atol=1e-6)


def test_a_mask_alone_is_the_layers_own_and_a_mask_over_something_computed_is_not() -> None:
    network = nn.Sequential(nn.Linear(3, 4))
    pruned = nss.prune_weights(network, sparsity=0.5)
    refuse_unowned(pruned, "testing", ModelError)
    parametrize.register_parametrization(pruned[0], "weight", nn.Tanh())
    with pytest.raises(ModelError, match="computed from others"):
        refuse_unowned(pruned, "testing", ModelError)
