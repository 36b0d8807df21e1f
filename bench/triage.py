"""Triage: how often it calls unchanged images changed, and how often it finds drift of each kind and strength.

Held-out images, which the model was not trained on, are split into known and new ones by the seed of each trial. For
false alarms the new ones are left as they are; for power nss.drift changes them.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from bench.common import Report, Row, Settings, Table, base_model, dataset, mean_and_spread, resumed, said, show
from nss.drift import KINDS, STRENGTHS, shifted
from nss.features import penultimate_features
from nss.model import Classifier, model_digest
from nss.predict import predict
from nss.triage import Look, TriageSettings, changed

FALSE, MIX = "nothing", "half of the classes"
# Trials of what is unchanged, and of each kind and strength of drift: the standard error of 5 % of 400 is 1 %.
UNCHANGED, QUICK_UNCHANGED = 400, 100
DRIFTED, QUICK_DRIFTED = 20, 10
SIZES = (30, 100, 0)
SUBJECT = ("data", "model", "seed")
BY = ("data", "model", "change", "strength", "new_images")
VALUES = ("found", "drift", "drift_at_alpha", "fallen", "effect", "drop")
DEFAULTS = TriageSettings()
PROTOCOL = {
    "images": "val and test split together; half of them, drawn anew for each trial, are known, of the other half the "
    "first new_images are new",
    "change": f"{FALSE}; {MIX}: new images of the first half of the classes only; else nss.drift, by kind and strength",
    "found": "share of trials in which nss.triage finds readapt needed with its defaults: drift or fallen",
    "drift, fallen": f"share in which each of its two tests does; both at half of alpha {DEFAULTS.alpha}",
    "drift_at_alpha": f"share in which the test of drift alone has p <= {DEFAULTS.alpha}, whatever the effect",
    "trials": f"{UNCHANGED} of what is unchanged ({QUICK_UNCHANGED} with --quick), {DRIFTED} ({QUICK_DRIFTED}) of each "
    "drift; seeds 0, 1, ..",
    "settings": str(DEFAULTS),
}
LEFT_OUT = (
    f"{QUICK_UNCHANGED} trials of what is unchanged in place of {UNCHANGED}, "
    f"{QUICK_DRIFTED} of each drift in place of {DRIFTED}"
)
COLUMNS = (
    "shares of the trials: found (readapt is said to be needed), by the test of drift or because accuracy has fallen; "
    "new_images: how many arrived. Of what is unchanged these are false alarms. The columns 1 to 5 are strengths of "
    "drift."
)


class _Subject:
    """A trained model and the images that it was not trained on."""

    def __init__(self, name: str, factory: str, seed: int) -> None:
        data = dataset(name)
        self.model: Classifier = base_model(data, name, factory, seed)
        parts = [data.split(part) for part in ("val", "test")]
        self.images = torch.cat([part.images for part in parts])
        self.labels = torch.cat([part.labels for part in parts])
        self.classes = len(data.classes)
        self.plain = self.look(self.images, torch.arange(len(self.labels)))

    def look(self, images: Tensor, rows: Tensor) -> Look:
        logits, labels = predict(self.model, (images, self.labels[rows]))
        return Look(penultimate_features(self.model, images), logits.argmax(1).eq(labels), labels)

    def trial(self, change: str, strength: int, new_images: int, trial: int) -> Row:
        """Triage once. new_images: so many at most, 0: all."""
        order = torch.randperm(len(self.labels), generator=torch.Generator().manual_seed(trial))
        half = min(len(order) // 2, DEFAULTS.max_images)
        known, new = order[:half], order[half : half + (new_images or half)]
        if change == MIX:
            new = new[self.labels[new] < self.classes // 2]
        drifted = change in KINDS
        seen = self.look(shifted(self.images[new], change, strength, trial), new) if drifted else _pick(self.plain, new)
        found = changed(_pick(self.plain, known), seen, TriageSettings(seed=trial))
        drift, answers = found.evidence["drift"], found.evidence["accuracy"]
        return {
            "found": float(found.needed),
            "drift": float(drift["found"]),
            "drift_at_alpha": float(drift["p_value"] <= DEFAULTS.alpha),
            "fallen": float(answers["found_lower"]),
            "effect": drift["effect"],
            "drop": answers["drop"],
        }


def run(settings: Settings) -> Report:
    """Measure every case of every model; finished ones are taken from the cache."""
    report = Report(settings, said(settings, PROTOCOL, LEFT_OUT))
    trials = (QUICK_UNCHANGED, QUICK_DRIFTED) if settings.quick else (UNCHANGED, DRIFTED)
    for name, factory, seed in settings.subjects():
        subject = _Subject(name, factory, seed)
        identity = dict(zip(SUBJECT, (name, factory, seed), strict=True))
        key = {**identity, "weights": model_digest(subject.model), "settings": str(DEFAULTS), "trials": trials}
        report.rows += resumed("triage", key, lambda of=subject, who=identity: list(_rows(of, who, trials)))
    report.summary = mean_and_spread(report.rows, BY, VALUES)
    show(tables(report.summary))
    return report


def tables(summary: Sequence[Row]) -> list[Table]:
    """Return what is shown of a summary: what is unchanged in full, of each drift what is found by strength."""
    plain = [row for row in summary if row["change"] not in KINDS]
    by = ("data", "model", "change", "new_images")
    drifts: dict[tuple[Any, ...], Row] = {}
    for row in (row for row in summary if row["change"] in KINDS):
        key = tuple(row[name] for name in by)
        drifts.setdefault(key, dict(zip(by, key, strict=True)))[str(row["strength"])] = row["found"]
    return [
        Table("unchanged: share of trials in which a change is found", (*by, *VALUES), plain),
        Table("drift: share of trials in which it is found", (*by, *map(str, STRENGTHS)), list(drifts.values())),
    ]


def _rows(subject: _Subject, identity: Row, trials: tuple[int, int]) -> Iterator[Row]:
    """Yield one row a case: means over its trials."""
    cases = [(FALSE, 0, size, trials[0]) for size in SIZES] + [(MIX, 0, 0, trials[0])]
    cases += [(kind, strength, size, trials[1]) for size in SIZES for kind in KINDS for strength in STRENGTHS]
    for change, strength, size, count in cases:
        found = [subject.trial(change, strength, size, trial) for trial in range(count)]
        means = {name: statistics.fmean(row[name] for row in found) for name in VALUES}
        yield {**identity, "change": change, "strength": strength, "new_images": size or "half", **means}


def draw(report: Report, path: Path) -> None:
    """Share of trials that find each drift, over its strength; a line for each number of new images."""
    panels = list(dict.fromkeys((row["data"], row["model"]) for row in report.summary))
    figure = Figure(figsize=(3 * len(KINDS), 3 * len(panels)), layout="constrained")
    grid = figure.subplots(len(panels), len(KINDS), squeeze=False, sharey=True)
    for line, panel in zip(grid, panels, strict=True):
        own = [row for row in report.summary if (row["data"], row["model"]) == panel]
        for axes, kind in zip(line, KINDS, strict=True):
            for size in (*SIZES[:-1], "half"):
                axes.plot(*_line(own, kind, size), marker="o", label=f"{size} new images")
            axes.axhline(DEFAULTS.alpha, color="grey", linestyle=":")
            axes.set(title=kind, xlabel="strength", xticks=[0, *STRENGTHS])
        line[0].set_ylabel(f"{panel[1].partition(':')[2]}, {panel[0]}: found")
        line[0].legend(fontsize=7)
    figure.savefig(path, dpi=110)


def _line(rows: Sequence[Row], kind: str, size: int | str) -> tuple[list[int], list[float]]:
    own = [row for row in rows if row["change"] in (kind, FALSE) and row["new_images"] == size]
    return [row["strength"] for row in own], [row["found"] for row in own]


def _pick(look: Look, rows: Tensor) -> Look:
    return Look(look.features[rows], look.right[rows], look.labels[rows])
