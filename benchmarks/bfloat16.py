"""What bfloat16 saves and what it costs: a prior of each network, fitted in both precisions.

    python -m benchmarks.bfloat16 --archive letters-emnist-layout.zip

The same hyperparameters and seeds in float32 and in ``mixed_bfloat16``, by turns, on one thread.
Accuracy is that on ``val`` of the network that would be logged, which answers in float32.
"""

import argparse
import itertools
import os
from pathlib import Path

import pandas as pd

from pipeline import models, precision, prep, registry
from pipeline.bill import METER
from pipeline.spec import Dataset
from sweeps.nursery import ONE_THREAD

RESULTS = Path(__file__).parent / "results"
FITS = {"cnn": (1, 5), "lstm": (1, 3)}  # model: which prior, epochs


def fitted(model: str, chosen: str, seed: int, data: Dataset) -> dict[str, object]:
    """One fit: its accuracy on val and what it cost."""
    member = registry.load(models, model)
    prior, epochs = FITS[model]
    params = member.PRIORS[prior] | {"epochs": epochs} | precision.params(chosen, member.PARAMS)
    values: list[float] = []
    registry.preload(member)
    METER.restart()
    with METER.charge("fit"):
        train, val = data.part("train"), data.part("val")
        member.fit(params, train, val, seed, lambda step, value: bool(values.append(value)))
    return {
        "model": model,
        "precision": chosen,
        "seed": seed,
        "val_accuracy": values[-1],
        "fit_cpu_seconds": METER.seconds()["fit"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dataset", default="emnist_letters")
    parser.add_argument("--archive", default="default")
    parser.add_argument("--data_dir", default="data")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--output", type=Path, default=RESULTS / "bfloat16.csv")
    args = parser.parse_args()
    data = prep.ensure(
        dataset=args.dataset, archive=args.archive, n_train=40_000, data_dir=args.data_dir
    )
    rows = []
    for model, seed, chosen in itertools.product(FITS, args.seeds, precision.POLICIES):
        rows.append(fitted(model, chosen, seed, data))
        print(rows[-1], flush=True)
        pd.DataFrame(rows).to_csv(args.output, index=False)
    columns = ["val_accuracy", "fit_cpu_seconds"]
    print(pd.DataFrame(rows).groupby(["model", "precision"])[columns].agg(["mean", "std"]))


if __name__ == "__main__":
    METER.loaded()
    os.environ |= ONE_THREAD  # before TensorFlow is imported
    main()
