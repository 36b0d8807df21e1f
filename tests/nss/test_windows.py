"""What a layer's window sees together: sums by lag against windows cut out one by one."""

from __future__ import annotations

import itertools
from pathlib import Path
from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from nss.errors import ProfileError
from nss.profile import Profile, profile
from nss.windows import chosen_by_content, correlations, lags_of, positions_of, window_moment

KERNELS = [((3, 3), 1, 1), ((1, 1), 1, 1), ((2, 3), 1, 1), ((3, 3), 2, 1), ((3, 3), 1, 2), ((5, 5), 1, 4)]


def cut_out(x: Tensor, layer: nn.Conv2d) -> Tensor:
    """Second moment of every window that touches the map, one after the other, and of a one where its centre does."""
    (height, width), (down, right), groups = layer.kernel_size, layer.dilation, layer.groups
    n, channels, rows, columns = x.shape
    moments = []
    for part in x.double().chunk(groups, 1):
        reach_y, reach_x = (height - 1) * down, (width - 1) * right
        total = torch.zeros(channels // groups * height * width + 1, channels // groups * height * width + 1).double()
        for image, top, left in itertools.product(range(n), range(-reach_y, rows), range(-reach_x, columns)):
            window = torch.zeros(channels // groups, height, width).double()
            for i, j in itertools.product(range(height), range(width)):
                y, at = top + i * down, left + j * right
                if 0 <= y < rows and 0 <= at < columns:
                    window[:, i, j] = part[image, :, y, at]
            centre = top + height // 2 * down, left + width // 2 * right
            inside = float(0 <= centre[0] < rows and 0 <= centre[1] < columns)
            z = torch.cat([window.flatten(), torch.tensor([inside]).double()])
            total += torch.outer(z, z)
        moments.append(total / (n * rows * columns))
    return torch.stack(moments)


@pytest.mark.parametrize(("kernel", "dilation", "groups"), KERNELS)
def test_moments_by_lag_are_those_of_all_windows_over_the_map(
    kernel: tuple[int, int], dilation: int, groups: int
) -> None:
    layer = nn.Conv2d(4, 4, kernel, dilation=dilation, groups=groups)
    x = torch.randn(2, 4, 4, 5, generator=torch.Generator().manual_seed(0))
    mean = correlations(x, layer, 4) / positions_of(x, layer, 4)
    moment = window_moment(mean, layer)
    centre_only = cut_out(x, layer)
    torch.testing.assert_close(moment, centre_only)
    assert float(torch.linalg.eigvalsh(moment).min()) > -1e-9


def test_of_two_opposite_lags_one_is_kept() -> None:
    assert lags_of(nn.Linear(4, 2)) == [(0,)]
    assert lags_of(nn.Conv1d(1, 1, 3, dilation=2)) == [(0,), (2,), (4,)]
    kept = lags_of(nn.Conv2d(1, 1, 3))
    assert len(kept) == 13
    assert kept[0] == (0, 0)
    assert {(-y, -x) for y, x in kept} & set(kept) == {(0, 0)}


@given(st.integers(1, 40), st.integers(1, 7), st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_the_choice_of_an_image_does_not_depend_on_those_beside_it(count: int, one_in: int, seed: int) -> None:
    images = torch.randint(0, 256, (count, 1, 3, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    together = chosen_by_content(images, one_in)
    assert together.tolist() == [bool(chosen_by_content(image[None], one_in)) for image in images]
    assert together.tolist() == [int(image.long().sum()) % one_in == 0 for image in images]


def test_one_float_image_in_so_many_is_chosen() -> None:
    images = torch.randn(4000, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    assert 300 < int(chosen_by_content(images, 10).sum()) < 500


def of(networks: ModuleType, images: Tensor, windows: int) -> Profile:
    model = networks.zoo_model("resnet20")
    return profile(model, (images, torch.arange(len(images)) % 4), ("avg",), windows=windows, batch_size=8)


def test_profiles_of_parts_merge_into_that_of_the_whole(networks: ModuleType) -> None:
    images = networks.pictures(30)
    whole = of(networks, images, 2)
    for at in (5, 16, 29):
        merged = of(networks, images[:at], 2).merge(of(networks, images[at:], 2))
        assert merged.window_positions == whole.window_positions
        for layer in whole.layers:
            torch.testing.assert_close(merged.window(layer), whole.window(layer), rtol=1e-9, atol=1e-9)


def test_they_are_stored_with_the_profile_and_only_when_asked_for(networks: ModuleType, tmp_path: Path) -> None:
    found = of(networks, networks.pictures(12), 1)
    found.save(tmp_path / "profile.safetensors")
    loaded = Profile.load(tmp_path / "profile.safetensors")
    assert loaded.window_positions == found.window_positions
    assert all(torch.equal(each, found.windows[name]) for name, each in loaded.windows.items())
    assert "stem.0" in loaded.windows  # the first layer, which has no Gram matrix
    bare = of(networks, networks.pictures(12), 0)
    assert not bare.windows
    with pytest.raises(ProfileError, match="profile with windows=1"):
        bare.window("conv")
    with pytest.raises(ProfileError, match="different metrics"):
        bare.merge(found)
    with pytest.raises(ProfileError, match="windows is -1"):
        of(networks, networks.pictures(4), -1)


class TwoSizes(nn.Module):
    """A head that reads two flattened maps, of 9 places and of one."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 1)
        self.other = nn.Conv2d(1, 3, 1)
        self.head = nn.Linear(21, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.cat([self.conv(x).flatten(1), self.other(x).mean((2, 3))], 1))


def test_behind_maps_of_several_sizes_each_input_counts_for_itself(networks: ModuleType) -> None:
    network, images = TwoSizes(), networks.floats(6, (1, 3, 3))
    data = (images, torch.arange(6) % 2)
    found = profile(network, data, ("avg",), classes=["a", "b"], input_shape=(1, 3, 3), windows=1)
    with torch.no_grad():
        read = torch.cat([network.conv(images).flatten(1), network.other(images).mean((2, 3))], 1).double()
    torch.testing.assert_close(found.gram("head"), read.T @ read / 6)
    torch.testing.assert_close(found.window("head")[0, 0, :-1, :-1], read.T @ read / 6)
