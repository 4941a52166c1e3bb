"""Which trial comes next: screen, race, confirm.

A model whose fit can be of any length (``STEPS`` names the hyperparameter that says so) is tuned
in three phases. *Screen*: many sets of hyperparameters, each in a short fit (``SCREEN``). *Race*:
the best of them for as many steps as their share of the budget pays for. *Confirm*: the winner
under other seeds.
One whose fits have no such length, but a ``SCREEN`` on fewer letters, has a longer screen, and then
the best of it are fitted on all letters, one after the other.
For any other model TPE proposes, and successive halving stops, until the budget is spent.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import NamedTuple

import numpy as np
import optuna
from optuna.trial import TrialState

from pipeline.spec import LATE_LETTERS, N_LETTERS, TTA, VALIDATION, Dataset, Params
from sweeps import search
from sweeps.budget import GRANT_SHARE
from sweeps.trial import RETRY_OF, Outcome

SCREEN_SHARE = 0.25  # of the budget
SEARCH_SHARE = 0.65  # of the budget, where a fit has no length that would use the rest
LEAST_SHORTER = 2  # times fewer letters, for which a screen by a part of them is worth the while
DEAR = 4  # times the median of what was screened so far: more is not spent on one epoch
# An error of e after a short fit is one of e (FLOOR + (1 - FLOOR) n^-DECLINE) after one that sees n
# times as many letters: what the priors of CNN and LSTM do on 40,000 letters, within a fifth.
FLOOR, DECLINE = 0.3, 0.65
MARGIN = 0.9  # of a grant, to plan with: what a step takes varies with what else runs
# Times what a fit without steps is expected to take, that it may take: it cannot end early.
ROOM = 2.0
LENGTH = 3.0  # whole fits are sqrt(steps that the budget pays for) / LENGTH; the rest is theirs
N_CONFIRMING = 2  # further seeds of the winner, or none: two fits tell no spread
ENOUGH = 12  # steps of each of three fits, that make them better than two longer ones
SPARE = 0.5  # of a whole fit's share, that is enough for another one
FEWEST_STEPS = 3  # of a racing trial, if any of the screen can do so many
WORTH = 1.05  # times the letters that whole steps would see; for less no fit leaves some out
# So much an error counts that is promised to another than a prior: the best of many short fits owes
# some of its accuracy to chance, and some to what is ahead in a short fit alone. Two that led a
# screen by less than a tenth ended with a twentieth and a tenth more error than a prior.
DOUBT = 1.2
# Who promises so many times the error of the best is no rival: what he would take makes the best's
# fit longer. Two promises, each right within a fifth, hardly change places over that.
RIVAL = 1.25
# Times the error of one fit, that each of two which race may promise: the better of two promises,
# each right within a tenth or so, does so much better than promised.
EITHER = 1.06
# User attributes: the one of the screen that a race goes on with; the place of one of the screen
# among the model's priors, from 1.
SCREENED, PRIOR = "screened", "prior"
N_SAFE = 2  # racing trials that keep the late hyperparameters of the screen

Trial = optuna.trial.FrozenTrial


class Proposal(NamedTuple):
    """A trial to start, with the seed and the grant (CPU-seconds) that it is to have."""

    trial: optuna.Trial
    phase: str
    seed: int
    grant: float


class Growth(NamedTuple):
    """What a step of a whole fit is by one of the screen.

    Attributes:
        n_train: letters that a step of a whole fit sees.
        n_short: those that a step of the screen does.
        looks: letters to train on for which one could look at val, as each step does.
        last: those for which the last look of a whole fit could be, beside a step's.
    """

    n_train: int
    n_short: int
    looks: float
    last: float = 0.0

    @property
    def cost(self) -> float:
        """CPU time of a step of a whole fit, by one of the screen."""
        return (self.n_train + self.looks) / (self.n_short + self.looks)

    @property
    def extra(self) -> float:
        """CPU time of a whole fit beside its steps, by a step of the screen."""
        return self.last / (self.n_short + self.looks)


class Length(NamedTuple):
    """So many steps of a fit, each on ``n_letters``; 0 are all."""

    n_steps: int
    n_letters: int = 0


def growth(member: ModuleType, data: Dataset) -> Growth:
    """How much more a step of a model's whole fit is, where a screen sees some letters only."""
    n_train, n_val = (len(data.part(name).labels) for name in ("train", "val"))
    n_short = min(search.short_fit(member).get(N_LETTERS) or n_train, n_train)
    # Where nothing is learned by steps a letter of val is like one of train.
    looks = (VALIDATION if hasattr(member, "STEPS") else 1.0) * n_val
    return Growth(n_train, n_short, looks, looks * (search.whole(member).get(TTA, 1) - 1))


class Shares(NamedTuple):
    """How what the screen has left is spent: so many fits that race, each with so much of it."""

    n_racing: int
    n_confirming: int
    cpu_seconds: float


def shares(
    left: float, step: float, extra: float, max_steps: int, n_rivals: float = math.inf
) -> Shares:
    """Whole fits that ``left`` CPU-seconds pay for, where a step of a good one takes ``step``.

    Both grow with the square root of the budget: the number of fits, and their length. But there
    are no two where three have ``ENOUGH`` steps: so a winner has further seeds. ``extra`` is what a
    fit costs beside its steps; more than ``max_steps`` steps serve no fit. No more than the
    ``n_rivals`` that promise as much race, unless their fits are that long.
    """
    n_steps, fewest = left / max(step, 1e-6), round(left / (max_steps * step + extra))
    n_fits = max(1, round(math.sqrt(n_steps) / LENGTH), fewest)
    if n_fits == N_CONFIRMING and n_steps >= ENOUGH * (1 + N_CONFIRMING):
        n_fits = 1 + N_CONFIRMING
    n_confirming = N_CONFIRMING if n_fits > N_CONFIRMING else 0
    n_racing = int(min(n_fits - n_confirming, max(1, n_rivals, fewest - n_confirming)))
    return Shares(n_racing, n_confirming, left / (n_racing + n_confirming))


def margin(member: ModuleType) -> float:
    """The share of a grant that a fit's length is planned with: all, where it shortens itself."""
    return 1.0 if LATE_LETTERS in member.PARAMS else MARGIN


def max_steps(member: ModuleType) -> int:
    """The longest fit that a model's ``STEPS`` allows; 1 without."""
    steps = getattr(member, "STEPS", None)
    return int(member.PARAMS[steps].distribution.high) if steps else 1


def screens(member: ModuleType, growth: Growth) -> bool:
    """Whether a model's short fits are shorter than whole ones by as much as makes them useful."""
    return hasattr(member, "STEPS") or LEAST_SHORTER * growth.n_short <= growth.n_train


class Phases:
    """Proposes a study's trials; what it needs to know on a resume it keeps in the study."""

    def __init__(
        self,
        study: optuna.Study,
        member: ModuleType,
        seed: int,
        cpu_seconds: float,
        outcomes: Sequence[Outcome],
        everywhere: Params,
        growth: Growth,
    ) -> None:
        """``cpu_seconds`` is the whole budget; ``outcomes`` grows while trials end.

        Every trial has the hyperparameters ``everywhere``. Those of the screen that have died with
        the drivers before this one come first, once more.
        """
        self.growth = growth
        self.study, self.member, self.seed, self.total = study, member, seed, cpu_seconds
        self.outcomes, self.everywhere = outcomes, everywhere
        self.steps: str | None = getattr(member, "STEPS", None)
        self.lost = [
            (trial, self._screening_grant(trial.number == 0 or PRIOR in trial.user_attrs))
            for trial in self._interrupted()
        ]

    def retry(self, number: int, grant: float) -> None:
        """Try a trial once more whose worker has died, unless that was the second time."""
        trial = self.study.get_trials(deepcopy=False)[number]
        if RETRY_OF not in trial.user_attrs:
            self.lost.append((trial, grant))

    def next(self, left: float, price: float) -> Proposal | None:
        """The next trial, or None where none can be paid for, or none as long as others run.

        ``left`` CPU-seconds are free; a first step takes up to ``price``, with all around it.
        """
        if self.lost and left > price:
            return self._again(*self.lost.pop(0), left)
        if not screens(self.member, self.growth):
            return self._screen("search", left) if left > price else None
        begun = self._begun("screen", every_round=True)
        if left > price and (not begun or self._screens_on(begun, left - price)):
            return self._screen("screen", left)
        if any(trial.state == TrialState.RUNNING for trial in begun):
            return None
        return self._whole(left)

    # ---- the phases

    def _screens_on(self, begun: Sequence[Trial], left: float) -> bool:
        """Whether the screen has a next trial, which leaves so many CPU-seconds."""
        if self.steps:
            return self._spent(begun) < SCREEN_SHARE * self.total
        best = max(self._screened(), key=lambda one: one.val_accuracy or 0.0, default=None)
        return self._spent(begun) < SEARCH_SHARE * self.total and (
            best is None or left >= sum(self._costs(best)) / MARGIN
        )

    def _again(self, trial: Trial, grant: float, left: float) -> Proposal:
        notes = trial.user_attrs
        again = {RETRY_OF: trial.number}
        again |= {name: notes[name] for name in (SCREENED, PRIOR) if name in notes}
        return self._propose(trial.params, notes["phase"], notes["seed"], min(left, grant), again)

    def _screen(self, phase: str, left: float) -> Proposal:
        begun = self._begun(phase, every_round=True)
        n_begun = sum(RETRY_OF not in trial.user_attrs for trial in begun)
        fixed = search.screened(self.member, n_begun) | self.everywhere
        if phase == "search":
            fixed |= search.whole(self.member)
        known = n_begun < len(search.known(self.member))
        grant = min(left, self._screening_grant(known))
        notes = {PRIOR: n_begun} if n_begun and known else None
        return self._propose(fixed, phase, self.seed, grant, notes)

    def _screening_grant(self, known: bool) -> float:
        """CPU-seconds that a short fit may take; one that is ``known`` may be dear."""
        grant, screened = GRANT_SHARE * self.total, self._screened()
        return grant if known or not screened else min(grant, self._worth_screening(screened))

    def _worth_screening(self, screened: Sequence[Outcome]) -> float:
        """CPU-seconds that one more short fit may take, by those so far.

        One that is much dearer than these tells too little; one of which what follows the screen
        would not pay for ``FEWEST_STEPS`` whole steps, or a whole fit, could not race.
        """
        share, fewest = (SCREEN_SHARE, FEWEST_STEPS) if self.steps else (SEARCH_SHARE, 1)
        costs = [one.cpu_seconds for one in screened]
        beside = [one.cpu_seconds - one.bill.get("fit", 0.0) for one in screened]
        short = (1 - share) * self.total / (fewest * self.growth.cost)
        able = max(min(costs), short + float(np.median(beside)))
        return min(able, DEAR * float(np.median(costs)))

    def _whole(self, left: float) -> Proposal | None:
        """A trial of the race, or one that confirms its winner."""
        screened = self._screened()
        if not screened or self.steps is None:
            return self._race(screened, left)
        plan = self._plan(screened, left)
        racing, confirming = self._begun("race"), self._begun("confirm")
        n_left = plan.n_racing + plan.n_confirming - len(racing) - len(confirming)
        # What a racer that was stopped has left is for all: a winner that is longer than the rest
        # of the budget pays for could not be confirmed.
        grant = left / max(1, n_left)
        if len(racing) < plan.n_racing:
            return self._race(screened, grant) if n_left > 0 else None
        if any(trial.state == TrialState.RUNNING for trial in racing):
            return None
        winner = self.winner()
        if winner and plan.n_confirming and left >= MARGIN * winner.cpu_seconds:
            params = self._params(winner.number)
            seeds = self._seeds(params)
            if len(seeds) <= N_CONFIRMING:
                seed = self._new_seed(self.seed + 1, seeds)
                return self._propose(params, "confirm", seed, grant)
        # What racers have left that were stopped pays for one more.
        if not self._tried("confirm") and left >= SPARE * plan.cpu_seconds:
            return self._race(screened, left)
        return None

    def _seeds(self, params: Params) -> set[int]:
        """The seeds under which whole fits of these hyperparameters were tried."""
        tried = self._tried("race", every_round=True) + self._tried("confirm", every_round=True)
        return {int(trial.user_attrs["seed"]) for trial in tried if trial.params == params}

    def _length(self, screened: Outcome, grant: float) -> Length:
        """The whole fit that a grant pays for, of what was screened.

        Where steps are few, what is left of the grant would pay for much of another one: then all
        are on some letters. They are two at least, so that a fit may see at half of them what they
        cost. One that sees fewer letters than those of the screen is none.
        """
        step, extra = self._costs(screened)
        grant *= margin(self.member)
        n_affordable = max(0.0, grant - extra) / step
        whole = Length(min(math.floor(n_affordable), max_steps(self.member)))
        if self.steps is None or N_LETTERS not in search.short_fit(self.member):
            return whole
        n_train, n_short, looks, _ = self.growth
        n_steps = max(2, whole.n_steps + 1)
        n_letters = math.floor(n_affordable / n_steps * (n_train + looks) - looks)
        part = Length(n_steps, n_letters)
        if n_steps > max_steps(self.member) or n_steps * n_letters <= n_short:
            return whole
        worth = self._seen(*part) > WORTH * self._seen(*whole)
        return part if worth or whole.n_steps < 2 else whole

    def _seen(self, n_steps: int, n_letters: int) -> int:
        """Letters that a fit sees, one as often as it does."""
        return n_steps * min(n_letters or self.growth.n_train, self.growth.n_train)

    def _costs(self, screened: Outcome) -> tuple[float, float]:
        """CPU-seconds of a whole fit's step, and beside its steps, from a short fit."""
        short = max(screened.bill.get("fit", 0.0), 1e-3)
        extra = screened.cpu_seconds - short + self.growth.extra * short
        return self.growth.cost * short, extra

    def _promising(self, screened: Sequence[Outcome], grant: float) -> list[tuple[float, Outcome]]:
        """What can race with a grant, by the error that its schedule is expected to end with.

        A prior, which is known to be good in whole fits, comes before what is hardly better.
        """
        trials = self.study.get_trials(deepcopy=False)

        def seen(one: Outcome) -> int:
            return self._seen(*self._length(one, grant))

        def expected(one: Outcome) -> float:
            more = seen(one) / self.growth.n_short
            known = self.steps is None or PRIOR in trials[one.number].user_attrs
            doubt = 1.0 if known else DOUBT
            return doubt * _error(one) * (FLOOR + (1 - FLOOR) * math.pow(more, -DECLINE))

        # One that can do but a step or two is no better off than in the screen.
        able = [one for one in screened if seen(one) >= FEWEST_STEPS * self.growth.n_train]
        able = able or [one for one in screened if seen(one)]
        return sorted(((expected(one), one) for one in able), key=lambda promise: promise[0])

    def _race(self, screened: Sequence[Outcome], grant: float) -> Proposal | None:
        """A trial of the race, as long as the grant pays for; None where that is nothing.

        The most promising one that has not raced yet, or for half as long at most, as when the
        budget was smaller; where all have, those again, if they can be longer or have other seeds.
        """
        promising = self._promising(screened, grant)
        if not promising:
            return None
        steps, raced = self.steps, self._tried("race", every_round=True)

        def n_races(one: Outcome) -> int:
            seen = self._seen(*self._length(one, grant))
            return sum(
                other.user_attrs.get(SCREENED) == one.number
                and (other.state == TrialState.FAIL or 2 * length(other) > seen)
                for other in raced
            )

        def length(trial: Trial) -> int:
            n_steps = trial.params[steps] if steps else 1
            return self._seen(n_steps, trial.params.get(N_LETTERS, 0))

        one = min((one for _, one in promising), key=n_races)
        n_steps, n_letters = self._length(one, grant)
        whole = search.whole(self.member)
        whole |= {N_LETTERS: n_letters} if n_letters else {}
        if steps:
            whole |= {steps: n_steps}
        elif n_races(one):
            return None
        else:  # others may race beside it
            grant = min(grant, ROOM * sum(self._costs(one)))
        fixed = self._params(one.number) | whole
        if len(self._tried("race")) >= N_SAFE or n_races(one):
            for name in getattr(self.member, "LATE", ()):
                del fixed[name]
        # Where nothing is left to be searched the same would be the same fit.
        seed = self._new_seed(self.seed, self._seeds(fixed))
        return self._propose(fixed, "race", seed, grant, {SCREENED: one.number})

    def _new_seed(self, first: int, tried: set[int]) -> int:
        """The first seed from ``first`` on that was not tried."""
        return next(seed % 2**32 for seed in itertools.count(first) if seed % 2**32 not in tried)

    def _propose(
        self,
        fixed: Params,
        phase: str,
        seed: int,
        grant: float,
        notes: Mapping[str, int] | None = None,
    ) -> Proposal:
        trial = search.ask(self.study, self.member, fixed)
        # The phase last: without it a trial counts for nothing, should the driver die here.
        attributes = {**(notes or {}), "round": self.total, "seed": seed, "phase": phase}
        for name, value in attributes.items():
            trial.set_user_attr(name, value)
        return Proposal(trial, phase, seed, grant)

    # ---- what has been

    def _begun(self, phase: str, every_round: bool = False) -> list[Trial]:
        """This budget's trials of a phase, but for those that failed: they left their share."""
        return [
            trial
            for trial in self.study.get_trials(deepcopy=False)
            if trial.user_attrs.get("phase") == phase
            and (every_round or trial.user_attrs.get("round") == self.total)
            and (phase in ("screen", "search") or trial.state != TrialState.FAIL)
        ]

    def _interrupted(self) -> list[Trial]:
        """Those of a screen, or a search, that have died with a driver, and were not tried again.

        They were no worse than others, and the first are the deck's model and the priors.
        """
        trials = self.study.get_trials(deepcopy=False)
        done = {one.number for one in self.outcomes if not one.lost}
        again = {t.user_attrs.get(RETRY_OF) for t in trials if "phase" in t.user_attrs}
        return [
            trial
            for trial in trials
            if trial.state == TrialState.FAIL
            and trial.user_attrs.get("phase") in ("screen", "search")
            and RETRY_OF not in trial.user_attrs
            and trial.number not in done | again
        ]

    def _tried(self, phase: str, every_round: bool = False) -> list[Trial]:
        """Those of ``_begun``, and those that failed by themselves and would fail again.

        One whose worker has died twice is among these.
        """
        failures = {one.number: one.failure for one in self.outcomes if one.failure}
        hopeless = [
            trial
            for trial in self.study.get_trials(deepcopy=False)
            if (failures.get(trial.number, "killed") != "killed" or _lost_twice(trial))
            and trial.user_attrs.get("phase") == phase
            and (every_round or trial.user_attrs.get("round") == self.total)
        ]
        return self._begun(phase, every_round) + hopeless

    def _spent(self, trials: Sequence[Trial]) -> float:
        """CPU-seconds of trials; one that still runs counts as the others do on average."""
        numbers = {trial.number for trial in trials}
        costs = [one.cpu_seconds for one in self.outcomes if one.number in numbers]
        return len(trials) * float(np.mean(costs)) if costs else 0.0

    def _screened(self) -> list[Outcome]:
        """What the screen has shown."""
        numbers = {trial.number for trial in self._begun("screen", every_round=True)}
        return [
            one
            for one in self.outcomes
            if one.number in numbers and one.val_accuracy is not None and one.failure is None
        ]

    def _plan(self, screened: Sequence[Outcome], left: float) -> Shares:
        """The shares of the race, as they were when it began."""
        key = f"shares of {self.total:g}"
        if key not in self.study.user_attrs:
            # By what would be best with half of it: how many share it is not known yet.
            promises = self._promising(screened, left / 2) or [(1.0, screened[0])]
            least, best = promises[0]
            n_rivals = sum(error <= RIVAL * least for error, _ in promises)
            found = shares(left, *self._costs(best), max_steps(self.member), n_rivals)
            if found.n_racing + found.n_confirming == 2:
                # With all of it another may be best, which is too dear for half.
                whole, alone = self._promising(screened, left)[0]
                if EITHER * whole < least:
                    found = shares(left, *self._costs(alone), max_steps(self.member), 1)
            self.study.set_user_attr(key, found._asdict())
        return Shares(**self.study.user_attrs[key])

    def _params(self, number: int) -> Params:
        return dict(self.study.get_trials(deepcopy=False)[number].params)

    def confirmed(self) -> list[Outcome]:
        """The race's winner and its further seeds, where they have a model; empty with no race."""
        winner = self.winner()
        if winner is None:
            return []
        params = self._params(winner.number)
        begun = self._begun("race", every_round=True) + self._begun("confirm", every_round=True)
        numbers = {one.number for one in begun if one.params == params} - {winner.number}
        again = [one for one in self.outcomes if one.number in numbers and one.model_uri]
        return [winner, *again]

    def winner(self) -> Outcome | None:
        """The best of the races, those of earlier budgets too; None where none has a model."""
        numbers = {trial.number for trial in self._begun("race", every_round=True)}
        racing = [one for one in self.outcomes if one.number in numbers and one.model_uri]
        return max(racing, key=lambda one: one.val_accuracy or 0.0, default=None)


def _lost_twice(trial: Trial) -> bool:
    return RETRY_OF in trial.user_attrs and trial.state == TrialState.FAIL


def _error(outcome: Outcome) -> float:
    return 1 - (outcome.val_accuracy or 0.0)
