"""The gate: every check by hand, and that a worse candidate never gets a better verdict."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nss.compare import Comparison, Pairs, Score
from nss.errors import ParamsError, StageError
from nss.gate import ORDER, Candidate, GateSettings, Judgement, Verdict, decide, judge

PROMOTE, HOLD, REJECT = Verdict.PROMOTE, Verdict.HOLD, Verdict.REJECT
SMALLER = {"size": {"macs": 50, "parameters": 40}, "champion_size": {"macs": 100, "parameters": 100}}


def comparison(per_class: dict[str, Pairs], new: dict[str, Score] | None = None) -> Comparison:
    total = [sum(getattr(each, name) for each in per_class.values()) for name in vars(Pairs(0, 0, 0, 0))]
    overall = Pairs(*total)
    return Comparison(overall, per_class, {}, new or {}, overall.interval(), 0.95)


def candidate(verb: str, known: Comparison, arrived: Comparison | None = None, **changes: Any) -> Candidate:
    """What an evaluation of the same images would say."""
    right, images = {}, {}
    for each in (known, arrived):
        if each is not None:
            for name, pairs in each.per_class.items():
                right[name] = right.get(name, 0) + pairs.both + pairs.only_candidate
                images[name] = images.get(name, 0) + pairs.images
            for name, score in each.new_classes.items():
                right[name], images[name] = score.right, score.images
    per_class = {name: right[name] / images[name] for name in right}
    total = sum(images.values())
    return replace(
        Candidate(verb, total, sum(right.values()) / max(1, total), per_class, known, arrived), **changes
    )  # fmt: skip


def better(by: int = 20) -> Comparison:
    """Of two classes of 100 images, the candidate is right on `by` more of each."""
    return comparison({name: Pairs(100, 70, 0, by) for name in "ab"})


SAME = comparison({name: Pairs(100, 90, 1, 1) for name in "ab"})


def failed(judged: Judgement) -> list[tuple[str, Verdict]]:
    return [(reason.check, reason.verdict) for reason in judged.reasons if reason.verdict is not PROMOTE]


def test_a_candidate_that_is_better_is_promoted_and_all_reasons_are_listed() -> None:
    judged = judge(candidate("readapt", better()))
    assert judged.verdict is PROMOTE
    assert [reason.text for reason in judged.reasons] == [
        "accuracy 0.900 (0.5 asked for)",
        "class a 0.900 (0.25 asked for)",
        "200 held-out images (100 asked for)",
        "accuracy 0.700 -> 0.900 on known batches (a drop of 0.01 allowed)",
        "no class falls too much on known batches: class a +0.200 (-0.05 allowed)",
        "significantly better: +0.200 on known batches (p 1.8e-12)",
    ]


def test_better_on_average_but_one_class_worse_by_more_than_the_margin_is_not_promoted() -> None:
    classes = {name: Pairs(100, 70, 0, 20) for name in "abc"}
    maybe = judge(candidate("readapt", comparison({**classes, "d": Pairs(100, 80, 8, 2)})))
    assert maybe.verdict is HOLD
    assert failed(maybe) == [("old knowledge", HOLD)]
    assert "class d falls by 0.060 on known batches (0.05 allowed), which may be chance (p 0.055)" in [
        reason.text for reason in maybe.reasons
    ]
    surely = judge(candidate("readapt", comparison({**classes, "d": Pairs(100, 60, 20, 0)})))
    assert (surely.verdict, failed(surely)) == (REJECT, [("old knowledge", REJECT)])
    at_margin = judge(candidate("readapt", comparison({**classes, "d": Pairs(100, 80, 5, 0)})))
    assert at_margin.verdict is PROMOTE


@pytest.mark.parametrize(("lost", "verdict"), [(1, PROMOTE), (2, HOLD)])
def test_a_class_with_few_held_out_images_may_lose_one_of_them(lost: int, verdict: Verdict) -> None:
    # One of 19 is more than the 0.05 that are allowed, and says nothing all the same.
    classes = {"a": Pairs(200, 140, 0, 40), "b": Pairs(19, 15, lost, 0)}
    judged = judge(candidate("readapt", comparison(classes)))
    assert judged.verdict is verdict
    assert failed(judged) == ([] if lost == 1 else [("old knowledge", HOLD)])


def test_old_knowledge_that_is_lost_over_all_classes_holds_or_rejects() -> None:
    each = {name: Pairs(100, 90, 4, 2) for name in "abcdefghij"}
    judged = judge(candidate("restructure", comparison(each), **SMALLER))
    assert (judged.verdict, failed(judged)) == (HOLD, [("old knowledge", HOLD)])
    each = {name: Pairs(100, 90, 4, 0) for name in "abcdefghij"}
    judged = judge(candidate("restructure", comparison(each), **SMALLER))
    assert (judged.verdict, failed(judged)) == (REJECT, [("old knowledge", REJECT)])
    assert "accuracy falls by 0.040 on known batches" in judged.reasons[3].text


def test_what_is_lost_on_new_batches_counts_too() -> None:
    worse = comparison({"a": Pairs(100, 60, 30, 0)})
    judged = judge(candidate("readapt", better(), worse))
    assert judged.verdict is REJECT
    assert {reason.text.partition(" (")[0] for reason in judged.reasons if reason.verdict is REJECT} == {
        "accuracy falls by 0.300 on new batches",
        "class a falls by 0.300 on new batches",
    }


def test_a_candidate_that_follows_new_batches_and_keeps_the_old_is_promoted() -> None:
    assert judge(candidate("readapt", SAME, better())).verdict is PROMOTE
    assert judge(candidate("readapt", SAME, SAME)).verdict is HOLD


@pytest.mark.parametrize(("by", "verdict"), [(2, HOLD), (3, PROMOTE)])
def test_not_significantly_better_and_no_other_benefit_is_held(by: int, verdict: Verdict) -> None:
    # Twice `by` images without one against it: p is 2 / 2 ** 4 = 0.125, then 2 / 2 ** 6 = 0.03.
    judged = judge(candidate("readapt", better(by)))
    assert judged.verdict is verdict
    assert failed(judged) == ([("benefit", HOLD)] if verdict is HOLD else [])
    if verdict is HOLD:
        why = "not significantly better (+0.020 on known batches (p 0.12)), not smaller"
        assert judged.reasons[-1].text == f"{why}, no new classes with held-out images"


def test_new_classes_are_a_benefit_unless_they_are_hardly_ever_answered() -> None:
    known = comparison(dict(SAME.per_class), {"new": Score(40, 30)})
    assert judge(candidate("extend", known)).verdict is PROMOTE
    arrived = comparison({}, {"new": Score(40, 30)})
    assert judge(candidate("extend", SAME, arrived)).reasons[-1].text == "new classes: new"
    judged = judge(candidate("extend", comparison(dict(SAME.per_class), {"new": Score(40, 9)})))
    assert (judged.verdict, failed(judged)) == (REJECT, [("class accuracy", REJECT)])
    assert judge(candidate("extend", SAME)).verdict is HOLD


@pytest.mark.parametrize(
    ("after", "verdict"),
    [
        ({"macs": 95, "parameters": 100}, PROMOTE),
        ({"macs": 96, "parameters": 100}, REJECT),
        ({"macs": 100, "parameters": 100}, REJECT),
        ({"macs": 50, "parameters": 101}, REJECT),
        ({"macs": 50, "parameters": 100, "masked": 500, "latency_ms": 9}, PROMOTE),
    ],
)
def test_a_restructured_model_must_really_be_smaller(after: dict[str, float], verdict: Verdict) -> None:
    before = {"macs": 100, "parameters": 100, "masked": 0, "latency_ms": 1}
    judged = judge(candidate("restructure", SAME, size=after, champion_size=before))
    assert judged.verdict is verdict
    assert ("size", REJECT) in failed(judged) or verdict is PROMOTE


def test_a_better_but_larger_model_may_come_from_other_stages() -> None:
    grown = {"size": {"macs": 130}, "champion_size": {"macs": 100}}
    assert judge(candidate("readapt", better(), **grown)).verdict is PROMOTE
    assert judge(candidate("restructure", better(), **grown)).verdict is REJECT


def test_each_floor_that_is_missed_is_named() -> None:
    classes = {"a": Pairs(100, 20, 0, 0), "b": Pairs(100, 24, 0, 0), "c": Pairs(100, 80, 0, 0)}
    judged = judge(candidate("restructure", comparison(classes), **SMALLER))
    assert judged.verdict is REJECT
    assert [reason.text for reason in judged.reasons if reason.verdict is REJECT] == [
        "accuracy 0.413 (0.5 asked for)",
        "class a 0.200 (0.25 asked for)",
        "class b 0.240 (0.25 asked for)",
    ]
    asked = GateSettings(min_accuracy=0.95, min_class_accuracy=0.0)
    assert failed(judge(candidate("readapt", better()), asked)) == [("accuracy", REJECT)]


def test_too_few_images_promote_nothing() -> None:
    few = comparison({"a": Pairs(99, 70, 0, 29)})
    assert failed(judge(candidate("readapt", few))) == [("images", HOLD)]
    assert judge(candidate("readapt", few), GateSettings(min_images=99)).verdict is PROMOTE


def test_without_a_champion_the_base_model_is_judged_by_the_floors_alone() -> None:
    base = Candidate("base", 200, 0.6, {"a": 0.9, "b": 0.3})
    assert [reason.check for reason in judge(base).reasons] == ["accuracy", "class accuracy", "images"]
    assert judge(base).verdict is PROMOTE
    assert judge(replace(base, accuracy=0.49)).verdict is REJECT
    assert judge(replace(base, per_class={"a": 0.9, "b": 0.2})).verdict is REJECT


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"accuracy": None}, "accuracy is missing"),
        ({"accuracy": float("nan")}, "accuracy is nan"),
        ({"images": None}, "images is missing"),
        ({"per_class": None}, "the accuracy of each class is missing"),
        ({"per_class": {}}, "the accuracy of each class is missing"),
        ({"per_class": {"a": 0.9, "b": float("nan")}}, "accuracy of class b is nan"),
        ({"known": None}, "the comparison with the champion on known batches is missing"),
        ({"known": comparison({})}, "the comparison with the champion on known batches is missing"),
        ({"size": {}}, "the size (parameters, macs) of the candidate and of the champion is missing"),
        ({"size": {}, "champion_size": {}}, "the size (parameters, macs, bytes) of the candidate and of the champion"),
        ({"champion_size": {"macs": 1}}, "the size (parameters) of the candidate"),
        ({"size": {"macs": float("nan"), "parameters": 1}}, "macs of the candidate is nan"),
        ({"champion_size": {"macs": float("inf"), "parameters": 1}}, "macs of the champion is inf"),
    ],
)
def test_figures_that_are_missing_or_no_numbers_reject(changes: dict[str, Any], named: str) -> None:
    judged = judge(replace(candidate("restructure", better(), **SMALLER), **changes))
    assert judged.verdict is REJECT
    assert len(judged.reasons) == 1
    assert judged.reasons[0].text.startswith(named)


def test_of_several_that_may_be_promoted_the_first_in_order_is() -> None:
    made = [
        candidate("restructure", SAME, **SMALLER),
        Candidate("base", 200, 0.9, {"a": 0.9}),
        candidate("readapt", better()),
        candidate("extend", comparison(dict(SAME.per_class), {"new": Score(40, 30)})),
    ]
    found = decide(made)
    assert [each.verb for each in found.judgements] == list(ORDER)
    assert (found.verdict, found.promoted) == (PROMOTE, "extend")
    assert decide(made[:3]).promoted == "readapt"
    assert decide(made[:2]).promoted == "restructure"
    assert decide(made[1:2]).promoted == "base"


def test_one_that_is_not_good_enough_leaves_the_place_to_the_next() -> None:
    bad = candidate("extend", comparison({"a": Pairs(200, 60, 100, 0)}))
    found = decide([candidate("restructure", SAME, **SMALLER), bad])
    assert (found.verdict, found.promoted) == (PROMOTE, "restructure")
    assert [each.verdict for each in found.judgements] == [REJECT, PROMOTE]


def test_without_a_promotion_the_best_verdict_is_that_of_the_cycle() -> None:
    held, bad = candidate("readapt", SAME), candidate("restructure", SAME)
    assert (decide([held, bad]).verdict, decide([held, bad]).promoted) == (HOLD, None)
    assert (decide([bad]).verdict, decide([]).verdict) == (REJECT, HOLD)


def test_a_decision_is_plain_json() -> None:
    plain = decide([candidate("readapt", SAME)]).to_dict()
    assert json.loads(json.dumps(plain)) == json.loads(json.dumps(decide([candidate("readapt", SAME)]).to_dict()))
    assert plain["verdict"] == "HOLD"
    assert plain["judgements"][0]["reasons"][-1]["verdict"] == "HOLD"


@pytest.mark.parametrize("verbs", [["profile"], ["readapt", "readapt"]])
def test_unknown_and_repeated_verbs_are_refused(verbs: list[str]) -> None:
    with pytest.raises(StageError, match="the candidates are"):
        decide([candidate(verb, SAME) for verb in verbs])


@pytest.mark.parametrize("name", [*vars(GateSettings())])
def test_settings_out_of_range_are_refused(name: str) -> None:
    for value in (-0.1, float("nan"), *([1.5] if name != "min_images" else [])):
        with pytest.raises(ParamsError, match=f"- {name}: ") as caught:
            GateSettings(**{name: value})
        assert len(caught.value.problems) == 1


counts = st.integers(0, 60)
pairs = st.tuples(counts, counts, counts, counts).map(lambda c: Pairs(sum(c), *c[:3])).filter(lambda p: p.images)
known_classes = st.dictionaries(st.sampled_from("abc"), pairs, min_size=1)


def lose(of: Pairs, both: int, only: int) -> Pairs:
    """Answer so many images wrong that were answered right."""
    both, only = min(both, of.both), min(only, of.only_candidate)
    return Pairs(of.images, of.both - both, of.only_champion + both, of.only_candidate - only)


@given(
    verb=st.sampled_from(["readapt", "restructure", "extend"]),
    classes=known_classes,
    arrived=st.none() | known_classes,
    new=st.dictionaries(st.sampled_from("xy"), st.integers(1, 40), max_size=1),
    losses=st.lists(st.integers(0, 60), min_size=8, max_size=8),
    sizes=st.tuples(st.integers(50, 120), st.integers(0, 40)),
)
@settings(max_examples=300, deadline=None)
def test_a_candidate_that_is_worse_never_gets_a_better_verdict(
    verb: str,
    classes: dict[str, Pairs],
    arrived: dict[str, Pairs] | None,
    new: dict[str, int],
    losses: list[int],
    sizes: tuple[int, int],
) -> None:
    asked = GateSettings(max_drop=0.05, max_class_drop=0.1, min_images=30)
    champion_size = {"macs": 100.0}
    wins = {name: Score(40, right) for name, right in new.items()}
    fewer = {name: Score(40, max(0, score.right - losses[6])) for name, score in wins.items()}
    worse = {name: lose(each, losses[i], losses[i + 3]) for i, (name, each) in enumerate(classes.items())}
    later = None if arrived is None else comparison(arrived)
    worse_later = later and comparison(
        {name: lose(each, losses[7], losses[5]) for name, each in (arrived or {}).items()}
    )
    good = candidate(verb, comparison(classes, wins), later, size={"macs": sizes[0]}, champion_size=champion_size)
    bad = candidate(verb, comparison(worse, fewer), worse_later, size={"macs": sum(sizes)}, champion_size=champion_size)
    order = [PROMOTE, HOLD, REJECT]
    assert order.index(judge(bad, asked).verdict) >= order.index(judge(good, asked).verdict)


@given(classes=known_classes)
def test_the_verdict_is_the_most_severe_reason(classes: dict[str, Pairs]) -> None:
    judged = judge(candidate("readapt", comparison(classes)))
    verdicts = {reason.verdict for reason in judged.reasons}
    assert judged.verdict is (REJECT if REJECT in verdicts else HOLD if HOLD in verdicts else PROMOTE)
