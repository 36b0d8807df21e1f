"""The pages: all of them are in the menu, the reference is of everything that is exported, and they build."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from ruamel.yaml import YAML

import nss

ROOT = Path(__file__).resolve().parents[1]


def pages(menu: list) -> list[str]:
    found = []
    for entry in menu:
        for value in entry.values():
            found += pages(value) if isinstance(value, list) else [value]
    return found


def test_every_page_is_in_the_menu_once() -> None:
    menu = pages(YAML(typ="safe").load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"])
    there = [str(path.relative_to(ROOT / "docs")) for path in (ROOT / "docs").rglob("*.md")]
    assert sorted(menu) == sorted(there)


def test_the_reference_is_of_everything_that_is_exported() -> None:
    listed = re.findall(r"^::: nss\.(\w+)$", (ROOT / "docs" / "api.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(listed) == sorted(nss.__all__)


def test_the_pages_build_without_a_warning(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    env = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert 'id="nss.profile"' in (tmp_path / "site" / "api.html").read_text(encoding="utf-8")
