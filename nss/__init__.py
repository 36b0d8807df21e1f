"""Keep trained PyTorch image classifiers maintained by neuron-level semantic slicing (NeuSemSlice, arXiv 2407.20281).

>>> import nss
>>> data = nss.load_data("data")
>>> model = nss.build_model("nss.zoo:vgg_small", data.classes, data.image_shape, seed=0)
"""

from nss.apply import apply_plan
from nss.attacks import fgsm, foolbox_attack, pgd
from nss.base import Epoch, train
from nss.compare import Comparison, compare
from nss.course import ReadaptEpoch
from nss.critical import CriticalNeurons, critical_neurons
from nss.data import Dataset, load_data
from nss.drift import shifted
from nss.errors import (
    BusyError,
    DataError,
    ExportError,
    ExtendError,
    ModelError,
    NssError,
    ParamsError,
    ProfileError,
    PruneError,
    ReadaptError,
    RestructureError,
    SiteError,
    SliceError,
    StageError,
)
from nss.evaluate import Evaluation, SlicesEvaluation, evaluate, evaluate_slices
from nss.export import check_export, export_onnx, export_program, load_export
from nss.extend import Extended, ExtendReport, extend
from nss.extend_report import told_accuracy
from nss.finetune import fine_tune
from nss.freeze import freeze, thaw
from nss.gate import Candidate, Decision, GateSettings, Verdict, decide
from nss.grow import Capacity, condense
from nss.latency import Latency, measure_latency, time_calls
from nss.model import Classifier, ModelSpec, build_model, load_model, model_digest, save_model
from nss.mutants import mutate
from nss.plan import RestructurePlan
from nss.planner import Planner
from nss.profile import Profile, profile
from nss.prune_weights import prune_weights, prune_weights_iteratively
from nss.readapt import Readapted, ReadaptReport, readapt
from nss.remove import RemovalPlan, plan_removal, remove
from nss.restructure import Restructured, restructure
from nss.size import count_macs, count_parameters
from nss.slice import SemanticSlice, SemanticSlices, semantic_slices
from nss.sliced import sliced
from nss.statistics import retake_statistics
from nss.triage import Triage, TriageSettings, triage
from nss.weight_masks import count_masked
from nss.weights import fill

__version__ = "0.1.0"

__all__ = [
    "BusyError",
    "Candidate",
    "Capacity",
    "Classifier",
    "Comparison",
    "CriticalNeurons",
    "DataError",
    "Dataset",
    "Decision",
    "Epoch",
    "Evaluation",
    "ExportError",
    "ExtendError",
    "ExtendReport",
    "Extended",
    "GateSettings",
    "Latency",
    "ModelError",
    "ModelSpec",
    "NssError",
    "ParamsError",
    "Planner",
    "Profile",
    "ProfileError",
    "PruneError",
    "ReadaptEpoch",
    "ReadaptError",
    "ReadaptReport",
    "Readapted",
    "RemovalPlan",
    "RestructureError",
    "RestructurePlan",
    "Restructured",
    "SemanticSlice",
    "SemanticSlices",
    "SiteError",
    "SliceError",
    "SlicesEvaluation",
    "StageError",
    "Triage",
    "TriageSettings",
    "Verdict",
    "apply_plan",
    "build_model",
    "check_export",
    "compare",
    "condense",
    "count_macs",
    "count_masked",
    "count_parameters",
    "critical_neurons",
    "decide",
    "evaluate",
    "evaluate_slices",
    "export_onnx",
    "export_program",
    "extend",
    "fgsm",
    "fill",
    "fine_tune",
    "foolbox_attack",
    "freeze",
    "load_data",
    "load_export",
    "load_model",
    "measure_latency",
    "model_digest",
    "mutate",
    "pgd",
    "plan_removal",
    "profile",
    "prune_weights",
    "prune_weights_iteratively",
    "readapt",
    "remove",
    "restructure",
    "retake_statistics",
    "save_model",
    "semantic_slices",
    "shifted",
    "sliced",
    "thaw",
    "time_calls",
    "told_accuracy",
    "train",
    "triage",
]
