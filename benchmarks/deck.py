"""The deck's three models as they are, and beside them what sweeps have made of the same letters.

    python -m benchmarks.deck --archive letters-emnist-layout.zip

Trains each with the deck's values: ten epochs of Adam at 0.001 in batches of 32, five neighbours by
distance; one thread, float32, seed 0. Prints the deck's table; ours are the latest sweeps on these
letters that the tracking store knows, where ``compare`` or ``evaluate`` has looked at them.
"""

import argparse
import os

import numpy as np
from sklearn.metrics import confusion_matrix

from pipeline import evaluate, models, prep, registry, tracking
from pipeline.bill import METER
from pipeline.findings import DECK_ACCURACY
from pipeline.spec import LETTERS, Dataset, UserError
from sweeps.nursery import ONE_THREAD


def trained(model: str, data: Dataset) -> tuple[dict[str, float], float]:
    """Figures on test of a model with the deck's values, and CPU-seconds of its fit."""
    member = registry.load(models, model)
    params = {name: param.default for name, param in member.PARAMS.items()}
    registry.preload(member)
    began = METER.seconds().get("fit", 0.0)
    with METER.charge("fit"):
        fitted = member.fit(
            params, data.part("train"), data.part("val"), 0, lambda step, accuracy: False
        )
    test = data.part("test")
    guess = fitted.predict(test.images).argmax(axis=1)
    counts = confusion_matrix(test.labels, guess, labels=np.arange(len(LETTERS)))
    return evaluate.accuracy(counts), METER.seconds()["fit"] - began


def swept(data: Dataset) -> dict[str, str]:
    """What the latest sweep of each model does on test, where that is known."""
    client, found = tracking.connect(), {}
    try:
        sweeps = tracking.latest_sweeps(client, data.digest)
    except UserError:
        return {}
    for model, sweep in sweeps.items():
        uri = sweep.data.tags["model_uri"]
        looks = tracking.latest_runs(client, "evaluate", model_uri=uri, dataset_digest=data.digest)
        if looks:
            spent = sweep.data.metrics["cpu_seconds"]
            found[model] = f"{_interval(looks[0].data.metrics)} in {spent:.0f} CPU-s"
    return found


def _interval(metrics: dict[str, float]) -> str:
    low, high = 100 * metrics["test_accuracy_low"], 100 * metrics["test_accuracy_high"]
    return f"{metrics['test_accuracy']:.1%} ({low:.1f} to {high:.1f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dataset", default="emnist_letters")
    parser.add_argument("--archive", default="default")
    parser.add_argument("--data_dir", default="data")
    args = parser.parse_args()
    data = prep.ensure(
        dataset=args.dataset, archive=args.archive, n_train=40_000, data_dir=args.data_dir
    )
    ours = swept(data)
    rows: list[list[object]] = []
    for model, accuracy in DECK_ACCURACY.items():
        metrics, spent = trained(model, data)
        rows.append(
            [
                model.upper(),
                f"{accuracy:.0%}",
                _interval(metrics),
                f"{metrics['test_mean_recall']:.1%}",
                f"{metrics['test_mean_precision']:.1%}",
                f"{spent:.0f}",
                ours.get(model, "no sweep was evaluated"),
            ]
        )
    columns = ["", "deck, EMNIST", "deck's model", "recall", "precision", "CPU-s of fit", "ours"]
    print(f"Test letters of {data.title}, 95 % intervals\n")
    print(tracking.markdown(columns, rows))


if __name__ == "__main__":
    METER.loaded()
    os.environ |= ONE_THREAD  # before TensorFlow is imported
    main()
