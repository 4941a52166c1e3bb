"""What most tests share: a tracking store of their own, a tiny archive, members of one file."""

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import mlflow
import pytest
from archives import write_archive

ROOT = Path(__file__).parent.parent
AddMember = Callable[[ModuleType, str, str], None]
N_TRAIN = 520  # of the 780 letters that the tiny archive has for train and val


@pytest.fixture(scope="session")
def fresh_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty tracking store; making one takes MLflow seconds, copying it nothing."""
    folder = tmp_path_factory.mktemp("store")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)  # artifacts lie under the folder where the store was made
        mlflow.MlflowClient(f"sqlite:///{folder}/mlflow.db").search_experiments()
    return folder / "mlflow.db"


@pytest.fixture
def store(
    fresh_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> mlflow.MlflowClient:
    """A client of a tracking store that this test alone uses."""
    return open_store(fresh_store, tmp_path, monkeypatch)


@pytest.fixture(scope="session")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An archive in EMNIST's layout: 780 letters to draw from, 260 for gate, 260 for test."""
    path = tmp_path_factory.mktemp("archive") / "tiny.zip"
    write_archive(path, n_train=1040, n_test=260)
    return path


@pytest.fixture
def data_options(archive: Path, tmp_path: Path) -> dict[str, object]:
    """The options by which every step finds the tiny archive's letters."""
    return {
        "dataset": "emnist_letters",
        "archive": archive,
        "n_train": N_TRAIN,
        "data_dir": tmp_path / "data",
    }


@pytest.fixture
def add_member(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[AddMember]:
    """add_member(package, name, source) makes a model or data set of one file, for this test."""
    with members(tmp_path, monkeypatch) as add:
        yield add


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
        patch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{ROOT / 'tests'}")
        added.append(f"{package.__name__}.{name}")

    yield add
    for name in added:
        sys.modules.pop(name, None)


def open_store(original: Path, folder: Path, patch: pytest.MonkeyPatch) -> mlflow.MlflowClient:
    """A client of a copy of a tracking store in ``folder``, which all steps use from now on."""
    uri = f"sqlite:///{shutil.copy(original, folder)}"
    patch.setenv("MLFLOW_TRACKING_URI", uri)
    for name in ("MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_ID", "MLFLOW_EXPERIMENT_NAME"):
        patch.delenv(name, raising=False)
    patch.chdir(folder)
    return mlflow.MlflowClient(uri)
