"""A step of extend takes no more memory than a naive one: of old columns nothing is kept but what the new one reads."""

from __future__ import annotations

import copy
from dataclasses import replace
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bench.memory import peak_megabytes
from nss.critical import critical_neurons
from nss.grow import add_column, condense
from nss.model import Classifier, build_model
from nss.profile import profile
from nss.slice import semantic_slices
from nss.wiring import Columns, last_column

SHAPE = (1, 28, 28)
BATCH = 32


def condensed(factory: str) -> Classifier:
    torch.manual_seed(0)
    images, labels = torch.randint(0, 255, (40, *SHAPE), dtype=torch.uint8), torch.arange(40) % 2
    model = build_model(factory, ("a", "b"), SHAPE, 0)
    found = profile(model, (images, labels), ("taylor",))
    slices = semantic_slices(critical_neurons(found, "taylor", "cumulative", 0.9), found)
    return condense(model, slices, (images, labels), profile=found)


def step_of(model: nn.Module, trained: nn.Module) -> float:
    """Megabytes at most of a model and a step on the part of it that is trained."""
    optimizer = torch.optim.SGD(trained.parameters(), 0.01, momentum=0.9)
    images, labels = torch.rand(BATCH, *SHAPE), torch.arange(BATCH) % 2

    def step() -> None:
        F.cross_entropy(model(images)[:, -2:], labels).backward()
        optimizer.step()

    return peak_megabytes(model, step)


@pytest.mark.parametrize("name", ["vgg_small", "resnet20", "mobilenet_small"])
def test_a_step_takes_no_more_memory_than_a_naive_one(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nss.routing.FEATURES", 100)
    factory = f"nss.zoo:{name}"
    naive = build_model(factory, ("a", "b", "c", "d"), SHAPE, 0).train().requires_grad_()
    most = step_of(naive, naive)
    longer = condensed(factory)
    for classes in (("c", "d"), ("e", "f")):
        longer = add_column(longer, classes, 0.3, 0)
        network = longer.network
        assert isinstance(network, Columns)
        with last_column(network) as column:
            assert step_of(longer, column) <= 1.15 * most


def test_answers_do_not_depend_on_what_is_forgotten_meanwhile(networks: ModuleType) -> None:
    model = add_column(condensed("nss.zoo:resnet20"), ("c", "d"), 0.3, 0).eval()
    keeping = copy.deepcopy(model)
    assert isinstance(keeping.network, Columns)
    keeping.network._steps = tuple(replace(step, last=()) for step in keeping.network._steps)
    images = networks.pictures(5, SHAPE)
    with torch.no_grad():
        assert torch.equal(model(images), keeping(images))
