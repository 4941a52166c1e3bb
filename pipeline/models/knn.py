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
    "n_neighbors": Param(5, IntDistribution(1, 25)),
    "weights": Param("distance", CategoricalDistribution(("uniform", "distance", "squared"))),
    "deskew": Param(False, CategoricalDistribution((False, True))),
    "spread": Param(0.0, CategoricalDistribution((0.0, 5.0, 6.0, 7.0))),  # pixels; after deskew
    "blur": Param(0.0, FloatDistribution(0.0, 1.5, step=0.25)),  # pixels, standard deviation
    "features": Param("pixels", CategoricalDistribution(("pixels", "gradients"))),
    "n_components": Param(0, IntDistribution(0, 100, step=20)),  # of PCA; 0 keeps all features
    "lda_shrinkage": Param(0.0, CategoricalDistribution((0.0, 0.1, 0.3, 0.5))),  # 0 is no LDA
}
# Tried right after the defaults: what is known to serve letters well.
PRIORS = [
    {
        "n_neighbors": 8,
        "weights": "squared",
        "deskew": True,
        "spread": 6.0,
        "blur": 0.5,
        "features": "gradients",
        "n_components": 0,
        "lda_shrinkage": 0.3,
    },
]
PRELOAD = ("pipeline.models._neighbours",)  # imported once for all trials
N_STEPS = 10  # rungs of the training letters; each costs as much as the next


def fit(params: Params, train: Part, val: Part, seed: int, report: Report) -> Fitted:
    """Search ``train`` tenth by tenth, report the accuracy on ``val`` after each.

    A tenth is searched once only: its neighbours are merged with those found before, so that the
    rungs cost nothing beside the whole search. ``seed`` is not needed: nothing is drawn.
    """
    from pipeline.models import _neighbours

    with threadpool_limits(1):
        labels = np.asarray(train.labels)
        embed, vectors = _neighbours.Embedding.fit(params, train.images, labels)
        neighbours = _neighbours.Neighbours(embed(val.images), params["n_neighbors"])
        bounds = np.linspace(0, len(labels), N_STEPS + 1).astype(int)
        for step in range(1, N_STEPS + 1):
            tenth = slice(bounds[step - 1], bounds[step])
            neighbours.add(vectors[tenth], labels[tenth])
            guess = neighbours.vote(params["weights"]).argmax(axis=1)
            if report(step, float(np.mean(guess == val.labels))):
                break
    n_seen = bounds[step]
    return Fitted(
        predict=partial(_predict, params, embed, vectors[:n_seen], labels[:n_seen]),
        # Vectors are smaller than letters, but for those that are the pixels themselves.
        save_model=partial(
            _save_model,
            params,
            seen=vectors[:n_seen] if len(embed.axes) else train.images[:n_seen],
            labels=labels[:n_seen],
            axes=embed.axes,
        ),
        requirements=("scikit-learn", "scipy", "numpy"),
        n_steps=N_STEPS,
    )


def _predict(
    params: Params, embed: Any, vectors: Any, labels: Labels, images: Images
) -> Probabilities:
    from pipeline.models import _neighbours

    with threadpool_limits(1):
        neighbours = _neighbours.Neighbours(embed(images), params["n_neighbors"])
        neighbours.add(vectors, labels)
        return neighbours.vote(params["weights"])


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
