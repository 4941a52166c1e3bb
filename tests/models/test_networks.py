"""Laws of the networks: what they are built of, how letters are distorted, how they are trained."""

import math
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from optuna.distributions import CategoricalDistribution

from pipeline import models, registry
from pipeline.bill import OverBudget
from pipeline.models import _distort, _fused, _keras, cnn, lstm
from pipeline.spec import Params, Part

RNG = np.random.default_rng(0)
FUSED = _fused.FusedLSTM
IMAGES = np.zeros((60, 28, 28), np.uint8)
IMAGES[:, 8:20, 10:18] = RNG.integers(100, 256, (60, 12, 8))
LETTERS = Part(IMAGES, (np.arange(60) % 26).astype(np.uint8))


def choices() -> Iterator[Any]:
    """Every value of a choice, and both ends of a range, beside each network's defaults."""
    for model in ("cnn", "lstm"):
        for name, param in registry.load(models, model).PARAMS.items():
            space: Any = param.distribution
            ends = getattr(space, "choices", None) or (space.low, space.high)
            for value in ends:
                yield pytest.param(model, {name: value}, id=f"{model}-{name}-{value}")
        for prior in registry.load(models, model).PRIORS:
            yield pytest.param(model, prior, id=f"{model}-prior")


def params_of(model: str, change: Params) -> Params:
    defaults = {name: param.default for name, param in registry.load(models, model).PARAMS.items()}
    return defaults | change


@pytest.mark.parametrize(("model", "change"), list(choices()))
def test_every_choice_builds_a_network(model: str, change: Params) -> None:
    net = registry.load(models, model).build(params_of(model, change))
    probabilities = net(IMAGES[:2]).numpy()
    assert probabilities.shape == (2, 26)
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, atol=1e-5)


@pytest.mark.parametrize("model", ["cnn", "lstm"])
def test_what_shapes_a_network_changes_it(model: str) -> None:
    member = registry.load(models, model)
    weights = {
        (name, value): member.build(params_of(model, {name: value})).count_params()
        for name, param in member.PARAMS.items()
        if isinstance(param.distribution, CategoricalDistribution)
        and name in ("batch_norm", "separable", "widening", "reading", "rows", "bidirectional")
        for value in param.distribution.choices
    }
    sizes = [
        [size for (other, _), size in weights.items() if other == name]
        for name in {name for name, _ in weights}
    ]
    assert all(len(set(found)) > 1 for found in sizes)


def distorted(strength: float, key: int = 1) -> Any:
    return _distort.distort(IMAGES, strength, np.array([key, 7])).numpy()


def test_distortions_are_drawn_by_their_key() -> None:
    np.testing.assert_array_equal(distorted(1.0), distorted(1.0))
    assert (distorted(1.0) != distorted(1.0, key=2)).any(axis=(1, 2)).all()
    # Law: no two letters of a batch are distorted alike.
    same = np.repeat(IMAGES[:1], 9, axis=0)
    found = _distort.distort(same, 1.0, np.array([1, 7])).numpy()
    assert len({letter.tobytes() for letter in found}) == 9


def test_a_distortion_of_strength_0_is_none_and_stronger_ones_go_farther() -> None:
    far = [np.abs(distorted(s).astype(int) - IMAGES).mean() for s in (0.0, 0.1, 0.5, 1.0)]
    assert far[0] == 0
    assert far == sorted(far)


def test_distorted_letters_stay_letters() -> None:
    found = distorted(1.0)
    assert (found.shape, found.dtype) == (IMAGES.shape, np.uint8)
    # Law: scaling by 15 % a side changes the ink by a third at most, and no ink leaves the picture.
    ratio = found.sum(axis=(1, 2), dtype=float) / IMAGES.sum(axis=(1, 2))
    assert 0.6 < ratio.min() < 1 < ratio.max() < 1.6


def test_a_fit_of_one_batch_has_a_rate() -> None:
    optimizer = _keras._optimizer(params_of("cnn", {"schedule": "cosine"}), 1)
    assert 0 < float(optimizer._learning_rate(0)) <= 1e-3


def test_a_rate_rises_and_falls_to_nothing() -> None:
    params = params_of("cnn", {"learning_rate": 0.01, "schedule": "cosine"})
    rates = [float(_keras._optimizer(params, 200)._learning_rate(step)) for step in range(201)]
    assert np.argmax(rates) == 20
    assert max(rates) == pytest.approx(0.01)
    assert rates[200] == pytest.approx(0, abs=1e-8)
    assert rates[20:] == sorted(rates[20:], reverse=True)
    constant = _keras._optimizer(params_of("cnn", {}), 200)
    assert float(constant.learning_rate) == pytest.approx(1e-3)


def batches(n_epochs: int, **change: Any) -> list[Any]:
    params = params_of("cnn", {"batch_size": 32, "epochs": n_epochs} | change)
    found = iter(_keras._batches(LETTERS, params, seed=5))
    return [next(found) for _ in range(2 * n_epochs)]


def test_an_epoch_has_each_letter_once_and_in_another_order() -> None:
    shuffled = [letters.numpy() for letters, _ in batches(2)]
    epochs = [np.concatenate(shuffled[:2]), np.concatenate(shuffled[2:])]
    assert (epochs[0] != epochs[1]).any()
    for epoch in epochs:
        assert sorted(map(bytes, epoch)) == sorted(map(bytes, IMAGES))


def test_some_letters_are_those_that_a_part_takes() -> None:
    params = params_of("cnn", {"batch_size": 32, "n_letters": 40})
    found = iter(_keras._batches(LETTERS, params, seed=5))
    seen = [next(found) for _ in range(4)]
    images, labels = LETTERS.some(40)
    for first, second in (seen[:2], seen[2:]):  # two epochs
        letters = np.concatenate([first[0], second[0]])
        assert sorted(map(bytes, letters)) == sorted(map(bytes, images))
        counts = first[1].numpy().sum(axis=0) + second[1].numpy().sum(axis=0)
        np.testing.assert_array_equal(counts, np.bincount(labels, minlength=26))


@pytest.mark.parametrize("n_drawn", [59, 60])
def test_every_epoch_shuffles_all_letters_in_memory_or_without(
    n_drawn: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_keras, "MAX_DRAWN", n_drawn)
    found = list(_keras._rows(60, 25, seed=5).take(9))
    again = list(_keras._rows(60, 25, seed=5).take(9))
    other = list(_keras._rows(60, 25, seed=6).take(9))
    assert [len(rows) for rows in found] == [25, 25, 10] * 3
    epochs = [np.concatenate(found[i : i + 3]).tolist() for i in (0, 3, 6)]
    # Law: each row once an epoch, never in the same order, and the seed decides it.
    assert all(sorted(epoch) == list(range(60)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in [*epochs, list(range(60))]}) == 4
    np.testing.assert_array_equal(np.concatenate(found), np.concatenate(again))
    assert (np.concatenate(found) != np.concatenate(other)).any()


def test_orders_that_are_computed_are_not_alike() -> None:
    n_letters = _keras.MAX_DRAWN + 5_000
    batches = iter(_keras._rows(n_letters, n_letters, seed=0))
    orders = [next(batches).numpy() for _ in range(6)]
    # Law: an order tells nothing of the next one, nor of the letters' own.
    correlations = np.corrcoef([*orders, np.arange(n_letters)])
    assert np.abs(correlations - np.eye(7)).max() < 0.02
    assert all(len(np.unique(order)) == n_letters for order in orders)


def anonymous_mb() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1e3 for line in lines if line.startswith("RssAnon"))


@pytest.mark.skipif(sys.platform != "linux", reason="/proc tells what memory is a process's own")
@pytest.mark.parametrize("n_seen", [0, 399_999])
def test_letters_on_disk_are_not_copied_into_memory(n_seen: int, tmp_path: Path) -> None:
    n_letters = 400_000  # 314 MB of pixels in a file with holes, which takes no room
    images = np.lib.format.open_memmap(tmp_path / "images.npy", "w+", np.uint8, (n_letters, 28, 28))
    del images
    part = Part(np.load(tmp_path / "images.npy", mmap_mode="r"), np.zeros(n_letters, np.uint8))
    list(_keras._batches(LETTERS, params_of("cnn", {}), 0).take(1))  # what TensorFlow itself takes
    before = anonymous_mb()
    params = params_of("cnn", {"batch_size": 32, "n_letters": n_seen})
    found = iter(_keras._batches(part, params, seed=0))
    assert [next(found)[0].shape[0] for _ in range(20)] == [32] * 20
    assert anonymous_mb() - before < 60


def test_a_letter_is_distorted_anew_each_time_and_keeps_its_label() -> None:
    seen = batches(10, augment=1.0)
    assert len({letter.tobytes() for letters, _ in seen for letter in letters.numpy()}) > 550
    counts = sum(labels.numpy().sum(axis=0) for _, labels in seen[:2])
    np.testing.assert_array_equal(counts, np.bincount(LETTERS.labels, minlength=26))


def test_short_fits_see_letters_less_distorted() -> None:
    def ink_outside(n_epochs: int) -> float:
        letters = np.concatenate([one.numpy() for one, _ in batches(n_epochs, augment=1.0)])
        return float((letters[:, :8].sum() + letters[:, 20:].sum()) / len(letters))

    assert ink_outside(1) < 0.5 * ink_outside(10)


def fit(**change: Any) -> tuple[list[float], Any]:
    values: list[float] = []
    params = params_of("cnn", {"epochs": 2, "filters": 16} | change)
    fitted = cnn.fit(params, LETTERS, LETTERS, 3, lambda step, value: bool(values.append(value)))
    return values, fitted.predict(IMAGES)


@pytest.mark.parametrize("change", [{}, {"augment": 1.0, "schedule": "cosine", "average": 0.99}])
def test_the_same_seed_gives_the_same_network(change: Params) -> None:
    (values, answers), (again, answers_again) = fit(**change), fit(**change)
    assert values == again
    np.testing.assert_allclose(answers, answers_again, atol=1e-5)


@pytest.mark.parametrize(
    ("n_letters", "rows"), [(0, range(60)), (61, range(60)), (20, range(0, 60, 3)), (7, None)]
)
def test_a_fit_may_see_some_of_the_letters(n_letters: int, rows: range | None) -> None:
    some = LETTERS.some(n_letters)
    if rows is None:  # it does not go into 60: from all over them, each once
        marked = Part(IMAGES, np.arange(60, dtype=np.uint8))
        taken = marked.some(n_letters).labels
        assert len(taken) == n_letters
        assert set(np.diff(taken)) == {8, 9}
        return
    np.testing.assert_array_equal(some.labels, LETTERS.labels[list(rows)])
    np.testing.assert_array_equal(some.images, IMAGES[list(rows)])
    params = params_of("cnn", {"epochs": 1, "filters": 16})
    answers = [
        cnn.fit(params | {"n_letters": n}, part, LETTERS, 3, lambda step, value: False).predict(
            IMAGES
        )
        for n, part in ((n_letters, LETTERS), (0, some))
    ]
    np.testing.assert_allclose(*answers, atol=1e-5)


def test_a_fit_in_bfloat16_answers_in_float32() -> None:
    values, answers = fit(dtype_policy="mixed_bfloat16")
    exact, exact_answers = fit()
    assert answers.dtype == np.float32
    # Law: rounding moves the answers, and not far.
    assert (answers != exact_answers).any()
    np.testing.assert_allclose(answers, exact_answers, atol=0.1)
    assert values == pytest.approx(exact, abs=0.1)


@pytest.mark.parametrize("average", [0.0, 0.99])
def test_a_fit_builds_its_graph_once(average: float, monkeypatch: pytest.MonkeyPatch) -> None:
    step, n_traces = keras.Model.train_step, 0

    def counting(net: Any, data: Any) -> Any:
        nonlocal n_traces
        n_traces += 1
        return step(net, data)

    monkeypatch.setattr(keras.Model, "train_step", counting)
    fit(average=average)
    assert n_traces == 1


def test_a_grid_has_no_rows_to_read_at_once() -> None:
    def layers(change: dict[str, Any]) -> list[dict[str, Any]]:
        net = lstm.build(params_of("lstm", change))
        return [{**layer.get_config(), "name": ""} for layer in net.layers]

    for reading, idle in (("grid", {"rows"}), ("rows", set()), ("rows_columns", set())):
        params = {"reading": reading}
        assert lstm.unused(params) == idle
        assert (layers(params | {"rows": 4}) == layers(params)) == bool(idle)


@pytest.mark.parametrize("model", ["cnn", "lstm"])
def test_answers_are_those_of_keras_from_one_graph(
    model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_keras, "PREDICT_BATCH", 7)
    net = registry.load(models, model).build(params_of(model, {}))
    graphs: list[Any] = []

    def traced(letters: Any, training: bool) -> Any:
        graphs.append(letters)
        return net(letters, training=training)

    traced.input_shape = net.input_shape  # type: ignore[attr-defined]
    predict = _keras._answers(traced)
    for n_letters in (1, 14, 19):  # one, whole batches, and some that are left
        found = predict(LETTERS.images[:n_letters])
        same = net.predict(LETTERS.images[:n_letters], batch_size=7, verbose=0)
        np.testing.assert_array_equal(found, same)
    assert len(graphs) == 1


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("sequences", [False, True])
def test_a_fused_lstm_has_the_answers_and_gradients_of_keras(
    sequences: bool, backwards: bool
) -> None:
    def read(kind: Any, weights: Any, seen: tf.Tensor) -> tuple[Any, list[Any]]:
        layer = kind(5, return_sequences=sequences, go_backwards=backwards)
        layer.build(seen.shape)
        layer.set_weights(weights)
        with tf.GradientTape() as tape:
            tape.watch(seen)
            answers = layer(seen)
            loss = tf.reduce_sum(tf.sin(3 * answers))
        gradients = tape.gradient(loss, [seen, *(one.value for one in layer.trainable_variables)])
        return answers.numpy(), [one.numpy() for one in gradients]

    seen = tf.constant(RNG.normal(size=(3, 4, 2)), tf.float32)
    weights = [RNG.normal(size=shape) for shape in ((2, 20), (5, 20), (20,))]
    answers, gradients = read(_fused.FusedLSTM, weights, seen)
    same, same_gradients = read(keras.layers.LSTM, weights, seen)
    np.testing.assert_allclose(answers, same, atol=1e-6)
    for gradient, other in zip(gradients, same_gradients, strict=True):
        np.testing.assert_allclose(gradient, other, atol=1e-5)


@pytest.mark.parametrize("given", [{"mask": np.ones((3, 4), bool)}, {"initial_state": "both"}])
def test_a_fused_lstm_refuses_what_it_cannot_do(given: dict[str, Any]) -> None:
    if given.get("initial_state"):
        given = {"initial_state": [np.zeros((3, 5), np.float32)] * 2}
    with pytest.raises(ValueError, match="without a mask or an initial state"):
        _fused.FusedLSTM(5)(np.zeros((3, 4, 2), np.float32), **given)


@pytest.mark.parametrize(
    ("reading", "policy", "rounded"),
    [
        ("rows", "float32", 1e-4),
        ("rows_columns", "float32", 1e-4),
        ("grid", "float32", 1e-4),
        ("grid", "mixed_bfloat16", 0.1),
    ],
)
def test_an_lstm_that_is_trained_fused_is_that_of_keras(
    reading: str, policy: str, rounded: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = {"epochs": 4, "learning_rate": 0.02, "units": 32, "bidirectional": reading != "rows"}
    params = params_of("lstm", few | {"reading": reading, "dtype_policy": policy})
    second = np.arange(60) % 2
    images = np.where(second[:, None, None], 255 - IMAGES, IMAGES)
    letters = Part(images, second.astype(np.uint8))
    kinds: list[set[type]] = []
    fitting = keras.Model.fit

    def noting(net: Any, *given: Any, **named: Any) -> Any:
        layers = [getattr(layer, "forward_layer", layer) for layer in net.layers]
        kinds.append({type(layer) for layer in layers if isinstance(layer, keras.layers.LSTM)})
        return fitting(net, *given, **named)

    def answers() -> Any:
        return lstm.fit(params, letters, letters, 3, lambda step, value: False).predict(images)

    monkeypatch.setattr(keras.Model, "fit", noting)
    fused = answers()
    assert (fused.argmax(axis=1) == second).all()
    monkeypatch.setattr(_fused, "FusedLSTM", None)  # then Keras's layer
    # Law: the same network comes of it, but for what bfloat16 rounds in Keras's layer.
    np.testing.assert_allclose(fused, answers(), atol=rounded)
    assert kinds == [{FUSED}, {keras.layers.LSTM}]


@pytest.mark.parametrize("decay", [0.0, 0.5])
@pytest.mark.parametrize("rate", [0.1, keras.optimizers.schedules.CosineDecay(0.1, 20)])
def test_fused_adamw_does_to_a_network_what_that_of_keras_does(rate: Any, decay: float) -> None:
    def trained(optimizer: keras.optimizers.Optimizer) -> Any:
        keras.utils.set_random_seed(0)
        # The norm first: a bias before it would have no gradient, and Adam scales noise up.
        hidden = keras.layers.Dense(7, activation="tanh")
        net = keras.Sequential([keras.layers.BatchNormalization(), hidden, keras.layers.Dense(1)])
        net.compile(optimizer, "mse")
        for _ in range(20):
            net.train_on_batch(seen, wanted)
        return net.get_weights()

    seen, wanted = RNG.normal(size=(50, 3)), RNG.normal(size=(50, 1))
    kept = ["bias", "gamma"]
    keras_s = keras.optimizers.AdamW(rate, weight_decay=decay)
    keras_s.exclude_from_weight_decay(var_names=kept)
    found, wanted_weights = trained(_fused.FusedAdamW(rate, decay, kept)), trained(keras_s)
    for weights, others in zip(found, wanted_weights, strict=True):
        np.testing.assert_allclose(weights, others, atol=1e-4)


class Grant:
    """A clock by which a fit has taken 4 CPU-seconds so far, and has ``left`` some."""

    def __init__(self, left: float) -> None:
        self.left = lambda: left

    def seconds(self) -> dict[str, float]:
        return {"fit": 4.0}


def halves(
    patch: pytest.MonkeyPatch, rates: list[list[float]] | None = None, **change: Any
) -> tuple[Any, list[list[float]]]:
    """A fit of two epochs in each half, 10 batches each, and the learning rates of each epoch.

    ``rates`` is a list in which there is one for the first epoch, to have them while it goes on.
    """
    rates = [[]] if rates is None else rates
    make = keras.Model.make_train_function

    def noting(net: Any, force: bool = False) -> None:
        again = net.train_function
        make(net, force)
        if again:
            return
        train = net.train_function

        def noted(iterator: Any) -> Any:
            rates[-1].append(float(net.optimizer.learning_rate))
            return train(iterator)

        net.train_function = noted

    patch.setattr(keras.Model, "make_train_function", noting)
    params = {"epochs": 4, "batch_size": 6, "filters": 16, "schedule": "cosine"} | change
    fitted = cnn.fit(
        params_of("cnn", params), LETTERS, LETTERS, 3, lambda step, value: bool(rates.append([]))
    )
    return fitted, rates[:-1]


# Of the 4 CPU-seconds each batch has taken 0.2, and a tenth of what is left is for dearer ones.
@pytest.mark.parametrize(("left", "n_batches"), [(0.0, 1), (2.0, 4), (9.0, 10)])
def test_a_fit_that_its_grant_cannot_pay_for_ends_its_schedule_sooner(
    left: float, n_batches: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_keras, "METER", Grant(left))
    fitted, rates = halves(monkeypatch)
    assert [len(epoch) for epoch in rates] == [10, 10, n_batches, n_batches]
    assert fitted.n_steps == 4
    # Law: whatever it may do, the learning rate falls as far.
    last = 0.5e-3 * (1 - math.cos(math.pi * 10 / n_batches / 36))  # with the last batch to do
    assert rates[-1][-1] == pytest.approx(last, rel=1e-3)
    falling = sum(rates, [])[4:]
    assert falling == sorted(falling, reverse=True)
    assert fitted.found == ({"late_letters": 6 * n_batches} if n_batches < 10 else {})
    # Law: the same comes of it again where that is given, whatever the grant.
    monkeypatch.setattr(_keras, "METER", Grant(3.0))
    same, again = halves(monkeypatch, late_letters=6 * n_batches)
    assert (again, same.found) == (rates, {})
    np.testing.assert_allclose(same.predict(IMAGES), fitted.predict(IMAGES), atol=1e-5)


# 20 batches of 0.2 CPU-seconds each, and a look at val that should cost as much as 5.4 of them.
@pytest.mark.parametrize(
    ("grant", "n_batches", "further"), [(4.9, 8, "3.5"), (5.0, 9, "3.3"), (5.1, 20, "")]
)
def test_a_first_epoch_that_its_grant_cannot_pay_for_is_given_up_early(
    grant: float, n_batches: int, further: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates: list[list[float]] = [[]]
    clock = SimpleNamespace(process_time=lambda: 0.2 * len(rates[-1]))
    meter = Grant(0.0)
    meter.left = lambda: grant - clock.process_time()
    monkeypatch.setattr(_keras, "METER", meter)
    monkeypatch.setattr(_keras, "time", clock)
    why = (
        f"^after {n_batches} of its 20 batches the first epoch needs {further} CPU-seconds more, "
        f"and {grant - 0.2 * n_batches:.1f} are left$"
    )
    with pytest.raises(OverBudget, match=why) if n_batches < 20 else nullcontext():
        halves(monkeypatch, rates, batch_size=3)
    assert len(rates[0]) == n_batches


def test_a_constant_rate_stays_where_a_fit_is_shortened(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_keras, "METER", Grant(2.0))
    rates = halves(monkeypatch, schedule="constant", average=0.99)[1]
    assert [len(epoch) for epoch in rates] == [10, 10, 4, 4]
    assert sum(rates, []) == pytest.approx([1e-3] * 28)


def test_what_nothing_limits_has_all_letters_in_each_epoch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fitted, rates = halves(monkeypatch)
    assert [len(epoch) for epoch in rates] == [10] * 4
    assert fitted.found == {}
    monkeypatch.setattr(_keras, "METER", Grant(0.0))  # a single epoch has no half
    assert [len(epoch) for epoch in halves(monkeypatch, epochs=1)[1]] == [10]
    assert [len(epoch) for epoch in halves(monkeypatch, late_letters=1000)[1]] == [10] * 4


@pytest.mark.parametrize("average", [0.0, 0.99])
def test_a_fit_whose_grant_ends_in_an_epoch_has_the_model_of_the_one_before(
    average: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Looked at once a batch from the second epoch on, and once at half: the fifth of the third.
    lefts = iter([9.0] * 15 + [-0.1])
    grant = Grant(0.0)
    grant.left = lambda: next(lefts)
    monkeypatch.setattr(_keras, "METER", grant)
    fitted, rates = halves(monkeypatch, average=average)
    assert [len(epoch) for epoch in rates] == [10, 10]  # those that are told of
    assert fitted.n_steps == 4
    monkeypatch.setattr(_keras, "METER", Grant(9.0))
    params = {"epochs": 4, "batch_size": 6, "filters": 16, "schedule": "cosine"}
    two = cnn.fit(
        params_of("cnn", params | {"average": average}),
        LETTERS,
        LETTERS,
        3,
        lambda step, value: step == 2,
    )
    np.testing.assert_allclose(fitted.predict(IMAGES), two.predict(IMAGES), atol=1e-5)


def test_a_fit_ends_where_it_is_told_to_in_either_half(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_keras, "METER", Grant(2.0))
    for end in (1, 3):
        steps: list[int] = []

        def report(step: int, value: float, steps: list[int] = steps, end: int = end) -> bool:
            steps.append(step)
            return step == end

        params = params_of("cnn", {"epochs": 4, "filters": 16})
        fitted = cnn.fit(params, LETTERS, LETTERS, 3, report)
        assert (steps[-1], fitted.n_steps) == (end, 4)


def shifted(down: int, right: int) -> Any:
    """The letters, moved by a pixel at most; their edges have no ink."""
    return np.roll(IMAGES, (down, right), axis=(1, 2))


@pytest.mark.parametrize(
    ("model", "small"), [("cnn", {"filters": 16}), ("lstm", {"units": 32, "rows": 4})]
)
def test_a_whole_fit_answers_with_the_mean_over_shifted_copies(
    model: str, small: Params, tmp_path: Path
) -> None:
    def fitted(n_copies: int) -> tuple[list[float], Any]:
        values: list[float] = []
        params = params_of(model, small | {"epochs": 2, "tta": n_copies})
        found = registry.load(models, model).fit(
            params, LETTERS, LETTERS, 3, lambda step, value: bool(values.append(value))
        )
        return values, found

    (values, plain), (values_of_five, five) = fitted(1), fitted(5)
    # Law: nothing but the last answers is another.
    assert values_of_five[0] == values[0]
    ways = [(0, 0), (-1, 0), (1, 0), (0, -1), (0, 1)]
    mean = np.mean([plain.predict(shifted(*way)) for way in ways], axis=0)
    np.testing.assert_allclose(five.predict(IMAGES), mean, atol=1e-6)
    assert np.abs(five.predict(IMAGES) - plain.predict(IMAGES)).max() > 1e-4
    assert values_of_five[1] == np.mean(mean.argmax(axis=1) == LETTERS.labels)
    assert five.found == {}
    # Law: what is logged answers as the fit did, to any number of letters.
    five.save_model(str(tmp_path / "five"))
    net = keras.models.load_model(tmp_path / "five" / "data" / "model.keras")
    for some in (IMAGES, IMAGES[:1]):
        np.testing.assert_allclose(net(some), five.predict(some), atol=1e-6)


def test_a_fit_that_its_grant_ends_or_that_is_stopped_answers_without_copies(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stopped = cnn.fit(
        params_of("cnn", {"epochs": 2, "filters": 16, "tta": 5}),
        LETTERS,
        LETTERS,
        3,
        lambda step, value: True,
    )
    # Paid for are the batches, and a look at val, but not five.
    grant = Grant(9.0)
    lefts = iter([9.0] * 31 + [1e-9])
    grant.left = lambda: next(lefts)
    monkeypatch.setattr(_keras, "METER", grant)
    fitted, rates = halves(monkeypatch, tta=5)
    assert [len(epoch) for epoch in rates] == [10] * 4
    for one in (stopped, fitted):
        assert one.found == {"tta": 1}
    monkeypatch.undo()
    plain = halves(monkeypatch, tta=1)[0]
    np.testing.assert_allclose(fitted.predict(IMAGES), plain.predict(IMAGES), atol=1e-5)


def test_what_the_last_look_takes_is_not_spent_on_letters(monkeypatch: pytest.MonkeyPatch) -> None:
    # A clock by which a look takes half a CPU-second, and so each batch of the first half 0.15.
    ticks = iter(0.5 * tick for tick in range(1000))
    monkeypatch.setattr(_keras.time, "process_time", lambda: next(ticks))
    lengths = []
    for n_copies in (1, 5):
        monkeypatch.setattr(_keras, "METER", Grant(4.0))
        lengths.append(len(halves(monkeypatch, tta=n_copies)[1][-1]))
    # 0.9 of 4 CPU-seconds for two epochs, less a look each; and 0.9 of 2, where four looks follow.
    assert lengths == [math.floor((1.8 - 0.5) / 0.15), math.floor((0.9 - 0.5) / 0.15)]


def test_averaged_weights_are_others() -> None:
    assert (fit(average=0.99)[1] != fit()[1]).any()


@pytest.mark.parametrize(("given", "onednn"), [({}, "1"), ({"TF_ENABLE_ONEDNN_OPTS": "0"}, "0")])
def test_loading_the_networks_says_nothing_and_uses_onednn_unless_told_not_to(
    given: dict[str, str], onednn: str
) -> None:
    # Asked of TensorFlow itself: it reads the variable once, while it is loaded.
    code = (
        "from pipeline.models import _keras\n"
        "from tensorflow.python.framework import test_util\n"
        "print(int(test_util.IsMklEnabled()))"
    )
    kept = {name: value for name, value in os.environ.items() if name != "TF_ENABLE_ONEDNN_OPTS"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=kept | given, capture_output=True, text=True, check=True
    )
    assert (done.stdout, done.stderr) == (f"{onednn}\n", "")
