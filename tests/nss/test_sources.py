"""Readers of arrays: .npz, idx files and torchvision; each refuses what it cannot take over exactly, by name."""

from __future__ import annotations

import gzip
import struct
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torchvision

from nss import sources
from nss.data import load_data
from nss.errors import DataError
from nss.ingest import add_batch
from nss.sources import FASHION, TORCHVISION, read_source

Make = Callable[..., Any]
X = np.random.default_rng(0).integers(0, 256, (4, 5, 6), np.uint8)
Y = np.array([0, 1, 1, 0])


def npz(folder: Path, **arrays: Any) -> Path:
    np.savez(folder / "in.npz", **arrays)
    return folder / "in.npz"


def idx(array: np.ndarray) -> bytes:
    header = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    return header + array.astype(np.uint8).tobytes()


def idx_folder(folder: Path, pack: Callable[[bytes], bytes] = gzip.compress, ending: str = ".gz") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for part, rows in (("train", slice(0, 3)), ("t10k", slice(3, 4))):
        (folder / f"{part}-images-idx3-ubyte{ending}").write_bytes(pack(idx(X[rows])))
        (folder / f"{part}-labels-idx1-ubyte{ending}").write_bytes(pack(idx(Y[rows])))
    return folder


# .npz


@pytest.mark.parametrize(
    ("x", "expected"),
    [
        (X, X[:, None]),
        (X[..., None], X[:, None]),
        (X[:, None], X[:, None]),
        (np.stack([X, X + 1, X + 2], -1), np.stack([X, X + 1, X + 2], 1)),
        (np.stack([X, X + 1, X + 2], 1), np.stack([X, X + 1, X + 2], 1)),
        (X[:, :3, :3], X[:, None, :3, :3]),
        (np.asfortranarray(X), X[:, None]),
    ],
    ids=["nhw", "nhw1", "n1hw", "nhw3", "n3hw", "small", "fortran"],
)
def test_images_are_read_in_each_order_of_axes(tmp_path: Path, x: np.ndarray, expected: np.ndarray) -> None:
    add_batch(tmp_path / "data", npz(tmp_path, x=x, y=Y))
    np.testing.assert_array_equal(load_data(tmp_path / "data").images, expected)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_floats_in_0_to_1_become_the_nearest_of_256_levels(tmp_path: Path, dtype: type) -> None:
    levels = np.arange(256).reshape(4, 8, 8)
    add_batch(tmp_path / "data", npz(tmp_path, x=(levels / 255).astype(dtype), y=Y))
    np.testing.assert_array_equal(load_data(tmp_path / "data").images[:, 0], levels)


def test_without_names_each_label_is_its_own_name_in_the_order_of_the_numbers(tmp_path: Path) -> None:
    add_batch(tmp_path / "data", npz(tmp_path, x=X, y=np.array([[10], [2], [2], [7]], np.uint8)))
    data = load_data(tmp_path / "data")
    assert (data.classes, data.labels.tolist()) == (("2", "7", "10"), [2, 0, 0, 1])


def test_an_array_of_names_gives_the_order_of_a_new_data_set(tmp_path: Path) -> None:
    add_batch(tmp_path / "data", npz(tmp_path, x=X, y=Y, classes=["zebra", "ape"]))
    data = load_data(tmp_path / "data")
    assert (data.classes, data.labels.tolist()) == (("zebra", "ape"), [0, 1, 1, 0])


def test_labels_of_a_later_batch_go_by_name_and_may_list_known_classes_without_images(tmp_path: Path) -> None:
    add_batch(tmp_path / "data", npz(tmp_path, x=X, y=Y, classes=["zebra", "ape"]))
    add_batch(tmp_path / "data", npz(tmp_path, x=255 - X, y=Y * 0 + 1, classes=["ape", "zebra"]))
    assert load_data(tmp_path / "data").batches[1].labels.tolist() == [0, 0, 0, 0]


def test_the_test_arrays_are_the_test_split(tmp_path: Path) -> None:
    add_batch(tmp_path / "data", npz(tmp_path, x_train=X, y_train=Y, x_test=255 - X, y_test=Y))
    data = load_data(tmp_path / "data")
    np.testing.assert_array_equal(data.split("test").images[:, 0], 255 - X)


def with_values(*values: float) -> np.ndarray:
    images = X / 255
    images[2, 0, : len(values)] = values
    return images


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": with_values(np.nan, 9)}, "x: 1 images hold NaN, first image 2"),
        ({"x": with_values(1.001)}, r"x: 1 images hold values outside 0\.\.1, first image 2"),
        ({"x": with_values(-np.inf)}, r"outside 0\.\.1, first image 2"),
        ({"x": X.astype(np.uint16)}, "x: dtype uint16; allowed: uint8, or floats"),
        ({"x": X.astype(np.int64)}, "x: dtype int64"),
        ({"x": X > 9}, "x: dtype bool"),
        ({"x": X[0]}, r"x: shape \[5, 6\]; allowed"),
        ({"x": X[:0]}, r"x: shape \[0, 5, 6\]; allowed: .*not empty"),
        ({"x": np.stack([X] * 4, -1)}, r"shape \[4, 5, 6, 4\] does not say where its channels are"),
        ({"x": np.zeros((4, 3, 5, 3), np.uint8)}, "does not say where its channels are"),
        ({"x": X[:3]}, "x: 3 images, but 4 labels in y"),
        ({"y": Y - 1}, "y: 2 images have an unknown label, first -1 of image 0; allowed: 0 and above"),
        ({"y": Y.astype(np.float64)}, "y: float64"),
        ({"y": np.stack([Y, Y], 1)}, r"y: int64 \[4, 2\]; allowed: whole numbers \[n\]"),
        ({"y": Y + 1, "classes": ["a", "b"]}, r"unknown label, first 2 of image 1; allowed: 0\.\.1"),
        ({"classes": ["a", "b", "c"]}, "class 'c' is listed, but no image has it"),
        ({"classes": ["a", "a"]}, "classes: 'a' is listed twice"),
        ({"classes": ["a", " b"]}, "classes: class name ' b' has space around it"),
        ({"classes": [1, 2]}, r"classes: int64 \[2\]; allowed: a list of texts"),
    ],
)
def test_a_wrong_array_is_refused_by_name(
    tmp_path: Path, problems_of: Make, arrays: dict[str, Any], message: str
) -> None:
    (problem,) = problems_of(tmp_path / "data", npz(tmp_path, **({"x": X, "y": Y} | arrays)))
    with pytest.raises(DataError, match=message):
        raise DataError(problem)


def test_all_wrong_arrays_are_listed_together(tmp_path: Path, problems_of: Make) -> None:
    path = npz(tmp_path, x_train=with_values(np.nan), y_train=Y - 5, x_test=X > 9, y_test=Y, classes=[1])
    found = problems_of(tmp_path / "data", path)
    assert {problem.split(":")[0] for problem in found} == {"x_train", "y_train", "x_test", "classes"}


def test_train_and_test_arrays_of_different_sizes_are_refused(tmp_path: Path, problems_of: Make) -> None:
    path = npz(tmp_path, x_train=X[:2, :4], y_train=Y[:2], x_test=X, y_test=Y)
    (problem,) = problems_of(tmp_path / "data", path)
    assert problem.startswith("x_train: the image is 4 x 6, those of the data set are 5 x 6")


@pytest.mark.parametrize("names", [("x",), ("x_train", "y_train"), ("x", "y", "x_holdout", "y_holdout"), ()])
def test_an_unknown_split_or_a_missing_array_is_refused_with_what_is_allowed(
    tmp_path: Path, names: tuple[str, ...]
) -> None:
    path = npz(tmp_path, **{name: X if name.startswith("x") else Y for name in names})
    with pytest.raises(DataError, match=r"unknown(.|\n)*allowed: x, y or x_train, y_train, x_test, y_test"):
        add_batch(tmp_path / "data", path)


class Trap:
    def __reduce__(self) -> tuple[Any, ...]:
        return (pytest.fail, ("a pickle was loaded",))


def test_python_objects_in_an_npz_are_never_unpickled(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="never unpickled"):
        add_batch(tmp_path / "data", npz(tmp_path, x=np.array([Trap()], dtype=object), y=Y))


def test_a_file_that_is_no_whole_npz_is_refused(tmp_path: Path) -> None:
    path = npz(tmp_path, x=X, y=Y)
    whole = path.read_bytes()
    for content in (b"", b"text", whole[: len(whole) // 2]):
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"not a whole \.npz"):
            read_source(path)
    path.write_bytes(whole.replace(X.tobytes(), (255 - X).tobytes()))
    with pytest.raises(DataError, match=r"cannot be read .*CRC"):
        read_source(path)


def test_a_member_of_an_npz_that_is_no_array_is_refused(tmp_path: Path) -> None:
    path = npz(tmp_path, x=X, y=Y)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("notes.txt", "mine")
    with pytest.raises(DataError, match=r"notes\.txt in the file is no array"):
        read_source(path)


# idx


@pytest.mark.parametrize(("pack", "ending"), [(gzip.compress, ".gz"), (bytes, "")])
def test_idx_files_are_read_packed_or_plain_and_t10k_is_test(
    tmp_path: Path, pack: Callable[[bytes], bytes], ending: str
) -> None:
    add_batch(tmp_path / "data", idx_folder(tmp_path / "in", pack, ending))
    data = load_data(tmp_path / "data")
    assert data.classes == ("0", "1")
    np.testing.assert_array_equal(data.images[:, 0], X)
    assert (data.labels.tolist(), data.split("test").labels.tolist()) == ([0, 1, 1, 0], [0])


def test_fashion_mnist_is_found_by_name_and_has_its_class_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sources, "_DEBIAN_FASHION", tmp_path / "share" / "fashion-mnist")
    with pytest.raises(DataError, match=r"dataset-fashion-mnist, or use torchvision:FashionMNIST"):
        read_source("fashion-mnist")
    idx_folder(tmp_path / "share" / "fashion-mnist")
    found = read_source("fashion-mnist")
    assert found.classes == FASHION
    assert [block.held_out for block in found.blocks] == [False, True]
    assert (FASHION[0], FASHION[9], len(set(FASHION))) == ("t-shirt", "ankle boot", 10)


def test_damaged_and_missing_idx_files_are_all_listed(tmp_path: Path, problems_of: Make) -> None:
    folder = idx_folder(tmp_path / "in")
    (folder / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(X[:3])[:-1]))
    (folder / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(Y[:3]))[:-9])
    (folder / "t10k-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(Y)))
    (folder / "t10k-labels-idx1-ubyte.gz").unlink()
    found = problems_of(tmp_path / "data", folder)
    assert [problem.split(" (")[0] for problem in found] == [
        "train-images-idx3-ubyte: the file is not a whole idx3 file of unsigned bytes",
        "train-labels-idx1-ubyte: the file is missing or damaged",
        "t10k-images-idx3-ubyte: the file is not a whole idx3 file of unsigned bytes",
        "t10k-labels-idx1-ubyte: the file is missing or damaged",
    ]


# torchvision


def test_torchvisions_own_loader_reads_a_data_set_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    idx_folder(tmp_path / "nss" / "torchvision" / "FashionMNIST" / "raw", bytes, "")
    by_name, by_folder = read_source("torchvision:FashionMNIST"), read_source(idx_folder(tmp_path / "fashion-mnist"))
    assert by_name.classes == FASHION
    assert [block.held_out for block in by_name.blocks] == [False, True]
    np.testing.assert_array_equal(np.concatenate([block.images for block in by_name.blocks])[:, 0], X)
    np.testing.assert_array_equal(np.concatenate([block.labels for block in by_name.blocks]), Y)
    assert by_folder.classes == by_name.classes


@pytest.mark.parametrize("name", sorted(TORCHVISION))
def test_each_name_that_we_offer_is_a_loader_of_torchvision(name: str) -> None:
    assert issubclass(getattr(torchvision.datasets, name), torchvision.datasets.VisionDataset)


def test_colour_and_labels_of_torchvisions_other_forms_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    class Loader:
        """Has the attributes of SVHN: channels first, `labels`, and a split by name."""

        def __init__(self, root: str, split: str, download: bool) -> None:
            self.data, self.labels = np.stack([X] * 3, 1) // (1 if split == "train" else 2), Y

    monkeypatch.setattr(torchvision.datasets, "SVHN", Loader)
    found = read_source("torchvision:SVHN")
    np.testing.assert_array_equal(found.blocks[1].images, np.stack([X] * 3, 1) // 2)
    assert found.classes == tuple("0123456789")


def test_without_network_the_remedy_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: object, **__: object) -> None:
        raise urllib.error.URLError("no network")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(urllib.request, "urlopen", offline)
    with pytest.raises(DataError, match=r"could not download or read MNIST .*\n.*\n  fix: check the network"):
        add_batch(tmp_path / "data", "torchvision:MNIST")
    assert not (tmp_path / "data").exists()


def test_an_unknown_name_lists_those_that_are_read() -> None:
    with pytest.raises(DataError, match=r"'Minst' is no torchvision data set(.|\n)*allowed: MNIST, FashionMNIST"):
        read_source("torchvision:Minst")


# Folders


def test_what_cannot_be_opened_is_an_error_of_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(_: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "iterdir", denied)
    with pytest.raises(DataError, match=r"cannot be read .*Permission denied"):
        read_source(tmp_path)


def test_a_name_that_is_no_text_is_shown_escaped(tmp_path: Path, problems_of: Make, make_folder: Make) -> None:
    folder = make_folder(tmp_path / "in")
    (folder / "cat" / "\udcff.png").write_bytes(b"")
    assert problems_of(tmp_path / "data", folder) == ("cat/\\udcff.png: the file is empty (0 bytes)",)
