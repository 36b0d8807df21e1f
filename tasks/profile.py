"""Stage `profile`: gather what each neuron contributes to each category."""

from __future__ import annotations

from nss.errors import StageError
from nss.files import read_json, replacing, write_json
from nss.profile import Profile, profile
from nss.shards import first_of_each_class, shards
from tasks.batches import known_data
from tasks.models import base_model
from tasks.params import ProfileParams
from tasks.workspace import Workspace


def run(params: ProfileParams, workspace: Workspace) -> None:
    """Profile the base model and write artifacts/profile: profile.safetensors, metrics.json, source.json."""
    source = read_json(workspace.out("base") / "source.json", StageError)
    gathered = (
        _in_shards(params, workspace) if params.shards > 1 or params.dask else profile_shard(params, workspace, 0)
    )
    with replacing(workspace.out("profile")) as part:
        part.mkdir()
        gathered.save(part / "profile.safetensors")
        counts = {"images": int(gathered.counts.sum()), "neurons": sum(gathered.layers.values())}
        write_json(part / "metrics.json", {**counts, "layers": len(gathered.layers)})
        write_json(part / "source.json", {"data": source["data"], "model": gathered.model})


def profile_shard(params: ProfileParams, workspace: Workspace, number: int) -> Profile:
    """Profile the base model on one of `params.shards` parts of the images that the parameters choose."""
    model = base_model(workspace)
    data = known_data(workspace, model.spec.classes).split(params.split)
    if params.samples_per_class is not None:
        data = first_of_each_class(data, params.samples_per_class)
    return profile(
        model,
        shards(data, params.shards)[number],
        params.metrics,
        batch_size=params.batch_size,
        windows=params.windows,
        device=params.device,
        bf16=params.bf16,
    )


def _in_shards(params: ProfileParams, workspace: Workspace) -> Profile:
    # Prefect takes a second to import.
    from tasks.fan_out import profile_in_shards

    return profile_in_shards(params, workspace)
