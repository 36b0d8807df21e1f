"""Profiling in shards, in threads and on a real Dask cluster, against one pass over everything."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from distributed import LocalCluster
from prefect.testing.utilities import prefect_test_harness

from nss.data import load_data
from nss.errors import NssError
from nss.files import write_json
from nss.ingest import demo
from nss.model import build_model, load_model, save_model
from nss.profile import METRICS, Profile, profile
from tasks.fan_out import profile_in_shards
from tasks.params import ProfileParams
from tasks.workspace import Workspace


@pytest.fixture(scope="module")
def harness(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A Prefect of its own, results included."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PREFECT_LOCAL_STORAGE_PATH", str(tmp_path_factory.mktemp("results")))
        with prefect_test_harness(server_startup_timeout=120):
            yield


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """The digits and an untrained base model."""
    found = Workspace(tmp_path_factory.mktemp("workspace"))
    demo(found.data)
    data = load_data(found.data)
    model = build_model("nss.zoo:lenet", data.classes, data.image_shape, seed=0)
    save_model(model, found.out("base") / "model")
    write_json(found.out("base") / "source.json", {"batches": [batch.digest for batch in data.batches]})
    return found


def settings(**changes: object) -> ProfileParams:
    fixed = {"metrics": list(METRICS), "split": "train", "samples_per_class": 70, "batch_size": 64, "windows": 0}
    return ProfileParams(**{**fixed, "device": "cpu", "bf16": False, "shards": 4, "dask": None, **changes})


@pytest.fixture(scope="module")
def whole(workspace: Workspace) -> Profile:
    """One process, one pass."""
    model, data = load_model(workspace.out("base") / "model"), load_data(workspace.data)
    return profile(model, data.split("train"), METRICS, samples_per_class=70, batch_size=64)


def assert_equal(left: Profile, right: Profile) -> None:
    assert torch.equal(left.counts, right.counts)
    assert dict(left.positions) == dict(right.positions)
    for name, layers in left.sums.items():
        for layer, rows in layers.items():
            torch.testing.assert_close(rows, right.sums[name][layer], rtol=1e-9, atol=1e-9, msg=f"{name} {layer}")
    for layer, rows in left.grams.items():
        torch.testing.assert_close(rows, right.grams[layer], rtol=1e-9, atol=1e-9, msg=layer)


def leftovers(workspace: Workspace) -> list[Path]:
    return [path for path in (workspace.root / "artifacts").iterdir() if path.name.startswith(".shards")]


def test_four_shards_in_threads_give_the_profile_of_one_pass(
    harness: None, workspace: Workspace, whole: Profile
) -> None:
    assert_equal(profile_in_shards(settings(), workspace), whole)
    assert leftovers(workspace) == []


def test_four_shards_on_a_cluster_of_two_processes_give_the_profile_of_one_pass(
    harness: None, workspace: Workspace, whole: Profile
) -> None:
    with LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None) as cluster:
        assert_equal(profile_in_shards(settings(dask=cluster.scheduler_address), workspace), whole)
    assert leftovers(workspace) == []


def test_a_cluster_that_does_not_answer_is_named(
    harness: None, workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tasks.fan_out._PATIENCE_S", 1)
    with pytest.raises(NssError, match=r"tcp://127\.0\.0\.1:9"):
        profile_in_shards(settings(dask="tcp://127.0.0.1:9"), workspace)
    assert leftovers(workspace) == []
