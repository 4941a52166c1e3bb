"""What a trial costs beyond its fit: raw fits, the usual script, and this project's sweep.

    python -m benchmarks.overhead --dataset emnist_letters --archive letters-emnist-layout.zip

The same small CNNs on the same letters, an epoch each, on one thread: fitted one after the other in
one process (raw); by Optuna's ``study.optimize`` with MLflow's autolog and ``log_model``, as their
documentation shows it (usual); by this project's engine (sweep). Each way runs in a process of its
own, and the kernel's account of it and of all its children is the figure: imports, tracking and
models count.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from pipeline import prep, quiet, tracking
from pipeline.models import cnn
from pipeline.spec import Dataset, Params

N_TRIALS = 20
RESULTS = Path(__file__).parent / "results"
SPACE: dict[str, tuple[Any, ...]] = {
    "filters": (16, 32),
    "kernel_size": (3, 5),
    "dense_units": (64, 128, 192, 256),
    "dropout": (0.0, 0.1, 0.2, 0.3, 0.4, 0.5),
    "batch_size": (64, 128, 256),
}


def configurations() -> list[Params]:
    """Small CNNs, drawn once for all ways."""
    rng = np.random.default_rng(0)
    deck = {name: param.default for name, param in cnn.PARAMS.items()}
    return [
        deck
        | {name: choices[rng.integers(len(choices))] for name, choices in SPACE.items()}
        | {"epochs": 1}
        for _ in range(N_TRIALS)
    ]


def raw(data: Dataset) -> None:
    for params in configurations():
        cnn.fit(params, data.part("train"), data.part("val"), 0, lambda step, accuracy: False)


def usual(data: Dataset) -> None:
    """Without a model in ``autolog``, since it is logged by hand: it would cost twice."""
    import mlflow
    import optuna

    quiet.import_keras()
    import keras

    mlflow.keras.autolog(log_models=False)
    train, val = data.part("train"), data.part("val")
    deck = {name: param.default for name, param in cnn.PARAMS.items()}

    def objective(trial: optuna.Trial) -> float:
        keras.utils.clear_session()
        with mlflow.start_run(nested=True, run_name=f"trial_{trial.number}"):
            params = {
                "filters": trial.suggest_int("filters", 16, 64, step=16),
                "kernel_size": trial.suggest_categorical("kernel_size", [3, 5]),
                "dense_units": trial.suggest_int("dense_units", 64, 256, step=64),
                "dropout": trial.suggest_float("dropout", 0.0, 0.5, step=0.1),
                "batch_size": trial.suggest_categorical("batch_size", [32, 64, 128, 256]),
            }
            mlflow.log_params({f"trial_{name}": value for name, value in params.items()})
            net = cnn.build(deck | params)
            net.compile(
                optimizer=keras.optimizers.Adam(learning_rate=1e-3),
                loss="sparse_categorical_crossentropy",
                metrics=["accuracy"],
            )
            history = net.fit(
                np.asarray(train.images),
                np.asarray(train.labels),
                batch_size=params["batch_size"],
                epochs=1,
                validation_data=(np.asarray(val.images), np.asarray(val.labels)),
                validation_batch_size=512,
                verbose=0,
            )
            mlflow.keras.log_model(net, name="model")
            return float(history.history["val_accuracy"][-1])

    study = optuna.create_study(direction="maximize")
    for params in configurations():
        study.enqueue_trial({name: params[name] for name in SPACE})
    with mlflow.start_run(run_name="study"):
        study.optimize(objective, n_trials=N_TRIALS)


def sweep(data: Dataset) -> None:
    from pipeline.bill import METER
    from sweeps import processes, search
    from sweeps import sweep as step
    from sweeps.budget import Ledger
    from sweeps.engine import Engine, Task

    METER.loaded()
    real = Engine.left

    def left(engine: Engine) -> float:
        return real(engine) if len(engine.live) + len(engine.outcomes) < N_TRIALS else 0.0

    Engine.left = left  # type: ignore[method-assign]
    folder = Path("study").absolute()
    with (
        tracking.start("sweep") as run,
        closing(Ledger(folder / "ledger.jsonl", 3600.0, "", run.id)) as ledger,
    ):
        study = search.open_study(folder.name, 0, folder, cnn.STEPS)
        for params in configurations():
            study.enqueue_trial(params)
        task = Task("cnn", data, 0, processes.usable_cores(), launched=False, precision="float32")
        step.sweep(run, ledger, folder, task)


WAYS: dict[str, Callable[[Dataset], None]] = {"raw": raw, "usual": usual, "sweep": sweep}


def measure(way: str, data: Dataset) -> float:
    """CPU-seconds of one way, all its processes counted."""
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {
            "MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db",
            "PYTHONPATH": str(Path(__file__).parents[1]),
        }
        command = [sys.executable, "-m", "benchmarks.overhead", "--way", way]
        with (RESULTS.parent / f".{way}.log").open("wb") as log:
            process = subprocess.Popen(
                [*command, "--root", str(data.root.absolute())],
                cwd=folder,
                env=environment,
                stdout=log,
                stderr=log,
            )
            _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        assert process.returncode == 0, Path(log.name).read_text()
        Path(log.name).unlink()
        return usage.ru_utime + usage.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dataset", default="strokes")
    parser.add_argument("--archive", default="default")
    parser.add_argument("--n_train", type=int, default=1000)
    parser.add_argument("--data_dir", default="data")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--root", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.way:
        WAYS[given.way](Dataset.open(given.root))
        return
    data = prep.prepare(given.dataset, given.archive, given.n_train, given.data_dir)
    rows = []
    for _ in range(given.repeats):  # by turns, so that noise meets all ways alike
        spent = {way: measure(way, data) for way in WAYS}
        print(spent, flush=True)
        rows.append(spent)
    totals = pd.DataFrame(rows)
    beyond = totals.sub(totals["raw"], axis=0) / N_TRIALS
    table = pd.DataFrame({"cpu_seconds": totals.median(), "beyond_fit_per_trial": beyond.median()})
    table["share_of_usual"] = table["beyond_fit_per_trial"] / table["beyond_fit_per_trial"]["usual"]
    print(f"{data.title}, {given.n_train} training letters, {tracking.environment_tags()}")
    print(table.round(3).to_string())
    RESULTS.mkdir(exist_ok=True)
    table.round(3).to_csv(RESULTS / "overhead.csv", index_label="way")


if __name__ == "__main__":
    main()
