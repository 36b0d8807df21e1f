"""Adding batches: splits that never leak, one batch for one content, and kills that change nothing."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from filelock import FileLock
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_digits

from nss import ingest
from nss.data import SPLITS, Dataset, load_data, status
from nss.errors import BusyError, DataError
from nss.ingest import add_batch, demo, natural_split

Make = Callable[..., Any]
NAMES = np.array(["ant", "bee", "cow"])


def small(code: int) -> np.ndarray:
    return np.random.default_rng(1000 + code).integers(0, 256, (2, 2), np.uint8)


def save_npz(path: Path, **arrays: Any) -> Path:
    np.savez(path, **arrays)
    return path


def coded(codes: Sequence[int]) -> dict[str, np.ndarray]:
    """Images and labels as functions of small numbers: equal numbers are equal images of one class."""
    numbers = np.array(codes, np.int64)
    return {"x": np.stack([small(code) for code in codes]), "y": numbers % 3, "classes": NAMES}


def by_image(data: Dataset) -> dict[bytes, set[str]]:
    splits: dict[bytes, set[str]] = {}
    for batch in data.batches:
        for image, split in zip(batch.images.numpy(), batch.split.tolist(), strict=True):
            splits.setdefault(image.tobytes(), set()).add(SPLITS[split])
    return splits


# A batch


def test_a_folder_becomes_one_batch_in_the_order_of_its_names(tmp_path: Path, pictures: Path, picture: Make) -> None:
    added = add_batch(tmp_path / "data", pictures)
    data = load_data(tmp_path / "data")
    assert (data.classes, data.image_shape, data.labels.tolist()) == (("cat", "dog"), (1, 4, 4), [0, 0, 1, 1])
    np.testing.assert_array_equal(data.images[:, 0], [picture(seed) for seed in (0, 1, 100, 101)])
    assert [batch.digest for batch in data.batches] == [added.digest]
    assert (added.data, added.images, added.already_present) == (data.digest, 4, False)
    assert added.splits == {name: len(data.split(name)) for name in SPLITS}
    assert added.new_classes == ("cat", "dog")
    assert json.loads(json.dumps(added.to_dict()))["splits"] == added.splits


def test_the_same_source_twice_is_one_batch(pets: Path, pictures: Path, snapshot: Make) -> None:
    before = snapshot(pets)
    added = add_batch(pets, pictures)
    assert (added.already_present, added.repeated, added.new_classes) == (True, 4, ())
    assert snapshot(pets) == before


def test_a_second_batch_follows_the_first_and_leaves_its_file(
    pets: Path, tmp_path: Path, make_folder: Make, snapshot: Make
) -> None:
    before = snapshot(pets)
    added = add_batch(pets, make_folder(tmp_path / "more", ("dog",), 3, seed=500))
    data = load_data(pets)
    assert data.batches[1].digest == added.digest
    assert data.labels.tolist() == [0, 0, 1, 1, 1, 1, 1]
    assert {name: snapshot(pets)[name] for name in before if name != "dataset.json"} == {
        name: content for name, content in before.items() if name != "dataset.json"
    }


def test_hidden_files_and_folders_are_ignored(pets: Path, pictures: Path) -> None:
    (pictures / ".git").mkdir()
    (pictures / "cat" / ".DS_Store").write_text("x")
    assert add_batch(pets, pictures).already_present


def test_labels_known_under_another_class_are_counted(pets: Path, tmp_path: Path, save_picture: Make) -> None:
    save_picture(tmp_path / "more" / "dog" / "cat.png", 0)
    save_picture(tmp_path / "more" / "dog" / "dog.png", 100)
    added = add_batch(pets, tmp_path / "more")
    assert (added.repeated, added.relabelled) == (2, 1)


# Splits


def share_oracle(image: bytes) -> str:
    number = int(hashlib.blake2b(image, digest_size=16, person=b"nss image").hexdigest()[:16], 16)
    return "test" if number * 10 < 2 * 2**64 else "val" if number * 10 < 3 * 2**64 else "train"


def own_split(tmp_path: Path, train: Sequence[int], test: Sequence[int]) -> Path:
    a, b = coded(train), coded(test)
    return save_npz(tmp_path / "own.npz", x_train=a["x"], y_train=a["y"], x_test=b["x"], y_test=b["y"], classes=NAMES)


@given(st.binary(max_size=64))
def test_the_split_is_a_share_of_the_digest_of_the_bytes(image: bytes) -> None:
    assert natural_split(image) == share_oracle(image)


def test_the_split_of_known_bytes_stays_what_it_was() -> None:
    found = "".join(natural_split(bytes([number]) * 16)[1] for number in range(24))
    assert found == "rrarerrerrrrerrrrrrrrarr"


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(0, 60), min_size=1, max_size=25), st.randoms(use_true_random=False), st.integers(1, 3))
def test_splits_depend_on_bytes_alone_whatever_the_order_and_the_batches(codes: list[int], random: Any, n: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        add_batch(folder / "data", save_npz(folder / "first.npz", **coded([0, 1, 2])))
        random.shuffle(codes)
        for number in range(n):
            if codes[number::n]:
                add_batch(folder / "data", save_npz(folder / f"{number}.npz", **coded(codes[number::n])))
        found = by_image(load_data(folder / "data"))
        assert set(found) == {small(code).tobytes() for code in {0, 1, 2, *codes}}
        assert found == {image: {share_oracle(image)} for image in found}


@settings(max_examples=20, deadline=None)
@given(st.lists(st.tuples(*[st.lists(st.integers(0, 40), min_size=3, max_size=12)] * 2, st.booleans()), max_size=4))
def test_no_image_ever_changes_its_split_whatever_arrives(sources: list[tuple[list[int], list[int], bool]]) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        add_batch(folder / "data", save_npz(folder / "first.npz", **coded([0, 1, 2])))
        splits = by_image(load_data(folder / "data"))
        for number, (train, test, own) in enumerate(sources):
            arrays = coded(train + test)
            if own:
                cut = len(train)
                arrays = (
                    {f"{key}_train": arrays[key][:cut] for key in "xy"}
                    | {f"{key}_test": arrays[key][cut:] for key in "xy"}
                    | {"classes": NAMES}
                )
            path = save_npz(folder / f"{number}.npz", **arrays)
            add_batch(folder / "data", path)
            now = by_image(load_data(folder / "data"))
            assert all(len(found) == 1 for found in now.values())
            assert {image: now[image] for image in splits} == splits
            assert add_batch(folder / "data", path).already_present
            splits = now


def test_a_test_split_of_the_source_is_kept_and_its_train_images_are_train_or_val(
    tmp_path: Path, picture: Make
) -> None:
    train, test = range(60), range(60, 90)
    add_batch(tmp_path / "data", own_split(tmp_path, train, test))
    found = by_image(load_data(tmp_path / "data"))
    for code in train:
        image = small(code).tobytes()
        assert found[image] == {"val" if share_oracle(image) == "val" else "train"}
    assert all(found[small(code).tobytes()] == {"test"} for code in test)
    assert {split for splits in found.values() for split in splits} == {"train", "val", "test"}


def test_an_image_in_train_and_test_of_one_source_is_test(tmp_path: Path, picture: Make) -> None:
    add_batch(tmp_path / "data", own_split(tmp_path, [0, 1, 2, 3], [3, 3]))
    found = by_image(load_data(tmp_path / "data"))
    assert found[small(3).tobytes()] == {"test"}


def test_an_image_known_as_held_out_stays_so_in_a_source_that_trains_on_it_and_the_other_way(tmp_path: Path) -> None:
    codes = list(range(40))
    before = add_batch(tmp_path / "data", save_npz(tmp_path / "a.npz", **coded(codes)))
    assert min(before.splits.values()) > 0
    splits = by_image(load_data(tmp_path / "data"))
    add_batch(tmp_path / "data", own_split(tmp_path, codes[:20], codes[20:]))
    assert by_image(load_data(tmp_path / "data")) == splits


def test_a_folder_with_train_and_test_keeps_that_split(tmp_path: Path, make_folder: Make) -> None:
    make_folder(tmp_path / "in" / "train", each=20)
    make_folder(tmp_path / "in" / "test", each=5, seed=1000)
    added = add_batch(tmp_path / "data", tmp_path / "in")
    assert added.splits["test"] == 10
    assert added.splits["train"] + added.splits["val"] == 40
    assert load_data(tmp_path / "data").classes == ("cat", "dog")


@pytest.mark.parametrize("is_new", [True, False])
def test_a_new_class_that_its_source_holds_out_whole_is_refused(
    tmp_path: Path, pets: Path, make_folder: Make, snapshot: Make, is_new: bool
) -> None:
    make_folder(tmp_path / "in" / "train", ("cat", "dog"), 4, seed=1000)
    make_folder(tmp_path / "in" / "test", ("Cat", "dog"), 3, seed=2000)
    root = tmp_path / "other" if is_new else pets
    before = snapshot(root) if root.exists() else {}
    with pytest.raises(DataError) as caught:
        add_batch(root, tmp_path / "in", new_classes=True)
    hint = "check the names of the class folders, or the labels, in train and test"
    assert caught.value.problems == (f"class 'Cat' has no training image (3 in test): {hint}",)
    assert (snapshot(root) if root.exists() else {}) == before


def test_a_label_that_only_the_test_arrays_have_is_refused_in_a_new_data_set_only(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="class 'cow' has no training image"):
        add_batch(tmp_path / "data", own_split(tmp_path, [0, 1, 3], [2, 4]))
    add_batch(tmp_path / "data", save_npz(tmp_path / "first.npz", **coded(range(30))))
    assert add_batch(tmp_path / "data", own_split(tmp_path, [0, 1, 3], [2, 4])).images == 5


def test_images_of_a_new_class_may_all_be_for_training_or_be_held_out_by_their_content(
    tmp_path: Path, pets: Path, make_folder: Make
) -> None:
    make_folder(tmp_path / "in" / "train", ("cow", "dog"), 4, seed=1000)
    make_folder(tmp_path / "in" / "test", ("dog",), 3, seed=2000)
    assert add_batch(pets, tmp_path / "in", new_classes=True).new_classes == ("cow",)
    held_out = next(code for code in range(2, 300, 3) if share_oracle(small(code).tobytes()) == "test")
    added = add_batch(tmp_path / "other", save_npz(tmp_path / "few.npz", **coded([0, 1, held_out])))
    assert added.new_classes == tuple(NAMES)


@pytest.mark.parametrize("name", ["val", "valid", "validation"])
def test_without_test_what_is_for_validation_is_held_out(tmp_path: Path, make_folder: Make, name: str) -> None:
    make_folder(tmp_path / "in" / "train", each=20)
    make_folder(tmp_path / "in" / name, each=5, seed=1000)
    added = add_batch(tmp_path / "data", tmp_path / "in")
    assert added.splits["test"] == 10
    assert load_data(tmp_path / "data").classes == ("cat", "dog")


def test_beside_train_and_test_validation_images_have_no_place(
    tmp_path: Path, pets: Path, make_folder: Make, problems_of: Make
) -> None:
    for name in ("train", "test", "val"):
        make_folder(tmp_path / "in" / name)
    (found,) = problems_of(pets, tmp_path / "in")
    hint = "validation images are chosen from train by their content: move these there"
    assert found == f"val: an unknown split; allowed: train, test ({hint})"


def test_a_third_split_is_unknown(tmp_path: Path, pets: Path, make_folder: Make, problems_of: Make) -> None:
    for name in ("train", "test", "holdout"):
        make_folder(tmp_path / "in" / name)
    found = problems_of(pets, tmp_path / "in")
    assert [problem.split(";")[0] for problem in found] == ["holdout: an unknown split"]


# Kills, locks and races


def test_a_kill_before_the_batch_is_named_changes_nothing_and_is_swept_by_the_next(
    tmp_path: Path, pets: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch, make_folder: Make, snapshot: Make
) -> None:
    before, digest = snapshot(pets), load_data(pets).digest
    more = make_folder(tmp_path / "more", seed=500)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ingest, "write_description", killed)
        with pytest.raises(KeyboardInterrupt):
            add_batch(pets, more)
    assert len(snapshot(pets)) == len(before) + 1
    assert load_data(pets).digest == digest
    assert add_batch(pets, pictures).already_present
    assert snapshot(pets) == before


def test_what_killed_writes_left_is_removed_and_nothing_else(
    tmp_path: Path, pets: Path, pictures: Path, snapshot: Make
) -> None:
    before = snapshot(pets)
    name = "f" * 32 + ".safetensors"
    (pets / "batches" / name).write_bytes(b"orphan")
    for left in (pets / ".dataset.json.abc", pets / "batches" / f".{name}.abc"):
        left.mkdir()
        (left / "part").write_bytes(b"half")
    (pets / "batches" / "notes.txt").write_text("mine")
    assert len(load_data(pets)) == 4
    add_batch(pets, pictures)
    assert snapshot(pets) == before | {"batches/notes.txt": b"mine"}


def test_a_kill_of_the_first_batch_ever_does_not_stop_the_next(tmp_path: Path, pictures: Path, snapshot: Make) -> None:
    add_batch(tmp_path / "clean", pictures)
    (tmp_path / "data" / "batches").mkdir(parents=True)
    (tmp_path / "data" / "batches" / ("f" * 32 + ".safetensors")).write_bytes(b"orphan")
    add_batch(tmp_path / "data", pictures)
    assert snapshot(tmp_path / "data") == snapshot(tmp_path / "clean")


def test_the_lock_lies_beside_the_folder_and_its_holder_is_waited_for_then_named(
    tmp_path: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ingest, "_LOCK_SECONDS", 0.01)
    with FileLock(tmp_path / ".data.lock"), pytest.raises(BusyError, match=r"where: .*\.data\.lock"):
        add_batch(tmp_path / "data", pictures)
    assert not (tmp_path / "data").exists()
    assert add_batch(tmp_path / "data", pictures).images == 4


def test_batches_added_at_the_same_time_all_arrive(tmp_path: Path, pets: Path, make_folder: Make) -> None:
    sources = [make_folder(tmp_path / f"more{number}", seed=1000 * number) for number in range(1, 5)]
    with ThreadPoolExecutor(4) as pool:
        added = list(pool.map(lambda source: add_batch(pets, source), sources))
    digests = {batch.digest for batch in load_data(pets).batches}
    assert {each.digest for each in added} < digests
    assert len(digests) == 5


def test_a_folder_that_cannot_be_written_is_an_error_of_the_user(tmp_path: Path, pictures: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(DataError, match="cannot be written"):
        add_batch(tmp_path / "file" / "data", pictures)


# The digits


def test_the_digits_are_scikit_learns_scaled_to_bytes(tmp_path: Path) -> None:
    pixels, labels = load_digits(return_X_y=True)
    demo(tmp_path / "data")
    data = load_data(tmp_path / "data")
    assert (data.classes, data.image_shape, len(data)) == (tuple("0123456789"), (1, 8, 8), 1797)
    np.testing.assert_array_equal(data.images.reshape(-1, 64), np.round(pixels * 255 / 16))
    np.testing.assert_array_equal(data.labels, labels)


def test_the_digits_are_the_same_bytes_everywhere(tmp_path: Path, snapshot: Make) -> None:
    added = demo(tmp_path / "a" / "data")
    demo(tmp_path / "b" / "data")
    assert snapshot(tmp_path / "a" / "data") == snapshot(tmp_path / "b" / "data")
    assert (added.digest, added.data) == ("43b3883fbd1c01411480bce67095a8e6", "352b3c3aeb5179738d2eb821ec7a942c")


def test_a_tenth_of_the_digits_is_val_and_a_fifth_is_test_and_every_class_is_in_each(tmp_path: Path) -> None:
    added = demo(tmp_path / "data")
    assert added.splits == {"train": 1242, "val": 182, "test": 373}
    assert abs(182 / 1797 - 0.10) < 0.03
    assert abs(373 / 1797 - 0.20) < 0.03
    assert min(n for splits in status(tmp_path / "data")["per_class"].values() for n in splits.values()) >= 13


def test_digits_that_are_there_stay_and_damaged_ones_are_made_again(tmp_path: Path, snapshot: Make) -> None:
    root = tmp_path / "data"
    demo(root)
    before = snapshot(root)
    changed = next((root / "batches").iterdir()).stat().st_mtime_ns
    assert demo(root).already_present
    assert next((root / "batches").iterdir()).stat().st_mtime_ns == changed
    next((root / "batches").iterdir()).write_bytes(b"")
    assert not demo(root).already_present
    assert snapshot(root) == before
    next((root / "batches").iterdir()).unlink()
    demo(root)
    assert snapshot(root) == before


def test_digits_with_later_batches_stay_and_another_data_set_is_not_mixed_with_them(
    tmp_path: Path, pets: Path, picture: Make, snapshot: Make
) -> None:
    demo(tmp_path / "digits")
    path = save_npz(tmp_path / "more.npz", x=np.stack([picture(1, (8, 8))]), y=np.array([3]))
    data = add_batch(tmp_path / "digits", path).data
    before = snapshot(tmp_path / "digits")
    again = demo(tmp_path / "digits")
    assert (again.already_present, again.data) == (True, data)
    assert snapshot(tmp_path / "digits") == before
    before = snapshot(pets)
    with pytest.raises(DataError, match="holds another data set"):
        demo(pets)
    assert snapshot(pets) == before
    (tmp_path / "digits" / "dataset.json").write_text("{")
    with pytest.raises(DataError, match="not JSON"):
        demo(tmp_path / "digits")
