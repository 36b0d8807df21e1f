"""Where and in which precision a profile is computed changes how long it takes, not what it says."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch

from nss.errors import ModelError
from nss.model import build_model, fastest_device, on_device
from nss.profile import METRICS, profile


def test_bfloat16_scores_are_close_to_those_of_single_precision() -> None:
    """On images that differ as images do: of nearly equal ones, bfloat16 cannot tell the variance."""
    model = build_model("nss.zoo:vgg_small", list("abcd"), (1, 16, 16), seed=0).eval()
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (32, 1, 16, 16), generator=generator, dtype=torch.uint8)
    labels = torch.arange(32) % 4
    exact, rough = (profile(model, (images, labels), METRICS, batch_size=32, bf16=half) for half in (False, True))
    for metric in METRICS:
        scores = exact.scores(metric)
        for layer, rows in rough.scores(metric).items():
            assert rows.dtype == torch.float64
            assert float((rows - scores[layer]).abs().sum(1).max()) < 0.1, (metric, layer)
    differing = [layer for layer, rows in rough.sums["abs"].items() if not torch.equal(rows, exact.sums["abs"][layer])]
    assert differing, "nothing was computed in bfloat16"


def test_auto_takes_the_fastest_device_there_is_and_leaves_the_model_where_it_is(networks: ModuleType) -> None:
    model = networks.zoo_model("lenet", seed=5)
    images, labels = networks.pictures(8, seed=5), torch.arange(8) % 4
    profile(model, (images, labels), ["avg"], device="auto")
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}
    assert on_device(model, None) is model
    assert (on_device(model, "auto") is model) == (fastest_device().type == "cpu")


def test_a_device_that_is_not_there_is_refused_with_those_that_are(networks: ModuleType) -> None:
    missing = "cuda:63" if torch.cuda.is_available() else "cuda"
    model = networks.zoo_model("lenet", seed=5)
    with pytest.raises(ModelError, match=r"cannot go to[\s\S]*auto, cpu or"):
        on_device(model, missing)
