from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import cast

import optuna
import pytest
from optuna.distributions import FloatDistribution, IntDistribution
from optuna.trial import TrialState

from pipeline.spec import Param, Params, UserError
from sweeps import search

SPACE = {
    "depth": Param(2, IntDistribution(1, 9)),
    "rate": Param(0.1, FloatDistribution(0.01, 1.0, log=True)),
}
PRIOR = {"depth": 7, "rate": 0.5}
MODEL = cast(ModuleType, SimpleNamespace(PARAMS=SPACE, PRIORS=[PRIOR]))


def _ask(study: optuna.Study) -> optuna.Trial:
    return search.ask(study, MODEL, {})


def _proposals(folder: Path, name: str, seed: int, n_trials: int = 15) -> list[dict[str, object]]:
    study = search.open_study(name, seed, folder)
    for _ in range(n_trials):
        trial = _ask(study)
        study.tell(trial, trial.params["rate"])
    return [trial.params for trial in study.trials]


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        ({}, None),
        ({"rate": Param(0.1, FloatDistribution(0.01, 9.0, log=True))}, None),  # a wider range
        ({"more": Param(0, IntDistribution(0, 1))}, None),
        ({"depth": Param(2, FloatDistribution(1, 9))}, "keep their kind .* in a depth was Int"),
        ({"depth": None}, "depth was IntDistribution.* and is gone: put that back in the model's"),
    ],
)
def test_a_study_goes_on_with_the_hyperparameters_that_it_began_with(
    change: dict[str, Param | None], rule: str | None, tmp_path: Path
) -> None:
    study = search.open_study("a", 0, tmp_path)
    study.tell(_ask(study), 0.5)
    space = {name: param for name, param in (SPACE | change).items() if param}
    if rule:
        with pytest.raises(UserError, match=rule):
            search.check_space(study, space)
    else:
        search.check_space(study, space)
        model = cast(ModuleType, SimpleNamespace(PARAMS=space))
        assert search.ask(study, model, {}).params.keys() == space.keys()


@pytest.mark.parametrize(
    ("has", "wanted", "fits"),
    [
        (None, "float32", True),
        ("float32", "auto", True),
        ("bfloat16", "bfloat16", True),
        ("bfloat16", "float32", False),
    ],
)
def test_a_study_keeps_its_precision(
    has: str | None, wanted: str, fits: bool, tmp_path: Path
) -> None:
    study = search.open_study("a", 0, tmp_path)
    if has:
        study.set_user_attr("precision", has)
    if fits:
        search.check_precision(study, wanted)
    else:
        with pytest.raises(UserError, match="one precision, but a has bfloat16 and float32 came"):
            search.check_precision(study, wanted)


def test_what_is_fixed_is_proposed_and_the_rest_is_searched(tmp_path: Path) -> None:
    study = search.open_study("a", 0, tmp_path)
    trials = [search.ask(study, MODEL, {"depth": 7}) for _ in range(4)]
    assert [trial.params["depth"] for trial in trials] == [7] * 4
    assert len({trial.params["rate"] for trial in trials}) == 4
    # Law: what was fixed for one trial is not fixed for the next.
    assert len({_ask(study).params["depth"] for _ in range(9)}) > 1


@pytest.mark.parametrize("after", [0, 4])  # trials: TPE's first ten are drawn at random
def test_no_set_is_proposed_twice_before_all_were(after: int, tmp_path: Path) -> None:
    space = {"depth": SPACE["depth"], "wide": Param(0, IntDistribution(0, 1))}
    space |= {"one": Param(0.5, FloatDistribution(0.5, 0.5))}
    small = cast(ModuleType, SimpleNamespace(PARAMS=space))
    study = search.open_study("a", 0, tmp_path)
    study.sampler = optuna.samplers.TPESampler(seed=0, n_startup_trials=after or 99)
    proposed = []
    for _ in range(18):
        trial = search.ask(study, small, {})
        proposed.append(tuple(trial.params.values()))
        if len(proposed) % 2:  # the others run on
            study.tell(trial, trial.params["depth"])
    assert len(set(proposed)) == 18
    # Law: where there is no other one, one comes again, and so does what has failed.
    again = search.ask(study, small, {})
    assert tuple(again.params.values()) in proposed
    study.tell(again, state=TrialState.FAIL)
    assert search.ask(study, small, again.params).params == again.params


def test_what_has_no_effect_has_its_default(tmp_path: Path) -> None:
    def unused(params: Params) -> set[str]:
        return {"rate"} if params["depth"] > 5 else set()

    model = cast(ModuleType, SimpleNamespace(PARAMS=SPACE, unused=unused))
    study = search.open_study("a", 0, tmp_path)
    proposed = []
    for _ in range(30):
        trial = search.ask(study, model, {})
        study.tell(trial, trial.params["rate"])
        proposed.append(trial.params)
    deep = [params for params in proposed if params["depth"] > 5]
    assert {params["rate"] for params in deep} == {0.1}
    assert len(deep) == len({params["depth"] for params in deep})  # none comes twice
    assert len(deep) < len({params["rate"] for params in proposed})
    # Law: what is fixed stays as it is.
    assert search.ask(study, model, PRIOR).params == PRIOR


def test_the_defaults_come_first_and_the_priors_next() -> None:
    first, second, third = search.proposals(MODEL, 0, 3, {})
    assert [first, second] == [{"depth": 2, "rate": 0.1}, PRIOR]
    assert third not in (first, second)
    assert [params["depth"] for params in search.proposals(MODEL, 0, 3, {"depth": 9})] == [9, 9, 9]


def test_later_trials_have_what_is_fixed_and_the_first_priors_late_values() -> None:
    member = SimpleNamespace(**vars(MODEL), FIXED={"depth": 3}, LATE=("rate",))
    assert search.screened(cast(ModuleType, member), 2) == {"depth": 3, "rate": 0.5}
    member.PRIORS = []
    assert search.screened(cast(ModuleType, member), 1) == {"depth": 3, "rate": 0.1}


def test_the_seed_decides_what_is_proposed(tmp_path: Path) -> None:
    first = _proposals(tmp_path, "a", seed=0)
    assert _proposals(tmp_path, "b", seed=0) == first
    assert _proposals(tmp_path, "c", seed=1)[1:] != first[1:]


def test_a_continued_study_draws_other_trials_and_leaves_none_running(tmp_path: Path) -> None:
    first = _proposals(tmp_path, "a", seed=0, n_trials=3)
    _ask(search.open_study("a", 0, tmp_path))
    study = search.open_study("a", 0, tmp_path)
    trial = _ask(study)
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


@pytest.mark.parametrize(
    ("n_steps", "expected"),
    [(1, 1.0), (2, 1 + 1 / 3), (3, 1 + 2 / 3), (10, 1 + 2 / 3 + 6 / 9 + 1 / 27)],
)
def test_one_trial_in_three_goes_on_at_each_rung(n_steps: int, expected: float) -> None:
    assert search.expected_steps(n_steps) == pytest.approx(expected)


def test_importances_sum_to_one_and_find_what_matters(tmp_path: Path) -> None:
    study = search.open_study("a", 0, tmp_path)
    assert search.importances(study, 0) == {}
    for _ in range(20):
        trial = _ask(study)
        study.tell(trial, trial.params["rate"])
    shares = search.importances(study, 0)
    assert abs(sum(shares.values()) - 1) < 1e-6
    assert shares["rate"] > shares["depth"]


def test_importances_are_those_of_what_was_proposed_and_of_one_length(tmp_path: Path) -> None:
    study = search.open_study("a", 0, tmp_path)
    for number in range(12):
        trial = search.ask(study, MODEL, {"depth": 3} if number > 1 else {"depth": 9})
        trial.set_user_attr("phase", "race" if number > 9 else "screen")
        study.tell(trial, trial.params["rate"] + 100 * (number < 2) + 100 * (number > 9))
    # Law: what only the known trials have had is not explained by them.
    assert set(search.importances(study, 2)) == {"rate"}
    assert search.importances(study, 11) == {}


@pytest.mark.parametrize(("phase", "stopped"), [("screen", True), ("race", False)])
def test_what_races_is_not_halved(phase: str, stopped: bool) -> None:
    study = optuna.create_study(pruner=search.Halving(), direction="maximize")
    found = []
    for value in (0.9, 0.8, 0.7, 0.1):
        trial = study.ask()
        trial.set_user_attr("phase", phase)
        trial.report(value, 1)
        found.append(trial.should_prune())
        study.tell(trial, value)
    assert found[0] is False  # the first is the best third of one
    assert found[-1] is stopped
