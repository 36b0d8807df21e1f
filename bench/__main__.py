"""`python -m bench NAME`: measure, print a table, write a JSON file and a picture beside it."""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path

from bench.common import Settings
from bench.tracked import log

# Name: default data, default models.
BENCHES = {
    "profile": (["fashion-mnist"], ["nss.zoo:vgg_small", "torchvision.models:resnet18"]),
    "scale": ([], []),
    "pipeline": ([], []),
    "rq1": (["fashion-mnist"], ["nss.zoo:vgg_small", "nss.zoo:resnet20"]),
    "restructure": (["fashion-mnist"], ["nss.zoo:vgg_small", "nss.zoo:resnet20"]),
    "rq2": (["fashion-mnist", "cifar10"], ["nss.zoo:vgg_small", "nss.zoo:resnet20"]),
    "rq3": (["fashion-mnist"], ["nss.zoo:vgg_small", "nss.zoo:resnet20"]),
    "triage": (["digits"], ["nss.zoo:lenet", "nss.zoo:vgg_small"]),
    "rq4": (["mnist", "fashion-mnist", "cifar10"], ["nss.zoo:vgg_small", "nss.zoo:resnet20"]),
}


def main() -> None:
    """Run one benchmark."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("name", choices=BENCHES)
    parser.add_argument("--data", action="append", help="digits, a downloaded set by name, or PATH.npz; repeatable")
    parser.add_argument("--model", action="append", help="package.module:callable; repeatable")
    parser.add_argument("--seeds", default="0,1,2", help="comma separated")
    parser.add_argument("--quick", action="store_true", help="one seed and a subset, for a look")
    parser.add_argument("--json", type=Path, required=True, metavar="OUT.json")
    parser.add_argument("--summary", action="store_true", help="write means and spreads only")
    parser.add_argument("--track", action="store_true", help="log the result to the MLflow experiment nss-bench")
    args = parser.parse_args()
    data, models = BENCHES[args.name]
    seeds = tuple(int(seed) for seed in args.seeds.split(","))
    settings = Settings(
        bench=args.name,
        data=tuple(args.data or data),
        models=tuple(args.model or models),
        seeds=seeds[:1] if args.quick else seeds,
        quick=args.quick,
        command=f"python -m bench {' '.join(sys.argv[1:])}",
    )
    module = importlib.import_module(f"bench.{args.name}")
    report = module.run(settings)
    report.write(args.json, rows=not args.summary)
    picture = args.json.with_suffix(".png")
    module.draw(report, picture)
    if args.track:
        log(report, args.json, picture)


if __name__ == "__main__":
    main()
