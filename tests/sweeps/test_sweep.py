import json
from pathlib import Path
from typing import Any

import mlflow
import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from steps import arguments, artifacts, runs, toy

from pipeline import models
from pipeline.spec import UserError
from sweeps import engine, sweep
from sweeps.budget import Ledger, own_cpu_seconds

FIGURES = {"optimisation_history.png", "parallel_coordinates.png", "hyperparameter_importance.png"}
GARBAGE = "[os.write(fd, b'garbage' * 9) for fd in range(3, 40) if socket(fd)]"
GRANT = 5.0  # CPU-seconds of each trial
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
        self, source: str, cpu_seconds: float = 90.0, n_trials: int = 8, **more: object
    ) -> None:
        """A budget that is ample on any machine, and a bound on the trials to end soon."""
        self.add(models, "toy", source)
        minutes = (own_cpu_seconds() + cpu_seconds) / 60
        self.patch.setattr(engine.Engine, "left", self.patched(engine.Engine.left, n_trials))
        self.patch.setattr(engine, "GRANT_SHARE", GRANT / (60 * minutes))
        options = {"model": "toy", "seed": 0, "cpu_minutes": minutes, "workers": 2}
        sweep.main(arguments(self.options | options | more))

    @staticmethod
    def patched(real: Any, n_trials: int) -> Any:
        return lambda self: (
            real(self) if len(self.study.get_trials(deepcopy=False)) < n_trials else 0.0
        )

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
) -> Sweeps:
    return Sweeps(store, data_options, add_member, monkeypatch)


def test_every_trial_is_a_child_run_and_the_sweep_shows_the_best(sweeps: Sweeps) -> None:
    sweeps.run(toy(), n_trials=12)
    parent, trials = sweeps.parent, sweeps.trials
    assert len(trials) == 12
    for trial in trials:
        # A child run has params, the accuracy by step, a bill, a model and how it ended.
        assert trial.data.tags["mlflow.parentRunId"] == parent.info.run_id
        assert trial.info.status == "FINISHED"
        assert trial.data.tags["state"] in ("complete", "pruned", "over_budget")
        assert {"quality", "steps", "seed"} <= set(trial.data.params)
        assert {"val_accuracy", "cpu_seconds", "fit_cpu_seconds"} <= set(trial.data.metrics)
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
    assert artifacts(sweeps.store, parent.info.run_id) == FIGURES | {"trials.csv"}
    # Ledger, study and MLflow agree on how many trials there were.
    folder = Path(sweeps.options["data_dir"]) / "studies" / parent.data.tags["study"]
    journal = JournalStorage(JournalFileBackend(str(folder / "optuna.journal")))
    assert journal.get_n_trials(0) == len(trials)
    kinds = [record["kind"] for record in sweeps.ledger()]
    assert kinds.count("grant") == kinds.count("debit") == len(trials)


def test_the_budget_holds(sweeps: Sweeps) -> None:
    sweeps.run(toy(before=BURN), 24.0, n_trials=1000)
    total = [record["total"] for record in sweeps.ledger() if record["kind"] == "open"][-1]
    spent = sweeps.parent.data.metrics["cpu_seconds"]
    assert spent <= total + max(0.01 * total, 2.0)


@pytest.mark.parametrize(
    "stubborn",
    [
        NATIVE,
        "signal.signal(signal.SIGXCPU, signal.SIG_IGN)\n        while True: pass",
        f"os.fork()\n        {NATIVE}",
        f"os.fork() or (os.setsid(), os.fork(), {NATIVE})\n        {NATIVE}",
    ],
    ids=["native loop", "ignores SIGXCPU", "forks", "forks away"],
)
def test_a_stubborn_trial_is_stopped_at_its_grant(stubborn: str, sweeps: Sweeps) -> None:
    # The first report comes, the second never does.
    sweeps.run(_from_step_2(stubborn))
    total = [record["total"] for record in sweeps.ledger() if record["kind"] == "open"][-1]
    bills = [record for record in sweeps.ledger() if record["kind"] == "debit"]
    grants = {r["trial"]: r["cpu_seconds"] for r in sweeps.ledger() if r["kind"] == "grant"}
    for bill in bills:
        # One CPU-second is the grace, and the time between two looks on two cores.
        assert bill["cpu_seconds"] <= grants[bill["trial"]] + 1.5
    assert sweeps.parent.data.metrics["cpu_seconds"] <= total + 2.0
    assert "over_budget" in sweeps.tags("state")
    # What was reported before counts: the run has it.
    for trial in sweeps.trials:
        assert "val_accuracy" in trial.data.metrics
        assert trial.info.status == "FINISHED"


def _from_step_2(statement: str) -> str:
    """A toy of one step where ``quality`` is below 0.6, and else stubborn from its second on."""
    indented = statement.replace("\n        ", "\n            ")
    return (
        toy(before=f"if step > 1:\n            {indented}")
        .replace('params["steps"] + 1', "(3 if quality > 0.6 else 2)")
        .replace('n_steps=params["steps"]', "n_steps=1")
    )


@pytest.mark.parametrize(
    ("statement", "state", "failure", "status"),
    [
        ("raise ArithmeticError('no solution')", "failed", "error", "FAILED"),
        ("raise MemoryError('no room')", "failed", "out_of_memory", "FAILED"),
        ("raise FloatingPointError('the loss is nan')", "failed", "nan_loss", "FAILED"),
        ("os.kill(os.getpid(), signal.SIGKILL)", "killed", "killed", "KILLED"),
        (f"{GARBAGE}; time.sleep(9)", "failed", "error", "FAILED"),
    ],
    ids=["raises", "allocates", "nan", "kills itself", "garbage"],
)
def test_one_trial_that_fails_does_not_end_the_sweep(
    statement: str, state: str, failure: str, status: str, sweeps: Sweeps
) -> None:
    sweeps.run(toy(before=f"if quality < 0.49: {statement}"))
    trials = sweeps.trials
    bad = [run for run in trials if float(run.data.params["quality"]) < 0.49]
    good = [run for run in trials if float(run.data.params["quality"]) >= 0.49]
    assert bad
    assert good
    for run in bad:
        assert (run.data.tags["state"], run.data.tags["failure"]) == (state, failure)
        assert run.info.status == status
        if failure in ("error", "out_of_memory", "nan_loss") and GARBAGE not in statement:
            assert "traceback.txt" in artifacts(sweeps.store, run.info.run_id)
    assert {run.info.status for run in good} == {"FINISHED"}
    assert sweeps.parent.info.status == "FINISHED"


def test_a_sweep_whose_first_trials_all_fail_stops_with_the_cause(sweeps: Sweeps) -> None:
    with pytest.raises(UserError, match="with 'ArithmeticError: no solution'"):
        sweeps.run(toy(before="raise ArithmeticError('no solution')"))
    assert 3 <= len(sweeps.trials) <= 5
    assert {run.info.status for run in sweeps.trials} <= {"FAILED", "KILLED"}
    assert sweeps.parent.info.status == "FAILED"
    assert sweeps.parent.data.tags["ended"] == "true"


def test_a_budget_that_pays_for_no_trial_says_how_much_would(sweeps: Sweeps) -> None:
    with pytest.raises(UserError, match="cpu_minutes must pay for start-up.*raise cpu_minutes"):
        sweeps.run(toy(), cpu_seconds=0.1, n_trials=1000)
    assert sweeps.parent.info.status == "FAILED"
    assert sweeps.trials == []


def test_trials_run_side_by_side_and_one_at_a_time_if_asked(sweeps: Sweeps) -> None:
    sweeps.run(toy(before="time.sleep(0.05)"), n_trials=4, workers=1)
    open_grants = most = 0
    for record in sweeps.ledger():
        open_grants += {"grant": 1, "debit": -1}.get(record["kind"], 0)
        most = max(most, open_grants)
    assert most == 1


def test_a_ledger_that_is_held_is_not_continued(sweeps: Sweeps, monkeypatch: Any) -> None:
    sweeps.run(toy(), n_trials=2)
    first = sweeps.parent
    sweeps.store.set_tag(first.info.run_id, "ended", "false")
    folder = Path(sweeps.options["data_dir"]) / "studies" / first.data.tags["study"]
    key, data_dir = first.data.tags["sweep_key"], str(sweeps.options["data_dir"])
    held = Ledger(folder / "ledger.jsonl", 0.0)
    assert sweep.unfinished(sweeps.store, key, data_dir) is None
    held.close()
    found = sweep.unfinished(sweeps.store, key, data_dir)
    assert found is not None
    assert found.info.run_id == first.info.run_id


@pytest.mark.parametrize(
    ("wrong", "rule"),
    [
        ({"cpu_minutes": "abc"}, "cpu_minutes must be a number, but 'abc' came"),
        ({"cpu_minutes": "0"}, "cpu_minutes must be a number above 0, but '0' came"),
        ({"cpu_minutes": "-3"}, "cpu_minutes must be a number above 0, but '-3' came"),
        ({"workers": "0"}, "workers must be 'auto' or a whole number above 0, but '0' came"),
        ({"model": "svm"}, "model must be one of cnn, knn, lstm, but 'svm' came"),
        ({"n_train": "1e4"}, "n_train must be 'all' or a whole number"),
        ({"epochs": "3"}, "sweep knows the parameters .*, but 'epochs' came"),
    ],
)
def test_bad_parameters_cost_no_run(
    wrong: dict[str, str], rule: str, store: mlflow.MlflowClient, data_options: dict[str, Any]
) -> None:
    options = {"model": "knn", "seed": 0, "cpu_minutes": 1, "workers": "auto"} | wrong
    with pytest.raises(UserError, match=rule):
        sweep.main(arguments(data_options | options))
    assert store.search_runs(["0"]) == []
