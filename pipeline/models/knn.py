"""Nearest neighbours. The defaults are the deck's: five neighbours on plain pixels."""

import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from threadpoolctl import threadpool_limits

from pipeline.spec import Fitted, Images, Labels, Param, Params, Part, Probabilities, Report

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
    "kernel_components": Param(0, IntDistribution(0, 4000, step=1000)),  # 0: LDA of the features
    "kernel_gamma": Param(0.5, CategoricalDistribution((0.25, 0.5, 1.0))),  # of unit vectors
}
# Tried right after the defaults: what is known to serve letters well.
PRIORS = [
    {
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
    },
]
FIXED = {"n_neighbors": 0, "weights": "best"}  # never searched: each fit finds the best
PRELOAD = ("pipeline.models._neighbours",)  # imported once for all trials
N_STEPS = 10  # rungs of the training letters, each as dear as the next; 1 for vectors on axes


def fit(params: Params, train: Part, val: Part, seed: int, report: Report) -> Fitted:
    """Search ``train`` tenth by tenth, report the accuracy on ``val`` after each.

    A tenth is searched once only: its neighbours are merged with those found before, so that the
    rungs cost nothing beside the whole search. Where PCA or LDA have left few axes the search is
    the least of the costs, and is one step. ``seed`` is not needed: nothing is drawn.
    """
    from pipeline.models import _neighbours

    counts = [params["n_neighbors"]] if params["n_neighbors"] else _neighbours.COUNTS
    weights = list(_neighbours.POWERS) if params["weights"] == "best" else [params["weights"]]
    with threadpool_limits(1):
        labels = np.asarray(train.labels)
        embed, vectors = _neighbours.Embedding.fit(params, train.images, labels)
        neighbours = _neighbours.Neighbours(embed(val.images), max(counts))
        n_steps = 1 if len(embed.axes) else N_STEPS
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
