"""Versions and aliases in a real store."""

from __future__ import annotations

import pytest
from mlflow.exceptions import MlflowException

from nss.errors import StageError
from tasks.registry import Registry, figure_tags, store_errors, version_key


@pytest.fixture
def registry(shop) -> Registry:
    """A registry in a store with the logged models of a cycle."""
    shop.cycle()
    return shop.registry


def add(shop, key: str, **tags: str):
    run = shop.tracker.client.get_run(shop.log("restructure"))
    return shop.registry.add(key, run.info.run_id, run.outputs.model_outputs[0].model_id, tags)


def test_of_versions_that_were_made_at_once_the_first_is_kept(shop, registry: Registry, monkeypatch) -> None:
    """Each looked before the others had added: what two hosts can do, which share no lock."""
    first = add(shop, "k")
    with monkeypatch.context() as patch:
        patch.setattr(Registry, "_first", lambda self, found: found[-1])
        real, asked = Registry.having, []

        def blind_at_first(self: Registry, *words: str) -> list:
            asked.append(words)
            return real(self, *words) if len(asked) > 1 else []

        patch.setattr(Registry, "having", blind_at_first)
        assert add(shop, "k").number == 2
    assert shop.versions() == [1, 2]
    assert add(shop, "k").number == first.number == 1
    assert shop.versions() == [1]


def test_aliases_are_looked_up_and_moved_and_taken_away(shop, registry: Registry) -> None:
    assert registry.by_alias("champion") is None
    numbers = [add(shop, key).number for key in ("a", "b")]
    for number in numbers:
        registry.set_alias("champion", number)
        assert registry.by_alias("champion").number == number
    registry.set_alias("champion", None)
    registry.set_alias("champion", None)
    assert registry.by_alias("champion") is None
    assert (registry.by_number(2).number, registry.by_number(3)) == (2, None)


def test_a_store_that_is_away_is_not_taken_for_a_missing_alias(registry: Registry, monkeypatch) -> None:
    def away(*_: object) -> None:
        raise MlflowException("connection refused")

    monkeypatch.setattr(registry.tracker.client, "get_model_version_by_alias", away)
    with pytest.raises(MlflowException):
        registry.by_alias("champion")


@pytest.mark.parametrize(
    "error", [MlflowException("refused\nmore"), ConnectionError("refused"), TimeoutError("refused")]
)
def test_a_store_that_is_away_is_told_with_what_to_do(error: Exception) -> None:
    with (
        pytest.raises(
            StageError, match=r"does not answer as it should \(refused\)\n  where: http://x\n  fix: start it"
        ),
        store_errors("http://x"),
    ):
        raise error


def test_the_key_is_of_weights_batches_and_figures() -> None:
    same = version_key("m", ["a", "b"], {"x": 1.0, "y": 2.0})
    assert version_key("m", ["b", "a"], {"y": 2.0, "x": 1.0}) == same
    others = [
        ("n", ["a", "b"], {"x": 1.0, "y": 2.0}),
        ("m", ["a"], {"x": 1.0, "y": 2.0}),
        ("m", ["a", "b"], {"x": 1.0}),
    ]
    assert same not in {version_key(*each) for each in others}


def test_a_figure_whose_name_no_tag_can_have_is_kept_all_the_same() -> None:
    tags = figure_tags({"accuracy": 0.5, "class/top (red)": 0.25, "latency_ms": None})
    assert tags == {"nss.figures": '{"accuracy": 0.5, "class/top (red)": 0.25}', "nss.metric.accuracy": "0.5"}
