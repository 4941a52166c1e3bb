"""What the two networks share: how they are trained and saved. Imports TensorFlow."""

import math
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from pipeline import quiet
from pipeline.spec import Fitted, Images, Params, Part, Probabilities, Report

quiet.import_keras()

import keras  # noqa: E402
import mlflow.keras  # noqa: E402

PREDICT_BATCH = 512  # letters; larger gains nothing on a CPU


class _Reporter(keras.callbacks.Callback):  # type: ignore[misc]
    """Passes the validation accuracy of every epoch on, and stops where ``report`` says so."""

    def __init__(self, report: Report) -> None:
        super().__init__()
        self.report = report

    def on_epoch_end(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        assert logs is not None
        if not math.isfinite(logs["loss"]):
            raise FloatingPointError(f"the loss is {logs['loss']} after epoch {epoch + 1}")
        if self.report(epoch + 1, logs["val_accuracy"]):
            self.model.stop_training = True


def prepare(seed: int) -> None:
    """Forget the process's earlier networks and seed every generator."""
    keras.utils.clear_session()
    keras.utils.set_random_seed(seed)


def fit(net: keras.Model, params: Params, train: Part, val: Part, report: Report) -> Fitted:
    """Train with Adam and cross-entropy; ``params`` has learning_rate, batch_size and epochs."""
    net.compile(
        optimizer=keras.optimizers.Adam(learning_rate=params["learning_rate"]),
        loss="sparse_categorical_crossentropy",
        metrics=["accuracy"],
    )
    net.fit(
        np.asarray(train.images),
        np.asarray(train.labels),
        batch_size=params["batch_size"],
        epochs=params["epochs"],
        validation_data=(np.asarray(val.images), np.asarray(val.labels)),
        validation_batch_size=PREDICT_BATCH,
        callbacks=[_Reporter(report)],
        verbose=0,
    )
    return Fitted(
        predict=partial(_predict, net),
        save_model=partial(_save_model, net),
        requirements=("tensorflow", "keras", "numpy"),
        n_steps=params["epochs"],
    )


def _save_model(net: Any, path: str, **arguments: Any) -> None:
    Path(path).mkdir()  # else mlflow.keras has no folder yet to write the input example to
    mlflow.keras.save_model(net, path, **arguments)


def _predict(net: Any, images: Images) -> Probabilities:
    result: Probabilities = net.predict(images, batch_size=PREDICT_BATCH, verbose=0)
    return result
