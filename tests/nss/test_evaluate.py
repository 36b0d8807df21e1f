"""Figures of hand-made answers, and of slices that nobody has told the category."""

from __future__ import annotations

import json
import math
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from nss.errors import ModelError, NssError
from nss.evaluate import Evaluation, confusion_of, count_parameters, evaluate, evaluate_slices, predict
from nss.slice import SemanticSlice, SemanticSlices

# Actual 0 0 0 1 1 2, answered 0 0 1 1 2 0.
LOGITS = [[3.0, 1, 0], [2, 0, 1], [0, 5, 1], [0, 1, 0], [0, 1, 2], [9, 0, 0]]
LABELS = torch.tensor([0, 0, 0, 1, 1, 2])


def test_accuracy_worst_class_and_confusion_of_hand_made_answers(networks: ModuleType) -> None:
    found = evaluate(networks.Answers(LOGITS), (networks.numbered(6), LABELS), classes=("a", "b", "c"), batch_size=4)
    assert found.confusion.tolist() == [[2, 1, 0], [0, 1, 1], [1, 0, 0]]
    assert found.images == 6
    assert found.accuracy == 3 / 6
    assert found.per_class == {"a": 2 / 3, "b": 1 / 2, "c": 0.0}
    assert (found.worst_class, found.worst_accuracy) == ("c", 0.0)


def test_the_dictionary_holds_everything_as_plain_json(networks: ModuleType) -> None:
    found = evaluate(networks.Answers(LOGITS), (networks.numbered(6), LABELS), classes=("a", "b", "c")).to_dict()
    assert json.loads(json.dumps(found)) == found
    assert found == {
        "images": 6,
        "accuracy": 0.5,
        "worst_class": "c",
        "worst_accuracy": 0.0,
        "per_class": {"a": 2 / 3, "b": 0.5, "c": 0.0},
        "confusion": [[2, 1, 0], [0, 1, 1], [1, 0, 0]],
    }


def test_a_class_without_images_is_neither_scored_nor_the_worst_and_the_first_of_equals_is(
    networks: ModuleType,
) -> None:
    data = networks.numbered(4), torch.tensor([0, 0, 2, 2])
    found = evaluate(networks.Answers([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [0, 1, 0]]), data, classes=("a", "b", "c"))
    assert found.per_class == {"a": 0.5, "c": 0.5}
    assert found.worst_class == "a"


def test_confusion_counts_pairs() -> None:
    generator = torch.Generator().manual_seed(0)
    answers, labels = (torch.randint(0, 4, (50,), generator=generator) for _ in range(2))
    expected = [[0] * 4 for _ in range(4)]
    for label, answer in zip(labels.tolist(), answers.tolist(), strict=True):
        expected[label][answer] += 1
    assert confusion_of(answers, labels, 4).tolist() == expected


def test_an_answer_that_is_not_finite_is_a_wrong_one_though_its_largest_logit_is_the_right_one(
    networks: ModuleType,
) -> None:
    nan, inf = math.nan, math.inf
    table = networks.Answers([[nan, 0, 0], [3.0, 0, 0], [0, inf, 0], [0, -inf, 1]])
    found = evaluate(table, (networks.numbered(4), torch.tensor([0, 0, 1, 2])), classes=("a", "b", "c"))
    # Of a, one is right; all others count as the class after their own.
    assert found.confusion.tolist() == [[1, 1, 0], [0, 0, 1], [1, 0, 0]]
    assert (found.images, found.accuracy) == (4, 1 / 4)
    assert found.per_class == {"a": 0.5, "b": 0.0, "c": 0.0}


def test_a_classifier_knows_its_classes_and_batches_make_no_difference(networks: ModuleType) -> None:
    model = networks.zoo_model("lenet").train()
    model.network.fc1.eval()
    modes = [module.training for module in model.modules()]
    data = networks.pictures(10), torch.arange(10) % 4
    found = evaluate(model, data, batch_size=3)
    assert found.classes == networks.CLASSES
    assert torch.equal(found.confusion, evaluate(model, data).confusion)
    assert [module.training for module in model.modules()] == modes


def test_predictions_come_in_the_order_of_the_images_without_gradients(networks: ModuleType) -> None:
    logits, labels = predict(networks.Answers(LOGITS), (networks.numbered(6), LABELS), 4)
    assert logits.tolist() == LOGITS
    assert torch.equal(labels, LABELS)
    assert not logits.requires_grad


@pytest.mark.parametrize(
    ("labels", "classes", "message"),
    [
        ([0, 1, 3], ("a", "b", "c"), "labels up to 3"),
        ([0, 1, 2], ("a", "b", "c", "d"), "3 logits do not fit 4 classes"),
        ([0, 1, 1], ("a", "b"), "3 logits do not fit 2 classes"),
        ([0, 1, -1], ("a", "b", "c"), "-1"),
    ],
)
def test_labels_and_logits_that_do_not_fit_the_classes_are_refused(
    networks: ModuleType, labels: list[int], classes: tuple[str, ...], message: str
) -> None:
    model = networks.Answers([[0.0, 0, 1], [0, 1, 0], [0, 0, 1]])
    with pytest.raises(ModelError, match=message):
        evaluate(model, (networks.numbered(3), torch.tensor(labels)), classes=classes)


def test_no_images_and_no_names_are_refused(networks: ModuleType) -> None:
    model = networks.Answers(LOGITS)
    with pytest.raises(ModelError, match="no images to evaluate on"):
        evaluate(model, (networks.numbered(0), LABELS[:0]), classes=("a", "b", "c"))
    with pytest.raises(ModelError, match="Answers does not say which classes it knows"):
        evaluate(model, (networks.numbered(6), LABELS))


def test_parameters_are_counted_frozen_or_not_without_buffers() -> None:
    network = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    network[0].requires_grad_(False)
    assert count_parameters(network) == 3 * 4 + 4 + 4 + 4


def slices_of(*groups: tuple[int, ...]) -> SemanticSlices:
    names = ("a", "b", "c", "d")[: sum(map(len, groups))]
    slices = tuple(
        SemanticSlice(f"slice-{i}", tuple(names[k] for k in group), group, {}) for i, group in enumerate(groups)
    )
    return SemanticSlices(names, slices, np.zeros((len(names),) * 2), np.zeros((len(names) - 1, 4)))


def logits_for(answers: list[int], sure: list[float], classes: int) -> list[list[float]]:
    """Logits whose softmax gives `sure` to the answer and the rest evenly; a shift of a row is no matter."""
    rows = []
    for answer, share in zip(answers, sure, strict=True):
        row = [math.log((1 - share) / (classes - 1))] * classes
        row[answer] = math.log(share)
        rows.append([each + 5 * answer for each in row])
    return rows


def test_the_figures_of_two_hand_made_slices(networks: ModuleType) -> None:
    # Images of a a b b c c. Slice 0 is for a and b, slice 1 for c.
    labels = torch.tensor([0, 0, 1, 1, 2, 2])
    first = networks.Answers(logits_for([0, 1, 1, 2, 2, 0], [0.9, 0.8, 0.7, 0.6, 0.9, 0.5], 3))
    second = networks.Answers(logits_for([0, 2, 0, 2, 2, 1], [0.8, 0.6, 0.9, 0.7, 0.8, 0.9], 3))
    found = evaluate_slices(slices_of((0, 1), (2,)), [first, second], (networks.numbered(6), labels), batch_size=4)
    one, two = found.slices
    # Slice 0 on a a b b answers a b b c: two right, three within it; on c c it answers c a: one false positive.
    assert (one.recall, one.recognised, one.false_positive_rate) == (2 / 4, 3 / 4, 1 / 2)
    assert one.balanced_accuracy == pytest.approx((3 / 4 + 1 / 2) / 2)
    # Slice 1 on c c answers c b: one right; on a a b b it answers a c a c: two false positives.
    assert (two.recall, two.recognised, two.false_positive_rate) == (1 / 2, 1 / 2, 2 / 4)
    assert two.balanced_accuracy == pytest.approx(1 / 2)
    assert found.told_accuracy == 3 / 6
    # Vote, a and b by slice 0, c by slice 1:
    #   a: .9 .05 .1 -> a;  a: .1 .8 .6 -> b;   b: .15 .7 .05 -> b;
    #   b: .2 .2 .7 -> c;   c: .05 .05 .8 -> c; c: .5 .25 .05 -> a
    assert found.vote_accuracy == 3 / 6
    assert (one.name, one.categories, one.parameters) == ("slice-0", ("a", "b"), 18)


def test_the_vote_and_being_told_are_two_numbers(networks: ModuleType) -> None:
    # Each slice answers its own category whatever it sees, the first one more surely: told all, voting half.
    labels = torch.tensor([0, 0, 1, 1])
    first = networks.Answers(logits_for([0] * 4, [0.9] * 4, 2))
    second = networks.Answers(logits_for([1] * 4, [0.8] * 4, 2))
    found = evaluate_slices(slices_of((0,), (1,)), [first, second], (networks.numbered(4), labels))
    assert found.told_accuracy == 1.0
    assert found.vote_accuracy == 0.5


def test_a_slice_that_answers_its_category_for_everything_recalls_all_and_means_nothing(networks: ModuleType) -> None:
    labels = torch.tensor([0, 1, 2, 2])
    blind = networks.Answers(logits_for([1] * 4, [0.9] * 4, 3))
    honest = networks.Answers(logits_for([0, 1, 2, 2], [0.95] * 4, 3))
    found = evaluate_slices(slices_of((1,), (0, 2)), [blind, honest], (networks.numbered(4), labels)).slices[0]
    assert (found.recall, found.recognised, found.false_positive_rate) == (1.0, 1.0, 1.0)
    assert found.balanced_accuracy == 0.5


def test_one_slice_of_everything_has_no_false_positives_and_votes_as_it_is_told(networks: ModuleType) -> None:
    labels = torch.tensor([0, 1, 1])
    model = networks.Answers(logits_for([0, 1, 0], [0.9] * 3, 2))
    found = evaluate_slices(slices_of((0, 1)), [model], (networks.numbered(3), labels))
    assert found.slices[0].false_positive_rate == 0.0
    assert found.vote_accuracy == found.told_accuracy == pytest.approx(2 / 3)


def test_what_is_not_finite_is_wrong_in_a_slice_and_in_the_vote(networks: ModuleType) -> None:
    # Images of a c c c; of slice 0, for a and b, the first and the last answer are broken, of slice 1 the middle two.
    nan, inf, labels = math.nan, math.inf, torch.tensor([0, 2, 2, 2, 2])
    first = networks.Answers([[nan, 0, 0], [0, 0, 1.0], [0, 0, 1], [0, 0, 1], [nan, nan, nan]])
    second = networks.Answers([[0, 0, 0.1], [0, 0, inf], [0, -inf, 9], [0, 0, 9], [0, 0, 9]])
    found = evaluate_slices(slices_of((0, 1), (2,)), [first, second], (networks.numbered(5), labels))
    one, two = found.slices
    assert (one.recall, one.recognised, one.false_positive_rate) == (0.0, 0.0, 0.0)
    assert (two.recall, two.recognised, two.false_positive_rate) == (2 / 4, 2 / 4, 1.0)
    assert found.told_accuracy == 2 / 5
    assert found.vote_accuracy == 1 / 5


def test_images_in_another_order_for_each_slice_are_refused(networks: ModuleType) -> None:
    labels = torch.arange(8) % 2
    models = [networks.Answers(logits_for([0, 1] * 4, [0.9] * 8, 2))] * 2
    data = TensorDataset(networks.numbered(8), labels)
    assert evaluate_slices(slices_of((0,), (1,)), models, DataLoader(data, batch_size=4)).vote_accuracy == 1.0
    shuffled = DataLoader(data, batch_size=4, shuffle=True, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ModelError, match="in another order each time they are read") as caught:
        evaluate_slices(slices_of((0,), (1,)), models, shuffled)
    assert (caught.value.where, caught.value.fix) == ("data", "do not shuffle them")


def test_the_slices_dictionary_is_plain_json(networks: ModuleType) -> None:
    labels = torch.tensor([0, 1])
    model = networks.Answers(logits_for([0, 1], [0.9] * 2, 2))
    found = evaluate_slices(slices_of((0,), (1,)), [model, model], (networks.numbered(2), labels)).to_dict()
    assert json.loads(json.dumps(found))["slices"][1] == {
        "name": "slice-1",
        "categories": ["b"],
        "recall": 1.0,
        "recognised": 1.0,
        "false_positive_rate": 0.0,
        "balanced_accuracy": 1.0,
        "parameters": 4,
    }
    assert (found["vote_accuracy"], found["told_accuracy"]) == (1.0, 1.0)


def test_slices_without_images_or_with_another_number_of_models_are_refused(networks: ModuleType) -> None:
    model = networks.Answers([[1.0, 0], [0, 1]])
    data = networks.numbered(2), torch.tensor([0, 1])
    with pytest.raises(ModelError, match="no images"):
        evaluate_slices(slices_of((0, 1)), [model], (networks.numbered(0), data[1][:0]))
    with pytest.raises(NssError):
        evaluate_slices(slices_of((0,), (1,)), [model], data)


def test_an_evaluation_is_made_of_its_confusion_alone() -> None:
    found = Evaluation(("a", "b"), torch.tensor([[3, 1], [0, 0]]))
    assert (found.images, found.accuracy, found.per_class, found.worst_class) == (4, 0.75, {"a": 0.75}, "a")
