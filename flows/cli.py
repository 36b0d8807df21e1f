"""The command `nss`. Nothing heavy is imported before a command needs it, so that --help answers at once."""

from __future__ import annotations

import json
import sys
from enum import StrEnum
from itertools import chain, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from flows import cli_models, cli_report, cli_service, cli_start
from tasks.garbage import collect_rarely

if TYPE_CHECKING:
    from typer.models import CommandInfo, TyperInfo

OK, CRASH, MISTAKE, BUSY = 0, 1, 2, 75

_CODES = {"BusyError": BUSY, "CrashError": CRASH}
_EXIT_CODES = (
    "Exit codes: 0 done; 1 crashed, or `doctor` found something wrong; 2 a mistake in the command, in params.yaml or "
    "in the data; 75 somebody else works on the repository, try again later; 130 interrupted; 143 stopped by SIGTERM."
)

# What `nss --help` shows, in this order.
PANELS = {
    "Start": ("doctor", "demo", "init", "data", "adopt"),
    "Maintain": ("run", "status", "report"),
    "Versions": ("promote", "rollback", "compare", "lineage"),
    "Unattended": ("watch", "serve"),
    "Serving, and what DVC calls": ("export", "stage"),
}
_ORDER = tuple(chain.from_iterable(PANELS.values()))


class Ordered(TyperGroup):
    """The commands in the order of PANELS, whatever the order they were added in."""

    def list_commands(self, ctx: object) -> list[str]:
        """Return their names."""
        return sorted(self.commands, key=_ORDER.index)


app = typer.Typer(
    cls=Ordered,
    help="Keep a trained image classifier maintained by semantic slices of its neurons.",
    epilog=_EXIT_CODES,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


def _say_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        _print(f"nss {version('nss')}")
        raise typer.Exit


@app.callback()
def main_options(
    _: Annotated[bool, typer.Option("--version", callback=_say_version, is_eager=True, help="Print it.")] = False,
) -> None:
    """Keep a trained image classifier maintained by semantic slices of its neurons."""


data = typer.Typer(
    help="Add to the versioned data set, or look at it.",
    epilog="Examples:  nss data demo   |   nss data add photos/   |   nss data status",
    no_args_is_help=True,
)
app.add_typer(data, name="data")

Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]


class Format(StrEnum):
    """What `nss export` writes."""

    onnx = "onnx"
    program = "program"


@app.command(epilog="Examples:  nss run   |   nss run --json | jq .stages")
def run(
    as_json: Json = False,
    retries: Annotated[int, typer.Option(min=0, max=10, help="How often a failing stage is tried again.")] = 0,
) -> None:
    """Run the maintenance cycle: every stage whose inputs changed, tracked in MLflow and Prefect."""
    from contextlib import nullcontext

    from flows.launch import Server
    from tasks.recorder import beside

    with beside() or nullcontext() as recorder:
        server = Server.prepare()
        from flows import show
        from flows.maintain import run_cycle
        from flows.progress import Bar
        from tasks.params import STAGES
        from tasks.pipeline import last_line
        from tasks.workspace import find_workspace

        workspace = find_workspace()
        server.wait()
        following = dict(pairwise((*STAGES, "")))
        with Bar(len(STAGES), STAGES[0], is_quiet=as_json, note=last_line) as bar:
            report = run_cycle(
                workspace,
                retries=retries,
                tell=lambda stage: bar.step(show.stage_line(stage), following[stage.stage]),
                recorder=recorder,
            )
    if as_json:
        _print_json(report.to_dict())
    else:
        _print(show.summary(report, workspace, is_temporary=server.is_temporary))


@app.command(epilog="Examples:  nss stage base   |   dvc repro base")
def stage(
    verb: Annotated[
        str, typer.Argument(help="base, profile, slice, triage, restructure, readapt, extend, evaluate, gate")
    ],
) -> None:
    """Run one stage. This is what dvc.yaml calls; people use `nss run` or `dvc repro VERB`."""
    from tasks.warm import hand_over_stage

    code = hand_over_stage(verb)
    if code is None:
        from tasks.stage import main as run_stage

        code = run_stage(verb)
    raise typer.Exit(code)


@data.command("add", epilog="Examples:  nss data add photos/ --resize 32x32   |   nss data add new.npz --new-classes")
def data_add(
    source: Annotated[
        str, typer.Argument(help="A folder of class folders, an .npz, a folder of idx files, torchvision:NAME.")
    ],
    new_classes: Annotated[bool, typer.Option("--new-classes", help="Allow classes the data set lacks.")] = False,
    resize: Annotated[str, typer.Option(help="HEIGHTxWIDTH to scale images of another size to.")] = "",
    classes: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, help="A file with a class name a line: their order, the first time."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Add a source as one batch and update data.dvc. Bad input is refused as a whole, with all that is wrong."""
    from flows import show
    from tasks.data import add
    from tasks.workspace import find_workspace

    workspace = find_workspace()
    order = cli_service.lines_of(classes) if classes else None
    added = add(workspace, source, new_classes=new_classes, resize=cli_service.size_of(resize), classes=order)
    if not added.already_present:
        cli_service.announce(workspace)
    _print_json(added.to_dict()) if as_json else _print(show.added(added))


@data.command("demo", epilog="Examples:  nss data demo   |   nss data demo --json | jq .images")
def data_demo(as_json: Json = False) -> None:
    """Materialise scikit-learn's digits, exactly what the committed data.dvc names."""
    from flows import show
    from tasks.data import add_demo
    from tasks.workspace import find_workspace

    added = add_demo(find_workspace())
    _print_json(added.to_dict()) if as_json else _print(show.added(added))


@data.command("status", epilog="Examples:  nss data status   |   nss data status --json | jq .committed")
def data_status(as_json: Json = False) -> None:
    """Show batches, classes and splits, and whether data.dvc names what lies in data/."""
    from flows import show
    from tasks.data import status
    from tasks.workspace import find_workspace

    content = status(find_workspace())
    _print_json(content) if as_json else _print(show.data_status(content))


@app.command(
    epilog="Examples:  nss export model.onnx   |   nss export models:/digits@champion model.onnx   |   "
    "nss export artifacts/restructure/model small.pt2   |   nss export model.onnx --json | jq .latency"
)
def export(
    paths: Annotated[
        list[str],
        typer.Argument(
            metavar="[MODEL] OUT",
            show_default=False,
            help="The model: a folder, models:/NAME@ALIAS or models:/NAME/VERSION (default: the champion, or the base "
            "model where none is pinned); and the file: .onnx, or .pt2 for a program.",
        ),
    ],
    kind: Annotated[
        Format | None,
        typer.Option("--format", help="onnx, or program for `torch.export.load`; default: by OUT."),
    ] = None,
    data: Annotated[
        Path | None, typer.Option("--data", help="The data folder to check on; default: data/, if there is one.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Write a model for serving: uint8 images in, any batch size. Checked on held-out images, and timed."""
    if len(paths) > 2:
        raise typer.BadParameter("one model and one file, please", param_hint="MODEL OUT")
    from flows import export as exporting

    model = paths[0] if len(paths) == 2 else None
    done = exporting.export(model, Path(paths[-1]), kind and kind.value, data)
    _print_json(done.to_dict()) if as_json else _print(exporting.text(done))


@app.command(epilog="Examples:  nss doctor   |   nss doctor --json | jq '.[] | select(.ok | not)'")
def doctor(as_json: Json = False) -> None:
    """Check what a run needs: packages, repository, data, parameters, tracking store, Prefect."""
    from flows import show
    from flows.doctor import examine

    findings = examine()
    _print_json([finding.to_dict() for finding in findings]) if as_json else _print(show.findings(findings))
    if not all(finding.ok for finding in findings):
        raise typer.Exit(CRASH)


cli_start.add_commands(app)
cli_models.add_commands(app)
cli_service.add_commands(app)
cli_report.add_commands(app)
for _command in (*app.registered_commands, *data.registered_commands):
    _command.epilog = f"{_command.epilog}\n\n{_EXIT_CODES}"
_entries: tuple[CommandInfo | TyperInfo, ...] = (*app.registered_commands, *app.registered_groups)
for _entry in _entries:
    _name = _entry.name or (_entry.callback and _entry.callback.__name__)
    _entry.rich_help_panel = next(panel for panel, names in PANELS.items() if _name in names)


def main() -> int:
    """Run the command line and return the exit code; a user's mistake is a message without a traceback."""
    collect_rarely()
    try:
        # Ends by SystemExit: 0, 2 for a mistake in the command line, 130 for Ctrl-C, or what a command chose.
        app(prog_name="nss")
        return OK
    except Exception as problem:
        error = _without_room(problem) or problem
        # Importing nss costs seconds; an error of its own can only be raised when it has been imported.
        errors = sys.modules.get("nss.errors")
        if errors is None or not isinstance(error, errors.NssError):
            raise
        sys.stderr.write(f"error: {error}\n")
        return next((code for kind, code in _CODES.items() if isinstance(error, getattr(errors, kind))), MISTAKE)


def _without_room(problem: Exception) -> Exception | None:
    """Return what to say of a full disk, None of anything else."""
    pipeline = sys.modules.get("tasks.pipeline")
    return pipeline.full_disk(problem, Path.cwd()) if pipeline else None


def _print(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def _print_json(content: Any) -> None:
    _print(json.dumps(content, indent=1, ensure_ascii=False))
