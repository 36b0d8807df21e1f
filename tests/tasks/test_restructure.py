"""The stage `restructure`: how small the model is made."""

from __future__ import annotations

import sys

import pytest

from nss.data import Dataset
from nss.errors import RestructureError
from nss.files import read_json, write_json
from nss.model import Classifier, load_model, model_digest
from nss.size import count_macs, count_parameters
from tasks import restructure as stage
from tasks.batches import known_data

NONE = {"parameters": None, "macs": None, "bytes": None, "latency_ms": None}


def sizes(small) -> dict[str, int]:
    model = load_model(small.workspace.out("base") / "model")
    return {"macs": count_macs(model), "parameters": count_parameters(model)}


def made(small, kind: str, share: float | None, **changes: object) -> bytes:
    """The plan that is made when triage allows this share of what there is, and the setting half of it."""
    budgets = NONE if share is None else {**NONE, kind: share * sizes(small)[kind]}
    small.run("triage", budgets=budgets)
    settings = {"budget": {"macs": "macs", "parameters": "params"}[kind], "target": 0.5, "fine_tune_steps": 0}
    small.run("restructure", **{**settings, "curve": [], **changes})
    return small.files("restructure")["plan.json"]


@pytest.mark.parametrize("kind", ["macs", "parameters"])
def test_an_exceeded_budget_is_met_though_the_setting_asks_for_less(small, kind: str) -> None:
    before = sizes(small)[kind]
    made(small, kind, 0.3, when="triage")
    assert 0.2 * before < small.read("restructure", "metrics.json")[kind] <= 0.3 * before


@pytest.mark.parametrize("kind", ["macs", "parameters"])
def test_the_setting_is_met_where_the_budget_asks_for_less_or_is_not_what_is_cut(small, kind: str) -> None:
    expected = made(small, kind, None, when="always")
    assert made(small, kind, 0.9, when="triage") == expected
    assert made(small, kind, 0.3, when="always") == expected
    # What the other budget asks for is not known in this one's measure.
    other = {"macs": "parameters", "parameters": "macs"}[kind]
    small.run("triage", budgets={**NONE, other: 0.3 * sizes(small)[other]})
    settings = {"budget": {"macs": "macs", "parameters": "params"}[kind], "target": 0.5}
    small.run("restructure", when="triage", fine_tune_steps=0, curve=[], **settings)
    assert small.files("restructure")["plan.json"] == expected


def test_a_budget_that_cannot_be_met_does_not_end_the_cycle(small) -> None:
    expected = made(small, "macs", None, when="always")
    assert made(small, "macs", 0.0001, when="triage") == expected
    why = small.read("restructure", "result.json")["why"]
    assert "; that cannot be met (macs=0.0001 cannot be reached, at most 90% of a layer may leave)" in why
    assert why.endswith("so restructure.target counts")


def test_a_target_that_cannot_be_met_is_a_mistake(small) -> None:
    with pytest.raises(RestructureError, match=r"macs=0\.0001 cannot be reached"):
        made(small, "macs", 0.5, when="triage", target=0.0001)


@pytest.mark.parametrize(("target", "allowed", "expected"), [(0.5, 0.2, 0.2), (0.2, 0.5, 0.2)])
def test_of_two_limits_of_latency_the_shorter_counts(
    small, monkeypatch: pytest.MonkeyPatch, target: float, allowed: float, expected: float
) -> None:
    asked = []
    monkeypatch.setattr(stage, "_made", lambda *given: asked.append(given[-1]))
    monkeypatch.setattr(stage, "_write", lambda *_: None)
    small.run("triage", budgets={**NONE, "latency_ms": 1e-9})
    path = small.workspace.out("triage") / "restructure.json"
    found = read_json(path)
    found["evidence"]["latency_ms"]["allowed"] = allowed
    write_json(path, found)
    group = type(small.params.group("restructure")).model_validate(
        {**small.params.group("restructure").model_dump(), "when": "triage", "budget": "latency_ms", "target": target}
    )
    stage.run(group, small.workspace)
    assert asked == [expected]


def test_levelling_is_asked_for_by_the_setting_and_said(small, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def level(model: Classifier, held_out: Dataset) -> dict[str, float]:
        asked.append((model_digest(model), len(held_out)))
        return {model.spec.classes[1]: 0.125}

    monkeypatch.setattr(sys.modules["nss.restructure"], "level_classes", level)
    made(small, "macs", None, when="always", level=False)
    assert asked == []
    made(small, "macs", None, when="always", level=True)
    model = load_model(small.workspace.out("restructure") / "model")
    held_out = len(known_data(small.workspace, model.spec.classes).split("val"))
    assert asked == [(model_digest(model), held_out)]
    assert small.read("restructure", "result.json")["offsets"] == {model.spec.classes[1]: 0.125}


def test_what_cannot_be_levelled_does_not_end_the_cycle(small) -> None:
    expected = made(small, "macs", None, when="always", level=False)
    assert made(small, "macs", None, when="always", level=True) == expected
    assert small.read("restructure", "result.json")["offsets"] == {}
