"""Model folders: bit-identical in another process, refused when anything is off, nothing imported or unpickled."""

from __future__ import annotations

import json
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torchvision
from safetensors.torch import load_file, save_file
from torch import nn

from nss import files, tensor_files
from nss.errors import ModelError, NssError
from nss.model import (
    Classifier,
    build_model,
    load_model,
    model_digest,
    network_of,
    save_model,
    shape_of,
    with_network,
)
from nss.prune_weights import prune_weights
from nss.remove import remove
from nss.sliced import sliced

ZOO = ("lenet", "vgg_small", "resnet20", "mobilenet_small")
SCRIPT = """
import sys, torch
from nss.model import load_model, model_digest
images = torch.load(sys.argv[1], weights_only=True)
for folder in sys.argv[2:]:
    model = load_model(folder)
    assert not model.training
    with torch.no_grad():
        torch.save({"logits": model(images), "digest": model_digest(model)}, folder + ".pt")
"""


def test_every_zoo_model_is_bit_identical_in_a_new_process(networks: ModuleType, tmp_path: Path) -> None:
    images = networks.pictures(256)
    torch.save(images, tmp_path / "images.pt")
    models = {str(tmp_path / name): networks.zoo_model(name, seed=1) for name in ZOO}
    for folder, model in models.items():
        save_model(model, folder)
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "images.pt"), *models]
    subprocess.run(command, check=True, capture_output=True)
    for folder, model in models.items():
        found = torch.load(folder + ".pt", weights_only=True)
        with torch.no_grad():
            assert torch.equal(found["logits"], model(images)), folder
        assert found["digest"] == model_digest(model)


def test_what_a_model_says_about_itself_survives_the_folder(tmp_path: Path, networks: ModuleType) -> None:
    arguments = {"width": 6, "depth": 2}
    model = build_model(
        "tiny_networks:tower", ("x", "y", "z"), (3, 8, 8), 4,
        mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6), arguments=arguments, allow=["tiny_networks"],
    )  # fmt: skip
    assert networks.tower  # the factory's module is registered
    assert model.network[2].weight.shape == (6, 6, 3, 3)
    save_model(model, tmp_path / "m")
    again = load_model(tmp_path / "m", allow=["tiny_networks"])
    assert again.spec == model.spec
    assert again.spec.classes == ("x", "y", "z")
    assert again.spec.input_shape == (3, 8, 8)
    assert (again.spec.mean, again.spec.std, again.spec.arguments) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6), arguments)
    smaller = remove(again, {"0": torch.arange(6) < 4})
    save_model(smaller, tmp_path / "s")
    third = load_model(tmp_path / "s", allow=["tiny_networks"])
    assert third.spec == smaller.spec
    assert third.spec.kept == {"0": (0, 1, 2, 3)}
    assert third.spec.parent == model_digest(model)


def test_a_torchvision_model_can_be_built_and_kept(tmp_path: Path, networks: ModuleType) -> None:
    model = build_model("torchvision.models:resnet18", networks.CLASSES, (3, 32, 32), 0).eval()
    assert isinstance(model.network, torchvision.models.ResNet)
    assert model.network.fc.out_features == 4
    save_model(model, tmp_path / "m")
    images = networks.pictures(2, (3, 32, 32))
    with torch.no_grad():
        assert torch.equal(load_model(tmp_path / "m")(images), model(images))


def test_the_same_seed_gives_the_same_weights_and_the_generator_stays(networks: ModuleType) -> None:
    before = torch.get_rng_state()
    digests = [model_digest(build_model("nss.zoo:lenet", networks.CLASSES, networks.SHAPE, seed)) for seed in (0, 0, 1)]
    assert torch.equal(torch.get_rng_state(), before)
    assert digests[0] == digests[1] != digests[2]


def test_the_same_model_saved_twice_gives_equal_bytes(tmp_path: Path, networks: ModuleType) -> None:
    model = networks.zoo_model("resnet20")
    save_model(model, tmp_path / "a")
    save_model(load_model(tmp_path / "a"), tmp_path / "b")
    for name in ("model.json", "model.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert sorted(each.name for each in (tmp_path / "a").iterdir()) == ["model.json", "model.safetensors"]


def test_saving_over_a_model_replaces_it_whole(tmp_path: Path, networks: ModuleType) -> None:
    save_model(networks.zoo_model("lenet", seed=0), tmp_path / "m")
    (tmp_path / "m" / "stray").write_text("left over")
    second = networks.zoo_model("lenet", seed=1)
    save_model(second, tmp_path / "m")
    assert model_digest(load_model(tmp_path / "m")) == model_digest(second)
    assert not (tmp_path / "m" / "stray").exists()
    assert [each.name for each in tmp_path.iterdir()] == ["m"]


@pytest.mark.parametrize("half", ["write_json", "write_tensors"])
def test_an_exception_while_writing_leaves_the_old_folder_whole(
    tmp_path: Path, networks: ModuleType, monkeypatch: pytest.MonkeyPatch, half: str
) -> None:
    first = networks.zoo_model("lenet", seed=0)
    save_model(first, tmp_path / "m")

    def fail(path: Path, *_: object) -> None:
        path.write_text("half of it")
        raise OSError("no space left on device")

    monkeypatch.setattr(f"nss.model.{half}", fail)
    with pytest.raises(OSError, match="no space left"):
        save_model(networks.zoo_model("lenet", seed=1), tmp_path / "m")
    assert model_digest(load_model(tmp_path / "m")) == model_digest(first)
    assert [each.name for each in tmp_path.iterdir()] == ["m"]


@pytest.fixture
def folder(tmp_path: Path, networks: ModuleType) -> Path:
    """A saved lenet."""
    save_model(networks.zoo_model("lenet"), tmp_path / "model")
    return tmp_path / "model"


def edit(folder: Path, change: Callable[[dict[str, object]], object]) -> None:
    content = json.loads((folder / "model.json").read_text())
    change(content)
    (folder / "model.json").write_text(json.dumps(content))


def cut_short(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def flip_a_bit(folder: Path) -> None:
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def other_weights(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["network.conv1.weight"] += 1
    save_file(tensors, folder / "model.safetensors", metadata={"nss": '{"format": 1}'})


def reshape(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["network.conv1.weight"] = tensors["network.conv1.weight"][:8].clone()
    tensor_files.write_tensors(folder / "model.safetensors", tensors, {"format": 1})
    weights = files.file_digest(folder / "model.safetensors")
    edit(folder, lambda content: content.update(weights=weights))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut_short, "not a whole safetensors file"),
        (flip_a_bit, "the weights are not those that model.json names"),
        (other_weights, "the weights are not those that model.json names"),
        (lambda f: (f / "model.safetensors").unlink(), "the file is missing"),
        (lambda f: (f / "model.json").unlink(), "the file is missing"),
        (lambda f: shutil.rmtree(f), "the file is missing"),
        (lambda f: (f / "model.json").write_text("{"), "the file is not JSON"),
        (lambda f: (f / "model.json").write_text("[]"), "not a model.json of a format that is known"),
        (lambda f: edit(f, lambda c: c.update(format=2)), "not a model.json of a format that is known"),
        (lambda f: edit(f, lambda c: c.pop("classes")), "lacks or garbles classes"),
        (lambda f: edit(f, lambda c: c.update(kept=[1])), "lacks or garbles"),
        (lambda f: edit(f, lambda c: c.update(arguments={"wide": 1})), "the factory failed"),
        (lambda f: edit(f, lambda c: c.update(classes=["a", "b"])), "the weights do not fit the factory"),
        (lambda f: edit(f, lambda c: c.update(factory="nss.zoo:resnet20")), "the weights do not fit the factory"),
        (lambda f: edit(f, lambda c: c.update(factory="nss.zoo:alexnet")), "the factory does not exist"),
        (lambda f: edit(f, lambda c: c.update(kept={"conv9": [0]})), "keeps channels of 'conv9'"),
        (lambda f: edit(f, lambda c: c.update(kept={"conv1": [0, 16]})), "keeps channels of 'conv1'"),
        (reshape, "the weights do not fit the factory: network.conv1.weight"),
    ],
)
def test_a_folder_that_is_not_what_it_was_is_refused(
    folder: Path, damage: Callable[[Path], object], message: str
) -> None:
    damage(folder)
    with pytest.raises(ModelError, match=message) as caught:
        load_model(folder)
    assert caught.value.where or "model.json" in caught.value.what


@pytest.mark.parametrize("indices", [["a"], [1.5], "01", [], [-1], [0, 0]])
def test_kept_channels_that_are_no_indices_are_refused(folder: Path, indices: object) -> None:
    edit(folder, lambda content: content.update(kept={"conv1": indices}))
    with pytest.raises(NssError):
        load_model(folder)


def test_a_file_in_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model").write_text("no folder")
    with pytest.raises(ModelError):
        load_model(tmp_path / "model")


def test_a_pickle_named_safetensors_is_refused_and_never_unpickled(folder: Path, tmp_path: Path) -> None:
    trap = tmp_path / "unpickled"

    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (Path.touch, (trap,))

    for content in (pickle.dumps(Evil()), None):
        if content is None:
            torch.save({"a": Evil()}, folder / "model.safetensors")
        else:
            (folder / "model.safetensors").write_bytes(content)
        weights = files.file_digest(folder / "model.safetensors")
        edit(folder, lambda c, weights=weights: c.update(weights=weights))
        with pytest.raises(ModelError, match="not a whole safetensors file"):
            load_model(folder)
    assert not trap.exists()


@pytest.fixture
def tripwire(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A module on sys.path that leaves a file behind when it is imported."""
    proof = tmp_path / "imported"
    for name in ("trap_factory", "nss_zoo_trap"):
        (tmp_path / f"{name}.py").write_text(
            f"open({str(proof)!r}, 'w').close()\ndef make(num_classes):\n    return 1\n"
        )
    monkeypatch.syspath_prepend(str(tmp_path))
    return proof


@pytest.mark.parametrize("factory", ["trap_factory:make", "trap_factory", "nss.zoo_trap:make", ":make", "os:system"])
def test_a_factory_that_is_not_allowed_is_refused_before_it_is_imported(
    folder: Path, tripwire: Path, factory: str
) -> None:
    edit(folder, lambda content: content.update(factory=factory))
    with pytest.raises(ModelError, match="not from an allowed package") as caught:
        load_model(folder, allow=["trap_fact"])
    assert not tripwire.exists()
    assert "nss.zoo, torchvision.models, trap_fact" in caught.value.allowed
    with pytest.raises(ModelError, match="not from an allowed package"):
        build_model(factory, ("a", "b"), (1, 8, 8), 0)
    assert not tripwire.exists()


def test_an_allowed_factory_is_imported_and_must_return_a_module(tripwire: Path) -> None:
    with pytest.raises(ModelError, match="the factory returned int"):
        build_model("trap_factory:make", ("a", "b"), (1, 8, 8), 0, allow=["trap_factory"])
    assert tripwire.exists()


@pytest.mark.parametrize("kind", ["module", "package"])
def test_what_hides_a_package_that_a_factory_is_looked_for_in_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    name = f"hiding_{kind}"
    place = tmp_path / f"{name}.py" if kind == "module" else tmp_path / name
    if kind == "package":
        place.mkdir()
    (place if kind == "module" else place / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModelError, match="the factory does not exist: No module named") as error:
        build_model(f"{name}.deeper:Net", ("a", "b"), (1, 8, 8), 0, allow=[name])
    assert error.value.fix.startswith(f"`{name}` is {place} here: check what follows it")


def test_a_package_that_is_not_there_hides_nothing() -> None:
    with pytest.raises(ModelError, match="the factory does not exist") as error:
        build_model("no_such_package.nets:Net", ("a", "b"), (1, 8, 8), 0, allow=["no_such_package"])
    assert error.value.fix == "put no_such_package beside params.yaml, or install its package"


def test_what_a_factorys_module_imports_in_vain_is_told_from_the_module(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "importing_nets.py").write_text("import no_such_layers\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModelError, match=r"importing_nets imports no_such_(.|\n)*fix: pip install no_such_layers"):
        build_model("importing_nets:Net", ("a", "b"), (1, 8, 8), 0, allow=["importing_nets"])


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        ("nss.zoo:alexnet", "does not exist"),
        ("nss.zoo.deeper:lenet", "does not exist"),
        ("nss.zoo", "does not exist"),
        ("nss.zoo:torch", "nss.zoo:torch"),  # a module that the factory's module happens to import
        ("nss.zoo:__doc__", "nss.zoo:__doc__"),
        ("nss.zoo:OrderedDict", "nss.zoo:OrderedDict"),
    ],
)
def test_a_factory_that_is_none_is_refused(factory: str, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        build_model(factory, ("a", "b"), (1, 8, 8), 0)


@pytest.mark.parametrize("classes", [("a",), (), ("a", "a")])
def test_fewer_than_two_different_classes_are_refused(classes: tuple[str, ...]) -> None:
    with pytest.raises(ModelError, match="at least two different names"):
        build_model("nss.zoo:lenet", classes, (1, 8, 8), 0)


@pytest.mark.parametrize("pixels", [{"mean": (0.1, 0.2)}, {"std": (0.1, 0.2, 0.3)}, {"std": (0.0,)}, {"std": (-1.0,)}])
def test_pixel_statistics_that_do_not_fit_the_image_are_refused(pixels: dict[str, tuple[float, ...]]) -> None:
    with pytest.raises(ModelError):
        build_model("nss.zoo:lenet", ("a", "b"), (1, 8, 8), 0, **pixels)


def test_a_module_that_does_not_say_how_it_is_built_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="Linear does not say how it is built") as caught:
        save_model(nn.Linear(1, 1), tmp_path / "m")
    assert "nss.build_model" in caught.value.fix
    assert not (tmp_path / "m").exists()


def test_a_masked_view_is_refused_when_saved_or_loads_equal(tmp_path: Path, networks: ModuleType) -> None:
    """A folder that cannot be loaded is noticed when it is written, not when the model is gone."""
    view = sliced(networks.zoo_model("lenet"), {"conv1": torch.arange(16) < 4})
    try:
        save_model(view, tmp_path / "m")
    except ModelError:
        assert not (tmp_path / "m").exists()
        return
    images = networks.pictures(4)
    assert torch.equal(load_model(tmp_path / "m")(images), view(images))


def test_a_digest_names_names_shapes_types_and_bytes() -> None:
    network = nn.Linear(2, 3)
    digest = model_digest(network)
    assert len(digest) == 32
    twin = nn.Linear(2, 3)
    twin.load_state_dict(network.state_dict())
    assert model_digest(twin) == digest
    assert model_digest(nn.Sequential(twin)) != digest
    assert model_digest(twin.double()) != digest
    with torch.no_grad():
        network.bias[1] += 1e-6
    assert model_digest(network) != digest


def test_buffers_belong_to_the_digest() -> None:
    norm = nn.BatchNorm2d(2)
    before = model_digest(norm)
    norm.running_mean[0] = 1
    assert model_digest(norm) != before


def test_helpers_see_through_the_classifier(networks: ModuleType) -> None:
    model = networks.zoo_model("lenet")
    assert network_of(model) is model.network
    plain = networks.Residual()
    assert network_of(plain) is plain
    assert shape_of(model, None) == networks.SHAPE
    assert shape_of(model, [3, 4, 5]) == (3, 4, 5)
    twin = with_network(model, plain, parent="x")
    assert isinstance(twin, Classifier)
    assert (twin.network, twin.spec.parent) == (plain, "x")
    own, copied = model.normalise, twin.normalise
    assert (copied.mean.item(), copied.std.item(), copied.layout) == (0.5, own.std.item(), own.layout)
    assert with_network(plain, model) is model


def test_a_model_with_weights_of_its_own_changes_its_precision_alone_and_a_view_with_the_model(
    networks: ModuleType,
) -> None:
    model, images = networks.zoo_model("lenet"), networks.pictures(4)
    view, wanted = sliced(model, {"conv1": torch.arange(16) < 4}), model(images)
    prune_weights(model, sparsity=0.5).double()
    remove(model, {"conv1": torch.arange(16) < 4}).double()
    assert torch.equal(model(images), wanted)
    assert view(images).dtype == torch.float32
    model.double()
    assert (model(images).dtype, view(images).dtype) == (torch.float64, torch.float64)
    view.float()
    assert torch.equal(model(images), wanted)
