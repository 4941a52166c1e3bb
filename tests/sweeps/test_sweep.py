import itertools
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlflow
import optuna
import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from servers import Server
from steps import SWEEP, arguments, artifacts, left_until, runs, toy, wait

from pipeline import models
from pipeline.spec import UserError
from sweeps import engine, phases, search, sweep
from sweeps.budget import RESERVE_CPU_SECONDS, Ledger, own_cpu_seconds
from sweeps.trial import Referee

FIGURES = {
    "bill.png",
    "optimisation_history.png",
    "parallel_coordinates.png",
    "hyperparameter_importance.png",
}
GARBAGE = "[os.write(fd, b'garbage' * 9) for fd in range(3, 40) if socket(fd)]"
GRANT = 4.0  # CPU-seconds of each trial
NATIVE = "collections.deque(itertools.count(), maxlen=0)"  # for ever, and deaf to Python's signals

BURN = """end = time.process_time() + 0.3
        while time.process_time() < end: pass"""


class Sweeps:
    """Sweeps of a toy model in this process, whose own CPU time is no part of their budget."""

    def __init__(
        self, store: mlflow.MlflowClient, options: dict[str, Any], add: Any, patch: Any
    ) -> None:
        self.store, self.options, self.add, self.patch = store, options, add, patch

    def run(
        self,
        source: str,
        cpu_seconds: float = 90.0,
        n_trials: int = 8,
        overdraft: float = 0.0,
        **more: object,
    ) -> None:
        """A budget that is ample on any machine, and a bound on the trials to end soon."""
        self.add(models, "toy", source)
        minutes = (own_cpu_seconds() + cpu_seconds) / 60
        self.patch.setattr(engine.Engine, "left", left_until(n_trials, overdraft))
        self.patch.setattr(phases, "GRANT_SHARE", GRANT / (60 * minutes))
        options = SWEEP | {"model": "toy", "cpu_minutes": minutes}
        sweep.main(arguments(self.options | options | more))

    @property
    def parent(self) -> Any:
        return runs(self.store, "sweep")[-1]

    @property
    def trials(self) -> list[Any]:
        found = runs(self.store, "trial")
        return sorted(found, key=lambda run: int(run.data.tags["trial"]))

    def tags(self, name: str) -> list[str | None]:
        return [run.data.tags.get(name) for run in self.trials]

    def ledger(self) -> list[dict[str, Any]]:
        (path,) = Path(self.options["data_dir"]).glob("studies/*/ledger.jsonl")
        return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def sweeps(
    store: mlflow.MlflowClient,
    data_options: dict[str, Any],
    add_member: Any,
    monkeypatch: pytest.MonkeyPatch,
    undrawn: None,
) -> Sweeps:
    return Sweeps(store, data_options, add_member, monkeypatch)


def test_every_trial_is_a_child_run_and_the_sweep_shows_the_best(sweeps: Sweeps) -> None:
    copies: list[bool] = []
    real = optuna.Study.get_trials

    def counted(study: optuna.Study, deepcopy: bool = True, states: Any = None) -> Any:
        copies.append(deepcopy)
        return real(study, deepcopy, states)

    with sweeps.patch.context() as patch:
        patch.setattr(optuna.Study, "get_trials", counted)
        sweeps.run(toy(), n_trials=12)
    # Law: a study is not copied for each of its trials: that would cost the square of their number.
    assert sum(copies) < 12
    parent, trials = sweeps.parent, sweeps.trials
    assert len(trials) == 12
    for trial in trials:
        # A child run has params, the accuracy by step, a bill, a model and how it ended.
        assert trial.data.tags["mlflow.parentRunId"] == parent.info.run_id
        assert trial.info.status == "FINISHED"
        assert trial.data.tags["state"] in ("complete", "pruned", "over_budget")
        assert {"quality", "steps", "seed"} <= set(trial.data.params)
        assert {"val_accuracy", "cpu_seconds", "fit_cpu_seconds"} <= set(trial.data.metrics)
        # Its page says what it reached, and what it changed.
        text = trial.data.tags["mlflow.note.content"]
        assert text.startswith(f"**{trial.data.metrics['val_accuracy']:.2%} on val**")
        row = f"| quality        | {trial.data.params['quality']}"
        assert row in text if trial.data.tags["trial"] != "0" else "The deck's" in text
    assert mlflow.pyfunc.load_model(trials[-1].data.tags["model_uri"]) is not None
    # Trial 0 is the defaults and ran to its end; some of the others were pruned.
    assert (trials[0].data.params["quality"], trials[0].data.params["steps"]) == ("0.5", "3")
    assert sweeps.tags("state")[0] == "complete"
    assert "pruned" in sweeps.tags("state")
    # The sweep's own run has the best value, its params and its model.
    best = max(trials, key=lambda trial: trial.data.metrics["val_accuracy"])
    assert parent.info.status == "FINISHED"
    assert parent.data.metrics["val_accuracy"] == best.data.metrics["val_accuracy"]
    assert parent.data.params["quality"] == best.data.params["quality"]
    assert parent.data.tags["model_uri"] == best.data.tags["model_uri"]
    assert parent.data.metrics["n_trials"] == len(trials)
    bill = [parent.data.metrics[f"{name}cpu_seconds"] for name in ("", "fit_", "overhead_")]
    assert bill[0] == pytest.approx(bill[1] + bill[2])
    tables = {"trials.csv", "hyperparameter_importance.csv"}
    assert artifacts(sweeps.store, parent.info.run_id) == FIGURES | tables
    # What a comparison must know: what the sweep was given, and what mattered.
    assert parent.data.metrics["budget_cpu_seconds"] == sweeps.ledger()[0]["total"]
    shares = mlflow.artifacts.load_text(f"{parent.info.artifact_uri}/hyperparameter_importance.csv")
    assert sorted(line.split(",")[0] for line in shares.split()[1:]) == ["quality", "steps"]
    # Ledger, study and MLflow agree on how many trials there were.
    folder = Path(sweeps.options["data_dir"]) / "studies" / parent.data.tags["study"]
    journal = JournalStorage(JournalFileBackend(str(folder / "optuna.journal")))
    assert journal.get_n_trials(0) == len(trials)
    kinds = [record["kind"] for record in sweeps.ledger()]
    assert kinds.count("grant") == kinds.count("debit") == len(trials)


def any_length(before: str = "pass") -> str:
    """A toy that says that a fit of any number of steps is a whole one."""
    return toy(before).replace("def socket", 'STEPS = "steps"\n\ndef socket')


def test_a_fit_of_any_length_is_screened_raced_and_confirmed(sweeps: Sweeps) -> None:
    sweeps.patch.setattr(phases, "SCREEN_SHARE", 1e-6)  # one trial
    sweeps.patch.setattr(phases, "shares", lambda *given: phases.Shares(2, 2, 15.0))
    sweeps.run(any_length(before="quality += 0.001 * seed"), seed=3, workers=1)
    parent, trials = sweeps.parent, sweeps.trials
    assert sweeps.tags("phase") == ["screen", "race", "race", "confirm"]
    assert [trial.data.params["steps"] for trial in trials] == ["1", "5", "5", "5"]
    # One at a time, as was asked for; the two that race could be side by side.
    assert _most_at_once(sweeps) == 1
    # The winner is trained again, by other seeds; the sweep tells their mean, and has the best.
    # The second one that races has nothing else that could be another: its seed is it.
    assert [trial.data.params["seed"] for trial in trials] == ["3", "3", "4", "5"]
    values = [trials[i].data.metrics["val_accuracy"] for i in (1, 2, 3)]
    metrics = parent.data.metrics
    assert metrics["confirmed_val_accuracy"] == pytest.approx(statistics.mean(values))
    assert metrics["confirmed_val_accuracy_std"] == pytest.approx(statistics.stdev(values))
    assert metrics["val_accuracy"] == max(values)
    assert parent.data.tags["model_uri"] == trials[3].data.tags["model_uri"]
    assert "the mean of 3 seeds" in parent.data.tags["mlflow.note.content"]


def test_a_small_budget_says_that_the_spread_is_unknown(sweeps: Sweeps) -> None:
    sweeps.patch.setattr(phases, "SCREEN_SHARE", 1e-6)
    sweeps.patch.setattr(phases, "shares", lambda *given: phases.Shares(1, 0, 600.0))
    sweeps.run(any_length(), workers=1)
    assert sweeps.tags("phase") == ["screen", "race"]
    assert "its spread is unknown" in sweeps.parent.data.tags["mlflow.note.content"]
    assert "confirmed_val_accuracy_std" not in sweeps.parent.data.metrics


def test_a_fit_without_a_length_is_screened_on_fewer_letters_and_done_on_all(
    sweeps: Sweeps,
) -> None:
    sweeps.patch.setattr(phases, "SEARCH_SHARE", 1e-6)  # one trial
    on_some = 'PARAMS = {"n_letters": Param(0, IntDistribution(0, 1000)),'
    source = toy().replace("PARAMS = {", on_some)
    source = source.replace("def socket", 'SCREEN = {"n_letters": 10}\n\ndef socket')
    sweeps.run(source, workers=1)
    assert sweeps.tags("phase") == ["screen", "race"]
    assert [trial.data.params["n_letters"] for trial in sweeps.trials] == ["10", "0"]
    assert sweeps.parent.data.tags["model_uri"] == sweeps.trials[1].data.tags["model_uri"]


def test_a_fit_that_shortens_itself_is_told_its_grant_and_not_stopped_before(
    sweeps: Sweeps,
) -> None:
    halves: list[int] = []

    def noting(trial: Any, grant: float, logging: float, half: int) -> Referee:
        halves.append(half)
        return Referee(trial, grant, logging, half)

    sweeps.patch.setattr(phases, "SCREEN_SHARE", 1e-6)
    sweeps.patch.setattr(phases, "shares", lambda *given: phases.Shares(1, 0, 600.0))
    sweeps.patch.setattr(engine, "Referee", noting)
    source = any_length(before="from pipeline.bill import METER; assert 0 < METER.left() < 1000")
    late = 'PARAMS = {"late_letters": Param(0, IntDistribution(0, 9)),'
    sweeps.run(source.replace("PARAMS = {", late), workers=1)
    assert sweeps.tags("state") == ["complete", "complete"]
    assert [trial.data.params["steps"] for trial in sweeps.trials] == ["1", "5"]
    assert halves == [0, 2]


def test_a_model_of_one_precision_refuses_another(sweeps: Sweeps) -> None:
    with pytest.raises(UserError, match="precision must be auto or float32 for toy"):
        sweeps.run(toy(), precision="bfloat16")
    sweeps.run(toy(), n_trials=1, precision="float32")
    assert sweeps.tags("precision") == ["float32"]


def test_the_budget_holds(sweeps: Sweeps) -> None:
    sweeps.run(toy(before=BURN), 16.0, n_trials=1000)
    total = [record["total"] for record in sweeps.ledger() if record["kind"] == "open"][-1]
    spent = sweeps.parent.data.metrics["cpu_seconds"]
    assert spent <= total + max(0.01 * total, 2.0)


@pytest.mark.parametrize(
    ("overdraft", "state", "n_steps"), [(0, "complete", 3), (9, "over_budget", 1)]
)
def test_what_a_sweep_takes_beside_its_trials_is_taken_from_their_grants(
    overdraft: float, state: str, n_steps: int, sweeps: Sweeps
) -> None:
    sweeps.run(toy(), n_trials=1, overdraft=overdraft)
    (trial,) = sweeps.trials
    curve = sweeps.store.get_metric_history(trial.info.run_id, "val_accuracy")
    assert (trial.data.tags["state"], len(curve)) == (state, n_steps)
    # What it has learned until then is not lost.
    assert "model_uri" in trial.data.tags


STUBBORN = (
    NATIVE,
    "signal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True: pass",
    f"os.fork()\n{NATIVE}",
    f"os.fork() or (os.setsid(), os.fork(), {NATIVE})\n{NATIVE}",
)


def _in_turn(acts: Sequence[str], step: int, turns: Path) -> str:
    """What a toy does: trial n, of one worker, does the nth act (trial 0 none) in a step."""
    turns.mkdir()
    return f"""if step == 1:
            turn = len(os.listdir({str(turns)!r}))
            open(os.path.join({str(turns)!r}, str(turn)), "w").close()
        if step == {step}:
            exec({dict(enumerate(acts, 1))!r}.get(turn, "pass"))"""


def test_a_stubborn_trial_is_stopped_at_its_grant(sweeps: Sweeps, tmp_path: Path) -> None:
    # The first report comes, better than all before, and the second never does.
    better = "\n        quality = 0.3 + turn / 9"
    source = toy(before=_in_turn(STUBBORN, 2, tmp_path / "turns") + better)
    sweeps.run(source.replace('params["steps"]', "2"), n_trials=6, workers=1)
    total = [record["total"] for record in sweeps.ledger() if record["kind"] == "open"][-1]
    bills = [record for record in sweeps.ledger() if record["kind"] == "debit"]
    grants = {r["trial"]: r["cpu_seconds"] for r in sweeps.ledger() if r["kind"] == "grant"}
    for bill in bills:
        # One CPU-second is the grace, and the time between two looks on two cores.
        assert bill["cpu_seconds"] <= grants[bill["trial"]] + 1.5
    assert sweeps.parent.data.metrics["cpu_seconds"] <= total + 2.0
    assert sweeps.tags("state") == ["complete", *len(STUBBORN) * ["over_budget"], "complete"]
    # What was reported before counts: the run has it.
    for trial in sweeps.trials:
        assert "val_accuracy" in trial.data.metrics
        assert trial.info.status == "FINISHED"


GIVEN_UP = "raise OverBudget('the first epoch is too dear')"
# What a trial does; how it ends: its state, its failure, its run's status.
FAILING = (
    ("raise ArithmeticError('no solution')", "failed", "error", "FAILED"),
    ("raise MemoryError('no room')", "failed", "out_of_memory", "FAILED"),
    ("raise FloatingPointError('the loss is nan')", "failed", "nan_loss", "FAILED"),
    ("os.kill(os.getpid(), signal.SIGKILL)", "killed", "killed", "KILLED"),
    (f"{GARBAGE}; time.sleep(9)", "failed", "error", "FAILED"),
    (f"from pipeline.bill import OverBudget; {GIVEN_UP}", "over_budget", None, "FINISHED"),
)


def test_trials_that_fail_do_not_end_the_sweep(sweeps: Sweeps, tmp_path: Path) -> None:
    # One after the other: a good one, then each that fails, then good ones.
    acts = [statement for statement, *_ in FAILING]
    source = toy(before=_in_turn(acts, 1, tmp_path / "turns"))
    sweeps.run(source, n_trials=9, workers=1)
    good, bad = sweeps.trials[:1] + sweeps.trials[7:], sweeps.trials[1:7]
    for run, (statement, state, failure, status) in zip(bad, FAILING, strict=True):
        tags = run.data.tags
        assert (tags["state"], tags.get("failure")) == (state, failure), statement
        assert run.info.status == status, statement
        if failure in ("error", "out_of_memory", "nan_loss") and GARBAGE not in statement:
            assert "traceback.txt" in artifacts(sweeps.store, run.info.run_id)
    assert bad[-1].data.tags["error"] == "the first epoch is too dear"  # its page says it, too
    assert "; the first epoch is too dear" in bad[-1].data.tags["mlflow.note.content"]
    assert len(good) == 3
    assert {run.info.status for run in good} == {"FINISHED"}
    assert sweeps.parent.info.status == "FINISHED"


def test_a_sweep_whose_first_trials_all_fail_stops_with_the_cause(sweeps: Sweeps) -> None:
    with pytest.raises(UserError, match="with 'ArithmeticError: no solution'"):
        sweeps.run(toy(before="raise ArithmeticError('no solution')"))
    assert 3 <= len(sweeps.trials) <= 5
    assert {run.info.status for run in sweeps.trials} <= {"FAILED", "KILLED"}
    assert sweeps.parent.info.status == "FAILED"
    assert sweeps.ledger()[-1]["kind"] == "end"
    # Mended, its study goes on.
    n_failed = len(sweeps.trials)
    study = sweeps.parent.data.tags["study"]
    sweeps.run(toy(), n_trials=n_failed + 1, study=study)
    assert sweeps.parent.info.status == "FINISHED"
    assert sweeps.tags("state")[n_failed:] == ["complete"]


def test_a_sweep_whose_first_trials_are_all_killed_stops_too(sweeps: Sweeps) -> None:
    with pytest.raises(UserError, match="with 'the process ended by signal 9"):
        sweeps.run(toy(before="os.kill(os.getpid(), signal.SIGKILL)"))
    assert 3 <= len(sweeps.trials) <= 5


def test_a_budget_that_pays_for_no_trial_says_how_much_would(sweeps: Sweeps) -> None:
    with pytest.raises(UserError, match="cpu_minutes must pay for start-up.*raise cpu_minutes"):
        sweeps.run(toy(), cpu_seconds=0.1, n_trials=1000)
    assert sweeps.parent.info.status == "FAILED"
    assert sweeps.trials == []


def _most_at_once(sweeps: Sweeps) -> int:
    """How many trials ran side by side at most, as the ledger has it."""
    changes = [{"grant": 1, "debit": -1}.get(record["kind"], 0) for record in sweeps.ledger()]
    return max(itertools.accumulate(changes))


def test_a_named_study_goes_on_with_more_budget_in_a_run_of_its_own(sweeps: Sweeps) -> None:
    sweeps.run(toy(), n_trials=3)
    first = sweeps.parent
    name = first.data.tags["study"]
    sweeps.run(toy(), n_trials=5, study=name)
    second = sweeps.parent
    assert second.info.run_id != first.info.run_id
    assert (second.data.tags["study"], second.data.tags["continues"]) == (name, first.info.run_id)
    # One study and one ledger: both budgets, every trial once, and the bill of both.
    assert [int(run.data.tags["trial"]) for run in sweeps.trials] == [0, 1, 2, 3, 4]
    parents = [run.data.tags["mlflow.parentRunId"] for run in sweeps.trials]
    assert parents == 3 * [first.info.run_id] + 2 * [second.info.run_id]
    totals = [record["total"] for record in sweeps.ledger() if record["kind"] == "open"]
    assert totals[1] > 1.5 * totals[0]
    assert second.data.metrics["n_trials"] == 5
    assert second.data.metrics["cpu_seconds"] > first.data.metrics["cpu_seconds"]
    # The run that was there first stays as it was.
    assert sweeps.store.get_run(first.info.run_id).data.metrics == first.data.metrics
    # A run that a user has deleted is not made anew, as one of a trial that was killed.
    sweeps.store.delete_run(sweeps.trials[2].info.run_id)
    # What is refused adds nothing to the budget: the study has another precision by now.
    with sweeps.patch.context() as patch:
        patch.setattr(search, "check_precision", _refuse)
        with pytest.raises(UserError, match="no"):
            sweeps.run(toy(), n_trials=6, study=name)
    sweeps.run(toy(), n_trials=6, study=name)
    assert [int(run.data.tags["trial"]) for run in sweeps.trials] == [0, 1, 3, 4, 5]
    totals = [record["total"] for record in sweeps.ledger() if record["kind"] == "open"]
    assert totals[3] - totals[1] == pytest.approx(totals[2] - totals[1], rel=0.2)


def _refuse(*given: Any) -> None:
    raise UserError("no")


def test_a_study_that_is_not_of_this_sweep_or_is_being_swept_is_refused(sweeps: Sweeps) -> None:
    sweeps.run(toy(), n_trials=1)
    study = sweeps.parent.data.tags["study"]
    wrong: list[tuple[dict[str, object], str]] = [
        ({"study": "toy-00000000"}, "study must be 'auto' or name a study in .*toy-"),
        ({"model": "knn"}, "a study is of one model on one data set, and .* is of toy"),
        ({"n_train": 500}, "a study is of one model on one data set"),
    ]
    for change, rule in wrong:
        with pytest.raises(UserError, match=rule):
            sweeps.run(toy(), **({"study": study} | change))
    with sweeps.patch.context() as patch:
        patch.setenv("MLFLOW_EXPERIMENT_NAME", "another")
        with pytest.raises(UserError, match="in the experiment where it began, .* and 1 came"):
            sweeps.run(toy(), study=study)
    path = Path(sweeps.options["data_dir"]) / "studies" / study / "ledger.jsonl"
    with (
        closing(Ledger(path, 0.0, "other", "run")),
        pytest.raises(UserError, match="a study has one sweep at a time"),
    ):
        sweeps.run(toy(), study=study)
    assert len(runs(sweeps.store, "sweep")) == 1
    # Nor is it taken for an interrupted one.
    assert sweep.interrupted(sweeps.store, path.parent.parent, "other") is None


def test_a_run_that_a_server_made_twice_is_there_once(
    sweeps: Sweeps, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = mlflow.MlflowClient.create_run

    def twice(client: mlflow.MlflowClient, *given: Any, **named: Any) -> Any:
        real(client, *given, **named)  # the answer was lost, and MLflow asked again
        return real(client, *given, **named)

    with monkeypatch.context() as patch:
        patch.setattr(mlflow.MlflowClient, "create_run", twice)
        sweeps.run(toy(), n_trials=3)
    assert sweeps.tags("trial") == ["0", "1", "2"]
    assert {run.info.status for run in sweeps.trials} == {"FINISHED"}


def test_the_bill_is_on_the_sweep_and_on_every_trial(sweeps: Sweeps) -> None:
    sweeps.run(toy(before=BURN), n_trials=4)
    for run in [sweeps.parent, *sweeps.trials]:
        metrics = run.data.metrics
        causes = [value for name, value in metrics.items() if name.startswith("overhead/")]
        assert metrics["overhead_cpu_seconds"] == pytest.approx(sum(causes), abs=1e-6)
        fit, overhead = metrics["fit_cpu_seconds"], metrics["overhead_cpu_seconds"]
        assert metrics["cpu_seconds"] == pytest.approx(fit + overhead, abs=1e-6)
        assert metrics["overhead/tracking_cpu_seconds"] > 0
    # It is known over time: at the end of each trial, and at the sweep's own end.
    history = sweeps.store.get_metric_history(sweeps.parent.info.run_id, "overhead_cpu_seconds")
    values = [metric.value for metric in sorted(history, key=lambda metric: metric.step)]
    assert len(values) == 5
    assert values == sorted(values)
    for run in sweeps.trials:
        # A trial that burns 0.3 CPU-seconds a step has that as fit.
        n_steps = len(sweeps.store.get_metric_history(run.info.run_id, "val_accuracy"))
        assert run.data.metrics["fit_cpu_seconds"] >= 0.3 * n_steps


def test_work_that_died_unreported_is_called_lost(sweeps: Sweeps) -> None:
    death = "os.kill(os.getpid(), signal.SIGKILL)"
    sweeps.run(toy(before=f"{BURN}\n        if step > 1 and quality != 0.5: {death}"), n_trials=3)
    for run in sweeps.trials:
        if run.data.tags["state"] == "killed":
            assert run.data.metrics["overhead/lost_cpu_seconds"] >= 0.3
    assert "killed" in sweeps.tags("state")


def test_eight_workers_write_to_a_store_that_a_server_reads(
    sweeps: Sweeps, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The MLflow UI is open on the same file meanwhile."""
    seen: list[int] = []
    done = threading.Event()

    def look() -> None:
        reader = mlflow.MlflowClient(server.uri)
        while not done.is_set():
            seen.append(len(reader.search_runs(["0"])))

    with ThreadPoolExecutor() as pool:
        looking = pool.submit(look)
        try:
            sweeps.run(toy(before="time.sleep(0.3)"), n_trials=16, workers=8)
        finally:
            done.set()
        looking.result()
    assert _most_at_once(sweeps) == 8
    assert [int(run.data.tags["trial"]) for run in sweeps.trials] == list(range(16))
    assert {run.info.status for run in sweeps.trials} == {"FINISHED"}
    assert seen[-1] > seen[0]


def test_a_server_that_goes_away_loses_nothing(
    sweeps: Sweeps, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)

    def interrupt() -> None:
        assert wait(lambda: len(runs(sweeps.store, "trial")) >= 3, 60)
        server.kill()
        time.sleep(6)
        server.start()

    with ThreadPoolExecutor() as pool:
        interrupted = pool.submit(interrupt)
        sweeps.run(toy(before="time.sleep(0.3)"), n_trials=8)
        interrupted.result()
    assert sweeps.parent.info.status == "FINISHED"
    assert [int(run.data.tags["trial"]) for run in sweeps.trials] == list(range(8))
    for run in sweeps.trials:
        assert run.info.status == "FINISHED"
        assert {"quality", "steps"} <= set(run.data.params)
        # Every step that the trial reported is there, and its model answers.
        history = sweeps.store.get_metric_history(run.info.run_id, "val_accuracy")
        assert [metric.step for metric in history] == list(range(1, len(history) + 1))
        assert mlflow.pyfunc.load_model(run.data.tags["model_uri"]) is not None


@pytest.mark.parametrize(
    ("wrong", "rule"),
    [
        ({"cpu_minutes": "abc"}, "cpu_minutes must be a number above 0, but 'abc' came"),
        ({"cpu_minutes": "0"}, "cpu_minutes must be a number above 0, but '0' came"),
        ({"cpu_minutes": "-3"}, "cpu_minutes must be a number above 0, but '-3' came"),
        ({"workers": "0"}, "workers must be 'auto' or a whole number above 0, but '0' came"),
        ({"model": "svm"}, "model must be one of cnn, knn, lstm, but 'svm' came"),
        ({"precision": "fp16"}, "precision must be auto, float32 or bfloat16, but 'fp16' came"),
        ({"plan": "yes"}, "plan must be true or false, but 'yes' came"),
        ({"study": "''"}, "study must not be empty"),
        ({"n_train": "1e4"}, "n_train must be 'all' or a whole number"),
        ({"epochs": "3"}, "sweep knows the parameters .*, but 'epochs' came"),
    ],
)
def test_bad_parameters_cost_no_run(
    wrong: dict[str, str], rule: str, store: mlflow.MlflowClient, data_options: dict[str, Any]
) -> None:
    options = SWEEP | {"model": "knn"} | wrong
    with pytest.raises(UserError, match=rule):
        sweep.main(arguments(data_options | options))
    assert store.search_runs(["0"]) == []


def test_a_database_that_is_none_costs_no_run_and_no_letters(
    store: mlflow.MlflowClient,
    data_options: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OPTUNA_STORAGE", "postgresql+psycopg2://u:x@127.0.0.1:1/studies")
    options = data_options | SWEEP | {"model": "knn", "data_dir": str(tmp_path / "new")}
    with pytest.raises(UserError, match="OPTUNA_STORAGE must name a database that answers"):
        sweep.main(arguments(options))
    assert store.search_runs(["0"]) == []
    assert not (tmp_path / "new").exists()


def test_the_kernel_agrees_on_the_budget_and_knn_needs_no_tensorflow(
    store: mlflow.MlflowClient, data_options: dict[str, Any], tmp_path: Path
) -> None:
    """A sweep as a user types it: all of its processes, from the first line to the last."""
    trap, trace = tmp_path / "trap", tmp_path / "imported"
    trap.mkdir()
    # Found before the real ones: an import would leave a trace, and fail.
    for name in ("tensorflow", "keras"):
        (trap / f"{name}.py").write_text(f"open({str(trace)!r}, 'w')\nraise ImportError")
    options = data_options | SWEEP | {"model": "knn", "cpu_minutes": 0.4}
    process = subprocess.Popen(
        [sys.executable, "-m", "sweeps.sweep", *arguments(options)],
        cwd=Path(__file__).parents[2],
        env=os.environ | {"PYTHONPATH": str(trap)},
        stdout=subprocess.DEVNULL,
    )
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    assert not trace.exists()
    spent = usage.ru_utime + usage.ru_stime
    assert spent <= 24.0 + 2.0
    (run,) = runs(store, "sweep")
    # What comes after the last metric is the end of the interpreter.
    assert run.data.metrics["cpu_seconds"] == pytest.approx(spent, abs=2.0)


ENDED: dict[str, Any] = {"trial": engine.PROBE, "signal": 0, "over_budget": False}


@pytest.mark.parametrize(
    ("event", "why"),
    [
        (ENDED | {"end": {"gain": 1.5}}, None),
        (ENDED | {"end": {"failure": "error", "error": "ImportError: no"}}, "ImportError: no"),
        (ENDED | {"end": {"over_budget": True}, "over_budget": True}, "more than its 5 CPU-s"),
        (ENDED | {"end": None, "signal": 11}, "ended by signal 11"),
    ],
)
def test_a_probe_of_bfloat16_that_comes_to_nothing_is_told(
    event: dict[str, Any], why: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    said: dict[str, Any] = {}
    driver: Any = SimpleNamespace(
        nursery=SimpleNamespace(start=lambda *given: None, events=lambda timeout: [event]),
        run=SimpleNamespace(tags=said.update, metrics=lambda values, step: said.update(values)),
        task=SimpleNamespace(model="cnn"),
    )
    gain = engine.Engine._probe(driver)
    output = capsys.readouterr()
    if why is None:
        assert (gain, said) == (1.5, {"bfloat16_gain": 1.5})
        assert not output.out
    else:
        # Law: what was not measured is no figure, and why is on the page and in the terminal.
        assert gain == 0.0
        assert why in said["bfloat16_probe"]
        assert set(said) == {"bfloat16_probe"}
        assert why in output.out
        assert "-P precision=bfloat16" in output.out


class Told:
    """A nursery of two trials, one of which has ended: what it says when it is read, and spends."""

    def __init__(self, dies: bool = False) -> None:
        self.live, self.dies = {0: 40.0, 1: 20.0}, dies

    def events(self, timeout: float) -> Iterator[dict[str, Any]]:
        yield {"trial": 1, "message": {"step": 1}}
        del self.live[0]
        yield {"trial": 0, "end": None}
        if self.dies:
            raise ConnectionError("the nursery died")


def test_a_trial_that_has_ended_counts_once_while_its_end_is_read() -> None:
    driver: Any = SimpleNamespace(
        nursery=Told(), ledger=SimpleNamespace(total=100.0, granted={0: 45.0, 1: 50.0})
    )
    # The kernel's account: trial 0's 40 CPU-seconds are the nursery's by now.
    driver.spent = lambda: 40.0 + sum(driver.nursery.live.values())
    left = []
    for _ in engine.Engine._events(driver):
        left.append(engine.Engine.left(driver))
    # Law: with each event the budget has what neither is spent nor granted to one that runs.
    assert left == [100 - RESERVE_CPU_SECONDS - 40 - 50] * 2


def test_what_a_nursery_had_told_before_it_died_is_heeded() -> None:
    driver: Any = SimpleNamespace(nursery=Told(dies=True))
    events = engine.Engine._events(driver)
    assert [next(events)["trial"], next(events)["trial"]] == [1, 0]
    with pytest.raises(ConnectionError, match="died"):
        next(events)
