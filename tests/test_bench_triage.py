"""The benchmark of triage: its trials are what they are called after, and its rows are shares of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import common, triage
from bench.common import Settings
from nss.data import Batch, Dataset
from nss.drift import KINDS
from nss.model import Classifier, build_model
from nss.triage import Finding, Look

CLASSES = ("a", "b", "c", "d")


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Classifier:
    """A bench with a tiny data set and an untrained model."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (150, 1, 8, 8), dtype=torch.uint8, generator=generator)
    labels, split = torch.arange(150) % 4, (torch.arange(150) % 3).to(torch.uint8)
    data = Dataset(CLASSES, (1, 8, 8), (Batch("0" * 32, images, labels, split),))
    model = build_model("nss.zoo:lenet", CLASSES, (1, 8, 8), 0).eval()
    monkeypatch.setattr(triage, "dataset", lambda _: data)
    monkeypatch.setattr(triage, "base_model", lambda *_: model)
    monkeypatch.setattr(common, "CACHE", tmp_path)
    monkeypatch.setattr(triage, "STRENGTHS", (1, 5))
    monkeypatch.setattr(triage, "SIZES", (30, 0))
    return model


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Look, Look]]:
    """What `changed` is asked about; it finds a drop in every second trial."""
    asked: list[tuple[Look, Look]] = []

    def answer(known: Look, new: Look, settings: Any) -> Finding:
        asked.append((known, new))
        odd = settings.seed % 2 == 1
        drift = {"found": False, "p_value": 0.05, "effect": 0.25}
        return Finding(odd, "", {"drift": drift, "accuracy": {"found_lower": odd, "drop": 0.5}})

    monkeypatch.setattr(triage, "changed", answer)
    return asked


def test_there_is_a_row_for_each_case_with_shares_of_its_trials_and_a_picture(
    model: Classifier, seen: list[tuple[Look, Look]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(triage, "QUICK_UNCHANGED", 4)
    monkeypatch.setattr(triage, "QUICK_DRIFTED", 2)
    settings = Settings("triage", ("tiny",), ("nss.zoo:lenet",), (0,), True, "")
    report = triage.run(settings)
    assert len(report.rows) == 2 + 1 + 2 * len(KINDS) * 2
    for row in report.rows:
        assert (row["found"], row["drift"], row["drift_at_alpha"], row["fallen"]) == (0.5, 0.0, 1.0, 0.5)
        assert (row["effect"], row["drop"]) == (0.25, 0.5)
    triage.draw(report, tmp_path / "triage.png")
    assert (tmp_path / "triage.png").read_bytes().startswith(b"\x89PNG")
    assert triage._line(report.summary, "noise", "half") == ([0, 1, 5], [0.5] * 3)
    trials = len(seen)
    assert triage.run(settings).rows == report.rows
    assert len(seen) == trials, "a finished measurement is taken from the cache"


def test_known_and_new_images_are_two_halves_of_what_was_not_trained_on(
    model: Classifier, seen: list[tuple[Look, Look]]
) -> None:
    subject = triage._Subject("tiny", "nss.zoo:lenet", 0)
    assert len(subject.labels) == 100
    subject.trial(triage.FALSE, 0, 0, trial=3)
    known, new = seen[0]
    together = torch.cat([known.features, new.features])
    assert torch.equal(sums(together), sums(subject.plain.features))
    assert len(known.labels) == len(new.labels) == 50
    subject.trial(triage.FALSE, 0, 30, trial=3)
    assert torch.equal(seen[1][1].features, new.features[:30])
    subject.trial(triage.MIX, 0, 0, trial=3)
    assert torch.equal(seen[2][1].labels, new.labels[new.labels < 2])
    subject.trial("contrast", 5, 0, trial=3)
    assert torch.equal(seen[3][0].features, known.features)
    assert torch.equal(seen[3][1].labels, new.labels)
    assert not torch.allclose(seen[3][1].features, new.features)


def sums(features: Tensor) -> Tensor:
    return features.double().sum(1).sort().values
