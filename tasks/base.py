"""Stage `base`: the model that is maintained, trained here or pinned by champion.json."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch.nn.functional as F

from nss.base import Epoch, require_logits, train
from nss.data import Dataset, load_data
from nss.files import replacing, write_json
from nss.model import Classifier, build_model, on_device, save_model
from nss.predict import answers_of, predict
from nss.size import count_parameters
from tasks.champion import Champion, copy_model, load_champion, read_champion
from tasks.params import BaseParams
from tasks.tables import write_csv
from tasks.workspace import Workspace


def run(params: BaseParams, workspace: Workspace) -> None:
    """Write artifacts/base: model/, metrics.json, history.csv, source.json, champion.json.

    The source lists the batches that the model knows: a champion the pinned ones, a model trained here all of data/.
    Which champion it is stands in a file of its own: a trained model that is pinned leaves profile and slices alone.
    """
    data = load_data(workspace.data)
    champion = read_champion(workspace)
    with replacing(workspace.out("base")) as part:
        part.mkdir()
        if champion is None:
            model, history = _trained(params, data)
            save_model(model, part / "model")
        else:
            model, data, history = _pinned(workspace, champion, data, params.device)
            copy_model(workspace.champion, part / "model")
        _write(part, model, data, history)
        pinned = champion and {"name": champion.name, "version": champion.version}
        write_json(part / "champion.json", pinned)


def untrained(
    params: BaseParams, data: Dataset, normalisation: tuple[Sequence[float], Sequence[float]] | None = None
) -> Classifier:
    """Return the network that the settings describe, for the classes and images of `data`.

    normalisation: mean and standard deviation of each channel, by default those of the training split. Raises
    ModelError for what `build_model` refuses, and when the network does not answer with one logit a class.

    >>> untrained(params.base, load_data("data")).spec.factory  # doctest: +SKIP
    'nss.zoo:vgg_small'
    """
    mean, std = normalisation or data.split("train").pixel_statistics()
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
    require_logits(model)
    return model


def _trained(params: BaseParams, data: Dataset) -> tuple[Classifier, list[Epoch]]:
    model = on_device(untrained(params, data), params.device)
    history = train(
        model,
        data,
        params.epochs,
        params.seed,
        batch_size=params.batch_size,
        learning_rate=params.learning_rate,
        weight_decay=params.weight_decay,
    )
    return model, history


def _pinned(
    workspace: Workspace, champion: Champion, data: Dataset, device: str
) -> tuple[Classifier, Dataset, list[Epoch]]:
    """Return the champion, the data that it knows, and how it does there: one line, epoch 0, nothing was trained."""
    model = on_device(load_champion(workspace, champion), device)
    known = data.known_and_new(champion.batches)[0].of_classes(model.spec.classes)
    loss, train_accuracy = _scores(model, known.split("train"))
    return model, known, [Epoch(0, loss, train_accuracy, _scores(model, known.split("val"))[1])]


def _scores(model: Classifier, data: Dataset) -> tuple[float, float]:
    """Return mean loss and accuracy; without images, nan, as in training."""
    if not len(data):
        return float("nan"), float("nan")
    logits, labels = predict(model, data)
    return float(F.cross_entropy(logits, labels)), float((answers_of(logits) == labels).double().mean())


def _write(folder: Path, model: Classifier, data: Dataset, history: Sequence[Epoch]) -> None:
    last = history[-1]
    metrics = {"loss": last.loss, "train_accuracy": last.train_accuracy, "val_accuracy": last.val_accuracy}
    write_json(folder / "metrics.json", {**metrics, "parameters": count_parameters(model)})
    rows = [(epoch.epoch, epoch.loss, epoch.train_accuracy, epoch.val_accuracy) for epoch in history]
    write_csv(folder / "history.csv", ["epoch", "loss", "train_accuracy", "val_accuracy"], rows)
    write_json(folder / "source.json", {"data": data.digest, "batches": [batch.digest for batch in data.batches]})
