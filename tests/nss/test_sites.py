"""Which layers have neurons, where their activation ends, and which neurons hang together."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from nss.coupling import Classes, any_in_class
from nss.errors import SiteError
from nss.sites import find_sites


def sizes(network: nn.Module, shape: tuple[int, ...]) -> dict[str, int]:
    return {site.name: len(site) for site in find_sites(network, shape)}


def small_vit() -> nn.Module:
    torch.manual_seed(0)
    return torchvision.models.VisionTransformer(
        image_size=16, patch_size=4, num_layers=2, num_heads=4, hidden_dim=64, mlp_dim=96, num_classes=5
    )


def test_convolutions_and_hidden_layers_are_sites_in_forward_order_and_the_head_is_none(networks: ModuleType) -> None:
    assert list(sizes(networks.Plain(), (1, 2, 2)).items()) == [("conv", 2), ("hidden", 3)]


@pytest.mark.parametrize(
    ("name", "count", "neurons"),
    [
        ("lenet", 4, 16 + 32 + 120 + 84),
        ("vgg_small", 7, 2 * (32 + 64 + 128) + 256),
        ("resnet20", 21, 16 + 6 * (16 + 32 + 64) + 32 + 64),
        ("mobilenet_small", 20, None),
    ],
)
def test_every_convolution_of_a_zoo_model_is_a_site(
    networks: ModuleType, name: str, count: int, neurons: int | None
) -> None:
    model = networks.zoo_model(name)
    found = sizes(model.network, networks.SHAPE)
    layers = [
        (path, module.weight.shape[0])
        for path, module in model.network.named_modules()
        if isinstance(module, (nn.Conv2d, nn.Linear))
    ]
    assert sorted(found.items()) == sorted(layers[:-1])  # the last one is the head
    assert len(found) == count
    assert neurons is None or sum(found.values()) == neurons


def test_a_layer_used_twice_gives_two_sites_that_hang_together(networks: ModuleType) -> None:
    sites = find_sites(networks.Twice(), (1, 6, 6))
    assert [site.name for site in sites] == ["stem", "shared", "shared#2"]
    assert [site.module for site in sites] == ["stem", "shared", "shared"]
    mask = torch.tensor([True, False, False, False])
    kept = sites.couple({"stem": mask, "shared": mask.roll(1), "shared#2": mask.roll(2)})
    # One set of weights has one set of channels, in and out: stem, shared and shared#2 share theirs.
    assert kept.neurons["stem"].tolist() == [True, True, True, False]
    assert kept.added == {"stem": 2, "shared": 2, "shared#2": 2}


def test_each_call_of_one_relu_and_of_the_function_ends_a_site_of_its_own(networks: ModuleType) -> None:
    sites = list(find_sites(networks.OneRelu(), (1, 6, 6)))
    assert [site.name for site in sites] == ["conv1", "conv2", "conv3"]
    assert len({site.node for site in sites}) == 3
    assert [site.node.op for site in sites] == ["call_module", "call_module", "call_function"]


def test_a_site_ends_behind_norm_and_nonlinearity_and_looks_through_pools_and_dropout() -> None:
    network = nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Dropout2d(), nn.MaxPool2d(2), nn.ReLU(),
        nn.Flatten(), nn.Linear(12, 2),
    )  # fmt: skip
    assert [str(site.node.target) for site in find_sites(network, (1, 6, 6))] == ["4"]


def test_a_layer_that_two_readers_use_ends_where_they_part(networks: ModuleType) -> None:
    ends = {site.name: str(site.node.target) for site in find_sites(networks.InPlace(), (1, 6, 6))}
    assert ends == {"stem": "relu", "conv1": "relu", "conv2": "bn"}


def test_a_residual_add_ties_both_sides_and_says_what_the_union_added(networks: ModuleType) -> None:
    sites = find_sites(networks.Residual(), (3, 6, 6))
    coupled = sites.couple({"conv_a": torch.arange(8) < 3, "conv_b": torch.arange(8) == 5})
    union = [True, True, True, False, False, True, False, False]
    assert coupled.neurons["conv_a"].tolist() == coupled.neurons["conv_b"].tolist() == union
    assert coupled.added == {"conv_a": 1, "conv_b": 3}


def test_depthwise_and_squeeze_excite_follow_the_layer_they_filter_and_weight(networks: ModuleType) -> None:
    sites = find_sites(networks.Squeeze(), (3, 6, 6))
    assert {site.name: len(site) for site in sites} == {
        "wide": 8, "depthwise": 8, "squeeze": 2, "excite": 8, "narrow": 5,
    }  # fmt: skip
    lone = torch.arange(8) == 2
    coupled = sites.couple({"wide": lone, "depthwise": lone, "excite": torch.arange(8) == 6})
    for name in ("wide", "depthwise", "excite"):
        assert coupled.neurons[name].nonzero()[:, 0].tolist() == [2, 6]
    assert coupled.added == {"wide": 1, "depthwise": 1, "squeeze": 0, "excite": 1, "narrow": 0}


def test_channels_of_a_grouped_convolution_are_not_coupled_but_leave_only_together(networks: ModuleType) -> None:
    sites = find_sites(networks.Grouped(), (3, 6, 6))
    mask = torch.ones(16, dtype=torch.bool)
    mask[[0, 1, 8]] = False
    coupled = sites.couple({"conv": mask})
    assert coupled.added == {"conv": 0, "grouped": 0}
    gone = sites.removable(coupled.ids)
    by_name = {site.name: gone[site.ids].nonzero()[:, 0].tolist() for site in sites}
    assert by_name == {"conv": [0, 8], "grouped": []}  # 1 stays: its partner 9 in the second group is needed


def test_only_the_hidden_units_of_the_mlp_are_neurons_of_a_transformer() -> None:
    found = sizes(small_vit(), (3, 16, 16))
    assert found == {f"encoder.layers.encoder_layer_{layer}.mlp.0": 96 for layer in range(2)}


def test_channels_that_a_chunk_or_a_fixed_view_counts_are_masked_but_never_removed(networks: ModuleType) -> None:
    sites = find_sites(networks.FixedView(), (3, 8, 8))
    kept = sites.couple({"conv": torch.arange(8) < 2, "hidden": torch.arange(6) < 2}).ids
    gone = {site.name: int(sites.removable(kept)[site.ids].sum()) for site in sites}
    assert gone == {"conv": 0, "hidden": 4}


def test_finding_sites_leaves_modes_statistics_and_gradients_alone(networks: ModuleType) -> None:
    network = networks.Concat().train()
    network.bn.eval()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    modes = {name: module.training for name, module in network.named_modules()}
    find_sites(network, (3, 6, 6))
    assert {name: module.training for name, module in network.named_modules()} == modes
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())
    assert all(parameter.grad is None for parameter in network.parameters())


def test_a_forward_that_asks_the_data_is_refused_with_a_remedy(networks: ModuleType) -> None:
    network = networks.Branching().train()
    with pytest.raises(SiteError, match="Branching cannot be traced") as caught:
        find_sites(network, (3, 4, 4))
    assert "torch.where" in caught.value.fix
    assert network.training


def test_an_image_of_the_wrong_shape_is_refused(networks: ModuleType) -> None:
    with pytest.raises(SiteError, match=r"does not take a \(2, 6, 6\) image"):
        find_sites(networks.Residual(), (2, 6, 6))


def test_a_network_that_is_only_a_head_has_no_neurons() -> None:
    with pytest.raises(SiteError, match="has no neurons"):
        find_sites(nn.Sequential(nn.Flatten(), nn.Linear(4, 2)), (1, 2, 2))


def test_norms_over_several_processes_that_leave_no_neuron_are_named_with_a_remedy() -> None:
    def network(norm: type[nn.Module]) -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(1, 3, 3), norm(3), nn.ReLU(), nn.Conv2d(3, 3, 3), norm(3), nn.Flatten(), nn.Linear(12, 2)
        )

    with pytest.raises(SiteError, match="has no neurons") as caught:
        find_sites(network(nn.SyncBatchNorm), (1, 6, 6))
    assert caught.value.where == "1, 4: SyncBatchNorm, whose channels are not followed"
    assert caught.value.fix == "build the network with BatchNorm2d instead and load the same state_dict"
    twin = network(nn.BatchNorm2d)
    twin.load_state_dict(network(nn.SyncBatchNorm).state_dict())
    assert sizes(twin, (1, 6, 6)) == {"0": 3, "3": 3}


@pytest.mark.parametrize(
    ("neurons", "message"),
    [
        ({"nowhere": torch.ones(8, dtype=torch.bool)}, "there is no layer 'nowhere'"),
        ({"conv_a": torch.ones(7, dtype=torch.bool)}, r"the neurons of 'conv_a' are bool \[7\]"),
        ({"conv_a": torch.ones(8)}, r"the neurons of 'conv_a' are float32 \[8\]"),
        ({"conv_a": torch.ones(8, 1, dtype=torch.bool)}, r"the neurons of 'conv_a' are bool \[8, 1\]"),
        ({"conv_b": torch.zeros(8, dtype=torch.bool)}, "no neuron of 'conv_b' is kept"),
    ],
)
def test_wrong_masks_are_refused_by_name(networks: ModuleType, neurons: dict[str, torch.Tensor], message: str) -> None:
    with pytest.raises(SiteError, match=message):
        find_sites(networks.Residual(), (3, 6, 6)).couple(neurons)


class _Reads(nn.Module):
    """A convolution whose channels `how` reads in some way before the head."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.LayerNorm(4)
        self.other = nn.Conv2d(3, 4, 1)
        self.last = nn.Conv2d(4, 5, 1)
        self.head = nn.Linear(5, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a, b = F.relu(self.conv(x)), F.relu(self.other(x))
        if self.how == "layer":
            a = self.norm(a.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        elif self.how == "softmax":
            a = F.softmax(a, 1)
        elif self.how == "sum":
            a = a.sum(1, keepdim=True) * torch.ones(1, 4, 1, 1)
        elif self.how == "total":
            a = a * b.mean()
        elif self.how == "one for all":
            a = a * b[:, :1]
        elif self.how == "chunk":
            left, right = a.chunk(2, 1)
            a = torch.cat([right, left], 1)
        elif self.how == "interleaved":
            n, c, h, w = a.size()
            a = a.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
        return self.head(F.relu(self.last(a)).mean((2, 3)))


@pytest.mark.parametrize(
    ("how", "neurons", "removable"),
    [
        ("nothing", {"conv", "other", "last"}, 3),
        ("layer", {"other", "last"}, None),
        ("softmax", {"other", "last"}, None),
        ("sum", {"other", "last"}, None),
        ("total", {"conv", "last"}, 3),
        ("one for all", {"conv", "other", "last"}, 3),
        ("chunk", {"conv", "other", "last"}, 0),
        ("interleaved", {"conv", "other", "last"}, 0),
    ],
)
def test_what_reads_the_channels_decides_whether_they_are_neurons_and_may_leave(
    how: str, neurons: set[str], removable: int | None
) -> None:
    sites = find_sites(_Reads(how), (3, 4, 4))
    # Where `other` is not read at all it is a site of its own that nothing depends on.
    assert {site.name for site in sites} == neurons
    if removable is not None:
        kept = sites.couple({"conv": torch.tensor([True, False, False, False])}).ids
        conv = next(site for site in sites if site.name == "conv")
        assert int(sites.removable(kept)[conv.ids].sum()) == removable


def test_classes_join_and_their_smallest_member_stands_for_them() -> None:
    classes = Classes()
    assert classes.grow(5) == 0
    assert classes.grow(1) == 5
    classes.tie([(4, 2), (2, 1), (5, 3)])
    twin = classes.copy()
    twin.tie([(0, 1)])
    assert classes.roots().tolist() == [0, 1, 1, 3, 1, 3]
    assert twin.roots().tolist() == [0, 0, 0, 3, 0, 3]
    flags = torch.tensor([False, False, True, False, False, False])
    assert any_in_class(flags, classes.roots()).tolist() == [False, True, True, False, True, False]


class Waiting(nn.Module):
    """While it is traced, another thread runs another network."""

    def __init__(self, other: nn.Module) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 3)
        self.head = nn.Linear(2, 2)
        vars(self)["other"] = other
        self.answers: list[torch.Tensor] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with ThreadPoolExecutor(1) as pool:
            self.answers.append(pool.submit(self.other, torch.ones(1, 3)).result())
        return self.head(self.conv(x).relu().mean((2, 3)))


def test_a_thread_runs_its_network_while_another_traces() -> None:
    other = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    network = Waiting(other)
    assert [site.name for site in find_sites(network, (1, 5, 5))] == ["conv"]
    assert torch.equal(network.answers[0], other(torch.ones(1, 3)))


def test_many_threads_trace_at_once() -> None:
    with ThreadPoolExecutor(8) as pool:
        networks = [nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(18, 2)) for _ in range(32)]
        found = list(pool.map(lambda network: [site.name for site in find_sites(network, (1, 5, 5))], networks))
    assert found == [["0"]] * 32
