"""The step ``compare``: models of one data set side by side, in the deck's table and in a report.

mlflow run . -e compare
"""

import time
from collections.abc import Sequence
from typing import Any

import pandas as pd
from mlflow.entities import Run as RunEntity

from pipeline import cli, evaluate, findings, plots, prep, report, tracking
from pipeline.findings import Entry
from pipeline.spec import Dataset, UserError

OPTIONS: dict[str, cli.Convert] = {
    "dataset_digest": cli.digest,
    "run_ids": cli.run_ids,
    "data_dir": cli.folder,
}


def find(client: Any, digest: str, run_ids: Sequence[str]) -> list[RunEntity]:
    """The runs whose models are compared: those named, else the latest sweep of each model."""
    if not run_ids:
        return list(tracking.latest_sweeps(client, digest).values())
    sources = [evaluate.find(client, run_id) for run_id in run_ids]
    digests = {source.data.tags["dataset_digest"] for source in sources}
    if len(digests) > 1:
        each = ", ".join(
            f"{one.info.run_name} ({one.info.run_id}) is on {one.data.tags['dataset_digest']}"
            for one in sources
        )
        raise UserError(
            f"models are compared on one data set, but {len(digests)} came: {each}; "
            "pass run_ids of one digest, and compare the others in a run of their own"
        )
    if digest not in ("latest", *digests):
        raise UserError(
            f"dataset_digest must be that of the runs, but {digest!r} came and run_ids are on "
            f"{digests.pop()!r}: leave dataset_digest out, or name other runs"
        )
    return sources


def collect(run: tracking.Run, sources: Sequence[RunEntity], data: Dataset) -> list[Entry]:
    """What the runs and their evaluations say, the best on ``test`` first."""
    labels = findings.labels(
        [source.data.tags["model"] for source in sources],
        [source.info.run_id for source in sources],
    )
    entries = [
        _entry(run, source, data, label) for source, label in zip(sources, labels, strict=True)
    ]
    return sorted(entries, key=lambda entry: -entry.metrics["test_accuracy"])


def _entry(run: tracking.Run, source: RunEntity, data: Dataset, label: str) -> Entry:
    run_id, tags = source.info.run_id, source.data.tags
    metrics, predictions = _evaluation(run, source, data)
    is_sweep = tags["step"] == "sweep"
    importance = run.read_csv(run_id, "hyperparameter_importance.csv") if is_sweep else None
    return Entry(
        label=label,
        model=tags["model"],
        step=tags["step"],
        run_id=run_id,
        model_uri=tags["model_uri"],
        metrics=dict(source.data.metrics) | metrics,
        tags=tags,
        predictions=predictions,
        trials=run.read_csv(run_id, "trials.csv") if is_sweep else None,
        importance={} if importance is None else dict(importance.itertuples(index=False)),
    )


def _evaluation(
    run: tracking.Run, source: RunEntity, data: Dataset
) -> tuple[dict[str, float], pd.DataFrame]:
    """A model's figures and guesses on ``test``; it is evaluated now unless it was before.

    On this processor, that is: latencies are compared.
    """
    tags = {"model_uri": source.data.tags["model_uri"], "dataset_digest": data.digest}
    tags |= {"cpu_model": tracking.environment_tags()["cpu_model"]}
    for done in tracking.latest_runs(run.client, "evaluate", **tags):
        predictions = run.read_csv(done.info.run_id, evaluate.PREDICTIONS)
        if predictions is not None:
            return done.data.metrics, predictions
    with tracking.start("evaluate", parent=run) as child:
        metrics = evaluate.evaluate(child, source, data)
    predictions = run.read_csv(child.id, evaluate.PREDICTIONS)
    assert predictions is not None
    return metrics, predictions


def left_out(run: tracking.Run, entries: Sequence[Entry], data: Dataset) -> list[str]:
    """A sentence where a model was swept, but on another data set."""
    here = {entry.model for entry in entries}
    swept = {one.data.tags["model"] for one in tracking.latest_runs(run.client, "sweep")}
    names = [name.upper() for name in sorted(swept - here)]
    if not names:
        return []
    verb = "was" if len(names) == 1 else "were"
    return [
        f"Not here: {findings.listed(names)}, which {verb} swept on other letters than "
        f"{data.digest}."
    ]


def compare(run: tracking.Run, entries: Sequence[Entry], data: Dataset, remarks: list[str]) -> str:
    """Log table, figures and report of the entries; gives table and remarks as markdown."""
    table = findings.table(entries)
    run.use_dataset(data, "test")
    run.name(
        "compare "
        + " · ".join(f"{row.label} {row.test_accuracy:.1%}" for row in table.itertuples())
    )
    run.csv("comparison.csv", table)
    shown = findings.instructive(findings.disagreements(entries), report.N_PICTURES)
    images = evaluate.pictures(data, shown["row"])
    parts = report.sections(entries, images, shown)
    now = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
    facts = report.Facts(data.title, data.digest, bool(data.facts["official"]), run.id, now)
    run.text(report.NAME, report.render(facts, entries, remarks, parts))
    for chart in (chart for part in parts for chart in part.charts):
        chart.figure.suptitle(data.title, x=0.01, ha="left", fontsize="small")
        run.figure(f"{chart.name}.png", chart.figure)
    if len(shown):
        heading = f"Where the models disagree\n{data.title}"
        run.figure("disagreements.png", plots.letters(images, _captions(entries, shown), heading))
    note = (
        f"Test letters of **{data.title}** (digest `{data.digest}`), 95 % intervals; "
        "the deck's figures are on EMNIST."
    )
    markdown = "\n\n".join([note, tracking.markdown(*report.figures(table)), *remarks])
    run.text("comparison.md", f"{markdown}\n")
    run.describe(f"{markdown}\n\nThe whole report: `{report.NAME}` among this run's artifacts.")
    return markdown.replace("**", "").replace("`", "")


def _captions(entries: Sequence[Entry], shown: pd.DataFrame) -> list[str]:
    """Under each letter: what it is, and in the entries' order what they take it for."""
    guesses = [f"guess {entry.label}" for entry in entries]
    return [
        f"{row['letter']}: {' '.join(row[guess] for guess in guesses)}"
        for _, row in shown.iterrows()
    ]


def main(argv: Sequence[str]) -> None:
    options = cli.parse_all("compare", argv, OPTIONS)
    with tracking.start("compare") as run:
        sources = find(run.client, options["dataset_digest"], options["run_ids"])
        data = prep.find(options["data_dir"], sources[0].data.tags["dataset_digest"])
        entries = collect(run, sources, data)
        remarks = findings.remarks(entries)
        remarks += [] if options["run_ids"] else left_out(run, entries, data)
        table = compare(run, entries, data, remarks)
    print(f"\n{table}\n")
    print(f"the report: {tracking.artifact_hint(run, report.NAME)}")
    print(tracking.ui_hint(run.experiment_id))


if __name__ == "__main__":
    cli.run(main)
