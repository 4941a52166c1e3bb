"""One file a data set; the file name is its name.

A data set's file has ``source(archive, n_train) -> spec.Source``: cheap facts that pin its content,
and a function that reads its letters. Splitting them into parts is the same for all, and is here.
"""

import numpy as np
import numpy.typing as npt

from pipeline.spec import UserError

SPLIT_SEED = 0
MAX_VAL = 10_000  # letters; the standard error of an accuracy of 90 % is then 0.3 points
MIN_VAL = 26

Rows = npt.NDArray[np.int64]


def split(n_letters: int, n_test: int, n_train: int | None) -> dict[str, dict[str, Rows]]:
    """Split an archive's train part, of ``n_letters``, and its test part into the four parts.

    For each field of ``spec.Letters`` it says which of its rows, in which order, are which part:
    ``gate`` is the last ``len(test)`` rows of the archive's train part, as in EMNIST; ``train`` is
    a draw of ``n_train`` of the others, ``val`` up to 10,000 of what is left. ``n_train=None``
    means all: ``val`` is drawn first (10,000, at most a sixth), ``train`` is the rest.
    """
    n_pool = n_letters - n_test
    if n_train is None:
        n_train = n_pool - min(MAX_VAL, n_pool // 6)
    n_val = min(MAX_VAL, n_pool - n_train)
    if n_val < MIN_VAL:
        raise UserError(
            f"train must leave at least {MIN_VAL} of this data set's {n_pool} letters to val, "
            f"but n_train={n_train} came: pass a smaller -P n_train, or all"
        )
    order = np.random.default_rng(SPLIT_SEED).permutation(n_pool)
    train = {
        "train": order[:n_train],
        "val": order[n_train : n_train + n_val],
        "gate": np.arange(n_pool, n_letters),
    }
    return {"train": train, "test": {"test": np.arange(n_test)}}
