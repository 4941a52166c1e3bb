"""Who proposes and who is stopped: the Optuna study of one model."""

import math
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.trial import TrialState

from pipeline import precision
from pipeline.bill import charge
from pipeline.spec import Param, Params, UserError
from sweeps.storage import keep_place, open_storage
from sweeps.trial import RETRY_OF, Outcome

_OUTCOME = "outcome"  # user attribute of a trial
REDUCTION_FACTOR = 3  # of the trials at a rung one in so many goes on
HALF_WAY = 0.5  # of its schedule a racing trial may do unjudged
# Draws of a set of hyperparameters that was not proposed before, and, since TPE may insist on one
# that was, changes of one hyperparameter after the other of that.
N_DRAWS, N_CHANGES = 2, 50
FAR_BEHIND = 0.01  # in accuracy: three times what chance does to two fits of one kind

Trial = optuna.trial.FrozenTrial


class Behind(optuna.pruners.BasePruner):
    """Stops a racing trial that, half-way or later, is far behind another one at the same place.

    Places are shares of the schedule: trials may have unlike numbers of steps (``steps`` names the
    hyperparameter), and a learning rate that falls makes equal steps unlike.
    """

    def __init__(self, steps: str) -> None:
        self.steps = steps

    def prune(self, study: optuna.Study, trial: Trial) -> bool:
        """Whether to stop ``trial`` after its last report."""
        place = (trial.last_step or 0) / trial.params[self.steps]
        if trial.user_attrs.get("phase") != "race" or place < HALF_WAY:
            return False
        others = [
            self._value_at(other, place)
            for other in study.get_trials(deepcopy=False)
            if other.user_attrs.get("phase") == "race" and other.number != trial.number
        ]
        best = max((value for value in others if value is not None), default=0.0)
        return self._value_at(trial, place) < best - FAR_BEHIND  # type: ignore[operator]

    def _value_at(self, trial: Trial, place: float) -> float | None:
        """What a trial had reported last when so much of its schedule was done; None before."""
        step = math.floor(place * trial.params[self.steps] + 1e-9)
        values = trial.intermediate_values
        return values.get(step) if step <= (trial.last_step or 0) else None


class Halving(optuna.pruners.SuccessiveHalvingPruner):
    """Of the trials that reach steps 1, 3, 9, ... the best third goes on; one that races does.

    Successive halving without rounds (Li et al. 2018, "A system for massively parallel
    hyperparameter tuning").
    """

    def __init__(self) -> None:
        super().__init__(min_resource=1, reduction_factor=REDUCTION_FACTOR)

    def prune(self, study: optuna.Study, trial: Trial) -> bool:
        """Whether to stop ``trial`` after its last report."""
        return trial.user_attrs.get("phase") != "race" and super().prune(study, trial)


@charge("search")
def open_study(name: str, seed: int, folder: Path, steps: str | None = None) -> optuna.Study:
    """A study, new or continued; its folder is ``folder``. TPE proposes what the phases leave open.

    Without ``steps`` ``Halving`` stops; where ``steps`` names the hyperparameter that is the length
    of a fit, ``Behind`` does. Trials that a driver left running are told as failed. The sampler's
    seed is made of ``seed`` and the number of trials, so that a continued study does not draw its
    first trials again.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    storage = open_storage(name, folder)
    study = optuna.create_study(
        storage=storage,
        study_name=name,
        pruner=Behind(steps) if steps else Halving(),
        direction="maximize",
        load_if_exists=True,
    )
    keep_place(folder)
    study.sampler = _sampler(seed, len(study.trials))
    for trial in study.get_trials(deepcopy=False, states=[TrialState.RUNNING]):
        outcome = trial.user_attrs.get(_OUTCOME)
        if outcome:  # its driver died between the two notes of it
            _tell(study, trial.number, Outcome(**outcome))
        else:
            study.tell(trial.number, state=TrialState.FAIL)
    return study


def check_space(study: optuna.Study, space: Mapping[str, Param]) -> None:
    """Refuse a study of a model whose hyperparameters have become others since."""
    known = {
        name: distribution
        for trial in study.get_trials(deepcopy=False)
        for name, distribution in trial.distributions.items()
    }
    for name, before in known.items():
        now = space[name].distribution if name in space else None
        if now is None or not _may_follow(before, now):
            raise UserError(
                "a study's hyperparameters keep their kind and their choices, but in "
                f"{study.study_name} {name} was {before} and is {now or 'gone'}: put that back in "
                "the model's file, or begin a new study, without study=NAME and with another seed"
            )


def check_precision(study: optuna.Study, wanted: str) -> None:
    """Refuse another precision than that of a study's fits so far, from which it goes on."""
    has = study.user_attrs.get("precision", wanted)
    if wanted not in (precision.AUTO, has):
        raise UserError(
            f"a study's fits have one precision, but {study.study_name} has {has} and {wanted} "
            "came: leave precision out, or begin a new study, without study=NAME"
        )


def _may_follow(before: BaseDistribution, now: BaseDistribution) -> bool:
    """Whether Optuna takes both for the same hyperparameter in one study."""
    try:
        optuna.distributions.check_distribution_compatibility(before, now)
    except ValueError:
        return False
    return True


def known(member: ModuleType) -> list[Params]:
    """What a study of a model tries before anything is proposed: its defaults and its priors."""
    return [_defaults(member.PARAMS), *getattr(member, "PRIORS", ())]


def screened(member: ModuleType, place: int) -> Params:
    """What the ``place``-th trial of a model's screen must have; TPE proposes the rest.

    The first is the defaults: the study's own baseline. The model's ``PRIORS`` come next, if it has
    some. Those after them have its ``FIXED`` values, and, as a short fit tells nothing about what
    pays in a long one, the ``LATE`` hyperparameters of the first prior, or the defaults'.
    """
    short = short_fit(member)
    if place < len(known(member)):
        return known(member)[place] | short
    late = {name: known(member)[:2][-1][name] for name in getattr(member, "LATE", ())}
    fixed: Params = getattr(member, "FIXED", {})
    return fixed | late | short


def short_fit(member: ModuleType) -> Params:
    """What each fit of a screen has: ``SCREEN``, else one step; nothing where there is neither."""
    one_step = {member.STEPS: 1} if hasattr(member, "STEPS") else {}
    short: Params = getattr(member, "SCREEN", one_step)
    return short


def whole(member: ModuleType) -> Params:
    """What the fits of a race have in the place of ``short_fit``, but for the number of steps."""
    names = [name for name in short_fit(member) if name != getattr(member, "STEPS", None)]
    fixed: Params = getattr(member, "FIXED", {})
    return {name: fixed.get(name, member.PARAMS[name].default) for name in names}


def distributions(member: ModuleType) -> dict[str, BaseDistribution]:
    """What a model's hyperparameters are drawn from."""
    return {name: param.distribution for name, param in member.PARAMS.items()}


class Proposer(optuna.samplers.BaseSampler):
    """Proposes a whole set of hyperparameters at once: some are fixed, a sampler draws the others.

    Those without effect beside the others (the model's ``unused`` names them) have their defaults.
    The same set would be the same fit: what was proposed before, and has not failed, is not
    proposed again, but something near it.
    """

    def __init__(
        self, sampler: optuna.samplers.BaseSampler, member: ModuleType, fixed: Params
    ) -> None:
        self.sampler, self.member, self.fixed = sampler, member, fixed

    def before_trial(self, study: optuna.Study, trial: Trial) -> None:
        self.sampler.before_trial(study, trial)

    def infer_relative_search_space(
        self, study: optuna.Study, trial: Trial
    ) -> dict[str, BaseDistribution]:
        return distributions(self.member)

    def sample_relative(
        self, study: optuna.Study, trial: Trial, search_space: dict[str, BaseDistribution]
    ) -> Params:
        before = [
            other.params
            for other in study.get_trials(deepcopy=False)
            if other.state != TrialState.FAIL
        ]
        found = self.sampler.infer_relative_search_space(study, trial)
        together = {name: one for name, one in found.items() if name not in self.fixed}
        for _ in range(N_DRAWS):
            proposed = self._draw(study, trial, together)
            if proposed not in before:
                return proposed
        free = [
            name
            for name, distribution in search_space.items()
            if name not in self.fixed and not distribution.single()
        ]
        random = optuna.samplers.RandomSampler(seed=trial.number)
        for place in range(N_CHANGES if free else 0):
            name = free[(trial.number + place) % len(free)]
            value = random.sample_independent(study, trial, name, search_space[name])
            proposed = self._settled(proposed | {name: value})
            if proposed not in before:
                break
        return proposed

    def sample_independent(
        self, study: optuna.Study, trial: Trial, name: str, distribution: BaseDistribution
    ) -> Any:
        return self.sampler.sample_independent(study, trial, name, distribution)

    def _draw(
        self, study: optuna.Study, trial: Trial, together: dict[str, BaseDistribution]
    ) -> Params:
        """A set of which the sampler draws some hyperparameters ``together``, the others alone."""
        params = self.fixed | self.sampler.sample_relative(study, trial, together)
        for name, param in self.member.PARAMS.items():
            if name not in params and param.distribution.single():
                params[name] = param.default
            elif name not in params:
                params[name] = self.sample_independent(study, trial, name, param.distribution)
        return self._settled(params)

    def _settled(self, params: Params) -> Params:
        unused = set(getattr(self.member, "unused", lambda params: ())(params)) - self.fixed.keys()
        return params | {name: self.member.PARAMS[name].default for name in unused}


@charge("search")
def ask(study: optuna.Study, member: ModuleType, fixed: Params) -> optuna.Trial:
    """A new trial that has the ``fixed`` values; the study's sampler proposes the others."""
    sampler = study.sampler
    study.sampler = Proposer(sampler, member, fixed)
    try:
        return study.ask(fixed_distributions=distributions(member))
    finally:
        study.sampler = sampler


@charge("search")
def tell(study: optuna.Study, trial: optuna.Trial, outcome: Outcome) -> None:
    """Note how a trial ended. A fit that its grant ended early has a value all the same."""
    trial.set_user_attr(_OUTCOME, outcome._asdict())
    _tell(study, trial.number, outcome)


def _tell(study: optuna.Study, number: int, outcome: Outcome) -> None:
    too_dear = outcome.state == "over_budget" and outcome.val_accuracy is None
    if outcome.state == "pruned" or too_dear:  # worse than all that have a value
        study.tell(number, state=TrialState.PRUNED)
    elif outcome.val_accuracy is None or outcome.state in ("failed", "killed"):
        study.tell(number, state=TrialState.FAIL)
    else:
        study.tell(number, outcome.val_accuracy)


def past_outcomes(study: optuna.Study) -> list[Outcome]:
    """Outcomes of a study's ended trials, as their drivers have noted them in it."""
    attributes = [trial.user_attrs.get(_OUTCOME) for trial in study.get_trials(deepcopy=False)]
    return [Outcome(**outcome) for outcome in attributes if outcome]


def _sampler(seed: int, n_trials: int) -> optuna.samplers.BaseSampler:
    return optuna.samplers.TPESampler(seed=(seed + 7919 * n_trials) % 2**32)


def _defaults(space: Mapping[str, Param]) -> Params:
    return {name: param.default for name, param in space.items()}


def proposals(member: ModuleType, seed: int, n_trials: int, everywhere: Params) -> list[Params]:
    """What a new study proposes first, before it has learned anything; the defaults first.

    All have the hyperparameters ``everywhere``.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(sampler=_sampler(seed, 0), direction="maximize")
    return [
        ask(study, member, screened(member, place) | everywhere).params for place in range(n_trials)
    ]


def rungs(n_rungs: int = 3) -> list[tuple[int, float]]:
    """The first steps at which trials are judged, and the share of all trials that reaches each."""
    return [(REDUCTION_FACTOR**rung, REDUCTION_FACTOR**-rung) for rung in range(n_rungs)]


def expected_steps(n_steps: int) -> float:
    """Steps that a trial of so many does on average, if at each rung one in three goes on."""
    ends = [step for step, _ in rungs(1 + int(math.log(n_steps, REDUCTION_FACTOR)))] + [n_steps]
    further = [
        (end - begin) * share
        for begin, end, (_, share) in zip(ends, ends[1:], rungs(len(ends))[1:], strict=False)
    ]
    return 1.0 + sum(further)


@charge("search")
def importances(study: optuna.Study, n_known: int) -> dict[str, float]:
    """Importance of each searched hyperparameter by PED-ANOVA (Watanabe et al. 2023); sum 1.

    Of the trials that were proposed, which come after the first ``n_known`` and are none of these
    once more, and as long as all of them are fits of one kind: those of a race are longer. Empty
    where fewer than two values are there to explain.
    """
    proposed = [
        trial
        for trial in study.get_trials(deepcopy=False, states=[TrialState.COMPLETE])
        if trial.number >= n_known
        and RETRY_OF not in trial.user_attrs
        and trial.user_attrs.get("phase", "search") in ("screen", "search")
    ]
    if len({trial.value for trial in proposed}) < 2:
        return {}
    names = [
        name for name in proposed[0].params if len({trial.params[name] for trial in proposed}) > 1
    ]
    alone = optuna.create_study(direction="maximize")
    alone.add_trials(proposed)
    return optuna.importance.get_param_importances(alone, params=names)
