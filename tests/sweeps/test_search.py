from pathlib import Path

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


def test_importances_sum_to_one_and_find_what_matters(tmp_path: Path) -> None:
    study = search.open_study("a", SPACE, 0, tmp_path)
    assert search.importances(study) == {}
    for _ in range(20):
        trial = study.ask(fixed_distributions=DISTRIBUTIONS)
        study.tell(trial, trial.params["rate"])
    shares = search.importances(study)
    assert abs(sum(shares.values()) - 1) < 1e-6
    assert shares["rate"] > shares["depth"]
