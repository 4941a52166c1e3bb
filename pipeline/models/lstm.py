"""An LSTM that reads a letter row by row. The defaults are the deck's."""

from typing import TYPE_CHECKING

from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from pipeline.spec import LETTERS, SIDE, Fitted, Param, Params, Part, Report

if TYPE_CHECKING:
    import keras

PARAMS = {
    "units": Param(128, IntDistribution(64, 192, step=32)),
    "bidirectional": Param(False, CategoricalDistribution((False, True))),  # units are halved
    "dense_units": Param(128, IntDistribution(64, 256, step=64)),
    "dropout": Param(0.0, FloatDistribution(0.0, 0.5, step=0.1)),  # before the output
    "learning_rate": Param(1e-3, FloatDistribution(5e-4, 1e-2, log=True)),
    "batch_size": Param(32, CategoricalDistribution((32, 64, 128, 256))),
    "epochs": Param(10, IntDistribution(1, 20)),
}
PRELOAD = ("pipeline.models._keras",)  # imported once for all trials


def build(params: Params, n_outputs: int = len(LETTERS)) -> "keras.Model":
    """Letters (n, 28, 28) uint8 in, probabilities (n, n_outputs) float32 out."""
    import keras
    from keras import layers

    if params["bidirectional"]:
        reader = layers.Bidirectional(layers.LSTM(params["units"] // 2))
    else:
        reader = layers.LSTM(params["units"])
    return keras.Sequential(
        [
            keras.Input((SIDE, SIDE), dtype="uint8"),  # 28 time steps of 28 pixels
            layers.Rescaling(1 / 255),
            reader,
            layers.Dense(params["dense_units"], activation="relu"),
            layers.Dropout(params["dropout"]),
            layers.Dense(n_outputs, activation="softmax"),
        ],
        name="lstm",
    )


def fit(params: Params, train: Part, val: Part, seed: int, report: Report) -> Fitted:
    """Train on ``train``, report the accuracy on ``val`` after every epoch."""
    from pipeline.models import _keras

    return _keras.fit(build, params, train, val, seed, report)
