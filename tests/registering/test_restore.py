"""A pinned champion in a registry that does not have it: a new store, or that of another machine."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from flows import cli
from nss.errors import StageError
from nss.model import build_model, load_model, model_digest, save_model
from tasks import data as data_verb
from tasks import promotion, register
from tasks.adopt import adopt
from tasks.champion import Champion, pin_champion, read_champion
from tasks.layout import lay_out, set_params
from tasks.params import load_params
from tasks.registry import Registry
from tasks.tracking import open_tracker
from tasks.workspace import Workspace


def clone(workspace: Workspace, template: Path, name: str) -> Workspace:
    """A copy beside it with an empty store, as after `git clone` and `dvc pull`; it is the current folder then."""
    target = workspace.root.parent / name
    shutil.copytree(workspace.root, target, symlinks=True, ignore=shutil.ignore_patterns("mlflow"))
    (target / "mlflow").mkdir()
    shutil.copy2(template / "mlflow" / "tracking.db", target / "mlflow")
    os.chdir(target)
    return Workspace(target)


def in_a_new_store(shop, template: Path):
    workspace = clone(shop.workspace, template, "clone")
    return replace(shop, workspace=workspace, tracker=open_tracker(workspace))


def go(shop):
    register.record(shop.workspace, "")
    return register.register(shop.workspace, shop.params, shop.tracker, "")


def rollback(shop):
    return register.rollback(shop.workspace, shop.params, shop.tracker)


def test_a_promotion_in_a_new_store_registers_the_pinned_champion_and_a_rollback_leads_back(
    two, template: Path, batch: str
) -> None:
    before = read_champion(two.workspace)
    shop = in_a_new_store(two, template)
    shop.cycle(seed=3)
    done = go(shop)
    assert (done.outcome, done.version.number, done.was.number) == ("promoted", 2, 1)
    assert shop.aliases() == {"champion": 2, "previous": 1}
    assert (done.was.model, done.was.batches) == (before.model, (batch,))
    tags = done.was.tags
    assert (tags["nss.verb"], tags["nss.pinned_as"]) == ("restored", "digits/2")
    assert tags["nss.source"] == "champion/, pinned as digits/2"
    assert shop.tracker.client.get_run(done.was.run_id).info.status == "FINISHED"
    back = rollback(shop)
    assert (back.version.number, back.version.model) == (1, before.model)
    assert shop.is_settled(back.version)
    assert shop.aliases() == {"champion": 1, "previous": 2}


def test_the_pin_may_get_another_number_and_what_was_made_of_it_names_that(
    two, template: Path, batch: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first = two.registry.by_number(2)
    shop = in_a_new_store(two, template)
    shop.cycle(seed=3)
    done = go(shop)
    # The candidate has the number that is pinned, and another model.
    assert (done.version.number, done.was.number, done.was.model) == (2, 1, first.model)
    assert done.version.tags["nss.parent_version"] == "digits/1"
    monkeypatch.setattr("sys.argv", ["nss", "lineage", "--json"])
    capsys.readouterr()
    with pytest.raises(SystemExit):
        cli.main()
    rows = json.loads(capsys.readouterr().out)
    assert [(row["version"], row["verb"]) for row in rows] == [(2, "restructure"), (1, "restored")]
    assert rows[1]["model"] == first.model
    rollback(shop)
    assert read_champion(shop.workspace) == Champion("digits", 1, first.model, (batch,))


def test_a_champion_that_was_pinned_by_hand_and_never_registered_becomes_the_previous(two, batch: str) -> None:
    folder = two.workspace.out("readapt") / "model"
    model = model_digest(load_model(folder))
    pin_champion(two.workspace, Champion("digits", 7, model, (batch,)), folder)
    two.cycle(seed=3)
    done = go(two)
    assert (done.version.number, done.was.number, done.was.model) == (4, 3, model)
    assert done.was.tags["nss.pinned_as"] == "digits/7"
    assert two.aliases() == {"champion": 4, "previous": 3}


def test_a_candidate_that_waits_in_a_new_store_stands_beside_the_champion_it_was_made_of(two, template: Path) -> None:
    before = read_champion(two.workspace)
    shop = in_a_new_store(two.with_settings(promote="manual"), template)
    shop.cycle(seed=3)
    done = go(shop)
    assert (done.outcome, shop.aliases()) == ("candidate", {"champion": 1, "candidate": 2})
    assert shop.registry.by_number(1).model == before.model
    assert shop.registry.by_number(2).tags["nss.parent_version"] == "digits/1"
    assert (read_champion(shop.workspace), go(shop).version.number, shop.versions()) == (before, 2, [1, 2])


def test_a_champion_that_is_registered_is_left_as_it_is(two) -> None:
    runs = len(two.tracker.client.search_runs([two.tracker.experiment_id]))
    promotion.restore(two.workspace, two.registry)
    assert (two.versions(), two.aliases()) == ([1, 2], {"champion": 2, "previous": 1})
    assert len(two.tracker.client.search_runs([two.tracker.experiment_id])) == runs


class Killed(BaseException):
    """Stands for kill -9: nothing may catch it."""


@pytest.mark.parametrize("step", ["add", "set_alias"])
def test_who_dies_while_registering_the_champion_again_does_it_once(
    two, template: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    shop, real = in_a_new_store(two, template), getattr(Registry, step)

    def dying(*arguments: object) -> None:
        real(*arguments)
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Registry, step, dying)
        with pytest.raises(Killed):
            promotion.restore(shop.workspace, shop.registry)
    promotion.restore(shop.workspace, shop.registry)
    assert (shop.versions(), shop.aliases()) == ([1], {"champion": 1})
    # By its digest: the pin says 2.
    assert promotion.maintained(shop.workspace, shop.registry).number == 1
    assert len(shop.tracker.client.search_runs([shop.tracker.experiment_id])) == 1


def test_without_its_weights_the_champion_cannot_be_registered_again_and_nothing_changes(two, template: Path) -> None:
    shop = in_a_new_store(two, template)
    shutil.rmtree(shop.workspace.champion)
    with pytest.raises(StageError, match=r"weights of the champion, digits version 2, are missing(.*\n)*.*dvc pull"):
        promotion.restore(shop.workspace, shop.registry)
    assert (shop.versions(), read_champion(shop.workspace).version) == ([], 2)


@pytest.fixture
def farm(template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workspace:
    """A workspace with data of random pixels, and beside it the model folders `one` and `other`."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.delenv("DVC_ROOT", raising=False)
    workspace = lay_out(tmp_path / "farm", "farm").workspace
    monkeypatch.chdir(workspace.root)
    workspace.store.mkdir(exist_ok=True)
    shutil.copy2(template / "mlflow" / "tracking.db", workspace.store)
    set_params(workspace.params, {"base.factory": "nss.zoo:lenet"})
    x = np.random.default_rng(0).integers(0, 255, (40, 8, 8)).astype(np.uint8)
    np.savez(tmp_path / "farm.npz", x=x, y=np.arange(40) % 2, classes=np.array(["ant", "bee"]))
    data_verb.add(workspace, str(tmp_path / "farm.npz"))
    for seed, name in enumerate(("one", "other")):
        save_model(build_model("nss.zoo:lenet", ("ant", "bee"), (1, 8, 8), seed), tmp_path / name)
    return workspace


def take(workspace: Workspace, name: str):
    source = str(workspace.root.parent / name)
    return adopt(workspace, load_params(workspace.params), open_tracker(workspace), source, forced=True, reason="t")


def test_an_adoption_in_a_new_store_registers_the_pinned_champion_first_and_a_rollback_leads_back(
    farm: Workspace, template: Path
) -> None:
    take(farm, "one")
    before = read_champion(farm)
    assert before.version == 1
    new = clone(farm, template, "new")
    done = take(new, "other").registered
    assert (done.version.number, done.was.number, done.was.model) == (2, 1, before.model)
    registry = Registry(open_tracker(new), "farm")
    assert [registry.by_alias(name).number for name in ("champion", "previous")] == [2, 1]
    register.rollback(new, load_params(new.params), registry.tracker)
    assert read_champion(new) == before


def test_the_pinned_model_that_is_adopted_in_a_new_store_has_figures_and_the_alias(
    farm: Workspace, template: Path
) -> None:
    take(farm, "one")
    new = clone(farm, template, "new")
    version = take(new, "one").registered.version
    assert (version.number, version.tags["nss.verb"]) == (1, "adopt")
    assert "accuracy" in version.figures
    assert Registry(open_tracker(new), "farm").by_alias("champion").number == 1
    assert read_champion(new) == read_champion(farm)
