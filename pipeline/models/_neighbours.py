"""The nearest-neighbour classifier, and how it is served.

MLflow stores this very file in the logged model (a model from code), beside the training letters:
no pickle, and no need of the project where the model is loaded. So it imports nothing of ours.
"""

from typing import Any

import mlflow
import numpy as np
import numpy.typing as npt
from mlflow.pyfunc.model import PythonModel
from scipy.ndimage import gaussian_filter
from sklearn.decomposition import PCA
from sklearn.neighbors import NearestNeighbors

Floats = npt.NDArray[np.float32]
N_LETTERS = 26


class Embedding:
    """From letters (n, 28, 28) uint8 to vectors (n, d) float32.

    ``axes`` (d, 784) are PCA's, none without it; distances need no centring, so there is no mean.
    """

    def __init__(self, params: dict[str, Any], axes: Floats) -> None:
        self.params, self.axes = params, axes

    @classmethod
    def fit(cls, params: dict[str, Any], images: npt.NDArray[np.uint8]) -> "Embedding":
        """Find the axes of the training letters."""
        embed = cls(params, np.empty((0, images[0].size), np.float32))
        if n_components := params["n_components"]:
            pixels = embed(images)
            pca = PCA(min(n_components, *pixels.shape), random_state=0).fit(pixels)
            embed.axes = pca.components_.astype(np.float32)
        return embed

    def __call__(self, images: npt.NDArray[np.uint8]) -> Floats:
        pixels = self._pixels(images)  # (n, 784)
        return pixels @ self.axes.T if len(self.axes) else pixels

    def _pixels(self, images: npt.NDArray[np.uint8]) -> Floats:
        pixels: Floats = np.asarray(images, dtype=np.float32) / np.float32(255)
        if self.params["deskew"]:
            pixels = deskew(pixels)
        if sigma := self.params["blur"]:
            pixels = gaussian_filter(pixels, sigma, axes=(1, 2))
        return pixels.reshape(len(pixels), -1)


def deskew(images: Floats) -> Floats:
    """Shear every letter (n, 28, 28) sideways until its second moments say that it is upright."""
    side = images.shape[1]
    axis = np.arange(side, dtype=np.float32)
    mass = images.sum(axis=(1, 2)) + 1e-6  # (n,)
    x = (images.sum(axis=1) @ axis / mass)[:, None]  # (n, 1), centre of ink
    y = (images.sum(axis=2) @ axis / mass)[:, None]
    rows = axis - y  # (n, 28), distance of each row from the centre
    covariance = np.einsum("nij,ni,nj->n", images, rows, axis - x, optimize=True) / mass
    variance = np.einsum("nij,ni->n", images, rows**2, optimize=True) / mass + 1e-6
    shift = (covariance / variance)[:, None] * rows  # (n, 28), pixels to the left, by row
    source = axis + shift[:, :, None]  # (n, 28, 28), where each pixel comes from
    left = np.floor(source).astype(np.int64)
    share = (source - left).astype(np.float32)
    straight: Floats = (1 - share) * _take(images, left) + share * _take(images, left + 1)
    return straight


def _take(images: Floats, columns: npt.NDArray[np.int64]) -> Floats:
    """Pixels at ``columns`` (n, 28, 28) of each row; 0 outside of the picture."""
    side = images.shape[2]
    taken = np.take_along_axis(images, columns.clip(0, side - 1), axis=2)
    inside: Floats = taken * ((columns >= 0) & (columns < side))
    return inside


class Neighbours:
    """The ``k`` nearest of the vectors seen so far; more may be added, and are searched alone."""

    def __init__(self, queries: Floats, k: int) -> None:
        self.queries, self.k = queries, k
        self.distances = np.empty((len(queries), 0))  # (n, k), ascending
        self.labels = np.empty((len(queries), 0), dtype=np.uint8)  # (n, k)

    def add(self, vectors: Floats, labels: npt.NDArray[np.uint8]) -> None:
        """Search among ``vectors`` (m, d) with ``labels`` (m,), and keep the nearest of all."""
        index = NearestNeighbors(n_neighbors=min(self.k, len(vectors)), algorithm="brute")
        distances, rows = index.fit(vectors).kneighbors(self.queries)
        distances = np.concatenate([self.distances, distances], axis=1)
        labels = np.concatenate([self.labels, labels[rows]], axis=1)
        nearest = np.argsort(distances, axis=1, kind="stable")[:, : self.k]
        self.distances = np.take_along_axis(distances, nearest, axis=1)
        self.labels = np.take_along_axis(labels, nearest, axis=1)

    def vote(self, weights: str) -> Floats:
        """Share of the votes for each letter, (n, 26) float32; weights: uniform or distance."""
        votes = np.ones_like(self.distances)
        if weights == "distance":
            votes = 1 / np.maximum(self.distances, 1e-6)
        table = np.zeros((len(votes), N_LETTERS))
        np.add.at(table, (np.arange(len(votes))[:, None], self.labels), votes)
        shares: Floats = (table / table.sum(axis=1, keepdims=True)).astype(np.float32)
        return shares


class ServedNeighbours(PythonModel):
    """What MLflow loads: the training letters are embedded anew, and searched at every call."""

    def load_context(self, context: Any) -> None:
        self.params = context.model_config
        with np.load(context.artifacts["letters"]) as letters:
            images, self.labels, axes = (letters[name] for name in ("images", "labels", "axes"))
        self.embed = Embedding(self.params, axes)
        self.vectors = self.embed(images)

    # MLflow reads this type hint: for another one it would make a schema beside the signature.
    def predict(self, context: Any, model_input: np.ndarray, params: Any = None) -> Floats:
        """Letters (n, 28, 28) uint8 in, probabilities (n, 26) float32 out."""
        neighbours = Neighbours(self.embed(np.asarray(model_input)), self.params["n_neighbors"])
        neighbours.add(self.vectors, self.labels)
        return neighbours.vote(self.params["weights"])


mlflow.models.set_model(ServedNeighbours())
