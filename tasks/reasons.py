"""Findings of triage and decisions of the gate in words, from what these stages wrote."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nss.files import read_json
from tasks.params import MAINTENANCE
from tasks.workspace import Workspace

# Of what speaks against a candidate; all_reasons has everything.
_SHOWN = 2


def triage_words(workspace: Workspace) -> dict[str, str]:
    """Return {maintenance: why it is needed, or why not}.

    >>> triage_words(workspace)["extend"]  # doctest: +SKIP
    'not needed: no new images'
    """
    findings = {verb: read_json(workspace.out("triage") / f"{verb}.json") for verb in MAINTENANCE}
    return {verb: ("" if each["needed"] else "not needed: ") + each["why"] for verb, each in findings.items()}


def verdict_words(judgement: Mapping[str, Any]) -> str:
    """Return what decided about a candidate: where it falls short, or what it is good for.

    >>> verdict_words({"reasons": [{"check": "benefit", "verdict": "PROMOTE", "text": "smaller"}]})
    'smaller'
    """
    short = [(each["verdict"] == "HOLD", each["text"]) for each in judgement["reasons"] if each["verdict"] != "PROMOTE"]
    if short:
        # What weighs most first: a verdict is that of its most severe reason.
        texts = [text for _, text in sorted(short, key=lambda each: each[0])]
        more = f"; and {len(texts) - _SHOWN} more" if len(texts) > _SHOWN else ""
        return "; ".join(texts[:_SHOWN]) + more
    good = [each["text"] for each in judgement["reasons"] if each["check"] == "benefit"]
    # A base model without a champion has no benefit to show: it meets the floors.
    return "; ".join(good or [each["text"] for each in judgement["reasons"]])


def reason_lines(judgement: Mapping[str, Any]) -> list[str]:
    """Return every check of a candidate as an item of a list in Markdown."""
    return [f"- {each['verdict']}, {each['check']}: {each['text']}" for each in judgement["reasons"]]


def all_reasons(decision: Mapping[str, Any]) -> str:
    """Return every check of every candidate as Markdown."""
    lines = [f"# {decision['verdict']}: {decision['promoted'] or 'no candidate'} is promoted"]
    for judgement in decision["judgements"]:
        lines += ["", f"## {judgement['verb']}: {judgement['verdict']}", "", *reason_lines(judgement)]
    return "\n".join(lines) + "\n"
