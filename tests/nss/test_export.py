"""Exports: the model's logits on real images at any batch size, and nothing on disk when they are not."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from types import ModuleType

import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from nss import export
from nss.data import load_data
from nss.errors import ExportError
from nss.export import check_export, export_onnx, export_program, load_export
from nss.ingest import demo
from nss.model import Classifier, build_model, model_digest, network_of
from nss.prune_weights import prune_weights
from nss.remove import remove
from nss.size import count_parameters
from nss.sliced import sliced

DIGITS = tuple("0123456789")
SHAPE = (1, 8, 8)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Tensor:
    """The first 256 test images of the digits."""
    folder = tmp_path_factory.mktemp("digits") / "data"
    demo(folder)
    return load_data(folder).split("test").images[:256]


@pytest.fixture(scope="module")
def make(networks: ModuleType) -> Callable[[str], Classifier]:
    """Give a function that builds a network for the digits with lived-in norms, cut to about half its neurons."""

    def build(factory: str) -> Classifier:
        model = build_model(factory, DIGITS, SHAPE, seed=0, mean=(0.31,), std=(0.38,))
        networks.randomise(model, 0)
        return remove(model.eval(), networks.coupled_masks(network_of(model), SHAPE, seed=1))

    return build


@pytest.fixture(scope="module")
def model(make: Callable[[str], Classifier]) -> Classifier:
    return make("nss.zoo:lenet")


@pytest.fixture(scope="module")
def files(model: Classifier, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """`model` in both formats, by suffix."""
    folder = tmp_path_factory.mktemp("exports")
    paths = {suffix: folder / f"model{suffix}" for suffix in (".onnx", ".pt2")}
    assert export_onnx(model, paths[".onnx"]) == export_program(model, paths[".pt2"]) == {}
    return paths


def logits(model: nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad():
        return copy.deepcopy(model).eval()(images)


def run_onnx(path: Path, images: Tensor, size: int) -> Tensor:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return torch.cat(
        [torch.from_numpy(session.run(None, {"images": batch.numpy()})[0]) for batch in images.split(size)]
    )


def run_program(path: Path, images: Tensor, size: int) -> Tensor:
    program = torch.export.load(path).module()
    return torch.cat([program(batch).detach() for batch in images.split(size)])


RUN = {".onnx": run_onnx, ".pt2": run_program}
EXPORT = {".onnx": export_onnx, ".pt2": export_program}
MAKES = {".onnx": "_onnx_bytes", ".pt2": "_program_bytes"}


@pytest.mark.parametrize("size", [1, 7, 64])
@pytest.mark.parametrize("suffix", RUN)
def test_a_cut_lenet_answers_alike_in_batches_of(
    suffix: str, size: int, files: dict[str, Path], model: Classifier, images: Tensor
) -> None:
    assert len(images) == 256
    assert (RUN[suffix](files[suffix], images, size) - logits(model, images)).abs().max() <= 1e-4


@pytest.mark.parametrize("factory", ["nss.zoo:vgg_small", "nss.zoo:resnet20", "nss.zoo:mobilenet_small"])
def test_cut_zoo_networks_answer_alike_and_the_difference_is_told(
    factory: str, make: Callable[[str], Classifier], images: Tensor, tmp_path: Path
) -> None:
    model, path = make(factory), tmp_path / "model.onnx"
    found = export_onnx(model, path, images)
    wanted = logits(model, images)
    assert list(found) == [1, 7, 64]
    for size, difference in found.items():
        assert difference <= 1e-4
        assert difference == pytest.approx(float((run_onnx(path, images, size) - wanted).abs().max()), abs=2e-5)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(("name", "suffix"), [("resnet18", ".onnx"), ("mobilenet_v2", ".pt2")])
def test_torchvision_networks_answer_alike(name: str, suffix: str, networks: ModuleType, tmp_path: Path) -> None:
    model = build_model(f"torchvision.models:{name}", DIGITS, (3, 32, 32), seed=0)
    networks.randomise(model, 0)
    path, pictures = tmp_path / f"model{suffix}", networks.pictures(9, (3, 32, 32))
    EXPORT[suffix](model, path)
    wanted = logits(model, pictures)
    for size in (1, 7):
        assert (RUN[suffix](path, pictures, size) - wanted).abs().max() <= 1e-4 * wanted.abs().max().clamp_min(1)


def test_masked_weights_are_exported_as_zeros(model: Classifier, images: Tensor, tmp_path: Path) -> None:
    pruned = prune_weights(model, sparsity=0.6)
    path = tmp_path / "model.onnx"
    assert max(export_onnx(pruned, path, images).values()) <= 1e-4
    arrays = [onnx.numpy_helper.to_array(each) for each in onnx.load(path).graph.initializer]
    zeros = sum(int((array == 0).sum()) for array in arrays if array.ndim > 1)
    weights = sum(tensor.numel() for tensor in pruned.parameters() if tensor.ndim > 1)
    assert zeros >= 0.6 * weights - 1
    assert sum(array.size for array in arrays if array.ndim in (2, 4)) == weights


@pytest.mark.parametrize("suffix", RUN)
def test_the_memory_format_makes_no_difference(suffix: str, model: Classifier, images: Tensor, tmp_path: Path) -> None:
    other = copy.deepcopy(model).to(memory_format=torch.contiguous_format)
    assert other.network.conv2.weight.is_contiguous()
    assert not model.network.conv2.weight.is_contiguous()
    path = tmp_path / f"model{suffix}"
    assert max(EXPORT[suffix](other, path, images).values()) <= 1e-4


def test_the_model_is_left_as_it_was(model: Classifier, tmp_path: Path) -> None:
    mine = copy.deepcopy(model).train()
    mine.network.relu1.eval()
    modes = [module.training for module in mine.modules()]
    export_program(mine, tmp_path / "model.pt2")
    assert [module.training for module in mine.modules()] == modes
    assert model_digest(mine) == model_digest(model)


def test_batch_statistics_are_those_of_evaluation(
    make: Callable[[str], Classifier], images: Tensor, tmp_path: Path
) -> None:
    model, path = make("nss.zoo:mobilenet_small").train(), tmp_path / "model.pt2"
    export_program(model, path)
    assert (run_program(path, images, 64) - logits(model, images)).abs().max() <= 1e-4
    assert (model(images) - logits(model, images)).abs().max() > 0.1


def test_both_files_say_what_they_take_and_answer(files: dict[str, Path], model: Classifier) -> None:
    session = onnxruntime.InferenceSession(str(files[".onnx"]), providers=["CPUExecutionProvider"])
    (taken,), (answered,) = session.get_inputs(), session.get_outputs()
    assert (taken.name, taken.type, taken.shape) == ("images", "tensor(uint8)", ["batch", *SHAPE])
    assert (answered.name, answered.type, answered.shape) == ("logits", "tensor(float)", ["batch", 10])
    extra = {"nss": ""}
    torch.export.load(files[".pt2"], extra_files=extra)
    said = json.loads(session.get_modelmeta().custom_metadata_map["nss"])
    assert said == json.loads(extra["nss"])
    assert said["classes"] == list(DIGITS)
    assert said["input"] == {"name": "images", "dtype": "uint8", "shape": ["batch", 1, 8, 8], "values": "0..255"}
    assert said["output"] == {"name": "logits", "dtype": "float32", "shape": ["batch", 10]}
    assert (said["factory"], said["model"]) == ("nss.zoo:lenet", model_digest(model))


@pytest.mark.parametrize("suffix", RUN)
def test_the_file_names_the_model_that_was_exported_masks_and_all(
    suffix: str, model: Classifier, tmp_path: Path
) -> None:
    pruned, path = prune_weights(model, sparsity=0.5), tmp_path / f"model{suffix}"
    EXPORT[suffix](pruned, path)
    if suffix == ".pt2":
        extra = {"nss": ""}
        torch.export.load(path, extra_files=extra)
    else:
        extra = {each.key: each.value for each in onnx.load(path).metadata_props}
    assert json.loads(extra["nss"])["model"] == model_digest(pruned)


def test_onnx_holds_as_many_weights_as_the_cut_model(files: dict[str, Path], model: Classifier) -> None:
    arrays = [onnx.numpy_helper.to_array(each) for each in onnx.load(files[".onnx"]).graph.initializer]
    held = sum(array.size for array in arrays if array.dtype == "float32")
    # Mean, standard deviation and 255 come on top.
    assert held == count_parameters(model) + 3


@pytest.mark.parametrize("suffix", RUN)
def test_the_same_model_gives_the_same_bytes_under_any_name(
    suffix: str, files: dict[str, Path], model: Classifier, tmp_path: Path
) -> None:
    other = tmp_path / f"another{suffix}"
    EXPORT[suffix](model, other)
    assert other.read_bytes() == files[suffix].read_bytes()


@pytest.mark.parametrize("suffix", RUN)
def test_no_path_of_this_machine_is_in_the_file(suffix: str, files: dict[str, Path]) -> None:
    content = files[suffix].read_bytes()
    assert b"conv2" in content
    for words in (b".py", b"site-packages", str(Path(__file__).parents[2]).encode()):
        assert words not in content


def test_a_program_runs_where_nss_cannot_be_imported(files: dict[str, Path], model: Classifier, images: Tensor) -> None:
    code = """
import json, sys
sys.modules["nss"] = None
import torch
program = torch.export.load(sys.argv[1]).module()
print(json.dumps(program(torch.arange(192, dtype=torch.uint8).view(3, 1, 8, 8)).tolist()))
"""
    command = [sys.executable, "-c", code, str(files[".pt2"])]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=files[".pt2"].parent)
    assert done.returncode == 0, done.stderr
    wanted = logits(model, torch.arange(192, dtype=torch.uint8).view(3, 1, 8, 8))
    assert (torch.tensor(json.loads(done.stdout)) - wanted).abs().max() <= 1e-4


def refused(model: nn.Module, path: Path, suffix: str, *rest: Tensor) -> ExportError:
    """What an export says that must leave everything as it is."""
    before = {each: each.read_bytes() for each in path.parent.rglob("*") if each.is_file()}
    with pytest.raises(ExportError) as caught:
        EXPORT[suffix](model, path, *rest)
    assert {each: each.read_bytes() for each in path.parent.rglob("*") if each.is_file()} == before
    return caught.value


@pytest.mark.parametrize("suffix", RUN)
def test_what_cannot_be_exported_is_refused_with_the_remedy(suffix: str, model: Classifier, tmp_path: Path) -> None:
    path = tmp_path / f"model{suffix}"
    view = sliced(model, {"conv1": torch.arange(len(model.network.conv1.weight)) < 3})
    assert "nss.remove" in refused(view, path, suffix).fix
    assert "nss.build_model" in refused(model.network, path, suffix).fix
    half = refused(copy.deepcopy(model).half(), path, suffix)
    assert ("torch.float16" in half.what, half.fix) == (True, "export model.float()")
    assert "ending in" in refused(model, tmp_path / "model.bin", suffix).allowed
    (tmp_path / f"folder{suffix}").mkdir()
    assert "ending in" in refused(model, tmp_path / f"folder{suffix}", suffix).allowed


def test_a_network_that_branches_on_its_input_is_refused(networks: ModuleType, tmp_path: Path) -> None:
    model = build_model("tiny_networks:Branching", DIGITS, SHAPE, 0, allow=["tiny_networks"])
    error = refused(model, tmp_path / "model.pt2", ".pt2")
    assert "cannot export" in error.what
    assert error.where == "tiny_networks:Branching"
    assert "branch" in error.fix


def test_a_place_that_cannot_be_written_is_a_message(model: Classifier, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "cannot be written" in refused(model, tmp_path / "file" / "model.pt2", ".pt2").what


def test_weights_beyond_what_one_onnx_file_holds_are_refused(
    model: Classifier, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export, "ONNX_LIMIT", 4 * count_parameters(model) - 1)
    assert ".pt2" in refused(model, tmp_path / "model.onnx", ".onnx").fix


@pytest.mark.parametrize("package", ["onnx", "onnxscript"])
def test_a_missing_package_is_named_with_the_command_that_installs_it(
    package: str, model: Classifier, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    error = refused(model, tmp_path / "model.onnx", ".onnx")
    assert (f"package {package}," in error.what, error.fix) == (True, "pip install onnx onnxscript onnxruntime")


def test_without_onnxruntime_nothing_can_be_checked(
    files: dict[str, Path], model: Classifier, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ExportError, match="package onnxruntime"):
        check_export(model, files[".onnx"], images)
    assert check_export(model, files[".pt2"], images)


def changed(model: Classifier, by: float) -> Classifier:
    """A copy of which one logit is larger by `by`."""
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.network.fc3.bias[4] += by
    return twin


@pytest.mark.parametrize("suffix", RUN)
def test_a_wrong_export_is_an_error_that_says_by_how_much(
    suffix: str, files: dict[str, Path], model: Classifier, images: Tensor
) -> None:
    assert list(check_export(model, files[suffix], images, (2,))) == [2]
    with pytest.raises(ExportError, match=r"a logit by 0\.25 in batches of") as caught:
        check_export(changed(model, 0.25), files[suffix], images)
    assert (caught.value.where, caught.value.allowed) == (str(files[suffix]), "at most 0.0001")
    assert max(check_export(changed(model, 0.25), files[suffix], images, tolerance=0.26).values()) > 0.249
    with pytest.raises(ExportError, match="a logit by nan"):
        check_export(changed(model, float("nan")), files[suffix], images)


@pytest.mark.parametrize("suffix", RUN)
@pytest.mark.parametrize("there", [False, True], ids=["new", "in the place of another"])
def test_a_wrong_export_leaves_no_file_behind(
    there: bool,
    suffix: str,
    files: dict[str, Path],
    model: Classifier,
    images: Tensor,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(export, MAKES[suffix], lambda *_: files[suffix].read_bytes())
    path = tmp_path / f"model{suffix}"
    if there:
        path.write_bytes(b"before")
    error = refused(changed(model, 1.0), path, suffix, images)
    assert ("differently: a logit by 1 " in error.what, error.where) == (True, str(path))
    assert list(tmp_path.iterdir()) == [path] * there


@pytest.mark.filterwarnings("ignore:No complete tensor found")
def test_an_export_that_takes_one_batch_size_only_is_noticed(
    model: Classifier, images: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def freeze(twin: Classifier, _: str) -> bytes:
        buffer = BytesIO()
        torch.export.save(torch.export.export(twin, (images[:7],)), buffer)
        return buffer.getvalue()

    monkeypatch.setattr(export, "_program_bytes", freeze)
    assert "fails on a batch of 1:" in refused(model, tmp_path / "model.pt2", ".pt2", images).what


def test_an_export_with_other_classes_is_noticed(files: dict[str, Path], images: Tensor) -> None:
    other = build_model("nss.zoo:lenet", ["a", "b"], SHAPE, seed=0)
    with pytest.raises(ExportError, match=r"answers \[1, 10\]") as caught:
        check_export(other, files[".pt2"], images)
    assert caught.value.allowed == "[1, 2]"


def test_few_images_are_repeated_to_fill_the_largest_batch(
    files: dict[str, Path], model: Classifier, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Tensor] = []
    monkeypatch.setattr(export, "load_export", lambda path: lambda batch: [seen.append(batch), logits(model, batch)][1])
    check_export(model, files[".pt2"], images[:5], (1, 12))
    assert [len(batch) for batch in seen] == [1, 1, 1, 1, 1, 12]
    assert torch.equal(seen[-1], torch.cat([images[:5], images[:5], images[:2]]))


@pytest.mark.parametrize("wrong", ["none", "floats", "other shape", "no batch"])
def test_images_that_do_not_fit_are_refused(
    wrong: str, files: dict[str, Path], model: Classifier, images: Tensor
) -> None:
    given = {"none": images[:0], "floats": images / 255, "other shape": images[..., :4], "no batch": images[0]}[wrong]
    with pytest.raises(ExportError, match="the images to check with are") as caught:
        check_export(model, files[".pt2"], given)
    assert caught.value.allowed == "uint8 [n, 1, 8, 8]"


@pytest.mark.parametrize("suffix", RUN)
def test_a_loaded_export_is_a_function_of_images(
    suffix: str, files: dict[str, Path], model: Classifier, images: Tensor
) -> None:
    run = load_export(files[suffix])
    assert (run(images[:3]).detach() - logits(model, images[:3])).abs().max() <= 1e-4


@pytest.mark.parametrize("suffix", RUN)
def test_what_is_no_export_is_a_message(suffix: str, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="is missing"):
        load_export(tmp_path / f"model{suffix}")
    (tmp_path / f"model{suffix}").write_bytes(b"not at all")
    with pytest.raises(ExportError, match="cannot be read"):
        load_export(tmp_path / f"model{suffix}")
    with pytest.raises(ExportError, match="is no export"):
        load_export(tmp_path / "model.bin")
