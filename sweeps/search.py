"""Who proposes and who is stopped: the Optuna study of one model."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from pipeline.bill import charge
from pipeline.spec import Param, Params
from sweeps.trial import Outcome

_OUTCOME = "outcome"  # user attribute of a trial
REDUCTION_FACTOR = 3  # of the trials at a rung one in so many goes on


@charge("search")
def open_study(
    name: str,
    space: Mapping[str, Param],
    seed: int,
    folder: Path,
    priors: Sequence[Params] = (),
) -> optuna.Study:
    """A study in ``folder``, new or continued, whose trial 0 is the defaults: its own baseline.

    ``priors`` come next: hyperparameters that are known to serve well.

    TPE proposes. Successive halving stops: of the trials that reach steps 1, 3, 9, ... the best
    third goes on (Li et al. 2018, "A system for massively parallel hyperparameter tuning"). Trials
    that a driver left running are told as failed. The sampler's seed is made of ``seed`` and the
    number of trials, so that a continued study does not draw its first trials again.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    journal = folder / "optuna.journal"
    _mend(journal)
    storage = JournalStorage(JournalFileBackend(str(journal)))
    study = optuna.create_study(
        storage=storage,
        study_name=name,
        pruner=optuna.pruners.SuccessiveHalvingPruner(
            min_resource=1, reduction_factor=REDUCTION_FACTOR
        ),
        direction="maximize",
        load_if_exists=True,
    )
    n_trials = len(study.trials)
    study.sampler = _sampler(seed, n_trials)
    if n_trials == 0:
        for params in [_defaults(space), *priors]:
            study.enqueue_trial(params)
    for trial in study.get_trials(deepcopy=False, states=[TrialState.RUNNING]):
        outcome = trial.user_attrs.get(_OUTCOME)
        if outcome:  # its driver died between the two notes of it
            _tell(study, trial.number, Outcome(**outcome))
        else:
            study.tell(trial.number, state=TrialState.FAIL)
    return study


@charge("search")
def tell(study: optuna.Study, trial: optuna.Trial, outcome: Outcome) -> None:
    """Note how a trial ended. A fit that its grant ended early has a value all the same."""
    trial.set_user_attr(_OUTCOME, outcome._asdict())
    _tell(study, trial.number, outcome)


def _tell(study: optuna.Study, number: int, outcome: Outcome) -> None:
    if outcome.val_accuracy is None or outcome.state in ("failed", "killed"):
        study.tell(number, state=TrialState.FAIL)
    elif outcome.state == "pruned":
        study.tell(number, state=TrialState.PRUNED)
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


def proposals(
    space: Mapping[str, Param], seed: int, n_trials: int, priors: Sequence[Params] = ()
) -> list[Params]:
    """What a new study proposes first, before it has learned anything; the defaults first."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(sampler=_sampler(seed, 0), direction="maximize")
    for params in [_defaults(space), *priors]:
        study.enqueue_trial(params)
    distributions = {name: param.distribution for name, param in space.items()}
    return [study.ask(fixed_distributions=distributions).params for _ in range(n_trials)]


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


def _mend(journal: Path) -> None:
    """Make good what a kill or a power cut may leave: a lock that nobody holds, a torn last line.

    Optuna would wait half a minute for the one, and read nothing any more behind the other. Only
    the process that holds the ledger opens a study, so nobody else is at it.
    """
    Path(f"{journal}.lock").unlink(missing_ok=True)
    if not journal.exists():
        return
    with journal.open("rb+") as file:
        text = file.read()
        file.truncate(text.rfind(b"\n") + 1)


@charge("search")
def importances(study: optuna.Study) -> dict[str, float]:
    """Importance of each hyperparameter by PED-ANOVA (Watanabe et al. 2023); they sum to 1.

    Empty where fewer than two values are there to explain.
    """
    complete = study.get_trials(deepcopy=False, states=[TrialState.COMPLETE])
    if len({trial.value for trial in complete}) < 2:
        return {}
    return optuna.importance.get_param_importances(study)
