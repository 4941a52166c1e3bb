"""Tracking stores of a test's own, and models and data sets that it makes of one file."""

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import mlflow
import pytest

ROOT = Path(__file__).parent.parent
# The PYTHONPATH of processes that are to find the project, wherever they run, and what is here.
CODE = f"{ROOT}{os.pathsep}{ROOT / 'tests'}"
AddMember = Callable[[ModuleType, str, str], None]
# What a shell may have set, and a test has not.
SETTINGS = (
    "MLFLOW_RUN_ID",
    "MLFLOW_EXPERIMENT_ID",
    "MLFLOW_EXPERIMENT_NAME",
    "MLFLOW_TRACKING_USERNAME",
    "MLFLOW_TRACKING_PASSWORD",
    "OPTUNA_STORAGE",
)
N_TRAIN = 520  # of the 780 letters that the tiny archive has for train and val


@contextmanager
def members(folder: Path, patch: pytest.MonkeyPatch) -> Iterator[AddMember]:
    """What ``add_member`` does, for fixtures that live longer than a test."""
    added: list[str] = []

    def add(package: ModuleType, name: str, source: str) -> None:
        home = folder / package.__name__
        home.mkdir(exist_ok=True)
        (home / f"{name}.py").write_text(source)
        patch.setattr(package, "__path__", [*package.__path__, str(home)])
        # The processes that a sweep starts find it by tests/toys.py.
        patch.setenv("TOY_MODELS", str(home))
        patch.setenv("PYTHONPATH", CODE)
        added.append(f"{package.__name__}.{name}")

    yield add
    for name in added:
        sys.modules.pop(name, None)


def open_store(original: Path, folder: Path, patch: pytest.MonkeyPatch) -> mlflow.MlflowClient:
    """A client of a copy of a tracking store in ``folder``, which all steps use from now on."""
    uri = f"sqlite:///{shutil.copy(original, folder)}"
    patch.setenv("MLFLOW_TRACKING_URI", uri)
    for name in SETTINGS:
        patch.delenv(name, raising=False)
    patch.chdir(folder)
    return mlflow.MlflowClient(uri)
