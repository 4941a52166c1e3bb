"""The step ``sweep``: tune one model until its budget of CPU-seconds is spent.

mlflow run . -e sweep -P model=lstm -P cpu_minutes=10
"""

import hashlib
import os
import re
import statistics
from collections.abc import Sequence
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from typing import NamedTuple

import mlflow
import optuna
import pandas as pd
from mlflow.entities import LifecycleStage
from mlflow.entities import Run as RunEntity
from tqdm import tqdm

from pipeline import cli, models, plots, precision, prep, registry, shared, tracking
from pipeline.bill import METER, OVERHEAD, charge, metrics
from pipeline.spec import Dataset, UserError
from pipeline.train import OPTIONS as TRAIN_OPTIONS
from pipeline.train import found
from sweeps import plan as plans
from sweeps import processes, search, storage
from sweeps.budget import UNSEEN_CPU_SECONDS, Busy, Ledger, last_opening
from sweeps.cluster import SILENT_CPU_SECONDS
from sweeps.engine import LOCAL, Engine, Task
from sweeps.trial import Outcome


def scheduler(name: str, value: str) -> str:
    """``local``, or the address of a Dask scheduler, such as tcp://host:8786."""
    if value != LOCAL and not re.fullmatch(r"(tcp|tls|ws|wss|ucx)://[^/@\s]+:\d+", value):
        raise UserError(
            f"{name} must be 'local' or the address of a Dask scheduler, but {value!r} came: "
            f"pass -P {name}=tcp://HOST:8786, which `dask scheduler` prints, or leave it out"
        )
    return value


OPTIONS: dict[str, cli.Convert] = TRAIN_OPTIONS | {
    "cpu_minutes": cli.positive,
    "workers": cli.workers,
    "scheduler": scheduler,
    "study": cli.text,
    "plan": cli.flag,
}


class Place(NamedTuple):
    """Where a study lies, and the last run that was at it."""

    folder: Path
    run: RunEntity


class Progress:
    """A bar of the budget where the output is a terminal, and a line for each trial anywhere."""

    def __init__(self, model: str, total: float) -> None:
        self.model, self.total, self.best = model, total, 0.0
        self.bar = tqdm(total=round(total), desc=model, unit="CPU-s", disable=None)

    def close(self) -> None:
        self.bar.close()

    def __call__(self, outcome: Outcome) -> None:
        self.best = max(self.best, outcome.val_accuracy or 0.0)
        spent = sum(outcome.spent.values())
        self.bar.n = min(round(spent), round(self.total))
        self.bar.set_postfix_str(f"best {self.best:.2%}")
        value = f"{outcome.val_accuracy:.2%}" if outcome.val_accuracy is not None else "-"
        tqdm.write(
            f"{self.model} {outcome.number:03}  {outcome.state:11} {value:>6}  "
            f"{outcome.cpu_seconds:.1f} CPU-s, {spent:.0f} of {self.total:.0f}"
            + (f"  {outcome.error}" if outcome.error else "")
        )


@charge("tracking")
def finish(engine: Engine, fits: Sequence[Outcome]) -> None:
    """Log what the sweep found, in full; ``fits`` are the winner's, the best one first."""
    run, study, outcomes = engine.run, engine.study, engine.outcomes
    title = f"{engine.task.model} on {engine.task.data.title}"
    trials = table(outcomes, study)
    proposed = [trial.params for trial in study.get_trials(deepcopy=False)]
    params = pd.DataFrame([proposed[outcome.number] for outcome in outcomes])
    best = fits[0]
    run.params(proposed[best.number] | found(best.found))
    run.link_model(str(best.model_uri))
    tags = {"best_run_id": best.run_id}
    if engine.task.scheduler != LOCAL:  # the driver's processor is not that of the fits
        tags["cpu_model"] = run.client.get_run(best.run_id).data.tags["cpu_model"]
    run.tags(tags)
    run.csv("trials.csv", trials.join(params))
    run.figure("optimisation_history.png", plots.best_so_far(trials, title))
    run.figure("bill.png", plots.bill([outcome.spent for outcome in outcomes], title))
    run.figure(
        "parallel_coordinates.png",
        plots.parallel_coordinates(varied(params), trials["val_accuracy"], title),
    )
    if importances := search.importances(study, len(search.known(engine.member))):
        run.figure("hyperparameter_importance.png", plots.importance(importances, title))
        shares = pd.DataFrame(importances.items(), columns=["hyperparameter", "importance"])
        run.csv("hyperparameter_importance.csv", shares)
    run.name(f"{engine.task.model} sweep · {best.val_accuracy:.1%}")
    run.describe(description(title, trials, fits, engine))
    values = [float(fit.val_accuracy or 0.0) for fit in fits]
    confirmed = {"confirmed_val_accuracy": statistics.mean(values), "n_seeds": len(values)}
    if len(values) > 1:
        confirmed["confirmed_val_accuracy_std"] = statistics.stdev(values)
    figures = {"n_trials": len(outcomes), "val_accuracy": values[0]} | confirmed
    figures |= {"budget_cpu_seconds": engine.ledger.total}
    run.metrics(figures | metrics(engine.bill()), len(outcomes))


def varied(params: pd.DataFrame) -> pd.DataFrame:
    """The columns in which trials differ; all where there are none."""
    differ = params.loc[:, params.nunique() > 1]
    return differ if len(differ.columns) else params


def table(outcomes: Sequence[Outcome], study: optuna.Study) -> pd.DataFrame:
    """A row for each trial, with its phase, its bill and the sweep's."""
    left_out = ["bill", "spent", "found", "lost"]
    rows = pd.DataFrame([outcome._asdict() for outcome in outcomes]).drop(columns=left_out)
    trials = study.get_trials(deepcopy=False)
    rows["phase"] = [trials[number].user_attrs.get("phase", "") for number in rows["number"]]
    rows["seed"] = [trials[number].user_attrs.get("seed") for number in rows["number"]]
    rows["cpu_seconds"] = [outcome.cpu_seconds for outcome in outcomes]
    rows["fit_cpu_seconds"] = [outcome.bill.get("fit", 0.0) for outcome in outcomes]
    rows["spent_cpu_seconds"] = [sum(outcome.spent.values()) for outcome in outcomes]
    return rows


def spread(fits: Sequence[Outcome]) -> str:
    """What the winner's seeds say of its accuracy, in words."""
    values = [float(fit.val_accuracy or 0.0) for fit in fits]
    if len(values) < 2:
        return f"{values[0]:.2%} on val, of one fit (its spread is unknown)"
    mean, deviation = statistics.mean(values), statistics.stdev(values)
    return f"{mean:.2%} on val, the mean of {len(values)} seeds, standard deviation {deviation:.2%}"


def _nothing(outcomes: Sequence[Outcome], engine: Engine) -> UserError:
    failed = [one for one in outcomes[engine.n_past :] or outcomes if one.failure]
    if failed:
        return UserError(
            f"a sweep needs a trial that ends well, but none of {len(outcomes)} did, "
            f"the first with '{failed[0].error}': see traceback.txt of the child runs"
        )
    total, spent = engine.ledger.total / 60, engine.spent() / 60
    return UserError(
        f"cpu_minutes must pay for start-up and one trial, but {total:g} came, of which "
        f"{spent:.2g} are spent and no trial has ended: raise cpu_minutes above "
        f"{2 * max(total, spent):.2g}"
    )


def description(title: str, trials: pd.DataFrame, fits: Sequence[Outcome], engine: Engine) -> str:
    """Markdown for the sweep's page: the best trials, how the others ended, where the CPU went."""
    ranked = trials.dropna(subset="val_accuracy").nlargest(5, "val_accuracy")
    rows = [
        [f"{n:03}", phase, state, f"{accuracy:.2%}", f"{cost:.1f}"]
        for n, phase, state, accuracy, cost in ranked[
            ["number", "phase", "state", "val_accuracy", "cpu_seconds"]
        ].itertuples(index=False)
    ]
    counts, phases = (
        ", ".join(f"{count} {name}" for name, count in trials[column].value_counts().items())
        for column in ("state", "phase")
    )
    bill = engine.bill()
    spent = [
        [cause, what, f"{bill.get(cause, 0.0):.1f}"]
        for cause, what in ({"fit": "training and validation"} | OVERHEAD).items()
    ]
    return (
        f"**{title}**: {spread(fits)}; the model is trial {fits[0].number:03}'s. {len(trials)} "
        f"trials ({phases}; {counts}) in {sum(bill.values()):.0f} of {engine.ledger.total:.0f} "
        "CPU-seconds; trial 000 is the deck's model\n\n"
        + tracking.markdown(["trial", "phase", "state", "val_accuracy", "CPU-s"], rows)
        + "\n\n"
        + tracking.markdown(["spent on", "which is", "CPU-s"], spent)
    )


def interrupted(client: mlflow.MlflowClient, studies: Path, key: str) -> Place | None:
    """Where the same command was at work when a crash or an interrupt ended it."""
    for path in studies.glob("*/ledger.jsonl"):
        try:
            opening = last_opening(path)
        except Busy:  # another process is at it
            continue
        if opening and opening.key == key and not opening.ended:
            with suppress(mlflow.MlflowException):  # it belongs to another tracking store
                run = client.get_run(opening.run_id)
                if run.info.lifecycle_stage == LifecycleStage.ACTIVE:  # else a user deleted it
                    return Place(path.parent, run)
    return None


def named(client: mlflow.MlflowClient, folder: Path, model: str, data: Dataset) -> Place:
    """Where the study that a user has named lies; refused where it is not one of this sweep."""
    path = folder / "ledger.jsonl"
    if not path.exists():
        known = ", ".join(sorted(path.parent.name for path in folder.parent.glob("*/ledger.jsonl")))
        raise UserError(
            f"study must be 'auto' or name a study in {str(folder.parent)!r} ({known or 'none'}), "
            f"but {folder.name!r} came: copy the tag 'study' from a sweep's page in the MLflow UI"
        )
    try:
        opening = last_opening(path)
        run = client.get_run(opening.run_id if opening else "")
    except mlflow.MlflowException:
        raise UserError(
            f"a study is continued in the tracking store where it began, but {folder.name!r} is "
            f"unknown to {mlflow.get_tracking_uri()}: set MLFLOW_TRACKING_URI as it was then"
        ) from None
    home = tracking.experiment_id(client)
    if run.info.experiment_id != home:
        raise UserError(
            f"a study is continued in the experiment where it began, but {folder.name!r} is in "
            f"that with the id {run.info.experiment_id}, and {home} came: pass --experiment-id="
            f"{run.info.experiment_id} to mlflow run"
        )
    mine, its = (model, data.digest), (run.data.tags["model"], run.data.tags["dataset_digest"])
    if mine != its:
        raise UserError(
            f"a study is of one model on one data set, and {folder.name!r} is of {its[0]} on "
            f"{its[1]}, but {mine[0]} on {mine[1]} came: pass the parameters of that sweep"
        )
    return Place(folder, run)


def main(argv: Sequence[str]) -> None:
    options = cli.parse_all("sweep", argv, OPTIONS)
    model, seed, workers = (options.pop(name) for name in ("model", "seed", "workers"))
    study, plan, address = (options.pop(name) for name in ("study", "plan", "scheduler"))
    if plan and address != LOCAL:
        raise UserError(
            f"a plan is timed on this machine, but scheduler={address} came: leave scheduler out"
        )
    budget, wanted = 60 * options.pop("cpu_minutes"), options.pop("precision")
    precision.check(wanted, model, registry.load(models, model).PARAMS)
    launched = "MLFLOW_RUN_ID" in os.environ
    client = tracking.connect()
    storage.check()
    with charge("data"):
        data = prep.ensure(**options)
    if address == LOCAL:
        workers = workers or processes.usable_cores()
        task, unseen = Task(model, data, seed, workers, launched, wanted), UNSEEN_CPU_SECONDS
    else:
        letters = shared.publish(client, data)
        task = Task(model, data, seed, workers, launched, wanted, address, letters)
        unseen = SILENT_CPU_SECONDS
    if plan:
        write_plan(task, budget)
        return
    studies = Path(options["data_dir"]) / "studies"
    text = f"{model} {seed} {budget} {data.digest} {study} {wanted}"
    key = hashlib.sha256(text.encode()).hexdigest()[:12]
    before = interrupted(client, studies, key)
    again = before.run if before else None
    if before is None and study != "auto":
        before = named(client, studies / study, model, data)
    if again and launched:
        with tracking.start("resume") as run:
            run.name(f"{model} sweep, continued")
            run.tags({"model": model, "continues": again.info.run_id})

    def opened(folder: Path, run_id: str) -> Ledger:
        return Ledger(folder / "ledger.jsonl", budget, key, run_id, unseen)

    with ExitStack() as stack:
        # The ledger comes first where it is there: it says whether another process was faster.
        folder = before.folder if before else None
        if folder and again:
            ledger = stack.enter_context(closing(opened(folder, again.info.run_id)))
        run = stack.enter_context(tracking.start("sweep", again=again))
        folder = folder or studies / f"{model}-{run.id[:8]}"
        # Before there is a ledger, which names a run that has them; and of one that goes on too:
        # its driver may have died before it wrote them.
        run.tags({"model": model, "study": folder.name})
        run.use_dataset(data, "train")
        if again:
            print(f"{model}: continuing the sweep that was interrupted, run {run.id}")
        else:
            ledger = stack.enter_context(closing(opened(folder, run.id)))
            run.name(f"{model} sweep")
            run.tags({"continues": before.run.info.run_id} if before else {})
        sweep(run, ledger, folder, task)


def write_plan(task: Task, budget: float) -> None:
    """Say what a budget would buy, in a run of its own. Nothing is searched."""
    prepared = METER.seconds().get("data", 0.0)
    with tracking.start("plan") as run:
        run.name(f"{task.model} plan")
        run.tags({"model": task.model} | tracking.dataset_tags(task.data))
        text = plans.plan(task, budget, prepared)
        run.describe(text)
    print(text)


def sweep(run: tracking.Run, ledger: Ledger, folder: Path, task: Task) -> None:
    """Search and close; the study lies in ``folder``, whose name is its name."""
    member = registry.load(models, task.model)
    try:
        study = search.open_study(folder.name, task.seed, folder, getattr(member, "STEPS", None))
        search.check_space(study, member.PARAMS)
        search.check_precision(study, task.precision)
    except UserError:
        ledger.refuse()
        raise
    with closing(Progress(task.model, ledger.total)) as show:
        engine = Engine(run, study, task, ledger, show)
        engine.recover()
        if not ledger.searched:
            engine.search()
            ledger.search_ends(engine.own())
    fits = engine.winner()
    if not fits:
        ledger.end(engine.own())
        raise _nothing(engine.outcomes, engine)
    finish(engine, fits)
    spent = engine.spent()
    print(
        f"{task.model}: {spread(fits)}; {len(engine.outcomes)} trials on {task.data.title}, "
        f"{spent:.0f} of {ledger.total:.0f} CPU-s, run {run.id}"
    )
    print(tracking.ui_hint(run.experiment_id))
    ledger.end(engine.own())


if __name__ == "__main__":
    cli.run(main)
