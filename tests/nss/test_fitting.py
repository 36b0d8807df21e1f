"""Fitting a source to a data set: everything that is wrong is listed at once, and nothing changes."""

from __future__ import annotations

import os
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from nss.data import load_data
from nss.errors import DataError
from nss.ingest import add_batch, demo

Make = Callable[..., Any]


# Classes


def test_a_new_class_that_sorts_first_gets_the_last_index(
    pets: Path, tmp_path: Path, make_folder: Make, problems_of: Make
) -> None:
    source = make_folder(tmp_path / "more", ("ant", "dog", "bee"), seed=500)
    found = problems_of(pets, source)
    assert [problem.split(";")[0] for problem in found] == [
        "class 'ant' is unknown to the data set",
        "class 'bee' is unknown to the data set",
    ]
    first = load_data(pets).batches[0]
    added = add_batch(pets, source, new_classes=True)
    data = load_data(pets)
    assert (data.classes, added.new_classes) == (("cat", "dog", "ant", "bee"), ("ant", "bee"))
    assert data.batches[1].labels.tolist() == [2, 2, 3, 3, 1, 1]
    assert data.batches[0].digest == first.digest


def test_a_given_order_of_classes_is_kept(tmp_path: Path, pictures: Path) -> None:
    add_batch(tmp_path / "data", pictures, classes=["dog", "cat"])
    data = load_data(tmp_path / "data")
    assert (data.classes, data.labels.tolist()) == (("dog", "cat"), [1, 1, 0, 0])


def test_a_given_order_must_name_exactly_the_classes_of_a_new_data_set(
    tmp_path: Path, pictures: Path, pets: Path, problems_of: Make
) -> None:
    found = problems_of(tmp_path / "new", pictures, classes=["dog", "dog", "elk", " "])
    assert found == (
        "class name ' ' has space around it or a character that cannot be printed",
        "class 'cat' is missing in the given order",
        "class 'elk' of the given order has no image",
        "class ' ' of the given order has no image",
        "class 'dog' is listed 2 times",
    )
    assert not (tmp_path / "new").exists()
    assert problems_of(pets, pictures, classes=["dog", "cat"]) == (
        "an order of classes is given, but the data set has one already; leave it out",
    )


def test_a_single_class_is_no_data_set_but_may_be_a_later_batch(
    tmp_path: Path, pets: Path, make_folder: Make, problems_of: Make
) -> None:
    source = make_folder(tmp_path / "one", ("cat",), seed=300)
    assert problems_of(tmp_path / "new", source) == ("'cat' is the only class; allowed: at least 2",)
    assert add_batch(pets, source).images == 2


def test_more_than_10000_classes_are_refused(tmp_path: Path, pets: Path, problems_of: Make) -> None:
    numbers = np.arange(10_001)
    images = np.stack([numbers % 256, numbers // 256], -1).astype(np.uint8).reshape(-1, 1, 2)
    path = tmp_path / "many.npz"
    np.savez(path, x=images, y=numbers)
    assert problems_of(tmp_path / "new", path) == ("10001 classes; allowed: at most 10000",)
    path = tmp_path / "most.npz"
    np.savez(path, x=images[1:], y=numbers[1:])
    assert add_batch(tmp_path / "new", path).images == 10_000


def test_class_names_written_in_two_unicode_forms_are_one_class(tmp_path: Path, save_picture: Make) -> None:
    save_picture(tmp_path / "in" / "caf\u00e9" / "1.png", 1)
    save_picture(tmp_path / "in" / "cafe\u0301" / "2.png", 2)
    save_picture(tmp_path / "in" / "bar" / "3.png", 3)
    add_batch(tmp_path / "data", tmp_path / "in")
    assert load_data(tmp_path / "data").classes == ("bar", "caf\u00e9")


# Bad input


def test_everything_that_is_wrong_is_listed_at_once_and_nothing_changes(
    tmp_path: Path, pets: Path, picture: Make, save_picture: Make, make_folder: Make, problems_of: Make
) -> None:
    source = make_folder(tmp_path / "bad", each=1, seed=700)
    cat = source / "cat"
    save_picture(cat / "cut.png", 1, (40, 40))
    (cat / "cut.png").write_bytes((cat / "cut.png").read_bytes()[:-700])
    (cat / "text.png").write_text("not an image")
    (cat / "zero.png").write_bytes(b"")
    save_picture(cat / "wide.png", 2, (4, 9))
    save_picture(cat / "colour.png", 3, (4, 4, 3))
    Image.fromarray(picture(4).astype(np.uint16) * 257).save(cat / "deep.png")
    Image.new("CMYK", (4, 4)).save(cat / "ink.jpg")
    Image.new("RGBA", (4, 4), (1, 2, 3, 100)).save(cat / "glass.png")
    (cat / "more").mkdir()
    (source / "empty").mkdir()
    (source / "readme.txt").write_text("hello")
    (source / "dog" / "away.png").symlink_to(save_picture(tmp_path / "elsewhere.png", 5))
    (source / "dog" / "broken.png").symlink_to(source / "nothing.png")
    expected = {
        "class 'empty' is unknown": "to the data set",
        "cat/cut.png": "cannot be read",
        "cat/text.png": "no image of a known format",
        "cat/zero.png": "0 bytes",
        "cat/wide.png": "4 x 9, those of the data set are 4 x 4",
        "cat/colour.png": "is RGB, those of the data set are grey",
        "cat/deep.png": "mode I;16",
        "cat/ink.jpg": "mode CMYK",
        "cat/glass.png": "mode RGBA with transparent pixels",
        "cat/more": "a folder inside a class folder; allowed: CLASS/IMAGE, or train/CLASS/IMAGE and test/CLASS/IMAGE",
        "empty": "a class folder without images",
        "readme.txt": "outside the class folders",
        "dog/away.png": "leads out of the source",
        "dog/broken.png": "broken",
    }
    found = problems_of(pets, source)
    assert len(found) == len(expected)
    for name, reason in expected.items():
        assert [reason in problem for problem in found if problem.startswith(name)] == [True], name


def test_a_long_list_is_cut_in_the_message_and_whole_in_the_error(tmp_path: Path, pets: Path) -> None:
    for number in range(60):
        path = tmp_path / "bad" / "cat" / f"{number:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("text")
    with pytest.raises(DataError) as caught:
        add_batch(pets, tmp_path / "bad")
    lines = [line for line in str(caught.value).splitlines() if line.startswith("  - ")]
    assert (len(caught.value.problems), len(lines), lines[-1]) == (60, 51, "  - ... and 10 more")
    assert "cat/49.png" in lines[49]


def test_a_pipe_in_a_class_folder_is_a_problem_and_does_not_hang(
    tmp_path: Path, pictures: Path, pets: Path, problems_of: Make
) -> None:
    os.mkfifo(pictures / "cat" / "pipe.png")
    assert problems_of(pets, pictures) == ("cat/pipe.png: not a regular file",)


def test_a_class_folder_that_links_out_of_the_source_is_refused(
    tmp_path: Path, pictures: Path, pets: Path, make_folder: Make, problems_of: Make
) -> None:
    make_folder(tmp_path / "other", ("elk",))
    (pictures / "elk").symlink_to(tmp_path / "other" / "elk")
    assert problems_of(pets, pictures) == ("elk: a link that is broken or leads out of the source",)


def test_a_folder_without_class_folders_is_refused(
    tmp_path: Path, pets: Path, save_picture: Make, problems_of: Make
) -> None:
    save_picture(tmp_path / "flat" / "1.png", 1)
    found = problems_of(pets, tmp_path / "flat")
    assert [problem.split(";")[0] for problem in found] == [
        "1.png: a file outside the class folders",
        "no class folder",
    ]


def test_the_same_image_under_two_labels_is_a_problem_and_twice_under_one_is_none(
    tmp_path: Path, save_picture: Make, make_folder: Make, problems_of: Make
) -> None:
    source = make_folder(tmp_path / "in")
    save_picture(source / "cat" / "again.png", 0)
    assert add_batch(tmp_path / "data", source).images == 5
    save_picture(source / "dog" / "cat.png", 0)
    assert problems_of(tmp_path / "data", source) == (
        "dog/cat.png: the same image as cat/0.png, labelled 'dog', but 'cat' there",
    )


@pytest.mark.parametrize("source", ["nowhere", "file.txt"])
def test_a_source_of_no_known_kind_says_which_there_are(tmp_path: Path, source: str) -> None:
    (tmp_path / "file.txt").write_text("x")
    with pytest.raises(DataError, match=r"allowed: a folder of class folders, an .npz, .*torchvision:NAME"):
        add_batch(tmp_path / "data", tmp_path / source)
    assert not (tmp_path / "data").exists()


def test_a_folder_that_is_no_data_set_is_not_written_to(tmp_path: Path, pictures: Path, snapshot: Make) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").write_text("years of work")
    for call in (lambda root: add_batch(root, pictures), demo):
        with pytest.raises(DataError, match="holds no data set"):
            call(tmp_path / "home")
        with pytest.raises(DataError, match="this is no folder"):
            call(tmp_path / "home" / "thesis.txt")
    files = {name: content for name, content in snapshot(tmp_path / "home").items() if not name.endswith(".lock")}
    assert files == {"thesis.txt": b"years of work"}


def test_nothing_is_added_to_a_damaged_data_set(
    tmp_path: Path, pets: Path, make_folder: Make, problems_of: Make
) -> None:
    path = next((pets / "batches").iterdir())
    path.write_bytes(path.read_bytes()[:-1] + b"\x09")
    problems_of(pets, make_folder(tmp_path / "more", seed=500))


# Sizes and channels


def test_a_new_data_set_has_the_most_frequent_size_and_names_all_others(
    tmp_path: Path, save_picture: Make, make_folder: Make, problems_of: Make
) -> None:
    source = make_folder(tmp_path / "in")
    save_picture(source / "cat" / "a.png", 7, (5, 4))
    save_picture(source / "dog" / "b.png", 8, (4, 5))
    assert problems_of(tmp_path / "data", source) == (
        "cat/a.png: the image is 5 x 4, those of the data set are 4 x 4 (height x width); or scale it (--resize)",
        "dog/b.png: the image is 4 x 5, those of the data set are 4 x 4 (height x width); or scale it (--resize)",
    )


def test_resize_scales_bilinearly_what_has_another_size(
    tmp_path: Path, picture: Make, save_picture: Make, make_folder: Make
) -> None:
    source = make_folder(tmp_path / "in", each=1)
    save_picture(source / "cat" / "colour.png", 7, (8, 6, 3))
    add_batch(tmp_path / "data", source, resize=(4, 3))
    data = load_data(tmp_path / "data")
    assert data.image_shape == (3, 4, 3)
    scaled = Image.fromarray(picture(7, (8, 6, 3))).resize((3, 4), Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(data.images[1], np.asarray(scaled).transpose(2, 0, 1))
    grey = np.asarray(Image.fromarray(picture(0)).resize((3, 4), Image.Resampling.BILINEAR))
    np.testing.assert_array_equal(data.images[0], [grey] * 3)


def test_photographs_are_scaled_as_they_are_read(tmp_path: Path, save_picture: Make) -> None:
    """Forty of them at their own size would take 80 MB of arrays."""
    for seed in range(40):
        save_picture(tmp_path / "in" / ("cat", "dog")[seed % 2] / f"{seed}.png", seed, (1000, 2000))
    tracemalloc.start()
    add_batch(tmp_path / "data", tmp_path / "in", resize=(8, 8))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert load_data(tmp_path / "data").image_shape == (1, 8, 8)
    assert peak < 20e6


def test_resize_to_another_size_than_the_data_set_has_is_refused(pets: Path, pictures: Path, problems_of: Make) -> None:
    assert problems_of(pets, pictures, resize=(8, 8)) == (
        "resize is (8, 8), but the images of the data set are 4 x 4 (height x width)",
    )
    for size in ((0, 4), (4, 4097), (4, 10**20)):
        (problem,) = problems_of(pets, pictures, resize=size)
        assert problem == f"resize is {size}; allowed: height and width from 1 to 4096"


def test_grey_joins_colour_in_three_equal_channels(
    tmp_path: Path, picture: Make, save_picture: Make, make_folder: Make
) -> None:
    source = make_folder(tmp_path / "in", each=1)
    save_picture(source / "dog" / "colour.png", 7, (4, 4, 3))
    add_batch(tmp_path / "data", source)
    data = load_data(tmp_path / "data")
    np.testing.assert_array_equal(data.images[0], [picture(0)] * 3)
    np.testing.assert_array_equal(data.images[2], picture(7, (4, 4, 3)).transpose(2, 0, 1))
