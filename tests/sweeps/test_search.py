from pathlib import Path

import pytest
from optuna.distributions import FloatDistribution, IntDistribution

from pipeline.spec import Param
from sweeps import search

SPACE = {
    "depth": Param(2, IntDistribution(1, 9)),
    "rate": Param(0.1, FloatDistribution(0.01, 1.0, log=True)),
}
DISTRIBUTIONS = {name: param.distribution for name, param in SPACE.items()}


def _proposals(folder: Path, name: str, seed: int, n_trials: int = 15) -> list[dict[str, object]]:
    study = search.open_study(name, SPACE, seed, folder)
    for _ in range(n_trials):
        trial = study.ask(fixed_distributions=DISTRIBUTIONS)
        study.tell(trial, trial.params["rate"])
    return [trial.params for trial in study.trials]


def test_trial_0_is_the_defaults(tmp_path: Path) -> None:
    assert _proposals(tmp_path, "a", seed=0, n_trials=1) == [{"depth": 2, "rate": 0.1}]


def test_priors_come_next(tmp_path: Path) -> None:
    prior = {"depth": 7, "rate": 0.5}
    study = search.open_study("a", SPACE, 0, tmp_path, [prior])
    asked = [study.ask(fixed_distributions=DISTRIBUTIONS).params for _ in range(2)]
    assert asked == [{"depth": 2, "rate": 0.1}, prior]
    assert search.proposals(SPACE, 0, 2, [prior]) == asked


def test_the_seed_decides_what_is_proposed(tmp_path: Path) -> None:
    first = _proposals(tmp_path, "a", seed=0)
    assert _proposals(tmp_path, "b", seed=0) == first
    assert _proposals(tmp_path, "c", seed=1)[1:] != first[1:]


def test_a_continued_study_draws_other_trials_and_leaves_none_running(tmp_path: Path) -> None:
    first = _proposals(tmp_path, "a", seed=0, n_trials=3)
    search.open_study("a", SPACE, 0, tmp_path).ask(fixed_distributions=DISTRIBUTIONS)
    study = search.open_study("a", SPACE, 0, tmp_path)
    trial = study.ask(fixed_distributions=DISTRIBUTIONS)
    # The trial that was running has failed, and what comes now was not proposed before.
    assert [trial.state.name for trial in study.trials] == [*["COMPLETE"] * 3, "FAIL", "RUNNING"]
    assert trial.params not in [*first, study.trials[3].params]


def test_a_study_opens_behind_a_torn_line_and_a_lock_that_nobody_holds(tmp_path: Path) -> None:
    first = _proposals(tmp_path, "a", seed=0, n_trials=3)
    with (tmp_path / "optuna.journal").open("a") as file:
        file.write('{"op_code": 4, "wor')
    (tmp_path / "optuna.journal.lock").symlink_to("optuna.journal")
    assert _proposals(tmp_path, "a", seed=0, n_trials=1)[:3] == first
    # What was written since then can be read too.
    assert len(_proposals(tmp_path, "a", seed=0, n_trials=1)) == 5


def test_a_plan_sees_what_a_study_proposes_first(tmp_path: Path) -> None:
    assert search.proposals(SPACE, 0, 5) == _proposals(tmp_path, "a", seed=0, n_trials=5)


@pytest.mark.parametrize(
    ("n_steps", "expected"),
    [(1, 1.0), (2, 1 + 1 / 3), (3, 1 + 2 / 3), (10, 1 + 2 / 3 + 6 / 9 + 1 / 27)],
)
def test_one_trial_in_three_goes_on_at_each_rung(n_steps: int, expected: float) -> None:
    assert search.expected_steps(n_steps) == pytest.approx(expected)


def test_importances_sum_to_one_and_find_what_matters(tmp_path: Path) -> None:
    study = search.open_study("a", SPACE, 0, tmp_path)
    assert search.importances(study) == {}
    for _ in range(20):
        trial = study.ask(fixed_distributions=DISTRIBUTIONS)
        study.tell(trial, trial.params["rate"])
    shares = search.importances(study)
    assert abs(sum(shares.values()) - 1) < 1e-6
    assert shares["rate"] > shares["depth"]
