"""The gate: whether a candidate takes the champion's place. A pure function of what was measured."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any

from nss.compare import Comparison, Pairs
from nss.errors import ParamsError, StageError

ORDER = ("extend", "readapt", "restructure", "base")
"""who goes first when several may: new answers before better ones, better ones before cheaper ones, and a base model
only when nothing better was made of it"""
SIZES = ("parameters", "macs", "bytes")
"""figures that say whether a model is smaller: masked weights are still there, and a latency is never twice the same"""


class Verdict(StrEnum):
    """What to do with a candidate."""

    PROMOTE = "PROMOTE"
    HOLD = "HOLD"
    """not shown to be good enough, nor to be bad: the champion stays, somebody may look"""
    REJECT = "REJECT"


_SEVERITY = (Verdict.PROMOTE, Verdict.HOLD, Verdict.REJECT)


@dataclass(frozen=True)
class GateSettings:
    """What is asked of a candidate. Raises ParamsError that lists every value that is out of range."""

    min_accuracy: float = 0.5
    """of a candidate on all held-out images: what is wrong more often than right is no use; raise it for your data"""
    min_class_accuracy: float = 0.25
    """of each class, new ones too: a class that is hardly ever answered is not known"""
    max_drop: float = 0.01
    """what the accuracy of classes known before may fall by: what restructuring is allowed to cost by default"""
    max_class_drop: float = 0.05
    """what that of any one class may fall by: more than of all, since a class has few held-out images"""
    alpha: float = 0.05
    """level of significance; drops share it among all that are looked at (Bonferroni)"""
    min_saving: float = 0.05
    """share by which a figure of size must fall to count: less is not worth a new version"""
    min_images: int = 100
    """held-out images below which nothing is promoted: one image should be no more than a hundredth"""

    def __post_init__(self) -> None:
        """Check the ranges."""
        wrong = {
            "min_accuracy: 0 to 1": 0 <= self.min_accuracy <= 1,
            "min_class_accuracy: 0 to 1": 0 <= self.min_class_accuracy <= 1,
            "max_drop: 0 to 1": 0 <= self.max_drop <= 1,
            "max_class_drop: 0 to 1": 0 <= self.max_class_drop <= 1,
            "alpha: above 0, below 1": 0 < self.alpha < 1,
            "min_saving: above 0, at most 1": 0 < self.min_saving <= 1,
            "min_images: from 1": self.min_images >= 1,
        }
        if problems := [text for text, fits in wrong.items() if not fits]:
            raise ParamsError("settings of the gate are out of range", problems, where="gate")


@dataclass(frozen=True)
class Candidate:
    """What was measured of a candidate; None for what was not."""

    verb: str
    """the stage that made it: one of `ORDER`; "base": there is no champion, nothing to be compared with"""
    images: int | None
    """held-out images that it was judged on"""
    accuracy: float | None
    """on all of them"""
    per_class: Mapping[str, float] | None
    """accuracy of each class that has images, new ones too"""
    known: Comparison | None = None
    """with the champion, on images of the batches that the champion knows"""
    arrived: Comparison | None = None
    """with the champion, on images of newer batches, if there are any"""
    size: Mapping[str, float] = field(default_factory=dict)
    """{one of `SIZES`: value}; further figures are not looked at"""
    champion_size: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Reason:
    """What one check says. A check that is passed says so too."""

    check: str
    verdict: Verdict
    """the best that the candidate can get after this check"""
    text: str
    """with numbers"""


@dataclass(frozen=True)
class Judgement:
    """One candidate, and why."""

    verb: str
    verdict: Verdict
    """the most severe of its reasons"""
    reasons: tuple[Reason, ...]


@dataclass(frozen=True)
class Decision:
    """All candidates of a cycle."""

    verdict: Verdict
    """PROMOTE if any is promoted, else HOLD if any is held or there was none, else REJECT"""
    promoted: str | None
    """verb of the one that takes the champion's place"""
    judgements: tuple[Judgement, ...]
    """in the order of `ORDER`"""

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain texts and lists."""
        return asdict(self)


def decide(candidates: Sequence[Candidate], settings: GateSettings | None = None) -> Decision:
    """Judge every candidate and choose at most one: of those that may be promoted, the first in `ORDER`.

    Raises StageError for an unknown verb or two candidates of one.

    >>> decide([restructured, extended]).promoted
    'extend'
    """
    verbs = [each.verb for each in candidates]
    if len(set(verbs)) != len(verbs) or not set(verbs) <= set(ORDER):
        raise StageError(f"the candidates are {verbs}", where="gate", allowed=f"one each of {', '.join(ORDER)}")
    ranked = sorted(candidates, key=lambda each: ORDER.index(each.verb))
    judgements = tuple(judge(each, settings) for each in ranked)
    promoted = next((each.verb for each in judgements if each.verdict is Verdict.PROMOTE), None)
    verdict = min((each.verdict for each in judgements), key=_SEVERITY.index, default=Verdict.HOLD)
    return Decision(verdict, promoted, judgements)


def judge(candidate: Candidate, settings: GateSettings | None = None) -> Judgement:
    """Judge one candidate. Figures that are missing or not finite: REJECT. See docs/triage-and-gate.md for each check.

    >>> [reason.text for reason in judge(candidate).reasons if reason.verdict is not Verdict.PROMOTE]
    ['class 8 falls by 0.083 on known batches (0.05 allowed), which may be chance (p 0.13)']
    """
    settings = settings or GateSettings()
    missing = list(_missing(candidate))
    reasons = missing or [
        *_floors(candidate, settings),
        *_enough(candidate, settings),
        *(() if candidate.verb == "base" else _against_champion(candidate, settings)),
    ]
    verdict = max((reason.verdict for reason in reasons), key=_SEVERITY.index)
    return Judgement(candidate.verb, verdict, tuple(reasons))


def _missing(candidate: Candidate) -> Iterator[Reason]:
    """Name what is needed and not there, or no number."""
    sizes = {"candidate": candidate.size, "champion": candidate.champion_size}
    needed = {"images": candidate.images, "accuracy": candidate.accuracy}
    needed |= {f"accuracy of class {name}": value for name, value in (candidate.per_class or {}).items()}
    needed |= {f"{name} of the {side}": of[name] for side, of in sizes.items() for name in SIZES if name in of}
    for name, value in needed.items():
        if value is None or not math.isfinite(value):
            yield _reason("figures", Verdict.REJECT, f"{name} is {'missing' if value is None else value}")
    if not candidate.per_class:
        yield _reason("figures", Verdict.REJECT, "the accuracy of each class is missing")
    if candidate.verb != "base" and (candidate.known is None or not candidate.known.overall.images):
        yield _reason("figures", Verdict.REJECT, "the comparison with the champion on known batches is missing")
    one_sided = [name for name in SIZES if (name in candidate.size) is not (name in candidate.champion_size)]
    lopsided = one_sided if candidate.verb != "base" else []
    if lopsided or (candidate.verb == "restructure" and not _both(candidate)):
        names = ", ".join(lopsided or SIZES)
        yield _reason("figures", Verdict.REJECT, f"the size ({names}) of the candidate and of the champion is missing")


def _floors(candidate: Candidate, settings: GateSettings) -> Iterator[Reason]:
    assert candidate.accuracy is not None
    assert candidate.per_class
    low = candidate.accuracy < settings.min_accuracy
    text = f"accuracy {candidate.accuracy:.3f} ({settings.min_accuracy:g} asked for)"
    yield _reason("accuracy", Verdict.REJECT if low else Verdict.PROMOTE, text)
    worst = min(candidate.per_class, key=candidate.per_class.__getitem__)
    below = [name for name, value in candidate.per_class.items() if value < settings.min_class_accuracy]
    for name in below or [worst]:
        text = f"class {name} {candidate.per_class[name]:.3f} ({settings.min_class_accuracy:g} asked for)"
        yield _reason("class accuracy", Verdict.REJECT if below else Verdict.PROMOTE, text)


def _enough(candidate: Candidate, settings: GateSettings) -> Iterator[Reason]:
    assert candidate.images is not None
    few = candidate.images < settings.min_images
    text = f"{candidate.images} held-out images ({settings.min_images} asked for)"
    yield _reason("images", Verdict.HOLD if few else Verdict.PROMOTE, text)


def _against_champion(candidate: Candidate, settings: GateSettings) -> Iterator[Reason]:
    comparisons = {"known batches": candidate.known, "new batches": candidate.arrived}
    given = {name: each for name, each in comparisons.items() if each is not None and each.overall.images}
    looks = sum(1 + len(each.per_class) for each in given.values())
    for where, each in given.items():
        yield _kept("accuracy", where, each.overall, settings.max_drop, settings.alpha / looks)
        drops = [
            _kept(f"class {name}", where, pairs, settings.max_class_drop, settings.alpha / looks)
            for name, pairs in each.per_class.items()
        ]
        kept = _reason("old knowledge", Verdict.PROMOTE, _worst_change(each, where, settings))
        yield from [reason for reason in drops if reason.verdict is not Verdict.PROMOTE] or [kept]
    if candidate.verb == "restructure":
        yield _smaller(candidate, settings)
    yield _benefit(candidate, given, settings)


def _kept(what: str, where: str, pairs: Pairs, allowed: float, level: float) -> Reason:
    """What was known must still be: HOLD for a drop that is too large, REJECT when it is no chance either.

    One image fewer is no finding, however few there are.
    """
    allowed = max(allowed, 1 / pairs.images)
    text = f"{what} {pairs.champion_accuracy:.3f} -> {pairs.candidate_accuracy:.3f} on {where}"
    if -pairs.difference <= allowed:
        return _reason("old knowledge", Verdict.PROMOTE, f"{text} (a drop of {allowed:g} allowed)")
    text = f"{what} falls by {-pairs.difference:.3f} on {where} ({allowed:g} allowed)"
    if pairs.p_worse <= level:
        return _reason("old knowledge", Verdict.REJECT, f"{text}, which is not chance (p {pairs.p_worse:.2g})")
    return _reason("old knowledge", Verdict.HOLD, f"{text}, which may be chance (p {pairs.p_worse:.2g})")


def _worst_change(comparison: Comparison, where: str, settings: GateSettings) -> str:
    name, change = comparison.worst_change
    return f"no class falls too much on {where}: class {name} {change:+.3f} (-{settings.max_class_drop:g} allowed)"


def _smaller(candidate: Candidate, settings: GateSettings) -> Reason:
    """Nothing may grow, and something must shrink."""
    texts = [f"{name} {before:,.10g} -> {after:,.10g}" for name, (before, after) in _both(candidate).items()]
    verdict = Verdict.PROMOTE if _saves(candidate, settings) else Verdict.REJECT
    return _reason("size", verdict, f"{', '.join(texts)} (a saving of {settings.min_saving:g} asked for)")


def _benefit(candidate: Candidate, given: Mapping[str, Comparison], settings: GateSettings) -> Reason:
    """There must be a point in it: better, smaller, or of more classes."""
    better = [
        f"{each.overall.difference:+.3f} on {where} (p {each.overall.p_value:.2g})"
        for where, each in given.items()
        if each.overall.difference > 0 and each.overall.p_value <= settings.alpha
    ]
    classes = sorted({name for each in (candidate.known, candidate.arrived) if each for name in each.new_classes})
    found = [
        *(f"significantly better: {text}" for text in better),
        *(["smaller"] if _saves(candidate, settings) else []),
        *([f"new classes: {', '.join(classes)}"] if classes else []),
    ]
    if found:
        return _reason("benefit", Verdict.PROMOTE, "; ".join(found))
    tried = ", ".join(
        f"{each.overall.difference:+.3f} on {where} (p {each.overall.p_value:.2g})" for where, each in given.items()
    )
    # Of classes without a held-out image nobody knows whether they were learned.
    text = f"not significantly better ({tried}), not smaller, no new classes with held-out images"
    return _reason("benefit", Verdict.HOLD, text)


def _saves(candidate: Candidate, settings: GateSettings) -> bool:
    pairs = _both(candidate).values()
    grown = any(after > before for before, after in pairs)
    return not grown and any(after <= (1 - settings.min_saving) * before for before, after in pairs if before > 0)


def _both(candidate: Candidate) -> dict[str, tuple[float, float]]:
    """Return {figure: (champion, candidate)} of those known of both."""
    before, after = candidate.champion_size, candidate.size
    return {name: (before[name], after[name]) for name in SIZES if name in before and name in after}


def _reason(check: str, verdict: Verdict, text: str) -> Reason:
    return Reason(check, verdict, text)
