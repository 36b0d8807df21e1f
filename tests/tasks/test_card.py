"""Model cards: what they tell is what was judged, and names of classes are no Markdown."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from nss.compare import Comparison, Pairs, Score
from nss.errors import StageError
from nss.files import text_digest, write_json
from nss.gate import Candidate, Decision, Judgement, Reason, Verdict
from nss.tensor_files import write_tensors
from tasks.card import model_card, plain
from tasks.tables import write_csv, write_nothing
from tasks.workspace import Workspace

SOURCE = {"data": "data-digest", "model": "champion-digest"}
ORIGIN = {"nss.data_md5": "1234.dir", "nss.git_sha": "abcd"}
KNOWN = Comparison(
    Pairs(200, 180, 8, 2), {"cat": Pairs(200, 180, 8, 2)}, {}, {}, Pairs(200, 180, 8, 2).interval(), 0.95
)
ARRIVED = Comparison(Pairs(0, 0, 0, 0), {}, {}, {"a|b": Score(50, 40)}, (-1.0, 1.0), 0.95)
SIZE = {"parameters": 1200, "macs": 90_000, "bytes": 5000}
EXTENDED = Candidate("extend", 250, 0.888, {"cat": 0.91, "a|b": 0.8}, KNOWN, ARRIVED, SIZE, {**SIZE, "bytes": 4000})
REASONS = (
    Reason("class accuracy", Verdict.PROMOTE, "class a|b 0.800 (0.25 asked for)"),
    Reason("benefit", Verdict.PROMOTE, "new classes: a|b"),
)
SLICES = {"slices": [], "vote_accuracy": 0.9, "told_accuracy": 0.9}


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    """What the stages leave of a champion that was extended by one class; there is no data/."""
    found = Workspace(tmp_path)
    for verb in ("base", "extend"):
        write_tensors(found.out(verb) / "model" / "model.safetensors", {"w": torch.ones(2)}, {})
    spec = {"factory": "nss.zoo:lenet", "classes": ["cat"], "input_shape": [3, 32, 32]}
    candidate = described(EXTENDED)
    decision = Decision(Verdict.PROMOTE, "extend", (Judgement("extend", Verdict.PROMOTE, REASONS),)).to_dict()
    for path, content in {
        "base/model/model.json": spec,
        "base/champion.json": {"name": "pets", "version": 3},
        "base/source.json": {"data": "data-digest", "batches": ["b1"]},
        "base/metrics.json": {"parameters": 1000},
        "evaluate/evaluation.json": {
            "model": {"images": 200, "accuracy": 0.94, "per_class": {"cat": 0.94}},
            "slices": SLICES,
        },
        "evaluate/candidates.json": [candidate],
        "evaluate/source.json": SOURCE,
        "gate/gate.json": {**decision, "candidates": {}},
        "gate/source.json": {"candidates": text_digest(json.dumps([candidate]))},
        "slice/source.json": SOURCE,
        "triage/source.json": SOURCE,
    }.items():
        write_json(found.out(path), content)
    for verb in ("restructure", "readapt", "extend"):
        write_json(found.out(verb) / "source.json", SOURCE)
        write_json(found.out("triage") / f"{verb}.json", {"needed": False, "why": "no", "evidence": {}})
        write_nothing(found.out(verb), {}, "no")
    write_csv(found.out("slice") / "neurons.csv", ["slice", "layer", "kept", "total"], [])
    return found


def described(candidate: Candidate) -> dict[str, Any]:
    """What the stage `evaluate` writes about a candidate."""
    plain_fields = ("verb", "images", "accuracy", "per_class", "size", "champion_size")
    comparisons = {name: getattr(candidate, name).to_dict() for name in ("known", "arrived")}
    digests = {"model": "extended-digest", "parent": "champion-digest", "batches": ["b1", "b2"]}
    return {**{name: getattr(candidate, name) for name in plain_fields}, **comparisons, **digests}


CARD = r"""# Model card: extend extended-dig

- what: an image classifier of 2 classes with held-out images, extended by new classes
- classes: cat, a\|b
- input: uint8 images, channels x height x width 3 x 32 x 32; its normalisation is part of it
- factory: `nss.zoo:lenet`
- digest: `extended-digest`
- made of: `champion-digest`, which is pets version 3

| figure | this model | base model |
|---|---:|---:|
| parameters | 1,200 | 1,200 |
| macs | 90,000 | 90,000 |
| bytes | 5,000 | 4,000 |
| masked | 0 | 0 |

## Verdict of the gate

**PROMOTE**: new classes: a\|b

- PROMOTE, class accuracy: class a\|b 0.800 (0.25 asked for)
- PROMOTE, benefit: new classes: a\|b

## Accuracy

88.80% on 250 held-out images, worst class a\|b 80.00%

| class | accuracy |
|---|---:|
| cat | 91.00% |
| a\|b | 80.00% |

### Beside pets version 3 on known batches

-3.00 points on 200 images (95 % interval -6.00 to +0.00, p 0.11)

| class | images | before | this model |
|---|---:|---:|---:|
| cat | 200 | 94.00% | 91.00% |

### Beside pets version 3 on new batches

| class | images | before | this model |
|---|---:|---:|---:|
| a\|b | 50 | new class | 80.00% |

## Data

- data version `1234.dir`
- batches it knows: `b1`, `b2`
- commit `abcd`

## Limits

- It answers one of its classes to any image, also to one of none of them.
- Accuracies are on held-out images of the same batches; other sources of images may give others.
"""


def test_a_card_tells_what_the_model_is_how_it_was_judged_and_what_it_was_made_of(workspace: Workspace) -> None:
    assert model_card(workspace, "extend", ORIGIN) == CARD


def test_without_a_champion_it_is_compared_with_the_base_model(workspace: Workspace) -> None:
    write_json(workspace.out("base") / "champion.json", None)
    card = model_card(workspace, "extend", {})
    assert "### Beside the base model on known batches" in card
    assert "- made of: `champion-digest`\n" in card
    assert "pets" not in card
    assert "- data version `unknown`\n" in card


def test_there_is_no_card_of_what_the_cycle_did_not_make(workspace: Workspace) -> None:
    with pytest.raises(StageError, match=r"the cycle made no candidate 'readapt'\n.*\n  allowed: extend"):
        model_card(workspace, "readapt", ORIGIN)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("plain words, 3-4 (x)", "plain words, 3-4 (x)"),
        ("<script>", r"\<script>"),
        ("[a](http://b)", r"\[a\](http://b)"),
        ("**a** _b_ `c` ~d~", r"\*\*a\*\* \_b\_ \`c\` \~d\~"),
        ("two\nlines\r\n# more", "two lines # more"),
        ("\\|", r"\\\|"),
        ("&lt;", r"\&lt;"),
    ],
)
def test_nothing_in_a_name_is_markdown_or_html(name: str, expected: str) -> None:
    assert plain(name) == expected
