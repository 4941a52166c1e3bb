"""Makes the models known that a test has written; imported by a nursery before it forks."""

import os

from pipeline import models
from sweeps.engine import Engine

models.__path__ = [*models.__path__, os.environ["TOY_MODELS"]]


def stop_after(n_trials: int) -> None:
    """Let a sweep of this process begin so many trials; its budget is then said to be spent.

    So a test can give a budget that is ample on any machine, and still end soon.
    """
    real = Engine.left

    def left(self: Engine) -> float:
        n_begun = len(self.study.get_trials(deepcopy=False))
        return real(self) if n_begun < n_trials else 0.0

    Engine.left = left  # type: ignore[method-assign]
