"""RQ3's baselines do what they are called after: CKA, DeepArc's modules, and what is trained."""

from __future__ import annotations

import copy
import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.readapt_peers import linear_cka, modularize, runs, stages, train_peer, trained_layers
from nss.critical import critical_neurons
from nss.data import Batch, Dataset
from nss.model import Classifier, ModelSpec, model_digest
from nss.predict import accuracy
from nss.profile import profile
from nss.readapt import readapt
from nss.samples import Samples
from nss.slice import semantic_slices

SHAPE = (1, 6, 6)


class Skip(nn.Module):
    """A stem, a block with a convolution on its path around, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.conv1, self.norm1 = nn.Conv2d(4, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.conv2, self.norm2 = nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.around, self.norm3 = nn.Conv2d(4, 6, 1), nn.BatchNorm2d(6)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        inner = F.relu(self.norm1(self.conv1(x)))
        x = F.relu(self.norm2(self.conv2(inner)) + self.norm3(self.around(x)))
        return self.head(x.mean((2, 3)))


def classifier(network: nn.Module) -> Classifier:
    return Classifier(network, ModelSpec("tiny:network", ("a", "b", "c"), SHAPE, (0.5,), (0.25,))).eval()


@pytest.fixture
def model() -> Classifier:
    torch.manual_seed(0)
    network = Skip()
    for norm in (network.norm, network.norm1, network.norm2, network.norm3):
        nn.init.normal_(norm.running_mean, 0.0, 0.1)
    return classifier(network)


def samples(count: int, seed: int = 0) -> Samples:
    """Three classes of different light."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 3
    noise = torch.randint(0, 100, (count, *SHAPE), generator=generator)
    return Samples((noise + 60 * labels.view(-1, 1, 1, 1)).byte(), labels)


# Linear CKA.


def table(rows: int, columns: int, seed: int) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def cka_by_the_formula(x: Tensor, y: Tensor) -> float:
    """|Y'X|^2 / (|X'X| |Y'Y|) over centred columns, written out in sums."""
    x, y = (each - each.mean(0, keepdim=True) for each in (x, y))

    def square(a: Tensor, b: Tensor) -> float:
        return sum(float((a[:, i] * b[:, j]).sum()) ** 2 for i in range(a.shape[1]) for j in range(b.shape[1]))

    return square(x, y) / math.sqrt(square(x, x) * square(y, y))


def test_linear_cka_is_the_formula_over_features() -> None:
    x, y = table(7, 3, 0), table(7, 5, 1)
    assert linear_cka(x, y) == pytest.approx(cka_by_the_formula(x, y), rel=1e-10)
    assert 0.05 < linear_cka(x, y) < 0.95


def test_linear_cka_of_single_features_is_their_squared_correlation() -> None:
    x, y = torch.tensor([[1.0], [2.0], [3.0]]), torch.tensor([[1.0], [3.0], [2.0]])
    assert linear_cka(x, y) == pytest.approx(0.25)
    assert linear_cka(x, torch.tensor([[1.0], [-2.0], [1.0]])) == pytest.approx(0.0)


def test_linear_cka_is_blind_to_rotation_scale_and_offset_but_not_to_other_linear_maps() -> None:
    x, y = table(9, 4, 0), table(9, 4, 1)
    rotation = torch.linalg.qr(table(4, 4, 2)).Q
    assert linear_cka(x @ rotation * 3 + 5, y) == pytest.approx(linear_cka(x, y), rel=1e-10)
    assert linear_cka(x, x @ rotation) == pytest.approx(1.0)
    assert linear_cka(x, x * torch.tensor([1.0, 1.0, 1.0, 30.0])) < 0.9


def test_linear_cka_of_what_is_the_same_for_all_images_is_zero() -> None:
    assert linear_cka(torch.ones(5, 3), table(5, 2, 0)) == 0.0


# DeepArc.


@pytest.mark.parametrize(
    ("similarity", "expected"),
    [
        ([], [[0]]),
        ([0.995], [[0, 1]]),
        ([0.99], [[0], [1]]),
        ([0.995, 0.5, 0.999, 0.992], [[0, 1], [2, 3, 4]]),
        ([0.1, 0.2], [[0], [1], [2]]),
    ],
)
def test_a_module_runs_while_neighbours_are_more_alike_than_the_threshold(
    similarity: list[float], expected: list[list[int]]
) -> None:
    assert [list(each) for each in runs(similarity, 0.99)] == expected


def test_a_stage_is_what_reads_one_tensor_and_hands_on_what_the_next_reads(model: Classifier) -> None:
    images, network = samples(8).images, model.network
    found, handed = stages(model, images)
    assert [each.layers for each in found] == [["stem"], ["conv1", "around"], ["conv2"], ["head"]]
    assert [each.norms for each in found] == [["norm"], ["norm1", "norm3"], ["norm2"], []]
    with torch.no_grad():
        stem = F.relu(network.norm(network.stem((images / 255 - 0.5) / 0.25)))
        inner = F.relu(network.norm1(network.conv1(stem)))
    torch.testing.assert_close(handed[0], stem.flatten(1))
    torch.testing.assert_close(handed[1], inner.flatten(1))
    torch.testing.assert_close(handed[3], model(images).detach())
    assert not any(module._forward_hooks for module in model.modules())


def chain(*scales: float) -> Classifier:
    """Convolutions of one channel, each times a number, and a head."""
    torch.manual_seed(1)
    layers = [nn.Conv2d(1, 1, 1, bias=False) for _ in scales]
    for layer, scale in zip(layers, scales, strict=True):
        nn.init.constant_(layer.weight, scale)
    return classifier(nn.Sequential(*layers, nn.Flatten(), nn.Linear(36, 3)))


def test_deeparc_trains_the_first_layers_of_its_modules() -> None:
    torch.manual_seed(0)
    images = torch.randint(0, 256, (20, *SHAPE), dtype=torch.uint8)
    found = modularize(chain(1.0, 2.0, -3.0), images)
    assert (found.threshold, found.modules, found.interface) == (0.99, (("0", "1", "2"), ("4",)), ("0", "4"))


def test_deeparc_lowers_its_threshold_until_half_of_the_layers_have_a_neighbour(model: Classifier) -> None:
    images = samples(30).images
    _, handed = stages(model, images)
    similarity = [linear_cka(one, other) for one, other in itertools.pairwise(handed)]
    assert sorted(similarity)[-2] < 0.99
    found = modularize(model, images)
    assert len(found.modules) <= 2
    assert len(runs(similarity, found.threshold + 0.01)) > 2
    assert sorted(similarity)[-2] > found.threshold >= sorted(similarity)[-2] - 0.011


# Training.


def test_each_peer_trains_what_it_is_called_after(model: Classifier) -> None:
    images = samples(8).images
    norms = {"norm", "norm1", "norm2", "norm3"}
    layers = {"stem", "conv1", "conv2", "around", "head"}
    assert set(trained_layers(model, "full", images)) == norms | layers
    assert set(trained_layers(model, "batchnorm", images)) == norms
    assert set(trained_layers(model, "last", images)) == {"conv2", "norm2", "head"}
    assert set(trained_layers(model, "deeparc", images)) == set(modularize(model, images).interface)


def trained(model: Classifier, layers: tuple[str, ...], rate: float = 0.02, **changed: Any) -> Any:
    settings = {"epochs": 3, "batch_size": 8, "seed": 5, "statistics": False, **changed}
    return train_peer(model, layers, samples(28), samples(12, seed=1), samples(15, seed=2), rate, **settings)


def moved(before: nn.Module, after: nn.Module) -> set[str]:
    other = dict(after.state_dict())
    return {name for name, value in before.state_dict().items() if not torch.equal(value, other[name])}


def test_only_what_is_named_moves_and_the_model_stays_as_it_is(model: Classifier) -> None:
    before = model_digest(model)
    found = trained(model, ("conv1", "norm1"), rate=0.1)
    last = found.at(3)
    assert model_digest(model) == before
    assert moved(model.network, last.network) == {f"conv1.{each}" for each in ("weight", "bias")} | {
        f"norm1.{each}" for each in ("weight", "bias")
    }
    assert found.trained_share == (6 * 4 * 9 + 6 + 12) / sum(each.numel() for each in model.parameters())
    assert not last.training
    assert model_digest(found.at(0)) == before


def test_statistics_move_where_they_may_and_in_no_other_layer(model: Classifier) -> None:
    after = moved(model.network, trained(model, ("norm1",), statistics=True).at(3).network)
    assert {"norm1.running_mean", "norm1.running_var"} < after
    assert {name.partition(".")[0] for name in after} == {"norm1"}


def test_peers_train_as_readapt_does(model: Classifier) -> None:
    """Written out: Adam, one cycle, statistics fixed; an epoch has ten steps or more, so of few images several orders,
    the rest of each left out.
    """
    new, held_out, old = samples(28), samples(12, seed=1), samples(15, seed=2)
    twin = copy.deepcopy(model)
    optimizer = torch.optim.Adam(twin.parameters(), 0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.02, total_steps=36, cycle_momentum=False)
    generator, reached, kept, states = torch.Generator().manual_seed(5), [], [], []
    for epoch in range(4):
        for _ in range(4 if epoch else 0):
            order = torch.randperm(28, generator=generator)
            for start in (0, 8, 16):
                rows = order[start : start + 8]
                optimizer.zero_grad()
                F.cross_entropy(twin(new.images[rows]), new.labels[rows]).backward()
                optimizer.step()
                schedule.step()
        reached.append(accuracy(twin, (held_out.images, held_out.labels)))
        kept.append(accuracy(twin, (old.images, old.labels)))
        states.append(copy.deepcopy(twin.state_dict()))
    found = trained(model, trained_layers(model, "full", new.images))
    assert (found.steps, found.trained_share, len(found.seconds)) == (36, 1.0, 4)
    assert (list(found.curve), list(found.old_curve)) == (reached, kept)
    for epoch, state in enumerate(states):
        for name, value in found.at(epoch).state_dict().items():
            torch.testing.assert_close(value, state[name])


def test_an_epoch_has_as_many_steps_as_one_of_readapt(model: Classifier) -> None:
    new, held_out = samples(28), samples(12, seed=1)
    known = profile(model, (new.images, new.labels), ("taylor",), classes=model.spec.classes, windows=1)
    slices = semantic_slices(critical_neurons(known, "taylor", "cumulative", 0.95), known)
    split = torch.cat([torch.zeros(28), torch.ones(12)]).byte()
    images, labels = torch.cat([new.images, held_out.images]), torch.cat([new.labels, held_out.labels])
    data = Dataset(model.spec.classes, model.spec.input_shape, (Batch("0" * 32, images, labels, split),))
    settings = {"epochs": 3, "batch_size": 8, "seed": 5}
    ours = readapt(model, slices, data, profile=known, patience=3, **settings)
    assert ours.report.steps == trained(model, ("conv1",)).steps == 36
