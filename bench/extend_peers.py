"""What learning new classes is measured against: retraining with and without old images, DeepArc, EWC and LwF.

DeepArc: Ren et al., "DeepArc: Modularizing Neural Networks for the Model Maintenance", ICSE 2023.
EWC: Kirkpatrick et al. 2017, arXiv 1612.00796. LwF: Li and Hoiem 2016, arXiv 1606.09282.
All train with the same new samples, epochs, batch size and optimizer (nss.steps.sgd) as nss.extend.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.readapt_peers import LAYERS, NORMS, modularize, train_mode
from nss.anatomy import dissect
from nss.contexts import evaluating
from nss.factories import factory_network
from nss.model import Classifier, with_network
from nss.samples import Samples, drawn
from nss.size import count_parameters
from nss.steps import sgd

NAIVE, JOINT, DEEPARC, EWC, LWF = "naive", "joint", "deeparc", "ewc", "lwf"
REPLAY = {"replay 5 %": 0.05, "replay 10 %": 0.1, "replay 100 %": 1.0}
PEERS = (NAIVE, *REPLAY, JOINT, DEEPARC, EWC, LWF)
TEMPERATURE = 2.0
"""of LwF, as in its paper"""
FISHER_IMAGES = 500
"""old training images that the Fisher information is of"""
PROBE = 500
"""old training images on which DeepArc compares layers"""
WEIGHT_DECAY = 5e-4

Loss = Callable[[nn.Module, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Budget:
    """What every method gets."""

    epochs: int
    batch_size: int
    seed: int


@dataclass(frozen=True)
class Setting:
    """What is chosen on validation images."""

    rate: float
    strength: float = 0.0
    """of EWC's penalty, of LwF's distillation"""


@dataclass(frozen=True)
class Learned:
    """A model that a peer taught new classes."""

    model: Classifier
    steps: int
    trained_share: float
    """of all weights"""


def learn(
    method: str, model: Classifier, names: Sequence[str], new: Samples, old: Samples, setting: Setting, budget: Budget
) -> Learned:
    """Teach a copy of `model` the classes `names`, whose labels follow those it knows.

    new: of the new classes; old: what the model was trained on, of which each method uses what it may.
    """
    network = grown(model, names, budget.seed)
    if method == JOINT:
        fresh = factory_network(network.spec, len(network.spec.classes), budget.seed, None)
        network = cast(Classifier, with_network(network, fresh))
    layers = trained_layers(model, old.images) if method == DEEPARC else None
    memory = {**REPLAY, JOINT: 1.0}.get(method, 0.0)
    replayed = old.pick(drawn(old.labels, memory, budget.seed))
    loss = loss_of(method, model, old, setting.strength)
    steps = train_peer(network, layers, new, replayed, loss, setting.rate, budget)
    free = sum(each.numel() for each in network.parameters() if each.requires_grad)
    found = network.requires_grad_(True).eval()
    return Learned(found, steps, free / count_parameters(found))


def grown(model: Classifier, names: Sequence[str], seed: int) -> Classifier:
    """Return a copy whose head has an output more for each name, after the old ones, initialised by the seed."""
    twin = copy.deepcopy(model.network)
    place = dissect(twin, model.spec.input_shape).producers[-1].module
    head = cast(nn.Linear, twin.get_submodule(place))
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        wide = nn.Linear(head.in_features, head.out_features + len(names))
        wide.weight[: head.out_features], wide.bias[: head.out_features] = head.weight, head.bias
    twin.set_submodule(place, wide)
    return cast(Classifier, with_network(model, twin, classes=(*model.spec.classes, *names)))


def trained_layers(model: Classifier, images: Tensor) -> tuple[str, ...]:
    """Return what DeepArc trains: layers and norms that are no interface of a module, and the head, which grows.

    images: old ones.
    """
    frozen = set(modularize(model, images[:PROBE]).interface)
    head = dissect(model.network, model.spec.input_shape).producers[-1].module
    modules = model.network.named_modules()
    return tuple(
        name
        for name, module in modules
        if isinstance(module, (*LAYERS, *NORMS)) and (name == head or name not in frozen)
    )


def loss_of(method: str, model: Classifier, old: Samples, strength: float) -> Loss:
    """Return what a method minimises."""
    known = len(model.spec.classes)
    if method == EWC:
        anchor = Anchor(model, old.images[:FISHER_IMAGES])
        return lambda network, images, labels: (
            F.cross_entropy(network(images)[:, known:], labels - known) + strength * anchor.penalty(network)
        )
    if method == LWF:
        teacher = copy.deepcopy(model).eval()

        def distilled(network: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
            with torch.no_grad():
                before = teacher(images)
            return lwf_loss(network(images), labels, before, strength)

        return distilled
    return lambda network, images, labels: F.cross_entropy(network(images), labels)


class Anchor:
    """The weights of a model, and how much what it answers hangs on each: the diagonal of the Fisher information."""

    def __init__(self, model: nn.Module, images: Tensor) -> None:
        self.weights = {name: each.detach().clone() for name, each in model.named_parameters()}
        self.fisher = fisher_diagonal(model, images)

    def penalty(self, model: nn.Module) -> Tensor:
        """Return half the sum of squared changes, each times its Fisher information; what is new costs nothing.

        model: the same, or with a head that has outputs more, after the old ones.
        """
        changes = [
            (self.fisher[name] * (each[: len(self.weights[name])] - self.weights[name]).square()).sum()
            for name, each in model.named_parameters()
        ]
        return torch.stack(changes).sum() / 2


def fisher_diagonal(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """Return the mean over images of E(d log p(y|x) / d w)^2 for each weight w, y as the model itself answers.

    The expectation over y is taken in full, so that no chance is in it.
    """
    parameters = dict(model.named_parameters())
    total = {name: torch.zeros_like(each) for name, each in parameters.items()}
    with evaluating(model), torch.enable_grad():
        for image in images.split(1):
            chances = model(image).log_softmax(1)[0]
            for place, chance in enumerate(chances):
                more = place < len(chances) - 1
                slopes = torch.autograd.grad(chance, list(parameters.values()), retain_graph=more)
                for each, slope in zip(total.values(), slopes, strict=True):
                    each += chance.detach().exp() * slope.square()
    return {name: each / len(images) for name, each in total.items()}


def lwf_loss(logits: Tensor, labels: Tensor, before: Tensor, strength: float) -> Tensor:
    """Return the cross entropy of the new classes, plus that of the old ones with what was answered before, softened.

    logits [n, classes], labels of new classes [n], before: logits of the model as it was [n, old classes].
    """
    known = before.shape[1]
    old, new = logits[:, :known], logits[:, known:]
    remembered = F.cross_entropy(old / TEMPERATURE, (before / TEMPERATURE).softmax(1))
    return F.cross_entropy(new, labels - known) + strength * remembered


def train_peer(
    model: nn.Module,
    layers: Sequence[str] | None,
    new: Samples,
    memory: Samples,
    loss: Loss,
    rate: float,
    budget: Budget,
) -> int:
    """Train in place. Returns the number of steps.

    layers: modules of the network that are trained; None: all. memory: old images, repeated to half of each batch.
    """
    network = cast(Classifier, model).network
    model.requires_grad_(layers is None)
    for name in layers or ():
        network.get_submodule(name).requires_grad_(True)
    generator = torch.Generator().manual_seed(budget.seed)
    steps = budget.epochs * (len(new) // new_per_batch(len(new), len(memory), budget.batch_size))
    optimizer, schedule = sgd((each for each in model.parameters() if each.requires_grad), steps, rate, WEIGHT_DECAY)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(budget.seed)  # dropout
        train_mode(network, layers, statistics=True)
        for _ in range(budget.epochs):
            for rows, again in rounds(len(new), len(memory), budget.batch_size, generator):
                images = torch.cat([new.images[rows], memory.images[again]])
                cost = loss(model, images, torch.cat([new.labels[rows], memory.labels[again]]))
                optimizer.zero_grad()
                cost.backward()
                optimizer.step()
                schedule.step()
    return steps


def new_per_batch(new: int, old: int, batch_size: int) -> int:
    """Return how many images of a batch are new ones: with old ones half of them."""
    return min(new, max(1, batch_size // 2) if old else batch_size)


def rounds(new: int, old: int, batch_size: int, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield indices of new and of old images for each batch of an epoch; the rest that does not fill one is left out.

    Each new image comes once. With old ones half of a batch is old: all as often as it takes, in a new order each time.
    """
    size = new_per_batch(new, old, batch_size)
    order = torch.randperm(new, generator=generator)[: new // size * size]
    again = torch.zeros(0, dtype=torch.int64)
    while old and len(again) < len(order):
        again = torch.cat([again, torch.randperm(old, generator=generator)])
    for start in range(0, len(order), size):
        yield order[start : start + size], again[: len(order)][start : start + size]
