"""Makes the models known that a test has written; imported by a nursery before it forks."""

import functools
import importlib
import itertools
import os
import signal
from typing import Any

from pipeline import models

models.__path__ = [*models.__path__, os.environ["TOY_MODELS"]]


def die_after(moment: str, n_calls: int) -> None:
    """Have this process killed when a function (``module:Class.name``) has done its nth call."""
    module, _, path = moment.partition(":")
    *owners, name = path.split(".")
    home: Any = importlib.import_module(module)
    for owner in owners:
        home = getattr(home, owner)
    real, calls = getattr(home, name), itertools.count(1)
    n_last = 1 if name == "finish" else n_calls  # a sweep has one end

    @functools.wraps(real)
    def dying(*given: Any, **named: Any) -> Any:
        result = real(*given, **named)
        if next(calls) == n_last:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(home, name, dying)
