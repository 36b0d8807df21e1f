"""Stage `evaluate`: score the model and its semantic slices on held-out images."""

from __future__ import annotations

from torch import Tensor

from nss.data import Dataset, load_data
from nss.evaluate import evaluate, evaluate_slices
from nss.files import replacing, write_json
from nss.model import load_model, model_digest
from nss.slice import SemanticSlices
from tasks.params import EvaluateParams
from tasks.tables import write_csv
from tasks.workspace import Workspace, require_same_source


def run(params: EvaluateParams, workspace: Workspace) -> None:
    """Write artifacts/evaluate: metrics.json, per_class.csv, confusion.csv, evaluation.json, source.json."""
    data = load_data(workspace.data)
    model = load_model(workspace.out("base") / "model", workspace.packages)
    sources = {"data": data.digest, "model": model_digest(model)}
    require_same_source(workspace.out("slice"), **sources)
    slices = SemanticSlices.load(workspace.out("slice") / "slices.json")
    models = [load_model(workspace.out("slice") / "models" / each.name, workspace.packages) for each in slices]
    held_out = data.split(params.split)
    whole = evaluate(model, held_out, batch_size=params.batch_size)
    parts = evaluate_slices(slices, models, held_out, params.batch_size)
    with replacing(workspace.out("evaluate")) as part:
        part.mkdir()
        scores = {"accuracy": whole.accuracy, "worst_accuracy": whole.worst_accuracy, "images": whole.images}
        votes = {"vote_accuracy": parts.vote_accuracy, "told_accuracy": parts.told_accuracy}
        write_json(part / "metrics.json", {**scores, **votes, **_restructured(workspace, held_out, params)})
        write_csv(part / "per_class.csv", ["class", "accuracy"], whole.per_class.items())
        write_csv(part / "confusion.csv", ["actual", "predicted"], _answers(whole.confusion, whole.classes))
        write_json(part / "evaluation.json", {"model": whole.to_dict(), "slices": parts.to_dict()})
        write_json(part / "source.json", sources)


def _restructured(workspace: Workspace, held_out: Dataset, params: EvaluateParams) -> dict[str, float]:
    folder = workspace.out("restructure") / "model"
    if not folder.exists():
        return {}  # restructure.when is never
    found = evaluate(load_model(folder, workspace.packages), held_out, batch_size=params.batch_size)
    return {"restructured_accuracy": found.accuracy, "restructured_worst_accuracy": found.worst_accuracy}


def _answers(confusion: Tensor, classes: tuple[str, ...]) -> list[tuple[str, str]]:
    """One row an image, as DVC's confusion template counts them."""
    rows = []
    for actual, counts in zip(classes, confusion.tolist(), strict=True):
        for predicted, count in zip(classes, counts, strict=True):
            rows += [(actual, predicted)] * count
    return rows
