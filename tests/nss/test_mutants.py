"""Mutants: as few random weights as bring the accuracy down by what was asked, the same every time."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch

from nss.base import train
from nss.data import Batch, Dataset
from nss.errors import ModelError
from nss.evaluate import evaluate
from nss.model import Classifier, build_model, model_digest
from nss.mutants import mutate
from nss.prune_weights import prune_weights


@pytest.fixture(scope="module")
def data(networks: ModuleType) -> Dataset:
    """Noisy enough that the images of a class are not all answered wrong at once."""
    clear = networks.coloured_data(600, classes=4)
    noise = networks.pictures(600, clear.image_shape, seed=7)
    images = (clear.images // 3 + noise // 3 * 2).clamp(max=255)
    batch = Batch("0" * 32, images, clear.labels, clear.batches[0].split)
    return Dataset(clear.classes, clear.image_shape, (batch,))


@pytest.fixture(scope="module")
def trained(data: Dataset) -> Classifier:
    model = build_model("nss.zoo:lenet", data.classes, data.image_shape, 0)
    train(model, data, 12, 0, batch_size=16)
    return model


def replaced(model: Classifier, mutant: torch.nn.Module) -> dict[str, torch.Tensor]:
    others = mutant.state_dict()
    return {name: others[name] != tensor for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("drop", [0.1, 0.3, 0.5])
def test_training_accuracy_falls_by_the_drop_and_not_much_more(data: Dataset, trained: Classifier, drop: float) -> None:
    digest = model_digest(trained)
    mutant = mutate(trained, data, drop, seed=1)
    before, after = (evaluate(model, data.split("train")).accuracy for model in (trained, mutant))
    assert before - drop - 0.08 < after <= before - drop
    assert model_digest(trained) == digest
    assert type(mutant) is Classifier


def test_only_weights_of_layers_are_replaced_and_a_larger_drop_replaces_the_same_and_more(
    data: Dataset, trained: Classifier
) -> None:
    little, much = (mutate(trained, data, drop, seed=1) for drop in (0.1, 0.5))
    few, many = replaced(trained, little), replaced(trained, much)
    for name, flags in few.items():
        assert not bool((flags & ~many[name]).any())
        assert name.endswith("weight") or not bool(many[name].any())
        assert torch.equal(little.state_dict()[name][flags], much.state_dict()[name][flags])
    assert 0 < sum(int(flags.sum()) for flags in few.values()) < sum(int(flags.sum()) for flags in many.values())


def test_random_weights_have_the_mean_and_spread_of_their_layer(networks: ModuleType) -> None:
    model = networks.zoo_model("lenet")
    with torch.no_grad():
        model.network.fc1.weight.mul_(0.1).add_(0.5)
    images = networks.pictures(400)
    labels = model(images).argmax(1).detach()
    mutant = mutate(model, (images, labels), 0.4, seed=0)
    changed = replaced(model, mutant)["network.fc1.weight"]
    values, own = mutant.network.fc1.weight.detach()[changed], model.network.fc1.weight
    assert int(changed.sum()) > 500
    assert float(values.mean()) == pytest.approx(float(own.detach().mean()), abs=0.01)
    assert float(values.std()) == pytest.approx(float(own.detach().std()), rel=0.1)


def test_the_seed_decides_the_mutant(data: Dataset, trained: Classifier) -> None:
    digests = [model_digest(mutate(trained, data, 0.3, seed)) for seed in (1, 1, 2)]
    assert digests[0] == digests[1] != digests[2]


def test_a_drop_that_cannot_be_reached_is_refused(networks: ModuleType, data: Dataset, trained: Classifier) -> None:
    for drop in (0.0, 1.0, -0.1):
        with pytest.raises(ModelError, match="above 0 and below 1"):
            mutate(trained, data, drop, 0)
    with pytest.raises(ModelError, match="smaller drop"):
        mutate(networks.zoo_model("lenet"), (networks.pictures(40), torch.arange(40) % 4), 0.9, 0)
    with pytest.raises(ModelError, match="masked"):
        mutate(prune_weights(trained, sparsity=0.5), data, 0.3, 0)
