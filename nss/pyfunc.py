"""A model folder as a Python function of MLflow: what `mlflow models serve` and `mlflow.pyfunc.load_model` ask for.

MLflow finds this module by its name, which the file MLmodel beside a logged model gives, and knows nothing else of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from nss.model import Classifier, load_model, on_device
from nss.predict import predict

if TYPE_CHECKING:
    from pandas import DataFrame

PACKAGES = "packages"
"""Name, in the configuration of a logged model, of the packages that its factory may come from."""


class Served:
    """A model that answers arrays with a table.

    >>> Served(nss.load_model("folder")).predict(images.numpy()).idxmax(axis="columns")  # doctest: +SKIP
    0    cat
    """

    def __init__(self, model: Classifier) -> None:
        self.model = on_device(model, "auto")

    def predict(self, model_input: NDArray[Any]) -> DataFrame:
        """Return the probability of each class, float64: a row for each image, a column for each class by its name.

        model_input: pixels [n, c, h, w], uint8 0..255 or floats 0..1. Raises DataError for anything else.
        """
        from pandas import DataFrame

        classes, images = list(self.model.spec.classes), torch.from_numpy(np.ascontiguousarray(model_input))
        if not len(images):
            return DataFrame(columns=classes, dtype=float)
        logits, _ = predict(self.model, (images, torch.zeros(len(images), dtype=torch.int64)))
        return DataFrame(logits.double().softmax(1).numpy(), columns=classes)


def _load_pyfunc(path: str, model_config: Mapping[str, Sequence[str]] | None = None) -> Served:
    """Return the model in a folder, as MLflow asks for it by this name."""
    return Served(load_model(path, tuple((model_config or {}).get(PACKAGES, ()))))
