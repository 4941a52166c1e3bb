"""What the two-thousandth run costs a server, against the first, when four sweeps write at once.

    python -m benchmarks.load

Sweeps of a trivial model, so that all that is spent is tracking and the engine's own work. At the
end MLflow, the studies and the ledgers must agree on every trial: else the exit code is not 0.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import matplotlib.pyplot as plt
import mlflow
import numpy as np
import optuna
import pandas as pd
import yaml
from matplotlib.figure import Figure
from mlflow.entities import LoggedModel
from mlflow.entities import Run as RunEntity
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from benchmarks.services import S3, Postgres, TrackingServer
from pipeline import models, prep, registry, tracking
from pipeline.spec import Dataset
from pipeline.train import one_of_each
from sweeps import processes
from sweeps.trial import STATUS

HERE = Path(__file__).parent
MODEL, EXPERIMENT = "trivial", "load"
N_BINS = 20  # each is 5 % of the runs
N_ALONE = 20  # runs of a client that has the server for itself, before and after
PAGE = 1000  # runs of one answer
SAMPLE = 50  # of so many models one is loaded


def trivial() -> ModuleType:
    """The trivial model, which this process knows from now on."""
    models.__path__ = [*models.__path__, str(HERE / "models")]
    return registry.load(models, MODEL)


# ---- one sweep


def sweep_once(seed: int, n_trials: int, data_dir: Path, calls: Path) -> None:
    """A sweep of so many trials in this process; writes what each of its tracking calls took."""
    from sweeps import sweep
    from sweeps.engine import Engine

    trivial()
    real = Engine.left

    def left(engine: Engine) -> float:
        n_begun = len(engine.live) + len(engine.outcomes)
        return real(engine) if n_begun < n_trials else 0.0

    Engine.left = left  # type: ignore[method-assign]
    entry = yaml.safe_load((HERE.parent / "MLproject").read_text())["entry_points"]["sweep"]
    options = {name: what.get("default") for name, what in entry["parameters"].items()}
    options |= letters(data_dir) | {"model": MODEL, "seed": seed, "cpu_minutes": 600, "workers": 2}
    with timed() as rows:
        sweep.main([word for name, value in options.items() for word in (f"--{name}", str(value))])
    pd.DataFrame(rows).to_csv(calls, index=False)


def letters(data_dir: Path) -> dict[str, Any]:
    return {"dataset": "strokes", "archive": "default", "n_train": 520, "data_dir": str(data_dir)}


@contextmanager
def timed() -> Iterator[list[dict[str, Any]]]:
    """Time the calls that write to MLflow: a row for each, with the runs begun up to then."""
    rows: list[dict[str, Any]] = []
    children: set[str] = set()

    def timing(call: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*given: Any, **named: Any) -> Any:
            began = time.perf_counter()
            result = real(*given, **named)
            seconds = time.perf_counter() - began
            if call == "create" and given[1] != "sweep":
                children.add(result.id)
            of_sweep = call == "log_batch" and given[0].id not in children
            name = "log_batch_of_sweep" if of_sweep else call
            rows.append({"n_runs": len(children), "call": name, "seconds": seconds})
            return result

        return wrapped

    homes = {"create": (tracking, "create")}
    homes |= {"log_batch": (tracking.Run, "write"), "log_input": (tracking.Run, "input")}
    homes |= {"rename": (tracking.Run, "name"), "close": (tracking.Run, "close")}
    homes |= {"log_model": (tracking.Run, "log_model")}
    reals = {call: getattr(*home) for call, home in homes.items()}
    for call, (home, name) in homes.items():
        setattr(home, name, timing(call, reals[call]))
    try:
        yield rows
    finally:
        for call, (home, name) in homes.items():
            setattr(home, name, reals[call])


# ---- several sweeps, and what the server spends on them


@dataclass
class Watch:
    """CPU-seconds of the server's parts over time, looked at each second."""

    pids: Mapping[str, int]  # by part: server, and perhaps database and store
    rows: list[dict[str, float]] = field(default_factory=list)
    done: threading.Event = field(default_factory=threading.Event)

    def look(self) -> dict[str, float]:
        spent = {
            part: sum(map(processes.cpu_seconds, processes.tree(pid)))
            for part, pid in self.pids.items()
        }
        self.rows.append({"time": time.time(), **spent})
        return spent

    def until_done(self) -> None:
        while not self.done.wait(1):
            self.look()

    def between(self, begin: float, end: float) -> dict[str, float]:
        """CPU-seconds of each part between two moments (seconds since 1970)."""
        table = pd.DataFrame(self.rows)
        ends = {part: np.interp([begin, end], table["time"], table[part]) for part in self.pids}
        return {part: float(after - before) for part, (before, after) in ends.items()}


def run_sweeps(n_sweeps: int, n_trials: int, folder: Path, watch: Watch) -> pd.DataFrame:
    """All sweeps at once, each with a driver of its own; gives the rows of their calls."""
    environment = os.environ | {"PYTHONPATH": str(HERE.parent)}
    looking = threading.Thread(target=watch.until_done)
    looking.start()
    drivers = []
    for seed in range(n_sweeps):
        command = [sys.executable, "-m", "benchmarks.load", "--seed", str(seed)]
        command += ["--trials", str(n_trials), "--folder", str(folder)]
        with (folder / f"sweep-{seed}.log").open("wb") as log:
            drivers.append(
                subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log)
            )
    try:
        for seed, driver in enumerate(drivers):
            if driver.wait():
                raise RuntimeError((folder / f"sweep-{seed}.log").read_text())
    finally:
        for driver in drivers:
            driver.kill()
            driver.wait()
        watch.done.set()
        looking.join()
    tables = [pd.read_csv(calls_of(folder, seed)) for seed in range(n_sweeps)]
    return pd.concat(tables).assign(n_runs=lambda table: table["n_runs"] * n_sweeps)


def calls_of(folder: Path, seed: int) -> Path:
    return folder / f"calls-{seed}.csv"


def alone(
    client: mlflow.MlflowClient, data: Dataset, watch: Watch, n_runs: int, n_alone: int
) -> dict[str, Any]:
    """What a trial's calls take where nobody else asks: medians, and the server's CPU a run."""
    trial = mlflow_trial(data)
    for _ in range(n_alone // 2):  # for what client and server load once
        trial(client)
    before = watch.look()
    with timed() as rows:
        for _ in range(n_alone):
            trial(client)
    after = watch.look()
    spent = {part: (after[part] - before[part]) / n_alone for part in watch.pids}
    return {"alone": True, "n_runs": n_runs} | medians(pd.DataFrame(rows)) | in_ms(spent)


def mlflow_trial(data: Dataset) -> Callable[[mlflow.MlflowClient], None]:
    """What a sweep writes for one trial, less the sweep."""
    member, part = trivial(), data.part("train")
    params = {name: param.default for name, param in member.PARAMS.items()}

    def trial(client: mlflow.MlflowClient) -> None:
        points: list[tracking.Point] = []

        def report(step: int, accuracy: float) -> bool:
            points.append(tracking.Point(step, time.time(), {"val_accuracy": accuracy}))
            return False

        run = tracking.create(client, "alone", None)
        run.write(params=params)
        run.input(data, "train")
        fitted = member.fit(params, part, part, 0, report)
        run.log_model(fitted, one_of_each(part), step=1)
        run.write(points, tags={"state": "complete"})
        run.name("alone")
        run.close("FINISHED")

    return trial


def medians(rows: pd.DataFrame) -> dict[str, float]:
    """The median of each call, and of a trial's calls together, in milliseconds."""
    each = rows.groupby("call")["seconds"].median()
    return {f"{call}_ms": round(1000 * seconds, 1) for call, seconds in each.items()}


def in_ms(spent: Mapping[str, float]) -> dict[str, float]:
    return {f"{part}_cpu_ms": round(1000 * seconds, 1) for part, seconds in spent.items()}


def growth(found: "Found", calls: pd.DataFrame, watch: Watch) -> pd.DataFrame:
    """A row for each 5 % of the runs: medians of the calls, and the server's CPU a run."""
    begun = sorted(run.info.start_time / 1000 for run in found.children)
    edges = np.linspace(0, len(begun), N_BINS + 1).round().astype(int)
    rows = []
    for first, last in zip(edges[:-1], edges[1:], strict=True):
        mine = calls[(calls["n_runs"] > first) & (calls["n_runs"] <= last)]
        moments = begun[first], begun[min(last, len(begun) - 1)]
        spent = {part: s / (last - first) for part, s in watch.between(*moments).items()}
        models_ms = [found.seconds_of_model(run) for run in found.children_between(*moments)]
        row = {"alone": False, "n_runs": int(last)} | medians(mine)
        rows.append(row | {"log_model_ms": round(1000 * float(np.median(models_ms)), 1)})
        rows[-1] |= in_ms(spent)
    return pd.DataFrame(rows)


# ---- what must be there at the end


class Found:
    """All that the tracking server has of the sweeps."""

    def __init__(self, client: mlflow.MlflowClient, folder: Path) -> None:
        self.client, self.studies = client, folder / "data" / "studies"
        self.home = str(client.get_experiment_by_name(EXPERIMENT).experiment_id)
        self.sweeps = self._runs("sweep")
        self.children = self._runs("trial")
        self.models: dict[str, list[LoggedModel]] = {}
        for model in _pages(self._models):
            self.models.setdefault(model.source_run_id, []).append(model)

    def _runs(self, step: str) -> list[RunEntity]:
        def page(token: str | None) -> Any:
            return self.client.search_runs(
                [self.home], f"tags.step = '{step}'", max_results=PAGE, page_token=token
            )

        return list(_pages(page))

    def _models(self, token: str | None) -> Any:
        return self.client.search_logged_models(
            experiment_ids=[self.home], max_results=100, page_token=token
        )

    def children_between(self, begin: float, end: float) -> list[RunEntity]:
        """Children that began between two moments (seconds since 1970)."""
        return [run for run in self.children if begin <= run.info.start_time / 1000 <= end]

    def seconds_of_model(self, run: RunEntity) -> float:
        """Seconds from a model's creation to its end, its files included."""
        (model,) = self.models[run.info.run_id]
        return (model.last_updated_timestamp - model.creation_timestamp) / 1000

    def study(self, sweep: RunEntity) -> optuna.Study:
        journal = self.studies / sweep.data.tags["study"] / "optuna.journal"
        storage = JournalStorage(JournalFileBackend(str(journal)))
        return optuna.load_study(study_name=sweep.data.tags["study"], storage=storage)

    def ledger(self, sweep: RunEntity) -> list[dict[str, Any]]:
        path = self.studies / sweep.data.tags["study"] / "ledger.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()]

    def history(self, run: RunEntity, key: str) -> dict[int, float]:
        return {
            point.step: point.value
            for point in self.client.get_metric_history(run.info.run_id, key)
        }


def _pages(page: Callable[[str | None], Any]) -> Iterator[Any]:
    token: str | None = None
    while True:
        answer = page(token)
        yield from answer
        token = answer.token
        if not token:
            return


def faults(found: Found, n_sweeps: int, n_trials: int) -> list[str]:
    """What is lost, doubled or not the same everywhere; empty where all is well."""
    told = [] if len(found.sweeps) == n_sweeps else [f"{len(found.sweeps)} sweeps"]
    strangers = {run.data.tags["mlflow.parentRunId"] for run in found.children}
    strangers -= {sweep.info.run_id for sweep in found.sweeps}
    told += [f"children of an unknown run {run_id}" for run_id in sorted(strangers)]
    for sweep in found.sweeps:
        told += [f"{sweep.info.run_name}: {fault}" for fault in _of_sweep(found, sweep, n_trials)]
    return told


def _of_sweep(found: Found, sweep: RunEntity, n_trials: int) -> Iterator[str]:
    if sweep.info.status != "FINISHED":
        yield f"is {sweep.info.status}"
        return
    mine = sweep.info.run_id
    children = [run for run in found.children if run.data.tags["mlflow.parentRunId"] == mine]
    trials = {trial.number: trial for trial in found.study(sweep).get_trials(deepcopy=False)}
    ledger = found.ledger(sweep)
    bills = {line["trial"]: line["cpu_seconds"] for line in ledger if line["kind"] == "debit"}
    numbers = {
        "child runs": [int(run.data.tags["trial"]) for run in children],
        "the study's trials": list(trials),
        "grants": [line["trial"] for line in ledger if line["kind"] == "grant"],
        "debits": [line["trial"] for line in ledger if line["kind"] == "debit"],
    }
    for what, seen in numbers.items():
        yield from _lost_or_doubled(what, seen, range(n_trials))
    steps = found.history(sweep, "val_accuracy")
    yield from _lost_or_doubled("its own points", list(steps), range(n_trials + 1))
    if sweep.data.metrics["n_trials"] != n_trials:
        yield f"says that it had {sweep.data.metrics['n_trials']:g} trials"
    for run in children:
        number = int(run.data.tags["trial"])
        if number in trials and number in bills:
            for fault in _of_trial(found, run, trials[number], bills[number]):
                yield f"trial {number}: {fault}"


def _lost_or_doubled(what: str, seen: Sequence[int], wanted: range) -> Iterator[str]:
    counts = Counter(seen)
    if lost := sorted(set(wanted) - set(seen)):
        yield f"{what} lack {lost}"
    if more := sorted(set(seen) - set(wanted)):
        yield f"{what} have {more} as well"
    if doubled := sorted(number for number, n in counts.items() if n > 1):
        yield f"{what} have {doubled} more than once"


def _of_trial(
    found: Found, run: RunEntity, trial: optuna.trial.FrozenTrial, cpu_seconds: float
) -> Iterator[str]:
    """What a child run does not have as the study and the ledger have it."""
    state, status = run.data.tags["state"], run.info.status
    if STATUS[state] != status or status != "FINISHED" or run.info.end_time is None:
        yield f"is {status}, as {state}"
    params = trial.params | {"model": MODEL}
    differ = [name for name, value in params.items() if run.data.params.get(name) != str(value)]
    if differ or "seed" not in run.data.params:
        yield f"params {differ} are not those of the study"
    if found.history(run, "val_accuracy") != trial.intermediate_values:
        yield "val_accuracy is not, step by step, what the study has"
    # The ledger has the sum of the same numbers, in another order.
    if not np.isclose(run.data.metrics.get("cpu_seconds", 0.0), cpu_seconds, rtol=1e-9):
        yield "its bill is not that of the ledger"
    if [one.dataset.name for one in run.inputs.dataset_inputs] != ["strokes"]:
        yield "its data set is not recorded once"
    logged = found.models.get(run.info.run_id, [])
    if [f"models:/{model.model_id}" for model in logged] != [run.data.tags.get("model_uri")]:
        yield f"it has {len(logged)} models, or another than it names"
    elif not logged[0].status == "READY":
        yield f"its model is {logged[0].status}"
    elif trial.number % SAMPLE == 0:
        answer = mlflow.pyfunc.load_model(run.data.tags["model_uri"]).predict(
            np.zeros((1, 28, 28), np.uint8)
        )
        if answer.shape != (1, 26):
            yield f"its model answers {answer.shape}"


# ---- the whole


@contextmanager
def servers() -> Iterator[dict[str, int]]:
    """MLflow's server over PostgreSQL and an S3 store, for this process; their pids."""
    with Postgres() as postgres, S3() as s3, TrackingServer(postgres, s3) as server:
        os.environ.update(server.client_environment)
        parts = {"server": server, "database": postgres, "store": s3}
        yield {part: service.process.pid for part, service in parts.items() if service.process}


def load(
    pids: Mapping[str, int], n_sweeps: int, n_trials: int, folder: Path, n_alone: int = N_ALONE
) -> tuple[pd.DataFrame, list[str]]:
    """Load this process's tracking server, with processes ``pids``; gives figures and faults."""
    os.environ["MLFLOW_EXPERIMENT_NAME"] = EXPERIMENT
    client, watch = tracking.connect(), Watch(pids)
    data = prep.prepare(**letters(folder / "data"))
    before = alone(client, data, watch, 0, n_alone)
    calls = run_sweeps(n_sweeps, n_trials, folder, watch)
    after = alone(client, data, watch, n_sweeps * n_trials, n_alone)
    found = Found(client, folder)
    told = faults(found, n_sweeps, n_trials)
    if told:
        return pd.DataFrame([before, after]), told
    table = growth(found, calls, watch)
    return pd.concat([pd.DataFrame([before, after]), table], ignore_index=True), told


def picture(table: pd.DataFrame) -> Figure:
    """Time of a trial's calls and CPU of the server's parts, by the number of runs."""
    busy, quiet = table[~table["alone"]], table[table["alone"]]
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.8), layout="constrained")
    for name in [name for name in table if str(name).endswith("_ms") and table[name].notna().any()]:
        axes = right if str(name).endswith("_cpu_ms") else left
        label = str(name).removesuffix("_ms").removesuffix("_cpu").replace("_", " ")
        (line,) = axes.plot(busy["n_runs"], busy[name], label=label)
        axes.plot(quiet["n_runs"], quiet[name], "o", color=line.get_color())
    left.set(xlabel="child runs", ylabel="ms a call, median", yscale="log")
    right.set(xlabel="child runs", ylabel="CPU-ms a run", ylim=(0, None))
    left.set_title("A client's calls (dots: alone)", fontsize=10)
    right.set_title("The server's parts (dots: alone)", fontsize=10)
    for axes in (left, right):
        axes.legend(fontsize=7, ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.18))
    return figure


def ratios(table: pd.DataFrame) -> pd.DataFrame:
    """The last row by the first one, alone and under load."""
    figures = table.filter(like="_ms")
    pairs = {"alone": table["alone"], "under load": ~table["alone"]}
    return pd.DataFrame(
        {
            f"{name}, {what}": values
            for name, rows in pairs.items()
            for what, values in (
                ("first", figures[rows].iloc[0]),
                ("last", figures[rows].iloc[-1]),
                ("ratio", figures[rows].iloc[-1] / figures[rows].iloc[0]),
            )
        }
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sweeps", type=int, default=4)
    parser.add_argument("--trials", type=int, default=500, help="of each sweep")
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("--seed", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.folder:
        calls = calls_of(given.folder, given.seed)
        sweep_once(given.seed, given.trials, given.folder / "data", calls)
        return
    results = given.results.absolute()
    with tempfile.TemporaryDirectory() as folder, servers() as pids:
        table, told = load(pids, given.sweeps, given.trials, Path(folder))
    results.mkdir(exist_ok=True)
    table.to_csv(results / "load.csv", index=False)
    print(table.to_string())
    if told:
        sys.exit("\n".join(["error: not all is there, or not once:", *told]))
    print(ratios(table).round(2).to_string())
    picture(table).savefig(results / "load.png", dpi=110)


if __name__ == "__main__":
    main()
