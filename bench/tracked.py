"""Log a finished benchmark to MLflow."""

from __future__ import annotations

from pathlib import Path

from bench.common import Report


def log(report: Report, result: Path, picture: Path) -> None:
    """Log the settings, the result file and the picture as one run of the experiment nss-bench."""
    from tasks.tracking import open_tracker
    from tasks.workspace import find_workspace

    tracker = open_tracker(find_workspace(), experiment="nss-bench")
    run = tracker.open(report.settings.bench, {"command": report.settings.command}, {})
    settings = {"data": report.settings.data, "models": report.settings.models, "seeds": report.settings.seeds}
    tracker.log(run, params={**settings, "quick": report.settings.quick})
    for file in (result, picture):
        tracker.client.log_artifact(run.info.run_id, str(file))
    tracker.end(run.info.run_id, "FINISHED")
