"""params.yaml, checked: one group for each stage, every key required, every mistake listed at once."""

from __future__ import annotations

import difflib
import math
import reprlib
import warnings
from pathlib import Path
from typing import Annotated, Any, Literal, TypeGuard

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from nss.errors import ParamsError

Metric = Literal["avg", "var", "ens", "taylor", "deeplift"]
Rule = Literal["cumulative", "score", "energy", "category", "global"]
Linkage = Literal["average", "complete", "single"]
Budget = Literal["macs", "params", "latency_ms", "max_accuracy_drop"]
When = Annotated[Literal["always", "never", "triage"], Field(description="always, never or triage")]
Epochs = Annotated[int, Field(ge=1, le=10_000, description="a whole number from 1 to 10000")]
BatchSize = Annotated[int, Field(ge=1, le=1_000_000, description="a whole number from 1 to 1000000")]
Rate = Annotated[float, Field(gt=0, le=100, description="a number above 0, at most 100")]
Decay = Annotated[float, Field(ge=0, le=1, description="a number from 0 to 1")]
Share = Annotated[float, Field(ge=0, le=1, description="a share from 0 to 1")]
Level = Annotated[float, Field(gt=0, lt=1, description="a number above 0, below 1")]
Count = Annotated[int, Field(ge=1, le=1_000_000_000, description="a whole number from 1 to 1000000000")]
Most = Annotated[float | None, Field(gt=0, description="a number above 0, or null for any")]
Device = Annotated[Literal["auto", "cpu", "cuda", "mps"], Field(description="auto, cpu, cuda or mps")]
Seed = Annotated[int, Field(ge=0, lt=2**32, description="a whole number from 0 to 4294967295")]
_FACTORY = r"^[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*$"
_PACKAGE = r"^[A-Za-z_]\w*$"
# A few lines of YAML can stand for gigabytes (aliases of aliases): what was found is shown in short.
_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxlist, _SHORT.maxdict, _SHORT.maxstring, _SHORT.maxother = 2, 20, 20, 200, 200
# Neither / nor : nor @, which stand between the name and the version or alias of a registered model.
_NAME = r"^\w[\w.-]*$"


class _Group(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class BaseParams(_Group):
    """How the base model is made and trained."""

    factory: str = Field(pattern=_FACTORY, description="module:callable, for example nss.zoo:vgg_small")
    arguments: dict[str, Any] = Field(description="keyword arguments of the factory, as a mapping")
    packages: list[Annotated[str, Field(pattern=_PACKAGE)]] = Field(
        description="names of packages, beside nss.zoo and torchvision.models, that a factory may come from"
    )
    epochs: Epochs
    batch_size: BatchSize
    learning_rate: Rate
    weight_decay: Decay
    device: Device
    seed: Seed


class ProfileParams(_Group):
    """What is gathered about the contribution of each neuron to each category."""

    metrics: list[Metric] = Field(min_length=1, description="a list of some of avg, var, ens, taylor, deeplift")
    split: Literal["train", "val"] = Field(description="train or val")
    samples_per_class: int | None = Field(ge=1, description="a whole number from 1, or null for all")
    batch_size: BatchSize
    windows: int = Field(ge=0, le=1_000_000, description="a whole number from 0 to 1000000: of one image in so many")
    device: Device
    bf16: bool = Field(description="true or false")
    shards: int = Field(ge=1, le=10_000, description="a whole number from 1 to 10000")
    dask: str | None = Field(
        pattern=r"^(tcp|tls|ws|wss|ucx)://.+$", description="address of a scheduler like tcp://host:8786, or null"
    )


class SliceParams(_Group):
    """Which neurons are critical, and which categories are merged."""

    metric: Metric = Field(description="avg, var, ens, taylor or deeplift")
    rule: Rule = Field(description="cumulative, score, energy, category or global")
    threshold: float = Field(gt=0, le=1, description="a number above 0, at most 1")
    n_slices: int | None = Field(ge=1, description="a whole number from 1, or null")
    distance_threshold: float | None = Field(ge=0, le=1, description="a number from 0 to 1, or null")
    linkage: Linkage = Field(description="average, complete or single")
    layers: Annotated[list[str], Field(min_length=1)] | None = Field(
        description="a list of layers whose neurons decide about merging, or null for all"
    )


class BudgetParams(_Group):
    """The most that is allowed of a model."""

    parameters: Most
    macs: Most
    bytes: Most
    latency_ms: Most


class TriageParams(_Group):
    """What counts as evidence that a model needs maintenance."""

    alpha: Level
    min_effect: Share
    max_drop: Share
    min_images: int = Field(ge=2, le=1_000_000_000, description="a whole number from 2 to 1000000000")
    min_class_images: Count
    max_images: Count
    permutations: int = Field(ge=1, le=1_000_000, description="a whole number from 1 to 1000000")
    budgets: BudgetParams
    device: Device
    seed: Seed


class RestructureParams(_Group):
    """How much smaller the model gets."""

    when: When
    budget: Budget = Field(description="macs, params, latency_ms or max_accuracy_drop")
    target: float = Field(ge=0, description="a share from 0 to 1, above 0 for a size (latency_ms: milliseconds)")
    cap: float = Field(gt=0, lt=1, description="a share above 0, below 1: the most of a layer that may leave")
    multiple: int = Field(ge=1, le=1024, description="a whole number from 1 to 1024")
    fine_tune_steps: int = Field(ge=0, le=1_000_000, description="a whole number from 0 to 1000000")
    learning_rate: Rate
    distil: bool = Field(description="true or false")
    level: bool = Field(description="true or false")
    curve: list[Annotated[float, Field(gt=0, le=1)]] = Field(description="a list of shares above 0, at most 1")
    device: Device
    seed: Seed


class ReadaptParams(_Group):
    """How the model follows batches that arrive."""

    when: When
    share: float = Field(gt=0, le=1, description="a share above 0, at most 1: the most of all weights to train")
    guard: float = Field(ge=0, le=1_000_000, description="a number from 0 to 1000000: weight of the old behaviour")
    learning_rate: Rate
    epochs: Epochs
    batch_size: BatchSize
    replay: float = Field(ge=0, le=1, description="a share from 0 to 1: of the old images, to train on again")
    distil: float = Field(ge=0, le=1, description="a number from 0 to 1, above 0 with replay only")
    patience: int = Field(ge=1, le=10_000, description="a whole number from 1 to 10000")
    device: Device
    seed: Seed


class ExtendParams(_Group):
    """How the model learns new classes."""

    when: When
    replay: float = Field(ge=0, le=1, description="a share from 0 to 1: of the old images, to train on again")
    share: float = Field(gt=0, le=1, description="a share above 0, at most 1: of each layer, for the old classes")
    width: float = Field(gt=0, le=1, description="a share above 0, at most 1: of each layer, for the new classes")
    learning_rate: Rate
    epochs: Epochs
    batch_size: BatchSize
    weight_decay: Decay
    device: Device
    seed: Seed


class EvaluateParams(_Group):
    """What the models are scored on."""

    split: Literal["val", "test"] = Field(description="val or test")
    batch_size: BatchSize
    device: Device


class GateParams(_Group):
    """What is asked of a model that shall take the champion's place."""

    min_accuracy: Share
    min_class_accuracy: Share
    max_drop: Share
    max_class_drop: Share
    alpha: Level
    min_saving: float = Field(gt=0, le=1, description="a share above 0, at most 1")
    min_images: Count


class RegisterParams(_Group):
    """What happens to a model that the gate promotes."""

    name: str = Field(pattern=_NAME, description="letters, digits, _, . and -: a name in MLflow's model registry")
    promote: Literal["manual", "auto"] = Field(description="manual or auto")
    commit: bool = Field(description="true or false")


with warnings.catch_warnings():
    # Model classes have a method `register`, of their metaclass, which nobody calls.
    warnings.simplefilter("ignore", UserWarning)

    class Params(_Group):
        """All of params.yaml: a group for each stage, and `register`, which is no stage."""

        base: BaseParams
        profile: ProfileParams
        slice: SliceParams
        triage: TriageParams
        restructure: RestructureParams
        readapt: ReadaptParams
        extend: ExtendParams
        evaluate: EvaluateParams
        gate: GateParams
        register: RegisterParams

        def group(self, verb: str) -> BaseModel:
            """Return the group of one stage."""
            group: BaseModel = getattr(self, verb)
            return group


STAGES = tuple(name for name in Params.model_fields if name != "register")
"""Verbs of the stages, in their order."""
MAINTENANCE = ("restructure", "readapt", "extend")
"""those that make another model of the base model"""


def load_params(path: Path) -> Params:
    """Read and check params.yaml.

    Raises ParamsError that lists every wrong key, type and value with what is allowed.

    >>> load_params(Path("params.yaml")).slice.rule  # doctest: +SKIP
    'cumulative'
    """
    content = _read(path)
    problems: list[str] = []
    try:
        params = Params.model_validate(content)
        problems += _inconsistent(params)
    except ValidationError as error:
        problems += [_explain(content, dict(problem)) for problem in error.errors(include_url=False)]
    if problems:
        raise ParamsError(f"{len(problems)} wrong in params.yaml", problems, where=str(path), fix="mend the keys named")
    return params


def _read(path: Path) -> Any:
    try:
        # The rules that DVC reads parameters by: by others, 5e-4 is a text and `on` is true. DVC takes the parser in C,
        # but that of Python says where a bracket was opened.
        content = YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ParamsError("params.yaml is missing", where=str(path), fix="git checkout params.yaml") from None
    except OSError as error:
        raise ParamsError(f"params.yaml cannot be read ({error.strerror})", where=str(path)) from None
    # Dates and numbers that are none are a ValueError, lists in lists without end a RecursionError.
    except (YAMLError, ValueError, RecursionError) as error:
        # The part after the empty line advises programmers to allow duplicate keys.
        problems = [line.strip() for line in str(error).split("\n\n")[0].splitlines()]
        raise ParamsError("params.yaml is not readable as YAML", problems, where=str(path)) from None
    if not isinstance(content, dict):
        groups = ", ".join(Params.model_fields)
        raise ParamsError("params.yaml is not a mapping of groups", where=str(path), allowed=groups)
    return content


def _explain(content: Any, problem: dict[str, Any]) -> str:
    """One line: which key, which value, what is allowed."""
    loc = problem["loc"]
    name, model, allowed = ".".join(map(str, loc)), *_target(loc)
    if problem["type"] == "extra_forbidden":
        close = difflib.get_close_matches(str(loc[-1]), model.model_fields, n=1)
        hint = f" (did you mean {close[0]}?)" if close else ""
        return f"{name}: no such key{hint}; allowed: {', '.join(model.model_fields)}"
    if problem["type"] == "missing":
        return f"{name}: missing; allowed: {allowed}"
    return f"{name}: {_SHORT.repr(_value(content, loc))} is not allowed; allowed: {allowed}"


def _target(loc: tuple[Any, ...]) -> tuple[type[BaseModel], str]:
    """Return the model that a location lies in, and the description of what is allowed there."""
    model: type[BaseModel] = Params
    allowed = ""
    for part in loc:
        field = model.model_fields.get(str(part))
        if field is None:  # an unknown key, or a place in a list
            break
        if not _is_group(field.annotation):
            return model, field.description or ""
        allowed = f"a mapping with the keys {', '.join(field.annotation.model_fields)}"
        model = field.annotation
    return model, allowed


def _is_group(annotation: Any) -> TypeGuard[type[BaseModel]]:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _value(content: Any, loc: tuple[Any, ...]) -> Any:
    for part in loc:
        try:
            content = content[part]
        except (KeyError, IndexError, TypeError):
            return content
    return content


def _inconsistent(params: Params) -> list[str]:
    problems = []
    if len(set(params.profile.metrics)) < len(params.profile.metrics):
        problems.append(f"profile.metrics: {params.profile.metrics!r} names one twice; allowed: each once")
    if params.slice.metric not in params.profile.metrics:
        gathered = ", ".join(params.profile.metrics)
        problems.append(
            f"slice.metric: {params.slice.metric!r} is not gathered; allowed: one of profile.metrics ({gathered})"
        )
    budget, target = params.restructure.budget, params.restructure.target
    fits, allowed = {
        "max_accuracy_drop": (target <= 1, "a share from 0 to 1"),
        "latency_ms": (target > 0, "milliseconds above 0"),
    }.get(budget, (0 < target <= 1, "a share above 0, at most 1"))
    if not fits:
        problems.append(f"restructure.target: {target!r} is not allowed for {budget}; allowed: {allowed}")
    if params.readapt.when != "never" and params.readapt.guard > 0 and params.profile.windows == 0:
        problems.append(
            "profile.windows: 0 is not allowed with readapt.guard above 0, which needs them; allowed: from 1"
        )
    if params.readapt.distil > 0 and params.readapt.replay == 0:
        problems.append(
            f"readapt.distil: {params.readapt.distil!r} is not allowed without replay; allowed: 0, or a replay above 0"
        )
    if params.slice.n_slices is not None and params.slice.distance_threshold is not None:
        problems.append("slice: n_slices and distance_threshold are both given; allowed: one of them, the other null")
    return problems + _inconsistent_triage(params.triage)


def _inconsistent_triage(triage: TriageParams) -> list[str]:
    problems = []
    if triage.max_images < triage.min_images:
        problems.append(
            f"triage.max_images: {triage.max_images} is not allowed; allowed: from min_images ({triage.min_images})"
        )
    fewest = math.ceil(2 / triage.alpha) - 1
    if triage.permutations < fewest:
        problems.append(
            f"triage.permutations: {triage.permutations} cannot reach half of alpha; allowed: from {fewest}"
        )
    return problems
