"""The step ``compare``: the latest sweeps of one data set side by side, in the deck's table.

mlflow run . -e compare
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from mlflow.entities import Run as RunEntity

from pipeline import cli, evaluate, plots, prep, tracking
from pipeline.spec import Dataset

OPTIONS: dict[str, cli.Convert] = {"dataset_digest": cli.text, "data_dir": cli.text}

# "Deep Learning with EMNIST" (2024): 40,000 letters of EMNIST, minimal tuning. The deck gives
# accuracies; on other letters than EMNIST they are a reminder, not a baseline.
DECK_ACCURACY = {"cnn": 0.92, "lstm": 0.79, "knn": 0.83}


def compare(run: tracking.Run, sweeps: dict[str, RunEntity], data: Dataset) -> str:
    """Log the table of the sweeps' best models on ``test``; gives it as markdown."""
    rows = [_row(run, sweep, data) for sweep in sweeps.values()]
    table = pd.DataFrame(rows).sort_values("test_accuracy", ascending=False, ignore_index=True)
    run.use_dataset(data, "test")
    run.name(
        "compare "
        + " · ".join(f"{row.model} {row.test_accuracy:.1%}" for row in table.itertuples())
    )
    run.csv("comparison.csv", table)
    run.figure("comparison.png", plots.comparison(table, f"Best models on {data.title}"))
    markdown = markdown_table(table)
    note = (
        f"Test letters of **{data.title}** (digest `{data.digest}`), 95 % intervals; "
        "the deck's figures are on EMNIST."
    )
    run.text("comparison.md", f"{note}\n\n{markdown}\n")
    run.describe(f"{note}\n\n{markdown}")
    return f"{note.replace('**', '').replace('`', '')}\n\n{markdown}"


def _row(run: tracking.Run, sweep: RunEntity, data: Dataset) -> dict[str, object]:
    """Figures of one sweep's best model, evaluated now unless an evaluation is there."""
    model_uri = sweep.data.tags["model_uri"]
    done = tracking.latest_runs(
        run.client, "evaluate", model_uri=model_uri, dataset_digest=data.digest
    )
    if done:
        metrics = done[0].data.metrics
    else:
        with tracking.start("evaluate", parent=run) as child:
            metrics = evaluate.evaluate(child, sweep, data)
    model = sweep.data.tags["model"]
    return {
        "model": model,
        **metrics,
        "val_accuracy": sweep.data.metrics["val_accuracy"],
        "deck_accuracy": DECK_ACCURACY.get(model, np.nan),
        "sweep_cpu_seconds": sweep.data.metrics["cpu_seconds"],
        "n_trials": int(sweep.data.metrics["n_trials"]),
        "run_id": sweep.info.run_id,
        "model_uri": model_uri,
    }


def markdown_table(table: pd.DataFrame) -> str:
    """The deck's columns, then the deck's own accuracy, cost and size."""
    columns = [
        "Model", "Accuracy", "95 % interval", "Mean Recall", "Mean Precision",
        "Deck, on EMNIST", "Trials", "CPU-s", "Model MB", "µs a letter",
    ]  # fmt: skip
    rows = [
        [
            row.model.upper(),
            f"{row.test_accuracy:.2%}",
            f"{100 * row.test_accuracy_low:.1f} to {100 * row.test_accuracy_high:.1f}",
            f"{row.test_mean_recall:.2%}",
            f"{row.test_mean_precision:.2%}",
            "–" if np.isnan(row.deck_accuracy) else f"{row.deck_accuracy:.0%}",
            row.n_trials,
            f"{row.sweep_cpu_seconds:.0f}",
            f"{row.model_mb:.1f}",
            f"{row.predict_us_per_letter:.0f}",
        ]
        for row in table.itertuples()
    ]
    return tracking.markdown(columns, rows)


def main(argv: Sequence[str]) -> None:
    options = cli.parse_all("compare", argv, OPTIONS)
    with tracking.start("compare") as run:
        sweeps = tracking.latest_sweeps(run.client, options["dataset_digest"])
        digest = next(iter(sweeps.values())).data.tags["dataset_digest"]
        table = compare(run, sweeps, prep.find(options["data_dir"], digest))
    print(f"\n{table}\n")
    print(tracking.ui_hint(run.experiment_id))


if __name__ == "__main__":
    cli.run(main)
