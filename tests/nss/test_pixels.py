"""Bytes and floats that come together are on one scale, whatever reads them."""

from __future__ import annotations

import pytest
import torch

from nss.data import iter_batches
from nss.pixels import as_floats, joined_images
from nss.samples import whole


@pytest.mark.parametrize("first", [0, 1])
def test_a_loader_that_gives_bytes_and_floats_gives_them_on_one_scale(first: int) -> None:
    pieces = [
        (torch.tensor([0, 51, 255], dtype=torch.uint8)[:, None, None, None], torch.tensor([0, 1, 2])),
        (torch.tensor([0.25, 1.0])[:, None, None, None], torch.tensor([3, 4])),
    ]
    expected = [[0, 0.2, 1], [0.25, 1]]
    ((images, _),) = iter_batches([pieces[first], pieces[1 - first]], 5)
    assert images.flatten().tolist() == pytest.approx([*expected[first], *expected[1 - first]], abs=1e-7)


def test_a_loader_of_bytes_and_then_floats_is_read_whole_on_one_scale() -> None:
    # As many as a batch that is read holds: none is of both kinds.
    loader = [
        (torch.full((1024, 1, 1, 1), 51, dtype=torch.uint8), torch.zeros(1024, dtype=torch.int64)),
        (torch.full((2, 1, 1, 1), 0.5), torch.ones(2, dtype=torch.int64)),
    ]
    found = whole(loader).images.flatten().tolist()
    assert found == pytest.approx([0.2] * 1024 + [0.5] * 2, abs=1e-7)


def test_other_whole_numbers_are_joined_as_they_are_and_left_to_whoever_refuses_them() -> None:
    parts = [torch.tensor([200], dtype=torch.uint8), torch.tensor([200], dtype=torch.int32)]
    assert torch.equal(joined_images(parts), torch.tensor([200, 200], dtype=torch.int32))


def test_images_of_one_kind_stay_as_they_are() -> None:
    parts = [torch.tensor([7, 255], dtype=torch.uint8), torch.tensor([0], dtype=torch.uint8)]
    assert torch.equal(joined_images(parts), torch.tensor([7, 255, 0], dtype=torch.uint8))
    floats = torch.tensor([0.5, 2.0], dtype=torch.float64)
    assert torch.equal(joined_images([floats, floats]), floats.repeat(2))
    assert as_floats(floats) is floats
