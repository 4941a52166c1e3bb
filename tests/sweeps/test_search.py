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
    study = search.create_study(name, SPACE, seed, str(folder))
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


def test_importances_sum_to_one_and_find_what_matters(tmp_path: Path) -> None:
    study = search.create_study("a", SPACE, 0, str(tmp_path))
    assert search.importances(study) == {}
    for _ in range(20):
        trial = study.ask(fixed_distributions=DISTRIBUTIONS)
        study.tell(trial, trial.params["rate"])
    shares = search.importances(study)
    assert abs(sum(shares.values()) - 1) < 1e-6
    assert shares["rate"] > shares["depth"]
