"""A convolutional network. The defaults are the deck's: three convolutions, one dense layer."""

from typing import TYPE_CHECKING

from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from pipeline.spec import LETTERS, SIDE, Fitted, Param, Params, Part, Report

if TYPE_CHECKING:
    import keras

PARAMS = {
    "filters": Param(32, IntDistribution(16, 64, step=16)),  # of the first; the others have twice
    "kernel_size": Param(3, CategoricalDistribution((3, 5))),
    "dense_units": Param(128, IntDistribution(64, 256, step=64)),
    "dropout": Param(0.0, FloatDistribution(0.0, 0.5, step=0.1)),  # before the output
    "learning_rate": Param(1e-3, FloatDistribution(3e-4, 5e-3, log=True)),
    "batch_size": Param(32, CategoricalDistribution((32, 64, 128, 256))),
    "epochs": Param(10, IntDistribution(1, 20)),
}
PRELOAD = ("pipeline.models._keras",)  # imported once for all trials


def build(params: Params, n_outputs: int = len(LETTERS)) -> "keras.Model":
    """Letters (n, 28, 28) uint8 in, probabilities (n, n_outputs) float32 out."""
    import keras
    from keras import layers

    filters, kernel = params["filters"], params["kernel_size"]
    return keras.Sequential(
        [
            keras.Input((SIDE, SIDE), dtype="uint8"),
            layers.Rescaling(1 / 255),
            layers.Reshape((SIDE, SIDE, 1)),
            layers.Conv2D(filters, kernel, activation="relu"),
            layers.MaxPooling2D(),
            layers.Conv2D(2 * filters, kernel, activation="relu"),
            layers.MaxPooling2D(),
            # The map is 5x5, or 4x4 after 5x5 kernels: a third one fits as 3x3 only.
            layers.Conv2D(2 * filters, 3, activation="relu"),
            layers.Flatten(),
            layers.Dense(params["dense_units"], activation="relu"),
            layers.Dropout(params["dropout"]),
            layers.Dense(n_outputs, activation="softmax"),
        ],
        name="cnn",
    )


def fit(params: Params, train: Part, val: Part, seed: int, report: Report) -> Fitted:
    """Train on ``train``, report the accuracy on ``val`` after every epoch."""
    from pipeline.models import _keras

    return _keras.fit(build, params, train, val, seed, report)
