"""One trial: one set of hyperparameters, one fit in a process of its own, one child run."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import mlflow
import optuna

from pipeline import tracking
from pipeline.spec import Dataset
from pipeline.train import train
from sweeps.nursery import Message

# How a trial ended: the status of its child run.
STATUS = {
    "complete": "FINISHED",
    "pruned": "FINISHED",
    "over_budget": "FINISHED",
    "failed": "FAILED",
    "killed": "KILLED",
}


class Outcome(NamedTuple):
    """How a trial ended.

    Attributes:
        state: complete, pruned, over_budget, failed or killed.
        val_accuracy: the last that was reported, which is that of the model where there is one.
        cpu_seconds: the kernel's bill for the trial's process and its children.
        fit_cpu_seconds: of fit and validation, up to the last report.
        first_step_cpu_seconds: what the first step cost, which a next trial must be able to pay.
        logging_cpu_seconds: what came after the last report: storing the model, mostly.
        spent_cpu_seconds: of the whole sweep, when the trial ended.
        model_uri: of the logged model; None where the trial did not get so far.
        failure: out_of_memory, nan_loss, killed or error, where it failed or was killed.
    """

    number: int
    state: str
    val_accuracy: float | None
    cpu_seconds: float
    fit_cpu_seconds: float
    first_step_cpu_seconds: float
    logging_cpu_seconds: float
    spent_cpu_seconds: float
    run_id: str
    model_uri: str | None
    failure: str | None
    error: str | None


def body(spec: Message, call: Callable[[Message], Message]) -> Message:
    """What a trial's process does: fit, log, and say what came of it. Runs in a fork."""

    def report(step: int, val_accuracy: float) -> bool:
        spent = time.process_time()  # since the fork
        message = {"step": step, "val_accuracy": val_accuracy, "cpu_seconds": spent}
        return bool(call(message)["stop"])

    run = tracking.Run(mlflow.MlflowClient(), spec["run_id"], spec["experiment_id"])
    data = Dataset.open(Path(spec["root"]))
    return train(run, spec["model"], spec["params"], data, spec["seed"], report)._asdict()


class Referee:
    """Hears a trial's reports and says when it must stop: because of the pruner or its grant."""

    def __init__(self, trial: optuna.Trial, grant: float, logging: float) -> None:
        """``grant`` CPU-seconds, of which ``logging`` are needed after the last step."""
        self.trial, self.steps_end = trial, grant - logging
        self.curve: list[tracking.Point] = []
        self.state = "complete"

    def __call__(self, point: tracking.Point) -> bool:
        """``point`` has val_accuracy and fit_cpu_seconds, spent since the trial began."""
        before = self.curve[-1].values["fit_cpu_seconds"] if self.curve else 0.0
        self.curve.append(point)
        self.trial.report(point.values["val_accuracy"], point.step)
        now = point.values["fit_cpu_seconds"]
        # A step is not begun when it would not fit: it costs what the last one did.
        if now + (now - before) > self.steps_end:
            self.state = "over_budget"
        elif self.trial.number > 0 and self.trial.should_prune():  # the baseline is never pruned
            self.state = "pruned"
        return self.state != "complete"

    def outcome(self, run_id: str, event: Message, spent: float) -> Outcome:
        """The outcome of the trial that ended as the nursery's ``event`` tells."""
        end = event["end"] or {}
        failure = end.get("failure")
        state, error = self.state, end.get("error")
        if event["over_budget"]:
            state = "over_budget"
        elif failure:
            state = "failed"
        elif not end:
            state, failure = "killed", "killed"
            error = f"the process ended by signal {event['signal']}"
        elif end["whole"]:  # then a verdict on a next step is moot
            state = "complete"
        costs = [point.values["fit_cpu_seconds"] for point in self.curve]
        return Outcome(
            number=self.trial.number,
            state=state,
            val_accuracy=self.curve[-1].values["val_accuracy"] if self.curve else None,
            cpu_seconds=event["cpu_seconds"],
            fit_cpu_seconds=costs[-1] if costs else 0.0,
            first_step_cpu_seconds=costs[0] if costs else event["cpu_seconds"],
            logging_cpu_seconds=event["cpu_seconds"] - costs[-1] if costs else 0.0,
            spent_cpu_seconds=spent,
            run_id=run_id,
            model_uri=end.get("model_uri"),
            failure=failure,
            error=error,
        )
