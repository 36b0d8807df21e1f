"""Models side by side on the same held-out images: what each answers, and what the gate needs of each candidate."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nss.compare import Comparison, compare_answers
from nss.data import Dataset
from nss.evaluate import Evaluation, confusion_of
from nss.model import Classifier, model_digest
from nss.predict import answers_of, predict
from nss.told import told_answers
from tasks.sizes import sizes_of


@dataclass(frozen=True)
class Answers:
    """What a model answers to one set of images: it runs over them once, whatever is asked later."""

    model: Classifier
    logits: Tensor
    """[n, classes of the model]"""
    labels: Tensor
    """int64 [n]; there may be classes that the model does not know"""
    batches: tuple[tuple[str, Tensor], ...]
    """digest and labels of each batch, in the order of the images"""

    @classmethod
    def of(cls, model: Classifier, part: Dataset, batch_size: int) -> Answers:
        """Run the model over the images, of which there may be none."""
        nothing = torch.zeros(0, len(model.spec.classes))
        logits = predict(model, part, batch_size)[0] if len(part) else nothing
        return cls(model, logits, part.labels, tuple((batch.digest, batch.labels) for batch in part.batches))

    @property
    def _is_known(self) -> Tensor:
        return self.labels < len(self.model.spec.classes)

    @property
    def evaluation(self) -> Evaluation | None:
        """How the images of classes that the model knows are answered; None when there are none."""
        rows, names = self._is_known, self.model.spec.classes
        if not bool(rows.any()):
            return None
        return Evaluation(names, confusion_of(answers_of(self.logits[rows]), self.labels[rows], len(names)))

    @property
    def told_accuracy(self) -> float | None:
        """The share answered right when told which classes were learned together with the image's; None without."""
        rows = self._is_known
        right = told_answers(self.model, self.logits[rows], self.labels[rows]).eq(self.labels[rows])
        return float(right.double().mean()) if len(right) else None

    def compared_with(self, champion: Answers) -> Comparison | None:
        """Compare with the champion's answers to the same images; None when there are none that this model knows."""
        rows, classes = self._is_known, self.model.spec.classes
        if not bool(rows.any()):
            return None
        return compare_answers(
            champion.logits[rows],
            self.logits[rows],
            self.labels[rows],
            classes,
            known=len(champion.model.spec.classes),
            batches={digest: int((labels < len(classes)).sum()) for digest, labels in self.batches},
        )


@dataclass(frozen=True)
class Scores:
    """A model on images of batches that the base model knows, and of those that have arrived since."""

    folder: Path
    old: Answers
    new: Answers
    batches: list[str]
    """digests of those that it knows"""

    @property
    def model(self) -> Classifier:
        """The model."""
        return self.old.model

    @property
    def evaluation(self) -> Evaluation:
        """On all images together."""
        parts = [part for part in (self.old.evaluation, self.new.evaluation) if part is not None]
        return Evaluation(self.model.spec.classes, torch.stack([part.confusion for part in parts]).sum(0))


def candidate(verb: str, scores: Scores, base: Scores) -> dict[str, Any]:
    """Describe a candidate: what nss.gate.Candidate holds, and digests of model, parent and the batches it knows.

    base: what it is compared with, the champion or the model that stands in for it. The base model itself is compared
    with nothing and has no parent.
    """
    whole, is_base = scores.evaluation, scores is base
    known, arrived = (
        (None, None) if is_base else (scores.old.compared_with(base.old), scores.new.compared_with(base.new))
    )
    return {
        "verb": verb,
        "images": whole.images,
        "accuracy": whole.accuracy,
        "per_class": whole.per_class,
        "known": known and known.to_dict(),
        "arrived": arrived and arrived.to_dict(),
        "size": sizes_of(scores.model, scores.folder),
        "champion_size": {} if is_base else sizes_of(base.model, base.folder),
        "model": model_digest(scores.model),
        "parent": None if is_base else model_digest(base.model),
        "batches": scores.batches,
    }
