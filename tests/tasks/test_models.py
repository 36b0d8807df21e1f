"""Where stages compute: on the device that their parameters name, and nowhere else in its place."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from nss.errors import ModelError
from nss.model import device_of, model_digest
from tasks.models import base_model, model_in
from tasks.params import STAGES

if TYPE_CHECKING:
    from .conftest import Small

MISSING = "mps" if torch.cuda.is_available() else "cuda"
COMPUTING = ("base", "profile", "triage", "restructure", "readapt", "extend", "evaluate")


def test_every_stage_that_computes_says_on_what(small: Small) -> None:
    groups = small.params.model_dump()
    assert tuple(verb for verb in STAGES if "device" in groups[verb]) == COMPUTING


@pytest.mark.parametrize("verb", COMPUTING)
def test_a_stage_on_a_device_that_is_not_there_says_so_and_leaves_its_output(small: Small, verb: str) -> None:
    small.add([0, 1, 2, 3] * 12, 1, new_classes=("dog",))
    changes: dict[str, Any] = {"when": "always"} if verb in ("restructure", "readapt", "extend") else {}
    before = small.files(verb)
    with pytest.raises(ModelError, match=f"the model cannot go to {MISSING}"):
        small.run(verb, device=MISSING, **changes)
    assert small.files(verb) == before


def test_on_the_cpu_the_model_of_a_stage_is_what_it_wrote(small: Small) -> None:
    models = [base_model(small.workspace), model_in(small.workspace.out("base") / "model", small.workspace, "cpu")]
    assert {str(device_of(model)) for model in models} == {"cpu"}
    (digest,) = {model_digest(model) for model in models}
    assert digest == small.read("slice", "source.json")["model"]
