"""The nearest-neighbour classifier, and how it is served.

MLflow stores this very file in the logged model (a model from code), beside the training letters:
no pickle, and no need of the project where the model is loaded. So it imports nothing of ours.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import mlflow
import numpy as np
import numpy.typing as npt
from mlflow.pyfunc.model import PythonModel
from scipy.linalg import cho_factor, cho_solve
from scipy.ndimage import gaussian_filter
from sklearn.decomposition import PCA
from sklearn.kernel_approximation import RBFSampler
from sklearn.neighbors import NearestNeighbors

Floats = npt.NDArray[np.float32]
Images = npt.NDArray[np.uint8]  # (n, 28, 28)
Labels = npt.NDArray[np.uint8]  # (n,)
N_LETTERS = 26
AXIS = np.arange(28, dtype=np.float32)  # of rows and of columns
N_DIRECTIONS, N_CELLS = 8, 9  # of the gradient histograms; cells along each side
PART = 500  # letters
# A vote is 1 / distance^power.
POWERS = {"uniform": 0, "distance": 1, "squared": 2, "fourth": 4, "sixth": 6}
COUNTS = [*range(1, 11), *range(12, 22, 2), *range(25, 55, 5)]


class Embedding:
    """From letters (n, 28, 28) uint8 to vectors (n, d) float32.

    ``axes`` (d, n_features) are PCA's or LDA's, none without them; distances need no centring, so
    there is no mean.
    """

    def __init__(self, params: dict[str, Any], axes: Floats) -> None:
        self.params, self.axes = params, axes
        self.kernel = None
        if params["kernel_components"] and params["lda_shrinkage"]:
            # Its seed is fixed, so that a loaded model makes the same map again and needs no copy.
            self.kernel = RBFSampler(
                gamma=params["kernel_gamma"],
                n_components=params["kernel_components"],
                random_state=0,
            ).fit(self._features(np.zeros((1, len(AXIS), len(AXIS)), np.uint8)))

    @classmethod
    def fit(
        cls, params: dict[str, Any], letters: Images, labels: Labels
    ) -> tuple["Embedding", Floats]:
        """Find the axes of the training letters; gives their vectors too."""
        embed = cls(params, np.empty((0, 0), np.float32))
        features = embed.features(letters)
        if shrinkage := params["lda_shrinkage"]:
            embed.axes = discriminants(features, labels, shrinkage)
        elif n_components := params["n_components"]:
            pca = PCA(min(n_components, *features.shape), random_state=0).fit(features)
            embed.axes = pca.components_.astype(np.float32)
        return embed, embed.project(features)

    def n_features(self) -> int:
        """Numbers of 4 bytes that ``fit`` holds of each letter at once."""
        return int(self.features(np.zeros((1, len(AXIS), len(AXIS)), np.uint8)).shape[1])

    def __call__(self, letters: Images) -> Floats:
        return self.project(self.features(letters))

    def project(self, features: Floats) -> Floats:
        """Features (n, n_features) on the axes (n, d)."""
        return features @ self.axes.T if len(self.axes) else features

    def features(self, letters: Images) -> Floats:
        """What the axes see: pixels (n, 784), gradient histograms (n, 648), or a kernel's map.

        The map's scalar products are nearly a Gaussian kernel (Rahimi and Recht 2007, "Random
        features for large-scale kernel machines"): LDA of it bends its borders.
        """
        found = np.empty((len(letters), 0), np.float32)
        # By parts that stay in the processor's cache: half the time.
        for i in range(0, len(letters), PART):
            part = self._features(letters[i : i + PART])
            part = part if self.kernel is None else self.kernel.transform(part)
            if i == 0:
                found = np.empty((len(letters), part.shape[1]), np.float32)
            found[i : i + PART] = part
        return found

    def _features(self, letters: Images) -> Floats:
        pixels: Floats = np.asarray(letters, dtype=np.float32) / np.float32(255)
        if self.params["deskew"]:
            pixels = straighten(pixels, self.params["spread"])
        if sigma := self.params["blur"]:
            pixels = gaussian_filter(pixels, sigma, axes=(1, 2))
        if self.params["features"] == "gradients":
            return gradient_histograms(pixels)
        flat = pixels.reshape(len(pixels), -1)
        return flat if self.kernel is None else unit(flat)  # as its gamma is meant for


def n_axes(params: dict[str, Any], n_features: int) -> int:
    """How many axes ``Embedding.fit`` will find; 0 where it looks for none."""
    wanted = N_LETTERS - 1 if params["lda_shrinkage"] else params["n_components"]
    return int(min(wanted, n_features))


def discriminants(features: Floats, labels: Labels, shrinkage: float) -> Floats:
    """Fisher's axes (at most 25, n_features): class means far apart, letters of a class close.

    Features (n, n_features) and labels (n,) in. The scatter inside of the classes is mixed with a
    ``shrinkage`` share of a ball's, and is a ball of radius 1 along the axes. Their number is that
    of the classes but one, so nothing larger is decomposed than a matrix of classes: scikit-learn's
    solver for shrunk scatter, which decomposes one of features, takes 20 times as long for 4,000.
    """
    classes, rows = np.unique(labels, return_inverse=True)
    n_features = features.shape[1]
    shares = np.bincount(rows) / len(rows)
    sums = np.stack(
        [features[rows == i].sum(axis=0, dtype=np.float64) for i in range(len(classes))]
    )
    means = sums / np.bincount(rows)[:, None]
    scatter = (features.T @ features).astype(np.float64) / len(rows) - (means.T * shares) @ means
    scatter *= 1 - shrinkage
    diagonal = np.diagonal(scatter).mean() / (1 - shrinkage)
    scatter[np.diag_indices(n_features)] += shrinkage * diagonal + 1e-9
    between = (means - shares @ means) * np.sqrt(shares)[:, None]  # (classes, n_features)
    solved = cho_solve(cho_factor(scatter), between.T)
    strengths, mixes = np.linalg.eigh(between @ solved)
    n_axes = min(len(classes) - 1, n_features)
    kept = np.argsort(-strengths)[:n_axes]
    axes = (solved @ mixes[:, kept]).T
    axes /= np.sqrt(np.maximum(strengths[kept], 1e-12))[:, None]
    return np.ascontiguousarray(axes, np.float32)


def straighten(images: Floats, spread: float) -> Floats:
    """Shear letters (n, 28, 28) sideways until they are upright, and centre their ink.

    Upright is a letter whose second mixed moment is 0. With a ``spread`` above 0, in pixels, each
    is also scaled until its ink has that standard deviation along rows and along columns.
    """
    middle = (images.shape[1] - 1) / 2
    x, _, slant = _moments(images)
    y, rows, _ = _moments(images.transpose(0, 2, 1))
    shear = slant / (rows**2)
    columns = (
        AXIS + (x - middle)[:, None, None] + (shear[:, None] * (AXIS - y[:, None]))[:, :, None]
    )
    upright = _resample(images, columns)
    width = _moments(upright)[1] / spread if spread else np.ones(len(images), np.float32)
    height = rows / spread if spread else width
    flat = upright.transpose(0, 2, 1)
    flat = _resample(flat, (y[:, None] + height[:, None] * (AXIS - middle))[:, None, :])
    upright = flat.transpose(0, 2, 1)
    if spread:
        upright = _resample(upright, (middle + width[:, None] * (AXIS - middle))[:, None, :])
    return upright


def _moments(images: Floats) -> tuple[Floats, Floats, Floats]:
    """Of the ink (n, 28, 28): mean column, its deviation, covariance with the rows; each (n,)."""
    mass = images.sum(axis=(1, 2)) + 1e-6
    columns, rows = images.sum(axis=1), images.sum(axis=2)  # (n, 28)
    x, y = columns @ AXIS / mass, rows @ AXIS / mass
    deviation = np.sqrt((columns * (AXIS - x[:, None]) ** 2).sum(axis=1) / mass + 1e-6)
    by_row = np.einsum("nij,nj->ni", images, AXIS - x[:, None], optimize=True)
    covariance = (by_row * (AXIS - y[:, None])).sum(axis=1) / mass
    return x, deviation, covariance


def _resample(images: Floats, columns: Floats) -> Floats:
    """Pixels at the fractional ``columns`` of each row, linearly interpolated; 0 outside."""
    n, height, width = images.shape
    columns = np.broadcast_to(columns, images.shape)
    # Two columns of nothing on either side: whatever is outside reads them, and none is masked.
    padded = np.pad(images, ((0, 0), (0, 0), (2, 2))).ravel()
    left = np.floor(columns)
    share = columns - left
    places = left.clip(-2, width).astype(np.int64)
    places += (np.arange(n * height) * (width + 4) + 2).reshape(n, height, 1)
    resampled: Floats = padded[places]
    places += 1
    resampled += share * (padded[places] - resampled)
    return resampled


def gradient_histograms(images: Floats) -> Floats:
    """Strength of the ink's edges by place and direction: (n, 28, 28) to (n, 8 * 9 * 9), length 1.

    Histograms of oriented gradients (Dalal and Triggs 2005) on overlapping cells; an edge counts to
    the two nearest directions and cells. The root keeps strong edges from outvoting the others.
    """
    dy, dx = np.gradient(images, axis=(1, 2))
    strength = np.sqrt(dx * dx + dy * dy)
    direction = np.arctan2(dy, dx) * np.float32(N_DIRECTIONS / (2 * np.pi))  # from -4 to 4
    centres = np.linspace(0, images.shape[1] - 1, N_CELLS, dtype=np.float32)
    cells = np.maximum(
        0, 1 - np.abs(AXIS - centres[:, None]) / (centres[1] - centres[0])
    )  # (9, 28)
    half = N_DIRECTIONS // 2
    found = np.empty((len(images), N_DIRECTIONS, N_CELLS, N_CELLS), np.float32)
    for i in range(N_DIRECTIONS):
        # The direction half-way round is near from both ends.
        other = i if i < half else i - N_DIRECTIONS
        away = half - np.abs(direction) if i == half else np.abs(direction - other)
        edges = np.maximum(0, 1 - away) * strength
        found[:, i] = cells @ (edges @ cells.T)
    return unit(np.sqrt(found.reshape(len(images), -1)))


def unit(vectors: Floats) -> Floats:
    """Vectors (n, d) of length 1, but for one of zeros."""
    scaled: Floats = vectors / (np.linalg.norm(vectors, axis=1, keepdims=True) + 1e-6)
    return scaled


class Priced(NamedTuple):
    """How well a count of neighbours and a weighting of their votes answer."""

    accuracy: float
    n_neighbors: int
    weights: str


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

    def vote(self, k: int, weights: str) -> Floats:
        """Share of the ``k`` nearest's votes for each letter, (n, 26) float32.

        ``weights`` are those of ``POWERS``.
        """
        table = np.zeros((len(self.labels), N_LETTERS))
        for votes, labels in zip(self._votes(weights)[:, :k].T, self.labels[:, :k].T, strict=True):
            table[np.arange(len(table)), labels] += votes
        shares: Floats = (table / table.sum(axis=1, keepdims=True)).astype(np.float32)
        return shares

    def price(self, labels: Labels, counts: Sequence[int], weights: Sequence[str]) -> Priced:
        """The best of some counts and weights for queries with ``labels`` (n,).

        All come from the neighbours that were found once, and so cost next to nothing. A count of
        more than there are means all.
        """
        there = self.labels.shape[1]
        named = {min(count, there): count for count in sorted(counts, reverse=True)}
        best = Priced(-1.0, 1, weights[0])
        for weight in weights:
            table, rows = np.zeros((len(labels), N_LETTERS)), np.arange(len(labels))
            votes = self._votes(weight)
            for k in range(1, max(named) + 1):
                table[rows, self.labels[:, k - 1]] += votes[:, k - 1]
                if k in named:
                    accuracy = float(np.mean(table.argmax(axis=1) == labels))
                    best = max(
                        best, Priced(accuracy, named[k], weight), key=lambda one: one.accuracy
                    )
        return best

    def _votes(self, weights: str) -> npt.NDArray[np.float64]:
        """Relative to the nearest's, lest high powers of small distances overflow; (n, k)."""
        distances = np.maximum(self.distances, 1e-6)
        votes: npt.NDArray[np.float64] = (distances[:, :1] / distances) ** POWERS[weights]
        return votes


class ServedNeighbours(PythonModel):
    """What MLflow loads: the training letters' vectors, searched at every call."""

    def load_context(self, context: Any) -> None:
        self.params = context.model_config
        with np.load(context.artifacts["letters"]) as letters:
            seen, self.labels, axes = (letters[name] for name in ("seen", "labels", "axes"))
        self.embed = Embedding(self.params, axes)
        self.vectors = seen if seen.dtype == np.float32 else self.embed(seen)

    # MLflow reads this type hint: for another one it would make a schema beside the signature.
    def predict(self, context: Any, model_input: np.ndarray, params: Any = None) -> Floats:
        """Letters (n, 28, 28) uint8 in, probabilities (n, 26) float32 out."""
        neighbours = Neighbours(self.embed(np.asarray(model_input)), self.params["n_neighbors"])
        neighbours.add(self.vectors, self.labels)
        return neighbours.vote(self.params["n_neighbors"], self.params["weights"])


mlflow.models.set_model(ServedNeighbours())
