"""The page about a cycle: complete, true, safe with any name of a class, the same bytes each time."""

from __future__ import annotations

import io
import json
import shutil
from base64 import b64decode
from dataclasses import dataclass, field, replace
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
import typer
from PIL import Image
from typer.testing import CliRunner

from flows import cli_report
from nss.compare import Pairs
from nss.data import load_data
from nss.errors import StageError
from nss.files import read_json, text_digest, write_json
from nss.tensor_files import read_tensors, write_tensors
from tasks.champion import unpin_champion
from tasks.report import log_cycle, log_report, page, write_report
from tasks.report_facts import read_facts
from tasks.report_runs import Runs, find_runs, runs_of
from tasks.workspace import Workspace

# Names that would be a script, an attribute, a formula, and a cell of a table if somebody let them.
NAMES = ("<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "$\\frac{|$ & {{ 1 }}", "дом")
HEADINGS = ["What changed", "What triage found", "What was done", "Verdict", "Change of each class", "Size and speed"]
HEADINGS += ["Semantic slices", "Kept neurons by layer", "Lineage"]


@dataclass
class Seen(HTMLParser):
    """What a browser would make of a page: elements with their attributes, texts, rows of cells."""

    elements: list[tuple[str, dict[str, str]]] = field(default_factory=list)
    rows: list[list[str]] = field(default_factory=list)
    headings: list[str] = field(default_factory=list)
    text: str = ""
    target: list[str] | None = None
    """whose last text grows"""

    def __post_init__(self) -> None:
        super().__init__()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th", "h1", "h2"):
            self.target = self.rows[-1] if tag in ("td", "th") else self.headings
            self.target.append("")

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th", "h1", "h2"):
            self.target = None

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.target is not None:
            self.target[-1] += data

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attrs for name, attrs in self.elements if name == tag]


def seen(text: str) -> Seen:
    found = Seen()
    found.feed(text)
    return found


def written(workspace: Workspace) -> Seen:
    return seen(write_report(workspace)[0].read_text(encoding="utf-8"))


@pytest.fixture(scope="session")
def cycle(sliced, tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """A whole cycle: a model of three classes, then a batch with a fourth. Not to be changed by tests."""
    small = replace(sliced, workspace=Workspace(tmp_path_factory.mktemp("cycle")))
    unpin_champion(small.workspace)
    small.add([0, 1, 2] * 80, 0, new_classes=NAMES[:3])
    small.run("base", epochs=1)
    small.add([0, 1, 2, 3] * 24, 1, new_classes=NAMES[3:])
    for verb, changes in {
        "profile": {},
        "slice": {},
        "triage": {},
        "restructure": {"when": "always", "fine_tune_steps": 1},
        "readapt": {"epochs": 1},
        "extend": {"epochs": 1},
        "evaluate": {},
    }.items():
        small.run(verb, **changes)
    path = small.workspace.out("evaluate") / "candidates.json"
    candidates = read_json(path)
    by_verb = {each["verb"]: each for each in candidates}
    # What one candidate gained and lost; on so easy images every one of them is right everywhere.
    for name, pairs in zip(NAMES, (Pairs(10, 5, 1, 4), Pairs(10, 7, 3, 0)), strict=False):
        by_verb["readapt"]["known"]["per_class"][name] = pairs.to_dict()
    write_json(path, candidates)
    small.run("gate", min_images=1)
    (small.workspace.root / "dvc.yaml").write_text("stages: {}\n")
    return small.workspace


@pytest.fixture
def workspace(cycle: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workspace:
    """A copy of it for one test, without a tracking store."""
    for name in ("MLFLOW_TRACKING_URI", "DVC_ROOT"):
        monkeypatch.delenv(name, raising=False)
    return Workspace(shutil.copytree(cycle.root, tmp_path / "cycle"))


@pytest.fixture(scope="session")
def text(cycle: Workspace) -> str:
    """The page of that cycle."""
    return page(cycle, read_facts(cycle), Runs(missing="nothing was logged"))


@pytest.fixture(scope="session")
def whole(text: str) -> Seen:
    return seen(text)


def edit(workspace: Workspace, path: str, **changes: Any) -> None:
    write_json(workspace.out(path), {**read_json(workspace.out(path)), **changes})


def without_candidates(workspace: Workspace) -> None:
    write_json(workspace.out("evaluate/candidates.json"), [])
    nothing = {"verdict": "HOLD", "promoted": None, "judgements": [], "candidates": {}}
    write_json(workspace.out("gate/gate.json"), nothing)
    write_json(workspace.out("gate/source.json"), {"candidates": text_digest("[]")})


def test_every_part_is_there_once_and_says_what_the_stages_wrote(cycle: Workspace, whole: Seen) -> None:
    decision = read_json(cycle.out("gate") / "gate.json")
    assert whole.headings == [f"Maintenance cycle: {decision['promoted'] or 'nothing'} is promoted", *HEADINGS]
    assert {each["verb"] for each in decision["judgements"]} == {"base", "restructure", "readapt", "extend"}
    for judgement in decision["judgements"]:
        for reason in judgement["reasons"]:
            assert [reason["check"], reason["verdict"], reason["text"]] in whole.rows
    for verb in ("restructure", "readapt", "extend"):
        finding = read_json(cycle.out("triage") / f"{verb}.json")
        assert [verb, "yes" if finding["needed"] else "no", finding["why"]] in whole.rows
    for verb, each in decision["candidates"].items():
        assert [verb, each["model"], each["parent"] or "–", str(len(each["batches"]))] in whole.rows
        size = [f"{each['figures'][name]:,}" for name in ("parameters", "macs", "bytes")]
        assert [verb, size[0], "0", *size[1:]] in whole.rows
    assert "1 new batch has arrived since the model was made: 96 images." in whole.text


def test_rows_of_classes_are_what_was_compared(cycle: Workspace, whole: Seen) -> None:
    candidates = {each["verb"]: each for each in read_json(cycle.out("evaluate") / "candidates.json")}
    assert [NAMES[0], "10", "60.0%", "90.0%", "+30.0"] in whole.rows
    assert [NAMES[1], "10", "100.0%", "70.0%", "-30.0"] in whole.rows
    known = candidates["readapt"]["known"]["per_class"]
    assert set(known) == set(NAMES[:3])
    for name, each in known.items():
        before, after = each["champion_accuracy"], each["candidate_accuracy"]
        cells = [f"{100 * before:.1f}%", f"{100 * after:.1f}%", f"{100 * (after - before):+.1f}"]
        assert [name, str(each["images"]), *cells] in whole.rows
    new = candidates["extend"]["arrived"]["new_classes"][NAMES[3]]
    assert [NAMES[3], str(new["images"]), "new class", f"{100 * new['accuracy']:.1f}%", "–"] in whole.rows


def test_names_of_classes_are_texts_and_nothing_else(whole: Seen) -> None:
    assert whole.all("script") == []
    assert [attrs for _, attrs in whole.elements if any(name.startswith("on") for name in attrs)] == []
    assert {attrs["src"][:11] for attrs in whole.all("img")} == {"data:image/"}
    first_cells = {row[0] for row in whole.rows}
    assert set(NAMES) <= first_cells
    assert any(NAMES[1] in attrs["alt"] for attrs in whole.all("img"))


def test_the_page_needs_nothing_beside_itself_and_is_accessible(whole: Seen, text: str) -> None:
    assert whole.all("html") == [{"lang": "en"}]
    assert [attrs for tag in ("link", "a", "img") for attrs in whole.all(tag) if "//" in attrs.get("href", "")] == []
    for forbidden in ("url(", "@import", "src=http", 'src="http'):
        assert forbidden not in text
    policies = [each["content"] for each in whole.all("meta") if each.get("http-equiv") == "Content-Security-Policy"]
    assert policies == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'"]
    assert all(attrs["alt"].strip() for attrs in whole.all("img"))
    assert all(attrs.get("scope") in ("col", "row") for attrs in whole.all("th"))
    assert whole.elements.count(("main", {})) == 1


def decoded(found: Seen, kind: str) -> dict[str, bytes]:
    """{alt: content} of the pictures of a kind."""
    start = f"data:image/{kind};base64,"
    shown = [attrs for attrs in found.all("img") if attrs["src"].startswith(start)]
    return {attrs["alt"]: b64decode(attrs["src"].removeprefix(start), validate=True) for attrs in shown}


def test_drawings_are_whole_and_keep_names_as_they_are(whole: Seen) -> None:
    drawings = decoded(whole, "svg+xml")
    texts = {alt: " ".join(ElementTree.fromstring(content).itertext()) for alt, content in drawings.items()}
    (dendrogram,) = [text for alt, text in texts.items() if alt.startswith("How categories merge")]
    for name in NAMES[:3]:
        assert name in dendrogram
    begins = (
        "Neurons kept",
        "Accuracy on validation",
        "Accuracy on new",
        "Neurons used by old",
        "Change of each class",
    )
    assert [begin for begin in begins if not any(alt.startswith(begin) for alt in texts)] == []


def test_examples_are_images_of_their_categories_that_the_model_knows(cycle: Workspace, whole: Seen) -> None:
    shown = decoded(whole, "png")
    known = load_data(cycle.data).batches[0]
    assert len(shown) == 3 * 3
    for label, name in enumerate(NAMES[:3]):
        expected = known.images[known.labels == label][:3, 0].numpy()
        found = [np.asarray(Image.open(io.BytesIO(shown[f"example {number} of {name}"]))) for number in (1, 2, 3)]
        assert np.array_equal(np.stack(found), expected)


def test_the_same_artifacts_give_the_same_bytes(workspace: Workspace) -> None:
    first = write_report(workspace)[0].read_bytes()
    other = write_report(workspace, workspace.root / "other" / "page.html")[0].read_bytes()
    assert first == other
    edit(workspace, "triage/extend.json", why="because")
    assert write_report(workspace)[0].read_bytes() != first


def test_what_had_nothing_to_do_is_one_line(workspace: Workspace) -> None:
    without_candidates(workspace)
    shutil.rmtree(workspace.out("readapt") / "model")
    write_json(workspace.out("readapt/result.json"), {"done": False, "why": "triage: no drift"})
    found = written(workspace)
    assert "readapt: nothing to do (triage: no drift)." in " ".join(found.text.split())


def test_without_a_candidate_the_base_model_is_described(workspace: Workspace) -> None:
    without_candidates(workspace)
    found = written(workspace)
    assert found.headings == ["Maintenance cycle: nothing is promoted", *HEADINGS]
    assert "Nothing was made, so there is nothing to judge: the champion stays." in found.text
    parameters = read_json(workspace.out("base") / "metrics.json")["parameters"]
    weights = (workspace.out("base") / "model" / "model.safetensors").stat().st_size
    assert ["base", f"{parameters:,}", "0", "–", f"{weights:,}"] in found.rows


def test_masked_weights_are_counted(workspace: Workspace) -> None:
    path = workspace.out("readapt") / "model" / "model.safetensors"
    tensors, meta = read_tensors(path)
    mask = torch.ones(7, 3, dtype=torch.bool)
    mask[:2] = False
    write_tensors(path, {**tensors, "layer.weight_mask": mask}, meta)
    (row,) = [row for row in written(workspace).rows if row[0] == "readapt" and len(row) == 5]
    assert row[2] == "6"


def test_a_pinned_champion_is_named(workspace: Workspace) -> None:
    write_json(workspace.out("base/champion.json"), {"name": "<b>cats</b>", "version": 3})
    found = written(workspace)
    assert "Maintained is the champion, <b>cats</b> version 3." in found.text
    assert "beside <b>cats</b> version 3" in found.text
    assert found.all("b") == []


def test_without_the_data_the_rest_is_told(workspace: Workspace) -> None:
    shutil.rmtree(workspace.data)
    found = written(workspace)
    assert "data/ is not here, or not what this cycle read" in found.text
    assert decoded(found, "png") == {}
    assert found.headings[1:] == HEADINGS


def test_without_a_cycle_nothing_is_written(tmp_path: Path) -> None:
    with pytest.raises(StageError, match="no cycle has come to its end here"):
        write_report(Workspace(tmp_path))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("path", "changes", "named"),
    [
        ("slice/source.json", {"model": "another"}, "slice"),
        ("readapt/source.json", {"data": "other"}, "readapt"),
        ("base/source.json", {"data": "other"}, "base"),
        ("gate/source.json", {"candidates": "others"}, "gate"),
    ],
)
def test_stages_of_different_cycles_make_no_report(workspace: Workspace, path: str, changes: dict, named: str) -> None:
    edit(workspace, path, **changes)
    with pytest.raises(StageError, match=f"has not come to its end: {named} and evaluate are about different models"):
        write_report(workspace)
    assert not (workspace.root / "report").exists()


class Client:
    """Remembers texts, and knows two runs."""

    def __init__(self) -> None:
        self.texts: dict[str, str] = {}
        tags = {"nss.stage.base.run_id": "b1", "nss.stage.restructure.run_id": "r1", "nss.stage.gate.run_id": ""}
        metrics = {"original_latency_ms_1": 0.5, "latency_ms_1": 0.25, "latency_ms_64": 7.0, "macs": 9.0}
        self.runs = {"c1": ({}, tags), "r1": (metrics, {})}

    def get_run(self, run_id: str) -> Any:
        metrics, tags = self.runs[run_id]
        return SimpleNamespace(info=SimpleNamespace(run_id=run_id), data=SimpleNamespace(metrics=metrics, tags=tags))

    def log_text(self, run_id: str, text: str, path: str) -> None:
        self.texts[f"{run_id}/{path}"] = text


@pytest.fixture
def tracker() -> Any:
    return SimpleNamespace(uri="http://127.0.0.1:5000/", experiment_id="7", client=Client())


def test_runs_are_linked_and_latencies_are_sorted_by_model(tracker) -> None:
    runs = runs_of(tracker, tracker.client.get_run("c1"))
    start = "http://127.0.0.1:5000/#/experiments/7/runs"
    assert runs.links == {"cycle": f"{start}/c1", "base": f"{start}/b1", "restructure": f"{start}/r1"}
    assert runs.latency == {"base": {1: 0.5}, "restructure": {1: 0.25, 64: 7.0}}
    tracker.uri = "sqlite:///x"
    assert runs_of(tracker, tracker.client.get_run("c1")).links["cycle"] == "c1"


def test_page_and_cards_are_logged_to_the_run_of_the_cycle(workspace: Workspace, tracker) -> None:
    log_report(tracker, "c1", workspace)
    cards = {f"c1/report/card-{verb}.md" for verb in ("base", "restructure", "readapt", "extend")}
    assert set(tracker.client.texts) == {"c1/report/index.html", *cards}
    found = seen(tracker.client.texts["c1/report/index.html"])
    assert [row[5:] for row in found.rows if row[0] in ("base", "restructure") and len(row) == 7] == [
        ["0.5", "–"],
        ["0.25", "7"],
    ]
    assert {each["href"] for each in found.all("a")} == set(
        runs_of(tracker, tracker.client.get_run("c1")).links.values()
    )


def test_the_card_of_a_version_is_logged_to_the_run_that_it_leads_to(workspace, tracker, monkeypatch, capsys) -> None:
    monkeypatch.setattr("tasks.report.open_tracker", lambda _: tracker)
    assert log_cycle(str(workspace.root), "c1", "v1", "restructure") == 0
    assert capsys.readouterr().err == ""
    texts = tracker.client.texts
    assert texts["v1/card.md"] == texts["c1/report/card-restructure.md"]
    assert texts["v1/card.md"] != texts["c1/report/card-base.md"]


def test_the_cycle_is_found_by_what_the_gate_depends_on(workspace: Workspace, tracker, monkeypatch) -> None:
    stored = {("gate", "key of the gate"): "g1", ("cycle", "g1"): "c1"}

    def find(**tags: str) -> Any:
        found = stored.get(tuple(tags.values()))
        return found and SimpleNamespace(info=SimpleNamespace(run_id=found), data=tracker.client.runs.get(found))

    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:5000")
    monkeypatch.setattr("tasks.report_runs.open_tracker", lambda _: SimpleNamespace(**vars(tracker), find=find))
    monkeypatch.setattr("tasks.report_runs.runs_of", lambda _, cycle: cycle.info.run_id)
    key = SimpleNamespace(digest="key of the gate")
    monkeypatch.setattr(
        "tasks.report_runs.Pipeline", lambda _: SimpleNamespace(stage_key=lambda verb: {"gate": key}[verb])
    )
    assert find_runs(workspace) == "c1"
    key.digest = "another"
    assert find_runs(workspace).missing.startswith("MLflow has no such cycle")


def test_a_tracking_store_that_is_away_is_done_without(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    assert find_runs(workspace).missing == "the tracking store did not answer"


def test_a_report_makes_no_tracking_store(workspace: Workspace) -> None:
    assert find_runs(workspace).missing == "nothing was logged to MLflow yet"
    assert not (workspace.root / "mlflow").exists()


def test_the_command_says_where_the_page_is(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workspace.root)
    app = typer.Typer()
    cli_report.add_commands(app)
    done = CliRunner().invoke(app, ["--json"])
    assert done.exit_code == 0
    path = workspace.root / "report" / "index.html"
    decision = read_json(workspace.out("gate") / "gate.json")
    expected = {"verdict": decision["verdict"], "promoted": decision["promoted"]}
    assert json.loads(done.stdout) == {"path": str(path), "bytes": path.stat().st_size, **expected}
    done = CliRunner().invoke(app, ["--out", "elsewhere.html"])
    assert "see elsewhere.html" in done.stdout
    assert (workspace.root / "elsewhere.html").read_bytes() == path.read_bytes()
