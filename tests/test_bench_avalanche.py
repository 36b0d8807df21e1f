"""RQ4's EWC and LwF agree with those of Avalanche: an optional check, for it brings much that nothing else here needs.

`pip install avalanche-lib`, then `pytest tests/test_bench_avalanche.py`.
"""

from __future__ import annotations

import importlib.util
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from bench.extend_peers import EWC, LWF, TEMPERATURE, Anchor, fisher_diagonal, grown, loss_of
from nss.model import Classifier, ModelSpec
from nss.samples import Samples

if importlib.util.find_spec("avalanche") is None:
    pytest.skip("avalanche-lib is not installed", allow_module_level=True)

from avalanche.training.plugins import EWCPlugin
from avalanche.training.regularization import LearningWithoutForgetting
from avalanche.training.utils import ParamData, copy_params_dict

SHAPE, OLD_CLASSES = (1, 6, 6), 3
STRENGTH = 1.5


@pytest.fixture
def model() -> Classifier:
    torch.manual_seed(0)
    body = [nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(216, OLD_CLASSES)]
    return Classifier(nn.Sequential(*body), ModelSpec("tiny:network", ("a", "b", "c"), SHAPE, (0.5,), (0.25,))).eval()


@pytest.fixture
def moved(model: Classifier) -> Classifier:
    """The model with two classes more, on its way to learn them."""
    network = grown(model, ("d", "e"), seed=1)
    with torch.no_grad():
        for each in network.parameters():
            each += 0.1 * torch.randn(each.shape, generator=torch.Generator().manual_seed(2))
    return network


@pytest.fixture
def old() -> Samples:
    return pictures(6, 3)


@pytest.fixture
def new() -> Samples:
    return pictures(8, 4, OLD_CLASSES)


def pictures(count: int, seed: int, first: int = 0) -> Samples:
    images = torch.randint(0, 256, (count, *SHAPE), generator=torch.Generator().manual_seed(seed)).byte()
    return Samples(images, first + torch.arange(count) % 2)


def importances(model: Classifier, images: Tensor) -> dict[str, Tensor]:
    """The Fisher information as Avalanche computes it, of one image and one label at a time, summed as each is likely.

    Avalanche takes the labels of its data for what the model answers; ours is the expectation over all answers.
    """
    plugin = EWCPlugin(ewc_lambda=1.0)
    total = {name: torch.zeros_like(each) for name, each in model.named_parameters()}
    for image in images.split(1):
        # Avalanche leaves the model in training mode.
        for label, chance in enumerate(model.eval()(image).detach().softmax(1)[0]):
            data = TensorDataset(image, torch.tensor([label]), torch.tensor([0]))
            optimizer = torch.optim.SGD(model.parameters())
            found = plugin.compute_importances(model, F.cross_entropy, optimizer, data, "cpu", batch_size=1)
            for name, each in found.items():
                total[name] += chance * each.data / len(images)
    model.eval()
    return total


def test_the_fisher_information_is_that_of_avalanche(model: Classifier, old: Samples) -> None:
    expected = importances(model, old.images)
    assert all(float(each.max()) > 0 for each in expected.values())
    torch.testing.assert_close(fisher_diagonal(model, old.images), expected)


def test_the_loss_of_ewc_is_that_of_avalanche_with_half_its_factor(
    model: Classifier, moved: Classifier, old: Samples, new: Samples
) -> None:
    """The paper has lambda / 2, Avalanche lambda."""
    plugin = EWCPlugin(ewc_lambda=STRENGTH / 2)
    plugin.saved_params[0] = copy_params_dict(model)
    fisher = importances(model, old.images)
    plugin.importances[0] = {name: ParamData(name, init_tensor=each) for name, each in fisher.items()}
    loss = F.cross_entropy(moved(new.images)[:, OLD_CLASSES:], new.labels - OLD_CLASSES)
    run = SimpleNamespace(clock=SimpleNamespace(train_exp_counter=1), model=moved, device="cpu", loss=loss.clone())
    plugin.before_backward(run)
    assert float(run.loss.detach()) > float(loss.detach())
    torch.testing.assert_close(loss_of(EWC, model, old, STRENGTH)(moved, new.images, new.labels), run.loss)
    torch.testing.assert_close(
        gradients(STRENGTH * Anchor(model, old.images).penalty(moved), moved), gradients(run.loss - loss, moved)
    )


def test_lwf_learns_by_the_gradients_of_avalanche(
    model: Classifier, moved: Classifier, old: Samples, new: Samples
) -> None:
    """What is minimised differs by what does not depend on the weights: the entropy of the former answers."""
    theirs = LearningWithoutForgetting(alpha=STRENGTH, temperature=TEMPERATURE)
    task = SimpleNamespace(targets=SimpleNamespace(uniques={0, 1, 2}))
    data = SimpleNamespace(targets_task_labels=SimpleNamespace(uniques={0}), task_set={0: task})
    theirs.post_adapt(SimpleNamespace(model=model), SimpleNamespace(dataset=data))
    logits = moved(new.images)
    expected = F.cross_entropy(logits[:, OLD_CLASSES:], new.labels - OLD_CLASSES) + theirs(new.images, logits, moved)
    found = loss_of(LWF, model, old, STRENGTH)(moved, new.images, new.labels)
    torch.testing.assert_close(gradients(found, moved), gradients(expected, moved))
    before = (model(new.images).detach() / TEMPERATURE).softmax(1)
    entropy = -(before * before.log()).sum(1).mean()
    torch.testing.assert_close(found - STRENGTH * entropy, expected)


def gradients(loss: Tensor, model: Classifier) -> dict[str, Tensor]:
    names, values = zip(*model.named_parameters(), strict=True)
    found = torch.autograd.grad(loss, values, retain_graph=True, allow_unused=True)
    return {name: torch.zeros(()) if each is None else each for name, each in zip(names, found, strict=True)}
