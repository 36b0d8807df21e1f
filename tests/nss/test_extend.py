"""Extending: new classes are learned, nothing old moves by a bit, and nobody has to say which task an image is of."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nss import extend_course
from nss.base import train
from nss.critical import critical_neurons
from nss.data import Batch, Dataset, batch_digest
from nss.errors import ExtendError
from nss.extend import extend
from nss.extend_report import judge, told_accuracy, told_answers
from nss.grow import condense
from nss.model import Classifier, build_model, load_model, model_digest, save_model
from nss.profile import profile
from nss.routing import fit_blend
from nss.samples import Samples
from nss.slice import SemanticSlices, semantic_slices
from nss.tensor_files import write_tensors

Kit = tuple[Classifier, SemanticSlices, Classifier, Dataset]
PLENTY = {"epochs": 4, "batch_size": 16}


def named(data: Dataset, classes: tuple[str, ...], rows: Tensor) -> Dataset:
    """The rows under these names of the classes, a batch of their own."""
    (batch,) = data.batches
    images, labels, split = batch.images[rows], batch.labels[rows], batch.split[rows]
    return Dataset(
        classes, data.image_shape, (Batch(batch_digest(images, labels, split, classes), images, labels, split),)
    )


def logits_of(model: Classifier, images: Tensor) -> Tensor:
    with torch.no_grad():
        answers: Tensor = model.eval()(images)
    return answers


def kit_of(factory: str, shape: tuple[int, int, int], data: Dataset, epochs: int, share: float = 0.7) -> Kit:
    """A model of the first two classes, and the same condensed."""
    old = named(data, data.classes[:2], data.labels < 2)
    images = old.images.expand(-1, shape[0], -1, -1)
    images = F.interpolate(images.float(), shape[1:]).to(torch.uint8)
    model = build_model(factory, old.classes, shape, 0)
    train(model, (images, old.labels), epochs, 0, batch_size=16)
    found = profile(model, (images, old.labels), ("taylor",))
    slices = semantic_slices(critical_neurons(found, "taylor", "cumulative", 0.9), found)
    return model, slices, condense(model, slices, (images, old.labels), profile=found, share=share), data


@pytest.fixture(scope="module", autouse=True)
def _few_features() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nss.routing.FEATURES", 200)
        yield


@pytest.fixture(scope="module")
def kit(networks: ModuleType) -> Kit:
    return kit_of("nss.zoo:vgg_small", (1, 8, 8), networks.coloured_data(480, classes=4), 3)


@dataclass(frozen=True)
class Chain:
    """A condensed model, extended by one class and by one more."""

    models: tuple[Classifier, Classifier, Classifier]
    images: Tensor


ARCHITECTURES = {
    "nss.zoo:vgg_small": ((1, 8, 8), 0.7),
    "nss.zoo:resnet20": ((1, 8, 8), 0.7),
    "nss.zoo:mobilenet_small": ((1, 8, 8), 0.7),
    "torchvision.models:resnet18": ((3, 32, 32), 1.0),  # refitting it takes a minute
}


@pytest.fixture(scope="module")
def chains(networks: ModuleType) -> dict[str, Chain]:
    found = {}
    for factory, (shape, share) in ARCHITECTURES.items():
        _, _, ready, data = kit_of(factory, shape, networks.coloured_data(64, classes=4), 1, share)
        images = F.interpolate(data.images.expand(-1, shape[0], -1, -1).float(), shape[1:]).to(torch.uint8)
        cows, dogs = ((images[data.labels == label], data.labels[data.labels == label]) for label in (2, 3))
        once = extend(ready, None, cows, classes=["cow"], epochs=1).model
        twice = extend(once, None, dogs, classes=["dog"], epochs=1, width=0.4).model
        found[factory] = Chain((ready, once, twice), networks.pictures(256, shape))
    return found


@pytest.mark.parametrize("factory", ARCHITECTURES)
@pytest.mark.parametrize("count", [1, 7, 256])
def test_logits_stay_bit_for_bit_over_two_further_tasks(factory: str, count: int, chains: dict[str, Chain]) -> None:
    ready, once, twice = (logits_of(model, chains[factory].images[:count]) for model in chains[factory].models)
    assert twice.shape == (count, 4)
    assert torch.equal(twice[:, :2], ready)
    assert torch.equal(twice[:, :3], once)


def test_what_the_features_say_of_new_classes_counts_as_far_as_held_out_images_show(kit: Kit) -> None:
    _, _, ready, data = kit
    new = named(data, data.classes, data.labels >= 2)
    model, val = extend(ready, None, new, **PLENTY).model, new.split("val")
    with torch.no_grad():
        logits, features = model.network.parts(model.normalise(val.images))
    router = model.network.router
    fewest = int(torch.bincount(new.split("train").labels)[2:].min())
    expected = fit_blend(logits[1], router.gates[0](features)[:, 2:].detach(), val.labels - 2, fewest)
    torch.testing.assert_close(router.blends[0], expected, rtol=1e-3, atol=1e-5)


def test_logits_are_the_same_bits_in_a_new_process(chains: dict[str, Chain], tmp_path: Path) -> None:
    for place, chain in enumerate(chains.values()):
        answers = {str(number): logits_of(model, chain.images) for number, model in enumerate(chain.models)}
        write_tensors(tmp_path / f"{place}.safetensors", {"images": chain.images, **answers}, {})
        save_model(chain.models[-1], tmp_path / f"{place}")
    code = (
        "import sys, torch; from nss.model import load_model; from safetensors.torch import load_file\n"
        "for folder in sys.argv[1:]:\n"
        "    want, model = load_file(folder + '.safetensors'), load_model(folder)\n"
        "    with torch.no_grad(): found = model(want['images'])\n"
        "    print(*(torch.equal(found[:, :2 + task], want[str(task)]) for task in range(3)))"
    )
    folders = [str(tmp_path / str(place)) for place in range(len(chains))]
    run = subprocess.run([sys.executable, "-c", code, *folders], check=True, capture_output=True, text=True)
    assert run.stdout.splitlines() == ["True True True"] * len(chains)


def test_new_classes_are_learned_and_told_from_the_old_without_an_old_image(kit: Kit) -> None:
    _, _, ready, data = kit
    result = extend(ready, None, named(data, data.classes, data.labels >= 2), **PLENTY)  # type: ignore[arg-type]
    test = data.split("test")
    found = told_accuracy(result.model, test)
    assert found["ant"][0] == told_accuracy(ready, test.of_classes(("ant", "bee")))["all"][0]
    assert found["cow"][0] > 0.95
    assert found["all"][1] > 0.9
    assert result.report.classes == ("cow", "dog")
    assert result.report.replayed == 0
    assert result.report.accuracies.old is None
    assert result.report.accuracies.new_told is not None
    json.dumps(result.report.to_dict())


def test_with_share_one_the_models_own_logits_stay(kit: Kit) -> None:
    model, slices, _, data = kit
    old, new = named(data, ("ant", "bee"), data.labels < 2), named(data, data.classes, data.labels >= 2)
    result = extend(model, slices, new, old_data=old, share=1.0, epochs=1)
    assert torch.equal(logits_of(result.model, data.images)[:, :2], logits_of(model, data.images))
    assert result.report.capacity["hidden"].used == (256, 77)
    assert result.report.capacity["hidden"].widened == 77
    assert result.report.accuracies.old_told == result.report.before


def test_the_first_time_old_data_and_slices_are_needed(kit: Kit) -> None:
    model, slices, _, data = kit
    new = named(data, data.classes, data.labels >= 2)
    with pytest.raises(ExtendError, match="condensed") as caught:
        extend(model, slices, new)
    assert caught.value.where == "old_data"
    with pytest.raises(ExtendError, match="condensed"):
        extend(model, None, new, old_data=new)


def test_the_same_seed_gives_the_same_model(kit: Kit) -> None:
    _, _, ready, data = kit
    new = named(data, data.classes, data.labels >= 2)
    digests = [model_digest(extend(ready, None, new, epochs=1, seed=seed).model) for seed in (0, 0, 1)]
    assert digests[0] == digests[1] != digests[2]


def few(data: Dataset, counts: dict[int, int]) -> Tensor:
    """Row numbers of so many images of each label, from the first on."""
    return torch.cat([(data.labels == label).nonzero()[:count, 0] for label, count in counts.items()])


@pytest.mark.parametrize("counts", [{2: 40, 3: 3}, {2: 40, 3: 1}, {2: 1}, {2: 1, 3: 1}, {2: 2}])
def test_few_samples_of_a_class_are_enough(counts: dict[int, int], kit: Kit) -> None:
    _, _, ready, data = kit
    rows = few(data, counts)
    names = data.classes[2 : 2 + len(counts)]
    result = extend(ready, None, (data.images[rows], data.labels[rows]), classes=names, epochs=1)
    answers = logits_of(result.model, data.images)
    assert result.model.spec.classes == ("ant", "bee", *names)
    assert bool(torch.isfinite(answers).all())
    assert torch.equal(answers[:, :2], logits_of(ready, data.images))
    right = answers.argmax(1) == data.labels
    assert float(right[data.labels < 2].double().mean()) > 0.7
    if counts == {2: 40, 3: 3}:
        assert float(right[data.labels == 2].double().mean()) > 0.7


def test_replay_takes_its_share_of_each_class_and_one_at_least(kit: Kit) -> None:
    _, _, ready, data = kit
    rows = few(data, {0: 40, 1: 3})
    old, new = (data.images[rows], data.labels[rows]), named(data, data.classes, data.labels >= 2)
    assert extend(ready, None, new, 0.05, old_data=old, epochs=1).report.replayed == 2 + 1
    result = extend(ready, None, new, 1.0, old_data=named(data, ("ant", "bee"), data.labels < 2), **PLENTY)  # type: ignore[arg-type]
    assert torch.equal(logits_of(result.model, data.images)[:, :2], logits_of(ready, data.images))
    assert told_accuracy(result.model, data.split("test"))["all"][1] > 0.9


@pytest.mark.parametrize(
    ("size", "replay", "expected"),
    [
        (12, 1.0, (8, 4)),
        (12, 0.0, (12, 0)),
        (1, 1.0, (2, 1)),
        (2, 1.0, (2, 1)),
        (10, 1.0, (6, 3)),
        (12, 0.001, (10, 2)),
    ],
)
def test_of_a_batch_that_replays_a_third_is_old(
    size: int, replay: float, expected: tuple[int, int], kit: Kit, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, _, ready, data = kit
    batches = []
    loss = extend_course._loss

    def noted(model: Classifier, images: Tensor, labels: Tensor, known: int, replayed: bool) -> Tensor:
        batches.append((int((labels >= known).sum()), int((labels < known).sum())))
        return loss(model, images, labels, known, replayed)

    monkeypatch.setattr("nss.extend_course._loss", noted)
    old = named(data, ("ant", "bee"), data.labels < 2)
    new = named(data, data.classes, data.labels >= 2)
    count = int((new.split("train").labels >= 2).sum())
    done = extend(ready, None, new, replay, old_data=old, epochs=1, batch_size=size)
    assert set(batches) == {expected}
    # A norm takes no statistics of a single image: of such a batch the image is there twice.
    each = 1 if size == 1 else expected[0]
    assert done.report.steps == len(batches)
    assert count - each < len(batches) * each <= count


def test_known_classes_among_the_new_samples_are_replayed_and_not_learned_anew(kit: Kit) -> None:
    _, _, ready, data = kit
    mixed = named(data, data.classes, (data.labels >= 2) | (torch.arange(len(data.labels)) < 40))
    result = extend(ready, None, mixed, epochs=1)
    (batch,) = mixed.split("train").batches
    assert result.report.replayed == int((batch.labels < 2).sum()) > 0
    assert result.model.network.router.counts[:2].tolist() == ready.network.router.counts.tolist()
    assert result.report.accuracies.old is None or result.report.accuracies.new is not None


def test_a_class_that_sorts_first_comes_last(kit: Kit) -> None:
    _, _, ready, data = kit
    rows = data.labels == 2
    result = extend(ready, None, named(data, ("ant", "bee", "aardvark"), rows), epochs=1)
    assert result.model.spec.classes == ("ant", "bee", "aardvark")
    with pytest.raises(ExtendError, match="aardvark") as caught:
        extend(ready, None, named(data, ("aardvark", "ant", "bee"), rows), epochs=1)
    assert "last" in caught.value.fix


def test_what_cannot_be_learned_is_refused(kit: Kit) -> None:
    _, _, ready, data = kit
    new, label = data.images[:4], torch.tensor
    cases: list[tuple[str, Any, dict[str, Any]]] = [
        ("no class that the model does not know", (new, label([0, 1, 0, 1])), {"classes": ["cow"]}),
        ("no new samples", (new[:0], label([], dtype=torch.int64)), {"classes": ["cow"]}),
        ("no names", (new, label([2, 2, 2, 2])), {}),
        ("no image of cow", (new, label([3, 3, 3, 3])), {"classes": ["cow", "dog"]}),
        ("from 2 to 4", (new, label([2, 3, 3, 4])), {"classes": ["cow", "dog"]}),
        ("from -1", (new, label([-1, 2, 2, 2])), {"classes": ["cow"]}),
        ("the classes are", (new, label([2, 2, 2, 2])), {"classes": ["ant"]}),
        ("replay is 0.5 without", (new, label([2, 2, 2, 2])), {"classes": ["cow"], "replay": 0.5}),
        ("replay is 2", (new, label([2, 2, 2, 2])), {"classes": ["cow"], "replay": 2}),
        ("width is 0", (new, label([2, 2, 2, 2])), {"classes": ["cow"], "width": 0}),
        ("epochs is 0", (new, label([2, 2, 2, 2])), {"classes": ["cow"], "epochs": 0}),
        ("learning_rate is -1", (new, label([2, 2, 2, 2])), {"classes": ["cow"], "learning_rate": -1}),
        ("not finite", (new, label([2, 3, 2, 3])), {"classes": ["cow", "dog"], "learning_rate": 1e30}),
    ]
    for message, samples, arguments in cases:
        with pytest.raises(ExtendError, match=message):
            extend(ready, None, samples, **arguments)


@pytest.mark.parametrize("kind", ["float64", "bfloat16"])
def test_another_precision_than_float32_is_refused_before_anything_is_done(kit: Kit, kind: str) -> None:
    model, slices, ready, data = kit
    new, old = named(data, data.classes, data.labels >= 2), named(data, ("ant", "bee"), data.labels < 2)
    for given, of in ((model, slices), (ready, None)):
        other = copy.deepcopy(given).to(getattr(torch, kind))
        with pytest.raises(ExtendError, match=f"the model has weights in {kind}") as caught:
            extend(other, of, new, old_data=old, share=1.0, epochs=1)
        assert caught.value.where == "model"
        assert "model.float()" in caught.value.fix
        assert extend(other.float(), of, new, old_data=old, share=1.0, epochs=1).report.steps > 0


def test_nothing_is_condensed_in_another_precision(kit: Kit) -> None:
    model, slices, _, data = kit
    with pytest.raises(ExtendError, match="the model has weights in float64"):
        condense(copy.deepcopy(model).double(), slices, named(data, ("ant", "bee"), data.labels < 2))


def test_told_answers_are_the_best_of_the_own_task(kit: Kit) -> None:
    _, _, ready, data = kit
    model = extend(ready, None, named(data, data.classes, data.labels >= 2), epochs=1).model
    logits, labels = torch.tensor([[1.0, 2.0, 9.0, 8.0], [9.0, 2.0, 3.0, 4.0]]), torch.tensor([0, 2])
    assert told_answers(model, logits, labels).tolist() == [1, 3]
    found = judge(model, Samples(data.images[:8], data.labels[:8]), 2)
    answers = logits_of(model, data.images[:8]).argmax(1) == data.labels[:8]
    assert found.overall == float(answers.double().mean())
    assert found.old == float(answers[data.labels[:8] < 2].double().mean())
    assert found.per_class["cow"] == float(answers[data.labels[:8] == 2].double().mean())


def test_a_folder_from_before_tasks_existed_still_loads(kit: Kit, tmp_path: Path) -> None:
    model, _, _, data = kit
    save_model(model, tmp_path / "old")
    path = tmp_path / "old" / "model.json"
    content = json.loads(path.read_text())
    for name in ("tasks", "views", "features"):
        del content[name]
    path.write_text(json.dumps(content))
    assert torch.equal(logits_of(load_model(tmp_path / "old"), data.images), logits_of(model, data.images))
