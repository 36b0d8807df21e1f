"""Holding out and drawing samples, class by class."""

from __future__ import annotations

from types import ModuleType

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nss.samples import FEWEST, drawn, parts, whole

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
