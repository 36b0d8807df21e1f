"""Levelling: the worst class regains what it can without the whole losing accuracy (docs/restructure.md).

A network answers the class with the largest logit, and near that border a small offset of one class's logit trades
right answers of this class for right answers of others, nearly one for one: what the worst class gains is all but free.
"""

from __future__ import annotations

import logging

import torch
from torch import Tensor, nn

from nss.anatomy import dissect, head_of
from nss.data import Data
from nss.errors import ModelError, SiteError
from nss.model import Classifier
from nss.predict import predict

_LOG = logging.getLogger(__name__)
STEP = 1 / 16
"""of a logit: what the worst class's is raised by at a time"""
STEPS = 200
FEWEST = 50
"""held-out images of a class from which on its share of right answers is more than a guess"""


def level_classes(model: Classifier, held_out: Data, *, least: int = FEWEST) -> dict[str, float]:
    """Raise the worst class's answers by the biases of the class head, in place. Returns what was added, by class.

    As long as the accuracy on the held-out images does not fall below what it was: see `level_offsets`. held_out: what
    nothing was trained on. least: held-out images that each class must have; with fewer of any, nothing moves. Nothing
    moves, either, in a model whose logits are not those of one layer with a bias (an extended one's are its
    router's); the log says why. Only those biases change: no other weight, no size. Source: ours,
    docs/restructure.md. Raises ModelError when there are no images, or labels that the model does not know.

    >>> nss.level_classes(smaller, nss.load_data("data").split("val"))
    {'Shirt': 0.375}
    """
    bias = _bias_of_head(model)
    logits, labels = predict(model, held_out)
    classes = model.spec.classes
    if int(labels.min()) < 0 or int(labels.max()) >= len(classes):
        raise ModelError(f"labels up to {int(labels.max())}", allowed=f"0 to {len(classes) - 1}: one a class")
    if bias is None:
        _LOG.warning("not levelled: the logits of this model are not those of one layer with a bias")
        return {}
    if int(torch.bincount(labels, minlength=len(classes)).min()) < least:
        _LOG.warning("not levelled: some class has fewer than %d held-out images", least)
        return {}
    offsets = level_offsets(logits, labels)
    with torch.no_grad():
        bias.add_(offsets.to(bias))
    return {name: value for name, value in zip(classes, offsets.tolist(), strict=True) if value}


def level_offsets(logits: Tensor, labels: Tensor) -> Tensor:
    """Return what to add to the logits of each class so that the worst class is answered best, float64 [classes].

    logits: [n, classes]. labels: int64 [n], every class at least once. The logit of whichever class has the smallest
    share of right answers (the first of several) is raised by STEP, and again, until the accuracy would fall below
    that without offsets. Of all the offsets on the way those count with which the worst class has the largest share,
    the first of several. Logits that are not finite are left alone: the offsets are 0 then.

    >>> level_offsets(torch.tensor([[1.0, 0.95], [2.0, 0.0], [0.0, 2.0]]), torch.tensor([1, 0, 1]))
    tensor([0.0000, 0.0625], dtype=torch.float64)
    """
    best = offsets = torch.zeros(logits.shape[1], dtype=torch.float64)
    if not bool(logits.isfinite().all()):
        return best
    shares = _shares(logits.double(), labels)
    start, worst = _right(logits.double(), labels), float(shares.min())
    for _ in range(STEPS):
        offsets = offsets.index_add(0, shares.argmin()[None], torch.tensor([STEP], dtype=torch.float64))
        raised = logits + offsets
        shares = _shares(raised, labels)
        if _right(raised, labels) < start:
            break
        if float(shares.min()) > worst:
            worst, best = float(shares.min()), offsets
    return best


def _right(logits: Tensor, labels: Tensor) -> int:
    return int((logits.argmax(1) == labels).sum())


def _shares(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the share of right answers of each class, float64 [classes]."""
    right = torch.bincount(labels[logits.argmax(1) == labels], minlength=logits.shape[1])
    return right.double() / torch.bincount(labels, minlength=logits.shape[1])


def _bias_of_head(model: Classifier) -> nn.Parameter | None:
    """Return the bias of the layer whose outputs are the logits; None where no single layer, or one without, is."""
    try:
        anatomy = dissect(model.network, model.spec.input_shape)
    except SiteError:
        return None
    head = head_of(anatomy)
    if head is None or [each.module for each in anatomy.producers].count(head.module) > 1:
        return None
    bias = model.network.get_submodule(head.module).bias
    return bias if isinstance(bias, nn.Parameter) and len(bias) == len(model.spec.classes) else None
