"""A team's site on one machine: a sweep on a Dask cluster, a worker killed half-way, the accounts.

    python -m benchmarks.cluster_demo --model cnn --cpu_minutes 5

PostgreSQL, an S3-compatible store, an MLflow server over both that asks for passwords, a Dask
scheduler and three workers, all on loopback. When half of the budget is spent a worker is killed.
In the end the ledger is compared with the kernel's account of driver and workers, and the runs with
the study's trials; it fails where the one differs by more than 1 %, or where a trial has not
exactly one run. The server stays up until Enter is pressed, where there is someone to press it.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlflow
import optuna

from benchmarks.services import S3, Postgres, TrackingServer
from benchmarks.workers import Workers
from pipeline import models, registry
from sweeps.storage import connect, parse

TOLERANCE = 0.01  # of the kernel's account
PROJECT = Path(__file__).parents[1]
TRIALS = "tags.step = 'trial'"


@contextmanager
def site(folder: Path, n_workers: int) -> Iterator[tuple[TrackingServer, Workers, dict[str, str]]]:
    """Server, cluster, and the environment that a user of both has."""
    with Postgres() as postgres, S3() as s3, TrackingServer(postgres, s3, auth=True) as server:
        environment = os.environ | server.client_environment
        environment |= {
            "PYTHONPATH": str(PROJECT),
            "LETTERS_CACHE": str(folder / "cache"),  # as on a machine that has no letters yet
            "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
        }
        workers = Workers(folder, environment)
        try:
            for i in range(n_workers):
                workers.add(f"worker-{i}")
            storage = {"OPTUNA_STORAGE": postgres.create("studies")}
            secret = {"PGPASSFILE": str(postgres.passfile)}
            yield server, workers, environment | storage | secret
        finally:
            workers.stop()


def step(module: str, options: dict[str, object]) -> list[str]:
    """The command of a step, as MLproject has it."""
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    return [sys.executable, "-m", module, *words]


def sweep(
    command: list[str], environment: dict[str, str], workers: Workers, half: float, folder: Path
) -> float:
    """Run a sweep, kill a worker in a trial once ``half`` CPU-seconds are spent.

    Gives the CPU-seconds of driver and workers, by the kernel.
    """
    killed: list[str] = []

    def look(spent: float) -> None:
        victim = next((name for name in workers.nannies if workers.trials(name)), None)
        if spent > half and victim and not killed:
            print(f"kill -9 of {victim}, {spent:.0f} CPU-s into the sweep", flush=True)
            workers.kill(victim)
            killed.append(victim)

    driver = subprocess.Popen(command, env=environment, cwd=folder)
    spent = workers.used(driver, look)
    if driver.returncode or not killed:
        raise SystemExit(f"the sweep ended with {driver.returncode}, killed: {killed}")
    return spent


def check(kernel: float, environment: dict[str, str], folder: Path) -> dict[str, Any]:
    """What the ledger, the study and the runs say; fails where they do not agree."""
    client = mlflow.MlflowClient()
    (parent,) = client.search_runs(["0"], "tags.step = 'sweep'")
    study_name = parent.data.tags["study"]
    os.environ |= {name: environment[name] for name in ("OPTUNA_STORAGE", "PGPASSFILE")}
    storage = connect(parse(environment["OPTUNA_STORAGE"]))
    study = optuna.load_study(study_name=study_name, storage=storage)
    runs = client.search_runs(["0"], f"{TRIALS} and tags.study = '{study_name}'", max_results=5000)
    ledger = (folder / "data" / "studies" / study_name / "ledger.jsonl").read_text()
    debits = [json.loads(line) for line in ledger.splitlines() if '"debit"' in line]
    billed = parent.data.metrics["cpu_seconds"]
    found = {
        "budget_cpu_seconds": parent.data.metrics["budget_cpu_seconds"],
        "ledger_cpu_seconds": round(billed, 2),
        "kernel_cpu_seconds": round(kernel, 2),
        "difference_share": round(billed / kernel - 1, 5),
        "n_trials": len(study.trials),
        "n_runs": len(runs),
        "n_debits": len(debits),
        "n_killed": sum(run.data.tags["state"] == "killed" for run in runs),
        "n_tried_again": sum("retry_of" in run.data.tags for run in runs),
        "n_workers_seen": len({run.data.tags["worker"] for run in runs}),
        "val_accuracy": parent.data.metrics["val_accuracy"],
    }
    numbers = sorted(int(run.data.tags["trial"]) for run in runs)
    assert numbers == [trial.number for trial in study.trials], "a trial has exactly one run"
    assert sorted(debit["trial"] for debit in debits) == numbers, "a trial has exactly one bill"
    assert {run.info.status for run in runs} <= {"FINISHED", "KILLED", "FAILED"}
    assert found["n_tried_again"] == found["n_killed"] > 0, "a killed trial is tried once more"
    assert abs(billed - kernel) <= TOLERANCE * kernel, f"the ledger holds to 1 %: {found}"
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="cnn")
    parser.add_argument("--cpu_minutes", type=float, default=5)
    parser.add_argument("--workers", type=int, default=3)
    parser.add_argument("--dataset", default="strokes")
    parser.add_argument("--archive", default="default")
    parser.add_argument("--n_train", default="8000")
    args = parser.parse_args()
    registry.load(models, args.model)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with site(folder, args.workers) as (server, workers, environment):
            os.environ |= server.client_environment
            data: dict[str, object] = {
                "dataset": args.dataset,
                "archive": args.archive,
                "n_train": args.n_train,
                "data_dir": folder / "data",
            }
            subprocess.run(step("pipeline.prep", data), env=environment, cwd=folder, check=True)
            more = {"model": args.model, "cpu_minutes": args.cpu_minutes, "workers": "auto"}
            more |= {"scheduler": workers.address, "seed": 0, "precision": "auto"}
            command = step("sweeps.sweep", data | more | {"study": "auto", "plan": "false"})
            half = 30 * args.cpu_minutes
            kernel = sweep(command, environment, workers, half, folder)
            report = {"run_ids": "latest", "dataset_digest": "latest", "data_dir": folder / "data"}
            subprocess.run(
                step("pipeline.compare", report), env=environment, cwd=folder, check=True
            )
            for key, value in check(kernel, environment, folder).items():
                print(f"{key:20} {value}")
            if sys.stdin.isatty():
                print(f"{server.uri}  user {server.user}  password {server.password}")
                print("browse the runs and the report there; Enter ends it all: ", flush=True)
                sys.stdin.readline()  # or its end: a terminal that is closed is no error


if __name__ == "__main__":
    main()
