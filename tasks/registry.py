"""MLflow's model registry: versions that are one for the same weights and the same evaluation, and their aliases."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from requests import RequestException
from sqlalchemy.exc import SQLAlchemyError

from nss.errors import StageError
from nss.files import text_digest
from tasks.store_address import shown_uri, told
from tasks.tracking import Tracker

CHAMPION, PREVIOUS, CANDIDATE = "champion", "previous", "candidate"
_FIGURES, _LOGGED = "nss.figures", "nss.logged_model"
_TAG = re.compile(r"[\w./ :-]{1,200}")
STORE_ERRORS = (MlflowException, SQLAlchemyError, ConnectionError, TimeoutError, RequestException)
"""What comes of a tracking store that is away."""
# What the stores say of a name, a version, an alias that is not there.
_ABSENT = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")


@dataclass(frozen=True)
class Version:
    """A version of a registered model.

    model: its digest. batches: digests of the batches that it knows. figures: what it was judged by.
    """

    name: str
    number: int
    model: str
    batches: tuple[str, ...]
    figures: Mapping[str, float]
    tags: Mapping[str, str]
    run_id: str
    source: str
    created: int
    """milliseconds since 1970"""

    @property
    def label(self) -> str:
        """How texts name it."""
        return f"{self.name} version {self.number}"


@dataclass(frozen=True)
class Registry:
    """The versions of one registered model.

    >>> Registry(open_tracker(find_workspace()), "digits").by_alias("champion")  # doctest: +SKIP
    """

    tracker: Tracker
    name: str

    def by_alias(self, alias: str) -> Version | None:
        """Return the version that has this alias; a search for versions does not know their aliases."""
        return _absent_is_none(lambda: self.tracker.client.get_model_version_by_alias(self.name, alias))

    def by_number(self, number: int) -> Version | None:
        """Return a version."""
        return _absent_is_none(lambda: self.tracker.client.get_model_version(self.name, str(number)))

    def having(self, tag: str, value: str) -> list[Version]:
        """Return the versions with this value of an `nss.*` tag, the oldest first."""
        words = f"name = '{self.name}' and tags.`{tag}` = '{value}'"
        found = [_version(each) for each in self.tracker.client.search_model_versions(words)]
        return sorted(found, key=lambda each: each.number)

    def add(self, key: str, run_id: str, model_id: str, tags: Mapping[str, str]) -> Version:
        """Return the version of this key, made when there is none; of several that were made at once, the first.

        run_id, model_id: the run that logged the model, and the logged model.
        """
        if found := self.having("nss.key", key):
            return self._first(found)
        self._create_name()
        # Its tags are made with it: no version is ever without its key.
        self.tracker.client.create_model_version(
            self.name, self._source(model_id), run_id, {**tags, "nss.key": key, _LOGGED: model_id}, model_id=model_id
        )
        return self._first(self.having("nss.key", key))

    def _source(self, model_id: str) -> str:
        """A server finds a logged model by its id; without one, MLflow would look for it in another store, its default.

        Where the artifacts lie is what both come to.
        """
        if self.tracker.uri.startswith("http"):
            return f"models:/{model_id}"
        return str(self.tracker.client.get_logged_model(model_id).artifact_location)

    def _first(self, found: list[Version]) -> Version:
        """Numbers rise, so whoever looks after adding sees every smaller one: all keep the same."""
        for later in found[1:]:
            _absent_is_none(
                lambda number=later.number: self.tracker.client.delete_model_version(self.name, str(number))
            )
        return found[0]

    def _create_name(self) -> None:
        try:
            self.tracker.client.create_registered_model(self.name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise

    def set_alias(self, alias: str, number: int | None) -> None:
        """Move an alias to a version; None: to none."""
        if number is None:
            self.tracker.client.delete_registered_model_alias(self.name, alias)
        else:
            self.tracker.client.set_registered_model_alias(self.name, alias, str(number))

    def tag(self, number: int, name: str, value: str) -> None:
        """Set a tag of a version."""
        self.tracker.client.set_model_version_tag(self.name, str(number), name, value)


def version_key(model: str, batches: list[str], figures: Mapping[str, float]) -> str:
    """Digest what makes a version: the same weights, for the same batches, with the same evaluation."""
    return text_digest(json.dumps([model, sorted(batches), figures], sort_keys=True))


def figure_tags(figures: Mapping[str, float | None]) -> dict[str, str]:
    """Return figures as tags, since a version has no metrics: all in one, and one each to look at and to search.

    What was not measured is left out; a class may have a name that no tag can have.

    >>> figure_tags({"accuracy": 0.5, "latency_ms": None})
    {'nss.figures': '{"accuracy": 0.5}', 'nss.metric.accuracy': '0.5'}
    """
    known = {name: value for name, value in figures.items() if value is not None}
    singles = {f"nss.metric.{name}": repr(value) for name, value in known.items() if _TAG.fullmatch(name)}
    return {_FIGURES: json.dumps(known, ensure_ascii=False), **singles}


def fetch(tracker: Tracker, source: str, model: str, target: Path, packages: tuple[str, ...]) -> Path:
    """Download a logged model and return its folder below `target`. Raises StageError when it is another model.

    source: `models:/ID`. model: the digest that it must have.
    """
    from mlflow.artifacts import download_artifacts

    # PyTorch, which a cycle that finds nothing to do need not wait for.
    from nss.model import load_model, model_digest

    # By its place: by its id, MLflow would look for it in another store, its default.
    place = tracker.client.get_logged_model(source.removeprefix("models:/")).artifact_location
    folder = Path(download_artifacts(artifact_uri=place, dst_path=str(target), tracking_uri=tracker.uri))
    found = model_digest(load_model(folder, packages))
    if found != model:
        raise StageError(
            f"the logged model {source} is another one ({found}) than was judged ({model})",
            where=shown_uri(tracker.uri),
            fix="delete the MLflow run that logged it, then `nss run`, which logs it again",
        )
    return folder


@contextmanager
def store_errors(uri: str) -> Iterator[None]:
    """Make what a tracking store says when it does not answer an error for people."""
    try:
        yield
    except STORE_ERRORS as error:
        raise StageError(
            f"the tracking store does not answer as it should ({told(error, uri)})",
            where=shown_uri(uri),
            fix="start it, or see MLFLOW_TRACKING_URI; then run the command again",
        ) from error


def _absent_is_none(ask: Any) -> Version | None:
    try:
        found = ask()
    except MlflowException as error:
        if error.error_code in _ABSENT:
            return None
        raise
    return found and _version(found)


def _version(found: ModelVersion) -> Version:
    tags = dict(found.tags)
    return Version(
        name=found.name,
        number=int(found.version),
        model=tags.get("nss.model", ""),
        batches=tuple(json.loads(tags.get("nss.batches", "[]"))),
        figures=json.loads(tags.get(_FIGURES, "{}")),
        tags=tags,
        run_id=found.run_id or "",
        source=f"models:/{tags.get(_LOGGED, '')}",
        created=found.creation_timestamp,
    )
