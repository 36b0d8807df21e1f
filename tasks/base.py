"""Stage `base`: train the model that is maintained."""

from __future__ import annotations

from nss.base import train
from nss.data import load_data
from nss.files import replacing, write_json
from nss.model import build_model, save_model
from nss.size import count_parameters
from tasks.params import BaseParams
from tasks.tables import write_csv
from tasks.workspace import Workspace


def run(params: BaseParams, workspace: Workspace) -> None:
    """Train on data/ and write artifacts/base: model/, metrics.json, history.csv, source.json."""
    data = load_data(workspace.data)
    mean, std = data.split("train").pixel_statistics()
    model = build_model(
        params.factory,
        data.classes,
        data.image_shape,
        params.seed,
        mean=mean,
        std=std,
        arguments=params.arguments,
        allow=params.packages,
    )
    history = train(
        model,
        data,
        params.epochs,
        params.seed,
        batch_size=params.batch_size,
        learning_rate=params.learning_rate,
        weight_decay=params.weight_decay,
    )
    with replacing(workspace.out("base")) as part:
        part.mkdir()
        save_model(model, part / "model")
        last = history[-1]
        metrics = {"loss": last.loss, "train_accuracy": last.train_accuracy, "val_accuracy": last.val_accuracy}
        write_json(part / "metrics.json", {**metrics, "parameters": count_parameters(model)})
        rows = [(epoch.epoch, epoch.loss, epoch.train_accuracy, epoch.val_accuracy) for epoch in history]
        write_csv(part / "history.csv", ["epoch", "loss", "train_accuracy", "val_accuracy"], rows)
        write_json(part / "source.json", {"data": data.digest})
