"""Calling a step in this process, as MLproject does from the command line."""

import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import mlflow
from matplotlib.figure import Figure
from optuna.trial import TrialState

from sweeps.engine import Engine

# A model that learns nothing and costs nothing, but for what a test has it do.
TOY = """
import collections, itertools, os, signal, time
from optuna.distributions import FloatDistribution, IntDistribution
from pipeline.spec import Fitted, Param

PRELOAD = ("toys",)
PARAMS = {
    "quality": Param(0.5, FloatDistribution(0.0, 1.0)),
    "steps": Param(3, IntDistribution(1, 5)),
}

def socket(fd):
    try:
        return os.readlink(f"/proc/self/fd/{fd}").startswith("socket")
    except OSError:
        return False

def fit(params, train, val, seed, report):
    quality = params["quality"]
    for step in range(1, params["steps"] + 1):
        BEFORE
        if report(step, quality * step / 5):
            break
    AFTER
    # Its answers are those of the logged model alone.
    return Fitted(None, save_model, ("numpy",), n_steps=params["steps"])

def save_model(path, **mlflow_arguments):
    import mlflow.pyfunc

    mlflow.pyfunc.save_model(path, python_model=SERVED, **mlflow_arguments)
"""
SERVED = Path(__file__).parent / "served_toy.py"


def toy(before: str = "pass", after: str = "pass") -> str:
    """Source of the toy model, with a statement before each report and one after the last.

    It may use ``params``, ``quality`` and ``step``, and the modules that the toy imports.
    """
    statements = {"BEFORE": before, "AFTER": after, "SERVED": repr(str(SERVED))}
    return re.sub("|".join(statements), lambda found: statements[found[0]], TOY)


# Options of a sweep, as MLproject has them, but for the model.
SWEEP = {
    "seed": 0,
    "cpu_minutes": 4,
    "workers": 2,
    "scheduler": "local",
    "precision": "auto",
    "study": "auto",
    "plan": "false",
}
LEFT = Engine.left


def left_until(n_trials: int, overdraft: float = 0.0) -> Callable[[Engine], float]:
    """An ``Engine.left`` by which a sweep begins so many trials, and its budget is then spent.

    It is, and ``overdraft`` CPU-seconds more. So a test can give a budget that is ample on any
    machine, and still end soon.
    """

    def left(engine: Engine) -> float:
        trials = engine.study.get_trials(deepcopy=False)
        n_begun = sum(trial.state != TrialState.WAITING for trial in trials)
        return LEFT(engine) if n_begun < n_trials else -overdraft

    return left


SAVE = Figure.savefig


def blank(drawn: Figure, *given: Any, **named: Any) -> None:
    """A ``Figure.savefig`` that saves an empty figure."""
    SAVE(Figure(), *given, **named)


def arguments(options: dict[str, object]) -> list[str]:
    """Options as MLproject writes them: ``--name value`` pairs."""
    return [word for name, value in options.items() for word in (f"--{name}", str(value))]


def runs(store: mlflow.MlflowClient, step: str) -> list[Any]:
    """Runs of a step, the first first."""
    found = store.search_runs(["0"], f"tags.step = '{step}'", order_by=["attributes.start_time"])
    return list(found)


def artifacts(store: mlflow.MlflowClient, run_id: str) -> set[str]:
    """Names of a run's artifacts."""
    return {item.path for item in store.list_artifacts(run_id)}


@contextmanager
def gone(model_uri: str) -> Iterator[None]:
    """A logged model whose files are not there, as where the project's folder was moved."""
    model = mlflow.MlflowClient().get_logged_model(model_uri.removeprefix("models:/"))
    place = Path(unquote(urlsplit(model.artifact_location).path))
    away = place.rename(place.with_name("away"))
    try:
        yield
    finally:
        away.rename(place)


def wait(condition: Callable[[], bool], seconds: float) -> bool:
    """Whether ``condition`` comes to hold within so many seconds."""
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
    return condition()


def alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and is not waited for does not."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):  # the latter where it ends while it is read
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"
