"""The time of a training step with some neurons free beside a full step, in turn on the same batch."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.common import Row, interleaved
from bench.readapt_cases import Subject
from bench.readapt_peers import train_mode
from nss.freeze import freeze
from nss.guard import Guard
from nss.model import network_of
from nss.sites import find_sites
from nss.size import count_parameters
from nss.tunable import tunable_neurons
from nss.whitened import WhitenedAdam

BATCH, REPEATS, WARM_UP = 128, 40, 5
CHOOSING = 500
FULL, FIXED = "full", "full, fixed"
LEAST = 1e-6
"""learning rate: too small to get anywhere"""


def step_times(subject: Subject, share: float) -> list[Row]:
    """Return the median milliseconds of a full step and of a guarded one with `share` of the weights free.

    Full steps are of two kinds: the BatchNorms take the statistics of the batch, or are fixed as those of frozen
    neurons are.
    """
    samples = subject.first("val", 0, CHOOSING)
    images, labels = samples.images[:BATCH], samples.labels[:BATCH]
    known, slices = subject.known
    frozen = freeze(subject.model, tunable_neurons(subject.model, slices, samples.images, samples.labels, share, known))
    anatomy = find_sites(network_of(subject.model), subject.model.spec.input_shape).anatomy
    guard = Guard(frozen, anatomy, known)
    whole = [copy.deepcopy(subject.model).requires_grad_() for _ in (FULL, FIXED)]
    of_all = [torch.optim.Adam(each.parameters(), LEAST) for each in whole]
    of_free = WhitenedAdam(guard.terms, LEAST, guard=1.0)
    steps = {
        FULL: _stepper(whole[0], images, labels, of_all[0]),
        FIXED: _stepper(whole[1], images, labels, of_all[1], fixed=True),
        "free, guarded": _stepper(frozen, images, labels, of_free),
    }
    found = interleaved(steps, REPEATS, WARM_UP)
    trained = of_free.count / count_parameters(subject.model)
    shares = {FULL: 1.0, FIXED: 1.0}
    return [
        {
            "step": name,
            "trained_share": shares.get(name, trained),
            "milliseconds": milliseconds,
            "of_full": milliseconds / found[FULL],
        }
        for name, milliseconds in found.items()
    ]


def _stepper(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    optimizer: torch.optim.Optimizer,
    *,
    fixed: bool = False,
) -> Callable[[], int]:
    """Return a whole step: forward, backward, update."""
    train_mode(model, None, statistics=not fixed)

    def step() -> int:
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return 1

    return step
