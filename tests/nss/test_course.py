"""The course of a re-adaptation: which epoch is kept, when it stops, what a step learns from."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nss.course import Course, Memory, Settings
from nss.errors import ReadaptError
from nss.freeze import freeze
from nss.samples import Samples

HUNDRED = Samples(torch.zeros(100, 1, 8, 8), torch.zeros(100, dtype=torch.int64))


class Scripted(Course):
    """Accuracies on held-out samples are read from a list."""

    new: list[float]
    old_accuracies: list[float] | None
    seen: list[list[Tensor]]

    def _accuracy(self, samples: Samples | None) -> float | None:
        if samples is self.held_out:
            self.seen.append([parameter.detach().clone() for parameter in self.model.parameters()])
            return self.new[len(self.seen) - 1]
        return None if self.old_accuracies is None else self.old_accuracies[len(self.seen) - 1]


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters())


def scripted(
    networks: ModuleType,
    new: list[float],
    old: list[float] | None,
    patience: int = 9,
    guards: list[float] | None = None,
) -> tuple[Scripted, str]:
    model = networks.zoo_model("lenet")
    frozen = freeze(model, {"conv1": torch.arange(16) < 4})
    samples = Samples(networks.pictures(8), torch.arange(8) % 4)
    values = iter(guards or [])  # asked for the original and at the end of each epoch
    guard = None if guards is None else lambda: torch.tensor(next(values))
    settings = Settings(len(new) - 1, 8, 0.01, 1.0, patience)
    course = Scripted(frozen, samples, HUNDRED, None, None, guard, settings, adam(frozen))
    course.new, course.old_accuracies, course.seen = new, old, []
    return course, course.run(torch.Generator().manual_seed(0))


def check_kept(course: Scripted, epoch: int) -> None:
    assert course.kept == epoch
    for parameter, then in zip(course.model.parameters(), course.seen[epoch], strict=True):
        assert torch.equal(parameter, then)


def test_within_one_standard_error_of_the_best_the_least_harm_to_the_old_is_kept(networks: ModuleType) -> None:
    # The standard error of 0.82 on 100 samples is 0.038: epochs with 0.79 and more are equally good.
    course, stopped = scripted(networks, [0.3, 0.7, 0.79, 0.82, 0.81], [0.95, 0.9, 0.85, 0.6, 0.7])
    check_kept(course, 2)
    assert stopped == "all epochs done, judged on held-out new samples"
    check_kept(scripted(networks, [0.3, 0.7, 0.78, 0.82, 0.81], [0.95, 0.9, 0.85, 0.6, 0.7])[0], 4)


def test_without_old_data_the_guard_says_what_harms_least(networks: ModuleType) -> None:
    course, _ = scripted(networks, [0.3, 0.7, 0.79, 0.82, 0.81], None, guards=[0.0, 0.1, 0.4, 0.3, 0.2])
    check_kept(course, 4)


def test_without_anything_to_say_the_best_epoch_is_kept_the_first_of_equals(networks: ModuleType) -> None:
    check_kept(scripted(networks, [0.3, 0.7, 0.82, 0.81, 0.82], None)[0], 2)


def test_the_original_is_kept_when_nothing_is_better(networks: ModuleType) -> None:
    course, _ = scripted(networks, [0.9, 0.5, 0.88], [0.95, 0.9, 0.85])
    check_kept(course, 0)


def test_it_stops_after_so_many_epochs_without_progress(networks: ModuleType) -> None:
    course, stopped = scripted(networks, [0.3, 0.7, 0.6, 0.7, 0.9], None, patience=2)
    assert stopped == "no progress on held-out new samples for 2 epochs"
    assert [each.epoch for each in course.curve] == [0, 1, 2, 3]
    check_kept(course, 1)


def test_a_memory_mixes_labels_with_the_answers_of_the_original() -> None:
    answers, labels = torch.tensor([[2.0, 0.0], [0.0, 1.0], [5.0, 5.0]]), torch.tensor([1, 0, 1])
    logits, rows = torch.tensor([[0.5, -0.5], [1.0, 2.0]]), torch.tensor([2, 0])
    hard = -(F.log_softmax(logits, 1)[[0, 1], [1, 1]]).mean()
    soft = -(answers[rows].softmax(1) * F.log_softmax(logits, 1)).sum(1).mean()
    for distil in (0.0, 0.3, 1.0):
        memory = Memory(Samples(torch.zeros(3, 1, 1, 1), labels), answers, distil)
        expected = (1 - distil) * hard + distil * soft
        torch.testing.assert_close(memory.loss(logits, rows), expected)


class Counting(nn.Module):
    """Notes which images it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(2))
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x[:, 0, 0, 0])
        return x[:, 0, 0, :1] * self.scale


NONE = Samples(torch.zeros(0), torch.zeros(0, dtype=torch.int64))


def test_a_step_sees_as_many_old_samples_as_new_ones_and_a_pass_every_new_one_once() -> None:
    new = Samples(torch.arange(10.0).view(-1, 1, 1, 1), torch.arange(10) % 2)
    old = Samples(torch.arange(100.0, 105.0).view(-1, 1, 1, 1), torch.zeros(5, dtype=torch.int64))
    model = Counting()
    course = Course(
        model, new, NONE, None, Memory(old, torch.zeros(5, 2), 0.0), None, Settings(1, 5, 0.001, 0.0, 2), adam(model)
    )
    course.run(torch.Generator().manual_seed(0))
    steps = [batch for batch in model.seen if bool((batch >= 100).any())]
    assert len(steps) == course.steps == 10
    for first, second in zip(steps[::2], steps[1::2], strict=True):
        assert sorted(torch.cat([first[:5], second[:5]]).tolist()) == list(range(10))
        assert bool((torch.cat([first[5:], second[5:]]) >= 100).all())


def test_a_step_reads_bytes_and_floats_on_one_scale() -> None:
    new = Samples(torch.full((4, 1, 1, 1), 51, dtype=torch.uint8), torch.zeros(4, dtype=torch.int64))
    old = Samples(torch.full((5, 1, 1, 1), 0.4), torch.zeros(5, dtype=torch.int64))
    model = Counting()
    course = Course(
        model, new, NONE, None, Memory(old, torch.zeros(5, 2), 0.0), None, Settings(1, 4, 0.001, 0.0, 2), adam(model)
    )
    course._step(torch.arange(4), torch.arange(4))
    torch.testing.assert_close(model.seen[0], torch.tensor([0.2] * 4 + [0.4] * 4))


def test_with_none_held_out_the_smallest_loss_on_all_new_samples_is_kept() -> None:
    """Both classes of one image pull against each other: every step away from the start is for the worse."""
    new = Samples(torch.ones(8, 1, 1, 1), torch.arange(8) % 2)
    model = Counting()
    course = Course(model, new, NONE, None, None, None, Settings(9, 4, 0.5, 0.0, 3), adam(model))
    stopped = course.run(torch.Generator().manual_seed(0))
    assert course.kept == 0
    assert course.model.scale.tolist() == [1.0, 1.0]
    assert stopped == "no progress on new samples (too few to hold any out) for 3 epochs"
    easy = Samples(torch.ones(8, 1, 1, 1), torch.zeros(8, dtype=torch.int64))
    model = Counting()
    course = Course(model, easy, NONE, None, None, None, Settings(4, 4, 0.1, 0.0, 3), adam(model))
    assert course.run(torch.Generator().manual_seed(0)).startswith("all epochs done")
    assert course.kept == 4


def test_a_loss_that_is_not_finite_is_an_error() -> None:
    new = Samples(torch.full((4, 1, 1, 1), float("inf")), torch.zeros(4, dtype=torch.int64))
    model = Counting()
    course = Course(model, new, NONE, None, None, None, Settings(1, 4, 0.1, 0.0, 1), adam(model))
    with pytest.raises(ReadaptError, match="not finite"):
        course.run(torch.Generator())
