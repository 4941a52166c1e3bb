"""Calling a step in this process, as MLproject does from the command line."""

from typing import Any

import mlflow

# A model that learns nothing and costs nothing, but for what its params make it do.
TOY = """
import numpy as np
from optuna.distributions import FloatDistribution, IntDistribution
from pipeline.models import knn
from pipeline.spec import Param

PARAMS = {
    "quality": Param(0.5, FloatDistribution(0.0, 1.0)),
    "steps": Param(3, IntDistribution(1, 5)),
}

def fit(params, train, val, seed, report):
    if params["quality"] FAILS:
        raise ArithmeticError("no solution")
    for step in range(1, params["steps"] + 1):
        if report(step, params["quality"] * step / 5):
            break
    deck = {name: param.default for name, param in knn.PARAMS.items()}
    small = type(train)(train.images[:60], train.labels[:60])
    fitted = knn.fit(deck, small, val, seed, lambda step, accuracy: False)
    return type(fitted)(fitted.predict, fitted.save_model, fitted.requirements, params["steps"])
"""


def toy(fails: str = "< 0") -> str:
    """Source of the toy model; it raises where ``quality`` ``fails``."""
    return TOY.replace("FAILS", fails)


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
