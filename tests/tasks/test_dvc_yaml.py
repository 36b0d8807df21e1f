"""dvc.yaml against the sources: a stage depends on exactly the code that it runs."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from tasks import params
from tasks.params import load_params

ROOT = Path(__file__).resolve().parents[2]
DVC = YAML(typ="safe").load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))
STAGES = DVC["stages"]
# They decide where things lie, whether settings are allowed and what is logged: nothing in a stage's outputs.
PLUMBING = {"tasks/params.py", "tasks/workspace.py"}


def imported(source: str) -> set[str]:
    """Names of modules that a source imports when it runs, at its top or inside functions."""
    names: set[str] = set()
    for node in running(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def running(node: ast.AST) -> Iterator[ast.AST]:
    """Walk over all nodes but those under `if TYPE_CHECKING:`."""
    yield node
    for child in ast.iter_child_nodes(node):
        if not (isinstance(child, ast.If) and isinstance(child.test, ast.Name) and child.test.id == "TYPE_CHECKING"):
            yield from running(child)


def closure(root: Path, start: str) -> set[str]:
    """Files under nss/ and tasks/ that `start` reaches, itself included, plumbing and package __init__ left out."""
    found: set[str] = set()
    waiting = [start]
    while waiting:
        path = waiting.pop()
        if path in found or path in PLUMBING:
            continue
        found.add(path)
        for name in imported((root / path).read_text(encoding="utf-8")):
            file = name.replace(".", "/") + ".py"
            if name.split(".")[0] in ("nss", "tasks") and (root / file).is_file():
                waiting.append(file)
    # Factories are imported by name: the zoo's are ours.
    return found | ({"nss/zoo.py"} if "nss/model.py" in found else set())


@pytest.mark.parametrize("verb", STAGES)
def test_a_stage_depends_on_exactly_the_code_it_runs(verb: str) -> None:
    listed = {dep for dep in STAGES[verb]["deps"] if dep.endswith(".py")}
    needed = closure(ROOT, f"tasks/{verb}.py")
    assert sorted(needed - listed) == [], "dvc.yaml lacks these"
    assert sorted(listed - needed) == [], "dvc.yaml lists these, which the stage does not run"


def test_stages_have_a_params_group_a_command_and_an_output_of_their_name() -> None:
    names = ["base", "profile", "slice", "triage", "restructure", "readapt", "extend", "evaluate", "gate"]
    assert list(STAGES) == list(params.STAGES) == names
    assert list(params.Params.model_fields) == [*names, "register"]
    for verb, stage in STAGES.items():
        assert (stage["cmd"], stage["params"], stage["outs"]) == (f"nss stage {verb}", [verb], [f"artifacts/{verb}"])


def test_the_module_behind_slice_is_no_dependency_of_what_comes_before() -> None:
    readers = [verb for verb in STAGES if "nss/slice.py" in STAGES[verb]["deps"]]
    assert readers == ["slice", "restructure", "readapt", "extend", "evaluate"]


def test_what_reads_known_batches_only_depends_on_their_names_and_not_on_all_data() -> None:
    assert [verb for verb in STAGES if "data" in STAGES[verb]["deps"]] == [
        "base",
        "triage",
        "readapt",
        "extend",
        "evaluate",
    ]
    readers = list(STAGES)[1:-1]
    assert [verb for verb in STAGES if "artifacts/base/source.json" in STAGES[verb]["deps"]] == readers
    assert [verb for verb in STAGES if "champion.json" in STAGES[verb]["deps"]] == ["base"]
    assert [verb for verb in STAGES if "artifacts/base/champion.json" in STAGES[verb]["deps"]] == ["evaluate"]


def test_each_maintenance_reads_its_own_finding_and_restructuring_nothing_else_of_triage() -> None:
    def found(verb: str) -> list[str]:
        return [dep for dep in STAGES[verb]["deps"] if dep.startswith("artifacts/triage")]

    assert found("restructure") == ["artifacts/triage/restructure.json"]
    for verb in ("readapt", "extend"):
        assert found(verb) == [f"artifacts/triage/{verb}.json", "artifacts/triage/source.json"]
    assert [verb for verb in STAGES if found(verb)] == ["restructure", "readapt", "extend"]


def test_the_gate_reads_what_was_measured_and_nothing_else() -> None:
    assert [dep for dep in STAGES["gate"]["deps"] if not dep.endswith(".py")] == ["artifacts/evaluate/candidates.json"]


def test_every_table_and_figure_that_dvc_shows_is_an_output_of_a_stage() -> None:
    shown = [*DVC["metrics"], *(file for plot in DVC["plots"] for each in plot.values() for file in each["y"])]
    outs = [out for stage in STAGES.values() for out in stage["outs"]]
    assert [file for file in shown if file.rpartition("/")[0] not in outs] == []
    assert DVC["metrics"] == [f"{out}/metrics.json" for out in outs]


def test_what_stands_in_params_yaml_is_allowed() -> None:
    assert load_params(ROOT / "params.yaml").base.factory == "nss.zoo:vgg_small"


def test_the_closure_follows_imports_in_functions_and_leaves_out_types_and_plumbing(tmp_path: Path) -> None:
    files = {
        "tasks/x.py": "from nss.a import f\nfrom tasks.params import P\nimport json\n",
        "nss/a.py": "if TYPE_CHECKING:\n    from nss.c import C\ndef f():\n    import nss.b\n",
        "nss/b.py": "from nss import d\n",
        "nss/c.py": "",
        "nss/d.py": "",
        "nss/__init__.py": "from nss.c import C\n",
        "tasks/params.py": "import nss.c\n",
    }
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    assert closure(tmp_path, "tasks/x.py") == {"tasks/x.py", "nss/a.py", "nss/b.py", "nss/d.py"}
