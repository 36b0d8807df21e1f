# What `nss` offers, for type checkers and for the package itself, which imports each name when it is first used.
from .apply import apply_plan as apply_plan
from .attacks import fgsm as fgsm, foolbox_attack as foolbox_attack, pgd as pgd
from .base import Epoch as Epoch, train as train
from .compare import Comparison as Comparison, compare as compare
from .course import ReadaptEpoch as ReadaptEpoch
from .critical import CriticalNeurons as CriticalNeurons, critical_neurons as critical_neurons
from .data import Dataset as Dataset, load_data as load_data
from .drift import shifted as shifted
from .errors import (
    BusyError as BusyError,
    CrashError as CrashError,
    DataError as DataError,
    ExportError as ExportError,
    ExtendError as ExtendError,
    ModelError as ModelError,
    NssError as NssError,
    ParamsError as ParamsError,
    ProfileError as ProfileError,
    PruneError as PruneError,
    ReadaptError as ReadaptError,
    RestructureError as RestructureError,
    SiteError as SiteError,
    SliceError as SliceError,
    StageError as StageError,
)
from .evaluate import (
    Evaluation as Evaluation,
    SlicesEvaluation as SlicesEvaluation,
    evaluate as evaluate,
    evaluate_slices as evaluate_slices,
)
from .export import (
    check_export as check_export,
    export_onnx as export_onnx,
    export_program as export_program,
    load_export as load_export,
)
from .extend import Extended as Extended, ExtendReport as ExtendReport, extend as extend
from .extend_report import told_accuracy as told_accuracy
from .finetune import fine_tune as fine_tune
from .freeze import freeze as freeze, thaw as thaw
from .gate import (
    Candidate as Candidate,
    Decision as Decision,
    GateSettings as GateSettings,
    Verdict as Verdict,
    decide as decide,
)
from .grow import Capacity as Capacity, condense as condense
from .latency import Latency as Latency, measure_latency as measure_latency, time_calls as time_calls
from .level import level_classes as level_classes
from .model import (
    Classifier as Classifier,
    ModelSpec as ModelSpec,
    build_model as build_model,
    load_model as load_model,
    model_digest as model_digest,
    save_model as save_model,
)
from .mutants import mutate as mutate
from .plan import RestructurePlan as RestructurePlan
from .planner import Planner as Planner
from .profile import Profile as Profile, profile as profile
from .prune_weights import prune_weights as prune_weights, prune_weights_iteratively as prune_weights_iteratively
from .readapt import Readapted as Readapted, ReadaptReport as ReadaptReport, readapt as readapt
from .remove import RemovalPlan as RemovalPlan, plan_removal as plan_removal, remove as remove
from .restructure import Restructured as Restructured, restructure as restructure
from .size import count_macs as count_macs, count_parameters as count_parameters
from .slice import SemanticSlice as SemanticSlice, SemanticSlices as SemanticSlices, semantic_slices as semantic_slices
from .sliced import sliced as sliced
from .statistics import retake_statistics as retake_statistics
from .strides import sound_gradients as sound_gradients
from .triage import Triage as Triage, TriageSettings as TriageSettings, triage as triage
from .weight_masks import count_masked as count_masked
from .weights import fill as fill

__version__: str
__all__: list[str]
