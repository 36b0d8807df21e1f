"""Latency: medians of what a clock said, in the right mode, on the right images, in turns."""

from __future__ import annotations

from types import ModuleType

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from nss import latency
from nss.errors import ModelError
from nss.latency import measure_latency, random_pixels, time_calls


class Clock:
    """Stands still but for what `work` adds."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(latency.time, "perf_counter", clock.perf_counter)
    return clock


class Spy(nn.Module):
    """Answers zeros, and notes what it was called with, and how."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.part = nn.Dropout()
        self.seen: list[tuple[torch.dtype, tuple[int, ...], bool, bool]] = []
        self.images: list[Tensor] = []

    def forward(self, images: Tensor) -> Tensor:
        modes = self.training or self.part.training
        self.seen.append((images.dtype, tuple(images.shape), modes, torch.is_inference_mode_enabled()))
        self.images.append(images)
        return torch.zeros(len(images), 2)


def test_median_and_95th_percentile_of_the_calls_behind_the_warm_up(clock: Clock) -> None:
    """Call k of a batch of n takes k² + n milliseconds; the first three do not count."""
    calls: dict[int, int] = {}

    def work(images: Tensor) -> None:
        size = len(images)
        clock.now += (calls.get(size, 0) ** 2 + size) / 1000
        calls[size] = calls.get(size, 0) + 1

    found = time_calls({"work": work}, torch.zeros(8, 1), (1, 8), repeats=12, warmup=3)["work"]
    spent = np.arange(3, 15) ** 2
    assert calls == {1: 15, 8: 15}
    for size in (1, 8):
        assert found.median_ms[size] == pytest.approx((8**2 + 9**2) / 2 + size)
        assert found.p95_ms[size] == pytest.approx(np.percentile(spent, 95) + size)
    assert (found.device, found.threads, found.repeats) == ("cpu", torch.get_num_threads(), 12)


def test_models_and_sizes_take_turns_to_and_fro() -> None:
    order: list[tuple[str, int]] = []
    calls = {name: lambda images, name=name: order.append((name, len(images))) for name in ("a", "b")}
    time_calls(calls, torch.zeros(2, 1), (1, 2), repeats=7, warmup=1)
    jobs = [("a", 1), ("b", 1), ("a", 2), ("b", 2)]
    turns = [(1, jobs[::-1]), (5, jobs), (2, jobs[::-1])]
    assert order == [job for count, turn in turns for job in turn for _ in range(count)]


def test_a_model_made_by_build_model_gets_pixels_in_evaluation_mode(networks: ModuleType) -> None:
    model = networks.zoo_model("lenet")
    model.network = Spy()
    watched: list[Tensor] = []
    model.normalise.register_forward_pre_hook(lambda _, given: watched.append(given[0]))
    model.train()
    measure_latency(model, (1, 3), repeats=2, warmup=1)
    assert {(each.dtype, tuple(each.shape)) for each in watched} == {(torch.uint8, (n, 1, 16, 16)) for n in (1, 3)}
    assert {(training, inference) for _, _, training, inference in model.network.seen} == {(False, True)}


def test_another_model_gets_floats_of_the_shape_that_was_given() -> None:
    model = Spy()
    measure_latency(model, (2,), repeats=1, warmup=0, input_shape=(3, 4, 5))
    assert model.seen == [(torch.float32, (2, 3, 4, 5), False, True)]
    assert 0 <= float(model.images[0].min()) < float(model.images[0].max()) <= 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_another_model_gets_images_of_its_own_precision(dtype: torch.dtype) -> None:
    model = Spy()
    model.weight = nn.Parameter(model.weight.to(dtype))
    model.rows = nn.Parameter(torch.zeros(1, dtype=torch.int8), requires_grad=False)
    measure_latency(model, (2,), repeats=1, warmup=0, input_shape=(1, 2, 2))
    assert [seen[0] for seen in model.seen] == [dtype]
    measure_latency(nn.Sequential(nn.Flatten(), nn.Linear(4, 2)).to(dtype), (1,), repeats=1, input_shape=(1, 2, 2))


def test_every_module_keeps_its_own_mode() -> None:
    model = Spy().train()
    model.part.eval()
    measure_latency(model, (1,), repeats=1, input_shape=(1, 2, 2))
    assert (model.training, model.part.training) == (True, False)


def test_a_model_that_does_not_know_its_images_needs_their_shape() -> None:
    with pytest.raises(ModelError, match="does not say which images it takes"):
        measure_latency(Spy())


@pytest.mark.parametrize(
    "wrong", [{"batch_sizes": ()}, {"batch_sizes": (1, 0)}, {"repeats": 0}, {"warmup": -1}], ids=str
)
def test_what_cannot_be_measured_is_refused(wrong: dict[str, object]) -> None:
    model = Spy()
    with pytest.raises(ModelError, match="from 1"):
        measure_latency(model, input_shape=(1, 2, 2), **wrong)
    assert model.seen == []


def test_a_gpu_is_waited_for_before_and_after_each_call(monkeypatch: pytest.MonkeyPatch) -> None:
    class OnGpu:
        device = torch.device("cuda", 0)

        def __getitem__(self, rows: slice) -> OnGpu:
            return self

    events: list[str] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: events.append(f"wait {device}"))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some Card")
    call = {"model": lambda images: events.append("call")}
    found = time_calls(call, OnGpu(), (1,), repeats=2, warmup=0)["model"]
    assert events == ["wait cuda:0", "call", "wait cuda:0"] * 2
    assert found.device == "cuda:0 (Some Card)"


def test_the_dictionary_is_ready_for_json(clock: Clock) -> None:
    def work(images: Tensor) -> None:
        clock.now += 0.002

    found = time_calls({"work": work}, torch.zeros(4, 1), (4,), repeats=3)["work"].to_dict()
    times = {"median_ms": pytest.approx(2), "p95_ms": pytest.approx(2)}
    assert found == {"batch": {"4": times}, "device": "cpu", "threads": torch.get_num_threads(), "repeats": 3}


def test_random_pixels_are_the_same_every_time_and_fill_the_range() -> None:
    torch.manual_seed(1)
    first = random_pixels(100, (1, 8, 8))
    torch.manual_seed(2)
    assert torch.equal(first, random_pixels(100, (1, 8, 8)))
    assert (int(first.min()), int(first.max()), first.dtype) == (0, 255, torch.uint8)
