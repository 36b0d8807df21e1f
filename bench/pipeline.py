"""What the pipeline itself costs: commands that find nothing to do, and a stage that has next to nothing to do.

Everything runs in a copy of the repository, as commands that a user would type.
"""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from matplotlib.figure import Figure
from ruamel.yaml import YAML

from bench.common import Report, Row, Settings, Table, said, show
from flows.launch import Server

ROOT = Path(__file__).resolve().parent.parent
FACTORY = "nss.zoo:lenet"
REPEATS, QUICK_REPEATS = 7, 2
IDLE, SERVED, REPRO, STAGE = (
    "nss run, nothing to do",
    "nss run with a Prefect server, nothing to do",
    "dvc repro, nothing to do",
    "what an executed stage adds",
)
# Seconds on two cores.
LIMITS = {IDLE: 10.0, SERVED: 3.0, REPRO: 2.0, STAGE: 6.0}
EXECUTED = "nss run with a Prefect server, one stage executed"
PROTOCOL = {
    "workspace": "a copy of the repository on the digits, every stage executed once before",
    "taken": f"{REPEATS} times in turn, the medians are shown",
    STAGE: "a run in which readapt, which has nothing to do, is executed, less the run with nothing to do before it",
}
LEFT_OUT = f"{QUICK_REPEATS} times in turn in place of {REPEATS}"
COLUMNS = "median seconds and the worst, the limit that is set for the median, and whether it keeps within."
_FOREIGN = ("MLFLOW_", "PREFECT_", "DVC_", "NSS_", "GIT_")


def run(settings: Settings) -> Report:
    """Time every case; nothing is taken from the cache."""
    report = Report(settings, said(settings, PROTOCOL, LEFT_OUT))
    with tempfile.TemporaryDirectory(prefix="nss-bench-") as folder, served(Path(folder) / "prefect") as url:
        bench = Bench(Path(folder) / "repository", url)
        bench.prepare(next(iter(settings.models), FACTORY))
        report.rows = timed(bench.cases(), QUICK_REPEATS if settings.quick else REPEATS)
    report.summary = summarise(report.rows)
    show(tables(report.summary))
    return report


def tables(summary: Sequence[Row]) -> list[Table]:
    """Return what is shown of a summary."""
    return [Table("what the pipeline costs, in seconds", ("method", "seconds", "worst", "limit", "within"), summary)]


@contextmanager
def served(home: Path) -> Iterator[str]:
    """Yield the address of a Prefect server whose home is a folder of ours; ours is the commands' home too."""
    os.environ |= {"PREFECT_HOME": str(home), "PREFECT_SERVER_ANALYTICS_ENABLED": "false", "DO_NOT_TRACK": "1"}
    server = Server.start()
    server.wait()
    yield server.url
    server.stop()


@dataclass
class Bench:
    """A copy of the repository and the address of a Prefect server."""

    root: Path
    url: str

    def prepare(self, factory: str) -> None:
        """Copy what git tracks or would track, and run the pipeline once on the digits with a small model."""
        command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
        for name in filter(None, names):
            if not (ROOT / name).is_file():
                continue
            (self.root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, self.root / name)
        self.change("base", factory=factory, epochs=2)
        for command in (["git", "init", "-q"], ["nss", "data", "demo"], ["nss", "run"]):
            self.call(*command, PREFECT_API_URL=self.url)

    def cases(self) -> Mapping[str, Callable[[], float]]:
        """Return what is timed. A seed that was never used makes a stage run, which needs none when nothing came."""
        seeds = count(1000)

        def executed() -> float:
            self.change("readapt", seed=next(seeds))
            return self.call("nss", "run", PREFECT_API_URL=self.url)

        return {
            IDLE: lambda: self.call("nss", "run"),
            SERVED: lambda: self.call("nss", "run", PREFECT_API_URL=self.url),
            EXECUTED: executed,
            REPRO: lambda: self.call("dvc", "repro"),
        }

    def call(self, *command: str, **env: str) -> float:
        """Run a command, which must succeed, and return how many seconds it took."""
        plain = {name: value for name, value in os.environ.items() if not name.startswith(_FOREIGN)}
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        own = {"PATH": path, "PYTHONPATH": str(self.root), "PREFECT_HOME": os.environ["PREFECT_HOME"], **env}
        start = time.perf_counter()
        done = subprocess.run(command, cwd=self.root, env=plain | own, capture_output=True, text=True, check=False)
        seconds = time.perf_counter() - start
        if done.returncode != 0:
            raise SystemExit(f"bench: {' '.join(command)} ended with {done.returncode}\n{done.stdout}{done.stderr}")
        return seconds

    def change(self, group: str, **values: object) -> None:
        """Set parameters of one group."""
        yaml = YAML()
        content = yaml.load(self.root / "params.yaml")
        content[group].update(values)
        yaml.dump(content, self.root / "params.yaml")


def timed(cases: Mapping[str, Callable[[], float]], repeats: int) -> list[Row]:
    """Take every case in turn, `repeats` times, so that other work on the machine hits all alike."""
    return [
        {"method": name, "seed": repeat, "seconds": case()} for repeat in range(repeats) for name, case in cases.items()
    ]


def summarise(rows: Sequence[Row]) -> list[Row]:
    """Return median and worst of every case that has a limit, and whether the median keeps it."""
    taken: dict[str, list[float]] = {}
    for row in rows:
        taken.setdefault(row["method"], []).append(row["seconds"])
    taken[STAGE] = [more - less for more, less in zip(taken.pop(EXECUTED), taken[SERVED], strict=True)]
    return [
        {
            "method": name,
            "seconds": statistics.median(taken[name]),
            "worst": max(taken[name]),
            "limit": limit,
            "within": statistics.median(taken[name]) <= limit,
        }
        for name, limit in LIMITS.items()
    ]


def draw(report: Report, path: Path) -> None:
    """A bar for each median, a mark for its limit."""
    names = [row["method"] for row in report.summary]
    figure = Figure(figsize=(8, 2.6), layout="constrained")
    axes = figure.subplots()
    axes.barh(names, [row["seconds"] for row in report.summary], color="tab:blue", label="median")
    axes.plot([row["limit"] for row in report.summary], names, "|", color="tab:red", markersize=22, label="limit")
    axes.invert_yaxis()
    axes.set(xlabel="seconds")
    axes.legend()
    figure.savefig(path, dpi=110)
