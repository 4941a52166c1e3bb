"""The loop of a sweep: it alone talks to Optuna and to the ledger; trials live in the nursery."""

import signal
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import optuna
from optuna.trial import TrialState

from pipeline import models, registry, tracking
from pipeline.spec import Dataset
from pipeline.train import begin
from sweeps import processes
from sweeps.budget import GRANT_SHARE, RESERVE_CPU_SECONDS, Ledger, own_cpu_seconds
from sweeps.nursery import Message, Nursery
from sweeps.trial import STATUS, Outcome, Referee

MAX_FAILURES = 3  # a sweep whose first trials all fail has one cause
LOGGING_CPU_SECONDS = 2.0  # after a trial's last step, before one has shown what it takes
BEAT_SECONDS = 0.5
MAX_NURSERIES = 3  # a nursery that dies again and again is killed by something

# What MLflow imports when it first writes: 1 CPU-second, once for all trials.
LOGGING_PRELOAD = (
    "mlflow.store.tracking.sqlalchemy_store",
    "mlflow.store.model_registry.sqlalchemy_store",
    "mlflow.models.display_utils",
    "git",
    "alembic.command",
    "sqlalchemy.dialects.sqlite",
)
_INTERRUPTS = (signal.SIGINT, signal.SIGTERM)

Show = Callable[[Outcome], None]


class _Live(NamedTuple):
    run: tracking.Run
    referee: Referee


class Engine:
    """One driver's work on a sweep."""

    def __init__(
        self,
        run: tracking.Run,
        study: optuna.Study,
        model: str,
        data: Dataset,
        seed: int,
        ledger: Ledger,
        workers: int,
        show: Show,
        launched: bool,
    ) -> None:
        """``launched``: by ``mlflow run``; then this sweep ends where that process ends."""
        self.run, self.study, self.model = run, study, model
        self.data, self.seed, self.workers, self.show = data, seed, workers, show
        self.ledger = ledger
        self.member = registry.load(models, model)
        self.outcomes = past_outcomes(study)
        self.live: dict[int, _Live] = {}
        self.nursery: Nursery | None = None
        self.lost = 0.0  # CPU-seconds of trials whose nursery died before it could bill them
        self.beaten = 0.0
        self.interrupted = False
        self.launched = launched
        self.launchers = processes.launchers()

    # ---- the budget

    def spent(self) -> float:
        """CPU-seconds of the sweep so far: every process, and every driver before this one."""
        total = self.ledger.past + own_cpu_seconds() + self.lost
        if self.nursery:
            total += self.nursery.cpu_seconds() + sum(self.nursery.live.values())
        return total

    def left(self) -> float:
        """CPU-seconds that are neither spent nor granted nor needed to close the sweep."""
        used = self.nursery.live if self.nursery else {}
        promised = sum(
            max(0.0, grant - used.get(trial, 0.0)) for trial, grant in self.ledger.granted.items()
        )
        return self.ledger.total - RESERVE_CPU_SECONDS - self.spent() - promised

    def price(self) -> float:
        """CPU-seconds that a next trial needs to end well: its first step, and logging.

        The dearest so far: a trial that cannot pay for its first step leaves no model.
        """
        costs = [outcome.first_step_cpu_seconds for outcome in self.outcomes]
        return max(costs, default=0.0) + self.logging()

    def logging(self) -> float:
        """CPU-seconds that a trial needs after its last step: the most that one needed so far."""
        costs = [one.logging_cpu_seconds for one in self.outcomes if one.model_uri]
        return max(costs, default=LOGGING_CPU_SECONDS)

    # ---- the loop

    def search(self) -> list[Outcome]:
        """Ask, fork and tell until what is left cannot pay for another trial's first step."""
        handlers = {number: signal.signal(number, self._interrupt) for number in _INTERRUPTS}
        try:
            n_nurseries = 0
            while not self._one_cause():
                if self.interrupted:
                    raise KeyboardInterrupt
                try:
                    self._fill()
                    if not self.live:
                        break
                    self._hear()
                except ConnectionError:
                    n_nurseries += 1
                    self._bury_nursery()
                    if n_nurseries == MAX_NURSERIES:
                        raise
        finally:
            self._stop()
            for number, handler in handlers.items():
                signal.signal(number, handler)
        return self.outcomes

    def _interrupt(self, signum: int, frame: object) -> None:
        """Note an interrupt; the loop heeds it where no booking is half done."""
        if self.interrupted:
            raise KeyboardInterrupt  # asked a second time: at once
        self.interrupted = True

    def _one_cause(self) -> bool:
        """Whether the first trials have all failed."""
        first = self.outcomes[:MAX_FAILURES]
        return len(first) == MAX_FAILURES and all(one.state == "failed" for one in first)

    def _fill(self) -> None:
        """Start trials while there are workers and the budget can pay for them."""
        while len(self.live) < self.workers and (left := self.left()) > self.price():
            if self.nursery is None:
                preload = getattr(self.member, "PRELOAD", ())
                self.nursery = Nursery("sweeps.trial:body", [*LOGGING_PRELOAD, *preload])
            space = {name: param.distribution for name, param in self.member.PARAMS.items()}
            trial = self.study.ask(fixed_distributions=space)
            grant = min(left, GRANT_SHARE * self.ledger.total)
            self.ledger.grant(trial.number, grant)
            name = f"{self.model} {trial.number:03}"
            tags = {"trial": trial.number, "state": "killed"}  # until it ends otherwise
            tags |= tracking.environment_tags()
            child = tracking.create(self.run.client, "trial", self.run, name, tags)
            self.live[trial.number] = _Live(child, Referee(trial, grant, self.logging()))
            begin(child, self.model, trial.params, self.data, self.seed)
            spec = {
                "model": self.model,
                "params": trial.params,
                "root": str(self.data.root),
                "seed": self.seed,
                "run_id": child.id,
                "experiment_id": child.experiment_id,
            }
            self.nursery.start(trial.number, spec, grant)
            self._beat()

    def _hear(self) -> None:
        """Answer reports, book ends, keep the ledger's account of what is spent."""
        assert self.nursery is not None
        for event in self.nursery.events(BEAT_SECONDS):
            if "end" in event:
                self._end(event)
            elif event["trial"] in self.live:
                self.nursery.answer(event["trial"], {"stop": self._report(event)})
        if time.monotonic() - self.beaten > BEAT_SECONDS:
            self._beat()
            if self.launched and processes.launchers() != self.launchers:
                self.interrupted = True  # mlflow run is gone: nobody waits for this any longer

    def _beat(self) -> None:
        """Note in the ledger what is spent so far: what a crash now would leave known."""
        assert self.nursery is not None
        self.beaten = time.monotonic()
        trials = dict(self.nursery.live)
        own = self.spent() - self.ledger.past - self.ledger.debited - sum(trials.values())
        self.ledger.beat(own, trials)

    def _report(self, event: Message) -> bool:
        message = event["message"]
        values = {
            "val_accuracy": float(message["val_accuracy"]),
            "fit_cpu_seconds": float(message["cpu_seconds"]),
        }
        referee = self.live[event["trial"]].referee
        return referee(tracking.Point(int(message["step"]), time.time(), values))

    def _end(self, event: Message) -> None:
        """Book a trial's bill, tell Optuna, close its child run."""
        number = event["trial"]
        run, referee = self.live.pop(number)
        self.ledger.debit(number, event["cpu_seconds"])
        outcome = referee.outcome(run.id, event, self.spent())
        tell(self.study, referee.trial, outcome)
        self.outcomes.append(outcome)
        end = event["end"] or {}
        if outcome.model_uri is None:  # the trial did not log its reports itself
            run.history(referee.curve)
            if traceback := end.get("traceback"):
                run.text("traceback.txt", traceback)
        tags = {"state": outcome.state, "failure": outcome.failure, "error": outcome.error}
        run.tags({name: value for name, value in tags.items() if value})
        bill = {"cpu_seconds": outcome.cpu_seconds, "peak_rss_mb": event["peak_rss_mb"]}
        run.metrics(bill, referee.curve[-1].step if referee.curve else 0)
        if outcome.val_accuracy is not None:
            run.name(f"{self.model} {number:03} · {outcome.val_accuracy:.1%}")
        run.client.set_terminated(run.id, STATUS[outcome.state])
        # Best and bill so far, by trial: the last values are the sweep's own.
        progress = {"val_accuracy": best(self.outcomes), "cpu_seconds": outcome.spent_cpu_seconds}
        self.run.metrics(progress, len(self.outcomes) - 1)
        self.show(outcome)

    def _bury_nursery(self) -> None:
        """The nursery is dead, and its trials with it: bill them by their last beat."""
        assert self.nursery is not None
        nursery, self.nursery = self.nursery, None
        spent = dict(nursery.live)
        nursery.close()
        self.lost += sum(spent.values())
        for number in list(self.live):
            self._end(_killed(number, spent.get(number, 0.0)))

    def _stop(self) -> None:
        """End the nursery, and book what still runs as killed."""
        if self.nursery:
            self._bury_nursery()
        reconcile(self.run)


def _killed(number: int, cpu_seconds: float) -> Message:
    return {
        "trial": number,
        "end": None,
        "cpu_seconds": cpu_seconds,
        "peak_rss_mb": 0.0,
        "signal": 9,
        "over_budget": False,
    }


def reconcile(run: tracking.Run) -> None:
    """Close the child runs that a crash or an interrupt has left RUNNING."""
    left = run.client.search_runs(
        [run.experiment_id],
        f"tags.`mlflow.parentRunId` = '{run.id}' and attributes.status = 'RUNNING'",
    )
    for child in left:
        run.client.set_terminated(child.info.run_id, "KILLED")


def best(outcomes: Sequence[Outcome]) -> float:
    """Best validation accuracy of a logged model so far; 0 before there is one."""
    return max((one.val_accuracy or 0.0 for one in outcomes if one.model_uri), default=0.0)


def tell(study: optuna.Study, trial: optuna.Trial, outcome: Outcome) -> None:
    """Tell Optuna how a trial ended. A fit that its grant ended early has a value all the same."""
    trial.set_user_attr("outcome", outcome._asdict())
    if outcome.val_accuracy is None or outcome.state in ("failed", "killed"):
        study.tell(trial, state=TrialState.FAIL)
    elif outcome.state == "pruned":
        study.tell(trial, state=TrialState.PRUNED)
    else:
        study.tell(trial, outcome.val_accuracy)


def past_outcomes(study: optuna.Study) -> list[Outcome]:
    """Outcomes of a study's ended trials, as their drivers have noted them in it."""
    attributes = [trial.user_attrs.get("outcome") for trial in study.get_trials(deepcopy=False)]
    return [Outcome(**outcome) for outcome in attributes if outcome]
