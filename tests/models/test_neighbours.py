"""Laws of the nearest neighbours: the search by chunks, the votes, deskewing, the embedding."""

import math
import re
from pathlib import Path
from types import SimpleNamespace

import mlflow
import numpy as np
import pytest
from scipy.linalg import eigh
from sklearn.kernel_approximation import RBFSampler
from sklearn.neighbors import KNeighborsClassifier

from pipeline.models import _memory, knn
from pipeline.models._neighbours import (
    Embedding,
    Floats,
    Neighbours,
    discriminants,
    gradient_histograms,
    straighten,
)
from pipeline.spec import Part
from pipeline.tracking import SIGNATURE

PLAIN = {
    "deskew": False,
    "spread": 0.0,
    "blur": 0.0,
    "features": "pixels",
    "n_components": 0,
    "lda_shrinkage": 0.0,
    "kernel_components": 0,
    "kernel_gamma": 0.5,
    "n_letters": 0,
}
LABELS = (np.arange(208) % 26).astype(np.uint8)
RNG = np.random.default_rng(0)
VECTORS = RNG.random((len(LABELS), 6), np.float32)
QUERIES = RNG.random((50, 6), np.float32)
IMAGES = RNG.integers(0, 256, (60, 28, 28), np.uint8)


def search(k: int, *bounds: int) -> Neighbours:
    """Search all vectors, handed over in chunks that end at ``bounds``."""
    neighbours = Neighbours(QUERIES, k)
    for vectors, labels in zip(np.split(VECTORS, bounds), np.split(LABELS, bounds), strict=True):
        neighbours.add(vectors, labels)
    return neighbours


@pytest.mark.parametrize("weights", ["uniform", "distance", "squared"])
@pytest.mark.parametrize("k", [1, 5, 25])
def test_chunks_and_votes(k: int, weights: str) -> None:
    whole = search(k)
    chunked = search(k, 2, 3, 60, 130)  # two chunks have fewer letters than k
    # Law: the neighbours of all chunks are the neighbours of the whole.
    np.testing.assert_allclose(chunked.distances, whole.distances, rtol=1e-5)
    np.testing.assert_array_equal(chunked.labels, whole.labels)
    # Law: the votes are those of scikit-learn's classifier.
    given = (lambda distances: distances**-2.0) if weights == "squared" else weights
    peer = KNeighborsClassifier(k, weights=given).fit(VECTORS, LABELS)
    for neighbours in (whole, chunked):
        votes = neighbours.vote(k, weights)
        assert votes.dtype == np.float32
        np.testing.assert_allclose(votes, peer.predict_proba(QUERIES), atol=1e-5)
        # Law: the votes of fewer neighbours are those of a search for fewer.
        np.testing.assert_allclose(neighbours.vote(1, weights), search(1).vote(1, weights))


def test_the_best_count_and_weights_are_found_for_nothing() -> None:
    neighbours, truth = search(25, 60), RNG.integers(0, 26, len(QUERIES)).astype(np.uint8)
    counts, weights = [1, 2, 7, 25], ["uniform", "sixth"]
    found = neighbours.price(truth, counts, weights)
    accuracies = {
        (k, weight): (neighbours.vote(k, weight).argmax(axis=1) == truth).mean()
        for k in counts
        for weight in weights
    }
    # Law: no count and weighting is better, and what is said to be theirs is their accuracy.
    assert found.accuracy == max(accuracies.values())
    assert found.accuracy == accuracies[found.n_neighbors, found.weights]


def test_more_neighbours_than_there_are_mean_all() -> None:
    neighbours, truth = search(26, 60), RNG.integers(0, 26, len(QUERIES)).astype(np.uint8)
    found = neighbours.price(truth, [50], ["uniform"])
    assert found.n_neighbors == 50
    assert found.accuracy == (neighbours.vote(50, "uniform").argmax(axis=1) == truth).mean()
    # Law: of counts that mean the same the smallest is named.
    assert neighbours.price(truth, [50, 26, 40], ["uniform"]).n_neighbors == 26


@pytest.mark.parametrize("n_letters", [5, 40, 260])
def test_few_letters_are_a_fit_like_another(n_letters: int) -> None:
    params = PLAIN | {"n_neighbors": 50, "weights": "uniform", "n_letters": n_letters}
    images = RNG.integers(0, 256, (300, 28, 28), np.uint8)
    train = Part(images, (np.arange(300) % 26).astype(np.uint8))
    val = Part(IMAGES, LABELS[: len(IMAGES)])
    curve: list[float] = []
    fitted = knn.fit(params, train, val, 0, lambda step, value: bool(curve.append(value)))
    assert len(curve) == fitted.n_steps == min(10, n_letters)
    assert "n_neighbors" not in fitted.found
    guess = fitted.predict(val.images).argmax(axis=1)
    assert curve[-1] == (guess == val.labels).mean()
    assert min(curve) >= 0


@pytest.mark.parametrize("shrinkage", [0.01, 0.5])
def test_discriminants_are_fishers(shrinkage: float) -> None:
    features = VECTORS + np.eye(26, 6, dtype=np.float32)[LABELS]
    axes = discriminants(features, LABELS, shrinkage)
    # As the textbook has them: the eigenvectors of the scatter between and inside of the classes.
    means = np.stack([features[LABELS == i].mean(axis=0) for i in range(26)])
    inside = np.cov((features - means[LABELS]).T, bias=True)
    inside = (1 - shrinkage) * inside + shrinkage * np.trace(inside) / 6 * np.eye(6)
    expected = eigh(np.cov(means.T, bias=True), inside)[1].T[::-1]
    np.testing.assert_allclose(np.abs(axes), np.abs(expected), rtol=1e-3, atol=1e-3)


def test_a_letter_that_is_known() -> None:
    neighbours = Neighbours(VECTORS, 5)
    neighbours.add(VECTORS, LABELS)
    votes = neighbours.vote(5, "distance")
    # Law: a letter at distance 0 outvotes all others, and divides nothing by 0.
    np.testing.assert_allclose(votes[np.arange(len(LABELS)), LABELS], 1, atol=1e-3)


def bar(slope: float) -> Floats:
    """A soft stroke that moves ``slope`` pixels to the right with each row; (1, 28, 28)."""
    y, x = np.mgrid[:28, :28].astype(np.float32)
    ink = np.clip(2 - np.abs(x - 12 - slope * (y - 14)), 0, 1)
    return np.where((y > 5) & (y < 24), ink, 0)[None].astype(np.float32)


def covariance(image: Floats) -> float:
    """Second mixed moment of the ink about its centre, in pixels squared."""
    y, x = np.mgrid[:28, :28]
    return float(np.cov(x.ravel(), y.ravel(), aweights=image.ravel(), ddof=0)[0, 1])


@pytest.mark.parametrize("slope", [-0.6, -0.1, 0.0, 0.3, 0.6])
def test_letters_are_set_upright_and_centred(slope: float) -> None:
    slanted = bar(slope)
    straight = straighten(slanted, spread=0.0)
    # Law: rows and columns of the ink are correlated no more, and its mean is the middle.
    assert abs(covariance(straight[0])) < 0.1
    np.testing.assert_allclose(_mean(straight[0]), (13.5, 13.5), atol=0.05)
    # Law: the ink is moved, none of it lost.
    assert straight.sum() == pytest.approx(slanted.sum(), rel=0.02)


@pytest.mark.parametrize("spread", [4.0, 6.0])
def test_letters_are_scaled_to_a_spread(spread: float) -> None:
    straight = straighten(bar(0.3), spread)[0]
    y, x = np.mgrid[:28, :28]
    for axis in (x, y):
        variance = np.cov(axis.ravel(), aweights=straight.ravel(), ddof=0)
        # Interpolation widens a stroke that was narrow.
        assert np.sqrt(variance) == pytest.approx(spread, rel=0.1)


@pytest.mark.parametrize("spread", [0.0, 6.0])
def test_what_is_empty_stays_empty(spread: float) -> None:
    empty = np.zeros((1, 28, 28), np.float32)
    np.testing.assert_array_equal(straighten(empty, spread), empty)


def _mean(image: Floats) -> tuple[float, float]:
    y, x = np.mgrid[:28, :28]
    return tuple(float(np.average(axis, weights=image)) for axis in (x, y))


def test_gradients_of_a_letter_on_its_head() -> None:
    letters = RNG.random((5, 28, 28), np.float32)
    upright, head = (
        gradient_histograms(images).reshape(5, 8, 9, 9)
        for images in (letters, letters[:, ::-1, ::-1])
    )
    # Law: each edge is found in the opposite cell, in the opposite direction.
    np.testing.assert_allclose(head, np.roll(upright, 4, axis=1)[:, :, ::-1, ::-1], atol=1e-5)
    # Law: histograms have length 1, and an empty letter has none.
    np.testing.assert_allclose((upright**2).sum(axis=(1, 2, 3)), 1, atol=1e-5)
    assert not gradient_histograms(np.zeros((1, 28, 28), np.float32)).any()


def test_gradients_point_to_the_ink() -> None:
    ramp = np.broadcast_to(np.arange(28, dtype=np.float32), (1, 28, 28))  # darker to the right
    histograms = gradient_histograms(ramp).reshape(8, 9, 9)
    # Law: the first direction is that of the columns, and nothing counts to another.
    assert (histograms[0] > 0).all()
    assert not histograms[1:].any()


@pytest.mark.parametrize(
    ("change", "n_columns"),
    [
        ({}, 784),
        ({"n_components": 20}, 20),
        ({"n_components": 100}, 60),
        ({"deskew": True, "n_components": 20}, 20),
        ({"deskew": True, "spread": 6.0, "blur": 0.75}, 784),
        ({"features": "gradients"}, 648),
        ({"features": "gradients", "n_components": 20}, 20),
        ({"features": "gradients", "lda_shrinkage": 0.3}, 25),
        ({"lda_shrinkage": 0.3, "n_components": 20}, 25),  # then PCA is not needed
        ({"lda_shrinkage": 0.3, "kernel_components": 200}, 25),
        ({"kernel_components": 200}, 784),  # a kernel is for LDA alone
    ],
)
def test_embedding(change: dict[str, object], n_columns: int) -> None:
    embed, vectors = Embedding.fit(PLAIN | change, IMAGES, LABELS[: len(IMAGES)])
    # Law: as many columns as components, at most as many as letters; without axes all features.
    assert vectors.shape == (60, n_columns)
    assert vectors.dtype == np.float32
    # Law: a letter's vector does not depend on the letters beside it.
    np.testing.assert_allclose(embed(IMAGES), vectors, atol=1e-4)
    np.testing.assert_allclose(embed(IMAGES[7:8]), vectors[7:8], atol=1e-4)


@pytest.mark.parametrize(
    ("change", "idle"),
    [
        ({}, {"spread": 6.0, "kernel_components": 200, "kernel_gamma": 1.0}),
        ({"deskew": True, "n_components": 20}, {"kernel_components": 200, "kernel_gamma": 1.0}),
        ({"lda_shrinkage": 0.1}, {"spread": 6.0, "n_components": 20, "kernel_gamma": 1.0}),
        (
            {"deskew": True, "lda_shrinkage": 0.1, "kernel_components": 200},
            {"n_components": 20},
        ),
    ],
)
def test_what_is_called_unused_changes_nothing_and_the_rest_does(
    change: dict[str, object], idle: dict[str, object]
) -> None:
    params = PLAIN | change
    labels = LABELS[: len(IMAGES)]
    assert knn.unused(params) == knn.unused(params | idle) == idle.keys()
    vectors = Embedding.fit(params, IMAGES, labels)[1]
    np.testing.assert_array_equal(Embedding.fit(params | idle, IMAGES, labels)[1], vectors)
    others = {"deskew": not params["deskew"], "blur": 0.5, "features": "gradients"}
    others |= {"spread": 6.0, "n_components": 10, "lda_shrinkage": 0.5, "kernel_gamma": 1.0}
    for name in others.keys() - idle.keys():
        other = Embedding.fit(params | {name: others[name]}, IMAGES, labels)[1]
        assert not np.array_equal(other, vectors), name


def test_lda_brings_letters_of_a_kind_together() -> None:
    kinds = RNG.integers(0, 256, (26, 28, 28))
    noisy = np.clip(kinds[LABELS] + RNG.normal(0, 60, (len(LABELS), 28, 28)), 0, 255)
    images = noisy.astype(np.uint8)
    _, vectors = Embedding.fit(PLAIN | {"lda_shrinkage": 0.5}, images, LABELS)
    distances = np.linalg.norm(vectors[:, None] - vectors, axis=2)
    same = LABELS[:, None] == LABELS
    # Law: the farthest of the same kind is nearer than the nearest of another.
    assert distances[same].max() < distances[~same].min()


def test_a_kernel_bends_the_borders_of_lda() -> None:
    rings = RNG.normal(size=(400, 8)).astype(np.float32)
    rings /= np.linalg.norm(rings, axis=1, keepdims=True)
    rings[200:] *= 0.2  # one class lies inside of the other, and their means are one
    labels = (np.arange(400) >= 200).astype(np.uint8)
    mapped = RBFSampler(gamma=0.5, n_components=200, random_state=0).fit_transform(rings)

    def overlap(features: Floats) -> float:
        on_axis = (features @ discriminants(features, labels, 0.01).T)[:, 0]
        low, high = sorted((on_axis[:200], on_axis[200:]), key=np.mean)
        return float(np.mean(low[:, None] >= high))

    assert overlap(rings) > 0.2
    assert overlap(mapped) == 0


@pytest.mark.parametrize("features", ["pixels", "gradients"])
def test_a_kernel_sees_vectors_of_one_length(features: str) -> None:
    params = PLAIN | {"features": features, "lda_shrinkage": 0.1, "kernel_components": 2000}
    embed = Embedding(params, np.empty((0, 0), np.float32))
    pale = IMAGES // 2
    # Law: paler ink is no other letter; two letters are as near as gamma has it.
    np.testing.assert_allclose(embed.features(2 * pale), embed.features(pale), atol=1e-4)
    products = embed.features(IMAGES) @ embed.features(IMAGES).T
    assert 0.3 < products.min() < products.max() < 1.1


@pytest.mark.parametrize("change", [{}, {"n_components": 20}, knn.PRIORS[0]])
def test_a_stopped_fit_serves_what_it_predicts(change: dict[str, object], tmp_path: Path) -> None:
    letters = Part(IMAGES, LABELS[: len(IMAGES)])
    params = PLAIN | {"n_neighbors": 5, "weights": "distance"} | change
    fitted = knn.fit(params, letters, letters, 0, lambda step, val_accuracy: step == 5)
    fitted.save_model(
        path=str(tmp_path / "model"),
        signature=SIGNATURE,
        input_example=IMAGES[:2],
        pip_requirements=["scikit-learn"],
    )
    served = mlflow.pyfunc.load_model(str(tmp_path / "model")).predict(IMAGES)
    # Law: a model that has seen half of the letters is served with the embedding it was fitted by.
    np.testing.assert_allclose(served, fitted.predict(IMAGES), atol=1e-5)


def test_a_fit_may_see_some_of_the_letters() -> None:
    letters = Part(IMAGES, LABELS[: len(IMAGES)])
    params = PLAIN | {"n_neighbors": 3, "weights": "distance"}
    fits = [
        knn.fit(params | {"n_letters": n}, part, letters, 0, lambda step, val_accuracy: False)
        for n, part in ((20, letters), (0, letters.some(20)), (0, letters))
    ]
    some, same, all_of_them = (fitted.predict(IMAGES) for fitted in fits)
    np.testing.assert_array_equal(some, same)
    assert (some != all_of_them).any()


MANY = Part(
    np.broadcast_to(IMAGES[:1], (60_000, 28, 28)), np.broadcast_to(LABELS[:1], (60_000,))
)  # of which no byte is written
FEW = Part(IMAGES, LABELS[: len(IMAGES)])
DECK = {name: param.default for name, param in knn.PARAMS.items()}


@pytest.mark.parametrize(
    ("change", "n_features", "cure"),
    [
        ({}, 784, r"n_train=7653$"),
        ({"features": "gradients"}, 648, r"n_train=9259$"),
        # LDA's matrices, of 96 MB, have no room beside them; where there is more, they do.
        (
            {"kernel_components": 2000, "lda_shrinkage": 0.1},
            2000,
            r"pass fewer -P kernel_components$",
        ),
        (
            {"kernel_components": 900, "lda_shrinkage": 0.1},
            900,
            r"n_train=2346, or fewer -P kernel_components$",
        ),
    ],
)
def test_vectors_that_memory_does_not_hold(
    change: dict[str, object], n_features: int, cure: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_memory, "available", lambda: 30_000_000)
    said = f"for {n_features} features of each of 60,000 letters, and this machine has 0.0 GB free"
    # Law: it is said before any is taken, in a sentence; a sweep knows it for a lack of memory.
    with pytest.raises(knn.TooLarge, match=f"{said}.*{cure}") as caught:
        knn.fit(DECK | change, MANY, FEW, 0, lambda step, val_accuracy: True)
    assert isinstance(caught.value, MemoryError)
    # Law: the number of letters that it names does fit.
    if fits := re.search(r"n_train=(\d+)", str(caught.value)):
        knn._check_memory(DECK | change, int(fits[1]))


def test_a_search_that_outlasts_its_grant_by_far(monkeypatch: pytest.MonkeyPatch) -> None:
    left = iter([math.inf, 500.0, 490.0, 490.0])
    monkeypatch.setattr(knn, "METER", SimpleNamespace(left=lambda: next(left)))
    monkeypatch.setattr(knn, "_seconds_to_first_report", lambda params, train, n_val: 1_000.0)
    # Law: without a grant nobody is held to a time, and what is short of it by little may try.
    knn._check_time(DECK, MANY, 60)
    knn._check_time(DECK, MANY, 60)
    with pytest.raises(knn.TooLong, match="1,000 CPU-seconds .* 490 are left .* n_train=23520$"):
        knn._check_time(DECK, MANY, 60)
    # Law: few letters are not asked about; it would cost them more than it tells.
    knn._check_time(DECK, FEW, 60)


def test_a_prediction_grows_with_letters_and_their_features() -> None:
    def predicted(n_letters: int, n_val: int, **change: object) -> float:
        few = Part(MANY.images[:n_letters], MANY.labels[:n_letters])
        return knn._seconds_to_first_report(DECK | change, few, n_val)

    assert 0 < predicted(2_000, 100) < predicted(60_000, 10_000)
    assert predicted(60_000, 100) < predicted(
        60_000, 100, lda_shrinkage=0.1, kernel_components=4000, features="gradients"
    )


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 8_192_000),
        ({"memory.max": "max\n"}, 8_192_000),
        (
            {
                "memory.max": "5000000\n",
                "memory.current": "3000000\n",
                "memory.stat": "anon 9\ninactive_file 600000\nactive_file 400000\n",
            },
            3_000_000,
        ),
        (
            {
                "memory/memory.limit_in_bytes": "5000000\n",
                "memory/memory.usage_in_bytes": "4000000\n",
                "memory/memory.stat": "total_inactive_file 500000\ntotal_active_file 0\n",
            },
            1_500_000,
        ),
    ],
)
def test_memory_that_is_free_in_a_container(
    files: dict[str, str], expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "meminfo").write_text("MemTotal: 9000 kB\nMemAvailable: 8000 kB\n")
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(_memory, "MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(_memory, "CGROUP", tmp_path)
    assert _memory.available() == expected


def test_what_this_machine_has_free_is_less_than_it_has() -> None:
    assert 0 < _memory.available() < 1 << 45
