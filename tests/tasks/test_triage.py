"""The stage `triage`, and what the maintenance stages make of its findings."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import pytest
from pydantic import ValidationError

from nss import latency
from nss.data import load_data
from nss.errors import ParamsError, StageError
from nss.latency import Latency
from nss.model import load_model, model_digest
from nss.size import count_macs, count_parameters
from nss.triage import BUDGETS, TriageSettings, triage
from tasks.params import TriageParams

VERBS = ("restructure", "readapt", "extend")


def budgets(**most: float) -> dict[str, float | None]:
    return {name: most.get(name) for name in ("parameters", "macs", "bytes", "latency_ms")}


def why(small, verb: str) -> str:
    return small.read("triage", f"{verb}.json")["why"]


def test_without_a_new_batch_and_within_its_budgets_a_model_needs_nothing(small) -> None:
    assert small.run("triage") == {"restructure": 0, "readapt": 0, "extend": 0}
    assert [why(small, verb) for verb in VERBS] == ["within its budgets", "no new images", "no new images"]


def test_findings_are_the_librarys_on_what_was_not_trained_on_and_all_that_arrived(small) -> None:
    small.add([0, 1, 2, 3] * 30, 1, negative=True, new_classes=("dog",))
    metrics = small.run("triage", max_images=50, seed=3)
    model = load_model(small.workspace.out("base") / "model")
    known, new = load_data(small.workspace.data).known_and_new(small.read("base", "source.json")["batches"])
    settings = TriageSettings(max_images=50, seed=3, budgets={"macs": 1_500_000})
    sizes = {"macs": count_macs(model)}
    found = triage(model, known.of_classes(model.spec.classes), new, sizes=sizes, settings=settings)
    for verb in VERBS:
        assert small.read("triage", f"{verb}.json") == asdict(getattr(found, verb))
    assert metrics == {"restructure": 0, "readapt": 1, "extend": 1}
    assert why(small, "extend") == "new classes: dog (30 images)"
    assert "features of the new images have drifted" in why(small, "readapt")


@pytest.mark.parametrize("name", ["parameters", "macs", "bytes"])
def test_a_size_above_its_budget_asks_for_restructuring(small, name: str) -> None:
    folder = small.workspace.out("base") / "model"
    model = load_model(folder)
    bytes_ = len((folder / "model.safetensors").read_bytes())
    size = {"parameters": count_parameters(model), "macs": count_macs(model), "bytes": bytes_}[name]
    assert small.run("triage", budgets=budgets(**{name: size}))["restructure"] == 0
    assert small.run("triage", budgets=budgets(**{name: size - 1}))["restructure"] == 1
    assert why(small, "restructure") == f"{name} {size:,} ({size - 1:,} allowed)"
    assert small.read("triage", "restructure.json")["evidence"] == {name: {"found": size, "allowed": size - 1}}


def test_latency_is_measured_only_where_it_has_a_budget(small, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def measured(model: object, batch_sizes: tuple[int, ...]) -> Latency:
        calls.append(batch_sizes)
        return Latency({64: 7.5}, {64: 9.0}, "cpu", 1, 30)

    monkeypatch.setattr(latency, "measure_latency", measured)
    small.run("triage")
    assert calls == []
    assert small.run("triage", budgets=budgets(latency_ms=7))["restructure"] == 1
    # A batch as restructure's budget means it: what it makes fast enough must be fast enough here.
    assert calls == [(64,)]
    assert why(small, "restructure") == "latency_ms 7.5 (7 allowed)"


def test_a_batch_that_arrives_leaves_the_finding_about_size_byte_for_byte(small) -> None:
    small.run("triage")
    before = small.files("triage")
    small.add([0, 1, 2] * 30, 1, negative=True)
    small.run("triage")
    after = small.files("triage")
    assert after["restructure.json"] == before["restructure.json"]
    assert after["readapt.json"] != before["readapt.json"]


def test_the_same_inputs_give_the_same_bytes_and_the_source_says_what_was_read(small) -> None:
    small.add([0, 1, 2] * 30, 1)
    small.run("triage")
    before = small.files("triage")
    small.run("triage")
    assert small.files("triage") == before
    known, new = load_data(small.workspace.data).known_and_new(small.read("base", "source.json")["batches"])
    model = model_digest(load_model(small.workspace.out("base") / "model"))
    assert small.read("triage", "source.json") == {"data": known.digest, "model": model, "new": new.digest}


def result(small, verb: str, **settings: Any) -> dict[str, Any]:
    small.run(verb, **settings)
    return small.read(verb, "result.json")


QUICK: dict[str, dict[str, Any]] = {
    "restructure": {"fine_tune_steps": 0, "curve": []},
    "readapt": {"epochs": 1},
    "extend": {"epochs": 1},
}


@pytest.mark.parametrize("verb", VERBS)
def test_with_triage_a_stage_does_what_is_needed_and_says_why_not(small, verb: str) -> None:
    small.run("triage")
    reason = {"restructure": "within its budgets"}.get(verb, "no new images")
    assert result(small, verb, when="triage", **QUICK[verb]) == {"done": False, "why": f"triage: {reason}"}
    assert small.read(verb, "metrics.json") == {"done": 0}
    small.add([0, 1, 2, 3] * 30, 1, negative=True, new_classes=("dog",))
    small.run("triage", budgets=budgets(macs=200_000))  # of 256,092
    assert result(small, verb, when="triage", **QUICK[verb])["done"] is True
    if verb == "restructure":
        assert small.read(verb, "result.json")["why"] == f"triage: {why(small, verb)}"


@pytest.mark.parametrize("verb", VERBS)
def test_always_and_never_ask_nobody(small, verb: str) -> None:
    small.add([0, 1, 2, 3] * 30, 1, new_classes=("dog",))
    assert result(small, verb, when="never") == {"done": False, "why": f"{verb}.when is never"}
    assert result(small, verb, when="always", **QUICK[verb])["done"] is True


@pytest.mark.parametrize(("verb", "is_refused"), [("restructure", False), ("readapt", True), ("extend", True)])
def test_findings_about_other_batches_are_refused_by_those_who_read_batches(small, verb: str, is_refused: bool) -> None:
    small.run("triage")
    small.add([0, 1, 2] * 30, 1)
    if is_refused:
        with pytest.raises(
            StageError, match=r"the stage 'triage' read another new .*\n(.*\n)*  fix: dvc repro .*triage"
        ):
            small.run(verb, when="triage")
        assert not small.workspace.out(verb).exists()
    else:
        assert small.run(verb, when="triage") == {"done": 0}


FREE = dict.fromkeys(BUDGETS)
PLAIN = {**asdict(TriageSettings()), "budgets": FREE}
SHARES = [-0.01, 0.0, 1e-9, 0.5, 1 - 1e-9, 1.0, 1.01, float("nan")]
TRIED = {
    "alpha": SHARES[:2] + SHARES[3:],
    "min_effect": SHARES,
    "max_drop": SHARES,
    "min_images": [-1, 1, 2, 3],
    "min_class_images": [-1, 0, 1, 2],
    **{f"budgets.{name}": [-1.0, 0.0, 1e-9, 5.0, float("nan"), float("inf")] for name in BUDGETS},
}


@pytest.mark.parametrize("name", TRIED)
def test_params_yaml_and_the_library_allow_the_same_values(name: str) -> None:
    """Both check, see test_gate.py. What depends on another value is in test_params.py."""
    allowed = {value: (in_params(name, value), in_library(name, value)) for value in TRIED[name]}
    assert {value: each for value, each in allowed.items() if each[0] is not each[1]} == {}
    assert {each[0] for each in allowed.values()} == {True, False}


def changed(name: str, value: float, budgets: dict[str, float | None]) -> dict[str, Any]:
    group, _, key = name.rpartition(".")
    return {**PLAIN, "budgets": {**budgets, key: value}} if group else {**PLAIN, "budgets": budgets, name: value}


def in_params(name: str, value: float) -> bool:
    try:
        TriageParams(**changed(name, value, FREE), device="cpu")
    except ValidationError:
        return False
    return True


def in_library(name: str, value: float) -> bool:
    try:
        TriageSettings(**changed(name, value, {}))
    except ParamsError:
        return False
    return True
