"""Laws of the nearest neighbours: the search by chunks, the votes, deskewing, the embedding."""

from pathlib import Path

import mlflow
import numpy as np
import pytest
from sklearn.neighbors import KNeighborsClassifier

from pipeline.models import knn
from pipeline.models._neighbours import Embedding, Floats, Neighbours, deskew
from pipeline.spec import Part
from pipeline.tracking import SIGNATURE

PLAIN = {"deskew": False, "blur": 0.0, "n_components": 0}
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


@pytest.mark.parametrize("weights", ["uniform", "distance"])
@pytest.mark.parametrize("k", [1, 5, 25])
def test_chunks_and_votes(k: int, weights: str) -> None:
    whole = search(k)
    chunked = search(k, 2, 3, 60, 130)  # two chunks have fewer letters than k
    # Law: the neighbours of all chunks are the neighbours of the whole.
    np.testing.assert_allclose(chunked.distances, whole.distances, rtol=1e-5)
    np.testing.assert_array_equal(chunked.labels, whole.labels)
    # Law: the votes are those of scikit-learn's classifier.
    peer = KNeighborsClassifier(k, weights=weights).fit(VECTORS, LABELS)
    for neighbours in (whole, chunked):
        assert neighbours.vote(weights).dtype == np.float32
        np.testing.assert_allclose(neighbours.vote(weights), peer.predict_proba(QUERIES), atol=1e-5)


def test_a_letter_that_is_known() -> None:
    neighbours = Neighbours(VECTORS, 5)
    neighbours.add(VECTORS, LABELS)
    votes = neighbours.vote("distance")
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


@pytest.mark.parametrize("slope", [-0.6, -0.1, 0.3, 0.6])
def test_deskew_sets_upright(slope: float) -> None:
    slanted = bar(slope)
    straight = deskew(slanted)
    # Law: a letter's rows and columns are correlated before, and no more after.
    assert abs(covariance(slanted[0])) > 2
    assert abs(covariance(straight[0])) < 0.01
    # Law: the ink is moved, none of it lost.
    assert straight.sum() == pytest.approx(slanted.sum(), rel=0.02)


def test_deskew_leaves_alone() -> None:
    upright, empty = bar(0), np.zeros((1, 28, 28), np.float32)
    both = deskew(np.concatenate([upright, empty]))
    # Law: what is upright stays as it is, and what is empty stays empty.
    np.testing.assert_allclose(both[:1], upright, atol=1e-4)
    np.testing.assert_array_equal(both[1:], empty)


@pytest.mark.parametrize(("n_components", "n_columns"), [(0, 784), (20, 20), (100, 60)])
@pytest.mark.parametrize("change", [{}, {"deskew": True}, {"blur": 0.75}])
def test_embedding(n_components: int, n_columns: int, change: dict[str, float]) -> None:
    embed = Embedding.fit(PLAIN | change | {"n_components": n_components}, IMAGES)
    vectors = embed(IMAGES)
    # Law: as many columns as components, at most as many as letters; without PCA all the pixels.
    assert vectors.shape == (60, n_columns)
    assert vectors.dtype == np.float32
    # Law: a letter's vector does not depend on the letters beside it.
    np.testing.assert_allclose(embed(IMAGES[7:8]), vectors[7:8], atol=1e-4)


@pytest.mark.parametrize("n_components", [0, 20])
def test_a_stopped_fit_serves_what_it_predicts(n_components: int, tmp_path: Path) -> None:
    letters = Part(IMAGES, LABELS[: len(IMAGES)])
    params = PLAIN | {"n_neighbors": 5, "weights": "distance", "n_components": n_components}
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
