"""The names of design.md section 9, and what importing the package may not bring along."""

from __future__ import annotations

import inspect
import subprocess
import sys

import nss

# Names with the parameters that callers may pass by position or name; keyword arguments may be added.
SIGNATURES = {
    "build_model": ["factory", "classes", "input_shape", "seed"],
    "load_model": ["folder"],
    "save_model": ["model", "folder"],
    "load_data": ["path"],
    "train": ["model", "data", "epochs", "seed"],
    "profile": ["model", "data", "metrics", "samples_per_class"],
    "critical_neurons": ["profile", "metric", "rule", "threshold"],
    "semantic_slices": ["critical", "profile", "n_slices", "distance_threshold", "linkage"],
    "sliced": ["model", "neurons"],
    "remove": ["model", "neurons"],
    "evaluate": ["model", "data"],
    "evaluate_slices": ["slices", "models", "data"],
    "count_parameters": ["model"],
}


def test_the_verbs_have_the_names_and_parameters_that_were_fixed() -> None:
    for name, parameters in SIGNATURES.items():
        found = list(inspect.signature(getattr(nss, name)).parameters)
        assert [each for each in found if each in parameters] == parameters, name


def test_defaults_are_those_that_were_fixed() -> None:
    critical = inspect.signature(nss.critical_neurons).parameters
    assert [critical[name].default for name in ("metric", "rule", "threshold")] == ["deeplift", "score", 0.97]
    assert inspect.signature(nss.semantic_slices).parameters["linkage"].default == "average"
    assert set(inspect.signature(nss.profile).parameters["metrics"].default) >= {"avg", "var", "ens", "taylor"}


def test_everything_that_is_exported_exists_and_is_documented() -> None:
    assert len(set(nss.__all__)) == len(nss.__all__)
    assert set(SIGNATURES) <= set(nss.__all__)
    for name in nss.__all__:
        assert inspect.getdoc(getattr(nss, name)), name


def test_verbs_are_functions_and_not_hidden_by_their_modules() -> None:
    for name in SIGNATURES:
        assert inspect.isfunction(getattr(nss, name)), name


def test_importing_the_library_brings_no_orchestrator_tracker_or_clustering() -> None:
    code = "import sys, nss; print([m for m in sys.argv[1:] if m in sys.modules])"
    heavy = ["torch", "numpy", "prefect", "mlflow", "dvc", "typer", "sklearn", "matplotlib", "torchvision"]
    assert _printed(code, *heavy) == "[]"


def test_a_verb_is_a_function_after_its_module_was_imported_for_another_name() -> None:
    # The import of a module binds its name in the package, where the verb of the same name is meant.
    code = "import nss; from nss.profile import Profile; from nss.triage import Triage; print(nss.profile, nss.triage)"
    assert _printed(code).startswith("<function profile at ")
    assert " <function triage at " in _printed(code)
    assert _printed("import nss; from nss import gate; print(gate)").startswith("<module 'nss.gate'")


def _printed(code: str, *arguments: str) -> str:
    run = subprocess.run([sys.executable, "-c", code, *arguments], check=True, capture_output=True, text=True)
    return run.stdout.strip()
