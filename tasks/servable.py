"""What MLflow has to know of a logged model folder to serve it: its file MLmodel."""

from __future__ import annotations

from pathlib import Path

import mlflow.pyfunc
import numpy as np
from mlflow.models import Model, ModelSignature
from mlflow.types import ColSpec, DataType, Schema, TensorSpec

import nss.pyfunc
from nss.model_spec import ModelSpec, read_spec


def describe(folder: Path, model_id: str, run_id: str, packages: tuple[str, ...]) -> str:
    """Return the content of MLmodel for a model folder that is logged: how it is loaded, what it takes and answers.

    packages: what its factory may come from beside nss.zoo and torchvision.

    >>> describe(Path("artifacts/base/model"), "m-1", "0a1b", ())  # doctest: +SKIP
    """
    spec, _ = read_spec(folder / "model.json")
    model = Model(run_id=run_id, signature=_signature(spec), model_id=model_id)
    settings = {nss.pyfunc.PACKAGES: list(packages)}
    mlflow.pyfunc.add_to_model(model, loader_module=nss.pyfunc.__name__, model_config=settings)
    return str(model.to_yaml())


def _signature(spec: ModelSpec) -> ModelSignature:
    pixels = TensorSpec(np.dtype(np.uint8), (-1, *spec.input_shape))
    probabilities: list[ColSpec | TensorSpec] = [ColSpec(DataType.double, name) for name in spec.classes]
    return ModelSignature(Schema([pixels]), Schema(probabilities))
