"""README.md and docs/ say what is true: commands exist, examples run, links lead somewhere.

`make run` and `make test` are only looked up here. `.ci/run` runs `make test` in a fresh environment, and the tests in
tests/e2e run the pipeline of `make run`.
"""

import importlib.util
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from dvc.cli import parse_args
from ruamel.yaml import YAML

from bench.__main__ import _parser
from flows.cli import app
from nss.ingest import demo

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "mlflow" / "README.md"]
# Commands that are not ours to check, beyond that we meant them.
OTHERS = {".", "cd", "curl", "dask", "docker", "export", "git", "mlflow", "pip", "prefect", "printf"}

BLOCK = re.compile(r"^( *)```(\w+)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`((?:make|nss|dvc) [a-z][^`]*)`")
BENCH = re.compile(r"`python -m (bench[^`]*)`")
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


def blocks(page: Path, *languages: str) -> list[str]:
    found = BLOCK.findall(page.read_text(encoding="utf-8"))
    return [
        re.sub(rf"^{indent}", "", text, flags=re.MULTILINE) for indent, language, text in found if language in languages
    ]


def commands(page: Path) -> list[list[str]]:
    """Every command in the page: lines of its shell blocks, and `make`, `nss` and `dvc` in running text."""
    text = BLOCK.sub("", page.read_text(encoding="utf-8"))
    lines = [line for block in blocks(page, "sh") for line in block.splitlines()]
    lines += INLINE.findall(text)
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def all_commands(program: str) -> list[str]:
    return sorted({shlex.join(words[1:]) for page in PAGES for words in commands(page) if words[0] == program})


def context(arguments: list[str]) -> typer.Context:
    """Parse as `nss` would, down to the last subcommand, without running anything."""
    command, parent, name = typer.main.get_command(app), None, "nss"
    while True:
        here = command.make_context(name, list(arguments), parent=parent)
        if not hasattr(command, "commands"):
            return here
        name, command, arguments = command.resolve_command(here, [*here._protected_args, *here.args])
        parent = here


def test_the_first_screen_has_the_two_commands() -> None:
    assert blocks(ROOT / "README.md", "sh")[0] == "make run\nmake demo\n"


def test_the_readme_says_what_it_is_in_three_sentences_before_a_picture() -> None:
    title, first, picture = (ROOT / "README.md").read_text(encoding="utf-8").split("\n\n")[:3]
    assert title == "# nss"
    assert len(re.findall(r"\.(?=\s|$)", re.sub(r"\]\([^)]*\)", "]", first))) == 3
    assert picture.startswith("![")
    assert (ROOT / LINK.findall(picture)[0]).is_file()


def test_every_page_of_docs_is_linked_from_the_readme() -> None:
    linked = {(ROOT / link).resolve() for link in LINK.findall((ROOT / "README.md").read_text(encoding="utf-8"))}
    assert [page.name for page in PAGES[1:] if page not in linked] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_relative_link_leads_to_a_file(page: Path) -> None:
    targets = [link.partition("#")[0] for link in LINK.findall(page.read_text(encoding="utf-8")) if "://" not in link]
    assert [target for target in targets if target and not (page.parent / target).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_command_is_one_that_is_checked_or_known(page: Path) -> None:
    assert {words[0] for words in commands(page)} <= {"make", "nss", "dvc"} | OTHERS
    assert {language for _, language, _ in BLOCK.findall(page.read_text(encoding="utf-8"))} <= {"sh", "python", "text"}


def make(*arguments: str) -> str:
    """What make prints, run as by a person, though these tests may themselves be run by make."""
    env = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}
    done = subprocess.run(["make", *arguments], cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("target", all_commands("make"))
def test_every_make_target_exists(target: str) -> None:
    make("--dry-run", *shlex.split(target))


def test_make_run_makes_the_data_and_runs_the_flow() -> None:
    assert re.search(r"nss data demo\n.*nss run\n$", make("--dry-run", "run"))


def test_make_alone_lists_all_targets_and_runs_none() -> None:
    targets = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    listed = [re.fullmatch(r"make (\w+) +\w.*", line) for line in make().splitlines()]
    assert all(listed)
    assert [line[1] for line in listed if line] == targets[1].split()


@pytest.mark.parametrize("line", all_commands("nss"))
def test_the_command_line_accepts_every_nss_command(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    parsed = context(shlex.split(line))
    assert parsed.command_path == "nss " + " ".join(shlex.split(line)[: len(parsed.command_path.split()) - 1])
    with pytest.raises(SystemExit) as ended:
        app([*parsed.command_path.split()[1:], "--help"], prog_name="nss")
    assert ended.value.code == 0
    assert "Usage: nss" in capsys.readouterr().out


@pytest.mark.parametrize("line", ["no-such-command", "run --no-such-option", "data add", "data add a b"])
def test_a_command_that_does_not_exist_is_noticed(line: str) -> None:
    with pytest.raises(Exception, match=r"(?i)no such|missing|unexpected"):
        context(shlex.split(line))


@pytest.mark.parametrize("line", all_commands("dvc"))
def test_dvc_accepts_every_dvc_command(line: str) -> None:
    arguments = parse_args(shlex.split(line))
    for setting in getattr(arguments, "set_param", None) or []:
        group, _, key = setting.partition("=")[0].partition(".")
        assert key in YAML(typ="safe").load(ROOT / "params.yaml")[group]
    known = {"data", "data.dvc", "champion", "champion.dvc", *YAML(typ="safe").load(ROOT / "dvc.yaml")["stages"]}
    assert set(getattr(arguments, "targets", None) or []) <= known


@pytest.mark.parametrize("line", sorted({line for page in PAGES for line in BENCH.findall(page.read_text("utf-8"))}))
def test_every_benchmark_that_is_named_exists_and_takes_these_options(
    line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, *arguments = shlex.split(line)
    if not arguments:
        assert importlib.util.find_spec(module)
        return
    monkeypatch.setattr(sys, "argv", ["bench", *arguments])
    assert _parser().parse_args().name == arguments[0]


def run_examples(page: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the page's Python blocks in a folder that holds the digits, all in one namespace."""
    demo(folder / "data")
    monkeypatch.chdir(folder)
    names: dict[str, object] = {}
    for block in blocks(page, "python"):
        exec(compile(block, page.name, "exec"), names)


@pytest.mark.parametrize("page", [page for page in PAGES[1:] if blocks(page, "python")], ids=lambda page: page.name)
def test_every_example_in_docs_runs_and_prints(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_examples(page, tmp_path, monkeypatch)
    assert capsys.readouterr().out.strip()


def test_the_example_in_the_readme_slices_a_model_that_has_learned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_examples(ROOT / "README.md", tmp_path, monkeypatch)
    *slices, accuracy, vote = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in slices] == ["slice-0", "slice-1", "slice-2", "slice-3"]
    assert sorted(digit for line in slices for digit in re.findall(r"'(\d)'", line)) == list("0123456789")
    sizes = [[int(size) for size in re.findall(r"(\d+) of (\d+)", line)[0]] for line in slices]
    assert all(0 < small < whole for small, whole in sizes)
    assert float(accuracy.split()[-1]) > 0.9
    # Ten categories by chance: 0.1.
    assert float(vote.split()[-1]) > 0.5
