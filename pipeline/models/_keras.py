"""What the two networks share: how they are trained and saved. Imports TensorFlow."""

import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline import quiet
from pipeline.bill import METER, OverBudget, charge
from pipeline.spec import (
    LATE_LETTERS,
    LETTERS,
    SIDE,
    TTA,
    VALIDATION,
    Fitted,
    Images,
    Params,
    Part,
    Probabilities,
    Report,
)

quiet.import_keras()

import keras  # noqa: E402
import mlflow.keras  # noqa: E402
import tensorflow as tf  # noqa: E402

from pipeline.models import _distort, _fused  # noqa: E402

PREDICT_BATCH = 512  # letters; larger gains nothing on a CPU
WHOLE_EPOCHS = 10  # from so many on letters are distorted with full strength
# Of so many letters the order is drawn in memory, 200 bytes each; of more it is computed.
MAX_DRAWN = 1 << 17
ROUNDS = 16  # of the cipher that computes it; with the usual 4 the orders of epochs are correlated
WARM_UP = 0.1  # share of the schedule in which the learning rate rises
SAFE = 0.9  # of what is left at half of a fit, that is planned with: epochs vary in cost
# A first epoch that promises to take so many times what is left is given up; the nearer its half,
# where it is known best, the sooner. It is judged from an eighth of its batches on, of so many at
# least, since they vary in cost; from the half on, what is lost is less than what was spent, and an
# accuracy may come of it yet.
HOPELESS, FEWEST_BATCHES = 1.2, 8
# Where a letter begins in its picture with a pixel around it: in the middle, and shifted by one.
SHIFTS = ((1, 1), (0, 1), (2, 1), (1, 0), (1, 2))


class _Schedule(keras.optimizers.schedules.LearningRateSchedule):  # type: ignore[misc]
    """A learning rate's schedule, the rest of which may be gone through in fewer batches."""

    def __init__(self, schedule: Any) -> None:
        self.schedule = schedule
        self.turn, self.pace = tf.Variable(0.0), tf.Variable(1.0)

    def __call__(self, step: Any) -> Any:
        """The learning rate of a batch; ``step`` counts them from 0."""
        return self.schedule(self.turn + (tf.cast(step, tf.float32) - self.turn) * self.pace)

    def hasten(self, turn: int, pace: float) -> None:
        """From the batch ``turn`` on each counts for ``pace``."""
        self.turn.assign(turn)
        self.pace.assign(pace)


class _Shortening(keras.callbacks.Callback):  # type: ignore[misc]
    """Has a fit see fewer letters in the second half of its epochs where its grant asks for that.

    A learning rate that is still high when the CPU-seconds are gone leaves a bad model: its
    schedule is to complete. What a fit costs is known from a sweep's screen, but a machine may have
    become busier since, and takes more CPU-seconds for the same work: at half of it that is seen.
    Where they end all the same, the fit ends with the epoch before (``cut``). One that has no epoch
    yet has no model: where the first is seen to be too dear, the rest of the grant is not lost.
    """

    def __init__(self, params: Params, n_batches: int, reporter: "_Reporter") -> None:
        super().__init__()
        self.n_epochs, self.batch_size = int(params["epochs"]), int(params["batch_size"])
        self.half, self.reporter = self.n_epochs // 2, reporter
        self.n_batches = n_batches  # of an epoch, from now on
        self.given = math.ceil(params[LATE_LETTERS] / self.batch_size)
        self.found: Params = {}
        self.cut, self.n_done = False, 0  # batches of this epoch
        self.epoch, self.traced = 0, 0.0  # CPU-seconds until the first batch was through

    def on_epoch_begin(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        self.epoch, self.n_done = epoch, 0
        if epoch == self.half and epoch > 0:
            self._shorten(min(self.n_batches, self.given or self._affordable()))

    def on_epoch_end(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        self.model.stop_training = self.cut  # else the epoch has ended, not the fit

    def _affordable(self) -> int:
        """Batches of an epoch for what is left, by what those before have cost; at least 1."""
        left: float = METER.left()
        if math.isinf(left):
            return self.n_batches
        look = self.reporter.looks / self.half
        batch = (METER.seconds()["fit"] / self.half - look) / self.n_batches
        left -= (self.reporter.n_wanted - 1) * look  # the last one is at so many copies
        epoch = SAFE * left / (self.n_epochs - self.half) - look
        return max(1, math.floor(epoch / batch))

    def _shorten(self, n_batches: int) -> None:
        if n_batches < self.n_batches and not self.given:
            self.found = {LATE_LETTERS: n_batches * self.batch_size}
        rate = self.model.optimizer._learning_rate
        if isinstance(rate, _Schedule):
            rate.hasten(self.half * self.n_batches, self.n_batches / n_batches)
        self.n_batches = n_batches

    def watch(self, net: Any) -> None:
        """Look at each batch, and have Keras end an epoch early where it must.

        The next epoch goes on with the letters that follow.
        """
        train = net.train_function

        def watched(iterator: Any) -> Any:
            logs = train(iterator)
            self.n_done += 1
            if self.epoch == 0:
                self._judge()
            else:
                self.cut = METER.left() < 0
                net.stop_training = self.cut or self.n_done == self.n_batches
            return logs

        net.train_function = watched

    def _judge(self) -> None:
        """Give the fit up where its first epoch, by what its batches have cost, is too dear."""
        if self.n_done == 1:  # which has built the graph
            self.traced = time.process_time()
        elif max(FEWEST_BATCHES, self.n_batches / 8) <= self.n_done <= self.n_batches / 2:
            batch = (time.process_time() - self.traced) / (self.n_done - 1)
            look = VALIDATION * len(self.reporter.val.labels) / self.batch_size  # in batches
            further, left = (self.n_batches - self.n_done + look) * batch, METER.left()
            if further > left * (HOPELESS - (HOPELESS - 1) * self.n_done / (self.n_batches / 2)):
                raise OverBudget(
                    f"after {self.n_done} of its {self.n_batches} batches the first epoch needs "
                    f"{further:.1f} CPU-seconds more, and {max(0.0, left):.1f} are left"
                )


class _Reporter(keras.callbacks.Callback):  # type: ignore[misc]
    """Passes the validation accuracy of every epoch on, and stops where ``report`` says so.

    It is that of ``answering``, a network in float32 that has the trained one's weights, as the one
    that is logged has. ``predict`` gives its answers: after the last epoch the mean of those to
    shifted copies, if the recipe asks for that and the grant pays for it. Before, that would cost
    too much, and be worth the same to each.
    """

    def __init__(self, answering: Any, params: Params, val: Part, report: Report) -> None:
        super().__init__()
        self.answering, self.val, self.report = answering, val, report
        self.predict = _answers(answering)
        self.n_epochs, self.n_wanted = int(params["epochs"]), int(params[TTA])
        self.n_copies = 1  # that an answer is the mean of
        self.looks = 0.0  # CPU-seconds that the answers have taken

    def on_epoch_end(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        if self.model.stop_training:
            return  # this epoch was cut: what counts is the one before
        assert logs is not None
        if not math.isfinite(logs["loss"]):
            raise FloatingPointError(f"the loss is {logs['loss']} after epoch {epoch + 1}")
        self.answering.set_weights(self.model.get_weights())
        images, labels = self.val
        if epoch == 0:
            with charge("tracing"):
                self.predict(images[:1])
        look = self.looks / max(1, epoch)
        last = epoch + 1 == self.n_epochs
        if last and self.n_wanted > 1 and METER.left() >= self.n_wanted * look:
            self.n_copies = self.n_wanted
            self.predict = _averaged(self.predict, self.n_copies)
        began = time.process_time()
        guess = self.predict(images).argmax(axis=1)
        self.looks += time.process_time() - began
        if self.report(epoch + 1, float(np.mean(guess == labels))):
            self.model.stop_training = True


def fit(
    build: Callable[[Params], keras.Model],
    params: Params,
    train: Part,
    val: Part,
    seed: int,
    report: Report,
    build_fused: Callable[[Params], keras.Model] | None = None,
) -> Fitted:
    """Train by the recipe in ``params``, the names of which are in ``_recipe.PARAMS``.

    ``build`` makes the network that is logged. ``build_fused``, where given, makes those that are
    trained and that answer here: with the same weights and answers, in layers that cost less.
    Forgets the process's earlier networks, and seeds every generator.
    """
    with ExitStack() as tracing:
        tracing.enter_context(charge("tracing"))  # until the first batch is through
        keras.utils.clear_session()
        keras.utils.set_random_seed(seed)
        build_here = build_fused or build
        answering = build_here(params)
        keras.config.set_dtype_policy(params["dtype_policy"])
        try:
            net = build_here(params)
        finally:
            keras.config.set_dtype_policy("float32")
        n_batches = math.ceil(_n_seen(train, params) / params["batch_size"])
        net.compile(
            optimizer=_optimizer(params, n_batches * params["epochs"]),
            loss=keras.losses.CategoricalCrossentropy(label_smoothing=params["label_smoothing"]),
        )
        # Variables that are made while a function is traced have it traced a second time.
        net.optimizer.build(net.trainable_variables)
        net.make_train_function()
        reporter = _Reporter(answering, params, val, report)
        shortening = _Shortening(params, n_batches, reporter)
        shortening.watch(net)
        _charge_first_call(net, "train_function", tracing)
        callbacks = [shortening, reporter]  # who has the last word
        if params["average"]:  # before the reporter, who is to see the averaged weights
            callbacks.insert(0, keras.callbacks.SwapEMAWeights(swap_on_epoch=True))
        net.fit(
            _batches(train, params, seed),
            epochs=params["epochs"],
            steps_per_epoch=n_batches,
            callbacks=callbacks,
            shuffle=False,  # the batches are, each epoch anew
            verbose=0,
        )
    rebuild = partial(build, params) if build_fused else None
    fewer = {TTA: reporter.n_copies} if reporter.n_copies < params[TTA] else {}
    return Fitted(
        predict=reporter.predict,
        save_model=partial(_save_model, answering, rebuild, reporter.n_copies),
        requirements=("tensorflow", "keras", "numpy"),
        n_steps=params["epochs"],
        found=shortening.found | fewer,
    )


def _optimizer(params: Params, n_batches: int) -> keras.optimizers.Optimizer:
    """AdamW, which is Adam where ``weight_decay`` is 0; its schedule ends with the last batch."""
    rate = params["learning_rate"]
    if params["schedule"] == "cosine":
        warm_up = max(1, round(WARM_UP * n_batches))
        cosine = keras.optimizers.schedules.CosineDecay(
            rate / 10, max(1, n_batches - warm_up), warmup_target=rate, warmup_steps=warm_up
        )
        rate = _Schedule(cosine)
    average = params["average"]
    return _fused.FusedAdamW(
        rate,
        params["weight_decay"],
        undecayed=("bias", "beta", "gamma"),
        use_ema=average > 0,
        ema_momentum=average or 0.99,
    )


def _n_seen(train: Part, params: Params) -> int:
    """How many letters an epoch is of."""
    n_letters = len(train.labels)
    return min(params["n_letters"] or n_letters, n_letters)


def _batches(train: Part, params: Params, seed: int) -> tf.data.Dataset:
    """Endless batches of letters, each epoch in another order, distorted anew each time.

    Where they are not all they are those that ``Part.some`` takes, but no copy of these.
    """
    n_seen = _n_seen(train, params)
    # A short fit does not overfit: it learns more from letters as they are.
    strength = params["augment"] * min(1.0, params["epochs"] / WHOLE_EPOCHS)

    def read(rows: npt.NDArray[np.int64]) -> Part:
        rows = rows * len(train.labels) // n_seen
        return Part(train.images[rows], train.labels[rows])

    @tf.autograph.experimental.do_not_convert  # type: ignore[untyped-decorator]
    def batch(rows: Any, key: Any) -> tuple[Any, Any]:
        # A tensor of all letters would be a copy of them, and tf.data's optimiser makes another.
        letters, labels = tf.numpy_function(read, [rows], (tf.uint8, tf.uint8), stateful=False)
        letters.set_shape((None, *train.images.shape[1:]))
        labels.set_shape((None,))
        if strength:
            letters = _distort.distort(letters, strength, key)
        return letters, tf.one_hot(labels, len(LETTERS))

    rows = _rows(n_seen, params["batch_size"], seed)
    keys = tf.data.Dataset.random(seed=seed, rerandomize_each_iteration=True).batch(2)
    options = tf.data.Options()
    options.threading.private_threadpool_size = 1
    return tf.data.Dataset.zip(rows, keys).map(batch).with_options(options)


def _rows(n_letters: int, batch_size: int, seed: int) -> tf.data.Dataset:
    """Endless batches of row numbers: each of ``n_letters`` once an epoch, each time shuffled."""
    rows = tf.data.Dataset.range(n_letters)
    if n_letters <= MAX_DRAWN:
        return rows.shuffle(n_letters, seed=seed).batch(batch_size).repeat()
    batches = rows.batch(batch_size)

    @tf.autograph.experimental.do_not_convert  # type: ignore[untyped-decorator]
    def shuffled(epoch: Any) -> tf.data.Dataset:
        # Keys that follow each other give orders that are alike: they are drawn.
        seeds = tf.stack([tf.constant(seed, tf.int64), epoch])
        key = tf.random.stateless_uniform([3], seeds, None, None, tf.int32)
        return batches.map(
            lambda some: tf.raw_ops.RandomIndexShuffle(
                index=some, seed=key, max_index=n_letters - 1, rounds=ROUNDS
            )
        )

    return tf.data.Dataset.counter().flat_map(shuffled)


def _charge_first_call(net: Any, name: str, charged: AbstractContextManager[Any]) -> None:
    """Charge the first call of one of a network's functions, which builds its graph."""
    function = getattr(net, name)

    def first(iterator: Any) -> Any:
        setattr(net, name, function)
        with charged:
            return function(iterator)

    setattr(net, name, first)


def _save_model(
    net: Any, build: Callable[[], keras.Model] | None, n_copies: int, path: str, **arguments: Any
) -> None:
    """As an MLflow flavour's ``save_model``: a network, or its weights in what ``build`` makes."""
    if build:
        weights, net = net.get_weights(), build()
        net.set_weights(weights)
    if n_copies > 1:
        net = _averaging(net, n_copies)
    Path(path).mkdir()  # else mlflow.keras has no folder yet to write the input example to
    mlflow.keras.save_model(net, path, **arguments)


def _answers(net: Any) -> Callable[[Images], Probabilities]:
    """What a network answers to letters: (n, 28, 28) uint8 in, (n, 26) float32 out.

    Keras's own ``predict`` traces the graph twice, for whole batches and for what is left of them:
    1 CPU-second more for an LSTM, of the 7 to 11 that its short fits take.
    """
    letters = tf.TensorSpec((None, *net.input_shape[1:]), tf.uint8)
    call = tf.function(partial(net, training=False), input_signature=[letters])

    def predict(images: Images) -> Probabilities:
        starts = range(0, len(images), PREDICT_BATCH)
        return np.concatenate([call(images[i : i + PREDICT_BATCH]).numpy() for i in starts])

    return predict


def _copies(letters: Any, n_copies: int) -> list[Any]:
    """Letters (n, 28, 28), and copies of all that are shifted by a pixel, in arrays or a graph."""
    framed = keras.ops.pad(letters, ((0, 0), (1, 1), (1, 1)))
    return [framed[:, y : y + SIDE, x : x + SIDE] for y, x in SHIFTS[:n_copies]]


def _averaged(
    predict: Callable[[Images], Probabilities], n_copies: int
) -> Callable[[Images], Probabilities]:
    """What answers with the mean of what ``predict`` answers to copies.

    As with the crops of Krizhevsky et al. 2012, "ImageNet classification with deep convolutional
    neural networks".
    """

    def answer(some: Images) -> Probabilities:
        answers = [predict(np.asarray(one)) for one in _copies(some, n_copies)]
        mean: Probabilities = np.mean(answers, axis=0)
        return mean

    def averaged(images: Images) -> Probabilities:
        starts = range(0, len(images), PREDICT_BATCH)  # the letters may lie on disk
        return np.concatenate([answer(images[i : i + PREDICT_BATCH]) for i in starts])

    return averaged


def _averaging(net: Any, n_copies: int) -> keras.Model:
    """``_averaged`` as a network: ``net`` with its weights, once on all copies."""
    letters = keras.Input((SIDE, SIDE), dtype="uint8")
    answers = net(keras.ops.concatenate(_copies(letters, n_copies)))
    each = keras.ops.reshape(answers, (n_copies, -1, answers.shape[-1]))
    return keras.Model(letters, keras.ops.mean(each, axis=0), name=net.name)
