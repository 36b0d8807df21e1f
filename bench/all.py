"""`python -m bench all`: every benchmark in a process of its own, results, pictures and one page of tables.

What judges accuracy comes first, two at a time with one thread each; what takes times comes after it, alone, with two
threads. A benchmark that fails does not stop the others, and what is finished is not measured again.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import common, tables
from bench.catalogue import BENCHES, protocol_of, settings_of
from bench.common import Row, Table, missing, say
from nss.files import read_json

FULL = Path("docs/results")
QUICK = FULL / "quick"
PROCESSES = 2
SHOWN_LINES = 15
"""of what a benchmark said that failed"""


@dataclass(frozen=True)
class Job:
    """One run of one benchmark."""

    name: str
    results: Path
    quick: bool = False
    keep: bool = False
    times: bool = True

    @property
    def result(self) -> Path:
        """Where the result file lies."""
        return self.results / f"{self.name}.json"

    @property
    def arguments(self) -> list[str]:
        """What is typed after `python -m bench`."""
        switches = {"--quick": self.quick, "--without-times": not self.times, "--keep": self.keep}
        given = [switch for switch, is_on in switches.items() if is_on]
        return [self.name, *given, "--summary", "--json", str(self.result)]

    def is_finished(self) -> bool:
        """Say whether the result file is of this protocol, or of the one with times as well, and lacks no subject."""
        if not self.result.exists():
            return False
        result = read_json(self.result)
        return result["protocol"] in self._protocols() and not missing(result)

    def _protocols(self) -> list[dict[str, Any]]:
        kinds = {self.times, True}
        return [protocol_of(settings_of(self.name, command="", quick=self.quick, times=kind)) for kind in kinds]


def run(results: Path, *, quick: bool = False, keep: bool = False) -> int:
    """Measure what is not finished, write the page and print what became of each. Returns 1 if any failed, else 0."""
    results.mkdir(parents=True, exist_ok=True)
    side, alone = jobs(results, quick=quick, keep=keep)
    with ThreadPoolExecutor(PROCESSES) as pool:
        done = list(pool.map(lambda job: execute(job, threads=1), side))
    failed = {row["name"] for row in done if not row["ok"]}
    done += [execute(job, threads=PROCESSES) for job in alone if job.name not in failed]
    tables.write(results)
    rows = together(done)
    common.show([Table(f"all results: {results}", ("name", "seconds", "cpu_seconds", "ok"), rows)])
    return 0 if all(row["ok"] for row in rows) else 1


def jobs(results: Path, *, quick: bool, keep: bool) -> tuple[list[Job], list[Job]]:
    """Return what may run beside another, without times, and what must run alone. keep: see `Settings`."""
    # The longest first, so that two are busy to the end, and the last of them first: rq4 has a base model of its own,
    # and need not wait for the one that the others share.
    last_first = [*BENCHES.items()][::-1]
    side = [
        Job(name, results, quick, keep=keep and entry.kept and not entry.times, times=not entry.times)
        for name, entry in sorted(last_first, key=lambda each: not each[1].kept)
        if not entry.alone
    ]
    alone = [
        Job(name, results, quick, keep=keep and entry.kept)
        for name, entry in BENCHES.items()
        if entry.alone or entry.times
    ]
    return side, alone


def execute(job: Job, *, threads: int) -> Row:
    """Run one job if it is not finished. Returns name, wall and CPU seconds, and whether its result is there."""
    if job.is_finished():
        return {"name": job.name, "seconds": 0.0, "cpu_seconds": 0.0, "ok": True}
    log = common.CACHE / "logs" / f"{job.name}.txt"
    log.parent.mkdir(parents=True, exist_ok=True)
    say(f"{job.name}: started, with {threads} threads{'' if job.times else ', without times'}")
    started = time.perf_counter()
    code, cpu_seconds = _call(job.arguments, threads, log)
    seconds = time.perf_counter() - started
    say(f"{job.name}: {'finished' if code == 0 else f'failed with status {code}'} after {seconds:.0f} s")
    if code != 0:
        said = log.read_text(encoding="utf-8", errors="replace").splitlines()
        say("\n".join(f"  {line}" for line in [*said[-SHOWN_LINES:], f"all of it: {log}"]))
    return {"name": job.name, "seconds": seconds, "cpu_seconds": cpu_seconds, "ok": code == 0}


def _call(arguments: list[str], threads: int, log: Path) -> tuple[int, float]:
    """Return the exit status and the CPU seconds of `python -m bench` and of all that it started."""
    env = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, "-m", "bench", *arguments]
    with log.open("wb") as file:
        process = subprocess.Popen(command, env=env, stdin=subprocess.DEVNULL, stdout=file, stderr=file)
        # os.wait4 says what this process alone has used; the resource module adds up all that have ended.
        _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    return process.returncode, used.ru_utime + used.ru_stime


def together(done: Iterable[Row]) -> list[Row]:
    """Return one row a benchmark: its seconds in all runs, and whether all of them succeeded."""
    rows: dict[str, Row] = {}
    for each in done:
        row = rows.setdefault(each["name"], {"name": each["name"], "seconds": 0.0, "cpu_seconds": 0.0, "ok": True})
        row["ok"] = row["ok"] and each["ok"]
        for name in ("seconds", "cpu_seconds"):
            row[name] += each[name]
    return list(rows.values())
