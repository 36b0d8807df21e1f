"""Levelling: the worst class regains what it can without the held-out accuracy falling (docs/restructure.md).

A network answers the class with the largest logit, and near that border a small offset of one class's logit trades
right answers of this class for right answers of others, nearly one for one: what the worst class gains is all but free.
"""

from __future__ import annotations

import logging

import torch
from torch import Tensor, nn

from nss.anatomy import dissect, head_of
from nss.data import Data
from nss.errors import ModelError, SiteError, first_line
from nss.evaluate import check_fit
from nss.mask import ChannelMask
from nss.model import Classifier
from nss.predict import predict
from nss.weight_masks import refuse_unowned

_LOG = logging.getLogger(__name__)
STEP = 1 / 128
"""of the median gap between the two largest logits: what the worst class's is raised by at a time"""
STEPS = 200
DIP = 0.02
"""share of the accuracy that may be missing on the way: a single image must not end the search"""
FEWEST = 50
"""held-out images of a class from which on its share of right answers is more than a guess"""


def level_classes(model: Classifier, held_out: Data, *, least: int = FEWEST) -> dict[str, float]:
    """Raise the worst class's answers by the biases of the class head, in place. Returns what was added, by class.

    As far as the accuracy on the held-out images is no lower than before: see `level_offsets`. held_out: what nothing
    was trained on. least: held-out images that each class must have; with fewer of any, nothing moves. Nothing moves,
    either, in a model whose logits are not those of one layer with a bias of its own (an extended one's are its
    router's), and where nothing is gained; the log says why. Only those biases change: no other weight, no size.
    Source: ours, docs/restructure.md. Raises ModelError for what `build_model` did not make, a masked view of another
    model, weights that are shared or computed, no images, labels that the model does not know, and `least` below 1.

    >>> nss.level_classes(model, nss.load_data("data").split("val"))
    {'Shirt': 0.375}
    """
    _check(model, least)
    bias, why = _bias_of_head(model)
    if bias is None:
        return _unmoved(why)
    logits, labels = predict(model, held_out)
    classes = model.spec.classes
    check_fit(logits, labels, classes)
    counts = torch.bincount(labels, minlength=len(classes))
    if int(counts.min()) < least:
        rarest = int(counts.argmin())
        return _unmoved(f"{classes[rarest]!r} has {int(counts[rarest])} held-out images, fewer than {least}")
    before = bias.detach().clone()
    with torch.no_grad():
        bias.add_(level_offsets(logits, labels).to(bias))
    # The bias may have rounded what was found. Read again, the images might come in another order, or not at all.
    added = bias.detach().double().cpu() - before.double().cpu()
    if not _gained(logits, (logits.double() + added).to(logits.dtype), labels):
        with torch.no_grad():
            bias.copy_(before)
        return _unmoved("no offset raises the worst class at the same accuracy")
    return {name: value for name, value in zip(classes, added.tolist(), strict=True) if value}


def level_offsets(logits: Tensor, labels: Tensor) -> Tensor:
    """Return what to add to the logits of each class so that the worst class is answered best, float64 [classes].

    logits: [n, classes]. labels: int64 [n], every class at least once. Whichever class has the smallest share of right
    answers (the first of several) is raised by STEP of the median gap between the two largest logits, and again. Of
    the offsets on this way at which no fewer answers are right than without, those count with which the worst class has
    the largest share, the first of several; the way ends after STEPS, or when the share DIP of the right answers is
    lost. Logits that are not finite, and those of one class, are left alone: the offsets are 0 then. Source: ours,
    docs/restructure.md. Raises nothing of its own.

    >>> level_offsets(torch.tensor([[1.0, 0.95], [2.0, 0.0], [0.0, 2.0]]), torch.tensor([1, 0, 1]))
    tensor([0.0000, 0.0625], dtype=torch.float64)
    """
    best = offsets = torch.zeros(logits.shape[1], dtype=torch.float64)
    if logits.shape[1] < 2 or not bool(logits.isfinite().all()):
        return best
    logits = logits.double()
    step = STEP * (logits.topk(2).values @ torch.tensor([1.0, -1.0], dtype=torch.float64)).median()
    start, shares = _answered(logits, labels)
    worst = float(shares.min())
    for _ in range(STEPS):
        offsets = offsets.index_add(0, shares.argmin()[None], step[None])
        right, shares = _answered(logits + offsets, labels)
        if right < (1 - DIP) * start:
            break
        if right >= start and float(shares.min()) > worst:
            worst, best = float(shares.min()), offsets
    return best


def _answered(logits: Tensor, labels: Tensor) -> tuple[int, Tensor]:
    """Return the number of right answers, and their share of each class, float64 [classes]."""
    classes = logits.shape[1]
    right = torch.bincount(labels[logits.argmax(1) == labels], minlength=classes)
    return int(right.sum()), right.double() / torch.bincount(labels, minlength=classes)


def _gained(before: Tensor, after: Tensor, labels: Tensor) -> bool:
    (start, shares), (right, raised) = _answered(before, labels), _answered(after, labels)
    return right >= start and bool(raised.min() > shares.min())


def _check(model: Classifier, least: int) -> None:
    if not isinstance(model, Classifier):
        raise ModelError(
            f"{type(model).__name__} is no model of nss",
            where="levelling",
            allowed="what build_model or load_model makes",
        )
    if least < 1:
        raise ModelError(f"least is {least}", where="levelling", allowed="from 1")
    if any(isinstance(module, ChannelMask) for module in model.modules()):
        raise ModelError(
            "a masked view has the weights of the model that it is of",
            where="levelling",
            fix="level that, or nss.remove",
        )
    refuse_unowned(model.network, "levelling", ModelError)


def _unmoved(why: str) -> dict[str, float]:
    _LOG.warning("not levelled: %s", why)
    return {}


def _bias_of_head(model: Classifier) -> tuple[nn.Parameter | None, str]:
    """Return the bias of the layer whose outputs are the logits; else None, and why there is none."""
    try:
        anatomy = dissect(model.network, model.spec.input_shape)
    except SiteError as error:
        return None, first_line(error)
    head = head_of(anatomy)
    if head is None or [each.module for each in anatomy.producers].count(head.module) > 1:
        return None, "the logits are not those of one layer that is called once"
    bias = model.network.get_submodule(head.module).bias
    if not isinstance(bias, nn.Parameter) or len(bias) != len(model.spec.classes):
        return None, f"{head.module!r}, which makes the logits, has no bias"
    return bias, ""
