"""Holding out and drawing samples, class by class."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._pytree import tree_leaves

from nss.errors import DataError
from nss.samples import FEWEST, Samples, drawn, joined, parts, spread, whole

few = settings(max_examples=30, deadline=None)


@given(
    counts=st.lists(st.integers(0, 40), min_size=1, max_size=5),
    share=st.floats(0, 1),
    seed=st.integers(0, 99),
    least=st.integers(0, 3),
)
@few
def test_of_each_class_the_rounded_share_is_drawn(counts: list[int], share: float, seed: int, least: int) -> None:
    labels = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    labels = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))]
    chosen = drawn(labels, share, seed)
    assert torch.bincount(labels[chosen], minlength=len(counts)).tolist() == [int(n * share + 0.5) for n in counts]
    assert torch.equal(chosen, drawn(labels, share, seed))
    at_least = torch.bincount(labels[drawn(labels, share, seed, least)], minlength=len(counts)).tolist()
    assert at_least == [min(n, max(least, int(n * share + 0.5))) for n in counts]


def test_a_pair_is_split_by_class_and_by_the_seed(networks: ModuleType) -> None:
    data = networks.pictures(400), torch.arange(400) % 4
    train, held_out = parts(data, 0)
    assert (len(train), len(held_out)) == (360, 40)
    assert torch.bincount(held_out.labels).tolist() == [10] * 4
    everything = torch.cat([train.images, held_out.images]).flatten(1)
    assert len(everything.unique(dim=0)) == 400
    assert torch.equal(parts(data, 0)[1].images, held_out.images)
    assert not torch.equal(parts(data, 1)[1].images, held_out.images)


def test_too_few_samples_are_all_trained_on(networks: ModuleType) -> None:
    for count in (0, 1, 10 * FEWEST - 40):
        train, held_out = parts((networks.pictures(count), torch.arange(count) % 4), 0)
        assert (len(train), len(held_out)) == (count, 0)


def test_a_data_set_has_splits_of_its_own_unless_they_are_too_small(networks: ModuleType) -> None:
    large, small = networks.coloured_data(240), networks.coloured_data(60)
    train, held_out = parts(large, 0)
    assert torch.equal(train.images, large.split("train").images)
    assert torch.equal(held_out.labels, large.split("val").labels)
    train, held_out = parts(small, 0)
    assert (len(train), len(held_out)) == (len(small.split("train")), 0)
    train, _ = parts(small.split("test"), 0)
    assert torch.equal(train.images, small.split("test").images)


def test_any_kind_of_data_becomes_one_pair(networks: ModuleType) -> None:
    images, labels = networks.pictures(5), torch.arange(5)
    for data in ((images, labels), [(images[:2], labels[:2]), (images[2:], labels[2:])]):
        assert torch.equal(whole(data).images, images)
        assert torch.equal(whole(data).labels, labels)
    assert len(whole([])) == 0


def test_a_pair_is_taken_as_it_is_without_a_copy(networks: ModuleType) -> None:
    images, labels = networks.pictures(3000), torch.arange(3000) % 4
    samples = whole((images, labels))
    assert len(samples) == 3000
    assert (samples.images.data_ptr(), samples.labels.data_ptr()) == (images.data_ptr(), labels.data_ptr())


def test_a_generator_is_read_once_and_refused_when_it_was_read_before(networks: ModuleType) -> None:
    images, labels = networks.pictures(5), torch.arange(5)
    batches = ((images[rows], labels[rows]) for rows in (slice(0, 2), slice(2, 5)))
    assert torch.equal(whole(batches).images, images)
    with pytest.raises(DataError, match=r"was read before[\s\S]*a list of batches, a DataLoader or a Dataset"):
        whole(batches)


class Away(Tensor):
    """A tensor of another device: none of the CPU can be mixed with it until it is brought there."""

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
        assert all(isinstance(each, Away) for each in given), f"{func} mixes tensors of two devices"
        found = super().__torch_function__(func, types, args, kwargs or {})
        with torch._C.DisableTorchFunctionSubclass():
            return found.as_subclass(Tensor) if func is Tensor.cpu else found


def test_labels_on_another_device_are_brought_to_the_cpu(networks: ModuleType) -> None:
    images, labels = networks.pictures(400), torch.arange(400) % 4
    away = labels.as_subclass(Away)
    with pytest.raises(AssertionError, match="mixes"):
        away[labels]
    for data in ((images, away), [(images[:150], away[:150]), (images[150:], away[150:])]):
        assert type(whole(data).labels) is Tensor
        for found, wanted in zip(parts(data, 0), parts((images, labels), 0), strict=True):
            assert torch.equal(found.images, wanted.images)
            assert torch.equal(found.labels, wanted.labels)


BYTES = torch.tensor([0, 51, 255], dtype=torch.uint8).view(3, 1, 1, 1)
FLOATS = torch.tensor([0.0, 1.0]).view(2, 1, 1, 1)


@pytest.mark.parametrize("kind", [torch.float32, torch.float64, torch.float16])
def test_bytes_joined_to_floats_are_on_their_scale(kind: torch.dtype) -> None:
    left, right = Samples(BYTES, torch.tensor([4, 5, 6])), Samples(FLOATS.to(kind), torch.tensor([1, 2]))
    one, other = joined(left, right), joined(right, left)
    torch.testing.assert_close(one.images.flatten().double(), torch.tensor([0.0, 0.2, 1.0, 0.0, 1.0]).double())
    torch.testing.assert_close(other.images.flatten().double(), torch.tensor([0.0, 1.0, 0.0, 0.2, 1.0]).double())
    assert (one.labels.tolist(), other.labels.tolist()) == ([4, 5, 6, 1, 2], [1, 2, 4, 5, 6])


def test_images_of_one_type_are_joined_as_they_are() -> None:
    for images in (BYTES, FLOATS, 300 * FLOATS):
        samples = Samples(images, torch.arange(len(images)))
        both = joined(samples, samples)
        assert both.images.dtype == images.dtype
        assert torch.equal(both.images, torch.cat([images, images]))
        nothing = Samples(torch.zeros(0), torch.zeros(0, dtype=torch.int64))
        assert joined(samples, nothing) is joined(nothing, samples) is samples


def test_samples_of_two_devices_are_joined_where_the_first_are() -> None:
    away = Samples(FLOATS.to("meta"), torch.tensor([1, 2]))
    for right in (Samples(FLOATS, torch.tensor([3, 4])), Samples(BYTES[:2], torch.tensor([3, 4]))):
        both = joined(away, right)
        assert (both.images.device.type, both.images.dtype, both.images.shape) == ("meta", torch.float32, (4, 1, 1, 1))
        assert both.labels.tolist() == [1, 2, 3, 4]
        assert joined(right, Samples(FLOATS, away.labels)).images.device.type == "cpu"


@given(sizes=st.lists(st.integers(0, 60), min_size=1, max_size=4), count=st.integers(0, 70), seed=st.integers(0, 99))
@few
def test_samples_are_spread_evenly_over_their_class(sizes: list[int], count: int, seed: int) -> None:
    labels = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    labels = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))]
    chosen = spread(labels, count)
    for label, size in enumerate(sizes):
        ranks = chosen[labels == label].nonzero().flatten().tolist()
        assert len(ranks) == min(size, count)
        steps = {after - before for before, after in itertools.pairwise(ranks)}
        assert not steps or max(steps) - min(steps) <= 1


def test_an_even_spread_by_hand() -> None:
    assert spread(torch.tensor([0, 0, 1, 0, 0, 1, 0]), 2).tolist() == [False, False, True, True, False, True, True]
    assert spread(torch.tensor([2, 2, 2]), 1).tolist() == [False, False, True]
    assert spread(torch.zeros(0, dtype=torch.int64), 3).tolist() == []
