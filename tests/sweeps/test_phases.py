"""Screen, race and confirm, with fits that cost and score what a formula says."""

import itertools
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, cast

import optuna
import pytest
from optuna.distributions import FloatDistribution, IntDistribution
from optuna.trial import TrialState

from pipeline.spec import Param, Params
from sweeps import phases, search
from sweeps.phases import (
    MARGIN,
    SCREEN_SHARE,
    SEARCH_SHARE,
    Growth,
    Phases,
    Proposal,
    growth,
    shares,
)
from sweeps.trial import RETRY_OF, Outcome

PRIOR = {"width": 4, "rate": 0.3, "dropout": 0.25, "epochs": 10, "n_letters": 0, "policy": 0}
MODEL = cast(
    ModuleType,
    SimpleNamespace(
        PARAMS={
            "width": Param(2, IntDistribution(1, 6)),
            "rate": Param(0.1, FloatDistribution(0.0, 1.0)),
            "dropout": Param(0.0, FloatDistribution(0.0, 0.5)),
            "epochs": Param(10, IntDistribution(1, 30)),
            "n_letters": Param(0, IntDistribution(0, 1000)),
            "policy": Param(0, IntDistribution(0, 1)),
        },
        PRIORS=[PRIOR],
        LATE=("dropout",),
        STEPS="epochs",
        SCREEN={"epochs": 1, "n_letters": 100},
    ),
)
# Its fits have no length; a short one is on fewer letters.
AT_ONCE = cast(
    ModuleType,
    SimpleNamespace(
        PARAMS={name: param for name, param in MODEL.PARAMS.items() if name != "epochs"},
        PRIORS=[{name: value for name, value in PRIOR.items() if name != "epochs"}],
        SCREEN={"n_letters": 100},
    ),
)
GROWTH = Growth(n_train=400, n_short=100, looks=50.0)  # a whole epoch costs 3 of the screen's
EXTRA = 2.0  # CPU-seconds of a trial beside its steps


@pytest.fixture
def journal() -> None:
    """Studies lie on disk, as those of sweeps do: for a test that opens one again."""


@pytest.fixture(autouse=True)
def in_memory(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other studies are in memory: the disk takes most of the time."""
    if "journal" not in request.fixturenames:
        storage = optuna.storages.InMemoryStorage()
        monkeypatch.setattr(search, "open_storage", lambda name, folder: storage)


def step(params: Params) -> float:
    """CPU-seconds of an epoch."""
    share = ((params["n_letters"] or GROWTH.n_train) + GROWTH.looks) / 450
    return (2.0 + float(params["width"])) * share


def accuracy(params: Params, seed: int) -> float:
    seen = params.get("epochs", 1) * (params["n_letters"] or GROWTH.n_train) / GROWTH.n_short
    error = (0.5 + abs(params["rate"] - 0.3)) / (1 + params["width"]) / seen**0.5
    return 1 - 0.5 * error - 0.001 * seed


class Driver:
    """Runs trials one after the other, as the engine does with one worker."""

    def __init__(
        self, folder: Path, total: float, seed: int = 0, model: ModuleType = MODEL
    ) -> None:
        self.study = search.open_study("a", seed, folder, getattr(model, "STEPS", None))
        self.outcomes = search.past_outcomes(self.study)
        self.phases = Phases(self.study, model, seed, total, self.outcomes, {"policy": 1}, GROWTH)
        self.total = total
        self.proposals: list[Proposal] = []

    def left(self) -> float:
        return self.total - sum(outcome.cpu_seconds for outcome in self.outcomes)

    def ask(self) -> Proposal | None:
        proposal = self.phases.next(self.left(), 12.0)
        if proposal:
            assert proposal.grant <= self.left() + 1e-9
            self.proposals.append(proposal)
        return proposal

    def end(
        self, proposal: Proposal, state: str = "complete", value: bool = True, dear: float = 0.0
    ) -> None:
        params, number = proposal.trial.params, proposal.trial.number
        done = params.get("epochs", 1) if state == "complete" else 1
        fit = dear or step(params) * done
        found = accuracy(params, proposal.seed) if value else None
        found = 0.999 if dear else found
        if found is not None:
            proposal.trial.report(found, done)
        outcome = Outcome(
            number=number,
            state=state,
            val_accuracy=found,
            bill={"fit": fit, "tracing": EXTRA},
            first_step_cpu_seconds=step(params) + EXTRA,
            logging_cpu_seconds=0.1,
            spent={},
            run_id=str(number),
            model_uri=None if state == "failed" else f"models:/{number}",
            failure="error" if state == "failed" else None,
            error=None,
            found={},
        )
        search.tell(self.study, proposal.trial, outcome)
        self.outcomes.append(outcome)

    def run(self, ends: Callable[[Proposal], dict[str, Any]] = lambda proposal: {}) -> None:
        while proposal := self.ask():
            self.end(proposal, **ends(proposal))

    def first_racer_fails(self, proposal: Proposal) -> dict[str, Any]:
        """What ``run`` takes."""
        return {"state": "failed"} if proposal == (self.of("race") or [None])[0] else {}

    def of(self, phase: str) -> list[Proposal]:
        return [proposal for proposal in self.proposals if proposal.phase == phase]


def late(params: Params) -> Params:
    return {name: value for name, value in params.items() if name not in MODEL.SCREEN}


def test_the_screen_begins_with_the_defaults_and_the_priors(tmp_path: Path) -> None:
    driver = Driver(tmp_path, 1000)
    driver.run()
    first, second, *others = [proposal.trial.params for proposal in driver.of("screen")]
    assert first == {"width": 2, "rate": 0.1, "dropout": 0.0, "policy": 1} | MODEL.SCREEN
    assert second == PRIOR | MODEL.SCREEN | {"policy": 1}
    # Law: each is a short fit; what that does not tell is the first prior's.
    assert {(params["epochs"], params["n_letters"]) for params in others} == {(1, 100)}
    assert {params["dropout"] for params in others} == {0.25}
    assert len({params["rate"] for params in others}) == len(others)


@pytest.mark.parametrize("total", [150, 300, 1200, 3600])
def test_a_budget_is_screened_raced_and_confirmed(tmp_path: Path, total: float) -> None:
    driver = Driver(tmp_path, total)
    driver.run()
    begun = [proposal.phase for proposal in driver.proposals]
    # Law: in this order, and each trial once.
    assert begun == sorted(begun, key=["screen", "race", "confirm"].index)
    numbers = {proposal.trial.number for proposal in driver.of("screen")}
    screened = [one for one in driver.outcomes if one.number in numbers]
    assert (
        SCREEN_SHARE * total
        <= sum(one.cpu_seconds for one in screened)
        <= SCREEN_SHARE * total + max(one.cpu_seconds for one in screened)
    )
    # Law: whole fits use what is left, as far as fits of their length do.
    longest = max(one.cpu_seconds for one in driver.outcomes)
    assert 0 <= driver.left() < max((1 - MARGIN) * total, longest)
    # Law: what races was screened; the first promises the least error for its grant.
    racing = driver.of("race")

    def promised(one: Outcome) -> float:
        n_steps, n_letters = driver.phases._length(one, racing[0].grant)
        seen = n_steps * (n_letters or 400) / 100
        is_prior = "prior" in driver.study.trials[one.number].user_attrs
        doubt = 1.0 if is_prior else phases.DOUBT
        return doubt * (1 - (one.val_accuracy or 0)) * (0.3 + 0.7 * seen**-0.65)

    best = min(screened, key=promised)
    assert late(racing[0].trial.params) == late(driver.study.trials[best.number].params)
    # Law: longer, and on all letters or on more than in the screen.
    for proposal in racing:
        assert proposal.trial.params["epochs"] > 1
        assert not 0 < proposal.trial.params["n_letters"] <= 100
    # Law: nothing races twice, as long as there are others.
    assert len({one.trial.user_attrs["screened"] for one in racing}) == len(racing)


def test_a_fit_that_shortens_itself_is_planned_with_its_whole_grant(tmp_path: Path) -> None:
    driver = Driver(tmp_path, 1200)
    driver.phases.member = cast(ModuleType, SimpleNamespace(**vars(MODEL)))
    driver.phases.member.PARAMS = MODEL.PARAMS | {"late_letters": Param(0, IntDistribution(0, 400))}
    driver.run()
    first = driver.of("race")[0]
    spent = EXTRA + step(first.trial.params) * first.trial.params["epochs"]
    assert first.grant - step(first.trial.params) < spent <= first.grant


def screened(accuracy: float, short: float) -> Outcome:
    """A short fit of so many CPU-seconds."""
    bill = {"fit": short, "tracing": EXTRA}
    return Outcome(0, "complete", accuracy, bill, short, 0.1, {}, "0", "models:/0", None, None, {})


@pytest.mark.parametrize(
    ("n_affordable", "length"),
    [
        (0.2, (0, 0)),  # of 450, which is 40 letters and a look: fewer than the screen has
        (0.5, (2, 62)),
        (1.0, (2, 175)),  # at half of one epoch no fit can see what it costs
        (1.5, (2, 287)),
        (3.05, (3, 0)),  # 4 epochs of 293 are fewer than 3 of 400
        (3.8, (4, 377)),
        (29.5, (29, 0)),  # not worth the letters that it would leave out
        (30.9, (30, 0)),  # the longest fit that the model allows
    ],
)
def test_few_steps_are_on_as_many_letters_as_the_grant_pays_for(
    tmp_path: Path, n_affordable: float, length: tuple[int, int]
) -> None:
    driver, short = Driver(tmp_path, 1200), 4.0
    one = screened(0.8, short)
    grant = (n_affordable * GROWTH.cost * short + EXTRA) / MARGIN + 1e-6
    found = driver.phases._length(one, grant)
    assert found == length
    # Law: what it is planned to cost, with a look at val after each step, is in its grant.
    letters = found.n_steps * ((found.n_letters or GROWTH.n_train) + GROWTH.looks)
    assert EXTRA + letters / 150 * short <= MARGIN * grant + 1e-6


def test_what_pays_for_no_whole_step_races_on_some_letters(tmp_path: Path) -> None:
    driver = Driver(tmp_path, 60)
    while (last := driver.ask()) and last.phase == "screen":
        driver.end(last, dear=5.0)  # a whole epoch of which takes 15
    assert last is not None
    params = last.trial.params
    assert params["epochs"] * params["n_letters"] > 100
    # Law: it is planned for what its grant pays, by what the screen's 100 letters cost.
    planned = 5.0 * params["epochs"] * (params["n_letters"] + GROWTH.looks) / 150
    assert EXTRA + planned <= MARGIN * last.grant + 1e-6


def test_the_winner_is_trained_again_under_other_seeds(tmp_path: Path) -> None:
    driver = Driver(tmp_path, 3600, seed=5)
    driver.run()
    confirming = driver.of("confirm")
    assert [proposal.seed for proposal in confirming] == [6, 7]
    winner = driver.phases.winner()
    assert winner is not None
    params = driver.study.trials[winner.number].params
    assert [proposal.trial.params for proposal in confirming] == [params, params]
    fits = driver.phases.confirmed()
    assert [one.number for one in fits] == [
        winner.number,
        *(one.trial.number for one in confirming),
    ]
    # Law: nothing in the race has done better.
    racing = {proposal.trial.number for proposal in driver.of("race")}
    values = [one.val_accuracy for one in driver.outcomes if one.number in racing]
    assert winner.val_accuracy == max(values)


def test_a_seed_that_fails_is_not_tried_again(tmp_path: Path) -> None:
    driver = Driver(tmp_path, 3600, seed=2**32 - 2)
    driver.run(lambda one: {"state": "failed"} if one.phase == "confirm" else {})
    # Law: each seed once, all of them seeds that a fit can have.
    assert [proposal.seed for proposal in driver.of("confirm")] == [2**32 - 1, 0]
    winner = driver.phases.winner()
    assert driver.phases.confirmed() == [winner]


@pytest.mark.parametrize(
    ("n_train", "screen", "n_short", "cost"),
    [
        (400, MODEL.SCREEN, 100, (400 + 10.8) / (100 + 10.8)),
        (80, MODEL.SCREEN, 80, 1.0),  # fewer than a short fit would see
        (400, {"epochs": 1}, 400, 1.0),  # which sees all
    ],
)
def test_a_step_on_all_letters_is_dearer_than_one_of_the_screen(
    n_train: int, screen: Params, n_short: int, cost: float
) -> None:
    counts = {"train": n_train, "val": 40}
    data: Any = SimpleNamespace(part=lambda name: SimpleNamespace(labels=[0] * counts[name]))
    member: Any = SimpleNamespace(**{**vars(MODEL), "SCREEN": screen})
    # A letter of val costs a quarter of what one that is trained on does.
    found = growth(member, data)
    assert found == pytest.approx((n_train, n_short, 10.8, 0.0))
    assert found.cost == pytest.approx(cost)


@pytest.mark.parametrize(("better", "first"), [(1.15, "prior"), (1.25, "proposed")])
def test_a_prior_races_before_what_is_hardly_better(
    better: float, first: str, tmp_path: Path
) -> None:
    driver = Driver(tmp_path, 3600)
    screened = []
    for number in range(3):
        proposal = driver.ask()
        assert proposal is not None
        if number == 1:  # its worker dies: it is the prior all the same when it is tried again
            driver.end(proposal, "failed")
            driver.phases.retry(proposal.trial.number, proposal.grant)
            proposal = driver.ask()
            assert proposal is not None
        driver.end(proposal)
        screened.append(driver.outcomes[-1]._replace(bill={"fit": 3.0, "tracing": EXTRA}))
    errors = {"default": 0.3, "prior": 0.2, "proposed": 0.2 / better}
    found = {
        name: one._replace(val_accuracy=1 - error)
        for one, (name, error) in zip(screened, errors.items(), strict=True)
    }
    ordered = [one for _, one in driver.phases._promising(list(found.values()), 300.0)]
    assert ordered[0] is found[first]
    assert ordered[-1] is found["default"]


def test_a_last_look_at_copies_costs_a_whole_fit_so_many_more() -> None:
    tta = Param(1, IntDistribution(1, 5))
    member: Any = SimpleNamespace(
        PARAMS=MODEL.PARAMS | {"tta": tta}, STEPS="epochs", SCREEN=MODEL.SCREEN | {"tta": 1}
    )
    data: Any = SimpleNamespace(part=lambda name: SimpleNamespace(labels=[0] * 400))
    assert growth(member, data).extra == 0
    member.FIXED = {"tta": 5}  # of whole fits; those of the screen have one
    assert search.screened(member, 0)["tta"] == 1
    assert search.whole(member) == {"n_letters": 0, "tta": 5}
    assert growth(member, data).extra == pytest.approx(4 * 108 / (100 + 108))


def test_what_a_whole_fit_costs_beside_its_steps_is_planned_with(tmp_path: Path) -> None:
    driver = Driver(tmp_path, 900)
    driver.run()
    one, lengths = driver.outcomes[0], []
    for last in (0.0, 450.0):  # three steps of the screen
        driver.phases.growth = GROWTH._replace(last=last)
        lengths.append(driver.phases._length(one, 100.0))
        step, extra = driver.phases._costs(one)
        n_affordable = (MARGIN * 100.0 - extra) / step
        assert lengths[-1].n_steps in (int(n_affordable), int(n_affordable) + 1)
    shorter, longer = (driver.phases._seen(*length) for length in reversed(lengths))
    assert shorter < longer


def test_a_small_budget_has_one_whole_fit_and_a_large_one_more_and_longer() -> None:
    budgets = (200, 700, 900, 1800, 3000)
    plans = [shares(left, 25.0, 3.0, 30) for left in budgets]
    found = [(plan.n_racing, plan.n_confirming) for plan in plans]
    # Law: a winner has three seeds or one; two tell no spread.
    assert found == [(1, 0), (2, 0), (1, 2), (1, 2), (2, 2)]
    lengths = [plan.cpu_seconds for plan in plans]
    assert lengths[:2] == sorted(lengths[:2])
    assert lengths[2:] == sorted(lengths[2:])
    assert lengths[2] >= 12 * 25  # which is why there are three, not two
    for plan, left in zip(plans, budgets, strict=True):
        assert (plan.n_racing + plan.n_confirming) * plan.cpu_seconds == pytest.approx(left)
    # Law: no fit gets more than the steps that it may do, however large the budget.
    for n_rivals in (1, 10_000):
        assert shares(100_000, 1.0, 3.0, 30, n_rivals).cpu_seconds <= 1.1 * (30 + 3)


@pytest.mark.parametrize(("left", "n_confirming"), [(700, 0), (3000, 2)])
def test_who_has_no_rival_has_the_whole_race(left: float, n_confirming: int) -> None:
    assert shares(left, 25.0, 3.0, 60, n_rivals=2) == shares(left, 25.0, 3.0, 60)
    alone = shares(left, 25.0, 3.0, 60, n_rivals=1)
    assert alone == (1, n_confirming, left / (1 + n_confirming))


@pytest.mark.parametrize(("error", "n_racing"), [(0.205, 2), (0.24, 1)])
def test_who_promises_much_less_than_the_best_does_not_race(
    error: float, n_racing: int, tmp_path: Path
) -> None:
    driver, found = Driver(tmp_path, 300), []
    for wrong in (0.5, 0.2, error):  # the defaults, the prior, what was proposed
        proposal = driver.ask()
        assert proposal is not None
        driver.end(proposal)
        same = {"fit": 2.0, "tracing": EXTRA}
        found.append(driver.outcomes[-1]._replace(val_accuracy=1 - wrong, bill=same))
    assert driver.phases._plan(found, 200.0).n_racing == n_racing


def test_later_racers_search_what_a_step_does_not_tell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(phases, "SCREEN_SHARE", 0.001)
    driver = Driver(tmp_path, 30_000)
    driver.run()
    dropouts = [proposal.trial.params["dropout"] for proposal in driver.of("race")]
    assert set(dropouts[:2]) <= {0.0, 0.25}
    assert len(set(dropouts[2:])) == len(dropouts[2:]) > 2


@pytest.mark.usefixtures("journal")
@pytest.mark.parametrize("model", [MODEL, AT_ONCE], ids=["steps", "at once"])
def test_what_has_died_with_its_driver_is_tried_once_more(
    model: ModuleType, tmp_path: Path
) -> None:
    first = Driver(tmp_path, 1200, model=model)
    for _ in range(3):
        assert first.ask()
    first.end(first.proposals[2], dear=0.1)  # of the three this one alone has ended
    again = Driver(tmp_path, 1200, model=model)
    for _ in range(3):
        assert again.ask()
    defaults, prior, new = again.proposals
    # Law: the deck's model and the priors are not lost with the driver that was at them.
    known = search.known(model)
    assert [late(one.trial.params) for one in (defaults, prior)] == [
        late(params) | {"policy": 1} for params in known
    ]
    notes = [one.trial.user_attrs for one in again.proposals]
    assert [one.get(RETRY_OF) for one in notes] == [0, 1, None]
    assert [one.get(phases.PRIOR) for one in notes] == [None, 1, None]
    assert new.trial.params != first.proposals[2].trial.params
    assert {one.phase for one in again.proposals} == {"screen"}
    # Law: one that dies once more may be the cause.
    last = Driver(tmp_path, 1200, model=model)
    proposal = last.ask()
    assert proposal
    assert proposal.trial.user_attrs[RETRY_OF] == new.trial.number


@pytest.mark.usefixtures("journal")
def test_a_driver_that_dies_anywhere_is_followed_by_one_that_goes_on(tmp_path: Path) -> None:
    for name in ("whole", "torn"):
        (tmp_path / name).mkdir()
    whole = Driver(tmp_path / "whole", 1200)
    whole.run()
    begun: list[str] = []
    for _ in range(100):
        driver = Driver(tmp_path / "torn", 1200)  # another one for each trial
        proposal = driver.ask()
        if proposal is None:
            break
        driver.end(proposal)
        begun.append(proposal.phase)
    assert begun.count("race") == len(whole.of("race"))
    assert begun.count("confirm") == len(whole.of("confirm"))
    assert abs(begun.count("screen") - len(whole.of("screen"))) <= 2


def test_a_share_of_a_trial_that_failed_goes_to_another(tmp_path: Path) -> None:
    driver = Driver(tmp_path, 1200)

    driver.run(driver.first_racer_fails)
    planned = driver.study.user_attrs["shares of 1200"]
    assert len(driver.of("race")) == planned["n_racing"] + 1
    assert driver.phases.winner() is not None
    # Law: what failed by itself is not tried again, the next best is.
    first, second = [late(proposal.trial.params) for proposal in driver.of("race")[:2]]
    assert first != second


@pytest.mark.parametrize("total", [300, 600, 1200, 3600])
def test_what_stopped_racers_leave_is_spent(tmp_path: Path, total: float) -> None:
    driver = Driver(tmp_path, total)

    def all_but_the_first_are_stopped(proposal: Proposal) -> dict[str, Any]:
        stopped = proposal.phase == "race" and len(driver.of("race")) in (2, 3)
        return {"state": "pruned"} if stopped else {}

    driver.run(all_but_the_first_are_stopped)
    planned = driver.study.user_attrs[f"shares of {total:g}"]
    winner = driver.phases.winner()
    assert winner is not None
    confirming = driver.of("confirm")
    if planned["n_confirming"]:
        # Law: by further seeds of the winner, as far as they are wanted or paid for.
        assert len(confirming) == 2 or driver.left() < MARGIN * winner.cpu_seconds
    else:
        # Law: by another racer, until half a share is not left.
        assert driver.left() < 0.5 * planned["cpu_seconds"]
        assert not confirming
        assert len(driver.of("race")) > planned["n_racing"] or planned["n_racing"] == 1


def test_the_last_racer_leaves_enough_to_be_confirmed(tmp_path: Path) -> None:
    driver = Driver(tmp_path, 1200)

    def all_but_the_last_are_stopped(proposal: Proposal) -> dict[str, Any]:
        planned = driver.study.user_attrs.get("shares of 1200", {"n_racing": 0})
        stopped = proposal.phase == "race" and len(driver.of("race")) < planned["n_racing"]
        return {"state": "pruned", "value": False} if stopped else {}

    driver.run(all_but_the_last_are_stopped)
    assert len(driver.of("race")) > 1
    winner = driver.phases.winner()
    assert winner is not None
    assert winner.number == driver.of("race")[-1].trial.number
    assert [one.seed for one in driver.of("confirm")] == [1, 2]
    assert len(driver.phases.confirmed()) == 3
    # Law: what the others have left is its further seeds' too, so that these can be as long.
    assert driver.of("race")[-1].grant <= min(one.grant for one in driver.of("confirm"))


def test_what_has_no_time_for_some_steps_does_not_race(tmp_path: Path) -> None:
    driver = Driver(tmp_path, 400)
    proposal = driver.ask()
    while proposal and proposal.phase == "screen":
        # The third is better than all others, by one step that is very dear.
        driver.end(proposal, dear=70.0 if len(driver.outcomes) == 2 else 0.0)
        proposal = driver.ask()
    assert proposal is not None
    driver.end(proposal)
    driver.run()
    assert driver.outcomes[2].val_accuracy == 0.999
    raced = [one.trial.params for one in driver.of("race")]
    assert all(params["epochs"] >= 3 for params in raced)


def test_no_more_than_some_medians_is_spent_on_one_of_the_screen(tmp_path: Path) -> None:
    driver = Driver(tmp_path, 3600)
    driver.run()
    known, others = driver.of("screen")[:2], driver.of("screen")[2:]
    assert {proposal.grant for proposal in known} == {900.0}
    assert all(proposal.grant <= 4 * (EXTRA + 2 + 6) for proposal in others)


@pytest.mark.parametrize(("better", "n_racing"), [(0.13, 1), (0.19, 2)])
def test_what_is_better_and_too_dear_for_half_of_the_race_has_all_of_it(
    better: float, n_racing: int, tmp_path: Path
) -> None:
    driver, found = Driver(tmp_path, 300), []
    for error, fit in ((0.2, 2.0), (0.2, 2.0), (better, 9.0)):
        proposal = driver.ask()
        assert proposal is not None
        driver.end(proposal)
        bill = {"fit": fit, "tracing": EXTRA}
        found.append(driver.outcomes[-1]._replace(val_accuracy=1 - error, bill=bill))
    # Half of it pays for 16 epochs of the first two, or for 3 of the third; all for 6 of that.
    assert driver.phases._plan(found, 200.0).n_racing == n_racing


@pytest.mark.parametrize("total", [60, 100, 150])
def test_nothing_is_screened_that_could_not_race(tmp_path: Path, total: float) -> None:
    driver = Driver(tmp_path, 4 * total)
    for _ in range(2):  # a budget of which they leave enough for a third
        proposal = driver.ask()
        assert proposal is not None
        driver.end(proposal)
    driver.phases.total = total
    # Law: it may take as long as one of which three whole steps could be paid for after the screen,
    # or as the cheapest so far.
    cheapest = min(outcome.cpu_seconds for outcome in driver.outcomes)
    able = EXTRA + (1 - SCREEN_SHARE) * total / (3 * GROWTH.cost)
    assert driver.phases._screen("screen", 400.0).grant == pytest.approx(max(cheapest, able))


def test_what_is_too_dear_for_a_step_is_worse_than_what_fails(tmp_path: Path) -> None:
    driver = Driver(tmp_path, 1200)
    states = []
    for state in ("over_budget", "failed"):
        proposal = driver.ask()
        assert proposal is not None
        driver.end(proposal, state, value=False)
        states.append(driver.study.trials[proposal.trial.number].state)
    assert states == [TrialState.PRUNED, TrialState.FAIL]


@pytest.mark.usefixtures("journal")
def test_the_race_waits_for_the_screen_and_confirming_for_the_race(tmp_path: Path) -> None:
    driver = Driver(tmp_path, 3600)
    while (last := driver.ask()) and last.phase == "screen":
        before = last
        driver.end(last)
    assert last is not None
    assert last.phase == "race"
    # Another driver finds that trial dead, and one of the screen running: it must wait.
    driver = Driver(tmp_path, 3600)
    running = search.ask(driver.study, MODEL, before.trial.params)
    running.set_user_attr("phase", "screen")
    running.set_user_attr("round", 3600)
    assert driver.ask() is None
    driver.study.tell(running, state=TrialState.FAIL)
    racing = driver.ask()
    assert racing is not None
    assert racing.phase == "race"
    others = [driver.ask()]
    while others[-1] is not None:
        others.append(driver.ask())
    # All racers run now, and the winner is not known yet.
    assert {one.phase for one in others if one} == {"race"}


@pytest.mark.usefixtures("journal")
def test_more_budget_for_a_study_screens_and_races_again(tmp_path: Path) -> None:
    driver = Driver(tmp_path, 300)
    driver.run()
    again = Driver(tmp_path, 900)
    again.run()
    assert again.of("screen")
    assert again.of("race")
    whole = [len(one.of("race")) + len(one.of("confirm")) for one in (driver, again)]
    assert whole[0] <= whole[1]
    # Law: the defaults and the priors were screened once.
    screened = [proposal.trial.params for proposal in (*driver.of("screen"), *again.of("screen"))]
    assert sum(params["width"] == 2 and params["rate"] == 0.1 for params in screened) == 1


@pytest.mark.usefixtures("journal")
@pytest.mark.parametrize(("before", "after"), [(300, 375), (1200, 1400), (300, 2400)])
def test_a_continued_study_screens_its_share_and_keeps_the_best_that_it_has(
    tmp_path: Path, before: float, after: float
) -> None:
    first = Driver(tmp_path, before, seed=1)
    first.run()
    best = first.phases.winner()
    assert best is not None
    again = Driver(tmp_path, after, seed=0)

    def worse(proposal: Proposal) -> dict[str, Any]:
        return {"state": "pruned", "value": False} if proposal.phase == "race" else {}

    again.run(worse)
    # Law: of all that the study has had the screen takes its share, and no more of the new money.
    screened = {trial.number for trial in again.phases._begun("screen", every_round=True)}
    costs = [one.cpu_seconds for one in again.outcomes if one.number in screened]
    assert sum(costs) <= SCREEN_SHARE * after + max(costs)
    assert again.of("race")
    # Law: the winner is the whole study's, and its further seeds are those of all budgets.
    assert again.phases.winner() == best
    fits = again.phases.confirmed()
    assert len(fits) >= len(first.phases.confirmed())
    seeds = [again.study.trials[one.number].user_attrs["seed"] for one in fits]
    assert len(set(seeds)) == len(seeds) <= 3
    # Law: no set of hyperparameters races again, unless for twice as many steps.
    lengths: dict[int, list[int]] = {}
    for trial in again.phases._begun("race", every_round=True):
        lengths.setdefault(trial.user_attrs["screened"], []).append(trial.params["epochs"])
    for places in lengths.values():
        assert all(2 * one <= other for one, other in itertools.pairwise(places))


@pytest.mark.usefixtures("journal")
def test_what_failed_in_a_race_does_not_race_again_for_longer(tmp_path: Path) -> None:
    first = Driver(tmp_path, 120)
    first.run(first.first_racer_fails)
    again = Driver(tmp_path, 2400)

    def nothing_better(proposal: Proposal) -> dict[str, Any]:
        return {"state": "pruned", "value": False} if proposal.phase == "screen" else {}

    again.run(nothing_better)
    failed, *raced = [
        (one.trial.user_attrs["screened"], one.trial.params["epochs"])
        for one in (*first.of("race"), *again.of("race"))
    ]
    # Law: not even for twice as many steps, as one that did not fail may.
    assert max(epochs for _, epochs in raced) >= 2 * failed[1]
    assert failed[0] not in {screened for screened, _ in raced}


def test_a_racer_far_behind_at_half_of_its_schedule_is_stopped(tmp_path: Path) -> None:
    study = search.open_study("a", 0, tmp_path, "epochs")

    def racer(epochs: int, values: list[float]) -> optuna.Trial:
        trial = search.ask(study, MODEL, PRIOR | {"epochs": epochs})
        trial.set_user_attr("phase", "race")
        for number, value in enumerate(values, 1):
            trial.report(value, number)
        return trial

    racer(8, [0.5, 0.6, 0.7, 0.8, 0.85, 0.9])
    # Half of four epochs is where the other one was after four of eight.
    assert racer(4, [0.6, 0.785]).should_prune()
    assert not racer(4, [0.6, 0.795]).should_prune()
    assert not racer(4, [0.3]).should_prune()  # too early to tell


@pytest.mark.parametrize("total", [60, 150, 600, 1200])
def test_what_has_no_length_is_screened_on_fewer_letters_and_the_best_are_fitted_on_all(
    tmp_path: Path, total: float
) -> None:
    driver = Driver(tmp_path, total, model=AT_ONCE)
    driver.run()
    begun = [proposal.phase for proposal in driver.proposals]
    assert begun == sorted(begun, key=["screen", "race"].index)
    screen, racing = driver.of("screen"), driver.of("race")
    assert {proposal.trial.params["n_letters"] for proposal in screen} == {100}
    assert {proposal.trial.params["n_letters"] for proposal in racing} == {0}
    # Law: the screen has its share, but the best of it can be paid for afterwards.
    numbers = {proposal.trial.number for proposal in screen}
    screened = {one.number: one for one in driver.outcomes if one.number in numbers}
    costs = [one.cpu_seconds for one in screened.values()]
    assert sum(costs) <= SEARCH_SHARE * total + max(costs)
    assert sum(costs) >= SEARCH_SHARE * total or total - sum(costs) < 12 + 3 * max(costs) / MARGIN
    assert racing
    # Law: who was best in the screen goes first, each once, until no other one is paid for.
    order = [screened[one.trial.user_attrs["screened"]].val_accuracy or 0.0 for one in racing]
    first = order[:-2]  # the last ones are those that what is left pays for
    assert first == sorted(first, reverse=True)
    assert not first or first[0] == max(one.val_accuracy or 0.0 for one in screened.values())
    assert len({one.trial.user_attrs["screened"] for one in racing}) == len(racing)
    assert driver.left() < 12 + 3 * max(costs) / MARGIN
    # Law: another seed would be the same fit; the sweep's model is of the race.
    winner = driver.phases.winner()
    assert winner is not None
    assert driver.phases.confirmed() == [winner]
    assert winner.val_accuracy == max(one.val_accuracy or 0.0 for one in driver.outcomes)


def test_whole_fits_that_are_soon_done_leave_room_for_others_beside_them(tmp_path: Path) -> None:
    driver = Driver(tmp_path, 600, model=AT_ONCE)
    driver.run()
    for proposal in driver.of("race"):
        needed = EXTRA + step(proposal.trial.params)
        assert needed <= MARGIN * proposal.grant + 1e-6
        assert proposal.grant <= 2 * needed + 1e-6


def test_what_was_fitted_on_all_letters_is_not_fitted_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(phases, "SEARCH_SHARE", 0.01)
    driver = Driver(tmp_path, 600, model=AT_ONCE)
    driver.run()
    assert len(driver.of("race")) == len(driver.of("screen")) < 5
    assert driver.left() > 500


def test_a_screen_that_is_hardly_shorter_is_none(tmp_path: Path) -> None:
    driver = Driver(tmp_path, 600, model=AT_ONCE)
    driver.phases.growth = GROWTH._replace(n_train=150)
    driver.run()
    assert {proposal.phase for proposal in driver.proposals} == {"search"}
    assert {proposal.trial.params["n_letters"] for proposal in driver.proposals} == {0}


@pytest.mark.parametrize(("steps", "looks"), [("epochs", 10.8), (None, 40.0)])
def test_what_a_letter_of_val_costs_by_one_of_train(steps: str | None, looks: float) -> None:
    counts = {"train": 400, "val": 40}
    data: Any = SimpleNamespace(part=lambda name: SimpleNamespace(labels=[0] * counts[name]))
    assert growth(MODEL if steps else AT_ONCE, data).looks == pytest.approx(looks)
