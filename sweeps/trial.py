"""One trial: one set of hyperparameters, one fit in a process of its own, one child run."""

import math
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import mlflow
import optuna

from pipeline import precision, shared, tracking
from pipeline.bill import METER, charge, completed
from pipeline.spec import Dataset, Param, UserError
from pipeline.train import train
from sweeps.nursery import Message

SHORTEST = 0.25  # what a step that a fit has shortened costs at least, by one that it has not
RETRY_OF = "retry_of"  # user attribute: the trial whose worker has died, of one that is it again
REFUSED = "refused"  # the failure of a trial that was given what it must not use

# How a trial ended: the status of its child run.
STATUS = {
    "complete": "FINISHED",
    "pruned": "FINISHED",
    "over_budget": "FINISHED",
    "failed": "FAILED",
    "killed": "KILLED",
}

_DEATHS = {  # by signal
    0: "the process ended without a word",
    9: "the process ended by signal 9, as the kernel does where memory runs out",
}


class Outcome(NamedTuple):
    """How a trial ended.

    Attributes:
        state: complete, pruned, over_budget, failed or killed.
        val_accuracy: the last that was reported, which is that of the model where there is one.
        bill: CPU-seconds of the trial's process and its children, by cause; their sum is the
            kernel's.
        first_step_cpu_seconds: what the first step cost, which a next trial must be able to pay;
            at least its grant, where that did not pay for it.
        logging_cpu_seconds: what came after the last report: storing the model, mostly.
        spent: CPU-seconds of the whole sweep, by cause, when the trial had ended.
        model_uri: of the logged model; None where the trial did not get so far.
        failure: out_of_memory, nan_loss, refused, killed or error, where it failed or was killed.
        found: hyperparameters that were left to the fit.
        lost: whether it was killed with what had forked it, or had it forked: no fault of its own.
    """

    number: int
    state: str
    val_accuracy: float | None
    bill: Mapping[str, float]
    first_step_cpu_seconds: float
    logging_cpu_seconds: float
    spent: Mapping[str, float]
    run_id: str
    model_uri: str | None
    failure: str | None
    error: str | None
    found: Mapping[str, Any]
    lost: bool = False

    @property
    def cpu_seconds(self) -> float:
        return sum(self.bill.values())


def description(
    outcome: Outcome, trial: optuna.trial.FrozenTrial, space: Mapping[str, Param]
) -> str:
    """Markdown for the trial's page: how it ended, what it cost, what it changed of the deck's."""
    reached = "no model" if outcome.model_uri is None else f"{outcome.val_accuracy:.2%} on val"
    phase = trial.user_attrs.get("phase", "")
    fit = outcome.bill.get("fit", 0.0)
    n_steps = len(trial.intermediate_values)
    text = (
        f"**{reached}**, {outcome.state} after {n_steps} steps ({phase}) and "
        f"{outcome.cpu_seconds:.1f} CPU-seconds, {fit:.1f} of them training and validation"
    )
    if outcome.error:
        text += f"; {outcome.error.splitlines()[0]}"
    changed = [
        [name, value, space[name].default]
        for name, value in trial.params.items()
        if value != space[name].default
    ]
    if not changed:
        return f"{text}\n\nThe deck's hyperparameters."
    table = tracking.markdown(["hyperparameter", "value", "the deck's"], changed)
    return f"{text}\n\n{table}"


def prepare() -> None:
    """What would cost each trial 0.4 CPU-seconds is done once, in the nursery."""
    tracking.know_packages()


def body(spec: Message, call: Callable[[Message], Message]) -> Message:
    """What a trial's process does: fit, log the model, say what came of it. Runs in a fork.

    Or, for a ``probe``, what bfloat16 gains here.
    """
    METER.restart(spec.get("until", math.inf))
    if spec.get("probe"):
        return {"gain": precision.gain()}

    @charge("engine")
    def report(step: int, val_accuracy: float) -> bool:
        spent = {"cpu_seconds": time.process_time(), "bill": METER.seconds()}  # since the fork
        return bool(call({"step": step, "val_accuracy": val_accuracy, **spent})["stop"])

    uri = spec["tracking_uri"]
    if "letters" in spec:  # another machine may know the server by another name
        uri = os.environ.get("MLFLOW_TRACKING_URI") or uri
    mlflow.set_tracking_uri(uri)
    run = tracking.Run(mlflow.MlflowClient(), spec["run_id"], spec["experiment_id"])
    if "letters" in spec:  # on another machine
        try:
            data = shared.fetch(spec["letters"])
        except UserError as error:
            return {"failure": REFUSED, "error": str(error)}
    else:
        with charge("data"):
            data = Dataset.open(Path(spec["root"]))
    trained = train(run, spec["model"], spec["params"], data, spec["seed"], report)
    end = trained._asdict() | {"bill": METER.seconds()}
    return end | ({"cpu_model": tracking.cpu_model()} if "letters" in spec else {})


def death(event: Message) -> str:
    """Of what a process has died that could not tell its end, as the nursery's ``event`` has it."""
    died = f"the process ended by signal {event['signal']}"
    return str(event.get("lost") or _DEATHS.get(event["signal"], died))


class Referee:
    """Hears a trial's reports and says when it must stop: because of the pruner or its grant."""

    def __init__(
        self, trial: optuna.Trial, grant: float, logging: float, shortened_after: int = 0
    ) -> None:
        """``grant`` CPU-seconds, of which ``logging`` are needed after the last step.

        After the step ``shortened_after`` the fit makes those that follow as short as it must.
        """
        self.trial, self.grant, self.steps_end = trial, grant, grant - logging
        self.is_baseline = trial.user_attrs.get(RETRY_OF, trial.number) == 0  # never pruned
        self.shortened_after = shortened_after
        self.curve: list[tracking.Point] = []
        self.spent = [0.0]  # CPU-seconds at the start and at each report
        self.bill: Mapping[str, float] = {}  # of the last report
        self.state = "complete"

    @charge("search")
    def __call__(self, message: Message, overdraft: float) -> bool:
        """``message`` has step, val_accuracy, and cpu_seconds and bill since the trial began.

        ``overdraft`` CPU-seconds of the grant are gone: the sweep needed them beside its trials.
        """
        step, val_accuracy = int(message["step"]), float(message["val_accuracy"])
        self.bill = message["bill"]
        values = {"val_accuracy": val_accuracy, "fit_cpu_seconds": self.bill.get("fit", 0.0)}
        self.curve.append(tracking.Point(step, time.time(), values))
        self.spent.append(float(message["cpu_seconds"]))
        self.trial.report(val_accuracy, step)
        before, now = self.spent[-2:]
        # A step is not begun when it would not fit: it costs what the last one did.
        share = SHORTEST if step == self.shortened_after else 1.0
        if now + share * (now - before) > self.steps_end - overdraft:
            self.state = "over_budget"
        elif not self.is_baseline and self.trial.should_prune():
            self.state = "pruned"
        return self.state != "complete"

    def outcome(self, run_id: str, event: Message) -> Outcome:
        """The outcome of the trial that ended as the nursery's ``event`` tells."""
        end = event["end"] or {}
        if model_uri := end.get("model_uri"):
            self.curve[-1] = self.curve[-1]._replace(model_uri=model_uri)
        failure = end.get("failure")
        state, error = self.state, end.get("error")
        if event["over_budget"]:
            state = "over_budget"
        elif failure:
            state = "failed"
        elif not end:
            state, failure = "killed", "killed"
            error = death(event)
        elif end["whole"]:  # then a verdict on a next step is moot
            state = "complete"
        elif state == "complete":  # the fit itself has ended before its last step
            state = "over_budget"
        total = event["cpu_seconds"]
        # One that has given its first step up would have needed more than it was granted.
        least = max(total, self.grant) if state == "over_budget" else total
        if "bill" in end:
            bill = completed(end["bill"], total)
        else:  # what it did since its last report it could not tell
            bill = dict(self.bill) | {"lost": total - sum(self.bill.values())}
        return Outcome(
            number=self.trial.number,
            state=state,
            val_accuracy=self.curve[-1].values["val_accuracy"] if self.curve else None,
            bill=bill,
            first_step_cpu_seconds=self.spent[1] if self.curve else least,
            logging_cpu_seconds=total - self.spent[-1] if self.curve else 0.0,
            spent={},
            run_id=run_id,
            model_uri=model_uri,
            failure=failure,
            error=error,
            found=end.get("found", {}),
            lost="lost" in event,
        )
