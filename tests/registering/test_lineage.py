"""Where versions come from and how they differ."""

from __future__ import annotations

import pytest

from nss.errors import StageError
from tasks.lineage import Difference, differences, find_version, lineage, run_link
from tasks.registry import Registry


@pytest.mark.parametrize(
    ("reference", "number"),
    [("champion", 2), ("digits@champion", 2), ("@previous", 1), ("digits@previous", 1), ("digits/1", 1), ("2", 2)],
)
def test_a_version_is_named_by_alias_or_number(two, reference: str, number: int) -> None:
    assert find_version(two.registry, reference).number == number


@pytest.mark.parametrize("reference", ["digits/3", "digits/champion", "digits@2", "digits@best", "7", "best", ""])
def test_a_version_that_is_not_there_is_answered_with_those_that_are(two, reference: str) -> None:
    with pytest.raises(StageError, match="digits@champion, digits@previous, digits/1, digits/2"):
        find_version(two.registry, reference)


def test_another_name_is_answered_with_the_names_that_are(two) -> None:
    with pytest.raises(StageError, match="the registered models are digits"):
        find_version(two.registry, "cats@champion")


def test_a_lineage_goes_back_to_the_model_that_was_trained(two) -> None:
    second, first, base = lineage(two.registry, find_version(two.registry, "champion"))
    assert [(each.name, each.version, each.verb) for each in (second, first, base)] == [
        ("digits", 2, "restructure"),
        ("digits", 1, "restructure"),
        ("", None, "base"),
    ]
    assert second.data_md5 in (two.workspace.root / "data.dvc").read_text()
    assert second.git_sha == two.git("rev-parse", "HEAD").strip()
    assert base.data_md5 == "base's"
    assert (base.model, base.run_id) == (
        two.registry.by_number(1).tags["nss.parent"],
        two.registry.by_number(1).tags["nss.base_run"],
    )
    assert all(each.run_id and each.created for each in (second, first, base))


def test_a_parent_that_is_gone_ends_the_lineage_by_name(two) -> None:
    two.tracker.client.delete_model_version("digits", "1")
    second, gone = lineage(two.registry, find_version(two.registry, "digits/2"))
    assert (gone.name, gone.version, gone.model, gone.created) == ("digits", 1, second and gone.model, "")


def test_a_parent_that_was_registered_later_is_found_by_its_model(two) -> None:
    two.tracker.client.delete_model_version_tag("digits", "2", "nss.parent_version")
    two.registry.tag(2, "nss.parent", two.registry.by_number(1).model)
    assert [each.version for each in lineage(two.registry, two.registry.by_number(2))] == [2, 1, None]


def test_parents_in_a_circle_end(two) -> None:
    two.registry.tag(1, "nss.parent_version", "digits/2")
    assert [each.version for each in lineage(two.registry, two.registry.by_number(2))] == [2, 1, 2]


def test_differences_are_by_metric_class_and_size(two) -> None:
    found = differences(two.registry.by_number(1), two.registry.by_number(2))
    assert found["metrics"] == [Difference("accuracy", 0.9, 0.95)]
    assert found["classes"] == [Difference("t-shirt (top)", 0.45, 0.475)]
    assert found["size"] == [Difference("macs", 10, 10)]
    assert found["metrics"][0].change == pytest.approx(0.05)
    assert differences(None, two.registry.by_number(2))["metrics"][0].change is None


def test_a_server_shows_runs_by_link(two, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run_link(two.tracker, "r") == "r"
    monkeypatch.setattr(two.tracker, "uri", "http://mlflow:5000/")
    assert run_link(two.tracker, "r") == f"http://mlflow:5000/#/experiments/{two.tracker.experiment_id}/runs/r"
    assert run_link(two.tracker, "") == ""


def test_versions_of_another_model_are_read_by_their_name(two) -> None:
    other = Registry(two.tracker, "cats")
    assert find_version(other, "digits@champion").number == 2
