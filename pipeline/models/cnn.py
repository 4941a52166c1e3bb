"""A convolutional network. The defaults are the deck's: three convolutions, one dense layer."""

from typing import TYPE_CHECKING, Any

from optuna.distributions import CategoricalDistribution, IntDistribution

from pipeline.models import _recipe
from pipeline.spec import LETTERS, SIDE, Fitted, Param, Params, Part, Report

if TYPE_CHECKING:
    import keras

PARAMS = {
    "filters": Param(32, IntDistribution(16, 48, step=16)),  # of the first of three stages
    "widening": Param(1, CategoricalDistribution((1, 2))),  # the third's by the second's, twice 1st
    "convolutions": Param(1, IntDistribution(1, 2)),  # in the second stage and in the third
    "kernel_size": Param(3, CategoricalDistribution((3, 5))),  # of the first; the others have 3
    "padding": Param("valid", CategoricalDistribution(("valid", "same"))),  # of each stage's first
    "batch_norm": Param("none", CategoricalDistribution(("none", "before_pool", "after_pool"))),
    "separable": Param(False, CategoricalDistribution((False, True))),  # but for the first
    "dense_units": Param(128, IntDistribution(64, 512, step=64)),
} | _recipe.PARAMS
STEPS, SCREEN, LATE, FIXED = _recipe.STEPS, _recipe.SCREEN, _recipe.LATE, _recipe.FIXED
_PRIOR = _recipe.PRIOR | {
    "filters": 32,
    "widening": 2,
    "convolutions": 1,
    "kernel_size": 5,
    "padding": "same",
    "batch_norm": "after_pool",
    "separable": False,
    "dense_units": 256,
}
PRIORS = [_PRIOR, _PRIOR | {"filters": 16}, _PRIOR | {"convolutions": 2, "kernel_size": 3}]
PRELOAD = ("pipeline.models._keras",)  # imported once for all trials


def build(params: Params, n_outputs: int = len(LETTERS)) -> "keras.Model":
    """Letters (n, 28, 28) uint8 in, probabilities (n, n_outputs) float32 out."""
    import keras
    from keras import layers

    norm, padding = params["batch_norm"], params["padding"]
    second = 2 * params["filters"]

    def normed(x: Any) -> Any:
        return layers.BatchNormalization(momentum=0.9)(x)

    letters = keras.Input((SIDE, SIDE), dtype="uint8")
    x = layers.Reshape((SIDE, SIDE, 1))(layers.Rescaling(1 / 255)(letters))
    for stage, filters in enumerate((params["filters"], second, params["widening"] * second)):
        n_convolutions = params["convolutions"] if stage else 1
        convolution = layers.SeparableConv2D if params["separable"] and stage else layers.Conv2D
        kernel = 3 if stage else params["kernel_size"]
        for place in range(1, n_convolutions + 1):
            around = padding if place == 1 else "same"  # a map of 5x5 has no room for two without
            x = convolution(filters, kernel, padding=around, use_bias=norm == "none")(x)
            last = place == n_convolutions
            if norm == "before_pool" or (norm == "after_pool" and not last):
                x = normed(x)
            # Without padding the map is 5x5 before the deck's third convolution, and 3x3 after it.
            if last and (stage < 2 or padding == "same"):
                x = layers.MaxPooling2D()(x)
            if norm == "after_pool" and last:
                x = normed(x)
            x = layers.ReLU()(x)  # after pooling, where it costs a quarter and is the same
    x = layers.Dense(params["dense_units"], use_bias=norm == "none")(layers.Flatten()(x))
    x = layers.ReLU()(x if norm == "none" else normed(x))
    x = layers.Dropout(params["dropout"])(x)
    answer = layers.Dense(n_outputs, activation="softmax", dtype="float32")(x)
    return keras.Model(letters, answer, name="cnn")


def fit(params: Params, train: Part, val: Part, seed: int, report: Report) -> Fitted:
    """Train on ``train``, report the accuracy on ``val`` after every epoch."""
    from pipeline.models import _keras

    return _keras.fit(build, params, train, val, seed, report)
