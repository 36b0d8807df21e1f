"""What re-adaptation is measured against: full retraining, last layers, BatchNorm only, and DeepArc.

DeepArc: Ren et al., "DeepArc: Modularizing Neural Networks for the Model Maintenance", ICSE 2023.
Linear CKA: Kornblith et al. 2019, arXiv 1905.00414.
"""

from __future__ import annotations

import copy
import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nss.contexts import evaluating
from nss.finetune import batches
from nss.model import network_of
from nss.predict import accuracy
from nss.samples import Samples
from nss.size import count_parameters
from nss.steps import passes_of

PEERS = ("full", "last", "batchnorm", "deeparc")
LAST = 2
"""layers that `last` trains"""
THRESHOLD, STEP = 0.99, 0.01
LAYERS = (nn.Conv2d, nn.Linear)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.GroupNorm)


def linear_cka(first: Tensor, second: Tensor) -> float:
    """Return the linear centred kernel alignment of two representations of the same n images, 0 to 1.

    first: [n, p], second: [n, q]. The same whatever is added to all images, under rotation and scaling of either side;
    0 when one of them is the same for all images.
    """
    kernels = [each.double() - each.double().mean(0) for each in (first, second)]
    one, other = (each @ each.T for each in kernels)  # n x n: features are many more than images
    lengths = one.norm() * other.norm()
    return float((one * other).sum() / lengths) if float(lengths) else 0.0


@dataclass
class Stage:
    """The layers that read one tensor: one layer, or those on both sides of a skip connection."""

    layers: list[str] = field(default_factory=list)
    norms: list[str] = field(default_factory=list)
    """those right behind its layers"""


def stages(model: nn.Module, images: Tensor) -> tuple[list[Stage], list[Tensor]]:
    """Return the stages in forward order, and what each hands on: what the next one reads, last the class scores.

    images: as the model takes them [n, c, h, w]. The representations are [n, features].
    """
    read: list[Tensor] = []
    made: list[tuple[Tensor, Stage]] = []
    found: list[Stage] = []

    def layer(name: str, inputs: Tensor, output: Tensor) -> None:
        place = next((i for i, each in enumerate(read) if each is inputs), len(read))
        if place == len(read):
            read.append(inputs)
            found.append(Stage())
        found[place].layers.append(name)
        made.append((output, found[place]))

    def norm(name: str, inputs: Tensor, output: Tensor) -> None:
        for stage in [stage for tensor, stage in made if tensor is inputs]:
            stage.norms.append(name)

    hooks = []
    for name, module in network_of(model).named_modules():
        if isinstance(module, (*LAYERS, *NORMS)):
            note = partial(layer if isinstance(module, LAYERS) else norm, name)
            hooks.append(module.register_forward_hook(lambda _, x, y, note=note: note(x[0], y)))
    with evaluating(model), torch.no_grad():
        scores = model(images)
    for hook in hooks:
        hook.remove()
    return found, [each.flatten(1) for each in (*read[1:], scores)]


def runs(similarity: Sequence[float], threshold: float) -> list[range]:
    """Return DeepArc's modules: runs of stages whose neighbours are more alike than the threshold.

    similarity: of each stage to the one behind it.

    >>> runs([0.995, 0.5], 0.99)
    [range(0, 2), range(2, 3)]
    """
    starts = [0, *(i + 1 for i, each in enumerate(similarity) if each <= threshold), len(similarity) + 1]
    return [range(start, end) for start, end in itertools.pairwise(starts)]


@dataclass(frozen=True)
class Modules:
    """How DeepArc divides a network."""

    threshold: float
    modules: tuple[tuple[str, ...], ...]
    """layers of each module"""
    interface: tuple[str, ...]
    """layers and norms that it trains"""


def modularize(model: nn.Module, images: Tensor) -> Modules:
    """Divide a network by the CKA of neighbouring stages; the interface of a module is the stage where it reads.

    The paper's threshold is 0.99. Where it leaves more than half as many modules as stages, nearly every layer is an
    interface and DeepArc is full retraining by another name: then the threshold is lowered by 0.01 until it does not.
    """
    found, handed = stages(model, images)
    similarity = [linear_cka(one, other) for one, other in itertools.pairwise(handed)]
    threshold, modules = THRESHOLD, runs(similarity, THRESHOLD)
    while len(modules) > max(1, len(found) / 2):
        threshold = round(threshold - STEP, 2)
        modules = runs(similarity, threshold)
    interface = [found[each[0]] for each in modules]
    return Modules(
        threshold,
        tuple(tuple(name for i in each for name in found[i].layers) for each in modules),
        tuple(name for stage in interface for name in (*stage.layers, *stage.norms)),
    )


def trained_layers(model: nn.Module, method: str, images: Tensor) -> tuple[str, ...]:
    """Return the names of the modules of the network that a method trains, found on old images [n, c, h, w]."""
    modules = dict(network_of(model).named_modules())
    if method == "deeparc":
        return modularize(model, images).interface
    if method == "last":
        behind = stages(model, images)[0][-LAST:]
        return tuple(name for stage in behind for name in (*stage.layers, *stage.norms))
    kinds = NORMS if method == "batchnorm" else (*LAYERS, *NORMS)
    return tuple(name for name, module in modules.items() if isinstance(module, kinds))


@dataclass(frozen=True)
class Trained:
    """A model that a peer adapts, and what it was after each epoch; entries are of epochs, 0 before the first step."""

    model: nn.Module
    curve: tuple[float, ...]
    """accuracy on the held-out new images, shares of 1"""
    old_curve: tuple[float, ...]
    """the same on the old ones"""
    seconds: tuple[float, ...]
    """since the start, judging on new images included"""
    states: tuple[dict[str, Any], ...]
    steps: int
    trained_share: float

    def at(self, epoch: int) -> nn.Module:
        """Return the model as it was after an epoch."""
        self.model.load_state_dict(self.states[epoch])
        return self.model.eval()


def train_peer(
    model: nn.Module,
    layers: Sequence[str],
    new: Samples,
    held_out: Samples,
    old: Samples,
    learning_rate: float,
    *,
    epochs: int,
    batch_size: int,
    seed: int,
    statistics: bool,
) -> Trained:
    """Train some layers of a copy as `nss.readapt` trains: the same batches in the same order, Adam, one cycle.

    layers: modules of the network. held_out, old: new and old images that each epoch is judged on. statistics: whether
    the BatchNorms among the layers follow the batches. `model` stays as it is.
    """
    twin = copy.deepcopy(model).requires_grad_(False)
    for name in layers:
        network_of(twin).get_submodule(name).requires_grad_()
    free = [each for each in twin.parameters() if each.requires_grad]
    size = min(batch_size, len(new))
    each_epoch = passes_of(len(new), size) * (len(new) // size)
    optimizer = torch.optim.Adam(free, learning_rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, learning_rate, total_steps=epochs * each_epoch, cycle_momentum=False
    )
    log = _Log(twin, held_out, old)
    orders = batches(len(new), epochs * each_epoch, batch_size, torch.Generator().manual_seed(seed))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # dropout
        for _ in range(epochs):
            train_mode(network_of(twin), layers, statistics)
            for rows in itertools.islice(orders, each_epoch):
                loss = F.cross_entropy(twin(new.images[rows]), new.labels[rows])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
            log.judge()
    share = sum(each.numel() for each in free) / count_parameters(model)
    return Trained(
        twin, tuple(log.new), tuple(log.known), tuple(log.seconds), tuple(log.states), epochs * each_epoch, share
    )


class _Log:
    """Judges a model in training, and keeps what it was."""

    def __init__(self, model: nn.Module, held_out: Samples, old: Samples) -> None:
        self.model, self.parts = model, (held_out, old)
        self.new: list[float] = []
        self.known: list[float] = []
        self.seconds: list[float] = []
        self.states: list[dict[str, Any]] = []
        self._spent, self._since = 0.0, time.perf_counter()
        self.judge()

    def judge(self) -> None:
        """Note what the model has come to; the clock stands still where only this bench looks at old images."""
        held_out, old = ((each.images, each.labels) for each in self.parts)
        self.new.append(accuracy(self.model, held_out))
        self._spent += time.perf_counter() - self._since
        self.seconds.append(self._spent)
        self.known.append(accuracy(self.model, old))
        self.states.append({name: each.detach().clone() for name, each in self.model.state_dict().items()})
        self._since = time.perf_counter()


def train_mode(network: nn.Module, layers: Sequence[str] | None, statistics: bool) -> None:
    """Training mode; only the norms that are trained (None: all) move their statistics, if they may."""
    network.train()
    for name, module in network.named_modules():
        if isinstance(module, NORMS) and not (statistics and (layers is None or name in layers)):
            module.eval()
