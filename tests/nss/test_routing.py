"""Telling tasks apart: statistics as the formulas say, gates that shift new logits only, bits that stay."""

from __future__ import annotations

from statistics import NormalDist
from types import ModuleType

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from sklearn.covariance import OAS
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from torch import Tensor, nn

from nss import routing
from nss.routing import BLEND, PLAIN, Router, choose_views, evidence, fit_blend, fit_mix


def blobs(count: int, classes: int, features: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Gaussian classes of one covariance that is not round."""
    generator = torch.Generator().manual_seed(seed)
    centres = 2 * torch.randn(classes, features, generator=torch.Generator().manual_seed(9))
    shape = torch.randn(features, features, generator=torch.Generator().manual_seed(8))
    labels = torch.arange(count) % classes
    return centres[labels] + torch.randn(count, features, generator=generator) @ shape, labels


def router_of(classes: tuple[int, ...], features: int, seed: int = 0) -> Router:
    torch.manual_seed(seed)
    router = Router({}, features, classes)
    for gate in router.gates:
        gate.reset_parameters()  # type: ignore[operator]
    return router


def whole_scatter(router: Router) -> Tensor:
    square = torch.zeros(router.features, router.features)
    rows, columns = torch.triu_indices(router.features, router.features)
    square[rows, columns] = router.scatter
    return square + square.triu(1).T


def test_the_statistics_are_those_of_all_images_whatever_the_batches() -> None:
    features, labels = blobs(60, 3, 5)
    router = router_of((2, 1), 5)
    router.learn((features[rows], labels[rows]) for rows in torch.arange(60).split(7))
    means = torch.stack([features[labels == label].mean(0) for label in range(3)])
    centred = features - means[labels]
    assert router.counts.tolist() == [20, 20, 20]
    assert torch.allclose(router.means, means, atol=1e-5)
    assert torch.allclose(whole_scatter(router), centred.T @ centred, rtol=1e-4, atol=1e-3)


def test_classes_learned_later_leave_the_means_of_the_earlier_ones_as_they_are() -> None:
    features, labels = blobs(60, 3, 5)
    router, at_once = router_of((2, 1), 5), router_of((2, 1), 5)
    router.learn([(features[labels < 2], labels[labels < 2])])
    before = router.means[:2].clone()
    router.learn([(features[labels == 2], labels[labels == 2])])
    at_once.learn([(features, labels)])
    assert torch.equal(router.means[:2], before)
    assert torch.allclose(router.scatter, at_once.scatter, rtol=1e-4, atol=1e-3)


def test_the_scores_are_those_of_linear_discriminant_analysis() -> None:
    features, labels = blobs(300, 4, 6)
    router = router_of((2, 2), 6)
    router.learn([(features, labels)])
    weight, bias = router.scores(0.0)
    ours = (features.double() @ weight.T + bias).log_softmax(1)
    model = LinearDiscriminantAnalysis(solver="lsqr", priors=[0.25] * 4).fit(features.double().numpy(), labels.numpy())
    assert np.allclose(ours.numpy(), model.predict_log_proba(features.double().numpy()), atol=1e-3)


def test_shrinkage_one_is_the_nearest_mean() -> None:
    features, labels = blobs(90, 3, 4)
    router = router_of((2, 1), 4)
    router.learn([(features, labels)])
    weight, bias = router.scores(1.0)
    nearest = torch.cdist(features, router.means).argmin(1)
    assert torch.equal((features.double() @ weight.T + bias).argmax(1), nearest)


def test_a_class_of_one_image_has_that_image_for_a_mean() -> None:
    features, labels = blobs(21, 2, 4)
    labels[-1] = 2
    router = router_of((2, 1), 4)
    router.learn([(features, labels)])
    assert torch.allclose(router.means[2], features[-1])
    weight, bias = router.scores(0.01)
    assert bool(torch.isfinite(weight).all())
    assert bool(torch.isfinite(bias).all())


def logits_of(*classes: int, count: int = 6) -> list[Tensor]:
    return [torch.randn(count, each, generator=torch.Generator().manual_seed(each)) for each in classes]


def test_the_first_logits_are_handed_on_and_later_gates_leave_the_earlier_ones() -> None:
    logits, features = logits_of(2, 3, 1), torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    three, two = router_of((2, 3, 1), 4), router_of((2, 3), 4, seed=1)
    two.gates[0].load_state_dict(three.gates[0].state_dict())
    with torch.no_grad():
        assert torch.equal(three(logits, features)[:, :2], logits[0])
        assert torch.equal(three(logits, features)[:, :5], two(logits[:2], features))


def test_the_probability_of_the_new_classes_is_what_the_gate_says_and_told_answers_are_blended() -> None:
    logits, features = logits_of(2, 3), torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    router = router_of((2, 3), 4)
    router.blends[0] = torch.tensor([0.5, 2.0])
    with torch.no_grad():
        answers, scores = router(logits, features), router.gates[0](features)
    likelihood = scores.exp()
    odds = likelihood[:, 2:].sum(1) / likelihood[:, :2].sum(1)
    assert torch.allclose(answers.softmax(1)[:, 2:].sum(1), odds / (1 + odds), atol=1e-5)
    weighed = logits[1].softmax(1).sqrt() * likelihood[:, 2:].square()
    assert torch.allclose(answers[:, 2:].softmax(1), weighed / weighed.sum(1, keepdim=True), atol=1e-5)


def test_taking_over_keeps_what_was_learned() -> None:
    features, labels = blobs(40, 2, 4)
    earlier, later = router_of((1, 1), 4), router_of((1, 1, 2), 4, seed=1)
    earlier.learn([(features, labels)])
    earlier.mixes[0] = torch.tensor([0.5, 0.1, -0.1, 2.0])
    earlier.blends[0] = torch.tensor([0.5, 0.25])
    later.take_over(earlier)
    assert torch.equal(later.gates[0].weight, earlier.gates[0].weight)
    assert later.mixes.tolist() == [earlier.mixes[0].tolist(), list(PLAIN)]
    torch.testing.assert_close(later.blends, torch.tensor([[0.5, 0.25], BLEND]), rtol=0, atol=0)
    assert later.counts.tolist() == [20, 20, 0, 0]
    assert torch.equal(later.scatter, earlier.scatter)
    assert torch.equal(later.means[:2], earlier.means)


def test_the_gate_opens_to_the_side_an_image_is_of() -> None:
    features, labels = blobs(400, 4, 6)
    router = router_of((2, 2), 6)
    router.learn([(features, labels)])
    held_out, truth = blobs(200, 4, 6, seed=1)
    router.open_gate(held_out, truth)
    with torch.no_grad():
        odds = evidence(router.gates[-1](held_out), torch.zeros(200, 2), torch.zeros(200, 2))[:, 0]
    assert float(((odds > 0) == (truth >= 2)).double().mean()) > 0.9


def few_of_many_features() -> tuple[Router, Tensor]:
    """A router that has seen 30 images of 40 features, and 200 others."""
    router = router_of((2, 2), 40)
    router.learn([blobs(30, 4, 40)])
    return router, blobs(200, 4, 40, seed=1)[0]


@pytest.mark.parametrize("best", routing.SHRINKAGES)
def test_the_shrinkage_is_the_one_that_answers_the_held_out_images_best(best: float) -> None:
    router, held_out = few_of_many_features()
    answers = {
        each: (held_out.double() @ weight.T + bias).argmax(1)
        for each in (router.shrinkage(), *routing.SHRINKAGES)
        for weight, bias in [router.scores(each)]
    }
    # Images that this one alone answers so.
    differ = [answers[best] != other for each, other in answers.items() if each != best]
    assert all(bool(each.any()) for each in differ)
    assert router.open_gate(held_out, answers[best]) == best


def test_what_held_out_images_cannot_tell_is_left_to_the_number_of_images() -> None:
    router, held_out = few_of_many_features()
    weight, bias = router.scores(router.shrinkage())
    answers = (held_out.double() @ weight.T + bias).argmax(1)
    agreed = torch.stack(
        [(held_out.double() @ w.T + b).argmax(1) == answers for w, b in map(router.scores, routing.SHRINKAGES)]
    ).all(0)
    assert {0, 1} & set(answers[agreed].tolist())
    assert {2, 3} & set(answers[agreed].tolist())
    assert router.open_gate(held_out[agreed], answers[agreed]) == router.shrinkage()
    assert router.shrinkage() not in routing.SHRINKAGES


@pytest.mark.parametrize(("count", "features"), [(40, 6), (400, 6), (30, 40)])
def test_without_old_images_the_shrinkage_suits_their_number(count: int, features: int) -> None:
    seen, labels = blobs(count, 4, features)
    router = router_of((2, 2), features)
    router.learn([(seen, labels)])
    centred = (seen.double() - router.means.double()[labels]).numpy()
    expected = OAS(assume_centered=True).fit(centred).shrinkage_
    held_out, truth = blobs(80, 4, features, seed=1)
    new = truth >= 2
    for features_, labels_ in ((held_out[new], truth[new]), (held_out[:0], truth[:0])):
        assert router.open_gate(features_, labels_) == pytest.approx(expected, rel=1e-3)
    weight = router.scores(expected)[0]
    assert torch.allclose(router.gates[-1].weight, (weight - weight.mean(0)).float(), rtol=1e-2, atol=1e-3)


def test_evidence_is_odds_and_levels() -> None:
    scores = torch.tensor([[0.0, 1.0, 3.0]])
    found = evidence(scores, torch.tensor([[2.0, 2.0]]), torch.tensor([[5.0]]))
    expected = [3 - np.log(1 + np.e), 2 + np.log(2), 5.0]
    assert found[0].tolist() == pytest.approx(expected, abs=1e-5)


def test_weights_follow_the_evidence_that_says_something() -> None:
    generator = torch.Generator().manual_seed(0)
    new = torch.arange(2000) % 2 == 0
    side = new.double() * 2 - 1
    noise = torch.randn(2000, 3, generator=generator, dtype=torch.float64)
    seen = torch.stack([3 * noise[:, 0], -side + noise[:, 1], noise[:, 2]], 1)  # only the second column says anything
    mix = fit_mix(seen, new)
    accuracy = (((seen @ mix[:3].double() + mix[3]) > 0) == new).double().mean()
    assert float(accuracy) > 0.83
    assert mix[1] < -1


def overconfident(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Odds of features a hundred times too large, a level that says as much on its own, and one that says nothing."""
    generator = torch.Generator().manual_seed(seed)
    new = torch.arange(count) % 2 == 0
    side = new.double() * 2 - 1
    noise = torch.randn(count, 3, generator=generator, dtype=torch.float64)
    return torch.stack([200 * (side + noise[:, 0]), noise[:, 1], 10 + side + noise[:, 2]], 1), new


def is_new(seen: Tensor, mix: Tensor) -> Tensor:
    return seen @ mix[:3].double() + mix[3].double() > 0


def test_with_many_images_odds_and_levels_count_for_what_they_are_worth() -> None:
    mix = fit_mix(*overconfident(600, 0))
    seen, new = overconfident(20_000, 1)
    # Two independent unit Gaussians about -1 and 1: Phi(sqrt(2)) are told apart, Phi(1) by one of them.
    assert float((is_new(seen, mix) == new).double().mean()) == pytest.approx(NormalDist().cdf(2**0.5), abs=0.01)
    assert float((is_new(seen, torch.tensor(PLAIN)) == new).double().mean()) == pytest.approx(
        NormalDist().cdf(1), abs=0.01
    )


@pytest.mark.parametrize("count", [2, 6, 10])
def test_with_few_images_the_odds_decide_as_without(count: int) -> None:
    mix = fit_mix(*overconfident(count, 2))
    seen, _ = overconfident(5000, 3)
    assert float((is_new(seen, mix) == is_new(seen, torch.tensor(PLAIN))).double().mean()) > 0.98


def test_odds_are_never_turned_round() -> None:
    seen, new = torch.tensor([[5.0, 1, 1], [90.0, 1, 1]]), torch.tensor([True, False])
    assert fit_mix(seen, new)[0] > 0
    assert fit_mix(seen * torch.tensor([1.0, 0, 0]), new).isfinite().all()


def two_views(count: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Log likelihoods of two classes by two independent unit Gaussians about -1 and 1, too large: 4 and 10 times."""
    labels = torch.arange(count) % 2
    noise = torch.randn(count, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    odds = 2 * (2.0 * labels[:, None] - 1 + noise)
    own, scores = (size / 2 * torch.stack([-odds[:, view], odds[:, view]], 1) for view, size in enumerate((4, 10)))
    return own, scores, labels


def test_a_blend_is_the_most_likely_one_before_and_after_the_images() -> None:
    own, scores, labels = two_views(60, 0)
    start = np.array([1.0, 0.2 * 30 / (30 + 10)])

    def unlikely(logs: np.ndarray) -> float:
        first, second = start * np.exp(logs)
        sums = (first * own + second * scores).numpy()
        right = sums[np.arange(60), labels.numpy()]
        return float(np.sum(np.log(np.exp(sums).sum(1)) - right) + np.sum(logs**2) / 2)

    expected = start * np.exp(minimize(unlikely, np.zeros(2), tol=1e-10).x)
    assert fit_blend(own, scores, labels, 30).tolist() == pytest.approx(expected.tolist(), rel=1e-3)


def test_with_many_images_each_view_weighs_what_it_is_worth() -> None:
    assert fit_blend(*two_views(20_000, 1), 10_000).tolist() == pytest.approx([1 / 4, 1 / 10], rel=0.1)


@pytest.mark.parametrize("count", [0, 1, 3])
@pytest.mark.parametrize(("learned", "weight"), [(1, 0.2 / 11), (10, 0.1), (990, 0.198)])
def test_with_few_images_a_blend_is_about_what_it_is_with_none(count: int, learned: int, weight: float) -> None:
    logs = (fit_blend(*two_views(count, 2), learned) / torch.tensor([1.0, weight])).log()
    assert float(logs.abs().max()) < 0.15 * count + 1e-6


def test_a_blend_of_a_single_class_is_what_it_is_without_images() -> None:
    found = fit_blend(torch.ones(5, 1), torch.ones(5, 1), torch.zeros(5).long(), 10)
    assert found.tolist() == pytest.approx([1.0, 0.1])


@given(st.lists(st.tuples(st.integers(1, 600), st.integers(1, 40)), max_size=5), st.integers(-10, 3000))
@settings(deadline=None, max_examples=60)
def test_grids_fit_into_the_room_and_leave_none_that_a_finer_one_would_fit(
    sizes: list[tuple[int, int]], room: int
) -> None:
    maps = {str(place): [1, channels, side, side] for place, (channels, side) in enumerate(sizes)}
    grids = routing._grids(maps, room)
    used = sum(maps[name][1] * grid**2 for name, grid in grids.items())
    assert used <= max(0, room)
    for name, (_, channels, side, _) in maps.items():
        grid = grids.get(name, 0)
        assert grid <= min(4, side)
        assert grid == min(4, side) or used + channels * ((grid + 1) ** 2 - grid**2) > room


def test_views_are_maps_before_they_shrink_and_what_enters_the_head(networks: ModuleType) -> None:
    model = networks.zoo_model("vgg_small")
    views, count = choose_views(model.network, (1, 16, 16))
    assert list(views) == ["features_5", "features_12", "features_19", "relu"]
    assert views["relu"] == 0
    maps = {"features_5": 32, "features_12": 64, "features_19": 128}
    assert count == 256 + sum(channels * views[name] ** 2 for name, channels in maps.items())
    assert routing.FEATURES * 0.6 < count <= routing.FEATURES


def test_choosing_views_moves_nothing(networks: ModuleType) -> None:
    model = networks.zoo_model("resnet20").train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    choose_views(model.network, (1, 16, 16))
    assert all(module.training for module in model.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_view_averages_maps_and_leaves_vectors() -> None:
    router = Router({"map": 1, "vector": 0}, 5, [2])
    assert router.view("map", torch.tensor([[[[1.0, 3.0], [5.0, 7.0]]]])).tolist() == [[4.0]]
    assert router.view("vector", torch.tensor([[1.0, 2.0]])).tolist() == [[1.0, 2.0]]
    assert isinstance(router, nn.Module)
