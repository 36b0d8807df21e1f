"""How large a model is, in the figures that budgets and the gate know."""

from __future__ import annotations

from pathlib import Path

from nss.model import Classifier
from nss.size import count_macs, count_parameters


def sizes_of(model: Classifier, folder: Path) -> dict[str, int]:
    """Return parameters, macs for one image, and bytes of the weights in the model's folder.

    >>> sizes_of(load_model(folder), folder)  # doctest: +SKIP
    {'parameters': 61706, 'macs': 281640, 'bytes': 248160}
    """
    weights = (folder / "model.safetensors").stat().st_size
    return {"parameters": count_parameters(model), "macs": count_macs(model), "bytes": weights}
