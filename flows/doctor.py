"""`nss doctor`: what a run needs, checked one by one."""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from nss.errors import DataError, NssError, first_line
from tasks.workspace import Workspace, find_workspace, with_packages

if TYPE_CHECKING:
    from nss.data import Dataset
    from tasks.params import BaseParams, Params

# What is imported, and the name that it is installed by.
_PACKAGES = {
    name: name for name in ("torch", "torchvision", "scipy", "safetensors", "matplotlib", "mlflow", "prefect", "dvc")
} | {"sklearn": "scikit-learn"}


@dataclass(frozen=True)
class Finding:
    """What one check found. `fix` says how to mend it when it is not `ok`."""

    check: str
    ok: bool
    found: str
    fix: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return the fields, ready for JSON."""
        return asdict(self)


def examine() -> list[Finding]:
    """Run all checks. One that fails does not keep the others from running."""
    try:
        workspace = find_workspace()
    except NssError as error:
        return [
            _run("python", _python),
            _run("packages", _packages),
            Finding("workspace", False, error.what, error.fix),
        ]
    checks: dict[str, Callable[[], str]] = {
        "python": _python,
        "packages": _packages,
        "git": lambda: _git(workspace),
        "dvc": lambda: _dvc(workspace),
        "parameters": lambda: _params(workspace),
        "data": lambda: _data(workspace),
        "champion": lambda: _champion(workspace),
        "tracking": lambda: _tracking(workspace),
        "prefect": _prefect,
    }
    return [_run(name, check) for name, check in checks.items()]


def _run(name: str, check: Callable[[], str]) -> Finding:
    try:
        return Finding(name, True, check())
    except NssError as error:
        problems = "; ".join(getattr(error, "problems", ()))
        return Finding(name, False, f"{error.what.splitlines()[0]}{': ' if problems else ''}{problems}", error.fix)
    # A module of the user's own may end Python when it is imported.
    except (Exception, SystemExit) as error:
        first = first_line(error)
        return Finding(name, False, f"{type(error).__name__}: {first}")


def _python() -> str:
    return f"{'.'.join(map(str, sys.version_info[:3]))}, {sys.executable}, nss {version('nss')}"


def _packages() -> str:
    for name in _PACKAGES:
        module = importlib.import_module(name)
        if module.__file__ is None:
            where = next(iter(module.__path__))
            raise NssError(f"`import {name}` finds a folder, {where}", fix="pip install -e . in this environment")
    return ", ".join(f"{name} {version(name)}" for name in _PACKAGES.values())


def _git(workspace: Workspace) -> str:
    try:
        command = ["git", "rev-parse", "--short", "HEAD"]
        done = subprocess.run(command, cwd=workspace.root, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise NssError("git is not installed", fix="install git") from None
    return f"commit {done.stdout.strip()}" if done.returncode == 0 else "no commit yet: runs are tagged 'unknown'"


def _dvc(workspace: Workspace) -> str:
    from tasks.pipeline import Pipeline

    pipeline = Pipeline(workspace)
    names, stale = pipeline.stages(), pipeline.stale()
    return f"{len(names)} stages, " + (f"to run: {', '.join(stale)}" if stale else "all up to date")


def _params(workspace: Workspace) -> str:
    from tasks.params import load_params

    params = load_params(workspace.params)
    _require_devices(params)
    data = _readable(workspace)
    if _trains(workspace):
        _require_network(with_packages(workspace, params.base.packages), params.base, data)
    if data is not None:
        _require_slices(params.slice.n_slices, len(data.classes))
    return ", ".join(type(params).model_fields)


def _require_devices(params: Params) -> None:
    """Raise which settings name a device that is not there; a Dask cluster has devices of its own."""
    from nss.model import fastest_device

    asked = {name: each["device"] for name, each in params.model_dump().items() if "device" in each}
    if params.profile.dask:
        del asked["profile"]
    missing = [f"{name}.device: {device}" for name, device in asked.items() if not _has(device)]
    if missing:
        fix = f"{fastest_device().type} or auto, in params.yaml"
        raise NssError(f"{', '.join(missing)} is not there", fix=fix)


def _has(device: str) -> bool:
    from torch import nn

    from nss.errors import ModelError
    from nss.model import on_device

    try:
        on_device(nn.Linear(1, 1), device)
    except ModelError:
        return False
    return True


def _trains(workspace: Workspace) -> bool:
    from tasks.champion import read_champion

    try:
        return read_champion(workspace) is None
    except NssError:
        # The check of the champion says what is wrong with it.
        return False


def _readable(workspace: Workspace) -> Dataset | None:
    from nss.data import load_data

    try:
        return load_data(workspace.data, verify=False)
    except DataError:
        # The check of the data says why.
        return None


def _require_network(workspace: Workspace, base: BaseParams, data: Dataset | None) -> None:
    """Raise what is wrong with the network that the stage base would train, as far as a look can tell."""
    from nss.base import require_logits
    from nss.factories import find_factory
    from nss.model import build_model
    from nss.sites import find_sites

    if data is None:
        # Which images it would get is not known.
        find_factory(base.factory, workspace.packages)
        return
    shape, allow = data.image_shape, workspace.packages
    model = build_model(base.factory, data.classes, shape, base.seed, arguments=base.arguments, allow=allow)
    find_sites(model.network, shape)
    require_logits(model)


def _require_slices(asked: int | None, classes: int) -> None:
    """Raise when there would be more slices than classes: the stage slice says so only when base has trained."""
    if asked is not None and asked > classes:
        fix = f"set it to null, or to 1 to {classes}, in params.yaml"
        raise NssError(f"slice.n_slices is {asked}, the data has {classes} classes", where="params.yaml", fix=fix)


def _data(workspace: Workspace) -> str:
    from tasks.data import status

    content = status(workspace)
    if not content["committed"]:
        raise NssError("data/ is not what data.dvc names", fix="`dvc add data`, or `dvc checkout data.dvc`")
    return f"{sum(content['images'].values())} images of {len(content['classes'])} classes, {content['md5']}"


def _champion(workspace: Workspace) -> str:
    from tasks.champion import load_champion, read_champion
    from tasks.params import load_params

    champion = read_champion(workspace)
    if champion is None:
        return "none is pinned: the stage base trains"
    load_champion(with_packages(workspace, load_params(workspace.params).base.packages), champion)
    return f"{champion.name} version {champion.version}, of {len(champion.batches)} batches"


def _tracking(workspace: Workspace) -> str:
    from tasks.store_address import shown_uri, told, tracking_uri
    from tasks.tracking import open_tracker

    try:
        return shown_uri(open_tracker(workspace).uri)
    except NssError:
        raise
    except Exception as error:
        reason = told(error, tracking_uri(workspace))
        what = f"the tracking store does not answer as it should ({reason})"
        raise NssError(what, fix="start it, or see MLFLOW_TRACKING_URI") from error


def _prefect() -> str:
    from prefect.client.orchestration import get_client
    from prefect.settings import PREFECT_API_URL

    url: str | None = PREFECT_API_URL.value()
    if not url:
        return "no server: runs start a temporary one"
    with get_client(sync_client=True) as client:
        problem = client.api_healthcheck()
    if problem:
        raise NssError(f"no answer from {url}", fix="start it with `prefect server start`, or unset PREFECT_API_URL")
    return url
