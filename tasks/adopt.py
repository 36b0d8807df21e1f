"""Take a model that was trained elsewhere as the champion: checked, scored, registered, pinned.

Everything is checked before anything changes. From then on it is a promotion like any other, see tasks/promotion.py.
"""

from __future__ import annotations

import json
import tempfile
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from nss.data import Dataset, load_data
from nss.errors import ModelError, StageError
from nss.evaluate import Evaluation, evaluate
from nss.gate import Candidate
from nss.model import Classifier, load_model, model_digest, on_device, save_model
from nss.sites import find_sites
from nss.weights import SUFFIXES, fill
from tasks.base import untrained
from tasks.card import adopted_card
from tasks.champion import read_champion
from tasks.committed import require_committed
from tasks.gate import figures_of
from tasks.ledger import locked
from tasks.lineage import find_version
from tasks.params import BaseParams, Params
from tasks.pipeline import Pipeline
from tasks.promotion import Move, make, place_of, restore, resume
from tasks.provenance import data_md5, provenance_tags
from tasks.register import Registered
from tasks.registry import PREVIOUS, Registry, Version, figure_tags, version_key
from tasks.report_facts import ClassChange, Judged
from tasks.sizes import sizes_of
from tasks.tracking import Tracker
from tasks.workspace import Workspace

VERB = "adopt"
_REGISTERED = "models:/"

Normalisation = tuple[Sequence[float], Sequence[float]]
"""mean and standard deviation of each channel, on pixels scaled to 0..1"""


@dataclass(frozen=True)
class Adopted:
    """What came of it. source: where the model was found, by its version if it was registered."""

    source: str
    scores: Evaluation
    registered: Registered
    normalisation: Normalisation
    """that its images get"""
    sizes: dict[str, int]
    """parameters, macs for one image, bytes"""


def adopt(
    workspace: Workspace,
    params: Params,
    tracker: Tracker,
    source: str,
    normalisation: Normalisation | None = None,
    *,
    forced: bool = False,
    reason: str = "",
) -> Adopted:
    """Make the model of `source` the champion. It counts as made for all batches of data/.

    source: a file of weights for the network that `base` in params.yaml describes; a model folder; or
    models:/NAME@ALIAS, models:/NAME/VERSION, which hold one of these.
    normalisation: of a file of weights; by default that of the training split. forced: also when it only guesses.

    Raises ModelError, DataError, StageError, SiteError when anything is wrong with it, and nothing has changed then;
    and what `tasks.promotion.make` raises.
    """
    with locked(workspace), tempfile.TemporaryDirectory(prefix="nss-") as folder:
        resume(workspace, tracker)
        data = _data(workspace)
        origin, path = _find(tracker, params, source, Path(folder))
        model = _model(workspace, params.base, data, path, normalisation)
        _require_fit(model, data, origin)
        judged = on_device(model, params.evaluate.device)
        scores = evaluate(judged, data.split(params.evaluate.split), batch_size=params.evaluate.batch_size)
        if not forced:
            _require_knowledge(scores, origin)
        save_model(model, Path(folder) / "adopted")
        candidate = _Candidate(model, Path(folder) / "adopted", data, scores, origin)
        pin, registry = read_champion(workspace), Registry(tracker, params.register.name)
        if pin and pin.model != candidate.digest:
            restore(workspace, registry)
        version = _registered(workspace, params, tracker, candidate)
        done = _promote(workspace, params, tracker, candidate, version, forced, reason)
        return Adopted(origin, scores, done, (model.spec.mean, model.spec.std), candidate.sizes)


@dataclass(frozen=True)
class _Candidate:
    model: Classifier
    folder: Path
    data: Dataset
    scores: Evaluation
    origin: str

    @property
    def digest(self) -> str:
        return model_digest(self.model)

    @property
    def batches(self) -> list[str]:
        return [batch.digest for batch in self.data.batches]

    @cached_property
    def sizes(self) -> dict[str, int]:
        return sizes_of(self.model, self.folder)

    @property
    def figures(self) -> dict[str, float]:
        """What a version is compared by, under the names that the gate gives them."""
        scores = self.scores
        return figures_of(Candidate(VERB, scores.images, scores.accuracy, scores.per_class, size=self.sizes))

    def card(self, workspace: Workspace) -> str:
        """Return its model card."""
        scores = self.scores
        judged = Judged(
            VERB,
            self.sizes,
            verdict="",
            words="",
            reasons=(),
            model=self.digest,
            parent=None,
            batches=tuple(self.batches),
            images=scores.images,
            accuracy=scores.accuracy,
            classes=tuple(ClassChange(name, None, None, value) for name, value in scores.per_class.items()),
            compared=(),
        )
        return adopted_card(judged, self.model.spec, self.origin, provenance_tags(workspace))


def _data(workspace: Workspace) -> Dataset:
    if workspace.data.exists():
        require_committed(Pipeline(workspace))
    return load_data(workspace.data)


def _find(tracker: Tracker, params: Params, source: str, folder: Path) -> tuple[str, Path]:
    """Return the name of what `source` stands for, and a model folder or a file of weights."""
    if not source.startswith(_REGISTERED):
        return source, Path(source)
    reference = source.removeprefix(_REGISTERED)
    if not all(reference.replace("@", "/", 1).partition("/")):
        raise StageError("this names no version", where=source, allowed="models:/NAME@ALIAS or models:/NAME/VERSION")
    version = find_version(Registry(tracker, params.register.name), reference)
    origin = f"{_REGISTERED}{version.name}/{version.number}"
    return origin, _weights_in(_download(tracker, version, folder), origin)


def _download(tracker: Tracker, version: Version, folder: Path) -> Path:
    from mlflow.artifacts import download_artifacts

    place = tracker.client.get_model_version_download_uri(version.name, str(version.number))
    if place.startswith(_REGISTERED):
        # A logged model, by its id: MLflow would look for it in another store, its default.
        place = str(tracker.client.get_logged_model(place.removeprefix(_REGISTERED)).artifact_location)
    return Path(download_artifacts(artifact_uri=place, dst_path=str(folder), tracking_uri=tracker.uri))


def _weights_in(found: Path, origin: str) -> Path:
    """Return the model folder in what was downloaded, or else the only file of weights."""
    files = [path for path in sorted([found, *found.rglob("*")]) if path.is_file()]
    folders = [path.parent for path in files if path.name == "model.json"]
    weights = folders or [path for path in files if path.suffix in SUFFIXES]
    if len(weights) != 1:
        held = ", ".join(path.name for path in files[:10]) or "nothing"
        raise ModelError(
            f"the version holds {held}",
            where=origin,
            allowed=f"one model folder of nss, or one file of weights ({', '.join(SUFFIXES)})",
            fix="log the state dict, for example as a .safetensors file",
        )
    return weights[0]


def _model(
    workspace: Workspace, base: BaseParams, data: Dataset, path: Path, normalisation: Normalisation | None
) -> Classifier:
    if path.is_dir():
        if normalisation:
            raise ModelError("a model folder has a normalisation of its own", where=str(path), fix="leave it out")
        return load_model(path, workspace.packages)
    return fill(untrained(base, data, normalisation), path)


def _require_fit(model: Classifier, data: Dataset, origin: str) -> None:
    """Refuse a model of other classes or images than those of data/, and one whose neurons cannot be found."""
    spec = model.spec
    if spec.classes != data.classes:
        raise ModelError(
            f"the model knows the classes {', '.join(spec.classes)}",
            where=origin,
            allowed=f"those of data/, in their order: {', '.join(data.classes)}",
            fix="adopt it before data of further classes are added; `nss run` then makes it learn them",
        )
    if spec.input_shape != data.image_shape:
        raise ModelError(
            f"the model takes images of {_shape(spec.input_shape)}",
            where=origin,
            allowed=f"{_shape(data.image_shape)}, as in data/",
            fix="make data/ of images of its size: `nss data add --resize`",
        )
    find_sites(model.network, spec.input_shape)


def _shape(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))


def _require_knowledge(scores: Evaluation, origin: str) -> None:
    """Refuse a model that knows no more than one that gives every image the same answer.

    Each class counts the same, so one that is frequent does not help a model that always answers it.
    """
    per_class = list(scores.per_class.values())
    mean, chance = sum(per_class) / len(per_class), 1 / len(per_class)
    if mean <= chance:
        raise ModelError(
            f"it answers {mean:.1%} of the held-out images of a class right, guessing {chance:.1%}",
            where=origin,
            fix="check that it was trained on these classes in this order "
            f"({', '.join(scores.classes)}), and --mean and --std; --force --reason TEXT takes it as it is",
        )


def _registered(workspace: Workspace, params: Params, tracker: Tracker, candidate: _Candidate) -> Version:
    """Return the version of these weights for these batches, made when there is none: the newest of several."""
    registry = Registry(tracker, params.register.name)
    same = [each for each in registry.having("nss.model", candidate.digest) if _knows(each.batches, candidate)]
    if same:
        return same[-1]
    figures, key = candidate.figures, version_key(candidate.digest, candidate.batches, {})
    classes = {f"class/{name}": value for name, value in candidate.scores.per_class.items()}
    run_id, model_id = _logged(workspace, params, tracker, candidate, key)
    tags = {
        **provenance_tags(workspace),
        **figure_tags({**figures, **classes}),
        "nss.verb": VERB,
        "nss.model": candidate.digest,
        "nss.batches": json.dumps(candidate.batches),
        "nss.source": candidate.origin,
    }
    return registry.add(key, run_id, model_id, tags)


def _knows(batches: Sequence[str], candidate: _Candidate) -> bool:
    return sorted(batches) == sorted(candidate.batches)


def _logged(workspace: Workspace, params: Params, tracker: Tracker, candidate: _Candidate, key: str) -> tuple[str, str]:
    """Return the finished MLflow run that holds the model, and the id of the logged model."""
    tags = {**provenance_tags(workspace), "nss.source": candidate.origin, "nss.model": candidate.digest}
    run = tracker.open(VERB, {"kind": VERB, "key": key}, tags)
    run_id = run.info.run_id
    model_id = tracker.log_model(run_id, "adopted", candidate.folder, {"source": candidate.origin})
    if run.info.status != "FINISHED":
        tracker.log(run, metrics=candidate.figures)
        tracker.log_data(run_id, "data", workspace.data, data_md5(workspace), "evaluation")
        tracker.client.log_text(run_id, candidate.card(workspace), "card.md")
        tracker.client.log_dict(run_id, candidate.scores.to_dict(), f"{params.evaluate.split}.json")
        tracker.end(run_id, "FINISHED")
    return run_id, model_id


def _promote(
    workspace: Workspace,
    params: Params,
    tracker: Tracker,
    candidate: _Candidate,
    version: Version,
    forced: bool,
    reason: str,
) -> Registered:
    registry, pin = Registry(tracker, version.name), read_champion(workspace)
    restore(workspace, registry)
    if pin and (pin.name, pin.version, pin.model) == (version.name, version.number, version.model):
        return Registered("", "promoted", VERB, version, registry.by_alias(PREVIOUS))
    was, previous = place_of(workspace, registry, version)
    scores = candidate.scores
    move = Move(
        id=uuid.uuid4().hex,
        kind="adopt",
        name=version.name,
        champion=version.number,
        previous=previous.number if previous else None,
        commit=params.register.commit,
        verb=VERB,
        verdict="",
        reasons=(f"taken from {candidate.origin}", f"accuracy {scores.accuracy:.3f} on {scores.images} images"),
        forced=forced,
        reason=reason,
    )
    return Registered("", "promoted", VERB, version, was, tuple(make(workspace, tracker, move)))
