"""kill -9 at random moments, and the same command again: nothing is lost, nothing done twice."""

import json
import os
import random
import signal
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import mlflow
import optuna
import pytest
from drivers import Driver
from optuna.trial import TrialState
from steps import SWEEP, alive, arguments, runs, toy, wait

from benchmarks import services
from pipeline import models
from sweeps import processes, storage
from sweeps.budget import GRANT_SHARE, UNSEEN_CPU_SECONDS, Ledger
from sweeps.trial import STATUS

# A step is long enough to be killed in, and costs little.
STEP_TAKES = """time.sleep(0.15)
        end = time.process_time() + 0.03
        while time.process_time() < end: pass"""
CPU_SECONDS = 600  # ample on any machine: the number of trials is what ends these sweeps


class Typist:
    """Someone who types one and the same command again and again."""

    def __init__(self, store: mlflow.MlflowClient, options: dict[str, Any]) -> None:
        self.store, self.folder, self.options = store, Path(options["data_dir"]), options
        sweep = SWEEP | {"model": "toy", "cpu_minutes": CPU_SECONDS / 60}
        self.command = arguments(self.options | sweep)

    def type(self, n_trials: int = 8, die_after: str = "") -> Driver:
        wanted = {"N_TRIALS": str(n_trials), "DIE_AFTER": die_after}
        return Driver(self.command, os.environ | wanted, Path.cwd())

    def wait_for_trials(self, driver: Driver, n_more: int) -> None:
        """Until the ledger has that many more grants; then trials are under way."""
        wanted = len(self.records("grant")) + n_more
        deadline = time.monotonic() + 60
        while len(self.records("grant")) < wanted and driver.returncode is None:
            assert time.monotonic() < deadline
            time.sleep(0.02)

    def study(self, name: str) -> optuna.Study:
        kept = storage.open_storage(name, self.folder / "studies" / name)
        return optuna.load_study(study_name=name, storage=kept)

    def ledger(self, name: str) -> Ledger:
        """The ledger as a next driver would find it."""
        path = self.folder / "studies" / name / "ledger.jsonl"
        with closing(Ledger(path, 0.0, "", "")) as ledger:
            return ledger

    def records(self, kind: str) -> list[dict[str, Any]]:
        found = [path.read_text() for path in self.folder.glob("studies/*/ledger.jsonl")]
        lines = [line for text in found for line in text.splitlines() if line.endswith("}")]
        return [record for record in map(json.loads, lines) if record["kind"] == kind]


@pytest.fixture
def typist(store: mlflow.MlflowClient, data_options: dict[str, Any], add_member: Any) -> Typist:
    add_member(models, "toy", toy(before=STEP_TAKES))
    return Typist(store, data_options)


def _check_the_end(typist: Typist) -> None:
    """Ledger, study and MLflow agree; the budget held over all drivers; no run is left."""
    assert typist.store.search_runs(["0"], "attributes.status = 'RUNNING'") == []
    # A driver that was killed before it had opened its ledger has left a run, and nothing else.
    (parent,) = [run for run in runs(typist.store, "sweep") if run.info.status == "FINISHED"]
    trials = runs(typist.store, "trial")
    assert {trial.data.tags["mlflow.parentRunId"] for trial in trials} == {parent.info.run_id}
    # Every trial of the study has one run and, but for those that had no time to begin, one grant.
    study = typist.study(parent.data.tags["study"])
    numbers = [int(trial.data.tags["trial"]) for trial in trials]
    assert sorted(numbers) == [trial.number for trial in study.trials]
    assert TrialState.RUNNING not in [trial.state for trial in study.trials]
    grants, debits = (
        [record["trial"] for record in typist.records(kind)] for kind in ("grant", "debit")
    )
    assert len(set(grants)) == len(grants)
    assert len(set(debits)) == len(debits)
    assert set(debits) <= set(grants) <= set(numbers)
    # What was not billed has no other end than KILLED.
    ended = {int(t.data.tags["trial"]) for t in trials if t.info.status != "KILLED"}
    assert ended <= set(debits)
    # A driver may die when it has booked a bill, and before it has noted what the trial found.
    assert len(ended) <= parent.data.metrics["n_trials"] <= len(debits)
    for trial in trials:
        if trial.info.status == "FINISHED":
            reports = study.trials[int(trial.data.tags["trial"])].intermediate_values
            assert trial.data.metrics["val_accuracy"] == reports[max(reports)]
            assert trial.data.metrics["cpu_seconds"] > 0
    # However its driver died, a trial's run says how it ended.
    for trial in trials:
        outcome = study.trials[int(trial.data.tags["trial"])].user_attrs.get("outcome")
        if outcome:
            assert trial.info.status == STATUS[outcome["state"]]
            assert trial.data.tags["state"] == outcome["state"]
    # Params are those that the study has. No trial was proposed a second time.
    for trial in trials:
        assert trial.data.tags["state"] in STATUS
        proposed = study.trials[int(trial.data.tags["trial"])].params
        # A kill may come before a run has its params, or the study's trial its own.
        quality = str(proposed.get("quality"))
        assert trial.data.params.get("quality", quality) == quality
    # What died with its nursery is tried once more.
    fresh = [t.params for t in study.trials if t.params and "retry_of" not in t.user_attrs]
    assert len({tuple(params.items()) for params in fresh}) == len(fresh)
    notes = [t.user_attrs for t in study.trials if "phase" in t.user_attrs]  # else it is none yet
    again = [note["retry_of"] for note in notes if "retry_of" in note]
    assert len(set(again)) == len(again)
    assert all(study.trials[number].state == TrialState.FAIL for number in again)
    # The bill is that of the ledger: all drivers together, by cause.
    metrics, ledger = parent.data.metrics, typist.ledger(parent.data.tags["study"])
    causes = [value for name, value in metrics.items() if name.startswith("overhead/")]
    assert metrics["cpu_seconds"] == pytest.approx(metrics["fit_cpu_seconds"] + sum(causes))
    assert metrics["cpu_seconds"] <= sum(ledger.past.values()) <= CPU_SECONDS + 2.4
    assert ledger.total == CPU_SECONDS


@pytest.mark.timeout(900)  # 21 sweeps have to load
def test_a_sweep_killed_twenty_times_is_continued(typist: Typist) -> None:
    rng = random.Random(0)
    loading = 0.0  # seconds to the first trial; several times as many on a busy machine
    for number in range(20):
        began, driver = time.monotonic(), typist.type(n_trials=1000)
        if number > 1:
            # At any moment: before there is a run, while its nursery loads, between two writes, in
            # a fit.
            time.sleep(rng.uniform(0.05, 2.0) * loading)
        else:  # the first one may have to wait for what all are forked from
            typist.wait_for_trials(driver, n_more=1)
            loading = time.monotonic() - began
        family = processes.tree(driver.pid)
        driver.kill()
        driver.communicate(timeout=30)
        # Orphans die within seconds.
        assert wait(lambda family=family: not any(map(alive, family)), 5)
    driver = typist.type(n_trials=len(typist.records("grant")) + 12)
    out = driver.communicate(timeout=300)
    assert driver.returncode == 0, out.decode()
    assert b"continuing the sweep that was interrupted" in out
    _check_the_end(typist)


MOMENTS = (
    "sweeps.budget:Ledger.grant",
    "pipeline.tracking:create",
    "sweeps.nursery:Nursery.start",
    "sweeps.budget:Ledger.debit",
    "optuna:Trial.set_user_attr",
    "sweeps.search:tell",
    "pipeline.tracking:Run.name",
    "sweeps.sweep:finish",
)


@pytest.mark.timeout(600)  # nine sweeps have to load
def test_a_driver_that_dies_between_two_notes_is_continued(typist: Typist) -> None:
    """One sweep, whose drivers die each at another moment; the next one mends what it left."""
    left: set[str] = set()
    for number, moment in enumerate(MOMENTS):
        n_more = 2 if moment == MOMENTS[-1] else 1000  # it dies in its third trial, or at the end
        driver = typist.type(len(typist.records("grant")) + n_more, die_after=moment)
        out = driver.communicate(timeout=120)
        assert driver.returncode == -signal.SIGKILL, f"{moment}: {out.decode()}"
        assert (b"continuing the sweep that was interrupted" in out) == (number > 0), moment
        # The driver before this one has left runs RUNNING: none of them is it still.
        running = typist.store.search_runs(["0"], "attributes.status = 'RUNNING'")
        trials = {run.info.run_id for run in running if run.data.tags["step"] == "trial"}
        assert not left & trials, moment
        left = trials
    driver = typist.type(n_trials=0)
    out = driver.communicate(timeout=120)
    assert driver.returncode == 0, out.decode()
    assert b"continuing the sweep that was interrupted" in out
    _check_the_end(typist)
    # Law: a driver that dies loses no more of a grant than its trial may have spent since the last
    # note; but for the one that dies with a grant on disk and no note yet, which counts in full.
    (study,) = (typist.folder / "studies").iterdir()
    ledger = typist.ledger(study.name)
    n_grants = len(typist.records("grant"))
    assert ledger.past["lost"] <= GRANT_SHARE * CPU_SECONDS + UNSEEN_CPU_SECONDS * n_grants


def test_a_power_cut_tears_the_last_lines_only(typist: Typist) -> None:
    driver = typist.type(n_trials=1000)
    typist.wait_for_trials(driver, 4)
    driver.kill()
    driver.communicate(timeout=30)
    (study,) = (typist.folder / "studies").iterdir()
    # What had not reached the disk is half there; grants and debits had.
    for name, torn in (("ledger.jsonl", '{"kind": "beat", "ow'), ("optuna.journal", '{"op_co')):
        with (study / name).open("a") as file:
            file.write(torn)
    out = typist.type().communicate(timeout=120)
    assert b"continuing the sweep that was interrupted" in out
    _check_the_end(typist)


def test_a_killed_sweep_whose_study_is_in_postgresql_is_continued(
    typist: Typist, postgres: services.Postgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    postgres.create("crash")
    monkeypatch.setenv("OPTUNA_STORAGE", postgres.url("crash"))
    driver = typist.type(n_trials=1000)
    typist.wait_for_trials(driver, 4)
    driver.kill()
    out = driver.communicate(timeout=30)
    assert postgres.password.encode() not in out
    # The database restarts between the drivers, and loses nothing.
    postgres.kill()
    postgres.start()
    out = typist.type(n_trials=9).communicate(timeout=120)
    assert b"continuing the sweep that was interrupted" in out, out.decode()
    assert postgres.password.encode() not in out
    _check_the_end(typist)
    assert not list(typist.folder.glob("studies/*/optuna.journal"))


@pytest.mark.parametrize("victim", ["nursery", "trial"])
def test_a_killed_nursery_or_trial_costs_its_trials_only(victim: str, typist: Typist) -> None:
    driver = typist.type()
    typist.wait_for_trials(driver, 3)
    (nursery,) = processes.children(driver.pid)
    # One that has just begun: one that is there may have told its end, and is killed in vain.
    before, begun = set(processes.children(nursery)), set[int]()

    def begins() -> bool:
        begun.update(set(processes.children(nursery)) - before)
        return bool(begun)

    assert wait(begins, 10)
    os.kill(nursery if victim == "nursery" else begun.pop(), signal.SIGKILL)
    out = driver.communicate(timeout=300)
    assert driver.returncode == 0, out.decode()
    assert "killed" in [trial.data.tags["state"] for trial in runs(typist.store, "trial")]
    _check_the_end(typist)


def test_a_sweep_that_was_interrupted_in_its_first_trials_is_continued(
    typist: Typist, add_member: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_member(models, "toy", toy(before='time.sleep(float(os.environ["STEP_TAKES"]))'))
    typist.command += ["--workers", "3"]
    monkeypatch.setenv("STEP_TAKES", "60")  # none ends before the interrupt
    driver = typist.type()
    typist.wait_for_trials(driver, 3)
    driver.send_signal(signal.SIGINT)
    driver.communicate(timeout=30)
    # That all of the first three were killed with their driver is no cause to stop.
    killed = [one for one in runs(typist.store, "trial") if one.data.tags["state"] == "killed"]
    assert len(killed) == 3
    monkeypatch.setenv("STEP_TAKES", "0")
    out = typist.type().communicate(timeout=120)
    assert b"continuing the sweep that was interrupted" in out
    _check_the_end(typist)
    # Nor are they lost, the deck's model first of all.
    tags = [trial.data.tags for trial in runs(typist.store, "trial")]
    again = {int(one["retry_of"]): one["state"] for one in tags if "retry_of" in one}
    assert set(again) == {0, 1, 2}
    assert again[0] == "complete"


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGINT])
def test_an_interrupted_sweep_is_killed_and_continued(stop: signal.Signals, typist: Typist) -> None:
    driver = typist.type()
    typist.wait_for_trials(driver, 2)
    family = processes.tree(driver.pid)
    driver.send_signal(stop)
    out = driver.communicate(timeout=30)
    assert driver.returncode == 130, out.decode()
    assert wait(lambda: not any(map(alive, family)), 5)
    # Everything is closed at once: no later process is needed for that.
    assert [run.info.status for run in runs(typist.store, "sweep")] == ["KILLED"]
    assert typist.store.search_runs(["0"], "attributes.status = 'RUNNING'") == []
    out = typist.type().communicate(timeout=120)
    assert b"continuing the sweep that was interrupted" in out
    _check_the_end(typist)


def test_a_sweep_that_died_before_its_first_tags_has_them_when_it_goes_on(typist: Typist) -> None:
    driver = typist.type(n_trials=1000)
    typist.wait_for_trials(driver, 1)
    driver.kill()
    driver.communicate(timeout=30)
    (run,) = runs(typist.store, "sweep")
    named = ("model", "study", "dataset_digest")
    for name in named:
        typist.store.delete_tag(run.info.run_id, name)
    out = typist.type(n_trials=3).communicate(timeout=120)
    assert b"continuing the sweep that was interrupted" in out
    (again,) = runs(typist.store, "sweep")
    assert {name: again.data.tags[name] for name in named} == {
        name: run.data.tags[name] for name in named
    }
    assert len(again.inputs.dataset_inputs) == 1


def test_an_interrupted_sweep_whose_run_is_deleted_is_not_continued(typist: Typist) -> None:
    driver = typist.type(n_trials=1000)
    typist.wait_for_trials(driver, 1)
    driver.kill()
    driver.communicate(timeout=30)
    (deleted,) = runs(typist.store, "sweep")
    typist.store.delete_run(deleted.info.run_id)
    driver = typist.type(n_trials=3)
    out = driver.communicate(timeout=120)
    assert driver.returncode == 0, out.decode()
    assert b"continuing" not in out
    (run,) = runs(typist.store, "sweep")
    assert run.data.tags["study"] != deleted.data.tags["study"]


def test_two_sweeps_at_once_on_a_fresh_store_are_two(
    typist: Typist, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither stumbles over the letters or the study of the other."""
    uri = f"sqlite:///{tmp_path}/fresh.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    for driver in [typist.type(n_trials=4), typist.type(n_trials=4)]:
        out = driver.communicate(timeout=300)
        assert driver.returncode == 0, out.decode()
        assert b"continuing" not in out
    store = mlflow.MlflowClient(uri)
    parents, trials = runs(store, "sweep"), runs(store, "trial")
    assert [parent.data.metrics["n_trials"] for parent in parents] == [4.0, 4.0]
    assert {run.info.status for run in [*parents, *trials]} == {"FINISHED"}
    for parent in parents:
        mine = [t for t in trials if t.data.tags["mlflow.parentRunId"] == parent.info.run_id]
        assert sorted(int(trial.data.tags["trial"]) for trial in mine) == [0, 1, 2, 3]


def test_a_finished_sweep_typed_again_is_a_new_one(typist: Typist) -> None:
    for _ in range(2):
        driver = typist.type(n_trials=2)
        out = driver.communicate(timeout=300)
        assert driver.returncode == 0, out.decode()
    first, second = runs(typist.store, "sweep")
    assert first.data.tags["study"] != second.data.tags["study"]
