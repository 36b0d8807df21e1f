"""Stage `slice`: find the critical neurons, merge categories into semantic slices, and cut a model for each slice."""

from __future__ import annotations

from nss.critical import critical_neurons
from nss.evaluate import SlicesEvaluation, evaluate_slices
from nss.files import replacing, write_json
from nss.model import model_digest, save_model
from nss.profile import Profile
from nss.remove import RemovalPlan, plan_removal, remove
from nss.size import count_parameters
from nss.slice import semantic_slices
from tasks.batches import known_data
from tasks.models import base_model
from tasks.params import SliceParams
from tasks.tables import write_csv
from tasks.workspace import Workspace, require_same_source


def run(params: SliceParams, workspace: Workspace) -> None:
    """Slice the base model and write artifacts/slice.

    It holds critical.safetensors, slices.json, models/<slice>/, neurons.csv, removal.json, slices_val.json,
    metrics.json and source.json.
    """
    model = base_model(workspace)
    data = known_data(workspace, model.spec.classes)
    sources = {"data": data.digest, "model": model_digest(model)}
    require_same_source(workspace.out("profile"), **sources)
    profile = Profile.load(workspace.out("profile") / "profile.safetensors")
    critical = critical_neurons(profile, params.metric, params.rule, params.threshold)
    slices = semantic_slices(
        critical, profile, params.n_slices, params.distance_threshold, params.linkage, params.layers
    )
    plans = {each.name: plan_removal(model, each.neurons) for each in slices}
    models = [remove(model, each.neurons) for each in slices]
    scores = evaluate_slices(slices, models, data.split("val"))
    with replacing(workspace.out("slice")) as part:
        part.mkdir()
        critical.save(part / "critical.safetensors")
        slices.save(part / "slices.json")
        for each, cut in zip(slices, models, strict=True):
            save_model(cut, part / "models" / each.name)
        rows = _neuron_rows(plans)
        write_csv(part / "neurons.csv", ["slice", "layer", "kept", "total"], rows)
        write_json(part / "removal.json", {name: plan.to_dict() for name, plan in plans.items()})
        write_json(part / "slices_val.json", scores.to_dict())
        write_json(part / "metrics.json", _metrics(rows, scores, count_parameters(model)))
        write_json(part / "source.json", sources)


def _neuron_rows(plans: dict[str, RemovalPlan]) -> list[tuple[str, str, int, int]]:
    """Count what each slice's model has left, coupled neurons that the union added included."""
    return [(name, layer, each.kept, each.total) for name, plan in plans.items() for layer, each in plan.layers.items()]


def _metrics(rows: list[tuple[str, str, int, int]], scores: SlicesEvaluation, parameters: int) -> dict[str, float]:
    """Summarise: shares are means over the slices, accuracies are on the validation split."""
    count = len(scores.slices)
    return {
        "slices": count,
        "neurons_kept": sum(kept for *_, kept, _ in rows) / sum(total for *_, total in rows),
        "parameters_kept": sum(each.parameters for each in scores.slices) / count / parameters,
        "recall": sum(each.recall for each in scores.slices) / count,
        "false_positive_rate": sum(each.false_positive_rate for each in scores.slices) / count,
        "vote_accuracy": scores.vote_accuracy,
        "told_accuracy": scores.told_accuracy,
    }
