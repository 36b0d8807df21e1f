"""What all benchmarks share: which data a name stands for, by what code rows were measured, what a mean is of."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from bench import common
from bench.common import Report, Row, Settings, mean_and_spread
from nss.files import read_json, write_json


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(common, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(common, "OTHER_CODE", Counter())
    return tmp_path / "cache"


# Which data a name stands for.


def images(path: Path, grey: int) -> str:
    """Write 60 images, most of one grey. Returns the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    x = np.full((60, 8, 8), grey, np.uint8)
    x[:, 0, 0] = np.arange(60)
    np.savez(path, x=x, y=np.arange(60) % 3)
    return str(path)


def grey_of(name: str) -> int:
    return int(common.dataset(name).images.float().median())


def test_files_of_the_same_name_are_different_data_wherever_they_lie(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(common, "NPZ", tmp_path / "downloaded")
    names = [images(tmp_path / "a" / "x.npz", 100), images(tmp_path / "b" / "x.npz", 200)]
    images(tmp_path / "downloaded" / "x.npz", 50)
    assert [grey_of(name) for name in (*names, "x", names[0])] == [100, 200, 50, 100]
    images(Path(names[0]), 150)
    assert grey_of(names[0]) == 150, "the file was replaced"


def test_a_file_that_is_called_digits_is_not_the_digits_of_scikit_learn(tmp_path: Path) -> None:
    assert len(common.dataset("digits").images) == 1797
    assert grey_of(images(tmp_path / "digits.npz", 100)) == 100
    assert len(common.dataset("digits").images) == 1797


def test_a_file_is_packed_once(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = images(tmp_path / "x.npz", 100)
    first = common.dataset(name)
    monkeypatch.setattr(common, "add_batch", lambda *_: pytest.fail("it is packed again"))
    assert common.dataset(name).digest == first.digest
    (tmp_path / "elsewhere").mkdir()
    moved = (tmp_path / "x.npz").rename(tmp_path / "elsewhere" / "x.npz")
    assert common.dataset(str(moved)).digest == first.digest
    assert len([path for path in (cache / "data").iterdir() if path.is_dir()]) == 1


def test_a_set_that_is_not_there_is_refused_with_where_it_is_looked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(common, "NPZ", tmp_path)
    with pytest.raises(SystemExit, match=r"x\.npz does not exist: bring the data set as \.npz"):
        common.dataset("x")


# By what code rows were measured.


def test_rows_of_other_code_are_taken_and_said_in_one_line_for_each_folder(
    cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = Report(Settings("rq1", (), (), (), False, "typed"), {})
    for bench in ("part-a", "part-b", "part-c"):
        for number in range(3):
            common.resumed(bench, {"number": number}, lambda: [{"x": 1}])
    report.write(tmp_path / "out.json")
    assert capsys.readouterr().err == "", "what is measured now is of this code"
    for bench, code in (("part-a", {"code": "other"}), ("part-b", {})):
        for path in sorted((cache / "rows" / bench).iterdir())[:2]:
            entry = read_json(path)
            assert entry["code"] == common.CODE
            write_json(path, {"key": entry["key"], **code, "rows": entry["rows"]})
    for bench in ("part-a", "part-b", "part-c"):
        for number in range(3):
            assert common.resumed(bench, {"number": number}, lambda: pytest.fail("it is measured again")) == [{"x": 1}]
    report.write(tmp_path / "out.json")
    assert capsys.readouterr().err.splitlines() == [
        f"bench: {cache / 'rows' / bench}: 2 taken of other or unknown code of nss, remove them there to measure again"
        for bench in ("part-a", "part-b")
    ]


def test_the_digest_of_code_is_of_names_and_content_of_python_files_alone(tmp_path: Path) -> None:
    def written(name: str, text: str) -> str:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        return common.digest_of_code(tmp_path)

    first = written("a.py", "x = 1\n")
    assert written("a.txt", "told") == first
    changed = written("a.py", "x = 2\n")
    more = written("inner/b.py", "")
    assert len({first, changed, more}) == 3
    assert written("a.py", "x = 2\n") == more


# What a mean is of.


def test_a_time_that_one_seed_of_three_reached_says_so_and_has_no_spread() -> None:
    rows: list[Row] = [
        {"method": "nss", "seed": 0, "accuracy": 0.5, "seconds": 4.0},
        {"method": "nss", "seed": 1, "accuracy": 0.75, "seconds": None},
        {"method": "nss", "seed": 2, "accuracy": 1.0},
    ]
    expected = {"method": "nss", "seeds": 3, "accuracy": 0.75, "accuracy_sd": 0.25}
    some = {"seconds": 4.0, "seconds_sd": None, "seconds_seeds": 1}
    assert mean_and_spread(rows, ["method"], ["accuracy", "seconds", "never"]) == [{**expected, **some}]
    rows[2]["seconds"] = 6.0
    some = {"seconds": 5.0, "seconds_sd": None, "seconds_seeds": 2}
    assert mean_and_spread(rows, ["method"], ["accuracy", "seconds"]) == [{**expected, **some}]


def test_where_every_seed_has_a_value_nothing_is_added() -> None:
    rows: list[Row] = [
        {"seed": 0, "case": "a", "seconds": 1.0},
        {"seed": 0, "case": "b"},
        {"seed": 1, "case": "a", "seconds": 2.0},
    ]
    (found,) = mean_and_spread(rows, [], ["seconds"])
    assert found == {"seeds": 2, "seconds": 1.5, "seconds_sd": pytest.approx(0.70710678)}
    assert mean_and_spread(rows[:1], [], ["seconds"]) == [{"seeds": 1, "seconds": 1.0, "seconds_sd": 0.0}]
