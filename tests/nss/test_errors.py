"""Errors say what was wrong, where, what is allowed and how to mend it."""

from __future__ import annotations

import inspect

import pytest

from nss import errors
from nss.errors import DataError, NssError, ProblemsError, first_line


def test_an_error_prints_only_the_lines_it_has() -> None:
    error = NssError("the threshold is 1.5", where="slice.threshold", allowed="0 to 1", fix="lower it")
    assert str(error) == "the threshold is 1.5\n  where: slice.threshold\n  allowed: 0 to 1\n  fix: lower it"
    assert (error.what, error.where, error.allowed, error.fix) == (
        "the threshold is 1.5",
        "slice.threshold",
        "0 to 1",
        "lower it",
    )
    assert str(NssError("it is wrong")) == "it is wrong"
    assert str(NssError("it is wrong", fix="mend it")) == "it is wrong\n  fix: mend it"


def test_problems_are_listed_between_the_sentence_and_the_remedy() -> None:
    error = DataError("the source is bad", ["a.png: 0 bytes", "b.png: text"], where="photos", fix="mend both")
    assert str(error) == "the source is bad\n  - a.png: 0 bytes\n  - b.png: text\n  where: photos\n  fix: mend both"
    assert error.problems == ("a.png: 0 bytes", "b.png: text")
    assert DataError("nothing is listed").problems == ()


def test_every_error_of_the_package_is_an_nss_error_and_documented() -> None:
    classes = [each for _, each in inspect.getmembers(errors, inspect.isclass) if each.__module__ == errors.__name__]
    assert len(classes) >= 10
    for each in classes:
        assert issubclass(each, NssError)
        assert each.__doc__
        with pytest.raises(NssError, match="what"):
            raise each("what", where="where", allowed="allowed", fix="fix")
    assert issubclass(DataError, ProblemsError)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError("cannot connect\nat line 3"), "cannot connect"),
        (RuntimeError("\n  too deep  \nstack"), "too deep  "),
        (KeyError(), "KeyError"),
        (ValueError(" \n"), "ValueError"),
    ],
)
def test_the_first_line_of_an_error_is_what_it_says_or_its_kind(error: Exception, said: str) -> None:
    assert first_line(error) == said
