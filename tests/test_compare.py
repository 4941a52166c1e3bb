"""``evaluate`` and ``compare``, after two sweeps of cheap models."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import pytest
from steps import SWEEP, arguments, artifacts, runs, toy
from stores import N_TRAIN, members, open_store

from pipeline import compare, evaluate, models, prep
from pipeline.spec import Dataset, UserError
from sweeps import sweep
from sweeps.budget import own_cpu_seconds


@pytest.fixture(scope="module")
def store_with_sweeps(
    fresh_store: Path, archive: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Path]:
    """A tracking store with a sweep of KNN, and one of a toy model that is worse; and its data."""
    folder = tmp_path_factory.mktemp("swept")
    with pytest.MonkeyPatch.context() as patch, members(folder, patch) as add:
        open_store(fresh_store, folder, patch)
        add(models, "toy", toy().replace("quality * step / 5", "quality * step / 9"))
        for model in ("knn", "toy"):
            data = {"dataset": "emnist_letters", "archive": archive, "n_train": N_TRAIN}
            minutes = (own_cpu_seconds() + 20) / 60
            options = SWEEP | {"model": model, "cpu_minutes": minutes}
            sweep.main(arguments(data | options | {"data_dir": folder / "data"}))
        yield folder


@pytest.fixture
def swept(
    store_with_sweeps: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> mlflow.MlflowClient:
    """A client of a copy of that store, which this test alone uses."""
    return open_store(store_with_sweeps / "mlflow.db", tmp_path, monkeypatch)


@pytest.fixture
def data_dir(store_with_sweeps: Path) -> Path:
    return store_with_sweeps / "data"


def _compare(data_dir: Path) -> None:
    compare.main(arguments({"dataset_digest": "latest", "data_dir": data_dir}))


def _evaluate(data_dir: Path, run_id: str) -> None:
    evaluate.main(arguments({"run_id": run_id, "data_dir": data_dir}))


def test_evaluate_measures_the_logged_model_on_test(
    swept: mlflow.MlflowClient, data_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (knn, _), (data,) = runs(swept, "sweep"), _data(data_dir)
    _evaluate(data_dir, knn.info.run_id)
    (run,) = runs(swept, "evaluate")
    test = data.part("test")
    guess = mlflow.pyfunc.load_model(knn.data.tags["model_uri"]).predict(np.array(test.images))
    # The accuracy is that of the served model, inside of its interval.
    metrics = run.data.metrics
    assert metrics["test_accuracy"] == np.mean(guess.argmax(axis=1) == test.labels)
    low, high = metrics["test_accuracy_low"], metrics["test_accuracy_high"]
    assert low < metrics["test_accuracy"] <= high  # they meet where all letters are right
    assert metrics["test_top2_accuracy"] >= metrics["test_accuracy"]
    assert {"test_calibration_error", "predict_us_per_letter", "model_mb"} <= set(metrics)
    figures = {"confusion_matrix.png", "calibration.png", "mistakes.png"}
    assert artifacts(swept, run.info.run_id) == figures | {"letters.csv"}
    # Beside val_accuracy, where one compares sweeps, stands what test said.
    again = swept.get_run(knn.info.run_id)
    assert again.data.metrics["test_accuracy"] == metrics["test_accuracy"]
    assert "test_accuracy" in capsys.readouterr().out


def test_evaluate_takes_the_latest_run_with_a_model(
    swept: mlflow.MlflowClient, data_dir: Path
) -> None:
    _evaluate(data_dir, "latest")
    (run,) = runs(swept, "evaluate")
    assert run.data.tags["evaluated_run_id"] == runs(swept, "sweep")[-1].info.run_id


def test_compare_shows_the_sweeps_side_by_side(
    swept: mlflow.MlflowClient, data_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _compare(data_dir)
    (run,) = runs(swept, "compare")
    table = pd.read_csv(
        mlflow.artifacts.download_artifacts(f"runs:/{run.info.run_id}/comparison.csv")
    )
    sweeps = {sweep.data.tags["model"]: sweep for sweep in runs(swept, "sweep")}
    # A row a model, the best on top, each the figures of its sweep's own model.
    assert list(table["model"]) == ["knn", "toy"]
    assert table["test_accuracy"].is_monotonic_decreasing
    for row in table.to_dict("records"):
        assert row["run_id"] == sweeps[row["model"]].info.run_id
        assert row["sweep_cpu_seconds"] == sweeps[row["model"]].data.metrics["cpu_seconds"]
    # The deck's figure stands beside ours where the deck has one, marked as EMNIST's.
    assert table["deck_accuracy"].tolist()[0] == 0.83
    assert np.isnan(table["deck_accuracy"].tolist()[1])
    out, note = capsys.readouterr().out, run.data.tags["mlflow.note.content"]
    for column in ("Model", "Accuracy", "Mean Recall", "Mean Precision", "Deck, on EMNIST"):
        assert column in out
        assert column in note
    # A data set that is not EMNIST is named as such beside the figures.
    assert "tiny.zip (EMNIST's layout, not EMNIST)" in out
    assert "tiny.zip (EMNIST's layout, not EMNIST)" in note


def test_compare_evaluates_a_model_once(swept: mlflow.MlflowClient, data_dir: Path) -> None:
    _compare(data_dir)
    _compare(data_dir)
    assert len(runs(swept, "evaluate")) == 2
    assert len(runs(swept, "compare")) == 2


def test_compare_without_its_letters_names_the_cure(
    swept: mlflow.MlflowClient, data_dir: Path
) -> None:
    with pytest.raises(UserError, match="run `mlflow run . -e prep`"):
        _compare(data_dir / "gone")
    assert [run.info.status for run in runs(swept, "compare")] == ["FAILED"]


def test_a_run_without_a_model_is_a_sentence(
    store: mlflow.MlflowClient, data_options: dict[str, Any]
) -> None:
    prep.main(arguments(data_options))
    (without,) = runs(store, "prep")
    options = {"run_id": without.info.run_id, "data_dir": data_options["data_dir"]}
    with pytest.raises(UserError, match="run_id must name a run with a model"):
        evaluate.main(arguments(options))
    with pytest.raises(UserError, match="run_id must name a run of the tracking store"):
        evaluate.main(arguments(options | {"run_id": "0123"}))
    assert store.search_runs(["0"], "attributes.status = 'RUNNING'") == []


def test_evaluate_before_any_model_names_the_cure(store: mlflow.MlflowClient) -> None:
    with pytest.raises(UserError, match="run `mlflow run . -e train -P model=knn` first"):
        evaluate.main(["--run_id", "latest", "--data_dir", "data"])


def _data(data_dir: Path) -> list[Dataset]:
    return [Dataset.open(path) for path in data_dir.glob("emnist_letters-*")]
