"""Train and cache the base models that all benchmarks share: `python -m bench.train DATA FACTORY SEEDS`."""

from __future__ import annotations

import sys

from bench.common import base_model, dataset
from nss.evaluate import evaluate


def main(name: str, factory: str, seeds: str) -> None:
    """Train what is missing and print the test accuracy of each."""
    data = dataset(name)
    for seed in seeds.split(","):
        score = evaluate(base_model(data, name, factory, int(seed)), data.split("test"))
        print(f"{name} {factory} seed {seed}: {score.accuracy:.4f}, worst class {score.worst_accuracy:.4f}", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
