import contextlib
import errno
import json
import os
import platform
import re
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import pytest
from mlflow.store.tracking import sqlalchemy_store
from stores import CODE

from pipeline import tracking, views
from pipeline.spec import Dataset, UserError


def _only_run(store: mlflow.MlflowClient) -> Any:
    (run,) = store.search_runs(["0"])
    return run


def test_a_run_that_ends_well_is_finished_and_tagged(store: mlflow.MlflowClient) -> None:
    with tracking.start("train") as run:
        run.name("a name")
    ended = _only_run(store)
    assert (ended.info.status, ended.info.run_name) == ("FINISHED", "a name")
    # What a figure depends on beside its params is on every run.
    tags = ended.data.tags
    assert {"git_commit", "git_dirty", "versions", "cpu_model", "threads", "precision"} <= set(tags)
    assert f"mlflow={mlflow.__version__}" in tags["versions"]
    assert tags["step"] == "train"


X86 = "cpu family\t: {}\nmodel\t\t: {}\nmodel name\t: AMD EPYC\n\nmodel\t\t: 99\n"


@pytest.mark.parametrize(
    ("cpuinfo", "told"),
    [
        (X86.format(25, 1), "AMD EPYC (family 25, model 1)"),
        (X86.format(25, 17), "AMD EPYC (family 25, model 17)"),  # of one name, but another one
        ("processor\t: 0\nBogoMIPS\t: 243\n", platform.processor() or platform.machine()),  # ARM
    ],
)
def test_processors_of_one_name_are_told_apart(
    cpuinfo: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking, "CPUINFO", tmp_path / "cpuinfo")
    (tmp_path / "cpuinfo").write_text(cpuinfo)
    assert tracking.cpu_model() == told


def test_two_runs_may_be_the_first_of_a_data_set_at_once(
    store: mlflow.MlflowClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = Dataset(tmp_path, {"name": "letters", "digest": "0123456789ab", "counts": {}})
    found: list[str] = []

    def names() -> uuid.UUID:
        # MLflow has looked for the data set in vain and makes a name for it; another run is faster.
        if not found:
            found.append("other")
            with tracking.start("evaluate") as other:
                other.input(data, "test")
        return uuid.uuid4()

    with tracking.start("train") as run:
        monkeypatch.setattr(sqlalchemy_store, "uuid", SimpleNamespace(uuid4=names))
        run.input(data, "train")
    assert found
    for entity in store.search_runs(["0"]):
        (used,) = entity.inputs.dataset_inputs
        assert used.dataset.digest == data.digest


@pytest.mark.parametrize(
    ("error", "n_asked"), [("IncompleteRead(0 bytes read, 2 more expected)", 2), ("refused", 1)]
)
def test_half_an_answer_is_asked_for_again(
    error: str, n_asked: int, store: mlflow.MlflowClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, asked = mlflow.MlflowClient.log_batch, []

    def break_off(*given: Any, **named: Any) -> None:
        real(*given, **named)
        asked.append(named)
        if len(asked) == 1:
            raise mlflow.MlflowException(f"API request failed with exception {error}")

    with tracking.start("train") as run:
        monkeypatch.setattr(mlflow.MlflowClient, "log_batch", break_off)
        points = [tracking.Point(step, 1.0 + step, {"val_accuracy": 0.5}) for step in (1, 2)]
        again = contextlib.nullcontext() if n_asked == 2 else pytest.raises(mlflow.MlflowException)
        with again:
            run.write(points, params={"depth": 3}, tags={"state": "complete"})
        assert len(asked) == n_asked
        monkeypatch.undo()
    # Law: nothing is there twice.
    history = store.get_metric_history(run.id, "val_accuracy")
    assert [point.step for point in history] == [1, 2]
    assert store.get_run(run.id).data.params["depth"] == "3"


def test_half_an_answer_on_what_was_logged_is_asked_for_again(
    store: mlflow.MlflowClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def break_off(name: str) -> Callable[..., Any]:
        real = getattr(mlflow.MlflowClient, name)

        def ask(*given: Any, **named: Any) -> Any:
            asked.append(name)
            if asked.count(name) == 1:
                raise mlflow.MlflowException("API request failed with exception IncompleteRead(0)")
            return real(*given, **named)

        return ask

    with tracking.start("train") as run:
        monkeypatch.setattr(mlflow, "get_tracking_uri", lambda: "http://server")
        for name in ("search_logged_models", "get_run"):
            monkeypatch.setattr(mlflow.MlflowClient, name, break_off(name))
        assert (run._drop_half_made(), run._outputs()) == (0, [])
        assert asked == [*2 * ["search_logged_models"], *2 * ["get_run"]]
        monkeypatch.undo()


def test_an_experiment_gets_its_views_and_a_description_once(store: mlflow.MlflowClient) -> None:
    with tracking.start("train"):
        pass
    first = store.get_experiment("0").tags
    names = [json.loads(first[key])["name"] for key in views.tags()]
    assert names[0] == "Sweeps side by side"
    assert first["mlflow.note.content"] == views.DESCRIPTION
    # What a user writes there stays; a view that another version has left is made new.
    store.set_experiment_tag("0", "mlflow.note.content", "mine")
    store.set_experiment_tag("0", next(iter(views.tags())), "old")
    with tracking.start("train"):
        pass
    assert store.get_experiment("0").tags == first | {"mlflow.note.content": "mine"}


@pytest.mark.parametrize("faster", [True, False])
def test_two_may_make_the_views_at_once(
    faster: bool, store: mlflow.MlflowClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = mlflow.MlflowClient.set_experiment_tag

    def refused(client: mlflow.MlflowClient, *tag: Any) -> None:
        if faster:  # another process
            given(client, *tag)
        raise mlflow.MlflowException("UNIQUE constraint failed")

    monkeypatch.setattr(mlflow.MlflowClient, "set_experiment_tag", refused)
    expected = contextlib.nullcontext() if faster else pytest.raises(mlflow.MlflowException)
    with expected, tracking.start("train"):
        pass
    assert _only_run(store).info.status == ("FINISHED" if faster else "FAILED")


def test_views_show_what_runs_have() -> None:
    for value in views.tags().values():
        assert len(value) <= 5000  # more MLflow refuses
        view = json.loads(value)
        state = json.loads(view["state"])
        # Each column is one of a metric or a tag, and each chart belongs to a section.
        assert all(re.fullmatch(r"(metrics|tags)\.`\w+`", one) for one in state["selectedColumns"])
        sections = {section["uuid"] for section in state["compareRunSections"]}
        charts = state["compareRunCharts"]
        assert {chart["metricSectionId"] for chart in charts} <= sections
        assert len({chart["uuid"] for chart in charts}) == len(charts)


def test_a_run_that_raises_is_failed_with_its_traceback(store: mlflow.MlflowClient) -> None:
    with pytest.raises(ZeroDivisionError), tracking.start("train"):
        _ = 1 / 0
    ended = _only_run(store)
    assert ended.info.status == "FAILED"
    assert ended.data.tags["error"] == "ZeroDivisionError: division by zero"
    (artifact,) = store.list_artifacts(ended.info.run_id)
    assert artifact.path == "traceback.txt"


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_a_run_that_is_stopped_is_killed(
    error: type[BaseException], store: mlflow.MlflowClient
) -> None:
    with pytest.raises(error), tracking.start("sweep"):
        raise error
    assert _only_run(store).info.status == "KILLED"


def test_the_run_of_mlflow_run_is_adopted_once(
    store: mlflow.MlflowClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = store.create_run("0").info.run_id
    monkeypatch.setenv("MLFLOW_RUN_ID", given)
    with tracking.start("prep") as first, tracking.start("prep") as second:
        # The second run of the process is one of its own, as is a child run.
        assert first.id == given
        assert second.id != given
    with tracking.start("trial", parent=first) as child:
        pass
    assert store.get_run(child.id).data.tags["mlflow.parentRunId"] == given


def test_params_logged_by_mlflow_run_stay_as_they_were_typed(store: mlflow.MlflowClient) -> None:
    with tracking.start("train") as run:
        store.log_param(run.id, "learning_rate", "2e-3")
        # Logging 0.002 under the same name would be an error: params are immutable.
        run.params({"learning_rate": 0.002, "epochs": 10})
    assert _only_run(store).data.params == {"learning_rate": "2e-3", "epochs": "10"}


def test_an_experiment_is_made_by_name(
    store: mlflow.MlflowClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "handwriting")
    first, second = tracking.experiment_id(store), tracking.experiment_id(store)
    assert first == second != "0"
    assert store.get_experiment(first).name == "handwriting"


def test_runs_of_dead_processes_are_closed_by_the_next_step(store: mlflow.MlflowClient) -> None:
    """Whatever the step was, and whether its run was its own or one for another step."""
    with tracking.start("evaluate") as alive:
        dead = tracking.create(store, "train", None)
        tags = store.get_run(dead.id).data.tags
        store.set_tag(dead.id, "process", tags["process"].rpartition(" ")[0] + " 1")
        with tracking.start("prep"):
            assert store.get_run(dead.id).info.status == "KILLED"
            assert store.get_run(alive.id).info.status == "RUNNING"


@pytest.mark.parametrize("name", ["Default", "handwriting"])
def test_processes_that_make_a_store_at_once_do_not_break_it(name: str, tmp_path: Path) -> None:
    code = "from pipeline import tracking\nwith tracking.start('prep') as run: run.name('x')"
    environment = os.environ | {
        "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/new.db",
        "MLFLOW_EXPERIMENT_NAME": name,
        "PYTHONPATH": CODE,
    }
    command = [sys.executable, "-c", code]
    started = [
        subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE)
        for _ in range(4)
    ]
    for process in started:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors.decode()
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/new.db")
    experiment = client.get_experiment_by_name(name)
    assert experiment is not None
    found = client.search_runs([experiment.experiment_id])
    assert [run.info.status for run in found] == 4 * ["FINISHED"]


def test_an_unreachable_server_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    with pytest.raises(UserError, match="the tracking server must answer, but http://127.0.0.1:9"):
        tracking.connect()


@pytest.mark.parametrize("uri", ["./mlruns", "file:///mlruns", "foo://x", "http://[::1"])
def test_what_is_no_store_is_a_sentence(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    came = "what" if "[" in uri else repr(uri)
    rule = f"MLFLOW_TRACKING_URI must be an address that begins with .*, but {re.escape(came)}"
    with pytest.raises(UserError, match=rule):
        tracking.connect()


def _failed_sweep() -> None:
    with contextlib.suppress(KeyError), tracking.start("sweep") as run:
        run.tags({"model": "lstm", "dataset_digest": "aaaa"})
        raise KeyError


def test_latest_sweeps_are_one_a_model_and_of_one_data_set(store: mlflow.MlflowClient) -> None:
    with pytest.raises(UserError, match="a finished sweep is needed first"):
        tracking.latest_sweeps(store, "latest")
    ids = {}
    for number, (model, digest) in enumerate(
        [("cnn", "aaaa"), ("knn", "aaaa"), ("cnn", "bbbb"), ("cnn", "aaaa")]
    ):
        with tracking.start("sweep") as run:
            run.tags({"model": model, "dataset_digest": digest})
        ids[number] = run.id
        time.sleep(0.005)  # times are in milliseconds
    _failed_sweep()
    # The last one's data set, the latest of each model; a sweep that failed does not count.
    found = {
        model: run.info.run_id for model, run in tracking.latest_sweeps(store, "latest").items()
    }
    assert found == {"cnn": ids[3], "knn": ids[1]}
    found = {model: run.info.run_id for model, run in tracking.latest_sweeps(store, "bbbb").items()}
    assert found == {"cnn": ids[2]}
    # One that was interrupted, and is continued in its run, is the last as well.
    with tracking.start("sweep", again=store.get_run(ids[2])):
        pass
    found = {
        model: run.info.run_id for model, run in tracking.latest_sweeps(store, "latest").items()
    }
    assert found == {"cnn": ids[2]}


def test_a_table_is_read_as_it_was_logged(store: mlflow.MlflowClient) -> None:
    frame = pd.DataFrame({"guess": ["N", "NA", "nan"], "share": [0.5, np.nan, 1.0], "n": [1, 2, 3]})
    with tracking.start("train") as run:
        run.csv("table.csv", frame)
        found = run.read_csv(run.id, "table.csv")
        # Words stay words, also those that pandas takes for missing values.
        pd.testing.assert_frame_equal(found, frame)
        assert run.read_csv(run.id, "other.csv") is None


def test_an_unknown_run_id_is_a_sentence(store: mlflow.MlflowClient) -> None:
    with pytest.raises(UserError, match="run_id must name a run"):
        tracking.get_run(store, "0123")


@pytest.mark.parametrize(
    "uri",
    [
        "http://127.0.0.1:5000/@mlflow",
        "postgresql+psycopg2://letters@10.0.0.5:5432/mlflow?application_name=me@here",
        "sqlite:////srv/a:b@c/mlflow.db",
    ],
)
def test_an_address_that_holds_no_password_is_taken(uri: str) -> None:
    tracking._check(uri)


def test_a_full_disk_is_not_taken_for_a_model_that_is_gone() -> None:
    with pytest.raises(UserError, match=r"^the rule gave: no such file: the cure$"):
        with tracking.readable("the rule", "the cure"):
            raise OSError("no such file\nat all")
    with pytest.raises(OSError, match="No space"), tracking.readable("the rule", "the cure"):
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_name_that_a_database_may_refuse_is_shortened(store: mlflow.MlflowClient) -> None:
    with tracking.start("compare") as run:
        run.name("KNN 98.0% · " * 40)
    name = store.get_run(run.id).info.run_name
    assert (len(name), name[:11], name[-1]) == (250, "KNN 98.0% ·", "…")


def test_requirements_are_exact_and_name_what_is_installed() -> None:
    numpy, tensorflow = tracking.requirements(("numpy", "tensorflow"))
    assert numpy == f"numpy=={tracking.version('numpy')}"
    assert tensorflow.split("==")[0] in ("tensorflow", "tensorflow-cpu")


def test_a_markdown_table_is_padded() -> None:
    table = tracking.markdown(["a", "b"], [[1, "long"], [22, "x"]])
    assert table.splitlines() == [
        "| a  | b    |",
        "| -- | ---- |",
        "| 1  | long |",
        "| 22 | x    |",
    ]
