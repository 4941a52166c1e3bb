"""The step ``sweep``: tune one model until its budget of CPU-seconds is spent.

mlflow run . -e sweep -P model=lstm -P cpu_minutes=10
"""

import hashlib
import os
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import mlflow
import optuna
import pandas as pd
from mlflow.entities import Run as RunEntity
from tqdm import tqdm

from pipeline import cli, models, plots, prep, registry, tracking
from pipeline.spec import Dataset, UserError
from pipeline.train import OPTIONS as TRAIN_OPTIONS
from sweeps import processes, search
from sweeps.budget import Busy, Ledger
from sweeps.engine import Engine, reconcile
from sweeps.trial import Outcome

OPTIONS: dict[str, cli.Convert] = TRAIN_OPTIONS | {
    "cpu_minutes": cli.positive,
    "workers": cli.workers,
}


class Progress:
    """A bar of the budget where the output is a terminal, and a line for each trial anywhere."""

    def __init__(self, model: str, total: float) -> None:
        self.model, self.total, self.best = model, total, 0.0
        self.bar = tqdm(total=round(total), desc=model, unit="CPU-s", disable=None)

    def close(self) -> None:
        self.bar.close()

    def __call__(self, outcome: Outcome) -> None:
        self.best = max(self.best, outcome.val_accuracy or 0.0)
        self.bar.n = min(round(outcome.spent_cpu_seconds), round(self.total))
        self.bar.set_postfix_str(f"best {self.best:.2%}")
        value = f"{outcome.val_accuracy:.2%}" if outcome.val_accuracy is not None else "-"
        tqdm.write(
            f"{self.model} {outcome.number:03}  {outcome.state:11} {value:>6}  "
            f"{outcome.cpu_seconds:.1f} CPU-s, {outcome.spent_cpu_seconds:.0f} of {self.total:.0f}"
            + (f"  {outcome.error}" if outcome.error else "")
        )


def finish(
    run: tracking.Run,
    study: optuna.Study,
    model: str,
    data: Dataset,
    outcomes: Sequence[Outcome],
    engine: Engine,
) -> Outcome:
    """Log what the sweep found; gives its best trial."""
    winner = max(
        (outcome for outcome in outcomes if outcome.model_uri is not None),
        key=lambda outcome: outcome.val_accuracy or 0.0,
        default=None,
    )
    if winner is None or winner.model_uri is None:
        raise _nothing(outcomes, engine)
    title = f"{model} on {data.title}"
    params = pd.DataFrame([study.trials[outcome.number].params for outcome in outcomes])
    trials = pd.DataFrame(outcomes)
    run.params(study.trials[winner.number].params)
    run.link_model(winner.model_uri)
    run.tags({"best_run_id": winner.run_id, "study": study.study_name})
    run.csv("trials.csv", trials.join(params))
    run.figure("optimisation_history.png", plots.best_so_far(trials, title))
    run.figure(
        "parallel_coordinates.png",
        plots.parallel_coordinates(params, trials["val_accuracy"], title),
    )
    if importances := search.importances(study):
        run.figure("hyperparameter_importance.png", plots.importance(importances, title))
    run.name(f"{model} sweep · {winner.val_accuracy:.1%}")
    run.describe(description(title, outcomes, winner, engine))
    spent, fit = engine.spent(), sum(outcome.fit_cpu_seconds for outcome in outcomes)
    run.metrics(
        {
            "n_trials": len(outcomes),
            "cpu_seconds": spent,
            "fit_cpu_seconds": fit,
            "overhead_cpu_seconds": spent - fit,
        },
        len(outcomes),
    )
    return winner


def _nothing(outcomes: Sequence[Outcome], engine: Engine) -> UserError:
    failed = [outcome for outcome in outcomes if outcome.state == "failed"]
    if failed:
        return UserError(
            f"a sweep needs a trial that ends well, but the first {len(outcomes)} did not, "
            f"the last with '{failed[-1].error}': see traceback.txt of the child runs"
        )
    total, spent = engine.ledger.total / 60, engine.spent() / 60
    return UserError(
        f"cpu_minutes must pay for start-up and one trial, but {total:g} came, of which "
        f"{spent:.2g} are spent and no trial has ended: raise cpu_minutes above "
        f"{2 * max(total, spent):.2g}"
    )


def description(title: str, outcomes: Sequence[Outcome], winner: Outcome, engine: Engine) -> str:
    """Markdown for the sweep's page: the best trials, and how the others ended."""
    ranked = sorted(outcomes, key=lambda outcome: -(outcome.val_accuracy or 0.0))
    rows = [
        [f"{o.number:03}", o.state, f"{o.val_accuracy or 0:.2%}", f"{o.cpu_seconds:.1f}"]
        for o in ranked[:5]
    ]
    states = pd.Series([outcome.state for outcome in outcomes]).value_counts()
    counts = ", ".join(f"{count} {state}" for state, count in states.items())
    return (
        f"**{title}**: best val_accuracy {winner.val_accuracy:.2%} in trial {winner.number:03}; "
        f"{len(outcomes)} trials ({counts}) in {engine.spent():.0f} of {engine.ledger.total:.0f} "
        f"CPU-seconds; trial 000 is the deck's model\n\n"
        + tracking.markdown(["trial", "state", "val_accuracy", "CPU-s"], rows)
    )


def unfinished(client: mlflow.MlflowClient, key: str, data_dir: str) -> RunEntity | None:
    """The run of the same sweep that a crash or an interrupt has left, if it is no one's now."""
    found = client.search_runs(
        [tracking.experiment_id(client)],
        f"tags.step = 'sweep' and tags.sweep_key = '{key}' and tags.ended = 'false'",
        order_by=["attributes.start_time DESC"],
    )
    for run in found:
        path = _ledger(data_dir, run.data.tags["study"])
        if not path.exists():  # its folder was deleted: nothing is left to continue
            continue
        try:
            Ledger(path, 0.0).close()
        except Busy:  # another process is at it
            continue
        return run
    return None


def _ledger(data_dir: str, study: str) -> Path:
    return Path(data_dir) / "studies" / study / "ledger.jsonl"


def main(argv: Sequence[str]) -> None:
    options = cli.parse_all("sweep", argv, OPTIONS)
    model, seed, workers = (options.pop(name) for name in ("model", "seed", "workers"))
    budget = 60 * options.pop("cpu_minutes")
    registry.load(models, model)
    launched = "MLFLOW_RUN_ID" in os.environ
    client = tracking.connect()
    data = prep.ensure(**options)
    key = hashlib.sha256(f"{model} {seed} {budget} {data.digest}".encode()).hexdigest()[:12]
    again = unfinished(client, key, options["data_dir"])
    if again and launched:
        with tracking.start("resume") as run:
            run.name(f"{model} sweep, continued")
            run.tags({"model": model, "continues": again.info.run_id})
    with tracking.start("sweep", again=again) as run:
        study = again.data.tags["study"] if again else f"{model}-{run.id[:8]}"
        path = _ledger(options["data_dir"], study)
        # Opened before the tags are set by which the run can be continued: no crash in between
        # leaves a sweep to continue that has no budget.
        with closing(Ledger(path, 0.0 if again else budget)) as ledger:
            if again:
                print(f"{model}: continuing the sweep that was interrupted, run {run.id}")
                reconcile(run)
            else:
                run.name(f"{model} sweep")
                run.tags({"model": model, "study": study, "sweep_key": key, "ended": "false"})
                run.use_dataset(data, "train")
            sweep(run, ledger, path.parent, model, data, seed, workers, launched)


def sweep(
    run: tracking.Run,
    ledger: Ledger,
    folder: Path,
    model: str,
    data: Dataset,
    seed: int,
    workers: int,
    launched: bool,
) -> None:
    """Search and close; the study lies in ``folder``, whose name is its name."""
    study = search.open_study(folder.name, registry.load(models, model).PARAMS, seed, folder)
    n_workers = workers or processes.usable_cores()
    with closing(Progress(model, ledger.total)) as show:
        engine = Engine(run, study, model, data, seed, ledger, n_workers, show, launched)
        outcomes = engine.search()
    run.tags({"ended": "true"})
    winner = finish(run, study, model, data, outcomes, engine)
    spent = engine.spent()
    ledger.beat(spent - ledger.past - ledger.debited, {})
    print(
        f"{model}: best val_accuracy {winner.val_accuracy:.4f} of {len(outcomes)} trials on "
        f"{data.title}, {spent:.0f} of {ledger.total:.0f} CPU-s, run {run.id}"
    )
    print(tracking.ui_hint(run.experiment_id))


if __name__ == "__main__":
    cli.run(main)
