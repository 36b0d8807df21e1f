"""One page about the cycle that lies in artifacts/, which needs nothing beside itself, and the model cards.

The same artifacts give the same bytes. What the page shows comes from the files of the stages (tasks/report_facts.py),
from data/ and git, and from the tracking store what only that knows (tasks/report_runs.py).
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template

from nss.files import replacing
from tasks.card import model_card
from tasks.provenance import provenance_tags
from tasks.reading import read_csv
from tasks.report_facts import Facts, read_facts
from tasks.report_pictures import cycle_pictures, examples
from tasks.report_runs import Runs, find_runs, runs_of
from tasks.store_address import told, tracking_uri
from tasks.tracking import Tracker, open_tracker
from tasks.workspace import Workspace

PAGE = "report/index.html"
"""where the page lies in a workspace"""
_MOST_LISTED = 20


def write_report(workspace: Workspace, out: Path | None = None) -> tuple[Path, Facts]:
    """Write the page to `out` (default: report/index.html in the workspace). Returns its path and what it tells.

    Raises StageError, with nothing written, when no cycle has come to its end.

    >>> write_report(find_workspace())[0].name  # doctest: +SKIP
    'index.html'
    """
    facts = read_facts(workspace)
    path = out or workspace.root / PAGE
    text = page(workspace, facts, find_runs(workspace))
    with replacing(path) as part:
        part.write_text(text, encoding="utf-8")
    return path, facts


def log_report(tracker: Tracker, run_id: str, workspace: Workspace) -> None:
    """Log the page, and a card of each candidate, to the run of a cycle that has ended.

    Raises StageError when no cycle has come to its end.
    """
    facts = read_facts(workspace)
    runs = runs_of(tracker, tracker.client.get_run(run_id))
    tracker.client.log_text(run_id, page(workspace, facts, runs), PAGE)
    for each in facts.judged:
        card = model_card(workspace, each.verb, provenance_tags(workspace))
        tracker.client.log_text(run_id, card, f"report/card-{each.verb}.md")


def log_cycle(root: str, run_id: str, version_run_id: str = "", verb: str = "") -> int:
    """Log what `log_report` and `log_card` do as all that a process has to do: return its exit code.

    version_run_id, verb: of the version that the cycle led to, if to any. What prevents it is a warning.
    """
    workspace = Workspace(Path(root))
    try:
        tracker = open_tracker(workspace)
        log_report(tracker, run_id, workspace)
        if verb:
            log_card(tracker, version_run_id, workspace, verb)
    except Exception as error:
        reason = told(error, tracking_uri(workspace))
        sys.stderr.write(f"warning: no report in MLflow ({reason}); `nss report` writes it\n")
        return 1
    return 0


def log_card(tracker: Tracker, run_id: str, workspace: Workspace, verb: str) -> None:
    """Log the card of a candidate to the run that its registered version leads to.

    Raises StageError when the cycle made no such candidate.
    """
    tracker.client.log_text(run_id, model_card(workspace, verb, provenance_tags(workspace)), "card.md")


def page(workspace: Workspace, facts: Facts, runs: Runs) -> str:
    """Return the page as HTML. Every text is escaped: names of classes are anybody's."""
    batches = [{**vars(each), "images": sum(each.splits.values())} for each in facts.batches]
    shown = {each.name: examples(facts.data, facts.known, each.categories) for each in facts.slices if facts.data}
    return _template().render(
        title=f"Maintenance cycle: {facts.promoted or 'nothing'} is promoted",
        headline=_headline(facts),
        facts=facts,
        batches=batches,
        new=[each for each in batches if each["is_new"]],
        origin=provenance_tags(workspace),
        pictures=cycle_pictures(workspace, facts),
        examples=shown or {each.name: {} for each in facts.slices},
        models=[each for each in (facts.base, *facts.judged) if each is facts.base or each.verb != "base"],
        kept={**{each.name: each.kept for each in facts.slices}, **_kept(workspace)},
        runs=runs,
        timed=sorted({count for each in runs.latency.values() for count in each}),
    )


def _template() -> Template:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters |= {
        "share": lambda value: "–" if value is None else f"{value:.1%}",
        "points": lambda value: f"{100 * value:+.1f}",
        "number": _number,
        "listed": _listed,
        "figures": _figures,
    }
    return environment.get_template("report.html.j2")


def _headline(facts: Facts) -> str:
    if not facts.judged:
        return "Nothing was made, so there is nothing to judge: the champion stays."
    if facts.promoted is None:
        return "No candidate is good enough: the champion stays."
    rest = len(facts.judged) - 1
    beside = f", one of {rest + 1} candidates" if rest else ", the only candidate"
    chosen = next(each for each in facts.judged if each.verb == facts.promoted)
    return f"The gate promotes {facts.promoted}{beside}: {chosen.words}."


def _number(value: Any) -> str:
    """What is not there is a StrictUndefined of Jinja's, or None."""
    if not isinstance(value, int | float):
        return "–"
    return f"{value:,}" if isinstance(value, int) else f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def _listed(names: Sequence[str]) -> str:
    more = len(names) - _MOST_LISTED
    return ", ".join(names[:_MOST_LISTED]) + (f" and {more} more" if more > 0 else "")


def _figures(metrics: Mapping[str, Any]) -> str:
    rows = {name.replace("_", " "): value for name, value in metrics.items() if name != "done" and value is not None}
    return ", ".join(f"{name} {_number(value)}" for name, value in rows.items())


def _kept(workspace: Workspace) -> dict[str, dict[str, int]]:
    """Return the neurons left, tuned, or used by layer in what the maintenance made, {what: {layer: neurons}}."""
    tables = {"restructured": ("restructure/kept.csv", "kept"), "readapted, tuned": ("readapt/tuned.csv", "tuned")}
    tables["extended, for new classes"] = ("extend/capacity.csv", "new")
    found = {
        name: {row["layer"]: int(row[column]) for row in read_csv(workspace.out(path))}
        for name, (path, column) in tables.items()
    }
    return {name: rows for name, rows in found.items() if rows}
