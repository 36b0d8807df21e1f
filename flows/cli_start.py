"""The commands to start with: init lays out a workspace, adopt takes a trained model, demo tells a story."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Annotated

import typer


def add_commands(app: typer.Typer) -> None:
    """Add the commands to `nss`."""
    app.command(epilog="Examples:  nss init   |   nss init models/cats --name cats")(init)
    app.command(
        epilog="Examples:  nss adopt cats.safetensors   |   nss adopt models:/cats@production   |   "
        "nss adopt cats.pt --mean 0.485,0.456,0.406 --std 0.229,0.224,0.225"
    )(adopt)
    app.command(epilog="Examples:  nss demo   |   nss demo tour --json")(demo)


def init(
    folder: Annotated[Path, typer.Argument(help="A folder of your own repository, or a new one.")] = Path(),
    name: Annotated[str, typer.Option(help="Of the model in the registry; default: the folder's.")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")] = False,
) -> None:
    """Lay out a workspace: dvc.yaml, params.yaml, an inbox, and what git and DVC need. Nothing is overwritten."""
    from tasks.layout import lay_out

    root = folder.resolve()
    made = lay_out(root, name or root.name)
    if as_json:
        content = {"root": str(root), "files": made.files, "is_new_repository": made.is_new_repository}
        sys.stdout.write(f"{json.dumps(content, indent=1)}\n")
        return
    new = " (a new git repository)" if made.is_new_repository else ""
    lines = [
        f"laid out in {root}{new}: {', '.join(made.files)}",
        "",
        "next",
        "  params.yaml                      base.factory: your network; base.packages: the package it lies in",
        "  nss data add PHOTOS              a folder of class folders; --resize 64x64 when sizes differ",
        "  nss adopt WEIGHTS                a model of yours that is trained already, instead of training one",
        "  nss run                          train, slice, restructure, evaluate",
        "  nss promote                      what the gate lets through becomes the champion",
        "  git add -A && git commit         what was done can be done again",
    ]
    sys.stdout.write("\n".join(lines) + "\n")


def adopt(
    source: Annotated[
        str,
        typer.Argument(help="A .safetensors or .pt file, a model folder, models:/NAME@ALIAS or models:/NAME/VERSION."),
    ],
    mean: Annotated[
        str, typer.Option(help="Of each channel, on pixels from 0 to 1: what a file of weights was trained with.")
    ] = "",
    std: Annotated[str, typer.Option(help="Likewise; default of both: those of the training split.")] = "",
    force: Annotated[bool, typer.Option("--force", help="Also when it is no better than guessing.")] = False,
    reason: Annotated[str, typer.Option(help="Why; the ledger keeps it.")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")] = False,
) -> None:
    """Take a model of your own as the champion. It is scored on held-out images of data/ first.

    A file holds the weights of the network that `base` in params.yaml describes, for the classes of data/ in their
    order. Nothing in it is run. The model counts as made for all images that are in data/ now.
    """
    if force and not reason.strip():
        raise typer.BadParameter("--force needs a --reason: the ledger keeps it", param_hint="--reason")
    if bool(mean) != bool(std):
        raise typer.BadParameter("one without the other", param_hint="--mean --std")
    normalisation = (_numbers(mean, "--mean"), _numbers(std, "--std")) if mean else None
    from flows import models
    from tasks import adopt as adopting
    from tasks.lock import exclusive

    with models.session() as now, exclusive(now.workspace):
        done = adopting.adopt(
            now.workspace, now.params, now.tracker, source, normalisation, forced=force, reason=reason.strip()
        )
    if as_json:
        means, deviations = done.normalisation
        content = {**models.moved(done.registered), "source": done.source, "scores": done.scores.to_dict()}
        content |= {"mean": list(means), "std": list(deviations), "sizes": done.sizes}
        sys.stdout.write(f"{json.dumps(content, indent=1, ensure_ascii=False)}\n")
        return
    worst = f"worst class {done.scores.worst_class} {done.scores.worst_accuracy:.2%}"
    scores = f"accuracy {done.scores.accuracy:.2%} on {done.scores.images} held-out images, {worst}"
    sizes = "{parameters:,} parameters, {macs:,} multiply-adds an image, {bytes:,} bytes".format(**done.sizes)
    mean, std = (", ".join(f"{value:.3g}" for value in each) for each in done.normalisation)
    whose = "as asked for" if normalisation else "the training images', or the model's own"
    lines = (f"{done.source}: {scores}", sizes, f"normalised by mean {mean} and std {std}: {whose}")
    sys.stdout.write("\n".join([*lines, models.moved_text(done.registered), ""]))


def _numbers(text: str, option: str) -> list[float]:
    try:
        found = [float(each) for each in text.split(",")]
    except ValueError:
        found = [math.nan]
    if not all(map(math.isfinite, found)):
        raise typer.BadParameter(f"{text} is not a list of numbers like 0.485,0.456,0.406", param_hint=option)
    return found


def demo(
    folder: Annotated[Path, typer.Argument(help="Where to lay out the workspace of the story.")] = Path("demo"),
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")] = False,
) -> None:
    """Tell the story of three cycles: a model gets smaller, learns new classes, and follows a drift."""
    from flows.launch import Server

    server = Server.prepare()
    from flows import show
    from flows.demo import CHAPTERS, chapter_lines, tell_story
    from flows.progress import Bar

    server.wait()
    reports, cycle = [], None
    with Bar(len(CHAPTERS), is_quiet=as_json) as bar:
        story = tell_story(
            folder.resolve(),
            lambda chapter: bar.say(f"\n{chapter.title}"),
            lambda stage: bar.say(f"  {show.stage_line(stage)}"),
        )
        for chapter, workspace, cycle in story:
            reports.append({"chapter": chapter.title, **cycle.to_dict()})
            bar.step("\n".join(f"  {line}" for line in chapter_lines(workspace, cycle)))
    if as_json:
        sys.stdout.write(f"{json.dumps(reports, indent=1)}\n")
    elif cycle:
        sys.stdout.write(f"{show.summary(cycle, workspace, is_temporary=server.is_temporary)}\n")
        sys.stdout.write(f"Where   cd {folder}, then nss status, nss lineage, nss report\n")
