from typing import Any

import mlflow
import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from steps import arguments, artifacts, runs, toy

from pipeline import models
from pipeline.spec import Dataset, UserError
from sweeps import sweep
from sweeps.budget import Budget

FIGURES = {"optimisation_history.png", "parallel_coordinates.png", "hyperparameter_importance.png"}


@pytest.fixture
def eight_trials(monkeypatch: pytest.MonkeyPatch) -> None:
    """A budget that is spent after eight trials: this process's meter runs on from test to test."""
    left = iter([100.0] * 8 + [0.0])
    monkeypatch.setattr(Budget, "left", lambda self: next(left))
    monkeypatch.setattr(Budget, "grant", lambda self: 100.0)


def _sweep(options: dict[str, Any], **more: object) -> None:
    sweep.main(arguments(options | {"model": "toy", "seed": 0, "cpu_minutes": 10} | more))


@pytest.mark.usefixtures("eight_trials")
def test_every_trial_is_a_child_run_and_the_sweep_shows_the_best(
    store: mlflow.MlflowClient, data_options: dict[str, Any], add_member: Any
) -> None:
    add_member(models, "toy", toy())
    _sweep(data_options)
    (parent,), children = runs(store, "sweep"), runs(store, "trial")
    assert len(children) == 8
    for child in children:
        # A child run has params, the accuracy by step, a model and how it ended.
        assert child.data.tags["mlflow.parentRunId"] == parent.info.run_id
        assert child.info.status == "FINISHED"
        assert child.data.tags["state"] in ("complete", "pruned")
        assert {"quality", "steps", "seed"} <= set(child.data.params)
        assert mlflow.pyfunc.load_model(child.data.tags["model_uri"]) is not None
        assert "val_accuracy" in child.data.metrics
    # Trial 0 is the defaults; a pruned trial is among eight random ones.
    assert (children[0].data.params["quality"], children[0].data.params["steps"]) == ("0.5", "3")
    assert {child.data.tags["state"] for child in children} == {"complete", "pruned"}
    # The sweep's own run has the best value, its params and its model.
    best = max(children, key=lambda child: child.data.metrics["val_accuracy"])
    assert parent.info.status == "FINISHED"
    assert parent.data.metrics["val_accuracy"] == best.data.metrics["val_accuracy"]
    assert parent.data.params["quality"] == best.data.params["quality"]
    assert parent.data.tags["model_uri"] == best.data.tags["model_uri"]
    assert parent.data.metrics["n_trials"] == 8
    bill = [parent.data.metrics[f"{name}cpu_seconds"] for name in ("", "fit_", "overhead_")]
    assert bill[0] == pytest.approx(bill[1] + bill[2])
    assert artifacts(store, parent.info.run_id) == FIGURES | {"trials.csv"}
    # The study lies in the journal, under the name that the run's tag gives.
    journal = JournalStorage(JournalFileBackend(str(data_options["data_dir"] / "optuna.journal")))
    assert journal.get_study_id_from_name(parent.data.tags["study"]) == 0


@pytest.mark.usefixtures("eight_trials")
def test_one_failing_trial_does_not_end_the_sweep(
    store: mlflow.MlflowClient, data_options: dict[str, Any], add_member: Any
) -> None:
    add_member(models, "toy", toy(fails="> 0.8"))
    _sweep(data_options)
    children = runs(store, "trial")
    failed = [child for child in children if child.data.tags["state"] == "failed"]
    assert 0 < len(failed) < len(children) == 8
    for child in failed:
        assert child.info.status == "FAILED"
        assert child.data.tags["error"] == "ArithmeticError: no solution"
        assert "traceback.txt" in artifacts(store, child.info.run_id)
    assert [run.info.status for run in runs(store, "sweep")] == ["FINISHED"]


@pytest.mark.usefixtures("eight_trials")
def test_a_sweep_whose_first_trials_all_fail_stops_with_the_cause(
    store: mlflow.MlflowClient, data_options: dict[str, Any], add_member: Any
) -> None:
    add_member(models, "toy", toy(fails="> -1"))
    with pytest.raises(
        UserError, match="first 3 all failed, the last with 'ArithmeticError: no sol"
    ):
        _sweep(data_options)
    assert [run.info.status for run in runs(store, "trial")] == ["FAILED"] * 3
    assert [run.info.status for run in runs(store, "sweep")] == ["FAILED"]


def test_a_budget_that_pays_for_no_trial_says_how_much_would(
    store: mlflow.MlflowClient, data_options: dict[str, Any], add_member: Any
) -> None:
    add_member(models, "toy", toy())
    with pytest.raises(
        UserError, match="cpu_minutes must pay for start-up.*raise cpu_minutes above"
    ):
        _sweep(data_options, cpu_minutes=0.001)
    assert [run.info.status for run in runs(store, "sweep")] == ["FAILED"]


@pytest.mark.usefixtures("eight_trials")
def test_an_interrupt_leaves_no_run_running(
    store: mlflow.MlflowClient, data_options: dict[str, Any], add_member: Any
) -> None:
    source = toy().replace('raise ArithmeticError("no solution")', "raise KeyboardInterrupt")
    add_member(models, "toy", source.replace("< 0", "> 0.8"))
    with pytest.raises(KeyboardInterrupt):
        _sweep(data_options)
    children = runs(store, "trial")
    assert [run.info.status for run in runs(store, "sweep")] == ["KILLED"]
    assert (children[-1].info.status, children[-1].data.tags["state"]) == ("KILLED", "killed")
    assert store.search_runs(["0"], "attributes.status = 'RUNNING'") == []


@pytest.mark.usefixtures("eight_trials")
def test_a_sweep_reads_train_and_val_only(
    store: mlflow.MlflowClient,
    data_options: dict[str, Any],
    add_member: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    add_member(models, "toy", toy())
    read: set[str] = set()
    real = Dataset.part
    monkeypatch.setattr(Dataset, "part", lambda self, name: read.add(name) or real(self, name))
    _sweep(data_options)
    assert read == {"train", "val"}


@pytest.mark.parametrize(
    ("wrong", "rule"),
    [
        ({"cpu_minutes": "abc"}, "cpu_minutes must be a number, but 'abc' came"),
        ({"cpu_minutes": "0"}, "cpu_minutes must be a number above 0, but '0' came"),
        ({"cpu_minutes": "-3"}, "cpu_minutes must be a number above 0, but '-3' came"),
        ({"model": "svm"}, "model must be one of cnn, knn, lstm, but 'svm' came"),
        ({"n_train": "1e4"}, "n_train must be 'all' or a whole number"),
        ({"epochs": "3"}, "sweep knows the parameters .*, but 'epochs' came"),
    ],
)
def test_bad_parameters_cost_no_run(
    wrong: dict[str, str], rule: str, store: mlflow.MlflowClient, data_options: dict[str, Any]
) -> None:
    with pytest.raises(UserError, match=rule):
        _sweep(data_options, **({"model": "knn"} | wrong))
    assert store.search_runs(["0"]) == []
