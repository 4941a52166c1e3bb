"""The step ``evaluate``: a logged model on ``test``, which no other step reads.

mlflow run . -e evaluate -P run_id=...
"""

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from mlflow.entities import Run as RunEntity
from scipy.stats import binomtest
from sklearn.metrics import confusion_matrix
from threadpoolctl import threadpool_limits

from pipeline import cli, plots, prep, tracking
from pipeline.spec import LETTERS, Dataset, Images, Labels, Part, Probabilities, UserError

OPTIONS: dict[str, cli.Convert] = {"run_id": cli.text, "data_dir": cli.folder}

Counts = npt.NDArray[np.int64]  # (26, 26), true letters down, guesses across
N_RESAMPLES = 2000
N_BINS = 15  # of confidence, as in Guo et al. 2017
N_MISTAKES = 40
PREDICTIONS = "predictions.csv"  # by which later steps know each guess without reading labels
SHOWN = ("test_accuracy", "test_mean_recall", "test_mean_precision")


def evaluate(run: tracking.Run, source: RunEntity, data: Dataset) -> dict[str, float]:
    """Log how the model of the run ``source`` does on ``test``; gives the metrics."""
    model_uri = source.data.tags["model_uri"]
    test = data.part("test")
    rule, cure = "a run's model must be there, but", "put its files back, or name another run"
    with tracking.readable(f"{rule} {model_uri!r}", cure):
        probabilities, latency = answer(model_uri, test.images)
    counts = confusion_matrix(test.labels, probabilities.argmax(axis=1), labels=range(len(LETTERS)))
    bins = confidence_bins(probabilities, test.labels)
    metrics = {
        **accuracy(counts),
        "test_top2_accuracy": top2_accuracy(probabilities, test.labels),
        "test_calibration_error": calibration_error(bins),
        **latency,
        "model_mb": tracking.model_mb(model_uri),
    }
    name = source.info.run_name
    run.use_dataset(data, "test")
    run.name(f"{str(name).partition(' · ')[0]} on test · {metrics['test_accuracy']:.1%}")
    run.tags(
        {
            "model": source.data.tags["model"],
            "model_uri": model_uri,
            "evaluated_run_id": source.info.run_id,
        }
    )
    run.metrics(metrics)
    # On the run that trained it too: there one looks when models stand side by side.
    shown = {name: value for name, value in metrics.items() if name in SHOWN}
    replace(run, id=source.info.run_id).metrics(shown)
    run.csv("letters.csv", per_letter(counts))
    run.csv(PREDICTIONS, predictions(probabilities, test.labels))
    title = f"{name} on {data.title}"
    run.figure("confusion_matrix.png", plots.confusion_matrix(counts, title))
    run.figure("calibration.png", plots.reliability(bins, title))
    run.figure("mistakes.png", mistakes(test, probabilities, title))
    run.describe(description(metrics, counts, title))
    return metrics


def answer(model_uri: str, images: Images) -> tuple[Probabilities, dict[str, float]]:
    """What a logged model says of letters, and how long it takes; on one thread."""
    model = tracking.load_model(model_uri)
    with threadpool_limits(1):
        probabilities: Probabilities = model.predict(np.asarray(images))
        return probabilities, latencies(model, images)


def accuracy(counts: Counts) -> dict[str, float]:
    """Accuracy, mean recall and mean precision, each with a 95 % interval ``_low`` to ``_high``.

    Accuracy's interval is Wilson's; the others' are percentiles over draws of the confusion matrix,
    each row from the multinomial that it estimates (the bootstrap of Efron and Tibshirani, 1993).
    """
    n, right = int(counts.sum()), int(counts.trace())
    low, high = wilson(right, n)
    metrics = {
        "test_accuracy": right / n,
        "test_accuracy_low": low,
        "test_accuracy_high": high,
    }
    n_letters = counts.sum(axis=1)  # of each row; fixed, else draws would miss rare letters
    shares = counts / np.maximum(n_letters, 1)[:, None]
    rng = np.random.default_rng(0)
    draws = rng.multinomial(n_letters, shares, (N_RESAMPLES, len(counts)))  # (2000, 26, 26)
    for name, axis in (("test_mean_recall", 2), ("test_mean_precision", 1)):
        low, high = np.percentile(_mean_share(draws, axis), [2.5, 97.5])
        metrics[name] = float(_mean_share(counts[None], axis)[0])
        metrics[f"{name}_low"], metrics[f"{name}_high"] = float(low), float(high)
    return metrics


def wilson(right: int, n: int) -> tuple[float, float]:
    """Wilson's 95 % interval of the share ``right`` of ``n``."""
    interval = binomtest(right, n).proportion_ci(0.95, method="wilson")
    return float(interval.low), float(interval.high)


def _mean_share(counts: Counts, axis: int) -> npt.NDArray[np.float64]:
    """Mean over letters of the share of hits, of counts (m, 26, 26); axis 2 recall, 1 precision.

    A letter that is never guessed has a precision of 0, as in scikit-learn.
    """
    hits = np.diagonal(counts, axis1=1, axis2=2)  # (m, 26)
    shares: npt.NDArray[np.float64] = hits / np.maximum(counts.sum(axis=axis), 1)
    return shares.mean(axis=1)  # type: ignore[no-any-return]


def top2_accuracy(probabilities: Probabilities, labels: Labels) -> float:
    """Share of letters that are among the two likeliest."""
    top2 = np.argsort(probabilities, axis=1)[:, -2:]  # (n, 2)
    return float((top2 == labels[:, None]).any(axis=1).mean())


def confidence_bins(probabilities: Probabilities, labels: Labels) -> pd.DataFrame:
    """Mean confidence and accuracy of the letters in each of 15 bins of confidence."""
    confidence = probabilities.max(axis=1)
    frame = pd.DataFrame(
        {"confidence": confidence, "accuracy": probabilities.argmax(axis=1) == labels}
    )
    groups = frame.groupby(np.minimum((confidence * N_BINS).astype(int), N_BINS - 1))
    return groups.mean().assign(n_letters=groups.size())


def calibration_error(bins: pd.DataFrame) -> float:
    """Expected calibration error: mean gap between confidence and accuracy (Guo et al. 2017)."""
    gaps = (bins["confidence"] - bins["accuracy"]).abs()
    return float((gaps * bins["n_letters"]).sum() / bins["n_letters"].sum())


def latencies(model: Any, images: Images) -> dict[str, float]:
    """Median wall microseconds a letter through MLflow's ``predict``, in batches of 256 and 1."""
    names = {"predict_us_per_letter": 256, "predict_us_one_letter": 1}
    return {name: _latency(model, np.asarray(images[:n])) for name, n in names.items()}


def _latency(model: Any, batch: Images, repeats: int = 7) -> float:
    model.predict(batch)  # the first call of a shape traces the graph
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        model.predict(batch)
        seconds.append(time.perf_counter() - began)
    return float(np.median(seconds) / len(batch) * 1e6)


def per_letter(counts: Counts) -> pd.DataFrame:
    """Recall, precision and the commonest wrong guess of each letter."""
    wrong = counts - np.diag(np.diag(counts))
    return pd.DataFrame(
        {
            "letter": list(LETTERS),
            "n_letters": counts.sum(axis=1),
            "recall": np.diag(counts) / np.maximum(counts.sum(axis=1), 1),
            "precision": np.diag(counts) / np.maximum(counts.sum(axis=0), 1),
            "mostly_taken_for": [LETTERS[row.argmax()] if row.any() else "" for row in wrong],
        }
    )


def predictions(probabilities: Probabilities, labels: Labels) -> pd.DataFrame:
    """Each letter of ``test`` in its order: the letter, the guess and its probability."""
    names = np.array(list(LETTERS))
    return pd.DataFrame(
        {
            "letter": names[labels],
            "guess": names[probabilities.argmax(axis=1)],
            "confidence": probabilities.max(axis=1).round(4),
        }
    )


def pictures(data: Dataset, rows: Sequence[int]) -> Images:
    """The letters in these rows of ``test``, (n, 28, 28), to be looked at in a report."""
    return np.asarray(data.part("test").images[list(rows)])


def mistakes(test: Part, probabilities: Probabilities, title: str) -> Any:
    """A sheet of the wrong guesses that the model was surest of."""
    guess, confidence = probabilities.argmax(axis=1), probabilities.max(axis=1)
    wrong = np.flatnonzero(guess != test.labels)
    rows = wrong[np.argsort(-confidence[wrong], kind="stable")][:N_MISTAKES]
    captions = [
        f"{LETTERS[test.labels[row]]}, not {LETTERS[guess[row]]} {confidence[row]:.0%}"
        for row in rows
    ]
    heading = f"{len(wrong)} of {len(guess)} wrong; the surest\n{title}"
    return plots.letters(test.images[rows], captions, heading)


def description(metrics: dict[str, float], counts: Counts, title: str) -> str:
    """Markdown for the run's page."""
    rows = [
        [
            label,
            f"{metrics[key]:.2%}",
            f"{metrics[f'{key}_low']:.2%} to {metrics[f'{key}_high']:.2%}",
        ]
        for label, key in (
            ("accuracy", "test_accuracy"),
            ("mean recall", "test_mean_recall"),
            ("mean precision", "test_mean_precision"),
        )
    ]
    worst = per_letter(counts).nsmallest(3, "recall")
    hard = ", ".join(
        f"{row.letter} {row.recall:.0%} (taken for {row.mostly_taken_for})"
        for row in worst.itertuples()
    )
    table = tracking.markdown(["on test", "value", "95 % interval"], rows)
    return f"**{title}**: {counts.sum():,} letters\n\n{table}\n\nLowest recall: {hard}"


def find(client: Any, run_id: str) -> RunEntity:
    """The run whose model is meant; ``latest`` is the last finished sweep or train run."""
    if run_id == "latest":
        runs = tracking.latest_runs(client, "sweep")[:1] + tracking.latest_runs(client, "train")[:1]
        if not runs:
            raise UserError(
                "a run with a model is needed, but no finished sweep or train run was found: "
                "run `mlflow run . -e train -P model=knn` first"
            )
        return max(runs, key=lambda run: run.info.end_time)
    run = tracking.get_run(client, run_id)
    if "model_uri" not in run.data.tags or "val_accuracy" not in run.data.metrics:
        raise UserError(
            f"run_id must name a run with a model, but {run_id!r} ({run.info.run_name}) has none: "
            "give the id of a train run, a sweep or one of its trials"
        )
    return run


def main(argv: Sequence[str]) -> None:
    options = cli.parse_all("evaluate", argv, OPTIONS)
    with tracking.start("evaluate") as run:
        source = find(run.client, options["run_id"])
        data = prep.find(options["data_dir"], source.data.tags["dataset_digest"])
        metrics = evaluate(run, source, data)
    for name, value in metrics.items():
        print(f"{name:26} {value:.4f}")
    print(tracking.ui_hint(run.experiment_id))


if __name__ == "__main__":
    cli.run(main)
