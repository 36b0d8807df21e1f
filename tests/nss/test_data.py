"""The packed data set: loaded is what was written, views and streams read no more than asked, damage is named."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from nss.data import (
    Batch,
    Dataset,
    batch_digest,
    batch_path,
    iter_batches,
    load_data,
    status,
    write_batch,
    write_description,
)
from nss.errors import DataError
from nss.tensor_files import write_tensors

CLASSES = ("ant", "bee", "cow")


def make_batch(n: int, seed: int = 0, channels: int = 1, classes: tuple[str, ...] = CLASSES) -> Batch:
    random = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (n, channels, 2, 3), dtype=torch.uint8, generator=random)
    labels, split = torch.arange(n) % len(classes), (torch.arange(n) % 4 % 3).to(torch.uint8)
    return Batch(batch_digest(images, labels, split, classes), images, labels, split)


def make_data(*sizes: int, channels: int = 1) -> Dataset:
    batches = tuple(make_batch(n, seed, channels) for seed, n in enumerate(sizes))
    return Dataset(CLASSES, (channels, 2, 3), batches)


def write(root: Path, data: Dataset) -> Path:
    for batch in data.batches:
        write_batch(root, batch)
    write_description(root, data)
    return root


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write(tmp_path / "data", make_data(5, 4))


def assert_same(found: tuple[Tensor, Tensor], images: Tensor, labels: Tensor) -> None:
    assert torch.equal(found[0], images)
    assert torch.equal(found[1], labels)


# What is loaded


def test_what_is_loaded_is_what_was_written(folder: Path) -> None:
    written, data = make_data(5, 4), load_data(folder)
    assert (data.classes, data.image_shape, len(data)) == (CLASSES, (1, 2, 3), 9)
    assert [batch.digest for batch in data.batches] == [batch.digest for batch in written.batches]
    assert torch.equal(data.images, torch.cat([batch.images for batch in written.batches]))
    assert data.labels.tolist() == [0, 1, 2, 0, 1, 0, 1, 2, 0]
    assert [batch.split.tolist() for batch in data.batches] == [[0, 1, 2, 0, 0], [0, 1, 2, 0]]
    assert data.digest == written.digest


def test_images_of_one_whole_batch_are_the_loaded_tensor_itself(tmp_path: Path) -> None:
    data = load_data(str(write(tmp_path, make_data(6))))
    assert data.images is data.batches[0].images


def test_the_digest_of_a_batch_is_blake2b_of_its_shape_used_names_and_bytes() -> None:
    images = torch.arange(12, dtype=torch.uint8).reshape(2, 1, 2, 3)
    digest = hashlib.blake2b(b'[[2, 1, 2, 3], ["ant", "cow"]]', digest_size=16)
    digest.update(bytes(range(12)) + (2).to_bytes(8, "little") + (0).to_bytes(8, "little") + bytes([2, 1]))
    found = batch_digest(images, torch.tensor([2, 0]), torch.tensor([2, 1], dtype=torch.uint8), CLASSES)
    assert found == digest.hexdigest()


def test_a_class_appended_later_leaves_the_digests_of_older_batches() -> None:
    batch = make_batch(4)
    assert batch_digest(batch.images, batch.labels, batch.split, (*CLASSES, "aaa")) == batch.digest


def test_the_digest_of_a_data_set_tells_classes_batches_order_and_view_apart() -> None:
    data = make_data(5, 4)
    other_classes = Dataset(("bee", "ant", "cow"), data.image_shape, data.batches)
    fewer, turned = (Dataset(CLASSES, data.image_shape, batches) for batches in (data.batches[:1], data.batches[::-1]))
    views = [data.split(name) for name in ("train", "val", "test")]
    assert len({each.digest for each in (data, other_classes, fewer, turned, *views)}) == 7
    assert make_data(5, 4).digest == data.digest


# Views


def test_a_split_holds_the_rows_of_that_split_in_order_of_arrival() -> None:
    data = make_data(5, 4)
    train = data.split("train")
    assert train.labels.tolist() == [0, 0, 1, 0, 0]
    rows = [data.batches[0].images[[0, 3, 4]], data.batches[1].images[[0, 3]]]
    assert torch.equal(train.images, torch.cat(rows))
    assert [len(data.split(name)) for name in ("train", "val", "test")] == [5, 2, 2]
    assert [batch.digest for batch in train.batches] == [batch.digest for batch in data.batches]
    assert train.batches[0].split.tolist() == [0, 0, 0]


def test_a_split_reads_no_image_until_images_are_asked_for() -> None:
    class Unread(Tensor):
        def __getitem__(self, rows: object) -> Tensor:
            raise AssertionError("an image was read")

    labels, split = torch.tensor([0, 1, 1]), torch.tensor([0, 1, 0], dtype=torch.uint8)
    batch = Batch("0" * 32, Unread(), labels, split)
    train = Dataset(CLASSES, (1, 2, 3), (batch,)).split("train")
    assert (len(train), train.labels.tolist()) == (2, [0, 1])
    assert train.per_class_counts() == {"ant": 1, "bee": 1, "cow": 0}
    with pytest.raises(AssertionError, match="an image was read"):
        _ = train.images


def test_a_split_without_images_is_empty_with_the_shape_of_the_data_set() -> None:
    val = make_data(1).split("val")
    assert (len(val), val.images.shape, val.images.dtype, val.labels.dtype) == (
        0,
        (0, 1, 2, 3),
        torch.uint8,
        torch.int64,
    )
    assert list(iter_batches(val, 4)) == []


def test_an_unknown_split_and_a_split_of_a_split_are_refused() -> None:
    data = make_data(5)
    with pytest.raises(DataError, match=r"'valid' is no split\n  allowed: train, val, test"):
        data.split("valid")
    with pytest.raises(DataError, match="already the train split"):
        data.split("train").split("val")


# Streams


@given(st.lists(st.integers(1, 9), min_size=1, max_size=4), st.integers(1, 12), st.sampled_from(["", "train", "test"]))
def test_a_stream_is_the_images_in_order_with_exactly_the_size_asked_for(
    sizes: list[int], size: int, part: str
) -> None:
    data = make_data(*sizes)
    view = data.split(part) if part else data
    found = list(iter_batches(view, size))
    lengths = [size] * (len(view) // size) + ([len(view) % size] if len(view) % size else [])
    assert [len(labels) for _, labels in found] == lengths
    if found:
        assert torch.equal(torch.cat([images for images, _ in found]), view.images)
        assert torch.equal(torch.cat([labels for _, labels in found]), view.labels)


def test_a_stream_reads_only_as_far_as_it_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[tuple[int, int]] = []
    read = Batch.read

    def noted(self: Batch, start: int, stop: int) -> tuple[Tensor, Tensor]:
        reads.append((start, stop))
        return read(self, start, stop)

    monkeypatch.setattr(Batch, "read", noted)
    stream = iter_batches(make_data(10, 10), 4)
    next(stream)
    assert reads == [(0, 4)]


def test_a_stream_passes_slices_of_the_loaded_tensor_on_without_a_copy(tmp_path: Path) -> None:
    data = load_data(write(tmp_path, make_data(8)))
    pointers = [images.data_ptr() for images, _ in iter_batches(data, 4)]
    start = data.images.data_ptr()
    assert pointers == [start, start + 4 * 6]


def test_pairs_and_loaders_are_streamed_like_a_data_set() -> None:
    images, labels = torch.rand(7, 1, 2, 3), torch.arange(7, dtype=torch.int32)
    loader = DataLoader(TensorDataset(images, labels), batch_size=2)
    for data in ((images, labels), [(images[:1], labels[:1]), [images[1:], labels[1:]]], loader):
        found = list(iter_batches(data, 3))
        assert [len(each) for _, each in found] == [3, 3, 1]
        assert {each.dtype for _, each in found} == {torch.int64}
        assert_same((torch.cat([a for a, _ in found]), torch.cat([b for _, b in found])), images, labels.long())


@pytest.mark.parametrize("size", [0, -1, True, 2.5, "4"])
def test_a_batch_size_that_is_no_positive_whole_number_is_refused_at_once(size: Any) -> None:
    with pytest.raises(DataError, match="the batch size is"):
        iter_batches(make_data(3), size)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ((torch.zeros(3, 1, 2, 3), torch.zeros(2, dtype=torch.int64)), "do not fit each other"),
        ((torch.zeros(3, 1, 2, 3), torch.zeros(3)), "do not fit each other"),
        ((torch.zeros(3), torch.zeros(3, dtype=torch.int64)), "do not fit each other"),
        ((torch.zeros(3, 1, 2, 3), torch.zeros(3, 1, dtype=torch.int64)), "do not fit each other"),
        ([torch.zeros(3, 1, 2, 3)], "the data holds Tensor"),
        ([(torch.zeros(3, 1, 2, 3), [1, 2, 3])], "the data holds tuple"),
        (["data"], "the data holds str"),
    ],
)
def test_what_is_no_images_and_labels_is_refused(data: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        list(iter_batches(data, 2))


# Figures


@given(st.lists(st.integers(1, 30), min_size=1, max_size=3), st.sampled_from([1, 3]))
def test_pixel_statistics_are_mean_and_deviation_of_each_channel_on_the_0_to_1_scale(sizes: list[int], c: int) -> None:
    data = make_data(*sizes, channels=c)
    pixels = data.images.numpy().astype(np.float64) / 255
    mean, std = data.pixel_statistics()
    np.testing.assert_allclose(mean, pixels.mean((0, 2, 3)), rtol=1e-12)
    np.testing.assert_allclose(std, pixels.std((0, 2, 3)), rtol=1e-12)


def test_pixel_statistics_of_a_view_are_of_its_images_only() -> None:
    images = torch.tensor([0, 255, 255], dtype=torch.uint8).reshape(3, 1, 1, 1)
    batch = Batch("0" * 32, images, torch.tensor([0, 1, 1]), torch.tensor([2, 0, 0], dtype=torch.uint8))
    assert Dataset(CLASSES, (1, 1, 1), (batch,)).split("train").pixel_statistics() == ((1.0,), (0.0,))


def test_pixel_statistics_of_nothing_are_refused() -> None:
    with pytest.raises(DataError, match=r"no image to take statistics of\n  where: val"):
        make_data(1).split("val").pixel_statistics()


def test_images_are_counted_for_every_class_also_those_without() -> None:
    assert make_data(2).per_class_counts() == {"ant": 1, "bee": 1, "cow": 0}


def test_status_is_json_with_images_by_batch_split_and_class(folder: Path) -> None:
    data = make_data(5, 4)
    found = status(folder)
    assert json.loads(json.dumps(found)) == found
    assert found == {
        "digest": data.digest,
        "classes": ["ant", "bee", "cow"],
        "image_shape": [1, 2, 3],
        "images": {"train": 5, "val": 2, "test": 2},
        "batches": [
            {"digest": data.batches[0].digest, "images": 5, "train": 3, "val": 1, "test": 1},
            {"digest": data.batches[1].digest, "images": 4, "train": 2, "val": 1, "test": 1},
        ],
        "per_class": {
            "ant": {"train": 4, "val": 0, "test": 0},
            "bee": {"train": 1, "val": 2, "test": 0},
            "cow": {"train": 0, "val": 0, "test": 2},
        },
    }


# Damage


def test_a_folder_without_a_data_set_says_how_to_get_one(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"dataset.json is missing(.|\n)*dvc checkout(.|\n)*nss data demo"):
        load_data(tmp_path)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("format", 2, "format is 2"),
        ("format", True, "format is True"),
        ("format", "1", "format is '1'"),
        ("classes", "ant", "classes must be a list"),
        ("classes", ["ant"], "classes must be a list of 2 to 10000 names"),
        ("classes", [str(n) for n in range(10_001)], "classes must be a list of 2 to 10000 names"),
        ("classes", ["ant", "bee", 3], "class name 3 is no text"),
        ("classes", ["ant", "bee", ""], "class name '' is no text"),
        ("classes", ["ant", "bee", " cow"], "class name ' cow' has space"),
        ("classes", ["ant", "bee", "c\now"], "cannot be printed"),
        ("classes", ["ant", "bee", "ant"], "class 'ant' is listed twice"),
        ("image_shape", [1, 2], "image_shape is"),
        ("image_shape", [2, 2, 3], "channels"),
        ("image_shape", [1, 0, 3], "image_shape is"),
        ("image_shape", [True, 2, 3], "image_shape is"),
        ("image_shape", [1.0, 2, 3], "image_shape is"),
        ("image_shape", None, "image_shape is None"),
        ("batches", [], "at least one digest"),
        ("batches", {"a": 1}, "batches must be a list"),
        ("batches", ["../../../etc/passwd"], "is no digest"),
        ("batches", [7], "batch 7 is no digest"),
        ("batches", ["0" * 32, "0" * 32], "a batch is listed twice"),
        ("more", 1, "exactly the keys format, classes, image_shape, batches"),
    ],
)
def test_a_wrong_entry_of_dataset_json_is_named(folder: Path, key: str, value: object, message: str) -> None:
    path = folder / "dataset.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(DataError, match=message) as caught:
        load_data(folder, verify=False)
    assert str(path) in str(caught.value)


def test_all_wrong_entries_of_dataset_json_are_listed_together(folder: Path) -> None:
    (folder / "dataset.json").write_text('{"format": 1, "classes": [], "image_shape": [], "batches": []}')
    with pytest.raises(DataError) as caught:
        load_data(folder)
    assert len(caught.value.problems) == 3


@pytest.mark.parametrize("text", ["", "{", "[1]", "null"])
def test_a_dataset_json_that_is_no_object_is_refused(folder: Path, text: str) -> None:
    (folder / "dataset.json").write_text(text)
    with pytest.raises(DataError, match=r"dataset.json"):
        load_data(folder)


@pytest.mark.parametrize("verify", [True, False])
def test_a_missing_or_cut_batch_is_named(folder: Path, verify: bool) -> None:
    digest = make_data(5, 4).batches[1].digest
    path = batch_path(folder, digest)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError, match=digest):
        load_data(folder, verify)
    path.unlink()
    with pytest.raises(DataError, match=f"is missing(.|\n)*{digest}"):
        load_data(folder, verify)


@pytest.mark.parametrize("name", ["images", "labels", "split"])
def test_a_batch_with_one_altered_number_is_named(folder: Path, name: str) -> None:
    batch = make_data(5, 4).batches[0]
    tensors = {"images": batch.images.clone(), "labels": batch.labels.clone(), "split": batch.split.clone()}
    first = tensors[name].view(-1)
    first[0] = 1 - int(first[0] > 0)
    write_tensors(batch_path(folder, batch.digest), tensors, {"format": 1})
    assert len(load_data(folder, verify=False)) == 9
    with pytest.raises(DataError, match=f"batch {batch.digest} was altered"):
        load_data(folder)


def test_exchanged_class_names_are_noticed(folder: Path) -> None:
    path = folder / "dataset.json"
    path.write_text(path.read_text().replace("ant", "x").replace("bee", "ant").replace('"x"', '"bee"'))
    with pytest.raises(DataError, match="names of its classes"):
        load_data(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": torch.zeros(5, 1, 2, 3)}, "not uint8"),
        ({"images": torch.zeros(5, 1, 3, 2, dtype=torch.uint8)}, r"\[5, 1, 3, 2\], not uint8 \[5, 1, 2, 3\]"),
        ({"images": torch.zeros(4, 1, 2, 3, dtype=torch.uint8)}, "not uint8"),
        ({"labels": torch.tensor([0, 1, 2, 3, 0])}, r"labels must be int64 in 0\.\.2"),
        ({"labels": torch.tensor([0, 1, 2, -1, 0])}, "labels must be"),
        ({"labels": torch.tensor([0, 1, 2, 1, 0], dtype=torch.int32)}, "labels must be"),
        ({"labels": torch.tensor([[0], [1], [2], [1], [0]])}, "labels must be"),
        ({"labels": torch.tensor(5)}, "images are"),
        ({"split": torch.tensor([0, 1, 2, 3, 0], dtype=torch.uint8)}, "split must be"),
        ({"split": torch.tensor([0, 1, 2, 1, 0])}, "split must be"),
        ({"split": torch.tensor([0, 1], dtype=torch.uint8)}, "split must be"),
        ({"more": torch.tensor([0])}, "must hold images, labels and split"),
    ],
)
def test_a_batch_of_another_form_is_refused_even_unverified(
    folder: Path, change: dict[str, Tensor], message: str
) -> None:
    batch = make_data(5, 4).batches[0]
    tensors = {"images": batch.images, "labels": batch.labels, "split": batch.split} | change
    write_tensors(batch_path(folder, batch.digest), tensors, {"format": 1})
    with pytest.raises(DataError, match=message) as caught:
        load_data(folder, verify=False)
    assert batch.digest in str(caught.value)


def test_a_batch_of_another_format_is_refused(folder: Path) -> None:
    batch = make_data(5, 4).batches[0]
    tensors = {"images": batch.images, "labels": batch.labels, "split": batch.split}
    write_tensors(batch_path(folder, batch.digest), tensors, {"format": 2})
    with pytest.raises(DataError, match="format 1"):
        load_data(folder)
