"""Keep trained PyTorch image classifiers maintained by neuron-level semantic slicing (NeuSemSlice, arXiv 2407.20281).

>>> import nss
>>> data = nss.load_data("data")
>>> model = nss.build_model("nss.zoo:vgg_small", data.classes, data.image_shape, seed=0)
"""

from nss.base import Epoch, train
from nss.critical import CriticalNeurons, critical_neurons
from nss.data import Dataset, load_data
from nss.errors import (
    BusyError,
    DataError,
    ModelError,
    NssError,
    ParamsError,
    ProfileError,
    SiteError,
    SliceError,
    StageError,
)
from nss.evaluate import Evaluation, SlicesEvaluation, evaluate, evaluate_slices
from nss.model import Classifier, ModelSpec, build_model, load_model, model_digest, save_model
from nss.profile import Profile, profile
from nss.remove import RemovalPlan, plan_removal, remove
from nss.size import count_macs, count_parameters
from nss.slice import SemanticSlice, SemanticSlices, semantic_slices
from nss.sliced import sliced

__version__ = "0.1.0"

__all__ = [
    "BusyError",
    "Classifier",
    "CriticalNeurons",
    "DataError",
    "Dataset",
    "Epoch",
    "Evaluation",
    "ModelError",
    "ModelSpec",
    "NssError",
    "ParamsError",
    "Profile",
    "ProfileError",
    "RemovalPlan",
    "SemanticSlice",
    "SemanticSlices",
    "SiteError",
    "SliceError",
    "SlicesEvaluation",
    "StageError",
    "build_model",
    "count_macs",
    "count_parameters",
    "critical_neurons",
    "evaluate",
    "evaluate_slices",
    "load_data",
    "load_model",
    "model_digest",
    "plan_removal",
    "profile",
    "remove",
    "save_model",
    "semantic_slices",
    "sliced",
    "train",
]
