"""Who proposes and who is stopped: the Optuna study of one model."""

from collections.abc import Mapping
from pathlib import Path

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from pipeline.spec import Param


def open_study(name: str, space: Mapping[str, Param], seed: int, folder: Path) -> optuna.Study:
    """A study in ``folder``, new or continued, whose trial 0 is the defaults: its own baseline.

    TPE proposes. Successive halving stops: of the trials that reach steps 1, 3, 9, ... the best
    third goes on (Li et al. 2018, "A system for massively parallel hyperparameter tuning"). Trials
    that a driver left running are told as failed. The sampler's seed is made of ``seed`` and the
    number of trials, so that a continued study does not draw its first trials again.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    storage = JournalStorage(JournalFileBackend(str(folder / "optuna.journal")))
    study = optuna.create_study(
        storage=storage,
        study_name=name,
        pruner=optuna.pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=3),
        direction="maximize",
        load_if_exists=True,
    )
    n_trials = len(study.trials)
    study.sampler = optuna.samplers.TPESampler(seed=(seed + 7919 * n_trials) % 2**32)
    if n_trials == 0:
        study.enqueue_trial({name: param.default for name, param in space.items()})
    for trial in study.get_trials(deepcopy=False, states=[TrialState.RUNNING]):
        study.tell(trial.number, state=TrialState.FAIL)
    return study


def importances(study: optuna.Study) -> dict[str, float]:
    """Importance of each hyperparameter by PED-ANOVA (Watanabe et al. 2023); they sum to 1.

    Empty where fewer than two values are there to explain.
    """
    complete = study.get_trials(deepcopy=False, states=[TrialState.COMPLETE])
    if len({trial.value for trial in complete}) < 2:
        return {}
    return optuna.importance.get_param_importances(study)
