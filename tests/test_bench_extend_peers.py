"""RQ4's baselines do what they are called after: what they train, on which images, and the losses of their papers."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.extend_peers import (
    DEEPARC,
    EWC,
    JOINT,
    LWF,
    NAIVE,
    PEERS,
    REPLAY,
    TEMPERATURE,
    WEIGHT_DECAY,
    Anchor,
    Budget,
    Setting,
    fisher_diagonal,
    grown,
    learn,
    loss_of,
    lwf_loss,
    new_per_batch,
    rounds,
    train_peer,
    trained_layers,
)
from bench.readapt_peers import modularize
from nss.model import Classifier, ModelSpec, build_model, model_digest
from nss.samples import Samples
from nss.steps import sgd

SHAPE = (1, 6, 6)


def classifier(network: nn.Module, shape: tuple[int, int, int] = SHAPE) -> Classifier:
    return Classifier(network, ModelSpec("tiny:network", ("a", "b", "c"), shape, (0.5,), (0.25,))).eval()


@pytest.fixture
def model() -> Classifier:
    torch.manual_seed(0)
    body = [nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 8, 3, 2), nn.BatchNorm2d(8)]
    return classifier(nn.Sequential(*body, nn.ReLU(), nn.Flatten(), nn.Linear(32, 3)))


def samples(count: int, seed: int = 0, first: int = 0, classes: int = 3) -> Samples:
    """Classes of different light, from `first` on."""
    generator = torch.Generator().manual_seed(seed)
    labels = first + torch.arange(count) % classes
    noise = torch.randint(0, 60, (count, *SHAPE), generator=generator)
    return Samples((noise + 35 * labels.view(-1, 1, 1, 1)).byte(), labels)


OLD, NEW = samples(40), samples(36, seed=1, first=3, classes=2)
BUDGET = Budget(2, 8, 3)


# The head.


def test_a_grown_head_answers_for_the_old_classes_as_before(model: Classifier) -> None:
    wider = grown(model, ("0", "d"), seed=5)
    assert wider.spec.classes == ("a", "b", "c", "0", "d")
    before, after = model(OLD.images), wider(OLD.images)
    torch.testing.assert_close(after[:, :3], before)
    assert after.shape == (40, 5)
    assert len(after[0, 3:].unique()) == 2
    assert model(OLD.images).shape == (40, 3)


def test_the_seed_decides_the_new_outputs(model: Classifier) -> None:
    one, same, other = (grown(model, ("d",), seed).network[-1].weight for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert torch.equal(one[:3], other[:3])
    assert not torch.equal(one[3], other[3])


# Batches.


def test_without_old_images_each_new_one_comes_once_an_epoch() -> None:
    found = list(rounds(20, 0, 8, torch.Generator().manual_seed(0)))
    assert [(len(new), len(old)) for new, old in found] == [(8, 0), (8, 0)]
    assert len(torch.cat([new for new, _ in found]).unique()) == 16


def test_half_of_each_batch_is_old_and_all_old_images_come_as_often() -> None:
    found = list(rounds(20, 5, 8, torch.Generator().manual_seed(0)))
    assert [(len(new), len(old)) for new, old in found] == [(4, 4)] * 5
    assert torch.cat([new for new, _ in found]).sort().values.tolist() == list(range(20))
    assert torch.bincount(torch.cat([old for _, old in found])).tolist() == [4] * 5


def test_of_more_old_images_than_new_ones_another_part_comes_each_epoch() -> None:
    generator = torch.Generator().manual_seed(0)
    one, other = (torch.cat([old for _, old in rounds(8, 50, 4, generator)]) for _ in range(2))
    assert len(one.unique()) == len(other.unique()) == 8
    assert set(one.tolist()) != set(other.tolist())


@pytest.mark.parametrize(("new", "old", "size", "expected"), [(9, 0, 8, 8), (9, 1, 8, 4), (3, 1, 8, 3), (5, 1, 1, 1)])
def test_the_new_images_of_a_batch(new: int, old: int, size: int, expected: int) -> None:
    assert new_per_batch(new, old, size) == expected


# EWC.


def softmax_net(weight: Tensor) -> nn.Module:
    layer = nn.Linear(2, 2, bias=False)
    layer.weight.data = weight
    return nn.Sequential(layer)


def test_the_fisher_diagonal_of_a_softmax_by_hand() -> None:
    """Of a linear softmax d log p_y / d w_kj = (1[y=k] - p_k) x_j, so E = p_k (1 - p_k) x_j^2."""
    weight = torch.tensor([[1.0, 0.0], [0.0, -1.0]])
    images = torch.tensor([[1.0, 2.0], [0.5, -3.0]])
    expected = torch.zeros(2, 2)
    for x in images.tolist():
        odds = 1 / (1 + math.exp(-x[0] - x[1]))
        expected += torch.tensor([[odds * (1 - odds) * each**2 for each in x]] * 2) / 2
    (found,) = fisher_diagonal(softmax_net(weight), images).values()
    torch.testing.assert_close(found, expected)


def test_the_fisher_diagonal_is_of_single_images_with_norms_fixed(model: Classifier) -> None:
    model.train()
    found = fisher_diagonal(model, OLD.images[:3])
    assert model.training
    model.eval()
    expected = torch.zeros(6)
    for image in OLD.images[:3]:
        for label in range(3):
            model.zero_grad()
            logits = model(image[None])
            loss = F.cross_entropy(logits, torch.tensor([label]))
            loss.backward()
            bias = model.network[0].bias.grad
            expected += float(logits.detach().softmax(1)[0, label]) * bias.detach() ** 2 / 3
    torch.testing.assert_close(found["network.0.bias"], expected)


def test_the_penalty_is_half_the_weighed_square_of_the_change_and_new_outputs_are_free() -> None:
    old = softmax_net(torch.tensor([[1.0, 0.0], [0.0, -1.0]]))
    anchor = Anchor(old, torch.tensor([[1.0, 2.0]]))
    fisher = anchor.fisher["0.weight"]
    new = softmax_net(torch.tensor([[1.5, 0.0], [2.0, -1.0], [7.0, 7.0]]))
    expected = (float(fisher[0, 0]) * 0.5**2 + float(fisher[1, 0]) * 2.0**2) / 2
    assert float(anchor.penalty(new).detach()) == pytest.approx(expected, rel=1e-5)
    assert expected > 0
    assert float(anchor.penalty(old).detach()) == 0.0


def test_ewc_minimises_the_cross_entropy_of_the_new_classes_and_the_penalty(model: Classifier) -> None:
    network = grown(model, ("d", "e"), 0)
    with torch.no_grad():
        network.network[0].weight += 0.1
    found = loss_of(EWC, model, OLD, 3.0)(network, NEW.images, NEW.labels)
    penalty = Anchor(model, OLD.images).penalty(network)
    expected = F.cross_entropy(network(NEW.images)[:, 3:], NEW.labels - 3) + 3.0 * penalty
    torch.testing.assert_close(found, expected)
    assert float(penalty.detach()) > 0


# LwF.


def test_the_loss_of_lwf_is_that_of_its_paper() -> None:
    """Written out: -log p(new), and minus the sum over old classes of y'^ log y', both y^(1/T) made to sum to 1."""
    logits, before = torch.tensor([[0.5, -1.0, 2.0, 0.0]]), torch.tensor([[1.0, 3.0]])

    def softened(scores: list[float]) -> list[float]:
        plain = [math.exp(each) / sum(map(math.exp, scores)) for each in scores]
        powers = [each ** (1 / TEMPERATURE) for each in plain]
        return [each / sum(powers) for each in powers]

    remembered = -sum(y * math.log(z) for y, z in zip(softened([1.0, 3.0]), softened([0.5, -1.0]), strict=True))
    new = -math.log(math.exp(0.0) / (math.exp(2.0) + math.exp(0.0)))
    assert float(lwf_loss(logits, torch.tensor([3]), before, 1.5)) == pytest.approx(new + 1.5 * remembered, rel=1e-5)


def test_lwf_remembers_what_the_model_answered_before_it_moved(model: Classifier) -> None:
    network = grown(model, ("d", "e"), 0)
    loss = loss_of(LWF, model, OLD, 2.0)
    before = model(NEW.images).detach()
    with torch.no_grad():
        for each in (*network.parameters(), *model.parameters()):
            each.mul_(0.5)
    expected = lwf_loss(network(NEW.images), NEW.labels, before, 2.0)
    torch.testing.assert_close(loss(network, NEW.images, NEW.labels), expected)


# Training.


def test_peers_train_as_extend_does(model: Classifier) -> None:
    """Written out: SGD under one cycle over both epochs, in training mode, half of each batch old."""
    found, twin = grown(model, ("d", "e"), 0), grown(model, ("d", "e"), 0)
    memory = OLD.pick(torch.arange(6))
    loss = loss_of(NAIVE, model, OLD, 0.0)
    assert train_peer(found, None, NEW, memory, loss, 0.1, BUDGET) == 18
    optimizer, schedule = sgd(twin.parameters(), 18, 0.1, WEIGHT_DECAY)
    generator = torch.Generator().manual_seed(BUDGET.seed)
    twin.train()
    for rows, again in (pair for _ in range(2) for pair in list(rounds(36, 6, 8, generator))):
        optimizer.zero_grad()
        images = torch.cat([NEW.images[rows], memory.images[again]])
        F.cross_entropy(twin(images), torch.cat([NEW.labels[rows], memory.labels[again]])).backward()
        optimizer.step()
        schedule.step()
    for name, value in found.state_dict().items():
        torch.testing.assert_close(value, twin.state_dict()[name])


def moved(before: nn.Module, after: nn.Module) -> set[str]:
    other = dict(after.state_dict())
    return {name for name, value in before.state_dict().items() if not torch.equal(value, other[name])}


def test_only_the_layers_that_are_named_move_nor_do_statistics_of_others(model: Classifier) -> None:
    network = grown(model, ("d", "e"), 0)
    before = copy.deepcopy(network)
    train_peer(network, ("3", "4", "7"), NEW, OLD.pick(torch.arange(0)), loss_of(NAIVE, model, OLD, 0.0), 0.1, BUDGET)
    expected = {f"network.{layer}.{kind}" for layer in "347" for kind in ("weight", "bias")}
    statistics = {f"network.4.{kind}" for kind in ("running_mean", "running_var", "num_batches_tracked")}
    assert moved(before, network) == expected | statistics


def test_deeparc_trains_what_is_no_interface_and_the_head(model: Classifier) -> None:
    interface = set(modularize(model, OLD.images).interface)
    found = set(trained_layers(model, OLD.images))
    assert found == ({"0", "1", "3", "4", "7"} - interface) | {"7"}
    assert interface & {"0", "1", "3", "4"}


@pytest.mark.parametrize("method", PEERS)
def test_each_peer_learns_the_new_classes_from_a_copy(method: str) -> None:
    model = build_model("nss.zoo:lenet", ("a", "b", "c"), (1, 6, 6), 0, mean=(0.5,), std=(0.25,))
    before = model_digest(model)
    found = learn(method, model, ("d", "e"), NEW, OLD, Setting(0.1, 1.0), Budget(12, 8, 0))
    assert model_digest(model) == before
    again = learn(method, model, ("d", "e"), NEW, OLD, Setting(0.1, 1.0), Budget(12, 8, 0))
    assert model_digest(found.model) == model_digest(again.model)
    half = method in (*REPLAY, JOINT)
    assert found.steps == 12 * (36 // (4 if half else 8))
    assert found.model.spec.classes == ("a", "b", "c", "d", "e")
    assert not found.model.training
    assert all(each.requires_grad for each in found.model.parameters())
    assert (found.trained_share < 1.0) == (method == DEEPARC)
    right = found.model(NEW.images)[:, 3:].argmax(1) + 3 == NEW.labels
    assert float(right.double().mean()) > 0.8


def test_joint_training_forgets_the_weights_it_was_given() -> None:
    one, other = (build_model("nss.zoo:lenet", ("a", "b", "c"), (1, 6, 6), seed) for seed in (0, 1))
    found = [
        model_digest(learn(JOINT, model, ("d", "e"), NEW, OLD, Setting(0.02), BUDGET).model) for model in (one, other)
    ]
    assert found[0] == found[1]


def test_replay_uses_its_share_of_each_old_class_and_naive_none(model: Classifier) -> None:
    dark = Samples(OLD.images, OLD.labels)
    other = Samples(255 - OLD.images, OLD.labels)
    for method, alike in ((NAIVE, True), ("replay 5 %", False), ("replay 100 %", False)):
        found = [
            model_digest(learn(method, model, ("d", "e"), NEW, old, Setting(0.02), BUDGET).model)
            for old in (dark, other)
        ]
        assert (found[0] == found[1]) == alike
