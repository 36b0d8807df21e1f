"""What the registry holds answers MLflow's own tools: `mlflow.pyfunc.load_model` and `mlflow models serve`."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest
import torch

import nss
from nss.errors import DataError, ModelError
from tasks.registry import Registry
from tasks.tracking import Tracker

CLASSES = ("zebra", "ape", "t-shirt (top)")
NET = """
from torch import nn


def net(num_classes, input_shape):
    return nn.Sequential(nn.Flatten(), nn.Linear(256, 8), nn.ReLU(), nn.Linear(8, num_classes))
"""


def pixels(count: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(count)
    return torch.randint(0, 256, (count, 1, 16, 16), dtype=torch.uint8, generator=generator)


def probabilities(model: torch.nn.Module, images: torch.Tensor) -> np.ndarray:
    with torch.no_grad():
        odds = model(images).double().exp()
    return (odds / odds.sum(1, keepdim=True)).numpy()


@pytest.fixture
def model(tmp_path: Path) -> torch.nn.Module:
    made = nss.build_model("nss.zoo:lenet", classes=CLASSES, input_shape=(1, 16, 16), seed=0).eval()
    nss.save_model(made, tmp_path / "model")
    return made


@pytest.fixture
def champion(tracker: Tracker, tmp_path: Path, model: torch.nn.Module) -> str:
    """Return the address of a registered model."""
    run = tracker.open("base", {"stage_key": "k"}, {})
    model_id = tracker.log_model(run.info.run_id, "base", tmp_path / "model", {})
    registry = Registry(tracker, "digits")
    registry.set_alias("champion", registry.add("key", run.info.run_id, model_id, {}).number)
    return "models:/digits@champion"


@pytest.fixture
def store(tracker: Tracker, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(mlflow.tracking._tracking_service.utils, "_tracking_uri", None)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracker.uri)
    yield
    mlflow.set_tracking_uri(None)


@pytest.mark.usefixtures("store")
def test_a_registered_version_answers_arrays_with_a_column_for_each_class(
    champion: str, model: torch.nn.Module
) -> None:
    images = pixels(600)
    found = mlflow.pyfunc.load_model(champion).predict(images.numpy())
    assert tuple(found.columns) == CLASSES
    np.testing.assert_allclose(found.to_numpy(), probabilities(model, images), atol=1e-6)


@pytest.mark.usefixtures("store")
def test_what_a_registered_version_takes_and_answers_is_said_where_mlflow_shows_it(champion: str) -> None:
    signature = mlflow.models.get_model_info(champion).signature
    (taken,) = signature.inputs.inputs
    assert (taken.type, taken.shape) == (np.dtype("uint8"), (-1, 1, 16, 16))
    assert tuple(signature.outputs.input_names()) == CLASSES


@pytest.mark.usefixtures("store")
@pytest.mark.parametrize("shape", [(2, 1, 8, 8), (2, 3, 16, 16), (16, 16)])
def test_images_of_another_shape_are_refused(champion: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(mlflow.exceptions.MlflowException, match=r"[Ss]hape"):
        mlflow.pyfunc.load_model(champion).predict(np.zeros(shape, np.uint8))


def test_without_mlflow_in_between_floats_are_taken_and_what_is_no_image_is_refused(
    tmp_path: Path, model: torch.nn.Module
) -> None:
    from nss.pyfunc import _load_pyfunc

    served, images = _load_pyfunc(str(tmp_path / "model")), pixels(3)
    whole = served.predict(images.numpy()).to_numpy()
    np.testing.assert_allclose(served.predict(images.numpy() / np.float64(255)).to_numpy(), whole, atol=1e-6)
    assert served.predict(images[:0].numpy()).shape == (0, 3)
    with pytest.raises(DataError, match="int64"):
        served.predict(images.numpy().astype(np.int64))


@pytest.mark.usefixtures("store")
def test_a_factory_of_the_users_is_loaded_only_when_its_package_was_allowed(
    tracker: Tracker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_served_nets.py").write_text(NET)
    monkeypatch.syspath_prepend(str(tmp_path))
    shape = (1, 16, 16)
    made = nss.build_model("own_served_nets:net", classes=CLASSES, input_shape=shape, seed=0, allow=["own_served_nets"])
    nss.save_model(made, tmp_path / "own")
    addresses = {}
    for packages in ((), ("own_served_nets",)):
        part = Tracker(tracker.uri, tmp_path / "artifacts", packages=packages)
        run = part.open("base", {"stage_key": f"allowed-{len(packages)}"}, {})
        addresses[packages] = f"models:/{part.log_model(run.info.run_id, 'base', tmp_path / 'own', {})}"
    found = mlflow.pyfunc.load_model(addresses["own_served_nets",]).predict(pixels(2).numpy())
    np.testing.assert_allclose(found.to_numpy(), probabilities(made.eval(), pixels(2)), atol=1e-6)
    with pytest.raises(ModelError, match="own_served_nets"):
        mlflow.pyfunc.load_model(addresses[()])


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@pytest.fixture
def served(tracker: Tracker, champion: str, tmp_path: Path) -> Iterator[str]:
    """Yield the address of a real `mlflow models serve`."""
    port = free_port()
    command = [sys.executable, "-m", "mlflow", "models", "serve", "-m", champion, "--env-manager", "local"]
    with (tmp_path / "served.log").open("w") as log:
        process = subprocess.Popen(
            [*command, "--port", str(port)],
            env={**os.environ, "MLFLOW_TRACKING_URI": tracker.uri},
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    address, end = f"http://127.0.0.1:{port}", time.monotonic() + 300
    try:
        while not answers(address):
            assert process.poll() is None, (tmp_path / "served.log").read_text()
            assert time.monotonic() < end
            time.sleep(0.2)
        yield address
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def answers(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"{address}/ping", timeout=5):
            return True
    except OSError:
        return False


def ask(address: str, content: dict[str, Any]) -> Any:
    request = urllib.request.Request(
        f"{address}/invocations", json.dumps(content).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)


def test_mlflow_models_serve_answers_over_http_and_refuses_what_is_no_image(
    served: str, model: torch.nn.Module
) -> None:
    images = pixels(5)
    answer = ask(served, {"inputs": images.tolist()})["predictions"]
    assert [tuple(row) for row in answer] == [CLASSES] * 5
    np.testing.assert_allclose([list(row.values()) for row in answer], probabilities(model, images), atol=1e-6)
    with pytest.raises(urllib.error.HTTPError) as refused:
        ask(served, {"inputs": [[1, 2, 3]]})
    assert refused.value.code == 400
