"""The walls: what must hold everywhere in the repository, whoever adds to it."""

import ast
import importlib
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from ruamel.yaml import YAML

ROOT = Path(__file__).resolve().parent.parent
FOREIGN = ("prefect", "mlflow", "dvc", "typer", "click", "rich")
LONGEST = 400

# An absolute path on somebody's machine: a home folder, a checkout.
MACHINE_PATH = re.compile(r"(?<![\w.~])(?:/(?:home|Users|root|work)/[\w.]|[A-Z]:\\Users\\)")
PICKLES = {"pickle", "cloudpickle", "dill", "joblib", "_pickle"}
BAD_CODE = [
    "import pickle\npickle.load(file)",
    "import cloudpickle as cp\ncp.loads(b'')",
    "from pickle import loads",
    "pickle.Unpickler(file).load()",
    "torch.load(path)",
    "torch.load(path, weights_only=False)",
    "numpy.load(path, allow_pickle=True)",
    "pandas.read_pickle(path)",
]
GOOD_CODE = [
    "import pickle\npickle.dumps(1)",
    "torch.load(path, weights_only=True)",
    "numpy.load(path, allow_pickle=False)",
    "json.load(file)",
    "nss.load_model(folder)",
]


def tracked() -> list[Path]:
    """What git tracks or would track: everything that it does not ignore."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [path for name in sorted(set(listed.split("\0"))) if name and (path := ROOT / name).is_file()]


def sources() -> list[Path]:
    return [path for path in tracked() if path.suffix == ".py"]


def names(paths: list[Path]) -> list[str]:
    return [str(path.relative_to(ROOT)) for path in paths]


def python(code: str, cwd: Path = ROOT) -> dict:
    """Run code that prints one JSON object in an interpreter of its own, which looks in `cwd` first."""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def unpickling(code: str) -> list[str]:
    """Places where code may run what a file says: loads of the pickle family, and switches that allow it."""
    tree, found = ast.parse(code), []
    aliases = {
        alias.asname or alias.name: alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.Import)
        for alias in node.names
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module in PICKLES:
            loads = [alias.name for alias in node.names if alias.name not in ("dump", "dumps", "PickleError")]
        elif isinstance(node, ast.Attribute):
            owner = aliases.get(ast.unparse(node.value), ast.unparse(node.value))
            is_load = owner in PICKLES and node.attr in ("load", "loads", "Unpickler")
            loads = [f"{owner}.{node.attr}"] if is_load or node.attr == "read_pickle" else []
        elif isinstance(node, ast.Call):
            switches = {word.arg: ast.unparse(word.value) for word in node.keywords}
            called = ast.unparse(node.func)
            is_open = called == "torch.load" and switches.get("weights_only") != "True"
            loads = [called] if is_open or switches.get("allow_pickle", "False") != "False" else []
        else:
            continue
        found += [f"line {node.lineno}: {name}" for name in loads]
    return found


def test_the_folder_mlflow_is_no_package() -> None:
    inside = [path for path in tracked() if (ROOT / "mlflow") in path.parents]
    assert inside, "mlflow/ should hold the settings of the tracking store"
    assert [name for name in names(inside) if name.endswith(".py")] == []
    assert not (ROOT / "mlflow" / "__init__.py").exists()


def test_no_folder_of_tests_hides_mlflow() -> None:
    assert not (ROOT / "tests" / "mlflow").exists()


def is_real(file: str | None) -> bool:
    """Say whether this is the file of an installed package; a folder without __init__.py has none."""
    return file is not None and "site-packages" in Path(file).parts


def test_import_mlflow_is_the_real_package_under_pytest() -> None:
    module = importlib.import_module("mlflow")
    assert is_real(module.__file__)
    assert callable(module.start_run)


def test_import_mlflow_is_the_real_package_under_python_m_pytest() -> None:
    test = f"{Path(__file__)}::{test_import_mlflow_is_the_real_package_under_pytest.__name__}"
    command = [sys.executable, "-m", "pytest", "-q", "--noconftest", "-p", "no:cacheprovider", test]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 passed" in done.stdout


# What an import would find; importing it would take seconds.
_FIND = "import importlib.util, json; print(json.dumps({'file': importlib.util.find_spec('mlflow').origin}))"
_RUN_CLI = """
import runpy, sys
sys.argv = ["nss", "--help"]
try:
    runpy.run_module("flows.cli", run_name="__main__", alter_sys=True)
except SystemExit:
    pass
"""


@pytest.mark.parametrize(
    ("start", "code"),
    [(".", _FIND), ("flows", _FIND), (".", f"{_RUN_CLI}\n{_FIND}")],
    ids=["from the root", "from flows/", "by python -m flows.cli"],
)
def test_import_mlflow_is_the_real_package(start: str, code: str) -> None:
    assert is_real(python(code, cwd=ROOT / start)["file"])


def test_nss_imports_no_orchestrator_tracker_or_command_line_library() -> None:
    code = f"""
import importlib, json, pkgutil, sys, nss
found = [module.name for module in pkgutil.iter_modules(nss.__path__, "nss.")]
for name in found:
    importlib.import_module(name)
print(json.dumps({{"modules": found, "foreign": [name for name in {FOREIGN!r} if name in sys.modules]}}))
"""
    seen = python(code)
    assert "nss.profile" in seen["modules"]
    assert seen["foreign"] == []


def test_the_import_contracts_say_what_the_design_says() -> None:
    config = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    layers, forbidden = config["contracts"]
    assert layers["type"] == "layers"
    assert layers["layers"] == ["flows", "tasks", "nss"]
    assert forbidden["type"] == "forbidden"
    assert forbidden["source_modules"] == ["nss"]
    assert set(FOREIGN) <= set(forbidden["forbidden_modules"])
    assert not any("ignore_imports" in contract for contract in config["contracts"])


def test_the_import_contracts_hold() -> None:
    command = [str(Path(sys.executable).parent / "lint-imports"), "--no-cache"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 broken" in done.stdout


def test_no_file_names_a_path_of_a_machine() -> None:
    found = [
        f"{path.relative_to(ROOT)}: {line.strip()[:80]}"
        for path in tracked()
        for line in path.read_text(encoding="utf-8", errors="ignore").splitlines()
        if MACHINE_PATH.search(line)
    ]
    assert found == []


@pytest.mark.parametrize("folder", ["home", "Users", "root", "work"])
def test_a_path_of_a_machine_is_recognised(folder: str) -> None:
    assert MACHINE_PATH.search(f'data = "/{folder}/somebody/data"')
    assert not MACHINE_PATH.search(f"https://example.org/{folder}/x, docs/{folder}/x, ~/{folder}/x, net{folder}/x")


def test_no_file_unpickles() -> None:
    found = {str(path.relative_to(ROOT)): unpickling(path.read_text(encoding="utf-8")) for path in sources()}
    assert {name: places for name, places in found.items() if places} == {}


@pytest.mark.parametrize("code", BAD_CODE)
def test_unpickling_is_recognised(code: str) -> None:
    assert unpickling(code)


@pytest.mark.parametrize("code", GOOD_CODE)
def test_safe_code_is_not_taken_for_unpickling(code: str) -> None:
    assert not unpickling(code)


def test_no_source_file_is_too_long() -> None:
    lines = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in sources()}
    assert len(lines) > 10
    assert {str(path.relative_to(ROOT)): count for path, count in lines.items() if count > LONGEST} == {}


def stages() -> dict[str, dict]:
    return YAML(typ="safe").load(ROOT / "dvc.yaml")["stages"]


@pytest.mark.parametrize("verb", stages())
def test_a_stage_has_a_file_in_nss_and_in_tasks_a_group_of_parameters_and_a_test(verb: str) -> None:
    params = YAML(typ="safe").load(ROOT / "params.yaml")
    assert stages()[verb]["cmd"] == f"nss stage {verb}"
    assert stages()[verb]["params"] == [verb]
    assert isinstance(params[verb], dict)
    wanted = [f"nss/{verb}.py", f"tasks/{verb}.py", f"tests/nss/test_{verb}.py"]
    assert [name for name in wanted if not (ROOT / name).is_file()] == []


def test_every_verb_is_a_stage() -> None:
    files = [{path.stem for path in (ROOT / folder).glob("*.py")} for folder in ("nss", "tasks")]
    # The data set is versioned by data.dvc, not made by a stage.
    verbs = set.intersection(*files) - {"__init__", "data"}
    assert (ROOT / "data.dvc").is_file()
    assert verbs == set(stages())


def test_every_group_of_parameters_belongs_to_a_stage() -> None:
    # What becomes of a model that the gate promotes is no stage: it has effects outside.
    assert set(YAML(typ="safe").load(ROOT / "params.yaml")) == {*stages(), "register"}
