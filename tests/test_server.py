"""Every step with a team's MLflow server: PostgreSQL, an S3-compatible store, and passwords."""

import collections
import hashlib
import io
import os
import re
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest
from mlflow.entities import LoggedModelStatus
from servers import faulty
from steps import SWEEP, arguments, artifacts, left_until, toy
from stores import ROOT, SETTINGS
from test_promote import DEFAULTS as PROMOTE
from test_scan import drawn, page

from benchmarks import services
from pipeline import champion, compare, evaluate, models, predict, prep, promote, tracking, train
from pipeline.models import knn
from pipeline.spec import Fitted, Part, UserError
from sweeps import engine, sweep

# Last words of the addresses that make a run, a model, a model's link to a run, a version; and the
# method that takes back what was half made.
MAKERS = {"create", "logged-models", "outputs", "DELETE"}
KNN = {"model": "knn", "seed": 0, "precision": "auto"}


@pytest.fixture
def desk(
    guarded_server: services.TrackingServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str], list[Any]]:
    """Someone who has the server's name and password, with an experiment and a folder of his own.

    Gives the runs of a step, the first first.
    """
    for name in SETTINGS:
        monkeypatch.delenv(name, raising=False)
    for name, value in guarded_server.client_environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", tmp_path.name)
    # A request that failed is made again at once, not after seconds.
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR", "0")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_BACKOFF_JITTER", "0")
    monkeypatch.chdir(tmp_path)

    def runs(step: str) -> list[Any]:
        client = mlflow.MlflowClient(guarded_server.uri)
        home = client.get_experiment_by_name(tmp_path.name)
        order = ["attributes.start_time"]
        experiments = [home.experiment_id] if home else []
        return list(client.search_runs(experiments, f"tags.step = '{step}'", order_by=order))

    return runs


def _sweep(options: dict[str, Any], add: Any, patch: pytest.MonkeyPatch, n_trials: int = 4) -> None:
    """A sweep of the toy model in this process, ample of budget and bounded in trials."""
    add(models, "toy", toy())
    patch.setattr(engine.Engine, "left", left_until(n_trials))
    sweep.main(arguments(options | SWEEP | {"model": "toy", "cpu_minutes": 60}))


def test_all_steps_work_with_a_team_server(
    desk: Callable[[str], list[Any]],
    guarded_server: services.TrackingServer,
    s3: services.S3,
    data_options: dict[str, Any],
    add_member: Any,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    client = mlflow.MlflowClient(guarded_server.uri)
    data_dir = {"data_dir": data_options["data_dir"]}
    prep.main(arguments(data_options))
    train.main(arguments(data_options | KNN))
    evaluate.main(arguments({"run_id": "latest", **data_dir}))
    _sweep(data_options, add_member, monkeypatch)
    compare.main(arguments({"dataset_digest": "latest", "run_ids": "latest", **data_dir}))
    promote.main(arguments(PROMOTE | data_dir))
    page(drawn()).save(tmp_path / "letter.png")
    picture = {"image": tmp_path / "letter.png", "model": "models:/letters@champion"}
    predict.main(arguments(picture | {"output": "auto"}))
    for step in ("prep", "train", "evaluate", "sweep", "compare", "promote", "predict"):
        assert {run.info.status for run in desk(step)} == {"FINISHED"}, step
    # The artifacts went through the server into the bucket, and come back from there.
    (comparison,) = desk("compare")
    home = client.get_run(comparison.info.run_id).info.artifact_uri
    assert home.startswith("mlflow-artifacts:/")
    assert "report.html" in artifacts(client, comparison.info.run_id)
    keys = list(s3.objects())
    assert any(key.endswith(f"{comparison.info.run_id}/artifacts/report.html") for key in keys)
    assert not list(tmp_path.glob("mlruns*"))
    assert not (tmp_path / "mlflow.db").exists()
    (sweeping,) = desk("sweep")
    version = client.get_model_version_by_alias("letters", "champion")
    assert version.tags["model_uri"] == sweeping.data.tags["model_uri"]
    assert re.search(r"^[A-Z] \d", capsys.readouterr().out, re.MULTILINE)


@pytest.mark.parametrize("password", ["wrong", ""])
def test_a_wrong_password_is_a_sentence(
    password: str, desk: Any, data_options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", password)
    command = [sys.executable, "-m", "pipeline.prep", *arguments(data_options)]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: the tracking server must know who asks, but http://127.0.0.1:")
    assert "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD" in line
    assert not Path(data_options["data_dir"]).exists()


@pytest.mark.parametrize(
    "uri",
    [
        "http://letters:hunter2@127.0.0.1:5000",
        "https://letters:hunter2@mlflow.example",
        "postgresql+psycopg2://letters:hunter2@127.0.0.1/mlflow",
        "postgresql+psycopg2://letters@127.0.0.1/mlflow?password=hunter2",
        "postgresql+psycopg2://letters:/hunter2@127.0.0.1/mlflow",
        "http://me:#hunter2@127.0.0.1:5000",
    ],
)
def test_a_password_in_the_address_is_refused(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    with pytest.raises(UserError, match="must hold no password") as refusal:
        tracking.connect()
    assert "hunter2" not in str(refusal.value)
    assert "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD" in str(refusal.value)


def _fitted() -> Fitted:
    """Nearest neighbours of a few noisy letters."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (60, 28, 28), dtype=np.uint8)
    part = Part(images, (np.arange(60) % 26).astype(np.uint8))
    deck = {name: param.default for name, param in knn.PARAMS.items()}
    return knn.fit(deck, part, part, 0, lambda step, accuracy: False)


def _first(what: str) -> Callable[[str, str, bytes], str]:
    """A fault of each request that writes, the first time that it is made."""
    seen = set()

    def fault(method: str, path: str, body: bytes) -> str:
        request = (path, hashlib.sha256(body).digest())
        new = request not in seen
        seen.add(request)
        return what if new and method != "GET" else ""

    return fault


def _every(n: int, what: str) -> Callable[[str, str, bytes], str]:
    """A fault of each nth request of a kind that writes.

    Not of each nth of all: what takes a multiple of n of them would fail as often as it is tried.
    """
    seen: collections.Counter[str] = collections.Counter()

    def fault(method: str, path: str, body: bytes) -> str:
        kind = path.partition("?")[0].rpartition("/")[2]
        seen[kind] += method != "GET"
        return what if method != "GET" and seen[kind] % n == 0 else ""

    return fault


@pytest.mark.parametrize("fault", [_first("refuse"), _every(3, "lose")], ids=["refuse", "lose"])
def test_a_server_that_breaks_down_again_and_again_loses_and_doubles_nothing(
    fault: Callable[[str, str, bytes], str],
    desk: Callable[[str], list[Any]],
    guarded_server: services.TrackingServer,
    data_options: dict[str, Any],
    add_member: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with faulty(guarded_server.uri, fault, seconds=0.02) as uri:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        _sweep(data_options, add_member, monkeypatch)
    assert len(desk("prep")) == 1
    (parent,) = desk("sweep")
    assert parent.info.status == "FINISHED"
    assert parent.data.metrics["n_trials"] == 4
    trials = desk("trial")
    assert [int(run.data.tags["trial"]) for run in trials] == [0, 1, 2, 3]
    client = mlflow.MlflowClient(guarded_server.uri)
    for run in trials:
        assert run.info.status == "FINISHED"
        assert {"quality", "steps"} <= set(run.data.params)
        history = client.get_metric_history(run.info.run_id, "val_accuracy")
        assert [metric.step for metric in history] == list(range(1, len(history) + 1))
    logged = client.search_logged_models([parent.info.experiment_id])
    assert len(logged) == sum("model_uri" in run.data.tags for run in trials)


@pytest.mark.parametrize("nth", [1, 2])
def test_what_is_asked_for_twice_is_there_once(
    nth: int,
    desk: Callable[[str], list[Any]],
    guarded_server: services.TrackingServer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The answer is lost to each kind of request that makes or deletes something, the nth time."""
    seen: collections.Counter[str] = collections.Counter()

    def fault(method: str, path: str, body: bytes) -> str:
        kind = method if method == "DELETE" else path.partition("?")[0].rpartition("/")[2]
        seen[kind] += 1
        return "lose" if kind in MAKERS and seen[kind] == nth else ""

    client = mlflow.MlflowClient(guarded_server.uri)
    with faulty(guarded_server.uri, fault) as uri:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        for _ in range(nth):
            with tracking.start("train") as run:
                model = run.log_model(_fitted(), np.zeros((1, 28, 28), np.uint8), 1)
                champion.register(run.client, model.uri, {}, run.id)
    assert MAKERS <= set(seen)
    assert len(desk("train")) == nth
    logged = client.search_logged_models([run.experiment_id])
    assert len(logged) == nth
    assert {one.status for one in logged} == {LoggedModelStatus.READY}
    mine = [one for one in champion.versions(client) if one.tags.get("registered_by") == run.id]
    assert [one.tags["model_uri"] for one in mine] == [model.uri]


def test_a_server_that_is_starting_is_waited_for(
    desk: Any, guarded_server: services.TrackingServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    first: Iterator[str] = iter(["refuse", "lose"])
    with faulty(guarded_server.uri, lambda *_: next(first, "")) as uri:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        tracking.connect()
    with faulty(guarded_server.uri, lambda *_: "refuse") as uri:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        monkeypatch.setattr(tracking, "PATIENCE", 1)
        with pytest.raises(UserError, match="the tracking server must answer, but .* gave 503"):
            tracking.connect()


def _texts(data: bytes) -> Iterator[bytes]:
    """What a file holds; of a zip, what its members hold."""
    yield data
    if zipfile.is_zipfile(io.BytesIO(data)):
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            for name in archive.namelist():
                yield from _texts(archive.read(name))


def test_no_secret_leaves_the_environment(
    desk: Callable[[str], list[Any]],
    guarded_server: services.TrackingServer,
    postgres: services.Postgres,
    s3: services.S3,
    data_options: dict[str, Any],
    add_member: Any,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    postgres.create("studies")
    monkeypatch.setenv("OPTUNA_STORAGE", postgres.url("studies"))
    for name, value in s3.environment.items():
        monkeypatch.setenv(name, value)
    secrets = {
        "MLFLOW_TRACKING_PASSWORD": guarded_server.password,
        "AWS_SECRET_ACCESS_KEY": s3.environment["AWS_SECRET_ACCESS_KEY"],
        "OPTUNA_STORAGE": postgres.password,
    }
    assert all(secret in os.environ[name] for name, secret in secrets.items())
    # The first trial fails: its error and its traceback are logged.
    add_member(models, "toy", toy(before="if params['steps'] == 3: raise RuntimeError('spoilt')"))
    options = data_options | SWEEP | {"model": "toy", "cpu_minutes": 60}
    monkeypatch.setenv("N_TRIALS", "4")
    command = [sys.executable, "-c", "import drivers; drivers.step()", *arguments(options)]
    done = subprocess.run(command, capture_output=True, timeout=200)
    assert done.returncode == 0, done.stderr.decode()
    (parent,) = desk("sweep")
    study = parent.data.tags["study"]
    places = {
        "database": [postgres.dump().encode()],
        "artifacts": list(s3.objects().values()),
        "output": [done.stdout, done.stderr],
        "folder": [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()],
    }
    # What is no secret is found in each of them, so that a secret would be.
    known = {"database": study, "artifacts": "spoilt", "output": "spoilt", "folder": "letters:***@"}
    for place, files in places.items():
        texts = [text for data in files for text in _texts(data)]
        assert any(known[place].encode() in text for text in texts), place
        for name, secret in secrets.items():
            assert not any(secret.encode() in text for text in texts), f"{name} is in the {place}"
