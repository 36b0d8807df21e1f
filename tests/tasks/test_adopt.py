"""A model of the user's own becomes the champion, whole or not at all."""

from __future__ import annotations

import json
import shutil
import subprocess
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from mlflow.exceptions import MlflowException
from safetensors.torch import save_file

from flows import cli
from nss.base import train
from nss.data import load_data
from nss.errors import DataError, ModelError, SiteError, StageError
from nss.model import Classifier, build_model, load_model, model_digest, save_model
from tasks import data as data_verb
from tasks import promotion, register
from tasks.adopt import Adopted, adopt
from tasks.card import plain
from tasks.champion import read_champion
from tasks.layout import lay_out, set_params
from tasks.ledger import read_ledger
from tasks.params import Params, load_params
from tasks.registry import Registry
from tasks.tracking import Tracker, create_database, open_tracker
from tasks.workspace import Workspace

CLASSES = ("ant", "bee", "cow")
SHAPE = (1, 8, 8)


@dataclass
class Shop:
    """A workspace with data and no champion, its store, and weights that were trained on the data."""

    workspace: Workspace
    params: Params
    tracker: Tracker
    weights: Path

    def adopt(self, source: object = None, **options: object) -> Adopted:
        return adopt(self.workspace, self.params, self.tracker, str(source or self.weights), **options)

    @property
    def registry(self) -> Registry:
        return Registry(self.tracker, "farm")

    def aliases(self) -> dict[str, int]:
        found = {name: self.registry.by_alias(name) for name in ("champion", "previous")}
        return {name: each.number for name, each in found.items() if each}

    def versions(self) -> int:
        return len(self.tracker.client.search_model_versions("name = 'farm'"))

    def state(self) -> tuple[object, ...]:
        """All that an adoption may change."""
        files = {path: path.read_bytes() for path in sorted(self.workspace.root.glob("champion*")) if path.is_file()}
        runs = self.tracker.client.search_runs([self.tracker.experiment_id])
        return files, self.aliases(), self.versions(), read_ledger(self.workspace), len(runs)


def model(seed: int, classes: tuple[str, ...] = CLASSES, shape: tuple[int, int, int] = SHAPE) -> Classifier:
    return build_model("nss.zoo:lenet", classes, shape, seed)


def state_of(made: Classifier) -> dict[str, torch.Tensor]:
    return {name: tensor.contiguous() for name, tensor in made.network.state_dict().items()}


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace with bright rows as data, and beside it weights of a model that tells them apart."""
    root = tmp_path_factory.mktemp("adopt") / "farm"
    workspace = lay_out(root, "farm").workspace
    set_params(workspace.params, {"base.factory": "nss.zoo:lenet"})
    rng = np.random.default_rng(0)
    y = np.arange(150) % 3
    x = rng.integers(0, 80, (150, 8, 8)).astype(np.uint8)
    x[np.arange(150), 2 * y + 1] += 150
    np.savez(root.parent / "farm.npz", x=x, y=y, classes=np.array(CLASSES))
    data_verb.add(workspace, str(root.parent / "farm.npz"))
    data = load_data(workspace.data)
    mean, std = data.split("train").pixel_statistics()
    made = build_model("nss.zoo:lenet", data.classes, data.image_shape, 1, mean=mean, std=std)
    train(made, data, 6, 0, batch_size=16)
    save_file(state_of(made), root.parent / "farm.safetensors")
    save_model(made, root.parent / "folder")
    create_database(root / "mlflow" / "tracking.db", root.parent / "artifacts")
    return root


@pytest.fixture
def shop(template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Shop:
    """A copy of it for one test."""
    root = shutil.copytree(template, tmp_path / "farm", symlinks=True)
    for name in ("farm.safetensors", "folder"):
        (tmp_path / name).symlink_to(template.parent / name)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.delenv("DVC_ROOT", raising=False)
    monkeypatch.chdir(root)
    workspace = Workspace(root)
    return Shop(workspace, load_params(workspace.params), open_tracker(workspace), tmp_path / "farm.safetensors")


def test_weights_become_the_champion_scored_logged_registered_and_pinned(shop: Shop) -> None:
    done = shop.adopt()
    version = done.registered.version
    pinned = load_model(shop.workspace.champion)
    data = load_data(shop.workspace.data)
    # The normalisation is that of the training images, each class keeps its place.
    mean, std = data.split("train").pixel_statistics()
    assert (pinned.spec.mean, pinned.spec.std, pinned.spec.classes) == (mean, std, CLASSES)
    assert model_digest(pinned) == model_digest(load_model(shop.weights.parent / "folder")) == version.model
    pin = read_champion(shop.workspace)
    assert (pin.name, pin.version, pin.model) == ("farm", 1, version.model)
    assert pin.batches == version.batches == tuple(batch.digest for batch in data.batches)
    assert (shop.workspace.root / "champion.dvc").is_file()
    assert shop.aliases() == {"champion": 1}
    test = data.split("test")
    with torch.inference_mode():
        right = float((pinned(test.images).argmax(1) == test.labels).double().mean())
    assert right > 0.9
    assert (done.scores.accuracy, done.scores.images) == (right, len(test))
    assert version.figures["accuracy"] == right
    assert version.figures["class/ant"] == done.scores.per_class["ant"]
    assert version.figures["parameters"] == sum(each.numel() for each in pinned.network.parameters())
    run = shop.tracker.client.get_run(version.run_id)
    assert (run.info.status, run.data.metrics["accuracy"], run.data.tags["nss.kind"]) == ("FINISHED", right, "adopt")
    assert run.inputs.dataset_inputs[0].dataset.digest == version.tags["nss.data_md5"]
    (entry,) = read_ledger(shop.workspace)
    assert (entry["kind"], entry["version"], entry["model"], entry["previous"]) == ("adopt", 1, version.model, None)
    assert entry["reasons"][0] == f"taken from {shop.weights}"


def test_an_adopted_version_has_a_card_with_what_is_known_of_it(shop: Shop) -> None:
    done = shop.adopt()
    version = done.registered.version
    card = shop.tracker.client.download_artifacts(version.run_id, "card.md", str(shop.workspace.root))
    lines = Path(card).read_text().splitlines()
    scores, digests = done.scores, [batch.digest for batch in load_data(shop.workspace.data).batches]
    worst = min(scores.per_class, key=scores.per_class.get)
    known = {
        f"# Model card: adopt {version.model[:12]}",
        "- what: an image classifier of 3 classes with held-out images, trained elsewhere",
        f"- digest: `{version.model}`",
        f"- taken from: {plain(str(shop.weights))}",
        f"| parameters | {version.figures['parameters']:,} |",
        "none: it was made the champion by hand, as the ledger says",
        f"{scores.accuracy:.2%} on {scores.images} held-out images, worst class {worst} {scores.per_class[worst]:.2%}",
        *(f"| {name} | {value:.2%} |" for name, value in scores.per_class.items()),
        f"- data version `{version.tags['nss.data_md5']}`",
        f"- batches it knows: `{digests[0]}`",
    }
    assert known - set(lines) == set()


def test_the_champion_before_becomes_the_previous_and_a_rollback_brings_it_back(shop: Shop) -> None:
    first = shop.adopt().registered.version
    save_file(state_of(model(7)), shop.weights.parent / "other.safetensors")
    done = shop.adopt(shop.weights.parent / "other.safetensors", forced=True, reason="a try")
    assert (done.registered.was.number, done.registered.version.number) == (1, 2)
    assert shop.aliases() == {"champion": 2, "previous": 1}
    assert read_ledger(shop.workspace)[-1]["reason"] == "a try"
    register.rollback(shop.workspace, shop.params, shop.tracker)
    assert read_champion(shop.workspace).model == first.model
    # Adopted again it is the version that it was.
    again = shop.adopt(shop.weights.parent / "other.safetensors", forced=True, reason="once more")
    assert (again.registered.version.number, shop.versions()) == (2, 2)
    assert shop.aliases() == {"champion": 2, "previous": 1}


def test_the_same_weights_from_wherever_are_one_version_and_adopted_once(shop: Shop) -> None:
    number = shop.adopt().registered.version.number
    before = shop.state()
    torch.save({"state_dict": state_of(load_model(shop.weights.parent / "folder"))}, shop.weights.parent / "w.pt")
    for source in (shop.weights, shop.weights.parent / "w.pt", shop.weights.parent / "folder", "models:/farm@champion"):
        assert shop.adopt(source).registered.version.number == number
    assert shop.state() == before


def test_a_registered_model_is_taken_by_its_concrete_version(shop: Shop) -> None:
    client, names = shop.tracker.client, []
    for kind in ("file", "folder"):
        run = client.create_run(shop.tracker.experiment_id)
        source = shop.weights if kind == "file" else shop.weights.parent / "folder"
        path = f"deep/{kind}"
        (client.log_artifact if kind == "file" else client.log_artifacts)(run.info.run_id, str(source), path)
        client.create_registered_model(kind)
        names.append(client.create_model_version(kind, f"{run.info.artifact_uri}/{path}", run.info.run_id))
        client.set_registered_model_alias(kind, "production", "1")
    assert shop.adopt("models:/file@production").source == "models:/file/1"
    assert read_champion(shop.workspace).model == model_digest(load_model(shop.weights.parent / "folder"))
    assert shop.adopt("models:/folder/1").registered.version.number == 1
    assert read_ledger(shop.workspace)[0]["reasons"][0] == "taken from models:/file/1"


def test_a_normalisation_that_is_given_goes_with_the_weights(shop: Shop) -> None:
    shop.adopt(normalisation=([0.3], [0.25]))
    spec = load_model(shop.workspace.champion).spec
    assert (spec.mean, spec.std) == ((0.3,), (0.25,))


def other_classes(shop: Shop) -> Path:
    save_model(model(1, ("ant", "cow", "bee")), shop.weights.parent / "wrong")
    return shop.weights.parent / "wrong"


def other_images(shop: Shop) -> Path:
    save_model(model(1, shape=(1, 12, 12)), shop.weights.parent / "wrong")
    return shop.weights.parent / "wrong"


def more_classes(shop: Shop) -> Path:
    save_file(state_of(model(1, (*CLASSES, "dog"))), shop.weights.parent / "wrong.safetensors")
    return shop.weights.parent / "wrong.safetensors"


def a_pickled_module(shop: Shop) -> Path:
    torch.save(model(1).network, shop.weights.parent / "wrong.pt")
    return shop.weights.parent / "wrong.pt"


def one_that_guesses(shop: Shop) -> Path:
    state = state_of(model(1))
    state["fc3.weight"].zero_()
    save_file(state, shop.weights.parent / "wrong.safetensors")
    return shop.weights.parent / "wrong.safetensors"


def an_empty_version(shop: Shop) -> str:
    run = shop.tracker.client.create_run(shop.tracker.experiment_id)
    shop.tracker.client.log_text(run.info.run_id, "x", "deep/notes.txt")
    shop.tracker.client.create_registered_model("empty")
    shop.tracker.client.create_model_version("empty", f"{run.info.artifact_uri}/deep", run.info.run_id)
    return "models:/empty/1"


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (other_classes, "knows the classes ant, cow, bee\n.*\n  allowed: .*: ant, bee, cow"),
        (other_images, "takes images of 1 x 12 x 12\n.*\n  allowed: 1 x 8 x 8"),
        (more_classes, r"fc3.weight \[4, 84\] instead of \[3, 84\]"),
        (a_pickled_module, "may run code when it is loaded"),
        (
            one_that_guesses,
            r"a class right, guessing 33.3%\n(.*\n)?.*in this order \(ant, bee, cow\)",
        ),
        (an_empty_version, r"holds notes\.txt\n.*\n  allowed: one model folder"),
        (lambda _: "nowhere.pt", "there is no such file"),
        (lambda _: "models:/farm", "names no version"),
        (lambda _: "models:/farm@champion", "there is no version 'farm@champion'"),
        (lambda shop: shop.workspace.root, "model.json"),
    ],
)
def test_what_is_wrong_is_named_and_nothing_changes(shop: Shop, wrong, words: str) -> None:
    source = wrong(shop)
    before = shop.state()
    with pytest.raises((ModelError, StageError), match=words):
        shop.adopt(source)
    assert shop.state() == before


def test_a_network_whose_neurons_cannot_be_found_is_refused(
    shop: Shop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(shop.workspace.root)
    (shop.workspace.root / "barn.py").write_text(
        "import torch\n\n\nclass Barn(torch.nn.Module):\n"
        "    def __init__(self, num_classes, input_shape):\n        super().__init__()\n"
        "        self.head = torch.nn.Linear(64, num_classes)\n\n"
        "    def forward(self, x):\n        return self.head(x.flatten(1) if x.sum() > 0 else -x.flatten(1))\n"
    )
    shop.params = shop.params.model_copy(
        update={"base": shop.params.base.model_copy(update={"factory": "barn:Barn", "packages": ["barn"]})}
    )
    shop.workspace = replace(shop.workspace, packages=("barn",))
    save_file({"head.weight": torch.randn(3, 64), "head.bias": torch.zeros(3)}, tmp_path / "barn.safetensors")
    before = shop.state()
    with pytest.raises(SiteError):
        shop.adopt(tmp_path / "barn.safetensors")
    assert shop.state() == before


def test_a_normalisation_beside_a_model_folder_is_refused(shop: Shop) -> None:
    with pytest.raises(ModelError, match="normalisation of its own"):
        shop.adopt(shop.weights.parent / "folder", normalisation=([0.5], [0.5]))


def test_without_data_or_with_data_that_nobody_versioned_there_is_nothing_to_score_on(shop: Shop) -> None:
    (shop.workspace.data / "dataset.json").write_text("{}")
    with pytest.raises(StageError, match=r"data/ is not what data.dvc names"):
        shop.adopt()
    shutil.rmtree(shop.workspace.data)
    with pytest.raises(DataError, match="there is no data set here"):
        shop.adopt()
    assert read_champion(shop.workspace) is None


class Killed(BaseException):
    """Stands for kill -9: nothing may catch it."""


@pytest.mark.parametrize(
    "step", ["log_model", "end", "add", "set_alias", "_write_down", "_pin", "version_champion", "_enter"]
)
def test_whatever_step_it_dies_after_adopting_again_completes_it_once(
    shop: Shop, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    owner = next(each for each in (promotion, Registry, Tracker) if hasattr(each, step))
    real = getattr(owner, step)

    def dying(*arguments: object, **options: object) -> None:
        real(*arguments, **options)
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(owner, step, dying)
        with pytest.raises(Killed):
            shop.adopt()
    done = shop.adopt()
    pin = read_champion(shop.workspace)
    assert (pin.version, pin.model) == (1, done.registered.version.model)
    assert model_digest(load_model(shop.workspace.champion)) == pin.model
    assert (shop.versions(), shop.aliases()) == (1, {"champion": 1})
    assert [entry["kind"] for entry in read_ledger(shop.workspace)] == ["adopt"]
    assert promotion.pending(shop.workspace) is None
    runs = shop.tracker.client.search_runs([shop.tracker.experiment_id])
    assert [run.info.status for run in runs] == ["FINISHED"]


def test_a_store_that_goes_away_leaves_no_champion(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    def away(*_: object, **__: object) -> None:
        raise MlflowException("connection refused")

    with monkeypatch.context() as patch:
        patch.setattr(Registry, "add", away)
        with pytest.raises(MlflowException):
            shop.adopt()
    assert read_champion(shop.workspace) is None
    assert not shop.workspace.champion.exists()


def nss(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr("sys.argv", ["nss", *arguments])
    try:
        return cli.main()
    except SystemExit as end:
        return int(end.code or 0)


def test_the_command_says_what_it_took_and_how_good_it_is(
    shop: Shop, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert nss(monkeypatch, "adopt", str(shop.weights), "--json") == 0
    content = json.loads(capsys.readouterr().out)
    assert (content["name"], content["version"], content["verb"]) == ("farm", 1, "adopt")
    accuracy = content["scores"]["accuracy"]
    assert nss(monkeypatch, "adopt", str(shop.weights)) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"{shop.weights}: accuracy {accuracy:.2%} on {content['scores']['images']} held-out")
    assert lines[1] == "39,147 parameters, 256,092 multiply-adds an image, 157,612 bytes"
    assert lines[2].startswith(f"normalised by mean {content['mean'][0]:.3g} and std {content['std'][0]:.3g}: the")
    assert lines[3] == "the champion is farm version 1 (adopt)"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--force"], "--force needs a --reason"),
        (["--mean", "0.5"], "one without the other"),
        (["--mean", "0.5,x", "--std", "1,1"], "0.5,x is not a list of numbers"),
        (["--mean", "nan", "--std", "1"], "nan is not a list of numbers"),
        (["--mean", "0.5,0.5", "--std", "1,1"], "1 numbers each"),
        (["--mean", "0.5", "--std", "0"], "std is [0.0] where: std allowed: a number above 0 for each channel"),
    ],
)
def test_mistakes_in_the_command_are_two_and_change_nothing(
    shop: Shop, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], options: list[str], words: str
) -> None:
    before = shop.state()
    assert nss(monkeypatch, "adopt", str(shop.weights), *options) == 2
    assert words in " ".join(capsys.readouterr().err.replace("│", "").split())
    assert shop.state() == before


def test_the_commit_of_an_adoption_is_called_by_its_name(shop: Shop) -> None:
    for name, value in (("user.name", "t"), ("user.email", "t@example.org"), ("commit.gpgsign", "false")):
        subprocess.run(["git", "config", name, value], check=True)
    group = shop.params.register.model_copy(update={"commit": True})
    shop.params = shop.params.model_copy(update={"register": group})
    assert shop.adopt().registered.warnings == ()
    log = subprocess.run(["git", "log", "--format=%s"], check=True, capture_output=True, text=True).stdout
    assert log == "Champion: farm version 1 (adopt)\n"
