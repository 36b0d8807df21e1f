"""Units of removal: what can only leave together, what competes for the same places, and what cannot leave."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
import torchvision
from tiny_helpers import RGB, Joined
from torch import Tensor, nn

from nss.errors import SiteError
from nss.remove import plan_removal
from nss.sites import Sites, find_sites
from nss.units import Group, Units, find_units


class Halves(nn.Module):
    """A chunk fixes the number of channels of `conv`; `free` may shrink."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 1)
        self.free = nn.Conv2d(4, 6, 1)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.conv(x).chunk(2, 1)
        return self.head(F.relu(self.free(left * right)).mean((2, 3)))


def found(network: nn.Module, shape: tuple[int, ...]) -> tuple[Sites, Units]:
    sites = find_sites(network, shape)
    return sites, find_units(sites)


def group_of(units: Units, site: str) -> Group:
    (group,) = [each for each in units.groups if site in each.sites]
    return group


def flags(size: int, *kept: int) -> Tensor:
    mask = torch.zeros(size, dtype=torch.bool)
    mask[list(kept)] = True
    return mask


def test_a_residual_stream_is_one_group_and_a_layer_inside_a_block_one_of_its_own(networks: ModuleType) -> None:
    _, units = found(networks.zoo_model("resnet20").network, networks.SHAPE)
    streams = {each.sites: (len(each.units), each.stuck) for each in units.groups if len(each.sites) > 1}
    assert streams == {
        ("stem.0", "blocks.0.conv2", "blocks.1.conv2", "blocks.2.conv2"): (16, 0),
        ("blocks.3.conv2", "blocks.3.shortcut.0", "blocks.4.conv2", "blocks.5.conv2"): (32, 0),
        ("blocks.6.conv2", "blocks.6.shortcut.0", "blocks.7.conv2", "blocks.8.conv2"): (64, 0),
    }
    alone = {each.sites: len(each.units) for each in units.groups if len(each.sites) == 1}
    assert alone == {(f"blocks.{block}.conv1",): 16 * 2 ** (block // 3) for block in range(9)}


def test_a_depthwise_chain_with_squeeze_and_excite_is_one_group(networks: ModuleType) -> None:
    sites, units = found(networks.Squeeze(), RGB)
    assert [(each.sites, len(each.units)) for each in units.groups] == [
        (("wide", "depthwise", "excite"), 8),
        (("squeeze",), 2),
        (("narrow",), 5),
    ]
    ids = {site.name: units.of[site.ids].tolist() for site in sites}
    assert ids["wide"] == ids["depthwise"] == ids["excite"]


def test_groups_of_a_convolution_lose_channels_alike(networks: ModuleType) -> None:
    sites, units = found(networks.Grouped(), RGB)
    assert [(each.name, len(each.units), each.stuck) for each in units.groups] == [("conv", 8, 0), ("grouped", 8, 0)]
    for site in sites:
        of = units.of[site.ids].tolist()
        assert of[:8] == of[8:]
        assert len(set(of)) == 8


def test_a_layer_called_twice_is_tied_to_what_both_calls_read(networks: ModuleType) -> None:
    _, units = found(networks.Twice(), (1, 6, 6))
    assert [(each.sites, len(each.units)) for each in units.groups] == [(("stem", "shared", "shared#2"), 4)]


def test_layers_that_are_joined_before_they_are_added_share_a_group_named_after_the_first(
    networks: ModuleType,
) -> None:
    sites, units = found(Joined(), RGB)
    (group,) = units.groups
    assert (group.name, group.sites, len(group.units)) == ("left", ("left", "right", "both"), 8)
    of = {site.name: units.of[site.ids].tolist() for site in sites}
    assert of["both"] == of["left"] + of["right"]


def test_what_cannot_leave_is_counted_as_stuck_and_is_no_unit_to_choose(networks: ModuleType) -> None:
    sites, units = found(Halves(), RGB)
    conv = group_of(units, "conv")
    assert (conv.name, conv.units.tolist(), conv.stuck) == ("conv", [], 4)
    assert (len(group_of(units, "free").units), group_of(units, "free").stuck) == (6, 0)
    kept = torch.zeros(len(units.removable), dtype=torch.bool)
    masks = {"conv": flags(8, 0), "free": flags(6, 5)}
    kept[units.of[next(site for site in sites if site.name == "conv").ids]] = True
    kept[units.of[next(site for site in sites if site.name == "free").ids[5]]] = True
    assert torch.equal(units.kept(masks, sites), kept)


@pytest.mark.parametrize("name", ["GroupNormed", "FixedView"])
def test_a_group_norm_and_a_view_that_counts_features_hold_a_whole_layer(networks: ModuleType, name: str) -> None:
    _, units = found(getattr(networks, name)(), (3, 8, 8))
    group = group_of(units, "conv")
    assert (group.units.tolist(), group.stuck) == ([], 8)


def some_networks(networks: ModuleType) -> list[tuple[nn.Module, tuple[int, ...]]]:
    zoo = [(networks.zoo_model(name).network, networks.SHAPE) for name in ("lenet", "resnet20", "mobilenet_small")]
    tiny = [(make(), RGB) for make in (networks.Grouped, networks.Squeeze, networks.Concat, Joined, Halves)]
    shuffled = torchvision.models.shufflenet_v2_x0_5(num_classes=10)
    return [*zoo, *tiny, (shuffled, (3, 32, 32)), (networks.Tokens(), (3, 2, 8))]


def test_every_channel_of_every_site_is_in_exactly_one_unit_and_every_unit_in_one_group(networks: ModuleType) -> None:
    for network, shape in some_networks(networks):
        sites, units = found(network, shape)
        own = flags(len(units.of), *[channel for site in sites for channel in site.ids.tolist()])
        assert torch.equal(units.of >= 0, own)
        assert sorted(set(units.of[own].tolist())) == list(range(len(units.removable)))
        free = [number for group in units.groups for number in group.units.tolist()]
        assert sorted(free) == units.removable.nonzero()[:, 0].tolist()
        assert sum(group.stuck for group in units.groups) == int((~units.removable).sum())
        names = [name for group in units.groups for name in group.sites]
        assert sorted(names) == sorted(site.name for site in sites)
        for group in units.groups:
            inside = {number for site in sites if site.name in group.sites for number in units.of[site.ids].tolist()}
            assert set(group.units.tolist()) <= inside
            assert len(inside) == len(group.units) + group.stuck


def test_groups_come_in_forward_order_and_so_do_the_sites_in_them(networks: ModuleType) -> None:
    for network, shape in some_networks(networks):
        sites, units = found(network, shape)
        order = [site.name for site in sites]
        firsts = [order.index(group.name) for group in units.groups]
        assert firsts == sorted(firsts)
        for group in units.groups:
            assert group.name == group.sites[0]
            assert list(group.sites) == [name for name in order if name in group.sites]


def test_a_unit_leaves_physically_and_takes_nothing_else_with_it(networks: ModuleType) -> None:
    for network, shape in some_networks(networks):
        sites, units = found(network, shape)
        free = units.removable.nonzero()[:, 0]
        for number in free[:: max(1, len(free) // 4)].tolist():
            masks = {site.name: units.of[site.ids] != number for site in sites}
            if not all(bool(mask.any()) for mask in masks.values()):
                continue
            for name, layer in plan_removal(network, masks, shape).layers.items():
                assert (layer.added, layer.masked) == (0, 0)
                assert layer.removed == int((~masks[name]).sum())


def test_a_unit_that_is_stuck_cannot_leave(networks: ModuleType) -> None:
    network = torchvision.models.shufflenet_v2_x0_5(num_classes=10)
    sites, units = found(network, (3, 32, 32))
    stuck = (~units.removable).nonzero()[:, 0]
    assert 0 < len(stuck) < len(units.removable)
    for number in stuck[:: max(1, len(stuck) // 4)].tolist():
        masks = {site.name: units.of[site.ids] != number for site in sites}
        layers = plan_removal(network, masks, (3, 32, 32)).layers
        assert sum(layer.removed for layer in layers.values()) == 0
        assert sum(layer.masked for layer in layers.values()) > 0


def test_channels_that_stay_are_those_of_kept_units_and_all_that_are_no_neurons(networks: ModuleType) -> None:
    sites, units = found(networks.Residual(), RGB)
    stay = units.channels(flags(8, 2, 6))
    assert [stay[site.ids].nonzero()[:, 0].tolist() for site in sites] == [[2, 6], [2, 6]]
    assert int((~stay).sum()) == 12
    assert bool(units.channels(torch.ones(8, dtype=torch.bool)).all())


def test_a_choice_of_neurons_keeps_the_units_that_any_of_them_is_in(networks: ModuleType) -> None:
    sites, units = found(networks.Residual(), RGB)
    kept = units.kept({"conv_a": flags(8, 0, 1, 2), "conv_b": flags(8, 5)}, sites)
    assert kept.nonzero()[:, 0].tolist() == [0, 1, 2, 5]
    assert bool(units.kept({}, sites).all())
    assert bool(units.kept({"conv_a": flags(8, 3)}, sites).all())  # conv_b is kept whole
    pairs, grouped = found(networks.Grouped(), RGB)
    assert grouped.kept({"conv": flags(16, 9)}, pairs)[grouped.of[pairs.sites[0].ids]].nonzero()[:, 0].tolist() == [
        1,
        9,
    ]


def test_wrong_neurons_are_refused_by_name(networks: ModuleType) -> None:
    sites, units = found(networks.Residual(), RGB)
    with pytest.raises(SiteError, match="'conv_c'"):
        units.kept({"conv_c": flags(8, 0)}, sites)
    with pytest.raises(SiteError, match="no neuron of 'conv_a'"):
        units.kept({"conv_a": flags(8)}, sites)


def test_finding_units_changes_nothing_about_the_sites(networks: ModuleType) -> None:
    sites = find_sites(networks.Grouped(), RGB)
    before = sites.anatomy.classes.roots()
    first, again = find_units(sites), find_units(sites)
    assert torch.equal(sites.anatomy.classes.roots(), before)
    assert torch.equal(first.of, again.of)
    assert torch.equal(first.removable, again.removable)
