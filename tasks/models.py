"""The models that stages read, on the device that a stage computes on."""

from __future__ import annotations

from pathlib import Path

from nss.model import Classifier, load_model, on_device
from tasks.workspace import Workspace


def base_model(workspace: Workspace, device: str = "cpu") -> Classifier:
    """Return the model of the stage `base`.

    device: cpu, cuda, mps, or auto for the fastest that there is. Raises ModelError for a device that this machine does
    not have, and what `nss.load_model` does.

    >>> base_model(find_workspace()).spec.classes  # doctest: +SKIP
    ('0', '1', '2')
    """
    return model_in(workspace.out("base") / "model", workspace, device)


def model_in(folder: Path, workspace: Workspace, device: str = "cpu") -> Classifier:
    """Return the model in a folder that a stage wrote. device, errors: see `base_model`."""
    return on_device(load_model(folder, workspace.packages), device)
