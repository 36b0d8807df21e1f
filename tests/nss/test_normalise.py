"""What a model is given: other pixels than it was made for are refused, never normalised twice or taken for 0..1."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from nss.base import train
from nss.errors import DataError
from nss.evaluate import evaluate
from nss.model import Classifier, ModelSpec, build_model
from nss.normalise import Normalise
from nss.profile import profile

LABELS = torch.arange(6) % 2
PIXELS = torch.randint(0, 256, (6, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def model() -> Classifier:
    return build_model("nss.zoo:lenet", ("a", "b"), (1, 8, 8), 0).eval()


WRONG = [
    (PIXELS.float() / 255 * 2 - 1, "the pixels are from -1 to 1"),
    (PIXELS.float(), "the pixels are from 0 to 255"),
    (PIXELS.long(), "the pixels are int64"),
    (PIXELS.to(torch.int32), "the pixels are int32"),
    (torch.full((6, 1, 8, 8), float("nan")), "the pixels are not all numbers"),
    (PIXELS[:, :, :6], r"the images are \[6, 1, 6, 8\]"),
    (PIXELS.repeat(1, 3, 1, 1), r"the images are \[6, 3, 8, 8\]"),
    (PIXELS[:, 0], r"the images are \[6, 8, 8\]"),
]


@pytest.mark.parametrize(("images", "message"), WRONG)
@pytest.mark.parametrize("verb", ["forward", "evaluate", "train", "profile"])
def test_other_pixels_than_a_model_takes_are_refused_by_every_verb(
    model: Classifier, images: Tensor, message: str, verb: str
) -> None:
    calls: dict[str, Callable[[], object]] = {
        "forward": lambda: model(images),
        "evaluate": lambda: evaluate(model, (images, LABELS)),
        "train": lambda: train(model, (images, LABELS), 1, 0),
        "profile": lambda: profile(model, (images, LABELS)),
    }
    with pytest.raises(DataError, match=message) as caught:
        calls[verb]()
    assert caught.value.allowed
    assert caught.value.fix


def test_normalisation_is_inside_and_bytes_and_shares_are_the_same_image() -> None:
    layer = Normalise((0.5, 0.25), (0.5, 0.125), (2, 1, 3))
    pixels = torch.tensor([0, 255, 51], dtype=torch.uint8).view(1, 1, 1, 3).expand(1, 2, 1, 3)
    expected = torch.tensor([[[-1.0, 1.0, -0.6]], [[-2.0, 6.0, -0.4]]])[None]
    torch.testing.assert_close(layer(pixels), expected)
    torch.testing.assert_close(layer(pixels.float() / 255), expected)


def test_bytes_and_floats_of_any_width_are_the_same_image(model: Classifier) -> None:
    with torch.no_grad():
        expected = model(PIXELS)
        torch.testing.assert_close(model(PIXELS.float() / 255), expected)
        torch.testing.assert_close(model(PIXELS.double() / 255), expected)


def test_resizing_may_overshoot_by_a_hundredth(model: Classifier) -> None:
    assert model(torch.full((1, 1, 8, 8), 1.01)).shape == (1, 2)
    with pytest.raises(DataError):
        model(torch.full((1, 1, 8, 8), 1.02))


def test_a_model_without_normalisation_takes_images_that_were_normalised_before() -> None:
    layer = Normalise((0.0,), (1.0,), (1, 8, 8))
    images = PIXELS.float() / 255 * 5 - 2
    assert torch.equal(layer(images), images)
    with pytest.raises(DataError, match="int64"):
        layer(PIXELS.long())


def test_whole_numbers_as_mean_and_deviation_are_the_same_as_floats() -> None:
    whole, floats = Normalise((0,), (1,), (1, 8, 8)), Normalise((0.0,), (1.0,), (1, 8, 8))
    images = PIXELS.float() / 255
    assert (whole.mean.dtype, whole.std.dtype) == (torch.float32, torch.float32)
    assert torch.equal(whole(images), images)
    assert torch.equal(whole(images.double()), images)
    assert torch.equal(whole(PIXELS), floats(PIXELS))
    assert Normalise((1, 2), (4, 2), (2, 1, 1))(torch.full((1, 2, 1, 1), 0.5)).flatten().tolist() == [-0.125, -0.75]


class Viewed(nn.Module):
    """Takes its maps for a vector in the order in which they lie, which channels last would change."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(1, 4, 3, padding=1), nn.Linear(4 * 64, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x).relu()
        logits: Tensor = self.head(x.view(x.size(0), -1))
        return logits


def test_a_network_that_views_its_maps_as_a_vector_is_a_classifier_like_any_other() -> None:
    network = Viewed()
    model = Classifier(network, ModelSpec("tiny:viewed", ("a", "b"), (1, 8, 8), (0.5,), (0.25,))).eval()
    with torch.no_grad():
        assert torch.equal(model(PIXELS), network((PIXELS / 255 - 0.5) / 0.25))
    assert model.normalise(PIXELS).is_contiguous()
    train(model, (PIXELS, LABELS), 1, 0)
    assert profile(model, (PIXELS, LABELS)).layers == {"conv": 4}


def test_other_networks_compute_with_channels_last(model: Classifier) -> None:
    rgb = build_model("nss.zoo:resnet20", ("a", "b"), (3, 8, 8), 0)
    maps = rgb.normalise(torch.zeros(2, 3, 8, 8, dtype=torch.uint8))
    assert maps.is_contiguous(memory_format=torch.channels_last)
    assert not maps.is_contiguous()
