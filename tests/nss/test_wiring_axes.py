"""Columns whose channels lie on the last axis, and columns whose depthwise layer is cut to a single channel."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import nss
from nss.grow import add_column, condense
from nss.routing import Router, choose_views
from nss.wiring import Columns, read_earlier

SHAPE = (1, 8, 8)


class Mixer(nn.Module):
    """Patches as tokens, a hidden layer over each of them, added to what they were."""

    def __init__(self, num_classes: int, width: int = 8) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, 4, 4)
        self.wide = nn.Linear(width, 2 * width)
        self.narrow = nn.Linear(2 * width, width)
        self.head = nn.Linear(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        return self.head((x + self.narrow(F.gelu(self.wide(x)))).mean(1))


class Filtered(nn.Module):
    """A depthwise layer, `times` outputs for each channel, between two others."""

    def __init__(self, num_classes: int, times: int = 2, width: int = 4) -> None:
        super().__init__()
        self.wide = nn.Conv2d(1, width, 3, padding=1)
        self.filter = nn.Conv2d(width, times * width, 3, padding=1, groups=width)
        self.narrow = nn.Conv2d(times * width, width, 1)
        self.head = nn.Linear(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.filter(F.relu(self.wide(x))))
        return self.head(F.relu(self.narrow(x)).mean((2, 3)))


def joined(columns: list[nn.Module], classes: list[int]) -> Columns:
    views, features = choose_views(columns[0], SHAPE)
    return Columns(columns, SHAPE, Router(views, features, classes)).eval()


def test_a_later_column_reads_the_tokens_of_an_earlier_one_channel_by_channel(networks: ModuleType) -> None:
    torch.manual_seed(0)
    old, new = Mixer(3).eval(), Mixer(2, width=5)
    read_earlier(new, [old], SHAPE)
    new.eval()
    images = networks.floats(4, SHAPE)

    def patches(column: Mixer) -> Tensor:
        return column.patches(images).flatten(2).transpose(1, 2)

    with torch.no_grad():
        logits, _ = joined([old, new], [3, 2]).parts(images)
        hidden = F.gelu(old.wide(patches(old))), F.gelu(new.wide(torch.cat([patches(old), patches(new)], -1)))
        own = patches(old) + old.narrow(hidden[0]), patches(new) + new.narrow(torch.cat(hidden, -1))
        expected = new.head(torch.cat([each.mean(1) for each in own], 1))
        assert torch.equal(logits[0], old(images))
    assert new.wide.weight.shape == (10, 13)
    assert torch.allclose(logits[1], expected, atol=1e-6)


def cut_to_one(times: int, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    keep = torch.arange(4) == 1
    return nss.remove(Filtered(2, times), {"wide": keep, "filter": torch.repeat_interleave(keep, times)}, SHAPE)


@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("which", ["first", "second", "both"])
def test_a_depthwise_layer_that_is_cut_to_one_channel_reads_its_own_column_alone(
    networks: ModuleType, times: int, which: str
) -> None:
    torch.manual_seed(0)
    old = (Filtered(3, times) if which == "second" else cut_to_one(times, 1)).eval()
    new = Filtered(2, times) if which == "first" else cut_to_one(times, 2)
    read_earlier(new, [old], SHAPE)
    new.eval()
    images = networks.floats(4, SHAPE)
    with torch.no_grad():
        logits, _ = joined([old, new], [old.head.out_features, 2]).parts(images)
        filtered = [F.relu(column.filter(F.relu(column.wide(images)))) for column in (old, new)]
        narrow = F.relu(old.narrow(filtered[0])), F.relu(new.narrow(torch.cat(filtered, 1)))
        expected = new.head(torch.cat([each.mean((2, 3)) for each in narrow], 1))
        assert torch.equal(logits[0], old(images))
    assert new.filter.weight.shape == (times * new.wide.out_channels, 1, 3, 3)
    assert torch.allclose(logits[1], expected, atol=1e-6)


@pytest.mark.parametrize("network", ["Mixer", "Filtered"])
def test_such_a_model_is_extended_saved_and_loaded_with_equal_logits(
    networks: ModuleType, tmp_path: Path, network: str
) -> None:
    data = networks.coloured_data(24)
    model = nss.build_model(f"{__name__}:{network}", data.classes, SHAPE, 0, allow=[__name__])
    found = nss.profile(model, data)
    slices = nss.semantic_slices(nss.critical_neurons(found), found)
    ready = condense(model, slices, data, profile=found, share=0.3)
    grown = add_column(ready, ["new"], 0.25, 0)
    images = networks.pictures(4, SHAPE)
    nss.save_model(grown, tmp_path / "m")
    loaded = nss.load_model(tmp_path / "m", allow=[__name__])
    with torch.no_grad():
        assert torch.equal(grown(images)[:, :2], ready(images))
        assert torch.equal(loaded(images), grown(images))
    if network == "Filtered":
        assert [column.filter.in_channels for column in grown.network.columns] == [1, 1]
