"""Who proposes and who is stopped: the Optuna study of one model."""

from collections.abc import Mapping
from pathlib import Path

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from pipeline.spec import Param


def create_study(name: str, space: Mapping[str, Param], seed: int, data_dir: str) -> optuna.Study:
    """A study whose trial 0 is the defaults: every study contains its own baseline.

    TPE proposes. Successive halving stops: of the trials that reach steps 1, 3, 9, ... the best
    third goes on (Li et al. 2018, "Massively Parallel Hyperparameter Tuning").
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(
        storage=JournalStorage(JournalFileBackend(str(Path(data_dir) / "optuna.journal"))),
        study_name=name,
        sampler=optuna.samplers.TPESampler(seed=seed),
        pruner=optuna.pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=3),
        direction="maximize",
    )
    study.enqueue_trial({name: param.default for name, param in space.items()})
    return study


def importances(study: optuna.Study) -> dict[str, float]:
    """Importance of each hyperparameter by PED-ANOVA (Watanabe et al. 2023); they sum to 1.

    Empty where fewer than two values are there to explain.
    """
    complete = study.get_trials(deepcopy=False, states=[TrialState.COMPLETE])
    if len({trial.value for trial in complete}) < 2:
        return {}
    return optuna.importance.get_param_importances(study)
