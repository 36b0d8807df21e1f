"""A disk that is really full: a small file system of its own, which only root can mount."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

pytestmark = pytest.mark.soak
MEGABYTE = 1 << 20


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """An empty file system of 100 MB."""
    target = tmp_path / "disk"
    target.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=100m", "tmpfs", str(target)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"this user may not mount a file system: {done.stderr.strip()}")
    yield target
    subprocess.run(["umount", "--lazy", str(target)], check=True)


def fill(disk: Path, left: int) -> None:
    """Leave so many bytes free."""
    (disk / "filler").unlink(missing_ok=True)
    with (disk / "filler").open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, shutil.disk_usage(disk).free - left)


def test_a_full_disk_is_named_and_with_room_again_results_are_those_of_an_undisturbed_cycle(
    copy, undisturbed, check_like, disk: Path
) -> None:
    root = shutil.copytree(copy.root, disk / "repository", symlinks=True)
    small = replace(copy, root=root, env={**copy.env, "PYTHONPATH": str(root)})
    # At once; in the middle of what the first stages write, some of them with a journal and some without.
    for left in (0, MEGABYTE // 8, 2 * MEGABYTE):
        fill(disk, left)
        ended = small.nss_run(code=2)
        assert "there is no room left on the disk" in ended.err, ended.err
        assert "Traceback" not in ended.err
    (disk / "filler").unlink()
    small.nss_run()
    check_like(small, undisturbed.first)
