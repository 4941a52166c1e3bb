"""Real ``mlflow run``s of every entry point, on a tiny archive, as a user types them."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import mlflow
import numpy as np
import pytest
from steps import alive, runs, toy, wait

from sweeps import processes

ROOT = Path(__file__).parent.parent
OUTSIDE = """
import sys, mlflow, numpy as np
answer = mlflow.pyfunc.load_model(sys.argv[1]).predict(np.zeros((3, 28, 28), np.uint8))
assert answer.shape == (3, 26) and answer.dtype == np.float32, (answer.shape, answer.dtype)
"""


class User:
    """Someone who types commands in a copy of the project."""

    def __init__(self, folder: Path, store: Path, archive: Path) -> None:
        self.project = folder / "project"
        ignored = shutil.ignore_patterns("__pycache__")
        for name in ("pipeline", "sweeps"):
            shutil.copytree(ROOT / name, self.project / name, ignore=ignored)
        for name in ("MLproject", "conda.yaml", "requirements.txt"):
            shutil.copy(ROOT / name, self.project)
        uri = f"sqlite:///{shutil.copy(store, folder)}"
        self.client = mlflow.MlflowClient(uri)
        self.environment = os.environ | {
            "MLFLOW_TRACKING_URI": uri,
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        }
        self.data = [f"archive={archive}", "n_train=520"]

    def start(self, entry_point: str, *parameters: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "mlflow", "run", ".", "--env-manager", "local"]
        command += ["-e", entry_point, *(word for pair in parameters for word in ("-P", pair))]
        return subprocess.Popen(
            command,
            cwd=self.project,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, entry_point: str, *parameters: str) -> tuple[int, str]:
        process = self.start(entry_point, *parameters)
        out, _ = process.communicate(timeout=240)
        return process.returncode, out

    def n_running(self) -> int:
        return len(self.client.search_runs(["0"], "attributes.status = 'RUNNING'"))


@pytest.fixture(scope="module")
def user(
    tmp_path_factory: pytest.TempPathFactory, fresh_store: Path, archive: Path
) -> Iterator[User]:
    """One user for the whole file: each step works on what those before it left."""
    return User(tmp_path_factory.mktemp("user"), fresh_store, archive)


def test_prep(user: User) -> None:
    code, out = user.run("prep", *user.data)
    assert code == 0, out
    assert "520 train, 260 val, 260 gate, 260 test letters" in out
    assert [run.info.status for run in runs(user.client, "prep")] == ["FINISHED"]


@pytest.mark.parametrize(
    ("model", "hyperparameters"),
    [("knn", ["n_neighbors=3"]), ("cnn", ["epochs=2", "filters=16"])],
)
def test_train_and_the_model_answers_outside_of_the_project(
    model: str, hyperparameters: list[str], user: User, tmp_path: Path
) -> None:
    code, out = user.run("train", f"model={model}", *user.data, *hyperparameters)
    assert code == 0, out
    run = runs(user.client, "train")[-1]
    # The run that mlflow run made is the one that holds everything.
    assert run.data.params["model"] == model
    assert run.data.params[hyperparameters[0].split("=")[0]] == hyperparameters[0].split("=")[1]
    assert run.data.tags["mlflow.project.entryPoint"] == "train"
    loaded = subprocess.run(
        [sys.executable, "-I", "-c", OUTSIDE, run.data.tags["model_uri"]],
        cwd=tmp_path,
        env=user.environment,
        capture_output=True,
        text=True,
    )
    assert loaded.returncode == 0, loaded.stderr


def test_sweep_of_a_model_and_data_set_that_are_one_file_each(user: User) -> None:
    (user.project / "pipeline/models/toy.py").write_text(toy().replace('("toys",)', "()"))
    source = (user.project / "pipeline/datasets/emnist_letters.py").read_text()
    (user.project / "pipeline/datasets/mine.py").write_text(source)
    code, out = user.run("sweep", "model=toy", "dataset=mine", *user.data, "cpu_minutes=0.3")
    assert code == 0, out
    (parent,), trials = runs(user.client, "sweep"), runs(user.client, "trial")
    assert parent.info.status == "FINISHED"
    assert parent.data.params["model"] == "toy"
    assert parent.data.tags["dataset"] == "mine"
    # Spent is what the kernel says, and no more than asked for.
    assert 0 < parent.data.metrics["cpu_seconds"] <= 18 + 2
    assert len(trials) >= 2
    assert {trial.info.status for trial in trials} == {"FINISHED"}


def test_evaluate(user: User) -> None:
    code, out = user.run("evaluate")
    assert code == 0, out
    assert "test_mean_precision_high" in out


def test_main_runs_every_step(user: User) -> None:
    code, out = user.run("main", *user.data, "models=knn", "cpu_minutes=0.3")
    assert code == 0, out
    # The last words are the table, and how to look at the runs.
    assert "| KNN " in out
    assert "look at the runs: `mlflow ui`" in out.strip().splitlines()[-2]
    assert [run.info.status for run in runs(user.client, "main")] == ["FINISHED"]
    assert user.client.get_model_version_by_alias("letters", "champion").tags["model"] == "knn"


def test_compare_and_promote(user: User) -> None:
    code, out = user.run("compare")
    assert code == 0, out
    assert "Mean Precision" in out
    # The champion itself is refused: the step says so and exits with 2, MLflow's own code is 1.
    code, out = user.run("promote")
    assert code == 1, out
    assert "refused: letters version 1 (knn) does not become the champion" in out
    assert "Traceback" not in out
    # MLflow marks the run FAILED for the exit code; it tells itself that it is a decision.
    refused = runs(user.client, "promote")[-1]
    assert refused.data.tags["decision"] == "refused"
    assert "error" not in refused.data.tags


@pytest.mark.parametrize(
    ("entry_point", "parameters", "rule"),
    [
        ("train", ["model=knn", "depth=3"], "the hyperparameters of knn are"),
        ("prep", ["archive=missing.zip"], "missing.zip"),
    ],
)
def test_bad_input_is_one_sentence_and_leaves_no_run_running(
    entry_point: str, parameters: list[str], rule: str, user: User
) -> None:
    code, out = user.run(entry_point, *parameters)
    assert code != 0
    (sentence,) = [line for line in out.splitlines() if line.startswith("error: ")]
    assert rule in sentence
    assert "Traceback" not in out
    assert user.n_running() == 0


def _start_sweep(user: User, seed: int) -> tuple[subprocess.Popen[str], int]:
    """A sweep that has begun its first trial: ``mlflow run``, and the pid of the step."""
    n_before = len(runs(user.client, "trial"))
    process = user.start("sweep", "model=knn", *user.data, "cpu_minutes=5", f"seed={seed}")
    deadline = time.monotonic() + 120
    while len(runs(user.client, "trial")) <= n_before and time.monotonic() < deadline:
        time.sleep(0.2)
    (step,) = [pid for pid in processes.tree(process.pid) if _command(pid)[:1] == ["python"]]
    return process, step


def _command(pid: int) -> list[str]:
    """The words of a process's command line; none where it has ended meanwhile."""
    with suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/cmdline").read_text().split("\0")
    return []


def test_a_step_that_is_terminated_leaves_no_run_running(user: User) -> None:
    process, step = _start_sweep(user, seed=1)
    os.kill(step, signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "stopped: the open runs are marked KILLED" in out
    assert runs(user.client, "sweep")[-1].info.status in ("KILLED", "FAILED")
    assert user.n_running() == 0


def test_a_step_ends_where_mlflow_run_is_killed(user: User) -> None:
    process, step = _start_sweep(user, seed=2)
    family = processes.tree(step)
    process.kill()
    process.communicate(timeout=60)  # until the last of them has closed its output
    assert wait(lambda: not any(map(alive, family)), 10)
    assert runs(user.client, "sweep")[-1].info.status == "KILLED"
    assert user.n_running() == 0


def test_an_unreachable_tracking_server_is_a_sentence(user: User) -> None:
    environment = user.environment | {"MLFLOW_TRACKING_URI": "http://127.0.0.1:9"}
    command = [sys.executable, "-m", "pipeline.compare", "--dataset_digest", "latest"]
    command += ["--run_ids", "latest", "--data_dir", "data"]
    done = subprocess.run(
        command, cwd=user.project, env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: the tracking server must answer")
    assert len(done.stderr.splitlines()) == 1


def test_the_champion_answers_letters(user: User) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", user.environment["MLFLOW_TRACKING_URI"])
        champion = mlflow.pyfunc.load_model("models:/letters@champion")
    answer = champion.predict(np.zeros((1, 28, 28), np.uint8))
    assert answer.shape == (1, 26)
