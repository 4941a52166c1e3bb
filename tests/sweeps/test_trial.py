from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlflow
import optuna
import pytest

from pipeline import shared, tracking
from pipeline.spec import Dataset
from pipeline.train import Trained
from sweeps import trial
from sweeps.engine import Engine
from sweeps.trial import Referee

END = {
    "trial": 0,
    "end": {"whole": True, "model_uri": "models:/m-1"},
    "cpu_seconds": 12.0,
    "signal": 0,
    "over_budget": False,
}


@pytest.fixture(autouse=True)
def _quiet() -> None:
    optuna.logging.set_verbosity(optuna.logging.WARNING)


def _play(
    *costs: float,
    number: int = 0,
    lower: float = 0.0,
    overdraft: float = 0.0,
    shortened_after: int = 0,
) -> Referee:
    """A trial with a grant of 25, of which 2 are for logging, that has spent ``costs`` by step."""
    pruner = optuna.pruners.ThresholdPruner(lower=lower)
    study = optuna.create_study(direction="maximize", pruner=pruner)
    for _ in range(number):
        study.ask()
    referee = Referee(study.ask(), 25.0, 2.0, shortened_after)
    for step, cost in enumerate(costs, 1):
        report = {"step": step, "val_accuracy": 0.5, "cpu_seconds": cost, "bill": {"fit": cost}}
        if referee(report, overdraft):
            break
    return referee


@pytest.mark.parametrize(
    ("where", "said"), [({"letters": {}}, "Worker 9000"), ({"root": "data"}, None)]
)
def test_a_trial_of_a_cluster_says_on_which_processor_it_ran(
    where: dict[str, Any], said: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cpuinfo").write_text("model name : Worker 9000\n")
    monkeypatch.setattr(tracking, "CPUINFO", tmp_path / "cpuinfo")
    monkeypatch.setattr(
        mlflow, "set_tracking_uri", lambda uri: None
    )  # a trial's own process has it
    monkeypatch.setattr(shared, "fetch", lambda letters: None)
    monkeypatch.setattr(Dataset, "open", lambda root: None)
    monkeypatch.setattr(trial, "train", lambda *given: Trained(0.5, 1, True, "uri", {}, {}))
    spec = {"tracking_uri": "sqlite://", "run_id": "", "experiment_id": "", "model": "toy"}
    end = trial.body(spec | {"params": {}, "seed": 0} | where, lambda message: {})
    assert end.get("cpu_model") == said
    # Law: what is not known of where it ran leaves its run's tags as they are.
    tags: dict[str, str] = {}
    run: Any = SimpleNamespace(name=lambda text: None, close=lambda status: None)
    run.write = lambda points, params, **named: tags.update(named["tags"])
    study = optuna.create_study(direction="maximize")
    study.add_trial(optuna.trial.create_trial(value=0.5))
    driver: Any = SimpleNamespace(study=study, member=SimpleNamespace(PARAMS={}))
    driver.task = SimpleNamespace(model="toy")
    outcome = _play(5.0).outcome("run", END)
    Engine._close(driver, run, outcome, [], {}, {"cpu_model": end.get("cpu_model")})
    assert (tags.get("cpu_model"), tags["state"]) == (said, "complete")


def test_a_fit_inside_its_grant_goes_on() -> None:
    assert _play(5.0, 10.0, 15.0).state == "complete"


def test_a_step_that_would_not_fit_is_not_begun() -> None:
    # After 14 another step of 9 ends at 23, and 2 are left for logging; a step of 10 would not fit.
    assert _play(5.0, 14.0).state == "complete"
    referee = _play(4.0, 14.0, 24.0)
    assert referee.state == "over_budget"
    assert len(referee.curve) == 2


def test_a_step_that_the_fit_shortens_is_begun() -> None:
    # After 14 a whole step of 10 would not fit, one of a quarter does: it ends at 16.5 of 23.
    assert _play(4.0, 14.0, shortened_after=2).state == "complete"
    assert _play(4.0, 14.0, shortened_after=3).state == "over_budget"
    assert _play(2.0, 19.0, shortened_after=2).state == "over_budget"  # 4.25 more are too many


def test_what_the_sweep_needs_beside_a_trial_is_taken_from_its_grant() -> None:
    assert _play(5.0, 13.0, overdraft=2.0).state == "complete"  # 13 and 8 more: 21 of 21
    assert _play(5.0, 13.0, overdraft=2.1).state == "over_budget"


def test_a_first_step_that_was_given_up_costs_its_grant_at_least() -> None:
    end = {"over_budget": True, "error": "too dear"}
    given_up = _play().outcome("run", END | {"end": end, "over_budget": True})
    killed = _play().outcome("run", END | {"end": None, "signal": 9})
    assert (given_up.state, given_up.failure, given_up.error) == ("over_budget", None, "too dear")
    for outcome, first_step in ((given_up, 25.0), (killed, 12.0)):
        assert (outcome.val_accuracy, outcome.bill) == (None, {"lost": 12.0})
        assert outcome.first_step_cpu_seconds == first_step


def test_the_pruner_stops_a_trial_but_never_the_baseline() -> None:
    assert _play(1.0, number=1, lower=0.9).state == "pruned"
    assert _play(1.0, number=0, lower=0.9).state == "complete"


@pytest.mark.parametrize(
    ("event", "state", "failure"),
    [
        ({}, "complete", None),
        ({"end": {"whole": False, "model_uri": "models:/m-1"}}, "pruned", None),
        ({"end": {"whole": False, "model_uri": "models:/m-1"}}, "over_budget", None),
        ({"end": {"over_budget": True}, "over_budget": True}, "over_budget", None),
        ({"end": {"failure": "nan_loss", "error": "x"}}, "failed", "nan_loss"),
        ({"end": None, "signal": 9}, "killed", "killed"),
        ({"end": None, "signal": 9, "over_budget": True}, "over_budget", None),
    ],
)
def test_an_end_is_classified(event: dict[str, object], state: str, failure: str | None) -> None:
    outcome = _play(1.0, 3.0, number=1).outcome("run", END | event)
    if state == "pruned":
        outcome = _play(1.0, number=1, lower=0.9).outcome("run", END | event)
    assert (outcome.state, outcome.failure) == (state, failure)
    # What was reported counts, however it ended; the bill is the kernel's.
    assert outcome.val_accuracy == 0.5
    assert outcome.cpu_seconds == 12.0
    assert outcome.bill == {"fit": outcome.bill["fit"], "lost": 12.0 - outcome.bill["fit"]}
    assert outcome.first_step_cpu_seconds == 1.0
