import json
from typing import Any

import mlflow
import numpy as np
import pytest
from mlflow.models import Model
from steps import arguments, artifacts, runs

from pipeline import train
from pipeline.spec import Dataset, UserError


def test_a_run_holds_all_that_a_reader_needs(
    store: mlflow.MlflowClient, data_options: dict[str, Any]
) -> None:
    options = data_options | {
        "model": "knn",
        "seed": 3,
        "precision": "auto",
        "n_neighbors": 3,
        "blur": "1e0",
    }
    train.main(arguments(options))
    (run,) = runs(store, "train")
    data = Dataset.open(next(data_options["data_dir"].glob("emnist_letters-*")))
    assert run.info.status == "FINISHED"
    # Given and default hyperparameters, the model's name and the seed.
    assert run.data.params["n_neighbors"] == "3"
    assert run.data.params["weights"] == "distance"
    assert (run.data.params["model"], run.data.params["seed"]) == ("knn", "3")
    # Accuracy by step, and the costs.
    history = store.get_metric_history(run.info.run_id, "val_accuracy")
    assert [metric.step for metric in history] == list(range(1, 11))
    costs = {"cpu_seconds", "fit_cpu_seconds", "wall_seconds", "peak_rss_mb", "model_mb"}
    overhead = {name for name in run.data.metrics if name.startswith("overhead")}
    assert set(run.data.metrics) == {"val_accuracy"} | costs | overhead
    assert "overhead/tracking_cpu_seconds" in overhead
    assert all(run.data.metrics[name] > 0 for name in costs)
    # The data set by our digest, which is of all its content.
    assert run.inputs.dataset_inputs[0].dataset.digest == data.digest
    # Letters that were read anew have a run of their own, which finished.
    assert [run.info.status for run in runs(store, "prep")] == ["FINISHED"]
    assert artifacts(store, run.info.run_id) == {"learning_curve.png", "input_example.png"}


def test_the_logged_model_has_signature_example_and_pinned_requirements(
    store: mlflow.MlflowClient, data_options: dict[str, Any]
) -> None:
    train.main(arguments(data_options | {"model": "knn", "seed": 0, "precision": "auto"}))
    (run,) = runs(store, "train")
    uri = run.data.tags["model_uri"]
    info = Model.load(uri)
    (letters,), (probabilities,) = info.signature.inputs.inputs, info.signature.outputs.inputs
    assert (letters.type, letters.shape) == (np.dtype("uint8"), (-1, 28, 28))
    assert (probabilities.type, probabilities.shape) == (np.dtype("float32"), (-1, 26))
    # The example is a letter of each kind, and the model answers it.
    folder = mlflow.artifacts.download_artifacts(uri)
    with open(f"{folder}/input_example.json") as file:
        example = np.array(json.load(file), np.uint8)
    assert example.shape == (26, 28, 28)
    assert mlflow.pyfunc.load_model(uri).predict(example).shape == (26, 26)
    with open(f"{folder}/requirements.txt") as file:
        assert all("==" in line for line in file.read().split())
    # The model carries the accuracy of its last step.
    logged = store.get_logged_model(uri.removeprefix("models:/"))
    measured = {metric.key: metric.value for metric in logged.metrics}
    assert measured["val_accuracy"] == run.data.metrics["val_accuracy"]


@pytest.mark.parametrize(
    ("wrong", "rule"),
    [
        ({"model": "mlp"}, "model must be one of cnn, knn, lstm, but 'mlp' came"),
        ({"n_neighbors": "51"}, "n_neighbors must be a whole number from 0 to 50"),
        ({"precision": "half"}, "precision must be auto, float32 or bfloat16, but 'half' came"),
        ({"precision": "bfloat16"}, "precision must be auto or float32 for knn"),
        ({"learning_rate": "0.1"}, "the hyperparameters of knn are n_neighbors"),
        ({"seed": "x"}, "seed must be a whole number"),
    ],
)
def test_bad_parameters_cost_no_run(
    wrong: dict[str, str], rule: str, store: mlflow.MlflowClient, data_options: dict[str, Any]
) -> None:
    with pytest.raises(UserError, match=rule):
        train.main(
            arguments(data_options | {"model": "knn", "seed": 0, "precision": "auto"} | wrong)
        )
    assert store.search_runs(["0"]) == []


def test_a_model_must_report(
    store: mlflow.MlflowClient, data_options: dict[str, Any], add_member: Any
) -> None:
    from pipeline import models

    add_member(models, "mute", "PARAMS = {}\ndef fit(*args): return None\n")
    with pytest.raises(RuntimeError, match="mute must report at least one step"):
        train.main(arguments(data_options | {"model": "mute", "seed": 0, "precision": "auto"}))
    assert [run.info.status for run in runs(store, "train")] == ["FAILED"]
