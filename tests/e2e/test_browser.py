"""What people look at, in a real browser (Debian's chromium, headless): the report, MLflow's pages, and Prefect's."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "services" / "chromium.sh"
IMPOSSIBLE = 77
HEADINGS = [
    "What changed",
    "What triage found",
    "What was done",
    "Verdict",
    "Change of each class",
    "Size and speed",
    "Semantic slices",
    "Kept neurons by layer",
    "Lineage",
]
STAGES = ["base", "profile", "slice", "triage", "restructure", "readapt", "extend", "evaluate", "gate"]
# A page of a busy machine.
PATIENCE_MS = 60_000


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api")
    found = subprocess.run([str(SCRIPT)], capture_output=True, text=True, check=False, timeout=300)
    if found.returncode == IMPOSSIBLE:
        pytest.skip(found.stderr.strip())
    assert found.returncode == 0, found.stderr
    # Chromium's own sandbox refuses root.
    arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
    with sync_api.sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=found.stdout.strip(), args=arguments)


@pytest.fixture(scope="module")
def report(executed, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report") / "index.html"
    executed[0].run("nss", "report", "--out", str(path))
    return path


def screenshots(tmp_path: Path) -> Path:
    """Where people find the screenshots: the folder that $NSS_TEST_ARTIFACTS names, or the test's own."""
    folder = Path(os.environ.get("NSS_TEST_ARTIFACTS") or tmp_path)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextmanager
def serving(
    wait_for: Callable[..., None], command: Callable[[int], list[str]], health: str, folder: Path, env: dict[str, str]
) -> Iterator[str]:
    """Yield the address of a server that is running. command: from its port. health: the path that answers."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"

    def answers() -> bool:
        assert process.poll() is None, (folder / "log").read_text(encoding="utf-8")
        try:
            return urllib.request.urlopen(url + health, timeout=5).status == 200
        except OSError:
            return False

    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command(port), cwd=folder, env=env, stdout=log, stderr=log, start_new_session=True)
    try:
        wait_for(answers, f"an answer from {url}{health}")
        yield url
    finally:
        # Its worker processes too.
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(timeout=60)


@pytest.fixture(scope="module")
def mlflow_url(executed, wait_for, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server on a copy of the store of the executed clone."""
    folder = tmp_path_factory.mktemp("mlflow")
    shutil.copy2(executed[0].root / "mlflow" / "tracking.db", folder / "tracking.db")
    env = {**executed[0].env, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    del env["PYTHONPATH"]

    def command(port: int) -> list[str]:
        store = ["--backend-store-uri", f"sqlite:///{folder / 'tracking.db'}", "--workers", "1"]
        return ["mlflow", "server", *store, "--host", "127.0.0.1", "--port", str(port)]

    with serving(wait_for, command, "/health", folder, env) as url:
        yield url


@pytest.fixture
def prefect_url(executed, wait_for, tmp_path: Path) -> Iterator[str]:
    """A server with its pages and a home folder of its own."""
    home = tmp_path / "server"
    home.mkdir()
    env = {
        **executed[0].env,
        "DO_NOT_TRACK": "1",
        "PREFECT_HOME": str(home),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_UI_STATIC_DIRECTORY": str(home / "pages"),
    }

    def command(port: int) -> list[str]:
        # The pages ask this address, whatever port they come from.
        env["PREFECT_UI_API_URL"] = f"http://127.0.0.1:{port}/api"
        return ["prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)]

    with serving(wait_for, command, "/api/health", home, env) as url:
        yield url


@pytest.mark.parametrize(("scheme", "is_dark"), [("light", False), ("dark", True)])
def test_the_report_is_shown_whole_and_quiet_without_a_network(
    browser, report: Path, tmp_path: Path, scheme: str, is_dark: bool
) -> None:
    context = browser.new_context(color_scheme=scheme, offline=True, viewport={"width": 900, "height": 1000})
    page, said, asked = context.new_page(), [], []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(report.as_uri())
    page.screenshot(path=screenshots(tmp_path) / f"report-{scheme}.png", full_page=True)
    assert said == []
    assert [url for url in asked if not url.startswith("data:")] == [report.as_uri()]
    assert page.locator("h1").all_inner_texts() == ["Maintenance cycle: restructure is promoted"]
    assert page.locator("h2").all_inner_texts() == HEADINGS
    # Whatever a picture holds, the browser has read it: it has a width.
    widths = page.evaluate("[...document.images].map(image => image.complete ? image.naturalWidth : 0)")
    assert len(widths) > 10
    assert min(widths) > 0
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    brightness = sum(int(each) for each in background.removeprefix("rgb(").removesuffix(")").split(", ")) / 3
    assert (brightness < 128) is is_dark
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), (
        "the page is wider than its window"
    )
    context.close()


def test_the_report_links_the_runs_and_tells_the_latencies_that_mlflow_has(executed, report: Path) -> None:
    text = report.read_text(encoding="utf-8")
    cycle = max(executed[0].runs("cycle"), key=lambda run: run.info.start_time)
    stages = [run.info.run_id for run in executed[0].runs("stage")]
    assert len(stages) == 9
    assert [run_id for run_id in (cycle.info.run_id, *stages) if run_id not in text] == []
    assert "ms, 1 image<" in text


def test_a_narrow_window_scrolls_tables_and_not_the_page(browser, report: Path) -> None:
    page = browser.new_page(viewport={"width": 360, "height": 640})
    page.goto(report.as_uri())
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    page.close()


def candidates(executed: Any) -> dict[str, Any]:
    """The runs of the two candidates of the executed cycle, by name."""
    return {run.info.run_name: run for run in executed[0].runs("stage") if "nss.role" in run.data.tags}


def test_mlflows_runs_of_the_candidates_hold_what_the_gate_went_by(executed) -> None:
    copy, runs = executed[0], candidates(executed)
    figures = {verb: each["figures"] for verb, each in copy.json("artifacts/gate/gate.json")["candidates"].items()}
    rows = {each["verb"]: each for each in copy.json("artifacts/evaluate/candidates.json")}
    assert set(runs) == set(rows) == {"base", "restructure"}
    for verb, run in runs.items():
        classes = {f"class/{name}": value for name, value in rows[verb]["per_class"].items()}
        assert {**figures[verb], **classes}.items() <= run.data.metrics.items()
        assert (run.data.tags["nss.role"], run.data.tags["nss.verdict"]) == ("candidate", "PROMOTE")
    shared = set(runs["base"].data.metrics) & set(runs["restructure"].data.metrics)
    assert {"accuracy", "worst_class_accuracy", "parameters", "macs", "bytes", "class/0", "class/9"} <= shared


def test_mlflows_compare_page_shows_both_candidates_and_how_good_they_are(
    browser, executed, mlflow_url: str, tmp_path: Path
) -> None:
    runs = [candidates(executed)[name] for name in ("base", "restructure")]
    ids = quote(json.dumps([run.info.run_id for run in runs]))
    experiment = quote(json.dumps([runs[0].info.experiment_id]))
    page = browser.new_page(viewport={"width": 1400, "height": 2400})
    page.goto(f"{mlflow_url}/#/compare-runs?runs={ids}&experiments={experiment}")
    page.get_by_text("nss.verdict", exact=True).wait_for(timeout=PATIENCE_MS)
    page.get_by_text("class/9", exact=True).wait_for(timeout=PATIENCE_MS)
    page.screenshot(path=screenshots(tmp_path) / "mlflow-compare.png", full_page=True)
    words = page.inner_text("body").split()
    for run in runs:
        assert run.info.run_name in words
        for name in ("accuracy", "bytes", "class/9"):
            assert name in words
            # As the page rounds it.
            assert f"{run.data.metrics[name]:.3f}".rstrip("0").rstrip(".") in words
    place = words.index("nss.verdict")
    assert words[place + 1 : place + 3] == [run.data.tags["nss.verdict"] for run in runs]
    page.close()


def test_mlflows_charts_show_the_candidates_side_by_side_best_first(
    browser, executed, mlflow_url: str, tmp_path: Path
) -> None:
    runs = sorted(candidates(executed).values(), key=lambda run: -run.data.metrics["accuracy"])
    wanted = quote("tags.`nss.role` = 'candidate'")
    order = f"orderByKey={quote('metrics.`accuracy`')}&orderByAsc=false"
    page = browser.new_page(viewport={"width": 1600, "height": 2000})
    page.goto(
        f"{mlflow_url}/#/experiments/{runs[0].info.experiment_id}/runs?searchFilter={wanted}&{order}"
        "&compareRunsMode=CHART"
    )
    page.get_by_text("class/9", exact=True).first.wait_for(timeout=PATIENCE_MS)
    listed = page.locator("a[href*='/runs/']")
    listed.nth(1).wait_for(timeout=PATIENCE_MS)
    assert [name.strip() for name in listed.all_inner_texts()] == [run.info.run_name for run in runs]
    charts = page.inner_text("body")
    assert [f"class/{digit}" for digit in range(10) if f"class/{digit}\n" not in charts] == []
    page.screenshot(path=screenshots(tmp_path) / "mlflow-charts.png")
    page.close()


def test_prefects_page_of_a_run_shows_its_stages(
    browser, executed, prefect_url: str, home: Path, tmp_path: Path
) -> None:
    root = shutil.copytree(executed[0].root, tmp_path / "repository", symlinks=True)
    copy = type(executed[0])(root, {**executed[0].env, "PYTHONPATH": str(root)})
    ended = copy.nss_run(PREFECT_API_URL=f"{prefect_url}/api")
    page = browser.new_page(viewport={"width": 1400, "height": 1400})
    page.goto(f"{prefect_url}/runs/flow-run/{json.loads(ended.out)['flow_run_id']}")
    page.get_by_text("Task Runs", exact=True).click(timeout=PATIENCE_MS)
    stages = page.locator("a[href*='/runs/task-run/']:visible")
    stages.nth(len(STAGES) - 1).wait_for(timeout=PATIENCE_MS)
    page.screenshot(path=screenshots(tmp_path) / "prefect.png")
    # The newest comes first.
    assert [name for name in stages.all_inner_texts() if name.strip()][::-1] == STAGES
    page.close()
