"""The defaults are the models of the deck, so that every study contains its baseline as trial 0."""

from typing import Any

import pytest

from pipeline import models, registry

DECK = {
    "cnn": {"filters": 32, "kernel_size": 3, "dense_units": 128},
    "lstm": {"units": 128, "dense_units": 128},
    "knn": {"n_neighbors": 5, "deskew": False, "blur": 0, "n_components": 0},
}


def defaults(model: str) -> dict[str, Any]:
    return {name: param.default for name, param in registry.load(models, model).PARAMS.items()}


@pytest.mark.parametrize("model", DECK)
def test_defaults(model: str) -> None:
    # Law: where the deck gives a value, that is the default.
    assert defaults(model).items() >= DECK[model].items()


@pytest.mark.parametrize(("model", "n_params"), [("cnn", 133_083), ("lstm", 100_379)])
def test_sizes(model: str, n_params: int) -> None:
    module = registry.load(models, model)
    # Law: with the deck's 27 outputs, of which one is dead, the network has the deck's weights.
    assert module.build(defaults(model), n_outputs=27).count_params() == n_params
    net = module.build(defaults(model))
    # Law: it takes raw pixels and answers for 26 letters.
    assert [(put.shape, put.dtype) for put in net.inputs] == [((None, 28, 28), "uint8")]
    assert [(put.shape, put.dtype) for put in net.outputs] == [((None, 26), "float32")]
