"""The report in a real browser (Debian's chromium, headless), without a network."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

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
    (cycle,) = executed[0].runs("cycle")
    stages = [run.info.run_id for run in executed[0].runs("stage")]
    assert len(stages) == 9
    assert [run_id for run_id in (cycle.info.run_id, *stages) if run_id not in text] == []
    assert "ms, 1 image<" in text


def test_a_narrow_window_scrolls_tables_and_not_the_page(browser, report: Path) -> None:
    page = browser.new_page(viewport={"width": 360, "height": 640})
    page.goto(report.as_uri())
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    page.close()
