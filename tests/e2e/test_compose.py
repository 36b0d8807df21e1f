"""mlflow/compose.yaml without containers: read, and its MLflow command started here."""

from __future__ import annotations

import re
import socket
import subprocess
import sys
import time
import tomllib
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from ruamel.yaml import YAML

FOLDER = Path(__file__).resolve().parents[2] / "mlflow"
CONTENT = YAML(typ="safe").load(FOLDER / "compose.yaml")
SERVICES: dict[str, dict[str, Any]] = CONTENT["services"]
# It makes the bucket and ends.
ONCE = {"bucket"}
# It answers nobody.
SILENT = {"worker"}
# A tag with fewer numbers is another image next month.
RELEASE = r"RELEASE\.\d{4}-\d\d-\d\dT\d\d-\d\d-\d\dZ"
FULL = {
    "postgres": r"\d+\.\d+-[a-z]+",
    "minio/minio": RELEASE,
    "minio/mc": RELEASE,
    "prefecthq/prefect": r"\d+\.\d+\.\d+-python3\.\d+",
    "python": r"3\.\d+\.\d+-slim-[a-z]+",
}


def filled(text: str, **env: str) -> str:
    """What Compose makes of ${NAME:-default}."""
    return re.sub(r"\$\{(\w+):-([^}]*)\}", lambda found: env.get(found[1]) or found[2], text)


def test_there_are_the_stores_the_servers_and_a_worker() -> None:
    assert SERVICES.keys() == {"postgres", "store", "bucket", "mlflow", "prefect", "worker"}


@pytest.mark.parametrize("name", SERVICES)
def test_every_container_has_an_init_and_comes_back_after_a_restart(name: str) -> None:
    assert SERVICES[name]["init"] is True
    assert SERVICES[name]["restart"] == ("no" if name in ONCE else "unless-stopped")


@pytest.mark.parametrize("name", sorted(SERVICES.keys() - ONCE - SILENT))
def test_who_answers_is_asked_for_its_health(name: str) -> None:
    check = SERVICES[name]["healthcheck"]
    assert check["test"][0] == "CMD"
    assert check["retries"] >= 10


@pytest.mark.parametrize("name", SERVICES)
def test_nobody_starts_before_what_it_needs_is_ready(name: str) -> None:
    for needed, how in SERVICES[name].get("depends_on", {}).items():
        ready = "service_completed_successfully" if needed in ONCE else "service_healthy"
        assert how == {"condition": ready}
    # Whom a service names in its settings it waits for.
    settings = " ".join(map(str, SERVICES[name].get("environment", {}).values()))
    named = {other for other in SERVICES if re.search(rf"[/@]{other}:\d", settings)}
    waits = set(SERVICES[name].get("depends_on", {}))
    assert named <= waits | {needed for other in waits for needed in SERVICES[other].get("depends_on", {})}


def test_images_and_packages_are_named_by_full_versions() -> None:
    images = [service["image"] for service in SERVICES.values() if "image" in service]
    lines = (FOLDER / "Dockerfile").read_text().splitlines()
    images += [line.split()[1] for line in lines if line.startswith("FROM ")]
    tags = dict(image.split(":") for image in images)
    assert tags.keys() == FULL.keys()
    assert {name: tag for name, tag in tags.items() if not re.fullmatch(FULL[name], tag)} == {}
    (packages,) = [line for line in lines if "pip install" in line and "mlflow" in line]
    for name in ("mlflow", r"psycopg\[binary\]", "boto3"):
        assert re.search(rf"{name}==\d+\.\d+\.\d+", packages)


@pytest.mark.parametrize("name", ["prefect", "mlflow"])
def test_the_servers_are_of_a_version_that_the_package_asks_for(name: str) -> None:
    served = {
        "prefect": SERVICES["prefect"]["image"].split(":")[1].split("-")[0],
        "mlflow": re.search(r"mlflow==([\d.]+)", (FOLDER / "Dockerfile").read_text())[1],
    }
    asked = tomllib.loads((FOLDER.parent / "pyproject.toml").read_text())["project"]["dependencies"]
    (needed,) = [each for each in map(Requirement, asked) if each.name == name]
    assert needed.specifier.contains(served[name])


def test_images_are_built_by_targets_that_there_are() -> None:
    text = (FOLDER / "Dockerfile").read_text()
    for name in ("mlflow", "worker"):
        build = SERVICES[name]["build"]
        assert (FOLDER / build["context"] / build["dockerfile"]).resolve() == FOLDER / "Dockerfile"
        assert f" AS {build['target']}\n" in text
    copied = {name for names in re.findall(r"^COPY (.+) \S+$", text, re.MULTILINE) for name in names.split()}
    assert all((FOLDER.parent / name).exists() for name in copied)
    ignored = (FOLDER / "Dockerfile.dockerignore").read_text().splitlines()
    assert {line[1:] for line in ignored if line.startswith("!")} == copied
    assert "*" in ignored


def test_what_is_kept_is_in_volumes_and_what_is_mounted_exists() -> None:
    mounts = [filled(mount).split(":") for service in SERVICES.values() for mount in service.get("volumes", [])]
    names = {source for source, *_ in mounts if not source.startswith(".")}
    assert names == CONTENT["volumes"].keys() == {"postgres", "store"}
    assert all((FOLDER / source).exists() for source, *_ in mounts if source.startswith("."))
    assert "CREATE DATABASE prefect;" in (FOLDER / "databases.sql").read_text()


def test_ports_are_published_to_this_machine_alone_and_no_password_is_written_down() -> None:
    for service in SERVICES.values():
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))
        for key, value in service.get("environment", {}).items():
            if re.search("PASSWORD|SECRET", key):
                assert re.fullmatch(r"\$\{\w+:\?[^}]+\}", value), key
            for user in re.findall(r"//nss:([^@]*)@", value):
                assert user.startswith("${"), key


def test_the_worker_asks_the_servers_by_their_names_and_works_in_the_repository() -> None:
    worker = SERVICES["worker"]
    assert worker["environment"]["MLFLOW_TRACKING_URI"] == "http://mlflow:5000"
    assert worker["environment"]["PREFECT_API_URL"] == "http://prefect:4200/api"
    assert [filled(mount) for mount in worker["volumes"]] == [f"..:{worker['working_dir']}"]
    assert [filled(mount, NSS_WORKSPACE="/srv/pets") for mount in worker["volumes"]] == ["/srv/pets:/repository"]


@pytest.mark.parametrize("options", ["", "--resize 64x64 --new-classes"])
def test_the_worker_serves_with_the_options_that_it_is_given(tmp_path: Path, options: str) -> None:
    (tmp_path / "nss").write_text('#!/bin/sh\necho "$@"\n')
    (tmp_path / "nss").chmod(0o755)
    # Compose writes $ for $$.
    command = [word.replace("$$", "$") for word in SERVICES["worker"]["command"]]
    env = {"PATH": f"{tmp_path}:/usr/bin:/bin"}
    env["NSS_SERVE"] = filled(SERVICES["worker"]["environment"]["NSS_SERVE"], NSS_SERVE=options)
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["serve", *options.split()]


def test_mlflow_answers_by_its_service_name_and_its_published_port_and_nobody_else(tmp_path: Path) -> None:
    """The command of the container, with other stores behind it and another port in front."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    settings = SERVICES["mlflow"]["environment"]
    words = [word.replace("--port=5000", f"--port={port}") for word in SERVICES["mlflow"]["command"][1:]]
    env = {name: settings[name] for name in ("MLFLOW_SERVER_ENABLE_JOB_EXECUTION", "MLFLOW_DISABLE_TELEMETRY")}
    env["MLFLOW_BACKEND_STORE_URI"] = f"sqlite:///{tmp_path / 'tracking.db'}"
    env["MLFLOW_ARTIFACTS_DESTINATION"] = str(tmp_path / "artifacts")
    path = {"PATH": str(Path(sys.executable).parent)}
    command = [sys.executable, "-m", "mlflow", *words]
    with (
        (tmp_path / "log").open("wb") as log,
        subprocess.Popen(command, env=env | path, cwd=tmp_path, stdout=log, stderr=log) as server,
    ):
        try:
            wait_for_answer(server, port, tmp_path / "log")
            published = [mapping.split(":")[1] for mapping in SERVICES["mlflow"]["ports"]]
            hosts = [
                "mlflow",
                "mlflow:5000",
                *(f"{host}:{each}" for host in ("localhost", "127.0.0.1") for each in published),
            ]
            assert {host: answer(port, host) for host in hosts} == dict.fromkeys(hosts, 200)
            assert answer(port, "elsewhere.example") == 403
        finally:
            server.terminate()


def answer(port: int, host: str) -> int:
    """The status that a question for experiments gets under a name."""
    url = f"http://127.0.0.1:{port}/api/2.0/mlflow/experiments/get?experiment_id=0"
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers={"Host": host}), timeout=20) as found:
            return found.status
    except urllib.error.HTTPError as refused:
        return refused.code


def wait_for_answer(server: subprocess.Popen[bytes], port: int, log: Path) -> None:
    deadline = time.monotonic() + 120
    while True:
        try:
            answer(port, "localhost")
        except OSError:
            assert server.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        else:
            return
