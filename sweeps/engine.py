"""The loop of a sweep: it alone talks to Optuna and to the ledger; trials live in the nursery."""

import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import mlflow
import optuna
from mlflow.entities import LifecycleStage, ViewType
from mlflow.entities import Run as RunEntity
from optuna.trial import TrialState
from tqdm import tqdm

from pipeline import models, precision, registry, tracking
from pipeline.bill import METER, added, charge, completed, metrics
from pipeline.spec import LATE_LETTERS, Dataset, Params, UserError
from pipeline.train import found
from sweeps import processes, search
from sweeps.budget import RESERVE_CPU_SECONDS, Ledger, own_cpu_seconds
from sweeps.cluster import Cluster
from sweeps.nursery import Message, Nursery, lost
from sweeps.phases import Phases, Proposal, growth
from sweeps.trial import REFUSED, RETRY_OF, STATUS, Outcome, Referee, death, description

MAX_FAILURES = 3  # a sweep whose first trials all fail has one cause
LOGGING_CPU_SECONDS = 2.0  # after a trial's last step, before one has shown what it takes
BEAT_SECONDS = 0.5
PROBE, PROBE_CPU_SECONDS = -1, 5.0  # number and grant of the fork that tries a precision
MAX_NURSERIES = 3  # a nursery that dies again and again is killed by something

# What MLflow imports when it first writes: 1 CPU-second, once for all trials.
LOGGING_PRELOAD = (
    "mlflow.pyfunc",
    "mlflow.store.tracking.sqlalchemy_store",
    "mlflow.store.model_registry.sqlalchemy_store",
    "mlflow.models.display_utils",
    "git",
    "alembic.command",
    "sqlalchemy.dialects.sqlite",
)
LOCAL = "local"
_INTERRUPTS = (signal.SIGINT, signal.SIGTERM)

Show = Callable[[Outcome], None]


class Task(NamedTuple):
    """What a sweep is to do.

    Attributes:
        workers: trials side by side; 0 as many as the cluster has room for.
        launched: by ``mlflow run``; then the sweep ends where that process ends.
        precision: of the fits, or auto.
        scheduler: of the Dask cluster that has the trials; ``LOCAL`` is this machine.
        letters: where a cluster's workers find the data set.
    """

    model: str
    data: Dataset
    seed: int
    workers: int
    launched: bool
    precision: str = precision.AUTO
    scheduler: str = LOCAL
    letters: Mapping[str, Any] | None = None


class _Live(NamedTuple):
    run: tracking.Run
    referee: Referee
    grant: float


class Engine:
    """One driver's work on a sweep."""

    def __init__(
        self, run: tracking.Run, study: optuna.Study, task: Task, ledger: Ledger, show: Show
    ) -> None:
        self.run, self.study, self.task, self.ledger, self.show = run, study, task, ledger, show
        self.member = registry.load(models, task.model)
        self.tags = tracking.environment_tags() | tracking.dataset_tags(task.data)
        self.tags |= {"model": task.model, "study": study.study_name}
        self.outcomes = search.past_outcomes(study)
        self.n_past = len(self.outcomes)
        self.phases: Phases | None = None
        self.live: dict[int, _Live] = {}
        self.nursery: Nursery | Cluster | None = None
        self.imported = 0.0  # CPU-seconds that the nurseries before this one took to load
        self.lost = 0.0  # CPU-seconds of trials whose nursery died before it could bill them
        self.beaten = 0.0
        self.interrupted = False
        self.launchers = processes.launchers()

    # ---- the budget

    def own(self) -> dict[str, float]:
        """CPU-seconds of driver and nursery since the ledger was opened, by cause."""
        total = own_cpu_seconds() + self.lost - sum(self.ledger.debited.values())
        bill, imported = METER.seconds(), self.imported
        if self.nursery:
            total += self.nursery.cpu_seconds()
            imported += self.nursery.imported
        bill["import"] = bill.get("import", 0.0) + imported
        return completed(bill, total)

    def bill(self) -> dict[str, float]:
        """CPU-seconds of the sweep so far, by cause: every process, and every driver before.

        What a running trial has spent since its last report counts as fit.
        """
        bills = [self.ledger.past, self.ledger.debited, self.own()]
        for trial, spent in (self.nursery.live if self.nursery else {}).items():
            reported = self.live[trial].referee.bill
            bills += [reported, {"fit": max(0.0, spent - sum(reported.values()))}]
        return added(*bills)

    def spent(self) -> float:
        """CPU-seconds of the sweep so far."""
        return sum(self.bill().values())

    def left(self) -> float:
        """CPU-seconds that are neither spent nor granted nor needed to close the sweep."""
        live = self.nursery.live if self.nursery else {}
        promised = sum(
            max(0.0, self.ledger.granted.get(trial, 0.0) - spent) for trial, spent in live.items()
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

    def search(self) -> None:
        """Ask, fork and tell until what is left cannot pay for another trial's first step."""
        handlers = {number: signal.signal(number, self._interrupt) for number in _INTERRUPTS}
        try:
            n_nurseries = 0
            while not self._one_cause():
                if self.interrupted:
                    raise KeyboardInterrupt
                try:
                    self._fill()
                    if self.interrupted:
                        continue
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

    def _interrupt(self, signum: int, frame: object) -> None:
        """Note an interrupt; the loop heeds it where no booking is half done."""
        if self.interrupted:
            raise KeyboardInterrupt  # asked a second time: at once
        self.interrupted = True

    def _one_cause(self) -> bool:
        """Whether this driver's first trials have all failed, or died otherwise than with theirs.

        What failed before may be mended by now; and where one has ended well it is not one cause.
        """
        first = self.outcomes[self.n_past :][:MAX_FAILURES]
        failed = [one for one in first if one.failure and not one.lost]
        return len(failed) == MAX_FAILURES and not any(one.model_uri for one in self.outcomes)

    def _fill(self) -> None:
        """Start trials while there are workers and the budget can pay for them."""
        while not self.interrupted and (left := self.left()) > 0:
            if self.nursery is None:
                if self.price() > left:
                    return
                self.nursery = self._open()
            room = self.nursery.capacity()  # which may be waited for
            if self.interrupted or len(self.live) >= (self.task.workers or room):
                return
            if self.phases is None:
                self.phases = self._phases()
                continue  # finding the precision has cost something
            with charge("search"):
                proposal = self.phases.next(left, self.price())
            if proposal is None:
                return
            self._start(proposal)

    def _open(self) -> Nursery | Cluster:
        """Where trials run: a nursery of this process, or a cluster."""
        if self.task.scheduler == LOCAL:
            return Nursery("sweeps.trial:body", preload(self.member))
        modules = preload(self.member)
        return Cluster(self.task.scheduler, "sweeps.trial:body", modules, lambda: self.interrupted)

    def _phases(self) -> Phases:
        """The phases of this sweep, whose fits all have one precision."""
        space, chosen = self.member.PARAMS, self.task.precision
        if chosen == precision.AUTO:  # as the study began
            chosen = self.study.user_attrs.get("precision", chosen)
        chosen = precision.resolve(chosen, space, self._probe)
        self.study.set_user_attr("precision", chosen)
        self.tags["precision"] = chosen
        self.run.tags({"precision": chosen})
        return self._phases_of(precision.params(chosen, space))

    def _phases_of(self, everywhere: Params) -> Phases:
        seed, total = self.task.seed, self.ledger.total
        by = growth(self.member, self.task.data)
        return Phases(self.study, self.member, seed, total, self.outcomes, everywhere, by)

    def _probe(self) -> float:
        """What bfloat16 gains on this machine: tried in a fork, which costs 0.4 CPU-s.

        No gain where the fork comes to nothing; the sweep's page and the terminal say so.
        """
        assert self.nursery is not None
        self.nursery.start(PROBE, {"probe": True}, PROBE_CPU_SECONDS)
        while True:
            for event in self.nursery.events(BEAT_SECONDS):
                if event["trial"] != PROBE or "end" not in event:
                    continue
                end = event["end"] or {}
                if "gain" in end:
                    self.run.metrics({"bfloat16_gain": end["gain"]}, 0)
                    return float(end["gain"])
                dear = f"more than its {PROBE_CPU_SECONDS:g} CPU-seconds"
                why = end.get("error") or (dear if event["over_budget"] else death(event))
                self.run.tags({"bfloat16_probe": why})
                tqdm.write(
                    f"{self.task.model}: float32, since what bfloat16 gains could not be tried "
                    f"({why}); -P precision=bfloat16 takes it untried"
                )
                return 0.0

    def _start(self, proposal: Proposal) -> None:
        """Promise a trial its grant, open its child run, have the nursery fork it."""
        assert self.nursery is not None
        trial, grant = proposal.trial, proposal.grant
        number = trial.number
        self.ledger.grant(number, grant)
        # Should this driver die while the run is made, the trial has spent nothing.
        self.ledger.beat(self.own(), {number: 0.0})
        child = self._create(number)
        half = trial.params[self.member.STEPS] // 2 if self._shortens(trial) else 0
        referee = Referee(trial, grant, self.logging(), half)
        self.live[number] = _Live(child, referee, grant)
        again = trial.user_attrs.get(RETRY_OF)
        tags = {} if again is None else {RETRY_OF: again}
        child.write(params=self._params(trial), tags={"phase": proposal.phase} | tags)
        child.input(self.task.data, "train")
        spec = {
            "model": self.task.model,
            "params": trial.params,
            "root": str(self.task.data.root),
            "seed": proposal.seed,
            "until": referee.steps_end,
            "run_id": child.id,
            "experiment_id": child.experiment_id,
            "tracking_uri": mlflow.get_tracking_uri(),
        }
        if self.task.letters is not None:
            spec["letters"] = dict(self.task.letters)
        self.nursery.start(number, spec, grant)
        self._beat()

    def _shortens(self, trial: optuna.Trial) -> bool:
        """Whether a fit makes the second half of its steps as short as its grant asks for."""
        return hasattr(self.member, "STEPS") and LATE_LETTERS in trial.params

    def _create(self, number: int) -> tracking.Run:
        """The child run of a trial: killed, until the trial ends otherwise."""
        tags = self.tags | {"trial": number, "state": "killed"}
        name = f"{self.task.model} {number:03}"
        return tracking.create(self.run.client, "trial", self.run, name, tags)

    def _params(self, trial: optuna.Trial | optuna.trial.FrozenTrial) -> Params:
        """What a trial's run says of it."""
        seed = trial.user_attrs.get("seed", self.task.seed)
        return trial.params | {"model": self.task.model, "seed": seed}

    def _hear(self) -> None:
        """Answer reports, book ends, keep the ledger's account of what is spent."""
        assert self.nursery is not None
        for event in self._events():
            if "end" in event:
                self._end(event)
            elif event["trial"] in self.live:
                # What driver and idle workers take while a trial runs is taken from its grant.
                overdraft = max(0.0, -self.left())
                stop = self.live[event["trial"]].referee(event["message"], overdraft)
                self.nursery.answer(event["trial"], {"stop": stop})
        if time.monotonic() - self.beaten > BEAT_SECONDS:
            self._beat()
            if self.task.launched and processes.launchers() != self.launchers:
                self.interrupted = True  # mlflow run is gone: nobody waits for this any longer

    def _events(self) -> Iterator[Message]:
        """What has come of the trials, all of it read before the first is heeded.

        The kernel charges the nursery with a trial that has ended: as long as its end is not read,
        it counts as a live one too, and another trial might be stopped for want of what is there.
        """
        assert self.nursery is not None
        found: list[Message] = []
        try:
            for event in self.nursery.events(BEAT_SECONDS):
                found.append(event)
        except ConnectionError:
            yield from found
            raise
        yield from found

    def _beat(self) -> None:
        """Note in the ledger what is spent so far: what a crash now would leave known."""
        assert self.nursery is not None
        self.beaten = time.monotonic()
        self.ledger.beat(self.own(), dict(self.nursery.live))

    def _end(self, event: Message) -> None:
        """Book a trial's bill, tell Optuna, close its child run."""
        number = event["trial"]
        run, referee, grant = self.live.pop(number)
        outcome = referee.outcome(run.id, event)
        self.ledger.debit(number, outcome.bill)
        outcome = outcome._replace(spent=self.bill())
        search.tell(self.study, referee.trial, outcome)
        self.outcomes.append(outcome)
        end = event["end"] or {}
        if traceback := end.get("traceback"):
            run.text("traceback.txt", traceback)
        costs = {"peak_rss_mb": event["peak_rss_mb"]} | end.get("costs", {})
        where = {"worker": event.get("worker"), "cpu_model": end.get("cpu_model")}
        self._close(run, outcome, referee.curve, costs, where)
        # Best and bill so far, by trial: the last values are the sweep's own.
        progress = {"val_accuracy": best(self.outcomes)} | metrics(outcome.spent)
        self.run.metrics(progress, len(self.outcomes) - 1)
        self.show(outcome)
        if outcome.lost and self.phases and not self.interrupted:
            self.phases.retry(number, grant)
        if outcome.failure == REFUSED:
            raise UserError(str(outcome.error))

    def _close(
        self,
        run: tracking.Run,
        outcome: Outcome,
        curve: Sequence[tracking.Point],
        costs: Mapping[str, float],
        where: Mapping[str, str | None] | None = None,
    ) -> None:
        """Log how a trial ended, and close its run; ``where`` it ran has tags, in a cluster."""
        texts = {
            **(where or {}),
            "state": outcome.state,
            "failure": outcome.failure,
            "error": outcome.error,
            "model_uri": outcome.model_uri,
        }
        trial = self.study.get_trials(deepcopy=False)[outcome.number]
        texts[tracking.NOTE] = description(outcome, trial, self.member.PARAMS)
        last = curve[-1].step if curve else 0
        # At once: a write for every step would be a trial's largest overhead.
        run.write(
            [*curve, tracking.Point(last, time.time(), metrics(outcome.bill) | dict(costs))],
            params=found(outcome.found),
            tags={name: text for name, text in texts.items() if text},
        )
        if outcome.val_accuracy is not None:
            run.name(f"{self.task.model} {outcome.number:03} · {outcome.val_accuracy:.1%}")
        run.close(STATUS[outcome.state])

    def winner(self) -> list[Outcome]:
        """The fits of the best hyperparameters, the best first: one, or one for each seed.

        Those that the race has found where there was one, else the best trial's.
        """
        phases = self.phases or self._phases_of({})
        logged = [outcome for outcome in self.outcomes if outcome.model_uri is not None]
        fits = phases.confirmed() or logged
        ranked = sorted(fits, key=lambda one: -(one.val_accuracy or 0.0))
        return ranked if phases.confirmed() else ranked[:1]

    def _bury_nursery(self) -> None:
        """The nursery is dead, and its trials with it: bill them by their last beat."""
        assert self.nursery is not None
        nursery, self.nursery = self.nursery, None
        nursery.close()
        self.imported += nursery.imported
        self.lost += sum(nursery.live.values()) + nursery.elsewhere()
        for number in list(self.live):
            spent = nursery.live.get(number, 0.0)
            self._end(lost(number, spent, "the process ended with the one that had forked it"))

    def _stop(self) -> None:
        """End the nursery, and book what still runs as killed."""
        if self.nursery:
            self._bury_nursery()
        self._close_runs(self._runs("attributes.status = 'RUNNING' and "))

    def recover(self) -> None:
        """Make good what the drivers before this one had no time for.

        No child run is left RUNNING, and every trial that was proposed has one, which says how it
        ended. A study that goes on has the precision that it began with.
        """
        if chosen := self.study.user_attrs.get("precision"):
            self.tags["precision"] = chosen
            self.run.tags({"precision": chosen})
        begun = [
            trial
            for trial in self.study.get_trials(deepcopy=False)
            if trial.state != TrialState.WAITING
        ]
        if not begun:
            return
        runs = self._runs(view=ViewType.ALL)
        ended = {one.run_id: STATUS[one.state] for one in self.outcomes}

        def is_open(run: RunEntity) -> bool:
            """Also one that was closed as KILLED, since its driver had died while it closed it."""
            status = ended.get(run.info.run_id)
            done = run.info.status == status and tracking.NOTE in run.data.tags
            return not done if status else run.info.status == "RUNNING"

        there = [run for run in runs if run.info.lifecycle_stage == LifecycleStage.ACTIVE]
        self._close_runs([run for run in there if is_open(run)])
        known = {run.data.tags["trial"] for run in runs}
        known |= {str(one.number) for one in self.outcomes}  # a deleted run may be gone for good
        for trial in begun:
            if str(trial.number) not in known:
                child = self._create(trial.number)
                child.write(params=self._params(trial), tags={"failure": "killed"})
                child.close("KILLED")

    @charge("tracking")
    def _runs(self, condition: str = "", view: int = ViewType.ACTIVE_ONLY) -> list[RunEntity]:
        """The study's child runs."""
        condition += f"tags.step = 'trial' and tags.study = '{self.study.study_name}'"
        home = [self.run.experiment_id]
        return list(self.run.client.search_runs(home, condition, view, max_results=50_000))

    def _close_runs(self, runs: Sequence[RunEntity]) -> None:
        """Close runs that are open though no trial is."""
        outcomes = {str(outcome.number): outcome for outcome in self.outcomes}
        for entity in runs:
            run = tracking.Run(self.run.client, entity.info.run_id, entity.info.experiment_id)
            outcome = outcomes.get(entity.data.tags["trial"])
            if outcome is None:
                run.tags({"failure": "killed"})
                run.close("KILLED")
            elif outcome.run_id == run.id:  # its driver died while it closed it
                self._close(run, outcome, self._curve(outcome), {})
            else:  # a server that broke down when it had made a run was asked for another one
                run.delete()

    def _curve(self, outcome: Outcome) -> list[tracking.Point]:
        """What a trial has reported, as the study has it."""
        reports = self.study.get_trials(deepcopy=False)[outcome.number].intermediate_values
        return [
            tracking.Point(step, time.time(), {"val_accuracy": value}, outcome.model_uri)
            for step, value in sorted(reports.items())
        ]


def preload(member: ModuleType) -> list[str]:
    """Modules that a model's trials need, for the nursery to load once."""
    return [*LOGGING_PRELOAD, *getattr(member, "PRELOAD", ())]


def best(outcomes: Sequence[Outcome]) -> float:
    """Best validation accuracy of a logged model so far; 0 before there is one."""
    return max((one.val_accuracy or 0.0 for one in outcomes if one.model_uri), default=0.0)
