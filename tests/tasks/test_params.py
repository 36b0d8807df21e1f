from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args

import pytest

from nss.critical import RULES
from nss.errors import ParamsError
from nss.extend import extend
from nss.gate import GateSettings
from nss.profile import METRICS
from nss.readapt import readapt
from nss.restructure import BUDGETS
from nss.slice import LINKAGES
from nss.triage import BUDGETS as SIZES
from nss.triage import TriageSettings
from tasks.params import Budget, Linkage, Metric, Rule, load_params

GOOD = {
    "base": "factory: nss.zoo:lenet; arguments: {}; packages: []; epochs: 3; batch_size: 64; "
    "learning_rate: 5e-2; weight_decay: 0; device: cpu; seed: 0",
    "profile": "metrics: [avg, taylor]; split: train; samples_per_class: null; batch_size: 128; windows: 4; "
    "device: auto; bf16: false; shards: 1; dask: null",
    "slice": "metric: taylor; rule: cumulative; threshold: 1; n_slices: null; distance_threshold: 0.5; "
    "linkage: average; layers: null",
    "triage": "alpha: 0.05; min_effect: 0.01; max_drop: 0.02; min_images: 30; min_class_images: 10; "
    "max_images: 1000; permutations: 999; "
    "budgets: {parameters: null, macs: 1.5e+6, bytes: null, latency_ms: null}; device: cpu; seed: 0",
    "restructure": "when: always; budget: macs; target: 0.5; cap: 0.9; multiple: 1; fine_tune_steps: 0; "
    "learning_rate: 1e-2; distil: true; level: true; curve: []; device: cuda; seed: 0",
    "readapt": "when: always; share: 0.2; guard: 3; learning_rate: 5e-3; epochs: 10; batch_size: 64; replay: 0; "
    "distil: 0; patience: 5; device: mps; seed: 0",
    "extend": "when: always; replay: 0.05; share: 0.7; width: 0.3; learning_rate: 5e-2; epochs: 3; batch_size: 64; "
    "weight_decay: 5e-4; device: auto; seed: 0",
    "evaluate": "split: test; batch_size: 500; device: cpu",
    "gate": "min_accuracy: 0.5; min_class_accuracy: 0.25; max_drop: 0.01; max_class_drop: 0.05; alpha: 0.05; "
    "min_saving: 0.05; min_images: 100",
    "register": "name: digits; promote: manual; commit: false",
}
"""{group: settings, as they stand in the file}"""
BUDGETS_ALLOWED = "parameters, macs, bytes, latency_ms"
NAME = "letters, digits, _, . and -"


def write(path: Path, changes: dict[str, str | None] | None = None) -> Path:
    """params.yaml with keys like "slice.threshold" set to a text, or left out for None."""
    groups = {group: dict(each.split(": ", 1) for each in keys.split("; ")) for group, keys in GOOD.items()}
    for name, value in (changes or {}).items():
        group, _, key = name.partition(".")
        if not key:
            groups.pop(group)
        elif value is None:
            groups[group].pop(key)
        else:
            groups[group][key] = value
    lines = [
        line for group, keys in groups.items() for line in (f"{group}:", *(f"  {k}: {v}" for k, v in keys.items()))
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def problems(path: Path) -> tuple[str, ...]:
    with pytest.raises(ParamsError) as caught:
        load_params(path)
    assert str(path) in str(caught.value)
    return caught.value.problems


def test_good_parameters_are_read_with_their_types(tmp_path: Path) -> None:
    params = load_params(write(tmp_path / "params.yaml"))
    # 5e-2 without a dot is a number for DVC's parser, and must be for ours.
    assert params.base.learning_rate == 0.05
    assert params.slice.threshold == 1.0
    assert params.profile.samples_per_class is None
    assert params.group("evaluate").model_dump() == {"split": "test", "batch_size": 500, "device": "cpu"}


@pytest.mark.parametrize(
    ("key", "value", "shown", "allowed"),
    [
        ("base.epochs", "0", "0", "a whole number from 1 to 10000"),
        ("base.epochs", "2.5", "2.5", "a whole number from 1 to 10000"),
        ("base.batch_size", "true", "True", "a whole number from 1 to 1000000"),
        ("base.learning_rate", "0", "0", "a number above 0, at most 100"),
        ("base.learning_rate", ".nan", "nan", "a number above 0, at most 100"),
        ("base.weight_decay", ".inf", "inf", "a number from 0 to 1"),
        ("base.seed", "'0'", "'0'", "a whole number from 0 to 4294967295"),
        ("base.factory", "nss.zoo.lenet", "'nss.zoo.lenet'", "module:callable, for example nss.zoo:vgg_small"),
        ("base.factory", "os:system; rm", "'os:system; rm'", "module:callable, for example nss.zoo:vgg_small"),
        ("base.arguments", "[1]", "[1]", "keyword arguments of the factory, as a mapping"),
        ("profile.metrics", "[]", "[]", "a list of some of avg, var, ens, taylor, deeplift"),
        ("profile.metrics", "taylor", "'taylor'", "a list of some of avg, var, ens, taylor, deeplift"),
        ("profile.split", "test", "'test'", "train or val"),
        ("profile.device", "tpu", "'tpu'", "auto, cpu, cuda or mps"),
        ("extend.device", "gpu", "'gpu'", "auto, cpu, cuda or mps"),
        ("profile.bf16", "1", "1", "true or false"),
        ("profile.shards", "0", "0", "a whole number from 1 to 10000"),
        ("profile.windows", "-1", "-1", "a whole number from 0 to 1000000: of one image in so many"),
        ("profile.dask", "localhost", "'localhost'", "address of a scheduler like tcp://host:8786, or null"),
        ("slice.layers", "[]", "[]", "a list of layers whose neurons decide about merging, or null for all"),
        ("profile.samples_per_class", "0", "0", "a whole number from 1, or null for all"),
        ("slice.rule", "cum", "'cum'", "cumulative, score, energy, category or global"),
        ("slice.threshold", "1.5", "1.5", "a number above 0, at most 1"),
        ("slice.threshold", "0", "0", "a number above 0, at most 1"),
        ("slice.n_slices", "1.0", "1.0", "a whole number from 1, or null"),
        ("slice.distance_threshold", "-0.1", "-0.1", "a number from 0 to 1, or null"),
        ("slice.linkage", "ward", "'ward'", "average, complete or single"),
        ("restructure.when", "sometimes", "'sometimes'", "always, never or triage"),
        ("readapt.when", "true", "True", "always, never or triage"),
        ("readapt.share", "0", "0", "a share above 0, at most 1: the most of all weights to train"),
        ("readapt.guard", "-1", "-1", "a number from 0 to 1000000: weight of the old behaviour"),
        ("readapt.patience", "0", "0", "a whole number from 1 to 10000"),
        ("readapt.replay", "1.5", "1.5", "a share from 0 to 1: of the old images, to train on again"),
        ("extend.when", "null", "None", "always, never or triage"),
        ("extend.replay", "-0.1", "-0.1", "a share from 0 to 1: of the old images, to train on again"),
        ("extend.share", "0", "0", "a share above 0, at most 1: of each layer, for the old classes"),
        ("extend.width", "1.5", "1.5", "a share above 0, at most 1: of each layer, for the new classes"),
        ("extend.epochs", "0", "0", "a whole number from 1 to 10000"),
        ("extend.weight_decay", ".inf", "inf", "a number from 0 to 1"),
        ("evaluate.split", "train", "'train'", "val or test"),
        ("triage.alpha", "1", "1", "a number above 0, below 1"),
        ("triage.min_effect", "-0.1", "-0.1", "a share from 0 to 1"),
        ("triage.min_images", "1", "1", "a whole number from 2 to 1000000000"),
        ("triage.min_class_images", "0", "0", "a whole number from 1 to 1000000000"),
        ("triage.permutations", "0", "0", "a whole number from 1 to 1000000"),
        ("triage.budgets", "null", "None", f"a mapping with the keys {BUDGETS_ALLOWED}"),
        ("gate.min_accuracy", "1.5", "1.5", "a share from 0 to 1"),
        ("gate.min_saving", "0", "0", "a share above 0, at most 1"),
        ("gate.alpha", "0", "0", "a number above 0, below 1"),
        ("gate.min_images", "0", "0", "a whole number from 1 to 1000000000"),
        ("register.promote", "always", "'always'", "manual or auto"),
        ("register.commit", "1", "1", "true or false"),
        *(
            ("register.name", name, repr(name.strip("'")), f"{NAME}: a name in MLflow's model registry")
            for name in ("a/b", "'a:1'", "'a@b'", "''", "a b", "-a")
        ),
    ],
)
def test_a_wrong_value_names_the_key_the_value_and_what_is_allowed(
    tmp_path: Path, key: str, value: str, shown: str, allowed: str
) -> None:
    found = problems(write(tmp_path / "params.yaml", {key: value}))
    assert found == (f"{key}: {shown} is not allowed; allowed: {allowed}",)


def test_a_wrong_item_of_a_list_is_named_by_its_place(tmp_path: Path) -> None:
    (problem,) = problems(write(tmp_path / "params.yaml", {"profile.metrics": "[taylor, vra]"}))
    assert (
        problem == "profile.metrics.1: 'vra' is not allowed; allowed: a list of some of avg, var, ens, taylor, deeplift"
    )


def test_an_unknown_key_names_the_closest_and_all_allowed_ones(tmp_path: Path) -> None:
    (problem,) = problems(write(tmp_path / "params.yaml", {"slice.treshold": "0.9"}))
    assert problem == (
        "slice.treshold: no such key (did you mean threshold?); allowed: "
        "metric, rule, threshold, n_slices, distance_threshold, linkage, layers"
    )


def test_an_unknown_key_like_no_other_gets_no_guess(tmp_path: Path) -> None:
    (problem,) = problems(write(tmp_path / "params.yaml", {"evaluate.zzz": "1"}))
    assert problem == "evaluate.zzz: no such key; allowed: split, batch_size, device"


def test_a_missing_key_and_a_missing_group_say_what_belongs_there(tmp_path: Path) -> None:
    found = problems(write(tmp_path / "params.yaml", {"slice.threshold": None, "evaluate": None}))
    assert found == (
        "slice.threshold: missing; allowed: a number above 0, at most 1",
        "evaluate: missing; allowed: a mapping with the keys split, batch_size, device",
    )


def test_all_mistakes_are_listed_at_once(tmp_path: Path) -> None:
    changes: dict[str, Any] = {"base.epochs": "0", "slice.rule": "x", "evaluate.split": "all"}
    assert [line.split(":")[0] for line in problems(write(tmp_path / "params.yaml", changes))] == list(changes)


def test_a_group_that_is_no_mapping_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "params.yaml", {"evaluate": None})
    path.write_text(path.read_text() + "evaluate: 3\n")
    assert problems(path) == ("evaluate: 3 is not allowed; allowed: a mapping with the keys split, batch_size, device",)


def test_a_metric_that_is_not_gathered_cannot_be_sliced_by(tmp_path: Path) -> None:
    (problem,) = problems(write(tmp_path / "params.yaml", {"slice.metric": "var"}))
    assert problem == "slice.metric: 'var' is not gathered; allowed: one of profile.metrics (avg, taylor)"


def test_two_ways_to_cut_the_tree_at_once_are_refused(tmp_path: Path) -> None:
    (problem,) = problems(write(tmp_path / "params.yaml", {"slice.n_slices": "4"}))
    assert problem == "slice: n_slices and distance_threshold are both given; allowed: one of them, the other null"


@pytest.mark.parametrize(
    ("budget", "target", "allowed"),
    [
        ("macs", "0", "a share above 0, at most 1"),
        ("params", "1.5", "a share above 0, at most 1"),
        ("max_accuracy_drop", "1.5", "a share from 0 to 1"),
        ("latency_ms", "0", "milliseconds above 0"),
    ],
)
def test_a_target_that_does_not_suit_its_budget_is_refused(
    tmp_path: Path, budget: str, target: str, allowed: str
) -> None:
    path, changes = tmp_path / "params.yaml", {"restructure.budget": budget, "restructure.target": target}
    (problem,) = problems(write(path, changes))
    assert problem == f"restructure.target: {float(target)} is not allowed for {budget}; allowed: {allowed}"
    suits = {"macs": "1", "params": "0.1", "max_accuracy_drop": "0", "latency_ms": "30"}[budget]
    assert load_params(write(path, {**changes, "restructure.target": suits})).restructure.target == float(suits)


@pytest.mark.parametrize(
    ("budgets", "problem"),
    [
        ("{macs: 1, bytes: 1, latency_ms: 1}", "parameters: missing; allowed: a number above 0, or null for any"),
        (
            "{parameters: 0, macs: 1, bytes: 1, latency_ms: 1}",
            "parameters: 0 is not allowed; allowed: a number above 0, or null for any",
        ),
        (
            "{parameters: 1, macs: .inf, bytes: 1, latency_ms: 1}",
            "macs: inf is not allowed; allowed: a number above 0, or null for any",
        ),
        (
            "{parameters: 1, macs: 1, bytes: 1, latency_ms: 1, zzz: 1}",
            f"zzz: no such key; allowed: {BUDGETS_ALLOWED}",
        ),
        (
            "{parameters: 1, macs: 1, bytes: 1, latency_ms: 1, maccs: 1}",
            f"maccs: no such key (did you mean macs?); allowed: {BUDGETS_ALLOWED}",
        ),
    ],
)
def test_a_mistake_within_a_group_of_a_group_is_named_by_its_whole_place(
    tmp_path: Path, budgets: str, problem: str
) -> None:
    assert problems(write(tmp_path / "params.yaml", {"triage.budgets": budgets})) == (f"triage.budgets.{problem}",)


def test_triage_cannot_look_at_fewer_images_than_it_needs(tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    assert problems(write(path, {"triage.max_images": "29"})) == (
        "triage.max_images: 29 is not allowed; allowed: from min_images (30)",
    )
    assert load_params(write(path, {"triage.max_images": "30"})).triage.max_images == 30


@pytest.mark.parametrize(("alpha", "fewest"), [("0.05", 39), ("0.3", 6), ("0.01", 199)])
def test_too_few_permutations_to_be_sure_are_refused_as_the_library_refuses_them(
    tmp_path: Path, alpha: str, fewest: int
) -> None:
    path, changes = tmp_path / "params.yaml", {"triage.alpha": alpha}
    found = problems(write(path, {**changes, "triage.permutations": str(fewest - 1)}))
    assert found == (f"triage.permutations: {fewest - 1} cannot reach half of alpha; allowed: from {fewest}",)
    with pytest.raises(ParamsError):
        TriageSettings(alpha=float(alpha), permutations=fewest - 1)
    assert load_params(write(path, {**changes, "triage.permutations": str(fewest)})).triage.permutations == fewest
    TriageSettings(alpha=float(alpha), permutations=fewest)


@pytest.mark.parametrize(
    ("group", "settings", "beside"), [("triage", TriageSettings, {"device"}), ("gate", GateSettings, set())]
)
def test_settings_of_a_decision_are_those_of_the_library(
    tmp_path: Path, group: str, settings: type, beside: set[str]
) -> None:
    given = load_params(write(tmp_path / "params.yaml")).group(group).model_dump()
    assert set(given) == {field.name for field in fields(settings)} | beside


def test_the_repositorys_settings_of_decisions_are_the_librarys_defaults_but_for_budgets() -> None:
    params = load_params(Path(__file__).resolve().parents[2] / "params.yaml")
    assert GateSettings(**params.gate.model_dump()) == GateSettings()
    assert TriageSettings(**params.triage.model_dump(exclude={"budgets", "device"})) == TriageSettings()
    assert set(params.triage.budgets.model_dump()) == set(SIZES)
    assert [params.restructure.when, params.readapt.when, params.extend.when] == ["triage"] * 3


def test_answers_of_the_original_without_images_to_answer_are_refused(tmp_path: Path) -> None:
    (problem,) = problems(write(tmp_path / "params.yaml", {"readapt.distil": "0.5"}))
    assert problem == "readapt.distil: 0.5 is not allowed without replay; allowed: 0, or a replay above 0"
    assert load_params(write(tmp_path / "params.yaml", {"readapt.distil": "0.5", "readapt.replay": "0.1"}))


def test_a_guard_needs_what_the_profile_gathers_for_it(tmp_path: Path) -> None:
    path, without = tmp_path / "params.yaml", {"profile.windows": "0"}
    (problem,) = problems(write(path, without))
    assert problem == (
        "profile.windows: 0 is not allowed with readapt.guard above 0, which needs them; allowed: from 1"
    )
    for change in ({"readapt.guard": "0"}, {"readapt.when": "never"}):
        assert load_params(write(path, {**without, **change})).profile.windows == 0


@pytest.mark.parametrize("verb", [readapt, extend])
def test_every_setting_of_a_verb_is_one_of_the_library(tmp_path: Path, verb: Callable[..., object]) -> None:
    known = inspect.signature(verb).parameters
    settings = load_params(write(tmp_path / "params.yaml")).group(verb.__name__).model_dump(exclude={"when", "device"})
    assert [name for name in settings if name not in known] == []


def test_a_metric_named_twice_is_refused(tmp_path: Path) -> None:
    (problem,) = problems(write(tmp_path / "params.yaml", {"profile.metrics": "[taylor, taylor]"}))
    assert problem == "profile.metrics: ['taylor', 'taylor'] names one twice; allowed: each once"


def test_a_key_written_twice_is_refused_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    path.write_text("base:\n  epochs: 1\n  epochs: 2\n")
    found = "\n".join(problems(path))
    assert 'found duplicate key "epochs" with value "2" (original value: "1")' in found
    assert "line 3" in found
    assert "http" not in found


@pytest.mark.parametrize("text", ["base: [", "a: b: c", "\tbase: 1"])
def test_broken_yaml_is_refused_with_the_place(tmp_path: Path, text: str) -> None:
    path = tmp_path / "params.yaml"
    path.write_text(text)
    assert any("line 1" in line for line in problems(path))


@pytest.mark.parametrize("text", ["", "- base\n", "3\n"])
def test_a_file_that_is_no_mapping_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "params.yaml"
    path.write_text(text)
    with pytest.raises(ParamsError, match=r"not a mapping of groups\n.*\n  allowed: base, profile, slice, triage"):
        load_params(path)


def test_what_is_allowed_is_what_nss_knows() -> None:
    assert get_args(Metric) == METRICS
    assert get_args(Rule) == tuple(RULES)
    assert get_args(Linkage) == LINKAGES
    assert get_args(Budget) == BUDGETS


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ParamsError, match=r"params.yaml is missing\n  where: .*params.yaml"):
        load_params(tmp_path / "params.yaml")


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    path.write_bytes(b"base: \xff\xfe")
    with pytest.raises(ParamsError, match="not readable"):
        load_params(path)
