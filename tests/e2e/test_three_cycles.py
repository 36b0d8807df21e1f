"""The life of a model: triage chooses each maintenance and says why, and the gate lets nothing worse through."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from flows.demo import SETTINGS, write_batches
from nss.model import load_model, model_digest
from tasks.layout import set_params

pytestmark = pytest.mark.soak
VERBS = ("restructure", "readapt", "extend")


def cycle(laid_out) -> dict:
    """Run a cycle; return its report with what triage found and what the gate said of each candidate."""
    report = json.loads(laid_out.nss_run().out)
    found = {verb: laid_out.json(f"artifacts/triage/{verb}.json") for verb in VERBS}
    gate = laid_out.json("artifacts/gate/gate.json")
    return {
        **report,
        "needed": [verb for verb in VERBS if found[verb]["needed"]],
        "why": {verb: found[verb]["why"] for verb in VERBS},
        "verdicts": {each["verb"]: each["verdict"] for each in gate["judgements"]},
        "reasons": {each["verb"]: [reason["text"] for reason in each["reasons"]] for each in gate["judgements"]},
    }


def champion(laid_out) -> int:
    """The pinned version, which is the one with the alias and the one whose weights lie in champion/."""
    pin = laid_out.json("champion.json")
    version = laid_out.client.get_model_version_by_alias("digits", "champion")
    assert int(version.version) == pin["version"]
    assert version.tags["nss.model"] == pin["model"] == model_digest(load_model(laid_out.root / "champion"))
    return pin["version"]


def add(laid_out, batch: Path) -> None:
    laid_out.run("nss", "data", "add", str(batch), "--new-classes")


def test_a_model_shrinks_learns_and_follows_and_nothing_worse_takes_its_place(laid_out, tmp_path: Path) -> None:
    batches = write_batches(tmp_path / "batches")
    set_params(laid_out.root / "params.yaml", SETTINGS)

    # A first champion; what was cut to the bone beside it is rejected, then and when it is all there is.
    set_params(
        laid_out.root / "params.yaml",
        {"restructure.target": 0.006, "restructure.cap": 0.95, "restructure.fine_tune_steps": 0},
    )
    add(laid_out, batches["old"])
    first = cycle(laid_out)
    assert first["needed"] == ["restructure"]
    assert "macs 2,412,544 (2,200,000 allowed)" in first["why"]["restructure"]
    assert first["verdicts"] == {"restructure": "REJECT", "base": "PROMOTE"}
    assert (first["verdict"], first["promoted"], first["outcome"]) == ("PROMOTE", "base", "promoted")
    assert champion(laid_out) == 1
    worse = cycle(laid_out)
    assert worse["verdicts"] == {"restructure": "REJECT"}
    assert any("which is not chance" in text for text in worse["reasons"]["restructure"])
    assert champion(laid_out) == 1

    set_params(laid_out.root / "params.yaml", {"restructure.target": 0.5, "restructure.fine_tune_steps": 100})
    smaller = cycle(laid_out)
    assert (smaller["needed"], smaller["promoted"]) == (["restructure"], "restructure")
    assert champion(laid_out) == 2

    add(laid_out, batches["new"])
    larger = cycle(laid_out)
    assert (larger["needed"], larger["promoted"]) == (["extend"], "extend")
    assert "new classes: 0 (" in larger["why"]["extend"]
    assert champion(laid_out) == 3
    assert load_model(laid_out.root / "champion").spec.classes == tuple("1234578906")

    add(laid_out, batches["dark"])
    followed = cycle(laid_out)
    assert (followed["needed"], followed["promoted"]) == (["readapt"], "readapt")
    assert "drifted" in followed["why"]["readapt"]
    assert champion(laid_out) == 4

    check_what_people_ask(laid_out)


def check_what_people_ask(laid_out) -> None:
    """Rollback brings the version before; lineage goes back to the first; the ledger has it all."""
    lineage = json.loads(laid_out.run("nss", "lineage", "--json").out)
    assert [each["version"] for each in lineage] == [4, 3, 2, 1]
    rolled = json.loads(laid_out.run("nss", "rollback", "--json").out)
    assert (rolled["was"], rolled["version"]) == (4, 3)
    assert champion(laid_out) == 3
    kinds = [json.loads(line)["kind"] for line in (laid_out.root / "mlflow" / "ledger.jsonl").read_text().splitlines()]
    assert kinds.count("promote") == 4
    assert kinds[-1] == "rollback"
    assert [run.info.status for run in laid_out.runs() if run.info.status != "FINISHED"] == []
