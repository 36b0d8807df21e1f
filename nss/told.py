"""Models of several tasks: which task a class is of, what is answered when told it, and what tells the tasks apart."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from nss.contexts import evaluating
from nss.data import Data, iter_batches, val_part
from nss.errors import ModelError, NssError
from nss.model import Classifier, device_of
from nss.predict import answers_of
from nss.routing import PLAIN, Router, fit_blend, fit_mix
from nss.wiring import Columns

# Not infinite: a soft target of 0 times it must be 0.
_UNREACHABLE = -1e30


def tasks_of(model: Classifier) -> Tensor:
    """Return the number of the task of each class, int64 [classes]; a model that was never extended has one."""
    counts = [task.classes for task in model.spec.tasks] or [len(model.spec.classes)]
    return torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))


def tasks_apart(model: nn.Module) -> Tensor | None:
    """Return the same for a model whose tasks are told apart by a router, None for any other."""
    return tasks_of(model) if isinstance(model, Classifier) and model.spec.tasks else None


def within_task(logits: Tensor, labels: Tensor, tasks: Tensor | None) -> Tensor:
    """Leave each image the classes of its label's task to choose from. tasks: int64 [classes]; None: all of them.

    >>> within_task(torch.zeros(1, 3), torch.tensor([2]), torch.tensor([0, 0, 1])).argmax(1)
    tensor([2])
    """
    if tasks is None:
        return logits
    tasks = tasks.to(logits.device)
    return logits.masked_fill(tasks[None] != tasks[labels.to(logits.device)][:, None], _UNREACHABLE)


def told_answers(model: Classifier, logits: Tensor, labels: Tensor) -> Tensor:
    """Return the best class among those of the task that each label is of, int64 [n]."""
    return answers_of(within_task(logits, labels, tasks_of(model)))


def parts_of(model: Classifier, data: Data) -> Iterator[tuple[list[Tensor], Tensor, Tensor]]:
    """Yield the logits of each column, what the router sees [n, features], and the labels int64 [n], by batches."""
    network = cast(Columns, model.network)
    with evaluating(model), torch.no_grad():
        for images, labels in iter_batches(data, 500):
            logits, features = network.parts(model.normalise(images.to(device_of(model))))
            yield logits, features, labels.cpu().long()


def features_of(model: Classifier, data: Data) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield what the router sees of each batch of the data [n, features], and the labels int64 [n]."""
    for _, features, labels in parts_of(model, data):
        yield features, labels


def check_classes(model: Classifier, labels: Tensor, error: type[NssError] = ModelError, fix: str = "") -> None:
    """Raise `error` unless there are images of every class that an extended model's router has to tell apart."""
    seen = labels.unique().tolist()
    if missing := [name for index, name in enumerate(model.spec.classes) if index not in seen]:
        raise error(
            f"there is no image of {', '.join(missing)} to tell the tasks apart by",
            where="the data",
            allowed="images of every class that an extended model knows",
            fix=fix,
        )


def route_anew(model: Classifier, parts: Sequence[Data], held_out: Sequence[Data] = ()) -> None:
    """Learn again, in place, what tells the tasks apart, from images of all classes: features that moved look new.

    parts: labelled images, together of every class. held_out: others, which nothing was learned from; how a gate weighs
    its evidence is fitted on them, and without images of both sides of it, it goes by its features alone.
    Raises ModelError, and changes nothing, where a class has no image.
    """
    batches = [batch for part in parts for batch in features_of(model, part)]
    check_classes(model, torch.cat([labels for _, labels in batches]))
    cast(Columns, model.network).router.learn_anew(batches)
    _weigh_anew(model, held_out)


def route_by(model: Classifier, learned: tuple[Tensor, Tensor], data: Data) -> None:
    """Let `route_anew` learn from the training images of the data, read before, and weigh by those it holds out."""
    held_out = val_part(data)
    route_anew(model, [learned], [] if held_out is None else [held_out])


@torch.no_grad()
def _weigh_anew(model: Classifier, held_out: Sequence[Data]) -> None:
    network, tasks = cast(Columns, model.network), tasks_of(model)
    rows = [row for part in held_out for row in parts_of(model, part)]
    found = torch.cat([torch.zeros(0, dtype=torch.int64), *(tasks[labels] for _, _, labels in rows)])
    # In order: what speaks for a column is held against how the earlier gates decide.
    for gate in range(len(network.router.gates)):
        new = (found == gate + 1)[found <= gate + 1]
        mix = torch.tensor(PLAIN)
        if bool(new.any()) and not bool(new.all()):
            seen = torch.cat([network.router.evidence(logits, features, gate) for logits, features, _ in rows])
            mix = fit_mix(seen[(found <= gate + 1).to(seen.device)], new)
        network.router.mixes[gate] = mix.to(network.router.mixes)
        blend(network.router, gate, rows)


@torch.no_grad()
def blend(router: Router, gate: int, rows: Sequence[tuple[list[Tensor], Tensor, Tensor]]) -> None:
    """Weigh, in place, what a gate's column and the features say of which of its classes an image shows.

    gate: its number, of the second column 0. rows: what `parts_of` yields, of images that nothing was learned from;
    those of the column's classes count.
    """
    first, classes = sum(router.classes[: gate + 1]), router.classes[gate + 1]
    own, scores, labels = [torch.zeros(0, classes)], [torch.zeros(0, classes)], [torch.zeros(0, dtype=torch.int64)]
    for logits, features, found in rows:
        of = (found >= first) & (found < first + classes)
        own.append(logits[gate + 1][of.to(features.device)].cpu())
        scores.append(router.gates[gate](features)[of.to(features.device), first:].cpu())
        labels.append(found[of] - first)
    learned = int(router.counts[first : first + classes].min())
    router.blends[gate] = fit_blend(torch.cat(own), torch.cat(scores), torch.cat(labels), learned).to(router.blends)
