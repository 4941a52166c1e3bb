"""An LSTM that reads a letter row by row. The defaults are the deck's.

It may read columns too, or a grid of patches along both, layer upon layer, as ReNet does (Visin et
al. 2015, "ReNet: a recurrent neural network based alternative to convolutional networks"). Patches
are 4x4: those of 2x2 took four times as long for the same accuracy.
"""

from functools import partial
from typing import TYPE_CHECKING, Any

from optuna.distributions import CategoricalDistribution, IntDistribution

from pipeline.models import _recipe
from pipeline.spec import LETTERS, SIDE, Fitted, Param, Params, Part, Report

if TYPE_CHECKING:
    import keras

PATCH = 4  # pixels along each side of a grid's patches
PARAMS = {
    "reading": Param("rows", CategoricalDistribution(("rows", "rows_columns", "grid"))),
    "rows": Param(1, CategoricalDistribution((1, 2, 4))),  # read at each time step; not of a grid
    "layers": Param(1, IntDistribution(1, 2)),  # one of a grid reads its rows, then its columns
    "units": Param(128, IntDistribution(32, 128, step=32)),  # of all directions together
    "bidirectional": Param(False, CategoricalDistribution((False, True))),
    "batch_norm": Param(False, CategoricalDistribution((False, True))),  # after each reader
    "dense_units": Param(128, IntDistribution(64, 512, step=64)),
} | _recipe.PARAMS
STEPS, SCREEN, LATE = _recipe.STEPS, _recipe.SCREEN, _recipe.LATE
FIXED = _recipe.FIXED | {"batch_norm": True}
_PRIOR = _recipe.PRIOR | {
    "batch_size": 128,
    "reading": "rows_columns",
    "rows": 2,
    "layers": 1,
    "units": 128,
    "bidirectional": True,
    "batch_norm": True,
    "dense_units": 128,
}
_GRID = _PRIOR | {"reading": "grid", "dense_units": 256}
PRIORS = [_PRIOR, _GRID, _GRID | {"layers": 2, "units": 64}]
PRELOAD = ("pipeline.models._keras", "pipeline.models._fused")  # imported once for all trials


def unused(params: Params) -> set[str]:
    """Hyperparameters without effect beside the others."""
    return {"rows"} if params["reading"] == "grid" else set()


def build(params: Params, n_outputs: int = len(LETTERS), lstm: Any = None) -> "keras.Model":
    """Letters (n, 28, 28) uint8 in, probabilities (n, n_outputs) float32 out.

    ``lstm`` is the class of its LSTM layers, Keras's if None.
    """
    import keras
    from keras import layers

    lstm = lstm or layers.LSTM
    letters = keras.Input((SIDE, SIDE), dtype="uint8")
    x = layers.Rescaling(1 / 255)(letters)
    if params["reading"] == "grid":
        x = layers.Flatten()(_read_grid(x, params, lstm))
    elif params["reading"] == "rows":
        x = _read_rows(x, params, lstm)
    else:
        columns = _read_rows(layers.Permute((2, 1))(x), params, lstm)
        x = layers.Concatenate()([_read_rows(x, params, lstm), columns])
    x = layers.Dense(params["dense_units"], use_bias=not params["batch_norm"])(x)
    x = layers.ReLU()(_normed(x, params))
    x = layers.Dropout(params["dropout"])(x)
    answer = layers.Dense(n_outputs, activation="softmax", dtype="float32")(x)
    return keras.Model(letters, answer, name="lstm")


def _read_rows(x: Any, params: Params, lstm: Any) -> Any:
    """Rows (n, 28, 28), some at each time step, to what the last reader makes of all."""
    from keras import layers

    x = layers.Reshape((SIDE // params["rows"], SIDE * params["rows"]))(x)
    for layer in range(1, params["layers"] + 1):
        x = _normed(_reader(params, lstm, sequences=layer < params["layers"])(x), params)
    return x


def _read_grid(x: Any, params: Params, lstm: Any) -> Any:
    """Pixels (n, 28, 28) to (n, side, side, units), each patch read with all in its row and column.

    The readers of a sweep have the same weights, and so are one on side times as many sequences.
    """
    import keras
    from keras import layers

    side = SIDE // PATCH
    x = layers.Reshape((side, PATCH, side, PATCH))(x)
    x = layers.Reshape((side, side, PATCH**2))(layers.Permute((1, 3, 2, 4))(x))
    for _ in range(2 * params["layers"]):
        sequences = keras.ops.reshape(x, (-1, side, x.shape[-1]))
        read = _reader(params, lstm, sequences=True)(sequences)
        x = keras.ops.reshape(read, (-1, side, side, read.shape[-1]))
        x = _normed(layers.Permute((2, 1, 3))(x), params)  # now along the other side
    return x


def _reader(params: Params, lstm: Any, sequences: bool) -> Any:
    """An LSTM, or two that read against each other, of ``units`` together."""
    from keras import layers

    if params["bidirectional"]:
        return layers.Bidirectional(lstm(params["units"] // 2, return_sequences=sequences))
    return lstm(params["units"], return_sequences=sequences)


def _normed(x: Any, params: Params) -> Any:
    from keras import layers

    return layers.BatchNormalization(momentum=0.9)(x) if params["batch_norm"] else x


def fit(params: Params, train: Part, val: Part, seed: int, report: Report) -> Fitted:
    """Train on ``train``, report the accuracy on ``val`` after every epoch."""
    from pipeline.models import _fused, _keras

    fused = partial(build, lstm=_fused.FusedLSTM)
    return _keras.fit(build, params, train, val, seed, report, build_fused=fused)
