"""A workspace in a repository of the user's own: what `nss init` lays out, and which code its stages depend on.

In nss's own repository a stage lists the files that it runs. In another one they lie wherever Python keeps packages, so
a committed file, nss-code.yaml, holds one digest of them for each stage instead: an upgrade of nss that changes what a
stage runs is a change of that file, and the stage is run again. So is a change of the user's own modules.
"""

from __future__ import annotations

import hashlib
import io
import logging
import shutil
import subprocess
from collections.abc import Iterable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dvc.exceptions import DvcException
from dvc.repo import Repo
from pydantic import ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from nss.errors import StageError, first_line
from nss.files import replacing, write_json
from tasks.own_code import own_code
from tasks.params import RegisterParams
from tasks.workspace import Workspace

CODE = "nss-code.yaml"
# DVC says on stdout that it made a repository, and what git should be told: `nss init` says that itself.
logging.getLogger("dvc").setLevel(logging.WARNING)

_HEADER = """\
# Laid out by `nss init`; yours to change. params.yaml holds the settings of each stage. nss-code.yaml says which code
# each stage runs; `nss run` brings it up to date when another version of nss is installed or your own modules change.
"""
_CODE_HEADER = "# A digest of the code that each stage runs. Commit it; `nss run` keeps it up to date.\n"
_IGNORED = (
    "__pycache__/",
    "/data",
    "/champion",
    "/.data.lock",
    "/artifacts/",
    "/inbox/",
    "/dvc_plots/",
    "/report/",
    "mlflow/tracking.db*",
    "mlflow/.lock",
    "mlflow/artifacts/",
    "mlflow/ledger.jsonl*",
)
# What suits the digits of nss's own repository only: data of fewer classes than it has slices cannot be sliced.
_DIGITS_ONLY = (
    *(f"triage.budgets.{name}" for name in ("parameters", "macs", "bytes", "latency_ms")),
    "slice.n_slices",
)
# Of a line of params.yaml: none is broken.
_WIDE = 4096
_DVC_CONFIG = "[core]\n    analytics = false\n    autostage = false\n"
_DVC_IGNORED = ("__pycache__", "*.pyc")
_FILES = (".dvc/config", ".dvcignore", ".gitignore", "champion.json", "dvc.yaml", CODE, "params.yaml")
# What DVC refuses to work with where git ignores it, and what a clone needs.
_TRACKED = (
    *(".dvc/config", "dvc.yaml", "dvc.lock", "data.dvc", "champion.dvc"),
    *("champion.json", CODE, "params.yaml"),
)
# Folders that hold nss's own files, and what tells them from somebody else's of that name.
_OWN_FOLDERS = {"data": "dataset.json", "champion": "model.json"}
_FOLDERS = (".dvc", "inbox", *_OWN_FOLDERS)
_NAMED = 3


@dataclass(frozen=True)
class LaidOut:
    """What `lay_out` made. files: those written or added to, by their paths within the workspace."""

    workspace: Workspace
    files: tuple[str, ...]
    is_new_repository: bool
    """whether git had to be told to version this folder"""


def lay_out(root: Path, name: str = "") -> LaidOut:
    """Make `root` a workspace: stages, settings, an empty pin, an inbox, and what git and DVC are to leave alone.

    name: of the model in the registry; by default the folder's, with - for what such a name may not hold. A file
    .gitignore or .dvcignore that is there gets the lines that it lacks.

    Raises StageError, with nothing changed, when the name is not allowed, `root` is a workspace already, is no folder,
    cannot be written, holds a data/ or champion/ that is not nss's or has ignore files that nss cannot work with, or
    git is not installed.

    >>> lay_out(Path("cats"), "cats").files  # doctest: +SKIP
    ('.dvc/config', '.dvcignore', '.gitignore', 'champion.json', 'dvc.yaml', 'nss-code.yaml', 'params.yaml')
    """
    name = _model_name(name, root.name)
    try:
        _require_free(root)
        with _whole_or_nothing(root):
            return LaidOut(Workspace(root), _FILES, _write_all(root, name))
    except (OSError, UnicodeDecodeError, DvcException) as error:
        raise StageError(
            f"the workspace cannot be laid out ({getattr(error, 'strerror', None) or first_line(error)})",
            where=str(getattr(error, "filename", None) or root),
            allowed="a folder that you may write to, or a new one",
        ) from error


def _model_name(given: str, folder: str) -> str:
    # The command gives the folder's name where the user gave none.
    if given not in ("", folder):
        if not _is_name(given):
            allowed = RegisterParams.model_fields["name"].description or ""
            raise StageError(f"the name {given!r} is not allowed", where="--name", allowed=allowed)
        return given
    fitting = "".join(each if _is_name(f"a{each}") else "-" for each in folder)
    return fitting.lstrip(".-") or "model"


def _is_name(name: str) -> bool:
    try:
        RegisterParams(name=name, promote="manual", commit=False)
    except ValidationError:
        return False
    return True


def _require_free(root: Path) -> None:
    there = [each for each in ("dvc.yaml", "params.yaml", "champion.json", CODE) if (root / each).exists()]
    there += [f"a file {each}" for each in _FOLDERS if (root / each).is_file()]
    if there:
        raise StageError(
            f"the folder holds {', '.join(there)} already",
            where=str(root),
            fix="choose another folder, or move them away: nothing is overwritten",
        )
    for name, mark in _OWN_FOLDERS.items():
        _require_own(root / name, mark)


def _require_own(folder: Path, mark: str) -> None:
    """Refuse a folder of the user's that has the name of one of nss's: git would ignore it, and nss not read it."""
    held = sorted(each.name for each in folder.iterdir()) if folder.is_dir() else []
    if held and mark not in held:
        # DVC versions no folder of whose files git still knows.
        move = "git mv" if _run_git(folder.parent, "ls-files", folder.name).stdout else "mv"
        other, add = ("photos", " and `nss data add photos`") if folder.name == "data" else ("my-champion", "")
        raise StageError(
            f"{folder.name}/ holds {', '.join(held[:_NAMED])}{', ...' if held[_NAMED:] else ''}",
            where=str(folder),
            allowed=f"nothing, or what nss keeps there, with a file {mark}",
            fix=f"give it another name: `{move} {folder.name} {other}`, then `nss init`{add}",
        )


@contextmanager
def _whole_or_nothing(root: Path) -> Iterator[None]:
    """Take back what the block has written below `root`, and `root` if it is new, when the block fails."""
    # DVC stages what it writes: git's index is put back too.
    changed = [root / ".gitignore", root / ".dvcignore", *_index(root)]
    places = [*reversed(root.parents), root, *(root / name for name in (".git", ".dvc", "inbox", *_FILES)), *changed]
    new = [place for place in places if not place.exists()]
    kept = {place: place.read_bytes() for place in changed if place.is_file()}
    try:
        yield
    except BaseException:
        for place in new:
            with suppress(OSError):
                shutil.rmtree(place) if place.is_dir() else place.unlink()
        for place, content in kept.items():
            place.write_bytes(content)
        raise


def _index(root: Path) -> list[Path]:
    """Return git's list of what it tracks, where the folder lies in a repository."""
    there = next(each for each in (root, *root.parents) if each.is_dir())
    found = _run_git(there, "rev-parse", "--git-path", "index")
    return [] if found.returncode else [there / found.stdout.rstrip("\n")]


def _write_all(root: Path, name: str) -> bool:
    """Write the files of a workspace. Returns whether git had to be told to version the folder."""
    root.mkdir(parents=True, exist_ok=True)
    for each in (".gitignore", ".dvcignore"):
        _text(root / each)
    is_new = _version(root)
    template = _template()
    _write(root / "params.yaml", (template / "params.yaml").read_text(encoding="utf-8"))
    set_params(root / "params.yaml", {**dict.fromkeys(_DIGITS_ONLY), "register.name": name})
    _write(root / CODE, _CODE_HEADER + _yaml(code_digests(Workspace(root))))
    _add_lines(root / ".gitignore", _IGNORED)
    _add_lines(root / ".dvcignore", _DVC_IGNORED)
    (root / "inbox").mkdir(exist_ok=True)
    write_json(root / "champion.json", {"version": None})
    # Last: it is what makes the folder a workspace.
    _write(root / "dvc.yaml", _HEADER + _yaml(_stages(template / "dvc.yaml")))
    return is_new


def set_params(path: Path, settings: Mapping[str, Any]) -> None:
    """Change settings in a params.yaml, {"group.key": value}, and leave its comments.

    Raises StageError, with nothing changed, for a key that it does not have.

    >>> set_params(Path("params.yaml"), {"base.epochs": 3})  # doctest: +SKIP
    """
    yaml, out = YAML(), io.StringIO()
    yaml.width = _WIDE
    yaml.representer.add_representer(type(None), lambda own, _: own.represent_scalar("tag:yaml.org,2002:null", "null"))
    content = yaml.load(path.read_text(encoding="utf-8"))
    for name, value in settings.items():
        *groups, key = name.split(".")
        group = content
        for each in groups:
            group = group.get(each, {}) if isinstance(group, Mapping) else group
        if not isinstance(group, MutableMapping) or key not in group:
            raise StageError(f"there is no setting {name}", where=str(path))
        group[key] = value
    yaml.dump(content, out)
    _write(path, out.getvalue())


def code_digests(workspace: Workspace) -> dict[str, str]:
    """Return a digest of the code that each stage runs: installed files of nss, and the workspace's packages."""
    package, own = Path(__file__).resolve().parents[1], own_code(workspace)

    def digest(paths: Iterable[str]) -> str:
        content = [(package / path).read_bytes() for path in paths]
        return hashlib.blake2b(b"\0".join([*content, own] if own else content), digest_size=16).hexdigest()

    return {verb: digest(paths) for verb, paths in _code(_template() / "dvc.yaml").items()}


def refresh_code(workspace: Workspace) -> tuple[str, ...]:
    """Bring nss-code.yaml up to date with the code that there is. Returns the stages whose code is another one now.

    Nothing happens where the stages list their files themselves, as in nss's own repository. A file that cannot be
    read, as after a merge with a conflict in it, is written anew: all that it holds is computed.
    """
    path = workspace.root / CODE
    if not path.is_file():
        return ()
    recorded = _recorded(path)
    current = code_digests(workspace)
    changed = tuple(verb for verb, digest in current.items() if recorded.get(verb) != digest)
    if changed:
        _write(path, _CODE_HEADER + _yaml(current))
    return changed


def _recorded(path: Path) -> Mapping[str, Any]:
    try:
        content = YAML(typ="safe").load(path.read_text(encoding="utf-8"))
    except (YAMLError, ValueError):
        return {}
    return content if isinstance(content, Mapping) else {}


def _template() -> Path:
    """Return the folder that holds dvc.yaml and params.yaml: in an installed package beside this file."""
    packed = Path(__file__).resolve().parent / "template"
    return packed if packed.is_dir() else Path(__file__).resolve().parents[1]


def _code(dvc_yaml: Path) -> dict[str, list[str]]:
    stages = YAML(typ="safe").load(dvc_yaml.read_text(encoding="utf-8"))["stages"]
    return {verb: [dep for dep in stage["deps"] if _is_code(dep)] for verb, stage in stages.items()}


def _is_code(dep: str) -> bool:
    return dep.startswith(("nss/", "tasks/"))


def _stages(dvc_yaml: Path) -> dict[str, Any]:
    content: dict[str, Any] = YAML(typ="safe").load(dvc_yaml.read_text(encoding="utf-8"))
    for verb, stage in content["stages"].items():
        stage["deps"] = [dep for dep in stage["deps"] if not _is_code(dep)]
        stage["params"] = [*stage.get("params", []), {CODE: [verb]}]
    return content


def _version(root: Path) -> bool:
    """Have git and DVC version the folder. Returns whether git did not yet."""
    is_new = not _is_versioned(root)
    if is_new:
        _git(root, "init", "--quiet")
    _require_tracked(root)
    if not (root / ".dvc").is_dir():
        top = Path(_git(root, "rev-parse", "--show-toplevel").strip()).resolve()
        Repo.init(str(root), subdir=top != root.resolve()).close()
        _write(root / ".dvc" / "config", _DVC_CONFIG)
    return is_new


def _is_versioned(root: Path) -> bool:
    """Say whether the folder lies in a repository that does not ignore it: DVC refuses one that does."""
    inside = _run_git(root, "rev-parse", "--is-inside-work-tree").returncode == 0
    return inside and _run_git(root, "check-ignore", "--quiet", ".").returncode != 0


def _require_tracked(root: Path) -> None:
    ignored = _run_git(root, "check-ignore", *_TRACKED).stdout.splitlines()
    if ignored:
        raise StageError(
            f"git ignores {', '.join(ignored)}",
            where=str(root),
            fix=f"take out the line that does: `git check-ignore -v {ignored[0]}` names it",
        )


def _git(root: Path, *arguments: str) -> str:
    done = _run_git(root, *arguments)
    if done.returncode:
        raise StageError(f"git {arguments[0]}: {done.stderr.strip()}", where=str(root), fix="see `git status` there")
    return done.stdout


def _run_git(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise StageError("git is not installed", where=str(root), fix="install git") from None


def _add_lines(path: Path, lines: tuple[str, ...]) -> None:
    text = _text(path)
    missing = [line for line in lines if line not in text.splitlines()]
    if missing:
        start = f"{text.rstrip()}\n" if text.strip() else ""
        _write(path, start + "".join(f"{line}\n" for line in missing))


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8") if path.exists() else ""
    except UnicodeDecodeError as error:
        raise StageError("the file is not UTF-8", where=str(path), fix="save it as UTF-8") from error


def _yaml(content: Any) -> str:
    yaml, out = YAML(), io.StringIO()
    yaml.default_flow_style = False
    yaml.dump(content, out)
    return out.getvalue()


def _write(path: Path, text: str) -> None:
    with replacing(path) as part:
        part.write_text(text, encoding="utf-8")
