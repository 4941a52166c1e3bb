"""In what precision fits are made, and who decides."""

import pytest

from pipeline import precision
from pipeline.models import cnn, knn
from pipeline.spec import UserError


@pytest.mark.parametrize("value", ["auto", "float32", "bfloat16"])
def test_an_option(value: str) -> None:
    assert precision.option("precision", value) == value


@pytest.mark.parametrize("value", ["float16", "", "AUTO"])
def test_a_wrong_option_is_refused(value: str) -> None:
    with pytest.raises(UserError, match="precision must be auto, float32 or bfloat16, but"):
        precision.option("precision", value)


def test_a_model_that_knows_float32_only_refuses_bfloat16() -> None:
    with pytest.raises(UserError, match="precision must be auto or float32 for knn"):
        precision.check("bfloat16", "knn", knn.PARAMS)
    precision.check("float32", "knn", knn.PARAMS)
    precision.check("bfloat16", "cnn", cnn.PARAMS)


@pytest.mark.parametrize("name", precision.POLICIES)
def test_a_precision_is_a_hyperparameter_of_networks(name: str) -> None:
    params = precision.params(name, cnn.PARAMS)
    choices = cnn.PARAMS[precision.HYPERPARAMETER].distribution.choices  # type: ignore[attr-defined]
    assert params[precision.HYPERPARAMETER] in choices
    assert precision.of(params) == name
    assert precision.params(name, knn.PARAMS) == {}


@pytest.mark.parametrize(
    ("supported", "gain", "expected"),
    [(True, 1.8, "bfloat16"), (True, 1.0, "float32"), (False, 9.0, "float32")],
)
def test_auto_wants_instructions_and_a_gain(
    monkeypatch: pytest.MonkeyPatch, supported: bool, gain: float, expected: str
) -> None:
    monkeypatch.setattr(precision, "supported", lambda: supported)
    monkeypatch.setattr(precision, "gain", lambda: gain)
    assert precision.resolve("auto", cnn.PARAMS) == expected
    assert precision.resolve("auto", knn.PARAMS) == "float32"
    # Law: who asks for one gets it, whatever the machine.
    assert precision.resolve("bfloat16", cnn.PARAMS) == "bfloat16"


def test_the_probe_measures_something() -> None:
    assert precision.gain() > 0.01
