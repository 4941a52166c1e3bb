from collections.abc import Iterator

import optuna
import pytest

from sweeps.budget import Budget
from sweeps.trial import Referee


class Scripted(Budget):
    """A budget of 100 CPU-seconds whose meter shows one number after the other."""

    def __init__(self, *readings: float) -> None:
        super().__init__(100 / 60)
        self.readings: Iterator[float] = iter(readings)
        self.now = 0.0

    def spent(self) -> float:
        return self.now

    def tick(self) -> None:
        self.now = next(self.readings)


def _play(budget: Scripted, n_steps: int) -> Referee:
    study = optuna.create_study(pruner=optuna.pruners.NopPruner())
    referee = Referee(study.ask(), budget)
    for step in range(1, n_steps + 1):
        budget.tick()
        if referee(step, 0.5):
            break
    return referee


@pytest.fixture(autouse=True)
def _quiet() -> None:
    optuna.logging.set_verbosity(optuna.logging.WARNING)


def test_a_fit_inside_its_grant_goes_on() -> None:
    assert _play(Scripted(5.0, 10.0, 15.0), 3).state == "complete"


def test_a_step_that_would_not_fit_is_not_begun() -> None:
    # The grant is 25: after 20 another step of 10 would end at 30.
    referee = _play(Scripted(10.0, 20.0, 30.0), 3)
    assert referee.state == "over_budget"
    assert referee.steps == [0.0, 10.0, 20.0]


def test_the_pruner_stops_a_trial() -> None:
    study = optuna.create_study(
        direction="maximize", pruner=optuna.pruners.ThresholdPruner(lower=0.9)
    )
    budget = Scripted(1.0)
    referee = Referee(study.ask(), budget)
    budget.tick()
    assert referee(1, 0.5)
    assert referee.state == "pruned"
