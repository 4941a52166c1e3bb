"""Laws of the figures that ``evaluate`` computes from probabilities and labels."""

import numpy as np
import numpy.typing as npt
import pytest
from sklearn.metrics import (
    confusion_matrix,
    precision_score,
    recall_score,
    top_k_accuracy_score,
)

from pipeline import evaluate
from pipeline.spec import LETTERS, Images, Labels, Probabilities

N = 2_600
LABELS: Labels = (np.arange(N) % 26).astype(np.uint8)
GUESSES: dict[str, Labels] = {
    "all right": LABELS,
    "all wrong": (LABELS + 1) % 26,
    "one letter never guessed": np.where(LABELS == 3, 4, LABELS),
    "always the same letter": np.zeros_like(LABELS),
    "mixed": np.where(np.arange(N) % 7 < 2, (LABELS * 5 + 1) % 26, LABELS),
}


def confusions(labels: Labels, guess: Labels) -> evaluate.Counts:
    counts: evaluate.Counts = confusion_matrix(labels, guess, labels=range(26))
    return counts


def sure(guess: Labels, confidence: npt.NDArray[np.float64] | float) -> Probabilities:
    """Probabilities that give ``guess`` its confidence, and the other letters equal shares."""
    share = np.broadcast_to(confidence, guess.shape)
    table = np.repeat(((1 - share) / 25)[:, None], 26, axis=1)
    table[np.arange(len(guess)), guess] = share
    return table.astype(np.float32)


@pytest.mark.parametrize("n", [52, 51, 260, N], ids=lambda n: f"{n} letters")
@pytest.mark.parametrize("kind", GUESSES)
def test_accuracy(kind: str, n: int) -> None:
    labels, guess = LABELS[:n], GUESSES[kind][:n]
    metrics = evaluate.accuracy(confusions(labels, guess))
    # Law: the three are those of scikit-learn, 0 where a letter is never guessed.
    macro = {"average": "macro", "zero_division": 0, "labels": range(26)}
    assert metrics["test_accuracy"] == pytest.approx((guess == labels).mean())
    assert metrics["test_mean_recall"] == pytest.approx(recall_score(labels, guess, **macro))
    assert metrics["test_mean_precision"] == pytest.approx(precision_score(labels, guess, **macro))
    for name in ("test_accuracy", "test_mean_recall", "test_mean_precision"):
        low, value, high = (metrics[name + end] for end in ("_low", "", "_high"))
        # Law: an interval lies in 0 to 1 and holds its value (but for rounding).
        assert 0 <= low <= value + 1e-9, name
        assert value - 1e-9 <= high <= 1, name


@pytest.mark.parametrize("kind", ["all right", "all wrong"])
def test_accuracy_is_never_certain(kind: str) -> None:
    metrics = evaluate.accuracy(confusions(LABELS, GUESSES[kind]))
    # Law: 2,600 letters of one kind do not prove that the next is so too.
    assert 0.001 < metrics["test_accuracy_high"] - metrics["test_accuracy_low"] < 0.003


def test_more_letters_narrower_interval() -> None:
    counts = confusions(LABELS, GUESSES["mixed"])
    few, many = evaluate.accuracy(counts), evaluate.accuracy(4 * counts)
    for name in ("test_accuracy", "test_mean_recall", "test_mean_precision"):
        widths = [m[f"{name}_high"] - m[f"{name}_low"] for m in (few, many)]
        # Law: four times the letters halve an interval.
        assert widths[1] == pytest.approx(widths[0] / 2, rel=0.15)


def test_top2_accuracy() -> None:
    probabilities = np.random.default_rng(0).dirichlet(np.ones(26), N).astype(np.float32)
    peer = top_k_accuracy_score(LABELS, probabilities, k=2, labels=range(26))
    # Law: it is scikit-learn's, and 1 where the second guess is always right.
    assert evaluate.top2_accuracy(probabilities, LABELS) == pytest.approx(peer)
    second = 0.6 * sure((LABELS + 1) % 26, 1.0) + 0.4 * sure(LABELS, 1.0)
    assert evaluate.top2_accuracy(second, LABELS) == 1


def test_calibrated() -> None:
    rng = np.random.default_rng(0)
    labels = np.resize(LABELS, 50_000)
    confidence = rng.uniform(0.1, 1, len(labels))
    guess = np.where(rng.random(len(labels)) < confidence, labels, (labels + 1) % 26)
    bins = evaluate.confidence_bins(sure(guess.astype(np.uint8), confidence), labels)
    # Law: a model that is right as often as it is sure has next to no calibration error.
    assert evaluate.calibration_error(bins) < 0.01
    # Law: every letter is in one of at most 15 bins, each with its mean confidence.
    assert bins["n_letters"].sum() == len(labels)
    assert len(bins) <= evaluate.N_BINS
    assert bins["confidence"].is_monotonic_increasing


def test_overconfident() -> None:
    guess = np.where(np.arange(N) < N // 2, LABELS, (LABELS + 1) % 26)
    bins = evaluate.confidence_bins(sure(guess, 1.0), LABELS)
    # Law: to be always sure and half the time right is an error of a half, in a single bin.
    assert evaluate.calibration_error(bins) == pytest.approx(0.5)
    assert bins.to_numpy().tolist() == [[1.0, 0.5, N]]


def test_per_letter() -> None:
    labels = np.array([0, 0, 0, 0, 0, 0, 1, 1], np.uint8)
    guess = np.array([0, 0, 0, 2, 1, 2, 1, 1], np.uint8)
    table = evaluate.per_letter(confusions(labels, guess)).set_index("letter")
    # Law: a row a letter, in the alphabet's order, absent letters too.
    assert "".join(table.index) == LETTERS
    # Law: shares of the letter and of the guess, and the commonest of the wrong guesses.
    assert table.loc["A"].tolist() == [6, 0.5, 1.0, "C"]
    assert table.loc["B"].tolist() == [2, 1.0, pytest.approx(2 / 3), ""]
    # Law: a letter that is neither there nor guessed has zeros, and no NaN.
    assert table.loc["Z"].tolist() == [0, 0.0, 0.0, ""]


@pytest.mark.parametrize("n", [1, 300])
def test_latencies(n: int) -> None:
    class Model:
        sizes: list[int] = []

        def predict(self, images: Images) -> Probabilities:
            self.sizes.append(len(images))
            return np.zeros((len(images), 26), np.float32)

    figures = evaluate.latencies(Model(), np.zeros((n, 28, 28), np.uint8))
    # Law: microseconds a letter, of the largest batch that there is up to 256 and of one letter.
    assert set(figures) == {"predict_us_per_letter", "predict_us_one_letter"}
    assert min(figures.values()) > 0
    assert set(Model.sizes) == {min(n, 256), 1}
