"""RQ3: cases are what they are called after, points are chosen and compared as the protocol says."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from bench import common, rq3
from bench.common import Report, Row, Settings, interleaved
from bench.readapt_cases import ATTACK, DRIFT, EPS, MAIN, NEW, OTHERS, REPAIR, Case, Subject, change, worked
from bench.readapt_peers import PEERS, train_peer, trained_layers
from bench.readapt_points import (
    BATCH,
    OURS,
    Grid,
    Points,
    best_point,
    epoch_seconds,
    fastest_of_each,
    goal_of,
    to_target,
)
from nss.attacks import pgd
from nss.critical import critical_neurons
from nss.data import SPLITS, Batch, Dataset
from nss.drift import shifted
from nss.model import Classifier, ModelSpec
from nss.predict import accuracy
from nss.profile import profile
from nss.samples import Samples, parts
from nss.slice import semantic_slices

SHAPE = (1, 6, 6)


@pytest.fixture
def model() -> Classifier:
    torch.manual_seed(0)
    body = [nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 8, 3, 2), nn.ReLU()]
    network = nn.Sequential(*body, nn.Flatten(), nn.Linear(32, 3))
    return Classifier(network, ModelSpec("tiny:network", ("a", "b", "c"), SHAPE, (0.5,), (0.25,))).eval()


def samples(count: int, seed: int = 0) -> Samples:
    """Three classes of different light."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 3
    noise = torch.randint(0, 100, (count, *SHAPE), generator=generator)
    return Samples((noise + 60 * labels.view(-1, 1, 1, 1)).byte(), labels)


# Cases.


def test_a_composed_drift_is_one_after_the_other(model: Classifier) -> None:
    images = samples(10)
    expected = shifted(shifted(images.images, "rotation", 3, 4), "noise", 2, 1004)
    assert torch.equal(change(images, DRIFT, "rotation 3 + noise 2", model, 4), expected)


def test_attacked_images_have_8_bits_and_hurt(model: Classifier) -> None:
    images = Samples(samples(60).images, model(samples(60).images).argmax(1))
    attacked = change(images, ATTACK, "pgd", model, 0)
    assert attacked.dtype == torch.uint8
    assert int((attacked.int() - images.images.int()).abs().max()) == round(EPS * 255)
    assert accuracy(model, (attacked, images.labels)) < 1.0
    floats = pgd(model, images.images, images.labels, EPS, 10, EPS / 4, 0)
    assert torch.equal(attacked, (floats * 255).round().byte())


def test_what_a_damaged_model_still_answers_right_is_old(model: Classifier) -> None:
    images = samples(30)
    old = worked(model, images, REPAIR)
    right = model(images.images).argmax(1) == images.labels
    assert 0 < len(old) < 30
    assert torch.equal(old.images, images.images[right])
    assert worked(model, images, DRIFT) is images
    assert torch.equal(change(images, REPAIR, "drop 0.3", model, 0), images.images)


def small_case(model: Classifier) -> Case:
    """New images are negatives. Fresh ones are labelled as the adapted model answers: it alone gets all right."""
    clean = samples(90, seed=2)

    def negative(of: Samples) -> Samples:
        return Samples(255 - of.images, of.labels)

    return Case(
        situation=ATTACK,
        setting="tiny",
        model=model,
        new=negative(samples(48)),
        held_out=negative(samples(30, seed=1)),
        old=samples(30, seed=1),
        fresh=lambda adapted, count: Samples(clean.images[:count], adapted(clean.images[:count]).argmax(1)),
        test=lambda count: (negative(clean).pick(torch.arange(count)), clean.pick(torch.arange(count))),
    )


def test_readapt_trains_on_the_new_samples_and_holds_out_the_others(model: Classifier) -> None:
    case = small_case(model)
    train, held_out = parts(case.new_data(), seed=0)
    assert torch.equal(train.images, case.new.images)
    assert torch.equal(train.labels, case.new.labels)
    assert torch.equal(held_out.images, case.held_out.images)


@pytest.mark.parametrize(("count", "new", "held_out"), [(90, 45, 20), (41, 20, 20), (30, 15, 15), (3000, 1000, 20)])
def test_a_small_data_set_keeps_half_of_its_validation_images_to_hold_out(
    model: Classifier, count: int, new: int, held_out: int
) -> None:
    images = samples(count)
    split = torch.full((count,), SPLITS.index("val"), dtype=torch.uint8)
    subject = Subject("small", "tiny:network", 0)
    subject.data = Dataset(model.spec.classes, SHAPE, (Batch("0" * 32, images.images, images.labels, split),))
    subject.model = model
    case = subject.case(DRIFT, "contrast 1", 20)
    assert (len(case.new), len(case.held_out)) == (new, held_out)
    assert torch.equal(torch.cat([case.new.labels, case.held_out.labels]), images.labels[: new + held_out])


# Points.


def point(new: float, old: float, **more: Any) -> Row:
    return {"new_val": new, "old_val": old, **more}


def test_a_point_is_the_best_on_old_images_of_those_that_are_good_enough_on_new_ones() -> None:
    rows = [point(0.82, 0.6), point(0.795, 0.8), point(0.79, 0.9), point(0.80, 0.8)]
    assert best_point(rows, 0.795) == 3
    assert best_point(rows, 0.79) == 2


def test_where_none_is_good_enough_it_is_the_best_on_new_images() -> None:
    assert best_point([point(0.7, 0.9), point(0.8, 0.6), point(0.8, 0.7), point(0.1, 1.0)], 0.9) == 2


def test_of_equal_points_the_first_counts() -> None:
    assert best_point([point(0.1, 0.9), point(0.8, 0.7), point(0.8, 0.7)], 0.8) == 1


def test_what_is_enough_is_half_a_point_below_the_best_epoch_of_full_retraining() -> None:
    assert goal_of([[0.2, 0.8, 0.7], [0.2, 0.6, 0.75]]) == 0.795


def test_a_baseline_is_timed_in_the_setting_that_gets_there_first_and_ours_in_the_chosen_one() -> None:
    curves = [[0.1, 0.5, 0.9], [0.1, 0.8, 0.7], [0, 0, 0]]
    full = [{"method": "full", "curve": curve, "chosen": place == 2} for place, curve in enumerate(curves)]
    ours = [{"method": OURS, "curve": curve, "chosen": place == 0} for place, curve in enumerate(curves)]
    for target, place in ((0.7, 1), (0.85, 0), (0.95, 0)):
        assert fastest_of_each([*full, *ours], target) == {"full": full[place], OURS: ours[0]}


def test_the_choice_of_neurons_counts_in_full_in_the_time_to_the_target() -> None:
    # 2 s of choosing, 1 s an epoch.
    assert epoch_seconds(3.0, 7.0, 5) == [2.0, 3.0, 4.0, 5.0, 6.0, 7.0]
    assert epoch_seconds(8.0, 7.0, 5) == [7.0] * 6
    assert epoch_seconds(3.0, 3.0, 1) == [3.0, 3.0]


def test_the_target_is_reached_at_the_first_epoch_above_it() -> None:
    row = {"curve": [0.1, 0.5, 0.7, 0.6], "steps": 30}
    assert to_target(row, 0.6) == {"reached": 1.0, "steps_to_target": 20.0}
    assert to_target(row, 0.7)["steps_to_target"] == 20.0
    assert to_target(row, 0.71) == {"reached": 0.0, "steps_to_target": None}


def test_each_method_is_judged_on_test_images_at_one_point_chosen_on_validation(model: Classifier) -> None:
    data = samples(90)
    known = profile(model, (data.images, data.labels), ("taylor",), classes=("a", "b", "c"), windows=1)
    slices = semantic_slices(critical_neurons(known, "taylor", "cumulative", 0.95), known)
    subject: Any = SimpleNamespace(seed=0, model=model, known=(known, slices), first=lambda *_: data)
    rates = {**dict.fromkeys(PEERS, (0.0001, 0.05)), OURS: (0.02,)}
    statistics = dict.fromkeys(PEERS, (True,))
    points = Points(subject, small_case(model), Grid(12, rates, (0.0, 1.0), statistics, held_out=30, test=60))
    rows = points.peers()
    rows += points.ours(goal=max(row["new_val"] for row in rows))
    assert [(row["method"], row["learning_rate"], row.get("guard")) for row in rows] == [
        *((peer, rate, None) for peer in PEERS for rate in (0.0001, 0.05)),
        (OURS, 0.02, 0.0),
        (OURS, 0.02, 1.0),
    ]
    chosen, clean = [row for row in rows if row["chosen"]], samples(90, seed=2)
    assert [row["method"] for row in chosen] == [*PEERS, OURS]
    assert all(("new_accuracy" in row) == row["chosen"] for row in rows)
    for row in rows:
        assert row["new_val"] == row["curve"][row["kept_epoch"]]
        assert len(row["curve"]) == 13
        assert 0 <= row["new_val"] * 30 == round(row["new_val"] * 30)
    for row in chosen:
        assert row["original_old"] == accuracy(model, (clean.images[:60], clean.labels[:60]))
        assert row["original_new"] == accuracy(model, (255 - clean.images[:60], clean.labels[:60]))
        assert row["fresh_accuracy"] == 1.0
    assert 0 < chosen[-1]["trained_share"] <= 0.2
    for seconds in points.timed(chosen[0], chosen[-1]):
        assert len(seconds) == 13
        assert sorted(seconds) == seconds
        assert seconds[-1] > 0
    case, full = small_case(model), chosen[0]
    again = [
        train_peer(
            model,
            trained_layers(model, "full", data.images),
            case.new,
            case.held_out,
            case.old,
            rate,
            epochs=12,
            batch_size=BATCH,
            seed=0,
            statistics=True,
        )
        for rate in (0.0001, 0.05)
    ]
    goal = max(max(each.curve) for each in again) - 0.005
    judged = [
        (old, new, each, epoch)
        for each in again
        for epoch, (new, old) in enumerate(zip(each.curve, each.old_curve, strict=True))
        if new >= goal
    ]
    _, _, best, epoch = max(judged, key=lambda each: each[:2])
    assert full["learning_rate"] == (0.0001, 0.05)[again.index(best)]
    assert full["kept_epoch"] == epoch
    assert full["new_accuracy"] == accuracy(best.at(epoch), (255 - clean.images[:60], clean.labels[:60]))


# The summary.


TIMED = ("reached", "seconds_to_target")


def judged(method: str, seed: int, new: float, old: float, seconds: float | None, setting: str = "x") -> Row:
    row = {"data": "d", "model": "m:n", "seed": seed, "situation": DRIFT, "setting": setting, "method": method}
    row |= {
        "new_accuracy": new,
        "old_accuracy": old,
        "seconds_to_target": seconds,
        "reached": float(seconds is not None),
    }
    return {**row, "new_val": new, "old_val": old, "chosen": True, "learning_rate": 0.01}


CHOSEN = [
    judged("full", 0, 0.80, 0.70, 10.0),
    judged("deeparc", 0, 0.75, 0.80, None),
    judged(OURS, 0, 0.81, 0.90, 5.0),
    judged("full", 1, 0.70, 0.70, 10.0),
    judged("deeparc", 1, 0.75, 0.80, 30.0),
    judged(OURS, 1, 0.73, 0.70, 8.0),
    judged("full", 0, 0.50, 0.50, 10.0, "y"),
    judged("deeparc", 0, 0.50, 0.50, 10.0, "y"),
    judged(OURS, 0, 0.50, 0.60, None, "y"),
]
# As they come from a case, which names them.
UNNAMED = [{name: row[name] for name in set(row) - {"situation", "setting", *TIMED}} for row in CHOSEN[:3]]


def test_ours_is_compared_with_the_baselines_of_its_own_seed() -> None:
    rows = {(row["setting"], row["method"]): row for row in rq3.summarised(CHOSEN)}
    ours = rows["x", OURS]
    expected = {
        "new_vs_full": (0.01 + 0.03) / 2,
        "old_vs_full": (0.20 + 0.00) / 2,
        "new_vs_deeparc": (0.06 - 0.02) / 2,
        "old_vs_deeparc": 0.0,
        "old_vs_full_sd": 0.2 / math.sqrt(2),
        "time_vs_full": 0.65,
        "reached": 1.0,
        "seeds": 2,
    }
    assert {name: ours[name] for name in expected} == pytest.approx(expected)
    assert "new_vs_full" not in rows["x", "full"]
    assert (rows["x", "deeparc"]["reached"], rows["x", "deeparc"]["time_vs_full"]) == (0.5, 3.0)


def test_the_mean_over_cases_is_taken_within_each_seed_first() -> None:
    overall = next(row for row in rq3.summarised(CHOSEN) if row["setting"] == rq3.ALL and row["method"] == OURS)
    assert overall["old_vs_full"] == pytest.approx(((0.20 + 0.10) / 2 + 0.00) / 2)
    assert (overall["seeds"], overall["reached"]) == (2, 0.75)


def test_fresh_attacks_are_compared_where_there_are_any() -> None:
    fresh = {"full": 0.3, "deeparc": 0.5, OURS: 0.4}
    rows = [{**row, "fresh_accuracy": fresh[row["method"]]} if row["setting"] == "y" else row for row in CHOSEN]
    found = {row["setting"]: row for row in rq3.summarised(rows) if row["method"] == OURS}
    assert (found["y"]["fresh_vs_full"], found["y"]["fresh_vs_deeparc"]) == pytest.approx((0.1, -0.1))
    assert "fresh_vs_full" not in found["x"]


def test_every_situation_is_in_the_whole_bench_and_in_the_quick_one() -> None:
    assert {situation for situation, _ in (MAIN, *OTHERS)} == {DRIFT, ATTACK, REPAIR}
    assert {setting.split(" ")[0] for situation, setting in OTHERS if situation == DRIFT} == {
        "rotation", "blur", "noise", "contrast", "brightness",
    }  # fmt: skip
    assert {situation for situation, _ in rq3.QUICK} == {DRIFT, ATTACK, REPAIR}
    assert set(rq3.QUICK) < set(rq3.CASES)
    assert NEW == 1000


def test_times_are_left_to_a_later_run_which_measures_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []

    class Measured:
        def __init__(self, *_: Any) -> None:
            pass

        def peers(self) -> list[Row]:
            calls.append("peers")
            rows = [{**row, "curve": [0.1, row["new_val"]], "steps": 9} for row in UNNAMED[:2]]
            # Another setting of full retraining is there at once.
            return [*rows, {**rows[0], "curve": [0.8, 0.1], "chosen": False, "learning_rate": 0.02}]

        def ours(self, goal: float) -> list[Row]:
            calls.append(f"ours, {goal}")
            return [{**UNNAMED[2], "curve": [0.1, 0.81], "steps": 9}]

        def timed(self, *rows: Row) -> list[list[float]]:
            calls.append(f"timed {[row['learning_rate'] for row in rows]}")
            return [[1.0, 4.0], [2.0, 5.0]]

    subject = SimpleNamespace(name="d", factory=rq3.STEP_TIME, seed=0, model=nn.Linear(1, 1), case=lambda *_: None)
    monkeypatch.setattr(common, "CACHE", tmp_path)
    monkeypatch.setattr(rq3, "Subject", lambda *_: subject)
    monkeypatch.setattr(rq3, "Points", Measured)
    step = {"step": "free", "milliseconds": 2.0, "of_full": 0.5, "trained_share": 0.2}
    monkeypatch.setattr(rq3, "step_times", lambda *_: calls.append("steps") or [step])
    quick = Settings("rq3", ("d",), (rq3.STEP_TIME,), (0,), quick=True, command="")
    first = rq3.run(replace(quick, times=False))
    assert calls == ["peers", "ours, 0.795"] * 3
    assert not any("step" in row or row.get("seconds") for row in [*first.rows, *first.summary])
    calls.clear()
    whole = rq3.run(quick)
    assert calls == ["timed [0.02, 0.01]", "steps"]
    assert [row["of_full"] for row in whole.summary if "step" in row] == [0.5]
    main = {row["method"]: row for row in whole.summary if row.get("setting") == MAIN[1]}
    assert (main["full"]["seconds_to_target"], main["full"]["steps_to_target"], main["full"]["seconds"]) == (
        1.0,
        0,
        4.0,
    )
    assert (main[OURS]["seconds_to_target"], main[OURS]["time_vs_full"]) == (5.0, 5.0)
    assert "seconds" not in main["deeparc"]
    assert [row for row in first.rows if row["setting"] != MAIN[1]] == [
        row for row in whole.rows if row.get("setting", MAIN[1]) != MAIN[1]
    ]


def test_the_picture_has_a_row_for_each_model(tmp_path: Path) -> None:
    rows = [{**row, "setting": MAIN[1]} if row["setting"] == "x" else row for row in CHOSEN]
    settings = Settings("rq3", ("d",), ("m:n",), (0, 1), quick=False, command="python -m bench rq3")
    rq3.draw(Report(settings, {}, [*rows, {"step": "full", "milliseconds": 1.0}]), tmp_path / "rq3.png")
    assert (tmp_path / "rq3.png").stat().st_size > 5000


# The time of a step.


def test_steps_are_taken_in_turn_after_warming_up() -> None:
    calls: list[str] = []
    found = interleaved({name: lambda name=name: calls.append(name) or 1 for name in ("full", "free")}, 40, 5)
    assert calls == ["full", "free"] * (5 + 40)
    assert set(found) == {"full", "free"}
    assert all(0 <= each < 100 for each in found.values())
