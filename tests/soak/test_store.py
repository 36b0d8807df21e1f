"""Four processes at once on a tracking database that is not there yet, and on one version of a model."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

import nss
from tasks.registry import Registry
from tasks.tracking import Tracker

pytestmark = pytest.mark.soak
PROCESSES, DATABASES = 4, 8

# Each meets the others before each database, so that all ask for it within a moment.
SCRIPT = """
    import json
    import sys
    import time
    from pathlib import Path
    from tasks.registry import Registry
    from tasks.tracking import Tracker

    root, me, processes, databases = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])

    def meet(where):
        (root / f"{where}-{me}").touch()
        while len(list(root.glob(f"{where}-*"))) < processes:
            time.sleep(0.001)

    for number in range(databases):
        folder = root / f"store-{number}"
        meet(f"empty-{number}")
        begun = time.time()
        tracker = Tracker(f"sqlite:///{folder / 'tracking.db'}", folder / "artifacts")
        opened = time.time()
        run = tracker.open("base", {"stage": "base", "stage_key": me}, {})
        for step in range(10):
            tracker.log(run, metrics={f"m{step}": step})
        model = tracker.log_model(run.info.run_id, "base", root / "model", {})
        meet(f"logged-{number}")
        version = Registry(tracker, "digits").add("key", run.info.run_id, model, {"nss.model": "m"})
        tracker.end(run.info.run_id, "FINISHED")
        print(json.dumps([number, begun, opened, version.number]), flush=True)
"""


def test_four_processes_at_once_on_databases_that_are_not_there_yet_all_succeed(tmp_path: Path) -> None:
    nss.save_model(nss.build_model("nss.zoo:lenet", ["a", "b"], (1, 16, 16), seed=0), tmp_path / "model")
    command = [sys.executable, "-c", textwrap.dedent(SCRIPT), str(tmp_path)]
    processes = [
        subprocess.Popen(
            [*command, str(each), str(PROCESSES), str(DATABASES)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for each in range(PROCESSES)
    ]
    deadline = time.monotonic() + 600
    while any(process.poll() is None for process in processes):
        # One that fails would leave the others waiting for it.
        if any(process.poll() for process in processes) or time.monotonic() > deadline:
            for process in processes:
                process.kill()
        time.sleep(0.1)
    ends = [process.communicate() for process in processes]
    assert [process.returncode for process in processes] == [0] * PROCESSES, ends
    rows = [json.loads(line) for out, _ in ends for line in out.splitlines()]
    for number in range(DATABASES):
        check(tmp_path / f"store-{number}", [row[1:] for row in rows if row[0] == number])


def check(folder: Path, seen: list[tuple[float, float, int]]) -> None:
    # They were there at the same time: the last had begun before the first was through.
    assert len(seen) == PROCESSES
    assert max(begun for begun, _, _ in seen) < min(opened for _, opened, _ in seen)
    tracker = Tracker(f"sqlite:///{folder / 'tracking.db'}", folder / "artifacts")
    runs = tracker.client.search_runs([tracker.experiment_id])
    assert [(run.info.status, len(run.data.metrics)) for run in runs] == [("FINISHED", 10)] * PROCESSES
    (version,) = Registry(tracker, "digits").having("nss.key", "key")
    assert {number for _, _, number in seen} == {version.number}
