"""Results as lines for a terminal."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Any

from nss.files import read_json
from tasks.reasons import triage_words, verdict_words

if TYPE_CHECKING:
    from flows.doctor import Finding
    from flows.maintain import CycleReport, StageReport
    from nss.ingest import Added
    from tasks.workspace import Workspace

# The one figure of a stage that people look at first: name in its metrics.json, and how to write it.
_KEY_METRIC = {
    "base": ("val_accuracy", "validation accuracy {:.1%}"),
    "profile": ("neurons", "{} neurons"),
    "slice": ("slices", "{} slices"),
    "restructure": ("macs_kept", "{:.0%} of the multiply-adds"),
    "readapt": ("new_accuracy", "new images {:.1%}"),
    "extend": ("new_accuracy", "new classes {:.1%}"),
    "evaluate": ("accuracy", "accuracy {:.1%}"),
}


def stage_line(stage: StageReport) -> str:
    """One line: name, outcome, seconds, key figure.

    >>> stage_line(StageReport("slice", "cached", 0.1, "", {"slices": 4}))  # doctest: +SKIP
    'slice      Cached     0.1 s  4 slices'
    """
    figure = _WORDS[stage.stage](stage.metrics) if stage.stage in _WORDS else _figure(stage)
    return f"{stage.stage:<11} {stage.outcome.capitalize():<9} {stage.seconds:6.1f} s  {figure}".rstrip()


def _figure(stage: StageReport) -> str:
    if stage.metrics.get("done") == 0:
        return "nothing to do"
    name, text = _KEY_METRIC.get(stage.stage, ("", ""))
    value = stage.metrics.get(name)
    return "" if value is None else text.format(value)


def _needed(metrics: dict[str, float | None]) -> str:
    return ", ".join(name for name, needed in metrics.items() if needed) or "nothing needed"


def _promoted(metrics: dict[str, float | None]) -> str:
    if not metrics["candidates"]:
        return "no candidate"
    return f"{'one' if metrics['promoted'] else 'none'} of {metrics['candidates']} promoted"


# Of these stages, no single figure says it.
_WORDS = {"triage": _needed, "gate": _promoted}


def summary(report: CycleReport, workspace: Workspace, *, is_temporary: bool) -> str:
    """What came out of a cycle and where to look. is_temporary: whether Prefect's server has ended with the run."""
    scores = read_json(workspace.out("evaluate") / "evaluation.json")
    model, slices = scores["model"], scores["slices"]
    figures = read_json(workspace.out("evaluate") / "metrics.json")
    sizes = read_json(workspace.out("restructure") / "metrics.json")
    tuned = read_json(workspace.out("readapt") / "metrics.json")
    grown = read_json(workspace.out("extend") / "result.json")
    lines = [
        "",
        f"accuracy    {model['accuracy']:.2%} on {model['images']} held-out images",
        f"worst class {model['worst_class']} {model['worst_accuracy']:.2%}",
        f"slices      {len(slices['slices'])}, told no category {slices['vote_accuracy']:.2%}",
        *(_slice_line(each) for each in slices["slices"]),
        *_size_lines(sizes, figures),
        *_following_lines(tuned, figures),
        *_learning_lines(grown, figures),
        *_triage_lines(workspace),
        *_verdict_lines(workspace),
        *registered_lines(report),
        "",
        "MLflow runs",
        f"  {'cycle':<11} {report.run_id or 'not logged'}",
        *(f"  {each.stage:<11} {each.run_id or 'not logged'}" for each in report.stages),
        "",
        f"MLflow  {_mlflow_hint(report)}",
        f"Prefect {_prefect_hint(report, is_temporary)}",
        "Report  nss report",
    ]
    return "\n".join(lines)


def _size_lines(sizes: dict[str, Any], scores: dict[str, Any]) -> list[str]:
    if not sizes["done"]:
        return []
    shares = f"{sizes['macs_kept']:.0%} of the multiply-adds, {sizes['parameters_kept']:.0%} of the weights"
    return [f"smaller     {scores['restructured_accuracy']:.2%} with {shares}"]


def _following_lines(tuned: dict[str, Any], scores: dict[str, Any]) -> list[str]:
    if not tuned["done"]:
        return []
    words = [f"old images {scores['accuracy']:.2%} -> {scores['readapted_accuracy']:.2%}"]
    if "new_accuracy" in scores:
        words.insert(0, f"new images {scores['new_accuracy']:.2%} -> {scores['readapted_new_accuracy']:.2%}")
    return [f"readapted   {', '.join(words)}, {tuned['moved_share']:.0%} of the weights moved"]


def _learning_lines(grown: dict[str, Any], scores: dict[str, Any]) -> list[str]:
    if not grown["done"]:
        return []
    words = [f"old images {scores['accuracy']:.2%} -> {_told(scores, '')}"]
    if "extended_new_accuracy" in scores:
        words.insert(0, f"new images {_told(scores, 'new_')}")
    return [f"extended    by {', '.join(grown['classes'])}: {', '.join(words)}"]


def _triage_lines(workspace: Workspace) -> list[str]:
    return ["triage", *(f"  {verb:<12} {why}" for verb, why in triage_words(workspace).items())]


def _verdict_lines(workspace: Workspace) -> list[str]:
    decision = read_json(workspace.out("gate") / "gate.json")
    promoted = decision["promoted"] or ("nothing" if decision["judgements"] else "there is no candidate")
    lines = [f"  {each['verb']:<12} {each['verdict']}: {verdict_words(each)}" for each in decision["judgements"]]
    return [f"verdict     {decision['verdict']}: {promoted}", *lines]


def registered_lines(report: CycleReport) -> list[str]:
    """Say which version the gate's choice is, and whether it is the champion."""
    if report.version is None:
        return []
    what = {"candidate": "waits: `nss promote` makes it the champion", "promoted": "is the champion"}
    name = f"{report.version.name} version {report.version.number}"
    return [f"registered  {name} {what.get(report.outcome, report.outcome)}"]


def _told(scores: dict[str, Any], part: str) -> str:
    told = scores[f"extended_{part}told_accuracy"]
    return f"{scores[f'extended_{part}accuracy']:.2%} ({told:.2%} told old or new)"


def _slice_line(each: dict[str, Any]) -> str:
    names = ", ".join(each["categories"])
    figures = f"recall {each['recall']:.1%}, false positives {each['false_positive_rate']:.1%}"
    return f"  {each['name']:<9} {names} ({figures}, {each['parameters']:,} parameters)"


def _mlflow_hint(report: CycleReport) -> str:
    # It imports MLflow, which a cycle has imported already and most commands need not wait for.
    from tasks.store_address import shown_uri

    uri = shown_uri(report.tracking_uri)
    if uri.startswith("http"):
        return f"{uri.rstrip('/')}/#/experiments/{report.experiment_id}/runs/{report.run_id}"
    return f"mlflow ui --backend-store-uri {shlex.quote(uri)}"


def _prefect_hint(report: CycleReport, is_temporary: bool) -> str:
    from prefect.settings import PREFECT_API_URL, PREFECT_UI_URL

    if is_temporary:
        return "no server: `prefect server start`, then PREFECT_API_URL=http://127.0.0.1:4200/api nss run"
    base = PREFECT_UI_URL.value() or PREFECT_API_URL.value().removesuffix("/").removesuffix("/api")
    return f"{base}/runs/flow-run/{report.flow_run_id}"


def added(result: Added) -> str:
    """What adding a source did."""
    if result.already_present:
        return f"nothing new: the batch {result.digest} is in the data set already"
    splits = ", ".join(f"{count} {name}" for name, count in result.splits.items())
    lines = [f"added {result.images} images as batch {result.digest}: {splits}"]
    if result.new_classes:
        lines.append(f"new classes: {', '.join(result.new_classes)}")
    if result.repeated:
        lines.append(f"{result.repeated} were in the data set before, {result.relabelled} of them with another label")
    return "\n".join(lines)


def data_status(content: dict[str, Any]) -> str:
    """Batches, classes and splits of the data set, and its version."""
    shape = " x ".join(map(str, content["image_shape"]))
    splits = ", ".join(f"{count} {name}" for name, count in content["images"].items())
    version = "data.dvc names exactly this" if content["committed"] else "NOT what data.dvc names: `dvc add data`"
    lines = [f"{len(content['classes'])} classes, images {shape}: {splits}", f"version {content['md5']}, {version}"]
    lines += [f"batch {each['digest']}: {each['images']} images" for each in content["batches"]]
    width = max(map(len, content["classes"]))
    for name, counts in content["per_class"].items():
        lines.append(f"  {name:<{width}} " + ", ".join(f"{count} {split}" for split, count in counts.items()))
    return "\n".join(lines)


def findings(rows: list[Finding]) -> str:
    """One line a check, and how to mend what is wrong."""
    lines = []
    for row in rows:
        lines.append(f"{'ok   ' if row.ok else 'WRONG'} {row.check:<14} {row.found}")
        if row.fix and not row.ok:
            lines.append(f"      {'':<14} fix: {row.fix}")
    return "\n".join(lines)
