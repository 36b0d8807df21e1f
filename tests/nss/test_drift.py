"""Drift: five kinds, five strengths, the same every time."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nss.drift import ANGLES, FACTORS, KINDS, NOISES, STRENGTHS, shifted
from nss.errors import DataError

few = settings(max_examples=10, deadline=None)


@given(kind=st.sampled_from(sorted(KINDS)), strength=st.sampled_from(STRENGTHS), channels=st.sampled_from([1, 3]))
@few
def test_drift_is_seeded_keeps_type_and_shape_and_leaves_the_images_alone(
    networks: ModuleType, kind: str, strength: int, channels: int
) -> None:
    images = networks.pictures(9, (channels, 12, 10))
    before = images.clone()
    once = shifted(images, kind, strength, seed=3)
    assert torch.equal(images, before)
    assert once.dtype == torch.uint8
    assert once.shape == images.shape
    assert not torch.equal(once, images)
    assert torch.equal(once, shifted(images, kind, strength, seed=3))
    assert torch.equal(shifted(images[:4], kind, strength, seed=3), once[:4])


@pytest.mark.parametrize("kind", ["rotation", "noise"])
def test_another_seed_is_another_drift(networks: ModuleType, kind: str) -> None:
    images = networks.pictures(9)
    assert not torch.equal(shifted(images, kind, 3, seed=0), shifted(images, kind, 3, seed=1))


@pytest.mark.parametrize("kind", KINDS)
def test_each_strength_is_further_away_than_the_one_before(kind: str) -> None:
    ramp = torch.linspace(0, 255, 24).to(torch.uint8)
    images = torch.stack([ramp.expand(24, 24), ramp.flip(0).expand(24, 24).T])[:, None].repeat(8, 1, 1, 1)
    images[:, :, 8:12, 8:12] = 255

    def distance(strength: int) -> float:
        return float((shifted(images, kind, strength, 0).float() - images.float()).abs().mean())

    distances = [distance(strength) for strength in STRENGTHS]
    assert distances == sorted(distances)
    assert distances[0] > 0


def test_brightness_scales_pixels_and_contrast_their_distance_from_the_mean() -> None:
    images = torch.tensor([[0, 100, 200, 100]], dtype=torch.uint8).view(1, 1, 2, 2)
    for strength, factor in zip(STRENGTHS, FACTORS, strict=True):
        darker, faded = (shifted(images, kind, strength, 0).double() for kind in ("brightness", "contrast"))
        assert torch.allclose(darker, images.double() * factor, atol=1)
        assert torch.allclose(faded, 100 + (images.double() - 100) * factor, atol=1)


def test_noise_has_the_standard_deviation_of_its_strength() -> None:
    grey = torch.full((20, 1, 32, 32), 128, dtype=torch.uint8)
    for strength, deviation in list(zip(STRENGTHS, NOISES, strict=True))[:2]:
        noisy = shifted(grey, "noise", strength, 0).double() / 255
        assert float(noisy.std()) == pytest.approx(deviation, rel=0.03)
        assert not torch.equal(noisy[0], noisy[1])


def test_rotation_turns_to_both_sides_by_its_angle() -> None:
    images = torch.zeros(12, 1, 41, 41, dtype=torch.uint8)
    images[:, :, 20, 21:40] = 255  # from the centre to the right
    found = {round(angle_of(image[0])) for image in shifted(images, "rotation", 4, 0)}
    assert len(found) == 2
    assert {abs(angle) for angle in found} == {round(ANGLES[3])}


def angle_of(image: Tensor) -> float:
    """Degrees, to the left, of the bright line that starts in the centre."""
    rows, columns = torch.meshgrid(torch.arange(41.0) - 20, torch.arange(41.0) - 20, indexing="ij")
    weights = image.double()
    return float(torch.rad2deg(torch.atan2(-(weights * rows).sum(), (weights * columns).sum())))


def test_no_images_stay_no_images() -> None:
    assert shifted(torch.zeros(0, 1, 8, 8, dtype=torch.uint8), "blur", 1, 0).shape == (0, 1, 8, 8)


@pytest.mark.parametrize(
    ("images", "kind", "strength", "message"),
    [
        (torch.zeros(1, 1, 8, 8, dtype=torch.uint8), "fog", 1, "'fog'"),
        (torch.zeros(1, 1, 8, 8, dtype=torch.uint8), "blur", 0, "strength of the drift is 0"),
        (torch.zeros(1, 1, 8, 8, dtype=torch.uint8), "blur", 6, "is 6"),
        (torch.zeros(1, 1, 8, 8), "blur", 1, "float32"),
        (torch.zeros(1, 2, 8, 8, dtype=torch.uint8), "contrast", 1, "\\[1, 2, 8, 8\\]"),
    ],
)
def test_what_cannot_be_shifted_is_refused(images: Tensor, kind: str, strength: int, message: str) -> None:
    with pytest.raises(DataError, match=message):
        shifted(images, kind, strength, 0)
