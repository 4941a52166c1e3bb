"""Nearest neighbours. The defaults are the deck's: five neighbours on plain pixels."""

import math
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from threadpoolctl import threadpool_limits

from pipeline.bill import METER
from pipeline.models import _memory
from pipeline.spec import (
    N_LETTERS,
    Fitted,
    Images,
    Labels,
    Param,
    Params,
    Part,
    Probabilities,
    Report,
    UserError,
)

PARAMS = {
    "n_neighbors": Param(5, IntDistribution(0, 50)),  # 0: the best on val, found for nothing
    "weights": Param(
        "distance",
        CategoricalDistribution(("uniform", "distance", "squared", "fourth", "sixth", "best")),
    ),
    "deskew": Param(False, CategoricalDistribution((False, True))),
    "spread": Param(0.0, CategoricalDistribution((0.0, 5.0, 6.0, 7.0))),  # pixels; after deskew
    "blur": Param(0.0, FloatDistribution(0.0, 1.5, step=0.25)),  # pixels, standard deviation
    "features": Param("pixels", CategoricalDistribution(("pixels", "gradients"))),
    "n_components": Param(0, IntDistribution(0, 100, step=20)),  # of PCA; 0 keeps all features
    # 0 is no LDA; with LDA there is no PCA.
    "lda_shrinkage": Param(0.0, CategoricalDistribution((0.0, 0.001, 0.01, 0.1, 0.5))),
    "kernel_components": Param(0, IntDistribution(0, 6000, step=1000)),  # 0: LDA of the features
    "kernel_gamma": Param(0.5, CategoricalDistribution((0.25, 0.5, 1.0))),  # of unit vectors
    # Evenly taken from the training letters; 0 is all.
    N_LETTERS: Param(0, IntDistribution(0, 10_000_000)),
}
SCREEN: Params = {N_LETTERS: 10_000}  # which rank fits as all letters do
# Tried right after the defaults: what is known to serve letters well.
_PRIOR = {
    "n_neighbors": 0,
    "weights": "best",
    "deskew": True,
    "spread": 6.0,
    "blur": 0.25,
    "features": "gradients",
    "n_components": 0,
    "lda_shrinkage": 0.001,
    "kernel_components": 4000,
    "kernel_gamma": 0.5,
    N_LETTERS: 0,
}
PRIORS = [_PRIOR, _PRIOR | {"kernel_components": 6000}]
FIXED = {"n_neighbors": 0, "weights": "best"}  # never searched: each fit finds the best
PRELOAD = ("pipeline.models._neighbours",)  # imported once for all trials
SOON = 50_000  # letters, up to which a fit is soon done, whatever its params
BY_FAR = 2.0  # a prediction is worth no more
N_TIMED = 1_000  # letters, whose embedding and search tell what those of all will take
N_STEPS = 10  # rungs of the training letters, each as dear as the next; 1 for vectors on axes


def unused(params: Params) -> set[str]:
    """Hyperparameters without effect beside the others."""
    found = {"n_components"} if params["lda_shrinkage"] else {"kernel_components", "kernel_gamma"}
    if not params["kernel_components"]:
        found.add("kernel_gamma")
    if not params["deskew"]:
        found.add("spread")
    return found


class TooLarge(UserError, MemoryError):
    """Memory does not hold the letters' vectors; said before any is taken."""


class TooLong(UserError):
    """A fit would end before its first report; said before anything is searched."""


def fit(params: Params, train: Part, val: Part, seed: int, report: Report) -> Fitted:
    """Search ``train`` tenth by tenth, report the accuracy on ``val`` after each.

    A tenth is searched once only: its neighbours are merged with those found before, so that the
    rungs cost nothing beside the whole search. Where PCA or LDA have left few axes the search is
    the least of the costs, and is one step. ``seed`` is not needed: nothing is drawn.

    Raises ``TooLarge`` or ``TooLong`` where memory or the trial's grant are far from enough.
    """
    from pipeline.models import _neighbours

    train = train.some(params[N_LETTERS])
    counts = [params["n_neighbors"]] if params["n_neighbors"] else _neighbours.COUNTS
    weights = list(_neighbours.POWERS) if params["weights"] == "best" else [params["weights"]]
    with threadpool_limits(1):
        _check_memory(params, len(train.labels))
        _check_time(params, train, len(val.labels))
        labels = np.asarray(train.labels)
        embed, vectors = _neighbours.Embedding.fit(params, train.images, labels)
        neighbours = _neighbours.Neighbours(embed(val.images), max(counts))
        n_steps = 1 if len(embed.axes) else min(N_STEPS, len(labels))
        bounds = np.linspace(0, len(labels), n_steps + 1).astype(int)
        for step in range(1, n_steps + 1):
            tenth = slice(bounds[step - 1], bounds[step])
            neighbours.add(vectors[tenth], labels[tenth])
            best = neighbours.price(val.labels, counts, weights)
            if report(step, best.accuracy):
                break
    n_seen = bounds[step]
    found = {"n_neighbors": best.n_neighbors, "weights": best.weights}
    used = params | found
    return Fitted(
        predict=partial(_predict, used, embed, vectors[:n_seen], labels[:n_seen]),
        # Vectors are smaller than letters, but for those that are the pixels themselves.
        save_model=partial(
            _save_model,
            used,
            seen=vectors[:n_seen] if len(embed.axes) else train.images[:n_seen],
            labels=labels[:n_seen],
            axes=embed.axes,
        ),
        requirements=("scikit-learn", "scipy", "numpy"),
        n_steps=n_steps,
        found={name: value for name, value in found.items() if value != params[name]},
    )


def _check_memory(params: Params, n_letters: int) -> None:
    from pipeline.models import _neighbours

    n_features = _neighbours.Embedding(params, np.empty((0, 0), np.float32)).n_features()
    available = _memory.available()
    # LDA holds three matrices of these at once, in float64.
    beside = 24 * n_features**2 if params["lda_shrinkage"] else 0
    needed = 4 * n_letters * n_features + beside
    if needed > available:
        fits = int(0.8 * (available - beside) / (4 * n_features))
        cure = f"-P n_train={fits}{_fewer(params)}" if fits > 0 else "fewer -P kernel_components"
        raise TooLarge(
            f"knn needs {needed / 1e9:,.1f} GB for {n_features} features of each of {n_letters:,} "
            f"letters, and this machine has {available / 1e9:,.1f} GB free: pass {cure}"
        )


def _check_time(params: Params, train: Part, n_val: int) -> None:
    """Ask only where the CPU-seconds of a fit are limited: in a trial."""
    left, n_letters = METER.left(), len(train.labels)
    if math.isinf(left) or n_letters <= SOON:
        return
    needed = _seconds_to_first_report(params, train, n_val)
    if needed > BY_FAR * left:
        raise TooLong(
            f"knn needs some {needed:,.0f} CPU-seconds before it can report on {n_letters:,} "
            f"letters, and {max(left, 0):,.0f} are left of its grant: pass more -P cpu_minutes or "
            f"-P n_train={int(0.8 * n_letters * max(left, 0) / needed)}{_fewer(params)}"
        )


def _fewer(params: Params) -> str:
    return ", or fewer -P kernel_components" if params["kernel_components"] else ""


def _seconds_to_first_report(params: Params, train: Part, n_val: int) -> float:
    """CPU-seconds, by those of a few letters: to embed all, and to search those of a first step."""
    from pipeline.models import _neighbours

    n_letters = len(train.labels)
    began = time.process_time()
    embed = _neighbours.Embedding(params, np.empty((0, 0), np.float32))
    features = embed.features(train.images[:N_TIMED])
    n_axes = _neighbours.n_axes(params, features.shape[1])
    if n_axes:
        features.T @ features  # of both PCA and LDA the dearest part
    embedded = time.process_time()
    vectors = features[:, :n_axes] if n_axes else features
    some = np.ascontiguousarray(vectors)
    search = _neighbours.Neighbours(some, max(_neighbours.COUNTS))
    search.add(some, train.labels[:N_TIMED])
    searched = time.process_time()
    per_letter = (embedded - began) / len(some)
    per_pair = (searched - embedded) / len(some) ** 2
    n_searched = n_letters if n_axes else n_letters / N_STEPS
    return per_letter * (n_letters + n_val) + per_pair * n_searched * n_val


def _predict(
    params: Params, embed: Any, vectors: Any, labels: Labels, images: Images
) -> Probabilities:
    from pipeline.models import _neighbours

    with threadpool_limits(1):
        neighbours = _neighbours.Neighbours(embed(images), params["n_neighbors"])
        neighbours.add(vectors, labels)
        return neighbours.vote(params["n_neighbors"], params["weights"])


def _save_model(
    params: Params, path: str, seen: Any, labels: Labels, axes: Any, **mlflow_arguments: Any
) -> None:
    """As an MLflow flavour's ``save_model``: the served file's source, its letters, its params."""
    import mlflow.pyfunc

    from pipeline.models import _neighbours

    with tempfile.TemporaryDirectory() as folder:
        letters = Path(folder) / "letters.npz"
        np.savez_compressed(letters, seen=seen, labels=labels, axes=axes)
        mlflow.pyfunc.save_model(
            path,
            python_model=_neighbours.__file__,
            artifacts={"letters": str(letters)},
            model_config=params,
            **mlflow_arguments,
        )
