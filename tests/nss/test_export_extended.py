"""An extended model is exported as any other: both formats answer what it answers, old classes and new ones."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from nss.base import train
from nss.critical import critical_neurons
from nss.data import Dataset, load_data
from nss.errors import ExportError
from nss.export import check_export, export_onnx, export_program, load_export
from nss.extend import extend
from nss.ingest import demo
from nss.model import Classifier, ModelSpec, build_model
from nss.profile import profile
from nss.slice import semantic_slices

FORMATS = {".onnx": export_onnx, ".pt2": export_program}


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    folder = tmp_path_factory.mktemp("digits") / "data"
    demo(folder)
    return load_data(folder)


def part(data: Dataset, split: str, first: int, last: int) -> tuple[Tensor, Tensor]:
    own = data.split(split)
    rows = (own.labels >= first) & (own.labels < last)
    return own.images[rows], own.labels[rows]


@pytest.fixture(scope="module", params=["vgg_small", "resnet20"])
def extended(request: pytest.FixtureRequest, digits: Dataset) -> Classifier:
    """Five classes, then three, then two; the odds of features are in the hundreds."""
    old = part(digits, "train", 0, 5)
    model = build_model(f"nss.zoo:{request.param}", digits.classes[:5], digits.image_shape, 0)
    train(model, old, 2, 0)
    found = profile(model, old, ("taylor",))
    slices = semantic_slices(critical_neurons(found, "taylor", "cumulative", 0.9), found)
    for first, last in ((5, 8), (8, 10)):
        new, names = part(digits, "train", first, last), digits.classes[first:last]
        model = extend(model, slices, new, old_data=old, profile=found, classes=names, epochs=2).model
    return model.eval()


@pytest.mark.parametrize("suffix", FORMATS)
def test_both_formats_answer_what_the_model_answers(
    extended: Classifier, digits: Dataset, suffix: str, tmp_path: Path
) -> None:
    images = digits.split("test").images[:256]
    path = tmp_path / f"model{suffix}"
    FORMATS[suffix](extended, path, images)
    with torch.no_grad():
        wanted = extended(images)
    answers = load_export(path)(images)
    assert answers.shape == (256, 10)
    assert torch.equal(answers.argmax(1), wanted.argmax(1))
    # The old logits are those of a plain network, with no odds in them.
    assert float((answers[:, :5] - wanted[:, :5]).abs().max()) <= 1e-4
    assert float((answers - wanted).abs().max()) <= 2e-6 * max(50.0, float(wanted.abs().max()))


class Large(nn.Module):
    """Two logits of a given size."""

    def __init__(self, size: float) -> None:
        super().__init__()
        self.head = nn.Linear(4, 2)
        nn.init.constant_(self.head.weight, 0)
        nn.init.constant_(self.head.bias, size)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x.flatten(1))


@pytest.mark.parametrize(
    ("size", "off", "fits"), [(10, 9e-5, True), (10, 2e-4, False), (500, 9e-4, True), (500, 2e-3, False)]
)
def test_of_large_logits_as_much_more_may_differ(size: float, off: float, fits: bool, tmp_path: Path) -> None:
    spec = ModelSpec("tiny:network", ("a", "b"), (1, 2, 2), (0.0,), (1.0,))
    model, other = (Classifier(Large(value), spec).eval() for value in (size, size + off))
    images = torch.zeros(3, 1, 2, 2, dtype=torch.uint8)
    export_program(other, tmp_path / "model.pt2")
    if fits:
        assert check_export(model, tmp_path / "model.pt2", images, (1,))[1] == pytest.approx(off, rel=0.1)
    else:
        with pytest.raises(ExportError, match="the export answers differently"):
            check_export(model, tmp_path / "model.pt2", images, (1,))
