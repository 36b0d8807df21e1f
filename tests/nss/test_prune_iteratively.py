"""Pruning weights step by step: a fifth of what remains, until the accuracy falls."""

from __future__ import annotations

from itertools import pairwise
from types import ModuleType

import pytest
import torch
from hypothesis import strategies as st
from tiny_helpers import kept, network_of_shapes
from torch import Tensor, nn

from nss.errors import PruneError
from nss.finetune import fine_tune
from nss.model import Classifier, build_model, model_digest
from nss.prune_weights import prune_weights, prune_weights_iteratively
from nss.size import count_parameters
from nss.weight_masks import count_masked, count_prunable

METHODS = ("lamp", "global", "uniform+", "erk")
shapes = st.lists(
    st.one_of(
        st.tuples(st.integers(1, 6), st.integers(1, 6)),
        st.tuples(st.integers(1, 5), st.integers(1, 5), st.integers(1, 3), st.integers(1, 3)),
    ),
    min_size=1,
    max_size=5,
)


def small_lenet() -> Classifier:
    return build_model("nss.zoo:lenet", ("ant", "bee"), (1, 8, 8), 0).eval()


def diagonal() -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    """Class k is pixel k. Off the diagonal nothing matters; of the diagonal the smallest belongs to the last class."""
    network = nn.Sequential(nn.Flatten(), nn.Linear(3, 3, bias=False))
    with torch.no_grad():
        network[1].weight.copy_(torch.tensor([[3.0, -0.1, -0.2], [-0.3, 2.0, -0.4], [-0.5, -0.6, 1.0]]))
    return network, (torch.eye(3).view(3, 1, 1, 3), torch.arange(3))


def test_each_step_takes_a_fifth_of_what_remains_until_the_accuracy_drops() -> None:
    network, data = diagonal()
    found = prune_weights_iteratively(network, data, "global", retrain_steps=0, held_out=data)
    assert [row.remaining for row in found.curve] == [7, 6, 5, 4, 3, 2]
    assert [row.within for row in found.curve] == [True] * 5 + [False]
    assert [row.accuracy for row in found.curve] == pytest.approx([1.0] * 5 + [2 / 3])
    assert [row.iteration for row in found.curve] == [1, 2, 3, 4, 5, 6]
    assert found.curve[4].masked == pytest.approx(6 / 9)
    assert (found.iterations, found.accuracy, found.cr_masked, found.cr_removed) == (5, 1.0, 3.0, 1.0)
    assert found.reference == 1.0
    assert torch.equal(found.model[1].weight, torch.diag(torch.tensor([3.0, 2.0, 1.0])))


def test_a_drop_of_just_the_tolerance_is_within_and_a_step_of_nothing_is_no_iteration() -> None:
    network, data = diagonal()
    found = prune_weights_iteratively(network, data, "global", tolerance=1 / 3, retrain_steps=0, held_out=data)
    assert (found.iterations, len(found.curve), found.cr_masked) == (6, 6, 4.5)
    assert found.accuracy == pytest.approx(2 / 3)


def test_the_drop_is_counted_from_the_reference() -> None:
    network, data = diagonal()
    found = prune_weights_iteratively(network, data, retrain_steps=0, held_out=data, reference=1.02)
    assert (found.iterations, len(found.curve), found.cr_masked, found.accuracy) == (0, 1, 1.0, 1.0)
    assert found.model is not network
    assert model_digest(found.model) == model_digest(network)


def test_a_hundred_weights_become_80_then_64_then_51() -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(50, 2))
    data = torch.randn(4, 1, 5, 10, generator=torch.Generator().manual_seed(0)), torch.arange(4) % 2
    for method in METHODS:
        found = prune_weights_iteratively(
            network, data, method, tolerance=1, retrain_steps=0, held_out=data, max_iterations=3
        )
        assert [row.remaining for row in found.curve] == [80, 64, 51]
        assert found.cr_masked == 100 / 51


def test_a_scheme_that_meets_its_bounds_takes_what_is_left_and_ends() -> None:
    network = nn.Sequential(nn.Conv2d(1, 4, 5), nn.Flatten(), nn.Linear(4, 25))
    data = torch.zeros(2, 1, 5, 5), torch.zeros(2, dtype=torch.int64)
    found = prune_weights_iteratively(network, data, "uniform+", tolerance=1, retrain_steps=0, held_out=data)
    assert [row.remaining for row in found.curve] == [160, 128, 120]


def test_two_weights_are_too_few_for_a_step() -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(1, 2))
    data = torch.ones(2, 1, 1, 1), torch.arange(2)
    found = prune_weights_iteratively(network, data, held_out=data)
    assert (found.iterations, found.curve, found.cr_masked) == (0, (), 1.0)
    assert found.model is not network
    assert model_digest(found.model) == model_digest(network)


def test_training_what_came_of_no_iteration_leaves_the_original_alone(networks: ModuleType) -> None:
    model, data = small_lenet(), networks.coloured_data()
    before = model_digest(model)
    found = prune_weights_iteratively(model, data, retrain_steps=0, reference=2.0)
    assert (found.iterations, model_digest(found.model)) == (0, before)
    assert isinstance(found.model, Classifier)
    assert found.model.spec == model.spec
    fine_tune(found.model, data, 1, 0, batch_size=8)
    assert model_digest(found.model) != before == model_digest(model)


def test_every_iteration_trains_within_its_budget_and_masks_hold(networks: ModuleType) -> None:
    data, model = networks.coloured_data(60), small_lenet()
    found = prune_weights_iteratively(
        model, data, "lamp", tolerance=1, retrain_steps=3, seed=5, max_iterations=2, batch_size=8, learning_rate=0.01
    )
    total = count_prunable(model)
    remaining = total - round(0.2 * total)
    expected = prune_weights(model, "lamp", 1 - remaining / total)
    fine_tune(expected, data, 3, 6, batch_size=8, learning_rate=0.01)
    expected = prune_weights(expected, "lamp", 1 - (remaining - round(0.2 * remaining)) / total)
    fine_tune(expected, data, 3, 7, batch_size=8, learning_rate=0.01)
    assert model_digest(found.model) == model_digest(expected)
    assert count_masked(found.model) == total - found.curve[-1].remaining
    assert isinstance(found.model, Classifier)
    assert found.model.spec.parent == model_digest(model)
    assert found.to_dict()["curve"][1]["iteration"] == 2
    assert "model" not in found.to_dict()


def test_equal_arguments_give_equal_weights_and_another_seed_does_not(networks: ModuleType) -> None:
    data = networks.coloured_data(60)

    def run(seed: int) -> str:
        found = prune_weights_iteratively(
            small_lenet(), data, tolerance=1, retrain_steps=2, seed=seed, max_iterations=1, batch_size=8
        )
        return model_digest(found.model)

    assert run(1) == run(1) != run(2)


def test_both_compression_rates_have_names(networks: ModuleType) -> None:
    network, data = diagonal()
    found = prune_weights_iteratively(network, data, retrain_steps=0, held_out=data, original_parameters=36)
    assert found.cr_removed == 36 / count_parameters(network) == 4.0
    assert found.cr_masked == 3.0


def test_the_val_split_judges_and_without_held_out_images_it_is_refused(networks: ModuleType) -> None:
    data, model = networks.coloured_data(60), small_lenet()
    val = data.split("val")
    given = [
        prune_weights_iteratively(model, data, retrain_steps=0, max_iterations=4, tolerance=1, held_out=held_out)
        for held_out in (None, (val.images, val.labels), (val.images, torch.zeros(len(val), dtype=torch.int64)))
    ]
    assert given[0].curve == given[1].curve != given[2].curve
    with pytest.raises(PruneError, match="no held-out images"):
        prune_weights_iteratively(model, (val.images, val.labels))


@pytest.mark.parametrize(
    "wrong", [{"step": 0.0}, {"step": 1.0}, {"tolerance": -0.1}, {"retrain_steps": -1}, {"max_iterations": 0}]
)
def test_settings_out_of_range_are_refused(wrong: dict[str, float]) -> None:
    network, data = diagonal()
    with pytest.raises(PruneError, match=next(iter(wrong))) as caught:
        prune_weights_iteratively(network, data, held_out=data, **wrong)
    assert caught.value.allowed.startswith(next(iter(wrong)))


def test_within_one_run_no_weight_comes_back() -> None:
    network = network_of_shapes([(6, 8), (10, 6), (3, 10)], 1)
    for method in METHODS:
        pruned = [network]
        for sparsity in (0.2, 0.36, 0.488):
            pruned.append(prune_weights(pruned[-1], method, sparsity))
        for before, after in pairwise(pruned):
            assert all(
                old or not new
                for row, later in zip(kept(before), kept(after), strict=True)
                for old, new in zip(row, later, strict=True)
            )
