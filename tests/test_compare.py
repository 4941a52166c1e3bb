"""``evaluate`` and ``compare``, after two sweeps of cheap models."""

import base64
import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import pytest
from pages import Reader
from PIL import Image
from steps import SWEEP, arguments, artifacts, gone, left_until, runs, toy
from stores import N_TRAIN, members, open_store

from pipeline import compare, evaluate, models, prep, registry, report
from pipeline.spec import LETTERS, Dataset, UserError
from sweeps import sweep
from sweeps.budget import own_cpu_seconds
from sweeps.engine import Engine


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
            minutes = (own_cpu_seconds() + 240) / 60
            options = SWEEP | {"model": model, "cpu_minutes": minutes}
            with pytest.MonkeyPatch.context() as bound:
                bound.setattr(Engine, "left", left_until(8))
                member = registry.load(models, "knn")
                bound.setattr(member, "PRIORS", [])  # kernels, of thousands of features each
                bound.setattr(member, "FIXED", member.FIXED | {"kernel_components": 0})
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


def _compare(data_dir: Path, **options: str) -> None:
    defaults = {"dataset_digest": "latest", "run_ids": "latest", "data_dir": data_dir}
    compare.main(arguments(defaults | options))


def _report(client: mlflow.MlflowClient) -> str:
    """The report of the last comparison."""
    uri = f"runs:/{runs(client, 'compare')[-1].info.run_id}/report.html"
    return str(mlflow.artifacts.load_text(uri))


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
    assert run.info.run_name == f"knn sweep on test · {metrics['test_accuracy']:.1%}"
    low, high = metrics["test_accuracy_low"], metrics["test_accuracy_high"]
    assert low < metrics["test_accuracy"] <= high  # they meet where all letters are right
    assert metrics["test_top2_accuracy"] >= metrics["test_accuracy"]
    assert {"test_calibration_error", "predict_us_per_letter", "model_mb"} <= set(metrics)
    figures = {"confusion_matrix.png", "calibration.png", "mistakes.png"}
    assert artifacts(swept, run.info.run_id) == figures | {"letters.csv", "predictions.csv"}
    # Each guess is kept, so that what comes after needs no labels.
    kept = pd.read_csv(
        mlflow.artifacts.download_artifacts(f"runs:/{run.info.run_id}/predictions.csv")
    )
    names = np.array(list(LETTERS))
    assert kept["letter"].tolist() == names[test.labels].tolist()
    assert kept["guess"].tolist() == names[guess.argmax(axis=1)].tolist()
    np.testing.assert_allclose(kept["confidence"], guess.max(axis=1), atol=1e-4)
    # Beside val_accuracy, where one compares sweeps, stands what test said.
    again = swept.get_run(knn.info.run_id)
    assert again.data.metrics["test_accuracy"] == metrics["test_accuracy"]
    assert "test_accuracy" in capsys.readouterr().out


@pytest.mark.usefixtures("undrawn")
def test_evaluate_takes_the_latest_run_with_a_model(
    swept: mlflow.MlflowClient, data_dir: Path
) -> None:
    _evaluate(data_dir, "latest")
    (run,) = runs(swept, "evaluate")
    assert run.data.tags["evaluated_run_id"] == runs(swept, "sweep")[-1].info.run_id


@pytest.mark.usefixtures("undrawn")
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
        assert row["cpu_seconds"] == sweeps[row["model"]].data.metrics["cpu_seconds"]
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


def test_compare_makes_a_report_and_pictures(
    swept: mlflow.MlflowClient, data_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _compare(data_dir)
    (run,) = runs(swept, "compare")
    assert artifacts(swept, run.info.run_id) == {
        "report.html",
        "comparison.csv",
        "comparison.md",
        "comparison.png",
        "best_so_far.png",
        "accuracy_by_latency.png",
        "accuracy_by_size.png",
        "recall_by_letter.png",
        "confusion_knn.png",
        "confusion_toy.png",
        "importance_knn.png",
        "importance_toy.png",
        "disagreements.png",
        "bills.png",
    }
    read = Reader(_report(swept))
    # The figures are those of the sweeps and of the evaluations.
    for sweep_run in runs(swept, "sweep"):
        assert sweep_run.info.run_id in read.text["runs"]
        assert f"{sweep_run.data.metrics['fit_cpu_seconds']:,.1f}" in read.text["bill"]
        assert f"{sweep_run.data.metrics['test_accuracy']:.2%}" in read.text["table"]
        assert f"{sweep_run.data.metrics['budget_cpu_seconds']:,.0f}" in read.text["bill"]
    # It is named where one looks: on the run's page, and in the terminal.
    assert "`report.html`" in run.data.tags["mlflow.note.content"]
    place = f"#/experiments/0/runs/{run.info.run_id}/artifacts/report.html"
    assert place in capsys.readouterr().out


@pytest.mark.usefixtures("undrawn")
def test_the_letters_that_are_shown_are_those_that_are_named(
    swept: mlflow.MlflowClient, data_dir: Path
) -> None:
    _compare(data_dir)
    html, (data,) = _report(swept), _data(data_dir)
    test = data.part("test")
    known = {image.tobytes(): LETTERS[label] for image, label in zip(*test, strict=True)}
    found = re.findall(r'base64,([^"]+)" width="84" height="84" alt="A handwritten (.)"', html)
    assert len(found) == report.N_PICTURES
    for png, letter in found:
        ink = 255 - np.asarray(Image.open(io.BytesIO(base64.b64decode(png))))
        assert known[ink.tobytes()] == letter


@pytest.mark.usefixtures("undrawn")
def test_compare_takes_the_runs_that_are_named(
    swept: mlflow.MlflowClient, data_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    knn, toy_run = runs(swept, "sweep")
    _compare(data_dir, run_ids=toy_run.info.run_id)
    assert "| TOY" in capsys.readouterr().out
    assert "nobody to disagree with" in _report(swept)
    # Two runs of one model are told apart by their ids; a trial is a single fit.
    trial = knn.data.tags["best_run_id"]
    _compare(data_dir, run_ids=f"{knn.info.run_id},{trial}")
    out = capsys.readouterr().out
    assert f"KNN {knn.info.run_id[:6]}" in out
    assert f"Not the winner of a sweep but a single fit: KNN {trial[:6]}." in out


@pytest.mark.usefixtures("undrawn")
def test_data_sets_of_different_digests_are_never_mixed(
    swept: mlflow.MlflowClient, data_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    knn, toy_run = runs(swept, "sweep")
    digest = knn.data.tags["dataset_digest"]
    swept.set_tag(toy_run.info.run_id, "dataset_digest", "0ther0ther00")
    both = f"{knn.info.run_id},{toy_run.info.run_id}"
    with pytest.raises(UserError) as error:
        _compare(data_dir, run_ids=both)
    # The sentence names the rule, the runs with their digests, and the cure.
    assert "models are compared on one data set, but 2 came" in str(error.value)
    assert f"({knn.info.run_id}) is on {digest}" in str(error.value)
    assert f"({toy_run.info.run_id}) is on 0ther0ther00" in str(error.value)
    assert "pass run_ids of one digest" in str(error.value)
    assert [run.info.status for run in runs(swept, "compare")] == ["FAILED"]
    assert artifacts(swept, runs(swept, "compare")[0].info.run_id) == {"traceback.txt"}
    with pytest.raises(
        UserError, match="dataset_digest must be that of the runs, but '0123456789ab'"
    ):
        _compare(data_dir, run_ids=knn.info.run_id, dataset_digest="0123456789ab")
    # Who is not there for that reason is named.
    _compare(data_dir, dataset_digest=digest)
    said = f"Not here: TOY, which was swept on other letters than {digest}."
    assert said in capsys.readouterr().out
    assert said in Reader(_report(swept)).text[""]


@pytest.mark.usefixtures("undrawn")
def test_compare_says_when_budgets_differ(
    swept: mlflow.MlflowClient, data_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    knn, toy_run = runs(swept, "sweep")
    swept.log_metric(knn.info.run_id, "budget_cpu_seconds", 300, step=99)
    swept.log_metric(toy_run.info.run_id, "budget_cpu_seconds", 60, step=99)
    _compare(data_dir)
    said = "The budgets differ (KNN 300, TOY 60 CPU-seconds)"
    assert said in capsys.readouterr().out
    assert said in runs(swept, "compare")[0].data.tags["mlflow.note.content"]
    assert said in Reader(_report(swept)).text[""]


@pytest.mark.usefixtures("undrawn")
def test_compare_never_asks_for_labels_of_test(
    swept: mlflow.MlflowClient, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _compare(data_dir)
    monkeypatch.setattr(evaluate, "evaluate", None)  # calling it would be a TypeError
    part = Dataset.part
    monkeypatch.setattr(Dataset, "part", lambda self, name: part(self, name)._replace(labels=None))
    _compare(data_dir)


@pytest.mark.usefixtures("undrawn")
def test_an_evaluation_that_kept_no_guesses_is_made_anew(
    swept: mlflow.MlflowClient, data_dir: Path
) -> None:
    knn, _ = runs(swept, "sweep")
    _evaluate(data_dir, knn.info.run_id)
    (run,) = runs(swept, "evaluate")
    folder = Path(run.info.artifact_uri.removeprefix("file://"))
    (folder / "predictions.csv").unlink()
    _compare(data_dir)
    assert len(runs(swept, "evaluate")) == 3


@pytest.mark.parametrize("run_ids", ["nothing", "nothing,else"])
def test_compare_of_unknown_runs_is_a_sentence(
    run_ids: str, store: mlflow.MlflowClient, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="run_id must name a run of the tracking store"):
        _compare(tmp_path, run_ids=run_ids)


@pytest.mark.usefixtures("undrawn")
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


def test_a_model_whose_files_are_gone_is_a_sentence(
    swept: mlflow.MlflowClient, data_dir: Path
) -> None:
    knn, _ = runs(swept, "sweep")
    with gone(knn.data.tags["model_uri"]):
        with pytest.raises(UserError, match=r"^a run's model must be there, but 'models:/") as e:
            _evaluate(data_dir, knn.info.run_id)
    assert len(str(e.value).splitlines()) == 1
    assert [run.info.status for run in runs(swept, "evaluate")] == ["FAILED"]


@pytest.mark.usefixtures("undrawn")
def test_a_model_is_evaluated_once_on_each_processor(
    swept: mlflow.MlflowClient, data_dir: Path
) -> None:
    knn, _ = runs(swept, "sweep")
    _evaluate(data_dir, knn.info.run_id)
    (elsewhere,) = runs(swept, "evaluate")
    swept.set_tag(elsewhere.info.run_id, "cpu_model", "another")
    # Law: what is compared was measured on one processor.
    for _ in range(2):
        _compare(data_dir, run_ids=knn.info.run_id)
        assert len(runs(swept, "evaluate")) == 2
    assert "different processors" not in _report(swept)


def test_evaluate_before_any_model_names_the_cure(store: mlflow.MlflowClient) -> None:
    with pytest.raises(UserError, match="run `mlflow run . -e train -P model=knn` first"):
        evaluate.main(["--run_id", "latest", "--data_dir", "data"])


def _data(data_dir: Path) -> list[Dataset]:
    return [Dataset.open(path) for path in data_dir.glob("emnist_letters-*")]
