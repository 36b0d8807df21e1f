"""The MLflow store and its runs, always by run id through MlflowClient, never through the active run."""

from __future__ import annotations

import logging
import os
import re
import socket
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from filelock import FileLock
from mlflow import MlflowClient
from mlflow.entities import (
    Dataset,
    DatasetInput,
    InputTag,
    LoggedModelOutput,
    Metric,
    Param,
    Run,
    RunTag,
    ViewType,
)
from mlflow.exceptions import MlflowException
from mlflow.utils.credentials import get_default_host_creds
from mlflow.utils.rest_utils import http_request
from sqlalchemy import Connection, create_engine, inspect, text
from sqlalchemy.pool import NullPool

from nss.errors import StageError
from nss.files import replacing
from tasks.store_address import SQLITE, shown_uri, tracking_uri
from tasks.workspace import Workspace

EXPERIMENT = "nss"
End = Literal["FINISHED", "FAILED", "KILLED"]

# A database cuts longer values or refuses them, depending on its kind.
_LONGEST_PARAM = 6000
_LONGEST_DIGEST = 36
# What MLflow refuses in the name of a metric; a class may be called R&D, or t-shirt (top).
_REFUSED = re.compile(r"[^\w./: -]")

# MLflow says INFO when it creates a database.
logging.getLogger("mlflow.store.db.utils").setLevel(logging.WARNING)
# Nor is it to draw bars between our lines when it fetches a model, or to write links of runs into what --json prints.
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")

# Of the lock in a PostgreSQL database: any number that nobody else in it uses.
_LOCK = 0x6E7373

# Where a database listens when its address does not say.
_PORTS = {"postgresql": 5432, "mysql": 3306, "mssql": 1433}
_PATIENCE_S = 5
# How long to wait for others to write to an sqlite store.
_WRITERS_S = 60
# MLflow alone waits two minutes for each of eight tries; a stage must not hang on its journal for a quarter of an hour.
_LIMITS = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "30", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2"}

# Where MLflow writes down absolute places of artifacts.
_PLACES = {
    "experiments": ("artifact_location",),
    "runs": ("artifact_uri",),
    "logged_models": ("artifact_location",),
    "model_versions": ("source", "storage_location"),
}


class Tracker:
    """One experiment of one tracking store.

    uri: of the store.
    artifacts: where artifacts go when the store is a database and no server decides.
    packages: what the factories of logged models may come from beside nss.zoo and torchvision, for who serves them.

    >>> Tracker("sqlite:////tmp/tracking.db", Path("/tmp/artifacts")).uri  # doctest: +SKIP
    'sqlite:////tmp/tracking.db'
    """

    def __init__(self, uri: str, artifacts: Path, experiment: str = EXPERIMENT, packages: tuple[str, ...] = ()) -> None:
        self.uri, self.packages = uri, packages
        require_answer(uri)
        if uri.startswith(SQLITE):
            create_database(Path(uri.removeprefix(SQLITE)), artifacts)
        with _alone(uri):
            self.client = MlflowClient(tracking_uri=uri)
            # Behind a server, the server says where artifacts go.
            self.experiment_id = _experiment(self.client, None if uri.startswith("http") else artifacts, experiment)

    def find(self, **tags: str) -> Run | None:
        """Return the newest run whose `nss.*` tags have these values, for example `stage_key`."""
        words = [f"tags.`nss.{name}` = '{value}'" for name, value in tags.items()]
        runs = self.client.search_runs(
            [self.experiment_id], " and ".join(words), ViewType.ACTIVE_ONLY, 1, ["attributes.start_time DESC"]
        )
        return runs[0] if runs else None

    def running(self) -> list[Run]:
        """Return the runs of the experiment that have not ended."""
        found: list[Run] = []
        page = None
        while page != "":
            part = self.client.search_runs(
                [self.experiment_id], "attributes.status = 'RUNNING'", max_results=1000, page_token=page
            )
            found, page = [*found, *part], part.token or ""
        return found

    def open(self, name: str, identity: Mapping[str, str], tags: Mapping[str, str], parent: str | None = None) -> Run:
        """Find the run with the tags in `identity`, or make it. A run that did not finish is running again.

        name: what people see in a list of runs.
        identity: `nss.*` tags without their prefix that no other run shares.
        tags: further tags, by their full names.
        parent: run id of the run that this one is shown under.
        """
        own = {**tags, **{f"nss.{key}": value for key, value in identity.items()}}
        if parent:
            own["mlflow.parentRunId"] = parent
        run = self.find(**identity)
        if run is None:
            return self.client.create_run(self.experiment_id, tags=own, run_name=name)
        if run.info.status != "FINISHED":
            self.client.log_batch(run.info.run_id, tags=[RunTag(key, str(value)) for key, value in own.items()])
            self.client.update_run(run.info.run_id, status="RUNNING")
        return self.client.get_run(run.info.run_id)

    def end(self, run_id: str, status: End) -> None:
        """End a run."""
        self.client.set_terminated(run_id, status)

    def log(
        self,
        run: Run,
        *,
        params: Mapping[str, Any] | None = None,
        metrics: Mapping[str, float] | None = None,
        history: Sequence[Mapping[str, float]] = (),
        tags: Mapping[str, str] | None = None,
        when: int | None = None,
    ) -> None:
        """Log values; the same values again change nothing.

        history: one mapping of metrics for each step, from step 1. Characters that MLflow refuses in a metric's name
        are _ there. when: milliseconds since 1970, of two values of a metric the one that counts is the later one; by
        default the run's own start.
        """
        # A database takes an equal (name, step, time, value) once: the run's own start time makes logging repeatable.
        when = when or run.info.start_time
        points = [_metric(name, value, when, 0) for name, value in (metrics or {}).items()]
        for step, row in enumerate(history, start=1):
            points += [_metric(name, value, when, step) for name, value in row.items()]
        pairs = [Param(name, str(value)[:_LONGEST_PARAM]) for name, value in (params or {}).items()]
        marks = [RunTag(name, str(value)) for name, value in (tags or {}).items()]
        for start in range(0, max(len(points), len(pairs), len(marks)), 100):
            part = slice(start, start + 100)
            self.client.log_batch(run.info.run_id, points[part], pairs[part], marks[part])

    def log_data(self, run_id: str, name: str, source: Path, digest: str, context: str) -> None:
        """Log which data set a run used, under DVC's hash."""
        data = Dataset(name, digest[:_LONGEST_DIGEST], "local", source.as_uri())
        self.client.log_inputs(run_id, [DatasetInput(data, [InputTag("mlflow.data.context", context)])])

    def log_model(self, run_id: str, name: str, folder: Path, params: Mapping[str, Any]) -> str:
        """Log a model folder as a logged model of the run, once; return its id.

        `nss.load_model(mlflow.artifacts.download_artifacts(f"models:/{model_id}"))` gives it back, and
        `mlflow.pyfunc.load_model(f"models:/{model_id}")` what answers arrays with probabilities.
        """
        outputs = self.client.get_run(run_id).outputs
        if outputs and outputs.model_outputs:
            return outputs.model_outputs[0].model_id
        values = {key: str(value)[:_LONGEST_PARAM] for key, value in params.items()}
        model = self.client.create_logged_model(self.experiment_id, name, run_id, params=values, model_type="nss")
        self.client.log_model_artifacts(model.model_id, str(folder))
        self._log_description(model.model_id, run_id, folder)
        self.client.finalize_logged_model(model.model_id, "READY")
        self.client.log_outputs(run_id, [LoggedModelOutput(model.model_id, step=0)])
        return model.model_id

    def _log_description(self, model_id: str, run_id: str, folder: Path) -> None:
        # PyTorch and more of MLflow, which who logs no model need not wait for.
        from tasks.servable import describe

        with tempfile.TemporaryDirectory(prefix="nss-") as beside:
            path = Path(beside) / "MLmodel"
            path.write_text(describe(folder, model_id, run_id, self.packages), encoding="utf-8")
            self.client.log_model_artifact(model_id, str(path))


def _metric(name: str, value: float, when: int, step: int) -> Metric:
    return Metric(_REFUSED.sub("_", name), float(value), when, step)


def open_tracker(workspace: Workspace, experiment: str = "") -> Tracker:
    """Connect to the workspace's tracking store, creating it when it is a database that does not exist yet.

    experiment: by default MLFLOW_EXPERIMENT_NAME, or `EXPERIMENT`.

    Raises mlflow's own exceptions when the store cannot be reached, StageError when its address is none.
    """
    artifacts = workspace.store / "artifacts"
    if not os.environ.get("MLFLOW_TRACKING_URI"):
        follow(workspace.store / "tracking.db", artifacts)
    name = experiment or os.environ.get("MLFLOW_EXPERIMENT_NAME") or EXPERIMENT
    return Tracker(tracking_uri(workspace), artifacts, name, workspace.packages)


def require_answer(uri: str) -> None:
    """Raise ConnectionError unless the server behind a store's address answers within five seconds.

    The clients themselves would try for minutes, and each process again. Stores without a server always pass. Raises
    StageError when the address is none.
    """
    scheme, host, port = _address(uri)
    try:
        if scheme in ("http", "https"):
            for name, value in _LIMITS.items():
                os.environ.setdefault(name, value)
            http_request(get_default_host_creds(uri), "/health", "GET", 0, timeout=_PATIENCE_S, raise_on_status=False)
        elif host and port:
            socket.create_connection((host, port), timeout=_PATIENCE_S).close()
    except (OSError, MlflowException) as error:
        # The address itself may hold a password.
        where = f"{scheme}://{host}" + (f":{port}" if port else "")
        raise ConnectionError(f"no answer from {where} within {_PATIENCE_S} seconds") from error


def _address(uri: str) -> tuple[str, str | None, int | None]:
    """Return scheme, host and port; neither of a store that nobody serves, whose address may be anything."""
    scheme = uri.partition("://")[0].lower()
    kind = scheme.partition("+")[0]
    if kind not in ("http", "https", *_PORTS):
        return scheme, None, None
    try:
        parts = urlsplit(uri)
        return scheme, parts.hostname, parts.port or _PORTS.get(kind)
    except ValueError:
        # What is wrong is not repeated: it may be a part of the password.
        raise StageError(
            "this is no address of a tracking store: its host or its port cannot be read",
            where=shown_uri(uri),
            allowed="http://HOST:PORT, or postgresql://USER:PASSWORD@HOST:PORT/DATABASE",
            fix="set MLFLOW_TRACKING_URI; in a user's name and password write / as %2F, # as %23, @ as %40",
        ) from None


def create_database(path: Path, artifacts: Path) -> None:
    """Create an sqlite store once, whole, whatever number of processes ask for it at the same time.

    MLflow's clients each migrate an empty file, and four at once leave it broken for good: one makes it, under a lock
    and another name.
    """
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_name(".lock")):
        if not path.exists():
            with replacing(path) as part:
                _experiment(MlflowClient(tracking_uri=f"{SQLITE}{part}"), artifacts, EXPERIMENT)


def follow(path: Path, artifacts: Path) -> None:
    """Let a workspace's own sqlite store that was moved or copied with it name the artifacts beside it.

    MLflow writes absolute places down: a copy would write into the workspace that it was made of. Artifacts that
    somebody keeps in a folder of another name are left where they are.
    """
    if not path.exists() or not _strayed(path, artifacts):
        return
    with FileLock(path.with_name(".lock")), _connected(path) as connection:
        for old in _recorded(connection) - {artifacts.as_uri()}:
            if old.endswith(_tail(artifacts)):
                _relocate(connection, old, artifacts.as_uri())


def _strayed(path: Path, artifacts: Path) -> bool:
    with _connected(path) as connection:
        return any(old.endswith(_tail(artifacts)) for old in _recorded(connection) - {artifacts.as_uri()})


def _tail(artifacts: Path) -> str:
    return f"/{artifacts.parent.name}/{artifacts.name}"


@contextmanager
def _connected(path: Path) -> Iterator[Connection]:
    """Be in one transaction of an sqlite store."""
    engine = create_engine(f"{SQLITE}{path}", poolclass=NullPool, connect_args={"timeout": _WRITERS_S})
    with engine.begin() as connection:
        yield connection


def _recorded(connection: Connection) -> set[str]:
    if not inspect(connection).has_table("experiments"):
        return set()
    return {str(place) for (place,) in connection.execute(text("SELECT artifact_location FROM experiments"))}


def _relocate(connection: Connection, old: str, new: str) -> None:
    """Write another folder into all places below the old one, whichever of them this MLflow's tables have."""
    found = inspect(connection)
    for table in filter(found.has_table, _PLACES):
        for column in {each["name"] for each in found.get_columns(table)} & {*_PLACES[table]}:
            connection.execute(
                text(
                    f"UPDATE {table} SET {column} = :new || substr({column}, length(:old) + 1) "
                    f"WHERE {column} = :old OR substr({column}, 1, length(:old) + 1) = :old || '/'"
                ),
                {"old": old, "new": new},
            )


@contextmanager
def _alone(uri: str) -> Iterator[None]:
    """Be the only one in a PostgreSQL database that may be empty: MLflow's clients each make its tables, and collide.

    The lock is PostgreSQL's own, so it is gone with the connection, in whatever way this process ends.
    """
    if not uri.startswith("postgresql"):
        yield
        return
    engine = create_engine(uri, poolclass=NullPool)
    with engine.connect() as connection:
        connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _LOCK})
        yield


def _experiment(client: MlflowClient, artifacts: Path | None, name: str) -> str:
    found = client.get_experiment_by_name(name)
    if found is not None:
        return found.experiment_id
    try:
        return client.create_experiment(name, artifact_location=artifacts.as_uri() if artifacts else None)
    except MlflowException:
        # Somebody else may have made it in between.
        found = client.get_experiment_by_name(name)
        if found is None:
            raise
        return found.experiment_id
