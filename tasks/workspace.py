"""A workspace is the folder that holds dvc.yaml: params.yaml, data/, artifacts/ and the tracking store lie in it."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from nss.errors import NssError, StageError
from nss.files import read_json


@dataclass(frozen=True)
class Workspace:
    """Paths of one workspace.

    root: the absolute folder that holds dvc.yaml.
    packages: packages outside nss and torchvision that model factories may come from.

    >>> Workspace(Path("/repo")).out("base").as_posix()
    '/repo/artifacts/base'
    """

    root: Path
    packages: tuple[str, ...] = ()

    @property
    def data(self) -> Path:
        """The packed data set."""
        return self.root / "data"

    @property
    def params(self) -> Path:
        """The parameters of all stages."""
        return self.root / "params.yaml"

    @property
    def pin(self) -> Path:
        """Which registered model is maintained, see tasks/champion.py."""
        return self.root / "champion.json"

    @property
    def champion(self) -> Path:
        """The model folder of that model, versioned by champion.dvc."""
        return self.root / "champion"

    @property
    def store(self) -> Path:
        """Folder of the default tracking store; while `dvc exp run --temp` works in a copy, the main workspace's."""
        return Path(os.environ.get("DVC_ROOT") or self.root) / "mlflow"

    def out(self, verb: str) -> Path:
        """Folder that the stage `verb` writes."""
        return self.root / "artifacts" / verb


def find_workspace(start: Path | None = None) -> Workspace:
    """Find the workspace upwards from `start` (default: the current folder).

    Raises NssError when no folder on the way up holds dvc.yaml.
    """
    here = (start or Path.cwd()).resolve()
    for folder in (here, *here.parents):
        if (folder / "dvc.yaml").is_file():
            return Workspace(folder)
    raise NssError(
        "no workspace: neither this folder nor one above it holds dvc.yaml",
        where=str(here),
        fix="change into the repository, or lay a workspace out with `nss init`",
    )


def with_packages(workspace: Workspace, packages: Iterable[str]) -> Workspace:
    """Return the workspace with the packages that factories may come from; they may lie in its own folder.

    >>> with_packages(find_workspace(), ["my_nets"]).packages  # doctest: +SKIP
    ('my_nets',)
    """
    found = tuple(packages)
    if found and str(workspace.root) not in sys.path:
        # Last, so that a folder of the user's never hides an installed package.
        sys.path.append(str(workspace.root))
    return replace(workspace, packages=found)


def require_same_source(folder: Path, **digests: str) -> None:
    """Refuse to go on when the stage that wrote `folder` read something else than what is there now.

    DVC hashes inputs after a command ended, so an input that changed meanwhile would be recorded wrongly. Raises
    StageError naming the stage to run again.

    >>> require_same_source(Path("artifacts/base"), data="a2f0...")  # doctest: +SKIP
    """
    recorded = read_json(folder / "source.json", StageError)
    for name, digest in digests.items():
        if recorded.get(name) != digest:
            raise StageError(
                f"the stage '{folder.name}' read another {name} ({recorded.get(name)}) than there is now ({digest})",
                where=str(folder / "source.json"),
                fix=f"dvc repro --force --single-item {folder.name}",
            )
