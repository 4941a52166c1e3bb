"""kill -9 at random moments, and the same command again: nothing is lost, nothing done twice."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import mlflow
import pytest
from steps import alive, arguments, runs, toy, wait

from pipeline import models
from sweeps import processes

BURN = """end = time.process_time() + 0.2
        while time.process_time() < end: pass"""
CPU_SECONDS = 240  # ample on any machine: the number of trials is what ends these sweeps
# The step sweep in a process that knows the toy model.
STEP = """
import toys
from pipeline import cli
from sweeps import sweep
toys.stop_after(12)
cli.run(sweep.main)
"""


class Typist:
    """Someone who types one and the same command again and again."""

    def __init__(self, store: mlflow.MlflowClient, options: dict[str, Any]) -> None:
        self.store, self.folder, self.options = store, Path(options["data_dir"]), options
        sweep = {"model": "toy", "seed": 0, "cpu_minutes": CPU_SECONDS / 60, "workers": 2}
        self.command = [sys.executable, "-c", STEP, *arguments(self.options | sweep)]

    def type(self) -> subprocess.Popen[bytes]:
        return subprocess.Popen(self.command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)

    def wait_for_trials(self, driver: subprocess.Popen[bytes], n_more: int) -> None:
        """Until the ledger has that many more grants; then trials are under way."""
        wanted = len(self.records("grant")) + n_more
        deadline = time.monotonic() + 60
        while len(self.records("grant")) < wanted and driver.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.02)

    def records(self, kind: str) -> list[dict[str, Any]]:
        found = [path.read_text() for path in self.folder.glob("studies/*/ledger.jsonl")]
        lines = [json.loads(line) for text in found for line in text.splitlines() if line]
        return [record for record in lines if record["kind"] == kind]


@pytest.fixture
def typist(store: mlflow.MlflowClient, data_options: dict[str, Any], add_member: Any) -> Typist:
    add_member(models, "toy", toy(before=BURN))
    return Typist(store, data_options)


def _check_the_end(typist: Typist) -> None:
    """Ledger, study and MLflow agree; the budget held over all drivers; no run is left."""
    (parent,) = runs(typist.store, "sweep")
    trials = runs(typist.store, "trial")
    numbers = [int(trial.data.tags["trial"]) for trial in trials]
    assert parent.info.status == "FINISHED"
    assert len(set(numbers)) == len(numbers)
    assert {trial.data.tags["mlflow.parentRunId"] for trial in trials} == {parent.info.run_id}
    assert typist.store.search_runs(["0"], "attributes.status = 'RUNNING'") == []
    # Every trial had a grant of its own, and what was not billed has no other end than KILLED.
    grants, debits = (
        [record["trial"] for record in typist.records(kind)] for kind in ("grant", "debit")
    )
    assert len(set(grants)) == len(grants)
    assert set(numbers) <= set(grants)
    ended = {int(t.data.tags["trial"]) for t in trials if t.info.status != "KILLED"}
    assert ended <= set(debits)
    assert parent.data.metrics["n_trials"] == len(debits)
    # No trial was proposed a second time. (A kill may come before a run has its params.)
    params = [tuple(sorted(t.data.params.items())) for t in trials if "quality" in t.data.params]
    assert len(set(params)) == len(params)
    assert parent.data.metrics["cpu_seconds"] <= CPU_SECONDS + 2.0


@pytest.mark.parametrize("seed", range(2))
def test_a_killed_driver_is_continued(seed: int, typist: Typist) -> None:
    rng = random.Random(seed)
    for _ in range(2):
        driver = typist.type()
        typist.wait_for_trials(driver, rng.randint(1, 4))
        time.sleep(rng.uniform(0, 0.8))
        family = processes.tree(driver.pid)
        driver.kill()
        driver.communicate(timeout=30)
        # Orphans die within seconds.
        assert wait(lambda family=family: not any(map(alive, family)), 5)
    driver = typist.type()
    out, _ = driver.communicate(timeout=120)
    assert driver.returncode == 0, out.decode()
    assert b"continuing the sweep that was interrupted" in out
    _check_the_end(typist)


@pytest.mark.parametrize("victim", ["nursery", "trial"])
def test_a_killed_nursery_or_trial_costs_its_trials_only(victim: str, typist: Typist) -> None:
    driver = typist.type()
    typist.wait_for_trials(driver, 3)
    (nursery,) = processes.children(driver.pid)
    wait(lambda: bool(processes.children(nursery)), 10)
    victims = [nursery] if victim == "nursery" else processes.children(nursery)[:1]
    os.kill(victims[0], signal.SIGKILL)
    out, _ = driver.communicate(timeout=120)
    assert driver.returncode == 0, out.decode()
    assert "killed" in [trial.data.tags["state"] for trial in runs(typist.store, "trial")]
    _check_the_end(typist)


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGINT])
def test_an_interrupted_sweep_is_killed_and_continued(stop: signal.Signals, typist: Typist) -> None:
    driver = typist.type()
    typist.wait_for_trials(driver, 2)
    family = processes.tree(driver.pid)
    driver.send_signal(stop)
    out, _ = driver.communicate(timeout=30)
    assert driver.returncode == 130, out.decode()
    assert wait(lambda: not any(map(alive, family)), 5)
    # Everything is closed at once: no later process is needed for that.
    assert [run.info.status for run in runs(typist.store, "sweep")] == ["KILLED"]
    assert typist.store.search_runs(["0"], "attributes.status = 'RUNNING'") == []
    out, _ = typist.type().communicate(timeout=120)
    assert b"continuing the sweep that was interrupted" in out
    _check_the_end(typist)


def test_a_finished_sweep_typed_again_is_a_new_one(typist: Typist) -> None:
    for _ in range(2):
        driver = typist.type()
        out, _ = driver.communicate(timeout=120)
        assert driver.returncode == 0, out.decode()
    first, second = runs(typist.store, "sweep")
    assert first.data.tags["study"] != second.data.tags["study"]
