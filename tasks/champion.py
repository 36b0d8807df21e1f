"""The pin: which registered model is maintained, instead of one that the stage `base` trains.

`champion.json` is committed and always there, so that another champion is a visible change of an input. Its weights are
a model folder, `champion/`, which `dvc add champion` versions and `dvc checkout champion.dvc` brings back.
"""

from __future__ import annotations

import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nss.errors import StageError
from nss.files import read_json, replacing, write_json
from nss.model_spec import FILES
from tasks.workspace import Workspace

if TYPE_CHECKING:
    from nss.model import Classifier

_KEYS = {"name": str, "version": int, "model": str, "batches": list}


@dataclass(frozen=True)
class Champion:
    """A version of a registered model.

    model: its digest, see `nss.model.model_digest`. batches: digests of the batches of data/ that it knows.
    """

    name: str
    version: int
    model: str
    batches: tuple[str, ...]


def read_champion(workspace: Workspace) -> Champion | None:
    """Return what champion.json pins, None when it pins nothing. Raises StageError when it is missing or damaged.

    >>> read_champion(find_workspace())  # doctest: +SKIP
    Champion(name='digits', version=3, model='5d1c...', batches=('9f0c...',))
    """
    content = read_json(workspace.pin, StageError)
    if content == {"version": None}:
        return None
    if not _is_pin(content):
        raise StageError(
            "champion.json is not what it should be",
            where=str(workspace.pin),
            allowed='{"version": null}, or name, version, model and batches of a registered model',
            fix="git checkout champion.json",
        )
    return Champion(content["name"], content["version"], content["model"], tuple(content["batches"]))


def is_about_the_champion(workspace: Workspace) -> bool:
    """Say whether the stages worked on the champion that is pinned now."""
    pin = read_champion(workspace)
    judged = read_json(workspace.out("base") / "champion.json", StageError)
    return bool(judged == (pin and {"name": pin.name, "version": pin.version}))


def _is_pin(content: Any) -> bool:
    if not isinstance(content, dict) or set(content) != set(_KEYS):
        return False
    fits = all(type(content[key]) is kind for key, kind in _KEYS.items())
    return fits and bool(content["batches"]) and all(isinstance(digest, str) for digest in content["batches"])


def load_champion(workspace: Workspace, champion: Champion) -> Classifier:
    """Return the model in champion/. Raises StageError when it is missing, or not the one that is pinned."""
    # PyTorch, which nobody needs who only asks which champion is pinned.
    from nss.model import load_model, model_digest

    name = f"{champion.name} version {champion.version}"
    if not workspace.champion.is_dir():
        raise StageError(
            f"the weights of the champion, {name}, are missing",
            where=str(workspace.champion),
            fix="dvc pull champion.dvc",
        )
    model = load_model(workspace.champion, workspace.packages)
    found = model_digest(model)
    if found != champion.model:
        raise StageError(
            f"champion/ holds another model ({found}) than the champion, {name} ({champion.model})",
            where=str(workspace.champion),
            fix="dvc checkout champion.dvc, or dvc pull champion.dvc",
        )
    return model


def pin_champion(workspace: Workspace, champion: Champion, folder: Path) -> None:
    """Put a model folder at champion/ and pin it; `dvc add champion` then versions it.

    Interrupted in between, it leaves weights that the pin does not name, which `load_champion` refuses.
    """
    with replacing(workspace.champion) as part:
        copy_model(folder, part)
    write_json(workspace.pin, asdict(champion))


def unpin_champion(workspace: Workspace) -> None:
    """From now on the stage `base` trains."""
    write_json(workspace.pin, {"version": None})


def copy_model(folder: Path, target: Path) -> None:
    """Copy the bytes of a model folder's two files: DVC's links, read-only modes and what lies beside stay behind."""
    target.mkdir()
    for name in FILES:
        shutil.copyfile(folder / name, target / name)
