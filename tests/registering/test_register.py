"""From the gate's decision to a version and a champion, also when a process dies on the way."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
from pathlib import Path

import pytest
from mlflow.exceptions import MlflowException

from nss.errors import BusyError, StageError
from nss.files import write_json
from nss.model import load_model, model_digest
from tasks import promotion, register
from tasks.champion import Champion, pin_champion, read_champion, unpin_champion
from tasks.registry import Registry


def go(shop, cycle: str = "run"):
    register.record(shop.workspace, cycle)
    return register.register(shop.workspace, shop.params, shop.tracker, cycle)


def promote(shop, verb: str | None = None, **options: object):
    return register.promote(shop.workspace, shop.params, shop.tracker, verb, **options)


def rollback(shop, reason: str = ""):
    return register.rollback(shop.workspace, shop.params, shop.tracker, reason)


def test_manual_gives_a_candidate_with_where_it_comes_from_and_pins_nothing(shop, batch: str) -> None:
    shop.cycle()
    done = go(shop)
    assert (done.verdict, done.outcome, done.verb, done.version.number) == ("PROMOTE", "candidate", "restructure", 1)
    assert shop.aliases() == {"candidate": 1}
    assert read_champion(shop.workspace) is None
    tags = done.version.tags
    gate = register.read_gate(shop.workspace).candidates["restructure"]
    assert (tags["nss.model"], tags["nss.parent"]) == (gate["model"], gate["parent"])
    assert tags["nss.data_md5"] in (shop.workspace.root / "data.dvc").read_text()
    assert tags["nss.git_sha"] == shop.git("rev-parse", "HEAD").strip()
    assert (tags["nss.verb"], tags["nss.verdict"], tags["nss.metric.accuracy"]) == ("restructure", "PROMOTE", "0.9")
    assert done.version.figures == {"accuracy": 0.9, "macs": 10, "class/t-shirt (top)": 0.45}
    assert done.version.batches == (batch,)
    assert done.version.run_id == shop.log("restructure")
    assert tags["nss.base_run"] == shop.log("base")


def test_a_base_model_was_made_of_none_and_its_version_names_no_parent(shop) -> None:
    shop.cycle({"base": "PROMOTE"})
    path = shop.workspace.out("gate") / "gate.json"
    content = json.loads(path.read_text())
    content["candidates"]["base"]["parent"] = None
    write_json(path, content)
    assert "nss.parent" not in go(shop).version.tags


def test_auto_gives_a_champion_that_is_pinned_and_versioned(auto) -> None:
    auto.cycle()
    done = go(auto)
    assert (done.outcome, done.was) == ("promoted", None)
    assert auto.aliases() == {"champion": 1}
    assert auto.is_settled(done.version)
    assert [entry["kind"] for entry in auto.ledger()] == ["gate", "promote"]
    (entry,) = auto.ledger("promote")
    assert (entry["version"], entry["verb"], entry["verdict"], entry["forced"]) == (1, "restructure", "PROMOTE", False)
    assert (entry["model"], entry["cycle_run_id"]) == (done.version.model, "run")
    assert entry["reasons"] == ["restructure is so"]


@pytest.mark.parametrize("verdicts", [{"restructure": "HOLD"}, {"restructure": "REJECT"}, {}])
def test_what_the_gate_does_not_promote_is_in_the_ledger_and_nowhere_else(auto, verdicts: dict[str, str]) -> None:
    auto.cycle(verdicts)
    done = go(auto)
    assert (done.outcome, done.version) == ("kept", None)
    assert auto.versions() == []
    assert read_champion(auto.workspace) is None
    (entry,) = auto.ledger()
    assert (entry["kind"], entry["verdict"]) == ("gate", next(iter(verdicts.values()), "HOLD"))
    assert {verb: each["reasons"] for verb, each in entry["reasons"].items()} == {
        verb: [f"{verb} is so"] for verb in verdicts
    }


def test_a_decision_is_entered_once_and_again_after_another_one(shop) -> None:
    for verdict in ("HOLD", "HOLD", "REJECT", "HOLD"):
        shop.cycle({"restructure": verdict})
        register.record(shop.workspace, "run")
    assert [entry["verdict"] for entry in shop.ledger()] == ["HOLD", "REJECT", "HOLD"]


def test_the_same_weights_and_evaluation_are_one_version_and_another_evaluation_is_another(shop) -> None:
    for accuracy, number in ((0.9, 1), (0.9, 1), (0.8, 2)):
        shop.cycle(accuracy=accuracy)
        assert go(shop).version.number == number
    assert shop.versions() == [1, 2]


def test_the_champion_before_is_the_previous_and_the_parent(two) -> None:
    assert two.aliases() == {"champion": 2, "previous": 1}
    assert two.registry.by_number(2).tags["nss.parent_version"] == "digits/1"
    assert two.is_settled(two.registry.by_number(2))


def test_rollback_swaps_and_twice_is_back(two) -> None:
    done = rollback(two, "complaints")
    assert (done.was.number, done.version.number) == (2, 1)
    assert two.aliases() == {"champion": 1, "previous": 2}
    assert two.is_settled(done.version)
    (entry,) = two.ledger("rollback")
    assert (entry["version"], entry["previous"], entry["reason"]) == (1, 2, "complaints")
    assert two.is_settled(rollback(two).version)
    assert two.aliases() == {"champion": 2, "previous": 1}


def test_without_a_champion_before_there_is_nothing_to_roll_back_to(auto) -> None:
    with pytest.raises(StageError, match="digits has no previous champion"):
        rollback(auto)
    auto.cycle()
    go(auto)
    with pytest.raises(StageError, match="digits has no previous champion"):
        rollback(auto)
    assert auto.aliases() == {"champion": 1}


def test_what_was_rolled_back_waits_for_somebody_when_a_cycle_makes_it_again(two) -> None:
    rollback(two)
    two.cycle(seed=2, accuracy=0.95)
    done = go(two)
    assert (done.outcome, done.version.number) == ("candidate", 2)
    assert two.aliases() == {"champion": 1, "previous": 2, "candidate": 2}
    assert promote(two).version.number == 2
    assert two.aliases() == {"champion": 2, "previous": 1}
    two.cycle(seed=3)
    assert go(two).outcome == "promoted"


def test_a_champion_pinned_by_hand_becomes_the_previous(two) -> None:
    first = two.registry.by_number(1)
    model = promotion.fetch(two.tracker, first.source, first.model, two.workspace.root / "mlflow" / "x", ())
    pin_champion(two.workspace, Champion("digits", 1, first.model, first.batches), model)
    # What is made of version 1 is what was made of it before; its evaluation is new.
    two.cycle(seed=2, accuracy=0.97)
    assert go(two).version.number == 3
    assert two.aliases() == {"champion": 3, "previous": 1}


def test_a_champion_pinned_by_hand_that_nobody_registered_leaves_the_alias_as_previous(two) -> None:
    folder = two.workspace.out("readapt") / "model"
    pin_champion(two.workspace, Champion("mine", 7, model_digest(load_model(folder)), ("b" * 32,)), folder)
    two.cycle(seed=3)
    assert go(two).version.tags["nss.parent_version"] == "mine/7"
    assert two.aliases() == {"champion": 3, "previous": 2}


def test_a_champion_unpinned_by_hand_does_not_become_its_own_previous(two) -> None:
    unpin_champion(two.workspace)
    two.cycle(seed=2, accuracy=0.95)
    key = two.registry.by_number(2).tags["nss.key"]
    done = go(two)
    assert done.version.tags["nss.key"] == key
    assert two.aliases() == {"champion": 2, "previous": 1}
    assert two.is_settled(done.version)


def test_a_champion_that_changed_since_the_stages_ran_makes_the_decision_outdated(auto) -> None:
    auto.cycle()
    write_json(auto.workspace.out("base") / "champion.json", {"name": "digits", "version": 9})
    done = go(auto)
    assert (done.outcome, done.version) == ("outdated", None)
    assert auto.versions() == []


@pytest.mark.parametrize("verdict", ["HOLD", "REJECT"])
def test_promoting_against_the_gate_takes_force_and_is_recorded(shop, verdict: str) -> None:
    shop.cycle({"restructure": verdict})
    with pytest.raises(StageError, match="the gate promotes nothing"):
        promote(shop)
    with pytest.raises(StageError, match=rf"says {verdict} to restructure\n  - restructure is so"):
        promote(shop, "restructure")
    assert shop.versions() == []
    done = promote(shop, "restructure", forced=True, reason="because")
    assert shop.is_settled(done.version)
    (entry,) = shop.ledger("promote")
    assert (entry["forced"], entry["reason"], entry["verdict"]) == (True, "because", verdict)


def test_a_candidate_that_was_not_made_is_named_with_those_that_were(shop) -> None:
    shop.cycle()
    with pytest.raises(StageError, match=r"no candidate 'extend'\n  allowed: restructure"):
        promote(shop, "extend")


def test_promoting_twice_changes_nothing_the_second_time(shop) -> None:
    shop.cycle()
    assert promote(shop).version.number == promote(shop).version.number == 1
    assert len(shop.ledger("promote")) == 1


def test_a_decision_about_other_data_is_not_promoted(shop) -> None:
    shop.cycle()
    (shop.workspace.data / "dataset.json").write_text("[]")
    with pytest.raises(StageError, match=r"not about what is there now: 'data' has changed(.*\n)*  fix: nss run"):
        promote(shop)
    assert (shop.versions(), read_champion(shop.workspace)) == ([], None)


def test_a_decision_about_another_champion_is_not_promoted(two) -> None:
    two.cycle(seed=3)
    rollback(two)
    with pytest.raises(StageError, match=r"not about what is there now: 'base' has changed"):
        promote(two)
    assert two.aliases() == {"champion": 1, "previous": 2}


STEPS = ("_write_down", "_clear_candidate", "_mark", "_pin", "version_champion", "_enter", "commit")


class Killed(BaseException):
    """Stands for kill -9: nothing may catch it."""


@pytest.mark.parametrize("step", ["version", *STEPS, "previous", "champion"])
def test_a_promotion_that_dies_after_any_step_is_completed_by_the_next_run(
    two, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    shop = two.with_settings(commit=True)
    shop.git("add", "-A")
    shop.git("commit", "-q", "-m", "two")
    shop.cycle(seed=3)
    with monkeypatch.context() as patch:
        _kill(patch, step)
        with pytest.raises(Killed):
            go(shop)
    done = go(shop)
    # Where the pin had changed already, the decision is a thing of the past; else it is carried out now.
    assert done.outcome in ("promoted", "outdated")
    assert shop.versions() == [1, 2, 3]
    assert shop.aliases() == {"champion": 3, "previous": 2}
    assert shop.is_settled(shop.registry.by_number(3))
    assert [entry["version"] for entry in shop.ledger("promote")] == [1, 2, 3]
    assert len(shop.ledger("gate")) == 3
    assert shop.git("log", "--format=%s").splitlines()[0] == "Champion: digits version 3 (restructure)"
    assert shop.git("status", "--porcelain", "champion.json", "champion.dvc") == ""


@pytest.mark.parametrize("step", [*STEPS[:-1], "previous", "champion"])
def test_a_rollback_that_dies_after_any_step_is_completed_once(two, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    with monkeypatch.context() as patch:
        _kill(patch, step)
        with pytest.raises(Killed):
            rollback(two)
    done = rollback(two)
    assert (done.was.number, done.version.number) == (2, 1)
    assert two.aliases() == {"champion": 1, "previous": 2}
    assert two.is_settled(done.version)
    assert len(two.ledger("rollback")) == 1


def _kill(patch: pytest.MonkeyPatch, step: str) -> None:
    if step in STEPS:
        _die_after(patch, promotion, step)
    elif step == "version":
        _die_after(patch, Registry, "add")
    else:
        _die_after(patch, Registry, "set_alias", lambda _, alias, __: alias == step)


def _die_after(patch: pytest.MonkeyPatch, owner, name: str, applies=lambda *_: True) -> None:
    real = getattr(owner, name)

    def dying(*arguments, **options):
        found = real(*arguments, **options)
        if applies(*arguments):
            raise Killed
        return found

    patch.setattr(owner, name, dying)


def test_a_promotion_that_died_is_completed_also_when_data_arrived_meanwhile(
    two, monkeypatch: pytest.MonkeyPatch
) -> None:
    two.cycle(seed=3)
    with monkeypatch.context() as patch:
        _kill(patch, "champion")
        with pytest.raises(Killed):
            go(two)
    two.cycle({"restructure": "HOLD"}, seed=4)
    assert go(two).outcome == "kept"
    assert two.aliases() == {"champion": 3, "previous": 2}
    assert two.is_settled(two.registry.by_number(3))


def test_a_store_that_goes_away_in_the_middle_leaves_the_pin_and_the_next_run_completes(
    two, monkeypatch: pytest.MonkeyPatch
) -> None:
    two.cycle(seed=3)

    def away(*_: object) -> None:
        raise MlflowException("connection refused")

    with monkeypatch.context() as patch:
        patch.setattr(Registry, "set_alias", away)
        with pytest.raises(MlflowException):
            go(two)
    assert read_champion(two.workspace).version == 2
    go(two)
    assert two.is_settled(two.registry.by_number(3))


def test_dvc_in_use_is_busy_and_the_next_run_completes(two, monkeypatch: pytest.MonkeyPatch) -> None:
    two.cycle(seed=3)

    def busy(_: object) -> None:
        raise BusyError("in use")

    with monkeypatch.context() as patch:
        patch.setattr(promotion, "version_champion", busy)
        with pytest.raises(BusyError):
            go(two)
    go(two)
    assert two.is_settled(two.registry.by_number(3))


def test_another_model_in_the_store_than_was_judged_is_refused_and_nothing_changes(two) -> None:
    two.cycle(seed=3)
    key = register.Pipeline(two.workspace).stage_key("restructure").digest
    run = two.tracker.find(stage="restructure", stage_key=key)
    source = two.tracker.client.get_run(run.info.run_id).outputs.model_outputs[0].model_id
    other = two.workspace.out("readapt") / "model"
    two.tracker.client.log_model_artifacts(source, str(other))
    with pytest.raises(StageError, match="is another one"):
        go(two)
    assert two.aliases() == {"champion": 2, "previous": 1}
    assert two.is_settled(two.registry.by_number(2))


def _register_in_process(root: str, barrier, queue) -> None:
    from tasks.params import load_params
    from tasks.tracking import open_tracker
    from tasks.workspace import Workspace

    workspace = Workspace(Path(root))
    params, tracker = load_params(workspace.params), open_tracker(workspace)
    barrier.wait()
    register.record(workspace, "")
    queue.put(register.register(workspace, params, tracker, "").outcome)


def test_two_processes_that_register_at_once_make_one_version(auto) -> None:
    auto.cycle()
    context = multiprocessing.get_context("fork")
    barrier, queue = context.Barrier(2), context.Queue()
    root = str(auto.workspace.root)
    processes = [context.Process(target=_register_in_process, args=(root, barrier, queue)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(100)
    assert [process.exitcode for process in processes] == [0, 0]
    # Who comes second finds another champion than its stages had.
    assert sorted(queue.get(timeout=10) for _ in processes) == ["outdated", "promoted"]
    assert auto.versions() == [1]
    assert auto.aliases() == {"champion": 1}
    assert (len(auto.ledger("gate")), len(auto.ledger("promote"))) == (1, 1)


def test_a_process_that_is_really_killed_leaves_what_the_next_one_completes(two) -> None:
    two.cycle(seed=3)

    def die(workspace) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    pid = os.fork()
    if pid == 0:
        promotion.version_champion = die
        go(two)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    pending = json.loads((two.workspace.store / "ledger.jsonl.pending").read_text())
    assert pending["champion"] == 3
    go(two)
    assert two.is_settled(two.registry.by_number(3))
