"""The card of a candidate, or of a model that was adopted: what it is, how good, what it was made of. Markdown.

Sections follow Mitchell et al., Model Cards for Model Reporting, 2019.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

from nss.errors import StageError
from nss.model_spec import ModelSpec
from tasks.report_facts import Compared, Facts, Judged, read_facts
from tasks.workspace import Workspace

_MADE = {
    "base": "trained in this cycle",
    "restructure": "made smaller",
    "readapt": "tuned to follow new images",
    "extend": "extended by new classes",
    "adopt": "trained elsewhere",
}
_SPECIAL = re.compile(r"([\\`*_\[\]<|~$&])")


def model_card(workspace: Workspace, verb: str, origin: Mapping[str, str]) -> str:
    """Return the card of a candidate of the cycle that lies in artifacts/.

    verb: the stage that made it. origin: the tags of where it comes from, see `tasks.provenance.provenance_tags`.

    Raises StageError when no cycle has come to its end, or it made no such candidate.

    >>> model_card(find_workspace(), "restructure", provenance_tags(find_workspace()))  # doctest: +SKIP
    '# Model card: restructure...'
    """
    facts = read_facts(workspace)
    judged = next((each for each in facts.judged if each.verb == verb), None)
    if judged is None:
        made = ", ".join(each.verb for each in facts.judged) or "none"
        raise StageError(f"the cycle made no candidate {verb!r}", where=str(workspace.out("evaluate")), allowed=made)
    return "\n".join(_lines(facts, judged, origin)) + "\n"


def adopted_card(judged: Judged, spec: ModelSpec, source: str, origin: Mapping[str, str]) -> str:
    """Return the card of a model that was taken from elsewhere.

    judged: of the verb `adopt`, with what was measured of it. source: where it was found. origin: see `model_card`.

    >>> adopted_card(judged, model.spec, "models:/cats/3", provenance_tags(find_workspace()))  # doctest: +SKIP
    '# Model card: adopt...'
    """
    lines = [
        f"# Model card: {judged.verb} {judged.model[:12]}",
        "",
        *_what(judged, spec.input_shape, spec.factory),
        f"- taken from: {plain(source)}",
        *("", "| figure | this model |", "|---|---:|"),
        *(f"| {name} | {value:,} |" for name, value in judged.size.items()),
        *("", "## Verdict of the gate", "", "none: it was made the champion by hand, as the ledger says"),
        *("", "## Accuracy", "", *_accuracy(judged)),
        *_ending(judged, origin),
    ]
    return "\n".join(lines) + "\n"


def _lines(facts: Facts, judged: Judged, origin: Mapping[str, str]) -> Iterator[str]:
    yield from (f"# Model card: {judged.verb} {judged.model[:12]}", "")
    yield from _model(facts, judged)
    yield from ("", "## Verdict of the gate", "", f"**{judged.verdict}**: {plain(judged.words)}", "")
    yield from (f"- {each['verdict']}, {each['check']}: {plain(each['text'])}" for each in judged.reasons)
    yield from ("", "## Accuracy", "")
    yield from _accuracy(judged)
    for part in judged.compared:
        yield from ("", *_compared(part, facts.reference))
    yield from _ending(judged, origin)


def _ending(judged: Judged, origin: Mapping[str, str]) -> Iterator[str]:
    yield from ("", "## Data", "")
    yield f"- data version `{origin.get('nss.data_md5', 'unknown')}`"
    yield f"- batches it knows: {', '.join(f'`{each}`' for each in judged.batches)}"
    yield f"- commit `{origin.get('nss.git_sha', 'unknown')}`"
    yield from ("", "## Limits", "")
    yield "- It answers one of its classes to any image, also to one of none of them."
    yield "- Accuracies are on held-out images of the same batches; other sources of images may give others."


def _what(judged: Judged, input_shape: Sequence[int], factory: str) -> Iterator[str]:
    shape = " x ".join(map(str, input_shape))
    yield f"- what: an image classifier of {len(judged.classes)} classes with held-out images, {_MADE[judged.verb]}"
    yield f"- classes: {', '.join(plain(each.name) for each in judged.classes)}"
    yield f"- input: uint8 images, channels x height x width {shape}; its normalisation is part of it"
    yield f"- factory: `{factory}`"
    yield f"- digest: `{judged.model}`"


def _model(facts: Facts, judged: Judged) -> Iterator[str]:
    yield from _what(judged, facts.input_shape, facts.factory)
    champion = f", which is {plain(facts.champion)}" if facts.champion else ""
    yield f"- made of: `{judged.parent}`{champion}" if judged.parent else "- made of: no other model"
    yield from ("", "| figure | this model | base model |", "|---|---:|---:|")
    for name, value in judged.size.items():
        before = facts.base.size.get(name)
        yield f"| {name} | {value:,} | {'' if before is None else f'{before:,}'} |"


def _accuracy(judged: Judged) -> Iterator[str]:
    if judged.accuracy is not None:
        worst = f", worst class {plain(judged.worst.name)} {judged.worst.after:.2%}" if judged.worst else ""
        yield from (f"{judged.accuracy:.2%} on {judged.images} held-out images{worst}", "")
    yield from ("| class | accuracy |", "|---|---:|")
    yield from (f"| {plain(each.name)} | {each.after:.2%} |" for each in judged.classes)


def _compared(part: Compared, reference: str) -> Iterator[str]:
    yield from (f"### Beside {plain(reference)} on {part.where}", "")
    if part.difference is not None:
        sure = f"95 % interval {100 * part.low:+.2f} to {100 * part.high:+.2f}, p {part.p_value:.2g}"
        yield f"{100 * part.difference:+.2f} points on {part.images} images ({sure})"
        yield ""
    yield from ("| class | images | before | this model |", "|---|---:|---:|---:|")
    for each in part.classes:
        before = "new class" if each.before is None else f"{each.before:.2%}"
        yield f"| {plain(each.name)} | {each.images} | {before} | {each.after:.2%} |"


def plain(text: str) -> str:
    r"""Return a text in which nothing is Markdown or HTML: names of classes are anybody's.

    >>> plain("a|b <i>")
    'a\\|b \\<i>'
    """
    return _SPECIAL.sub(r"\\\1", " ".join(text.split()))
