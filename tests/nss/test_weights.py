"""Weights from elsewhere: each in its place, or refused by name; and nothing in a file is ever run."""

from __future__ import annotations

import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from nss.errors import ModelError
from nss.model import Classifier, build_model, model_digest
from nss.weights import fill


def lenet(seed: int, classes: int = 3) -> Classifier:
    return build_model("nss.zoo:lenet", [str(each) for each in range(classes)], (1, 8, 8), seed)


def vgg(seed: int) -> Classifier:
    return build_model("nss.zoo:vgg_small", ["a", "b"], (1, 8, 8), seed)


@pytest.fixture(scope="module")
def trained() -> Classifier:
    return lenet(1)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"state_dict": state, "epoch": 3, "optimizer": {"lr": 0.1}},
        lambda state: {"model": {"model_state_dict": state}},
        lambda state: {f"module.{name}": value for name, value in state.items()},
        lambda state: {"state_dict": {f"model.module.{name}": value for name, value in state.items()}},
    ],
    ids=["plain", "checkpoint", "nested", "parallel", "lightning"],
)
def test_a_pt_file_gives_every_weight_however_it_was_wrapped(trained: Classifier, tmp_path: Path, wrap) -> None:
    torch.save(wrap(trained.network.state_dict()), tmp_path / "w.pt")
    assert model_digest(fill(lenet(2), tmp_path / "w.pt")) == model_digest(trained)


def test_safetensors_give_every_weight(trained: Classifier, tmp_path: Path) -> None:
    state = {name: value.contiguous() for name, value in trained.network.state_dict().items()}
    save_file(state, tmp_path / "w.safetensors")
    filled = fill(lenet(2), str(tmp_path / "w.safetensors"))
    assert model_digest(filled) == model_digest(trained)
    assert not filled.training


def test_norms_without_a_counter_of_batches_are_filled_too(tmp_path: Path) -> None:
    state = {name: value for name, value in vgg(1).network.state_dict().items() if "num_batches" not in name}
    torch.save(state, tmp_path / "old.pth")
    filled = fill(vgg(2), tmp_path / "old.pth")
    assert all(torch.equal(filled.network.state_dict()[name], value) for name, value in state.items())


def refused(model: Classifier, path: Path) -> str:
    before = model_digest(model)
    with pytest.raises(ModelError) as caught:
        fill(model, path)
    assert model_digest(model) == before
    assert str(path) in str(caught.value)
    return caught.value.what


def test_what_does_not_fit_is_named(trained: Classifier, tmp_path: Path) -> None:
    state = dict(trained.network.state_dict())
    del state["conv1.bias"]
    state["extra.weight"] = torch.zeros(2)
    torch.save(state, tmp_path / "w.pt")
    what = refused(lenet(2, classes=4), tmp_path / "w.pt")
    assert "missing conv1.bias;" in what
    assert "not of this network extra.weight;" in what
    assert "fc3.weight [3, 84] instead of [4, 84], fc3.bias [3] instead of [4]" in what


def test_weights_of_another_network_are_summed_up(tmp_path: Path) -> None:
    torch.save(vgg(1).network.state_dict(), tmp_path / "w.pt")
    assert " more" in refused(lenet(2), tmp_path / "w.pt")


class Evil:
    """Runs code when it is loaded without care."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.mark,))


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_code_in_a_file_is_refused_and_never_run(tmp_path: Path, suffix: str) -> None:
    mark, path = tmp_path / "run", tmp_path / f"w{suffix}"
    torch.save({"state_dict": OrderedDict(), "code": Evil(mark)}, path)
    refused(lenet(2), path)
    path.write_bytes(pickle.dumps(Evil(mark), 2))
    refused(lenet(2), path)
    assert not mark.exists()


def test_a_whole_module_is_refused_with_what_to_save_instead(trained: Classifier, tmp_path: Path) -> None:
    torch.save(trained.network, tmp_path / "w.pt")
    assert "may run code" in refused(lenet(2), tmp_path / "w.pt")


@pytest.mark.parametrize("content", [b"", b"no weights", b"PK\x03\x04 half a zip"])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_damaged_file_is_refused(tmp_path: Path, content: bytes, suffix: str) -> None:
    path = tmp_path / f"w{suffix}"
    path.write_bytes(content)
    refused(lenet(2), path)


def test_other_content_says_what_was_found(tmp_path: Path) -> None:
    torch.save({"epoch": 3, "loss": 0.1}, tmp_path / "w.pt")
    assert "a dict with epoch, loss, no state dict" in refused(lenet(2), tmp_path / "w.pt")
    torch.save([torch.zeros(2)], tmp_path / "l.pt")
    assert "a list, no state dict" in refused(lenet(2), tmp_path / "l.pt")


def test_a_missing_file_and_another_kind_are_named(tmp_path: Path) -> None:
    assert refused(lenet(2), tmp_path / "w.pt") == "there is no such file"
    assert refused(lenet(2), tmp_path / "w.h5") == "w.h5 is no file of weights"
