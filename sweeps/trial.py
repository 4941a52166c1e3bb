"""One trial: one set of hyperparameters, one fit, one child run."""

from typing import NamedTuple

import optuna

from pipeline import tracking
from pipeline.spec import Dataset
from pipeline.train import train
from sweeps.budget import Budget


class Outcome(NamedTuple):
    """How a trial ended.

    Attributes:
        state: complete, pruned, over_budget or failed.
        val_accuracy: of the model that was kept; None where the trial failed.
        first_step_cpu_seconds: what the first step cost, which the next trial must be able to pay.
        spent_cpu_seconds: of the whole sweep, when the trial ended.
    """

    number: int
    state: str
    val_accuracy: float | None
    cpu_seconds: float
    fit_cpu_seconds: float
    first_step_cpu_seconds: float
    spent_cpu_seconds: float
    run_id: str
    model_uri: str | None
    error: str | None


class Referee:
    """Answers ``report``: whether a trial must stop, because of the pruner or of its grant."""

    def __init__(self, trial: optuna.Trial, budget: Budget) -> None:
        self.trial, self.budget = trial, budget
        self.began = budget.spent()
        self.end = self.began + budget.grant()
        self.steps = [self.began]  # spent at the end of each step
        self.state = "complete"

    def __call__(self, step: int, val_accuracy: float) -> bool:
        self.steps.append(self.budget.spent())
        self.trial.report(val_accuracy, step)
        # A step is not begun when it would not fit: it costs what the last one did.
        if self.steps[-1] + (self.steps[-1] - self.steps[-2]) > self.end:
            self.state = "over_budget"
        elif self.trial.should_prune():
            self.state = "pruned"
        return self.state != "complete"


def run_trial(
    parent: tracking.Run,
    trial: optuna.Trial,
    model: str,
    data: Dataset,
    seed: int,
    budget: Budget,
) -> Outcome:
    """Fit and log one trial as a child run of ``parent``; a failure is an outcome too."""
    referee = Referee(trial, budget)
    result = error = None
    run_id = ""
    try:
        with tracking.start("trial", parent=parent) as run:
            run_id = run.id
            run.name(f"{model} {trial.number:03}")
            run.tags({"trial": trial.number, "state": "killed"})  # until it ends otherwise
            result = train(run, model, trial.params, data, seed, referee)
            if result.whole:  # then a verdict on a next step is moot
                referee.state = "complete"
            run.tags({"state": referee.state})
            run.name(f"{model} {trial.number:03} · {result.val_accuracy:.1%}")
    except Exception as failure:  # noqa: BLE001  whatever a fit raises is that trial's alone
        referee.state, error = "failed", f"{type(failure).__name__}: {failure}"
        parent.client.set_tag(run_id, "state", "failed")
    spent = budget.spent()
    return Outcome(
        number=trial.number,
        state=referee.state,
        val_accuracy=result.val_accuracy if result else None,
        cpu_seconds=spent - referee.began,
        fit_cpu_seconds=referee.steps[-1] - referee.began,
        first_step_cpu_seconds=(referee.steps + [spent])[1] - referee.began,
        spent_cpu_seconds=spent,
        run_id=run_id,
        model_uri=result.model_uri if result else None,
        error=error,
    )
