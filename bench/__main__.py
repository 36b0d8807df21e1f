"""`python -m bench NAME`: measure, print a table, write a JSON file and a picture beside it.

`all` measures every benchmark and writes results, pictures and a page of tables into a folder; `tables` writes only
the page.
"""

from __future__ import annotations

import argparse
import sys
import time
from argparse import ArgumentParser, Namespace
from pathlib import Path

from bench import all as everything
from bench import tables
from bench.catalogue import BENCHES, SEEDS, module_of, settings_of
from bench.common import Settings, is_quick, spent_before, used
from bench.tracked import log
from nss.files import read_json

ALL, TABLES = "all", "tables"
TAKEN = {ALL: ("quick", "keep", "results"), TABLES: ("results",)}


def main() -> None:
    """Run one benchmark, or all."""
    parser = _parser()
    args = parser.parse_args()
    if wrong := _wrong(args):
        parser.error(wrong)
    if args.name == TABLES:
        tables.write(_results(args))
    elif args.name == ALL:
        sys.exit(everything.run(_results(args), quick=args.quick, keep=args.keep))
    else:
        _measure(args, _settings(args))


def _results(args: Namespace) -> Path:
    folder: Path = args.results or (everything.QUICK if args.quick else everything.FULL)
    return folder


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="python -m bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", choices=[*BENCHES, ALL, TABLES])
    parser.add_argument("--data", action="append", help="digits, a downloaded set by name, or PATH.npz; repeatable")
    parser.add_argument("--model", action="append", help="package.module:callable; repeatable")
    parser.add_argument("--seeds", help=f"comma separated ({','.join(map(str, SEEDS))})")
    parser.add_argument("--quick", action="store_true", help="one seed and a subset, for a look")
    parser.add_argument("--json", type=Path, metavar="OUT.json", help="the result file of one benchmark")
    parser.add_argument("--summary", action="store_true", help="write means and spreads only")
    parser.add_argument("--track", action="store_true", help="log the result to the MLflow experiment nss-bench")
    parser.add_argument("--without-times", action="store_true", help="leave times to a later run, on a quiet machine")
    parser.add_argument("--keep", action="store_true", help="keep the rows of finished subjects in bench/rows")
    parser.add_argument("--stored", action="store_true", help="take the rows kept there alone, measure nothing")
    parser.add_argument(
        "--results",
        type=Path,
        metavar="FOLDER",
        help=f"of {ALL} and {TABLES}: where results lie ({everything.FULL}, for {ALL} --quick {everything.QUICK})",
    )
    return parser


def _wrong(args: Namespace) -> str | None:
    """Return what is wrong with arguments that do not go together."""
    kept, timed = ([name for name, entry in BENCHES.items() if getattr(entry, of)] for of in ("kept", "times"))
    if args.name in TAKEN:
        others = [name for name, value in vars(args).items() if value and name not in ("name", *TAKEN[args.name])]
        if others:
            return f"{args.name} takes {', '.join(f'--{name}' for name in TAKEN[args.name])} and nothing else"
    elif args.json is None:
        return f"{args.name} needs --json OUT.json, where its result is written"
    elif args.results:
        return f"--results is of {ALL} and {TABLES}: {args.name} writes to --json OUT.json"
    elif (args.keep or args.stored) and args.name not in kept:
        return f"--keep and --stored are of benchmarks that take hours: {', '.join(kept)}"
    elif args.without_times and args.name not in timed:
        return f"--without-times is of benchmarks that take times besides: {', '.join(timed)}"
    if (args.keep or args.stored) and (args.quick or args.without_times):
        return "rows are kept of whole measurements: leave out --quick and --without-times"
    if (args.keep or args.stored) and any(name.endswith(".npz") for name in args.data or ()):
        return "rows are kept of data sets by name: a path says nothing of what lies there on another machine"
    written = [args.json] if args.json else [_results(args) / f"{name}.json" for name in BENCHES]
    if whole := [str(path) for path in written if args.quick and path.exists() and not is_quick(read_json(path))]:
        return f"whole results are not replaced by quick ones: write elsewhere than {', '.join(whole)}"
    return None


def _settings(args: Namespace) -> Settings:
    return settings_of(
        args.name,
        command=f"python -m bench {' '.join(sys.argv[1:])}",
        data=args.data or (),
        models=args.model or (),
        seeds=[int(seed) for seed in args.seeds.split(",")] if args.seeds else SEEDS,
        quick=args.quick,
        times=not args.without_times,
        keep=args.keep,
        stored=args.stored,
    )


def _measure(args: Namespace, settings: Settings) -> None:
    started = time.perf_counter()
    module = module_of(args.name)
    report = module.run(settings)
    spent = used(time.perf_counter() - started)
    report.write(args.json, rows=not args.summary, spent=spent_before(args.json, report.protocol, spent))
    picture = args.json.with_suffix(".png")
    module.draw(report, picture)
    if args.track:
        log(report, args.json, picture)


if __name__ == "__main__":
    main()
