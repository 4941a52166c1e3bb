"""What the two networks share: how they are trained and saved. Imports TensorFlow."""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from pipeline import quiet
from pipeline.bill import charge
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


def fit(
    build: Callable[[Params], keras.Model],
    params: Params,
    train: Part,
    val: Part,
    seed: int,
    report: Report,
) -> Fitted:
    """Train with Adam and cross-entropy; ``params`` has learning_rate, batch_size and epochs.

    Forgets the process's earlier networks, and seeds every generator.
    """
    with ExitStack() as tracing:
        tracing.enter_context(charge("tracing"))  # until the first batch is through
        keras.utils.clear_session()
        keras.utils.set_random_seed(seed)
        net = build(params)
        net.compile(
            optimizer=keras.optimizers.Adam(learning_rate=params["learning_rate"]),
            loss="sparse_categorical_crossentropy",
            metrics=["accuracy"],
        )
        net.make_train_function()
        net.make_test_function()
        _charge_first_call(net, "train_function", tracing)
        _charge_first_call(net, "test_function", charge("tracing"))
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


def _charge_first_call(net: Any, name: str, charged: AbstractContextManager[Any]) -> None:
    """Charge the first call of one of a network's functions, which builds its graph."""
    function = getattr(net, name)

    def first(iterator: Any) -> Any:
        setattr(net, name, function)
        with charged:
            return function(iterator)

    setattr(net, name, first)


def _save_model(net: Any, path: str, **arguments: Any) -> None:
    Path(path).mkdir()  # else mlflow.keras has no folder yet to write the input example to
    mlflow.keras.save_model(net, path, **arguments)


def _predict(net: Any, images: Images) -> Probabilities:
    result: Probabilities = net.predict(images, batch_size=PREDICT_BATCH, verbose=0)
    return result
