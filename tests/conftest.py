"""What most tests share: a tracking store of their own, a tiny archive, members of one file."""

import os
from collections.abc import Iterator
from pathlib import Path

import mlflow
import pytest
import unsynced  # noqa: F401
from archives import write_archive
from matplotlib.figure import Figure
from servers import Server
from steps import blank
from stores import N_TRAIN, AddMember, members, open_store

from benchmarks import services

# For sitecustomize.py, which is here.
os.environ["PYTHONPATH"] = str(Path(__file__).parent)

# The files of a minute of CPU and more, the dearest first.
DEAR = (
    "test_crash.py",
    "test_sweep.py",
    "test_cluster.py",
    "test_networks.py",
    "test_mlproject.py",
    "test_serve.py",
    "test_server.py",
    "test_benchmarks.py",
    "test_compare.py",
    "test_promote.py",
    "test_reproduce.py",
    "test_contract.py",
    "test_phases.py",
    "test_load.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Dear files first: one that begins last would leave the other workers idle."""
    places = {name: place for place, name in enumerate(DEAR)}
    items.sort(key=lambda item: places.get(item.path.name, len(DEAR)))


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


@pytest.fixture
def server(store: mlflow.MlflowClient) -> Iterator[Server]:
    """An MLflow server over the test's own tracking store."""
    with Server(store.tracking_uri) as server:
        yield server


@pytest.fixture(scope="session")
def postgres() -> Iterator[services.Postgres]:
    """A PostgreSQL server, empty but for what the tests before have made in it."""
    try:
        services.find_postgres()
    except FileNotFoundError as error:
        pytest.skip(str(error))
    with services.Postgres() as postgres:
        yield postgres


@pytest.fixture(scope="session")
def s3() -> Iterator[services.S3]:
    """An S3-compatible store with a bucket."""
    with services.S3() as s3:
        yield s3


@pytest.fixture(scope="session")
def team_server(postgres: services.Postgres, s3: services.S3) -> Iterator[services.TrackingServer]:
    """An MLflow server over PostgreSQL and S3 that asks nobody for a password."""
    with services.TrackingServer(postgres, s3) as server:
        yield server


@pytest.fixture(scope="session")
def guarded_server(
    postgres: services.Postgres, s3: services.S3
) -> Iterator[services.TrackingServer]:
    """An MLflow server over PostgreSQL and S3 with basic auth."""
    with services.TrackingServer(postgres, s3, auth=True) as server:
        yield server


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
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """All figures are saved blank: to draw them takes most of a small sweep's last CPU-seconds."""
    monkeypatch.setattr(Figure, "savefig", blank)


@pytest.fixture
def add_member(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[AddMember]:
    """add_member(package, name, source) makes a model or data set of one file, for this test."""
    with members(tmp_path, monkeypatch) as add:
        yield add
