"""RQ4: tasks are what they are called after, points are chosen, judged and compared as the protocol says."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from bench import common, rq4
from bench.common import Report, Row, Settings, interleaved
from bench.extend_cases import (
    CHAIN,
    HALVES,
    SHARE,
    Subject,
    balanced,
    by_task,
    forgetting,
    judged,
    matrix_row,
    task_data,
)
from bench.extend_peers import NAIVE, PEERS, Setting, learn
from bench.extend_points import (
    CHAINED,
    OUR_REPLAY,
    OURS,
    Chain,
    Grid,
    Halves,
    best,
    ends,
)
from nss.base import train
from nss.data import SPLITS, Batch, Dataset, batch_digest
from nss.extend import extend
from nss.extend_report import told_accuracy
from nss.model import build_model, model_digest
from nss.samples import Samples
from nss.size import count_parameters

CLASSES = ("a", "b", "c", "d", "e", "f")
FACTORY = "nss.zoo:vgg_small"
COUNTS = {"train": 40, "val": 12, "test": 12}
"""images of each class"""


def data_of(parts: int = 2) -> Dataset:
    """Classes that differ in the light of the left and of the right half, in as many batches."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(6).repeat(sum(COUNTS.values()))
    split = torch.tensor([0, 1, 2]).repeat_interleave(torch.tensor(list(COUNTS.values())) * 6).byte()
    light = torch.stack([40 * (labels // 2) + 20, 60 * (labels % 2) + 20 * (labels // 2)], 1).view(-1, 1, 1, 2)
    images = (light.repeat_interleave(4, 3) + torch.randint(0, 60, (len(labels), 1, 8, 8), generator=generator)).byte()
    batches = []
    for rows in torch.arange(len(labels)).chunk(parts):
        piece = images[rows], labels[rows], split[rows]
        batches.append(Batch(batch_digest(*piece, CLASSES), *piece))
    return Dataset(CLASSES, (1, 8, 8), tuple(batches))


@pytest.fixture(scope="module", autouse=True)
def _few_features() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nss.routing.FEATURES", 200)
        yield


def subject_of(sizes: tuple[int, ...]) -> Subject:
    """A subject whose data is small and whose base model is no kept one."""
    subject = Subject("tiny", FACTORY, 0, sizes, 100)
    old = task_data(data_of(), sizes, 0, 200)
    model = build_model(FACTORY, old.classes, old.image_shape, 0)
    train(model, old, 4, 0, batch_size=16)
    vars(subject).update(data=data_of(), model=model)
    return subject


@pytest.fixture(scope="module")
def halves() -> Subject:
    return subject_of((3, 3))


# Tasks.


def test_a_task_holds_its_classes_under_the_names_up_to_them() -> None:
    part = task_data(data_of(), (2, 2, 2), 1, 50)
    assert part.classes == ("a", "b", "c", "d")
    assert {name: part.split(name).per_class_counts() for name in SPLITS} == {
        "train": {"a": 0, "b": 0, "c": 25, "d": 25},
        "val": {"a": 0, "b": 0, "c": 12, "d": 12},
        "test": {"a": 0, "b": 0, "c": 12, "d": 12},
    }
    few = task_data(data_of(), (2, 2, 2), 1, 21)
    assert [len(few.split(name)) for name in SPLITS] == [20, 20, 20]
    whole = data_of().split("train")
    assert torch.equal(
        part.split("train").images[part.split("train").labels == 3], whole.images[whole.labels == 3][:25]
    )


def test_a_task_is_known_by_its_content_not_by_how_it_came() -> None:
    found = {task_data(data_of(parts), (3, 3), 0, 60).digest for parts in (1, 2, 5)}
    assert len(found) == 1
    assert found != {task_data(data_of(), (3, 3), 0, 30).digest}
    assert task_data(data_of(), (3, 3), 0, 60).digest != task_data(data_of(), (3, 3), 1, 60).digest


def test_the_tasks_of_a_subject_are_all_classes_once(halves: Subject) -> None:
    assert [halves.names(task) for task in (0, 1)] == [("a", "b", "c"), ("d", "e", "f")]
    assert halves.seen("test", 2).labels.sort().values.tolist() == sorted([*range(6)] * 12)
    assert set(halves.seen("train", 1).labels.tolist()) == {0, 1, 2}


def test_a_data_set_with_too_few_classes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(common, "dataset", lambda name: data_of())
    assert len(Subject("six", FACTORY, 0, (3, 3), 60).data.classes) == 6
    with pytest.raises(SystemExit, match=r"six has 6 classes, and tasks of 5 \+ 5 take 10"):
        _ = Subject("six", FACTORY, 0, HALVES, 60).data


# Judging.


class Answers(nn.Module):
    """Answers with logits that each image brings."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.flatten(1)


# Of classes 0, 1 | 2: an old image that is right either way, one right when told, one wrong; a new one taken for old.
LOGITS = torch.tensor([[5.0, 1, 0], [1, 2, 3], [0, 4, 5], [2, 0, 1]]).view(4, 3, 1, 1)
JUDGED = Samples(LOGITS, torch.tensor([0, 1, 0, 2]))


def test_told_and_not_told_are_two_numbers() -> None:
    assert judged(Answers(), JUDGED, (2, 1)) == {
        "told_old": pytest.approx(2 / 3),
        "told_new": 1.0,
        "old_accuracy": pytest.approx(1 / 3),
        "new_accuracy": 0.0,
        "accuracy": 0.25,
    }
    assert matrix_row(Answers(), JUDGED, (2, 1)) == [(pytest.approx(2 / 3), pytest.approx(1 / 3)), (1.0, 0.0)]
    assert balanced(Answers(), JUDGED, (2, 1)) == pytest.approx(1 / 6)
    assert by_task(Answers(), JUDGED, (2, 1))[2].tolist() == [0, 0, 0, 1]


def test_with_a_task_a_class_all_are_right_when_told() -> None:
    told, free, _ = by_task(Answers(), JUDGED, (1, 1, 1))
    assert (told.tolist(), free.tolist()) == ([True] * 4, [True, False, False, False])


def test_forgetting_is_the_best_of_before_less_the_end() -> None:
    assert forgetting([[0.9], [0.95, 0.8], [0.5, 0.7, 1.0]]) == pytest.approx((0.45 + 0.1) / 2)
    assert forgetting([[0.5], [0.7, 0.9]]) == pytest.approx(-0.2)


def test_a_matrix_comes_to_means_of_its_last_row_and_forgetting() -> None:
    cells = [(1, 1, 0.9, 0.9), (2, 1, 0.9, 0.3), (2, 2, 0.8, 0.7)]
    rows = [{"after": after, "task": task, "told": told, "accuracy": free} for after, task, told, free in cells]
    expected = {"told": 0.85, "told_forgetting": 0.0, "accuracy": 0.5, "forgetting": 0.6}
    assert ends(rows) == pytest.approx(expected)


def test_the_first_of_the_best_is_chosen() -> None:
    assert best([{"val": 0.1}, {"val": 0.3}, {"val": 0.3}]) == 1


# Points.

GRID = Grid(100, 2, {NAIVE: (Setting(0.001), Setting(0.05)), "replay 10 %": (Setting(0.05),)}, tuple(OUR_REPLAY))


def test_settings_are_chosen_on_validation_images_and_judged_on_test_images(halves: Subject) -> None:
    point = Halves(halves, GRID)
    rows = point.peers()
    assert [(row["method"], row["learning_rate"]) for row in rows] == [
        (NAIVE, 0.001), (NAIVE, 0.05), ("replay 10 %", 0.05),
    ]  # fmt: skip
    assert all(("accuracy" in row) == row["chosen"] for row in rows)
    naive = max(rows[:2], key=lambda row: row["val"])
    assert naive["chosen"]
    old, new = halves.seen("train", 1), halves.tasks[1].split("train")
    model = learn(
        NAIVE, halves.model, ("d", "e", "f"), Samples(new.images, new.labels), old,
        Setting(naive["learning_rate"]), point.budget,
    ).model  # fmt: skip
    assert naive.items() >= judged(model, halves.seen("test", 2), (3, 3)).items()
    assert naive["val"] == balanced(model, halves.seen("val", 2), (3, 3))
    assert naive["before"] == judged(halves.model, halves.seen("test", 1), (3,))["accuracy"]


def test_ours_is_extend_with_its_defaults(halves: Subject) -> None:
    grid = Grid(100, 2, {}, (OURS, "nss, replay 10 %"))
    rows = Halves(halves, grid).ours()
    assert [row["method"] for row in rows] == [OURS, "nss, replay 10 %"]
    found, slices = halves.known
    new, old, test = halves.tasks[1], halves.tasks[0], halves.seen("test", 2)
    done = extend(halves.model, slices, new, 0.1, profile=found, old_data=old, epochs=2, share=SHARE)
    told = told_accuracy(done.model, (test.images, test.labels))
    row = rows[1]
    assert (row["told_old"], row["old_accuracy"]) == told["a"]
    assert (row["told_new"], row["new_accuracy"]) == told["d"]
    assert (row["accuracy"], row["steps"]) == (told["all"][1], done.report.steps)
    assert row["trained_share"] == done.report.trained_share
    assert all(each["chosen"] for each in rows)
    assert rows[0]["told_old"] == rows[1]["told_old"]


def test_a_chain_forgets_nothing_when_told() -> None:
    subject = subject_of((2, 2, 2))
    rows = Chain(subject, GRID).ours()
    matrix = {(row["after"], row["task"]): row for row in rows if "after" in row}
    assert sorted(matrix) == [(1, 1), (2, 1), (2, 2), (3, 1), (3, 2), (3, 3)]
    assert rows[0]["told_forgetting"] == 0.0
    assert matrix[1, 1]["told"] == matrix[2, 1]["told"] == matrix[3, 1]["told"] == matrix[1, 1]["accuracy"]
    hidden = next(row for row in rows if row.get("layer") == "hidden")
    assert hidden["used"] == [218, 77, 77]
    assert (hidden["total"], hidden["free"], hidden["widened"]) == (256, 0, 116)
    peers = Chain(subject, GRID).peers()
    assert {row["method"] for row in peers if row.get("chosen")} == set(CHAINED)
    assert sum("val" in row for row in peers) == 3
    lost = {row["method"]: row["told_forgetting"] for row in peers if row.get("chosen")}
    assert lost[NAIVE] >= lost["replay 10 %"]


def test_steps_are_timed_on_models_that_stay(halves: Subject) -> None:
    before = model_digest(halves.model)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bench.extend_points.TURNS", 1)
        # Two batches of 64 are more than there are new images.
        patch.setattr("bench.extend_points.STEP_BATCHES", 2)
        rows = Halves(halves, GRID).step_times()
    assert [row["step"] for row in rows] == [NAIVE, OURS, "nss, replay"]
    assert rows[0]["of_naive"] == rows[0]["memory_of_naive"] == 1.0
    assert all(row["milliseconds"] > 0 for row in rows)
    # At the least a model and its momentum.
    assert all(row["megabytes"] > 0.5 * 4e-6 * count_parameters(halves.model) for row in rows)
    assert model_digest(halves.model) == before


def test_runs_are_timed_in_turn_for_each_step(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = itertools.count()
    monkeypatch.setattr("bench.common.time.perf_counter", lambda: next(clock))
    calls: list[str] = []

    def counted(name: str, steps: int) -> Callable[[], int]:
        return lambda: calls.append(name) or steps

    runs = {"one": counted("one", 4), "two": counted("two", 10)}
    assert interleaved(runs, turns=9, warm_up=1) == {"one": 250.0, "two": 100.0}
    assert calls == ["one", "two"] * (1 + 9)


# The summary.


def chosen(method: str, seed: int, told: tuple[float, float], free: tuple[float, float], data: str = "d") -> Row:
    row = {"data": data, "model": "m:n", "seed": seed, "setting": "5 + 5", "method": method, "before": 0.95}
    row |= {"told_old": told[0], "told_new": told[1], "old_accuracy": free[0], "new_accuracy": free[1]}
    return {**row, "accuracy": sum(free) / 2, "chosen": True, "steps": 10, "trained_share": 1.0}


HALF = [
    chosen(NAIVE, 0, (0.4, 0.98), (0.0, 0.98)),
    chosen("replay 10 %", 0, (0.9, 0.97), (0.8, 0.9)),
    chosen(OURS, 0, (0.94, 0.96), (0.9, 0.84)),
    chosen(NAIVE, 1, (0.4, 0.96), (0.0, 0.96)),
    chosen("replay 10 %", 1, (0.9, 0.97), (0.8, 0.96)),
    chosen(OURS, 1, (0.92, 0.97), (0.9, 0.9)),
]
IDENTITY = {"data": "d", "model": "m:n", "setting": "2 + 2", "method": OURS}
CELLS = [{**IDENTITY, "seed": 0, "after": 2, "task": task, "told": 0.9, "accuracy": 0.5 + task / 10} for task in (1, 2)]
ENDED = {
    **IDENTITY,
    "seed": 0,
    "chosen": True,
    "told": 0.9,
    "accuracy": 0.65,
    "told_forgetting": 0.0,
    "forgetting": 0.2,
}
LAYER = {**IDENTITY, "seed": 0, "layer": "hidden", "used": [7, 3], "total": 10, "free": 0, "widened": 0}
STEP = {"data": "d", "model": "m:n", "setting": "5 + 5", "seed": 0, "step": OURS, "milliseconds": 3.0, "of_naive": 1.1}


def test_ours_is_compared_with_the_baselines_of_its_own_seed() -> None:
    rows = {row["method"]: row for row in rq4.summarised([*HALF, {**HALF[0], "chosen": False}], [], [])}
    expected = {
        "told_lost": 0.02,
        "new_vs_naive": (-0.02 + 0.01) / 2,
        "vs_replay_10": (0.02 + 0.02) / 2,
        "told_lost_sd": 0.02 / math.sqrt(2),
        "seeds": 2,
    }
    assert {name: rows[OURS][name] for name in expected} == pytest.approx(expected)
    assert not {"vs_ewc", "vs_lwf"} & set(rows[OURS])
    assert "vs_replay_10" not in rows[NAIVE]
    assert rows[NAIVE]["told_lost"] == pytest.approx(0.55)


def test_the_summary_has_ends_matrices_layers_and_steps() -> None:
    found = rq4.summarised([], [ENDED, {**ENDED, "chosen": False}, *CELLS, LAYER], [STEP])
    assert [row["forgetting"] for row in found if "forgetting" in row] == [0.2]
    cells = [row for row in found if "after" in row]
    assert [(row["after"], row["task"], row["accuracy"]) for row in cells] == [(2, 1, 0.6), (2, 2, 0.7)]
    assert [(row["layer"], row["used"], row["total"]) for row in found if "layer" in row] == [("hidden", "7, 3", 10)]
    assert [row["of_naive"] for row in found if "step" in row] == [1.1]


def test_the_whole_bench_has_every_method_and_choice_and_the_quick_one_every_method() -> None:
    assert set(rq4.WHOLE.settings) == set(PEERS)
    assert all(len(each) == 2 for each in rq4.WHOLE.settings.values())
    assert set(rq4.SMALL.settings) == set(PEERS)
    assert rq4.SMALL.ours == rq4.WHOLE.ours
    assert (sum(HALVES), sum(CHAIN), len(CHAIN)) == (10, 10, 5)
    assert set(CHAINED) <= set(rq4.SMALL.settings)


def test_the_picture_has_a_row_for_each_model(tmp_path: Path) -> None:
    settings = Settings("rq4", ("d",), ("m:n",), (0, 1), quick=False, command="python -m bench rq4")
    report = Report(settings, {}, [], rq4.summarised(HALF, [ENDED, *CELLS, LAYER], [STEP]))
    rq4.draw(report, tmp_path / "rq4.png")
    assert (tmp_path / "rq4.png").stat().st_size > 5000


def test_finished_parts_are_not_measured_again_and_texts_do_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(common, "CACHE", tmp_path)
    monkeypatch.setattr(rq4, "Subject", lambda name, factory, seed, sizes, images: subjects[sizes])
    subjects: dict[Any, Any] = {}
    for sizes in (HALVES, CHAIN):
        subjects[sizes] = Subject("d", "m:n", 0, sizes, 3000)
        vars(subjects[sizes])["model"] = nn.Linear(1, 1)
    calls: list[str] = []

    def part(name: str, rows: list[Row]) -> Callable[[Any], list[Row]]:
        return lambda _: calls.append(name) or [dict(row) for row in rows]

    monkeypatch.setattr(Halves, "peers", part("peers", HALF[:2]))
    monkeypatch.setattr(Halves, "ours", part("ours", HALF[2:3]))
    monkeypatch.setattr(Halves, "step_times", part("steps", [STEP]))
    monkeypatch.setattr(Chain, "peers", part("chain", []))
    monkeypatch.setattr(Chain, "ours", part("chain, ours", [ENDED, *CELLS, LAYER]))
    settings = Settings("rq4", ("d",), ("m:n",), (0,), quick=True, command="")
    without = rq4.run(replace(settings, times=False))
    assert calls == ["peers", "ours", "chain", "chain, ours"]
    assert not any("step" in row for row in without.summary)
    first = rq4.run(settings)
    assert calls[4:] == ["steps"]
    monkeypatch.setattr(rq4, "PROTOCOL", {"data": "said in other words"})
    assert rq4.run(settings).summary == first.summary
    assert len(calls) == 5
    monkeypatch.setattr(rq4, "WEIGHT_DECAY", 0.1)
    rq4.run(settings)
    assert calls[5:] == ["peers", "chain"]
