"""The stage `gate`: verdicts from what the evaluation wrote down."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from nss.compare import Comparison, Pairs, Score
from nss.errors import ParamsError, StageError
from nss.files import read_json, write_json
from nss.gate import Candidate, GateSettings, decide
from tasks import gate
from tasks.params import GateParams
from tasks.workspace import Workspace

PARAMS = GateParams(
    min_accuracy=0.5,
    min_class_accuracy=0.25,
    max_drop=0.01,
    max_class_drop=0.05,
    alpha=0.05,
    min_saving=0.05,
    min_images=100,
)
SIZE = {"parameters": 100, "macs": 1000, "bytes": 400}
HALF = {"parameters": 50, "macs": 500, "bytes": 200}


def comparison(pairs: Pairs, new: dict[str, Score] | None = None) -> Comparison:
    per_class = {"a": pairs} if pairs.images else {}
    return Comparison(pairs, per_class, {}, new or {}, pairs.interval(), 0.95)


def made(candidate: Candidate, **more: Any) -> dict[str, Any]:
    """What the stage `evaluate` writes about a candidate."""
    comparisons = {name: getattr(candidate, name) for name in ("known", "arrived")}
    plain = {name: getattr(candidate, name) for name in ("verb", "images", "accuracy", "per_class")}
    sizes = {name: dict(getattr(candidate, name)) for name in ("size", "champion_size")}
    digests = {"model": f"{candidate.verb}-model", "parent": "base-model", "batches": ["b1"], **more}
    return {**plain, **{name: each and each.to_dict() for name, each in comparisons.items()}, **sizes, **digests}


SMALLER = Candidate(
    "restructure", 200, 0.9, {"a": 0.85, "b": 0.95}, comparison(Pairs(200, 178, 2, 2)), None, HALF, SIZE
)
WORSE = Candidate("readapt", 200, 0.6, {"a": 0.6}, comparison(Pairs(200, 118, 62, 2)), None, SIZE, SIZE)
LEARNED = Candidate(
    "extend",
    260,
    0.9,
    {"a": 0.9, "d": 0.5},
    comparison(Pairs(200, 180, 0, 0)),
    comparison(Pairs(0, 0, 0, 0), {"d": Score(60, 30)}),
    SIZE,
    SIZE,
)
BASE = Candidate("base", 200, 0.9, {"a": 0.9}, size=SIZE)


@pytest.fixture
def workspace(tmp_path) -> Workspace:
    return Workspace(tmp_path)


def judged(workspace: Workspace, *candidates: dict[str, Any], **changes: Any) -> dict[str, Any]:
    write_json(workspace.out("evaluate") / "candidates.json", list(candidates))
    gate.run(GateParams(**{**PARAMS.model_dump(), **changes}), workspace)
    return read_json(workspace.out("gate") / "gate.json")


def metrics(workspace: Workspace) -> dict[str, int]:
    return read_json(workspace.out("gate") / "metrics.json")


def test_the_decision_is_the_librarys_on_what_was_written_down(workspace: Workspace) -> None:
    found = judged(workspace, *map(made, (SMALLER, WORSE)))
    expected = decide([SMALLER, WORSE], GateSettings(**PARAMS.model_dump())).to_dict()
    assert {name: found[name] for name in ("verdict", "promoted")} == {"verdict": "PROMOTE", "promoted": "restructure"}
    assert [(each["verb"], each["verdict"]) for each in found["judgements"]] == [
        ("readapt", "REJECT"),
        ("restructure", "PROMOTE"),
    ]
    for each, judgement in zip(found["judgements"], expected["judgements"], strict=True):
        assert each["reasons"] == list(judgement["reasons"])
    assert metrics(workspace) == {"promoted": 1, "candidates": 2, "held": 0, "rejected": 1}


def test_who_registers_a_model_finds_what_it_is_and_flat_figures(workspace: Workspace) -> None:
    found = judged(workspace, made(SMALLER, model="m2", parent="m1", batches=["b1", "b2"]))["candidates"]
    assert found == {
        "restructure": {
            "model": "m2",
            "parent": "m1",
            "batches": ["b1", "b2"],
            "figures": {
                "images": 200,
                "accuracy": 0.9,
                "worst_class_accuracy": 0.85,
                "known_accuracy": 0.9,
                "known_difference": 0.0,
                "known_p_value": 1.0,
                "parameters": 50,
                "macs": 500,
                "bytes": 200,
            },
        }
    }


def test_figures_that_no_image_tells_lack(workspace: Workspace) -> None:
    figures = judged(workspace, made(LEARNED))["candidates"]["extend"]["figures"]
    assert figures["arrived_new_classes_accuracy"] == 0.5
    assert [name for name in figures if name.startswith("arrived")] == ["arrived_new_classes_accuracy"]
    missing = judged(workspace, {**made(BASE, parent=None), "accuracy": None})
    assert "accuracy" not in missing["candidates"]["base"]["figures"]
    assert missing["verdict"] == "REJECT"


def test_a_base_model_has_sizes_though_there_is_no_champion_to_be_smaller_than(workspace: Workspace) -> None:
    found = judged(workspace, made(BASE, parent=None))
    assert (found["verdict"], found["promoted"]) == ("PROMOTE", "base")
    assert found["candidates"]["base"]["parent"] is None
    assert found["candidates"]["base"]["figures"]["macs"] == 1000


def test_without_a_candidate_the_champion_stays(workspace: Workspace) -> None:
    found = judged(workspace)
    assert found == {"verdict": "HOLD", "promoted": None, "judgements": [], "candidates": {}}
    assert metrics(workspace) == {"promoted": 0, "candidates": 0, "held": 0, "rejected": 0}


def test_settings_decide(workspace: Workspace) -> None:
    assert judged(workspace, made(SMALLER), min_images=201)["verdict"] == "HOLD"
    assert metrics(workspace) == {"promoted": 0, "candidates": 1, "held": 1, "rejected": 0}
    assert judged(workspace, made(SMALLER), min_saving=0.6)["verdict"] == "REJECT"
    assert judged(workspace, made(SMALLER), min_class_accuracy=0.9)["verdict"] == "REJECT"


def test_the_same_candidates_give_the_same_bytes_and_others_another_source(workspace: Workspace) -> None:
    def files() -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in workspace.out("gate").iterdir()}

    judged(workspace, made(SMALLER))
    before = files()
    judged(workspace, made(SMALLER))
    assert files() == before
    judged(workspace, made(SMALLER, model="other"))
    assert files()["source.json"] != before["source.json"]


def test_without_an_evaluation_nothing_is_decided(workspace: Workspace) -> None:
    with pytest.raises(StageError, match=r"the file is missing\n  where: .*evaluate/candidates.json"):
        gate.run(PARAMS, workspace)
    assert not workspace.out("gate").exists()


@pytest.mark.parametrize("name", GateParams.model_fields)
def test_params_yaml_and_the_library_allow_the_same_values(name: str) -> None:
    """Both check: params.yaml names the key and what is allowed, and whoever calls the library has no params.yaml."""
    whole = name == "min_images"
    tried = [-1, 0, 1, 2] if whole else [-0.01, 0.0, 1e-9, 0.5, 1 - 1e-9, 1.0, 1.01, float("nan"), float("inf")]
    allowed = {value: (is_allowed(GateParams, name, value), is_allowed(GateSettings, name, value)) for value in tried}
    assert {value: each for value, each in allowed.items() if each[0] is not each[1]} == {}
    assert {each[0] for each in allowed.values()} == {True, False}


def is_allowed(kind: type, name: str, value: float) -> bool:
    try:
        kind(**{**PARAMS.model_dump(), name: value})
    except (ValidationError, ParamsError):
        return False
    return True
