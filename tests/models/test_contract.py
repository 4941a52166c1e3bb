"""What every model promises to the steps; a new model's file is held to it as soon as it is there.

The tests of one model share its fits: one whole, one stopped after its first step.
"""

import io
import pickle
import pickletools
import struct
import subprocess
import sys
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from mlflow.models import Model
from optuna.trial import create_trial

from pipeline import cli, models, prep, registry, tracking
from pipeline.spec import N_LETTERS, Fitted, Part, UserError
from sweeps import search

SMALL = {"epochs": 2, "batch_size": 32}  # for the models that have these
# All doors of pickle are shut before a model is loaded; what is imported may use them before.
SERVE = """
import importlib.util
import pickle
import cloudpickle
import mlflow.pyfunc
import numpy as np
from mlflow.models import Model
if "keras" in Model.load("whole").flavors:
    import mlflow.keras
def shut(*given, **named):
    raise AssertionError("something was unpickled")
for door in ("load", "loads", "Unpickler", "_load", "_loads"):
    setattr(pickle, door, shut)
cloudpickle.load = cloudpickle.loads = shut
images = np.load("images.npy")
for fit in ("whole", "stopped"):
    model = mlflow.pyfunc.load_model(fit)
    np.savez(fit, all=model.predict(images), one=model.predict(images[:1]))
assert importlib.util.find_spec("pipeline") is None
"""


class Fit(NamedTuple):
    fitted: Fitted
    reports: list[tuple[int, float]]  # (step, accuracy on val)


def fit(model: str, parts: dict[str, Part], last_step: int | None = None) -> Fit:
    """Fit with small params; ``report`` says at ``last_step`` that it is enough."""
    reports: list[tuple[int, float]] = []

    def report(step: int, val_accuracy: float) -> bool:
        reports.append((step, val_accuracy))
        return step == last_step

    module = registry.load(models, model)
    params = {name: SMALL.get(name, param.default) for name, param in module.PARAMS.items()}
    return Fit(module.fit(params, parts["train"], parts["val"], 3, report), reports)


@pytest.fixture(scope="session")
def parts(archive: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Part]:
    """400 letters to train on, 380 to look at."""
    folder = str(tmp_path_factory.mktemp("data"))
    data = prep.prepare("emnist_letters", str(archive), 400, folder)
    return {part: data.part(part) for part in ("train", "val")}


@pytest.fixture(scope="session", params=registry.names(models))
def model(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="session")
def whole(model: str, parts: dict[str, Part]) -> Fit:
    return fit(model, parts)


@pytest.fixture(scope="session")
def stopped(model: str, parts: dict[str, Part]) -> Fit:
    return fit(model, parts, last_step=1)


def test_priors_lie_in_their_distributions(model: str) -> None:
    module = registry.load(models, model)
    for prior in getattr(module, "PRIORS", ()):
        typed = {name: str(value) for name, value in prior.items()}
        # Law: a prior names every hyperparameter, with a value that the command line accepts too.
        assert set(prior) == set(module.PARAMS)
        assert cli.hyperparameters(model, module.PARAMS, typed) == prior


def test_a_screen_lies_in_its_distributions(model: str) -> None:
    module = registry.load(models, model)
    screen = search.short_fit(module)
    typed = {name: str(value) for name, value in screen.items()}
    # Law: it names the steps where there are some, else the letters, and values that the command
    # line accepts too.
    assert getattr(module, "STEPS", N_LETTERS) in screen
    assert screen.items() <= cli.hyperparameters(model, module.PARAMS, typed).items()


def test_defaults_lie_in_their_distributions(model: str) -> None:
    space = registry.load(models, model).PARAMS
    defaults = {name: param.default for name, param in space.items()}
    typed = {name: str(default) for name, default in defaults.items()}
    # Law: a default that is typed on the command line is accepted, and comes back as it was.
    read = cli.hyperparameters(model, space, typed)
    assert read == defaults
    assert [type(value) for value in read.values()] == [type(value) for value in defaults.values()]
    # Law: Optuna takes the defaults for a trial, by bounds and by steps, so they can be trial 0.
    distributions = {name: param.distribution for name, param in space.items()}
    assert create_trial(value=0.5, params=defaults, distributions=distributions).params == defaults


def test_reports(whole: Fit) -> None:
    steps, accuracies = zip(*whole.reports, strict=True)
    # Law: a whole fit reports the steps 1, 2, ... n_steps, each once.
    assert list(steps) == list(range(1, whole.fitted.n_steps + 1))
    # Law: what it reports are accuracies.
    assert all(0 <= accuracy <= 1 for accuracy in accuracies)


def test_predicts_probabilities(whole: Fit, parts: dict[str, Part]) -> None:
    probabilities = whole.fitted.predict(parts["val"].images)
    # Law: a row of 26 float32 for each letter, not negative, of sum 1.
    assert probabilities.shape == (len(parts["val"].labels), 26)
    assert probabilities.dtype == np.float32
    assert probabilities.min() >= 0
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, atol=1e-5)
    # Law: a letter's answer does not depend on the letters that are asked along with it.
    alone = whole.fitted.predict(parts["val"].images[:1])
    np.testing.assert_allclose(alone, probabilities[:1], atol=1e-5)


def test_reports_its_own_accuracy(whole: Fit, stopped: Fit, parts: dict[str, Part]) -> None:
    images, labels = parts["val"]
    for fitted, reports in (whole, stopped):
        accuracy = (fitted.predict(images).argmax(axis=1) == labels).mean()
        # Law: the accuracy reported last is that of the model that is handed back.
        assert reports[-1][1] == pytest.approx(accuracy, abs=1e-6)


def test_stops(whole: Fit, stopped: Fit) -> None:
    # Law: a fit that is told to stop after its first step does no other.
    assert [step for step, _ in stopped.reports] == [1]
    # Law: n_steps is that of a whole fit, so that it shows where a fit was stopped.
    assert stopped.fitted.n_steps == whole.fitted.n_steps > 1


def test_same_seed_same_model(model: str, whole: Fit, parts: dict[str, Part]) -> None:
    again = fit(model, parts)
    # Law: the seed decides all that is drawn.
    assert again.reports == whole.reports
    images = parts["val"].images
    np.testing.assert_array_equal(again.fitted.predict(images), whole.fitted.predict(images))


def test_serves_without_the_project(
    whole: Fit, stopped: Fit, parts: dict[str, Part], tmp_path: Path
) -> None:
    images = parts["val"].images
    np.save(tmp_path / "images.npy", images)
    fits = {"whole": whole.fitted, "stopped": stopped.fitted}
    for name, fitted in fits.items():
        _save(fitted, tmp_path / name, images)
    done = subprocess.run(
        [sys.executable, "-I", "-c", SERVE], cwd=tmp_path, capture_output=True, text=True
    )
    # Law: a saved model loads and answers where the project cannot be imported, and nothing be
    # unpickled.
    assert done.returncode == 0, done.stderr
    for name, fitted in fits.items():
        served = np.load(tmp_path / f"{name}.npz")
        # Law: it answers as the model did that was saved, be it asked for many letters or one.
        np.testing.assert_allclose(served["all"], fitted.predict(images), atol=1e-5)
        np.testing.assert_allclose(served["one"], served["all"][:1], atol=1e-5)


def _save(fitted: Fitted, folder: Path, images: Any) -> None:
    fitted.save_model(
        path=str(folder),
        mlflow_model=Model(),
        signature=tracking.SIGNATURE,
        input_example=images[:2],
        pip_requirements=tracking.requirements(fitted.requirements),
    )


def _files(data: bytes, name: str) -> Iterator[tuple[str, bytes]]:
    """A file and, where it is a zip, all that it holds."""
    yield name, data
    if zipfile.is_zipfile(io.BytesIO(data)):
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            for member in archive.namelist():
                yield from _files(archive.read(member), f"{name}/{member}")


def _is_pickle(data: bytes) -> bool:
    """Whether it can be read as a pickle from its first byte on."""
    with warnings.catch_warnings():  # of text that is taken for one
        warnings.simplefilter("ignore")
        try:
            return bool(list(pickletools.genops(data)))
        except (ValueError, IndexError, struct.error):
            return False


def test_what_a_pickle_is() -> None:
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        assert _is_pickle(pickle.dumps({"a": [Path("b")]}, protocol))
    assert not _is_pickle(b"PK no pickle")


def test_holds_no_pickle(whole: Fit, parts: dict[str, Part], tmp_path: Path) -> None:
    _save(whole.fitted, tmp_path / "model", parts["val"].images)
    # Law: no file of a saved model is a pickle, nor any inside of one.
    for path in (tmp_path / "model").rglob("*"):
        for name, data in _files(path.read_bytes(), path.name) if path.is_file() else ():
            assert not _is_pickle(data), name
            if name.endswith(".npy"):
                np.load(io.BytesIO(data), allow_pickle=False)


def test_code_in_a_network_is_not_run(
    model: str, whole: Fit, parts: dict[str, Part], tmp_path: Path
) -> None:
    """Law: Keras's safe mode holds; what a Lambda layer has marshalled is never called."""
    _save(whole.fitted, tmp_path / "model", parts["val"].images)
    nets = list((tmp_path / "model").rglob("*.keras"))
    if "keras" not in Model.load(str(tmp_path / "model")).flavors:
        assert not nets
        return
    import keras
    import mlflow

    (net,) = nets
    given = keras.Input((28, 28), dtype="uint8")
    evil = keras.layers.Lambda(lambda x: x, output_shape=(28, 28))
    keras.Model(given, evil(given)).save(net)
    with pytest.raises(ValueError, match="unsafe|safe_mode|deserializ"):
        mlflow.pyfunc.load_model(str(tmp_path / "model"))


def test_a_model_is_a_file(add_member: Any) -> None:
    known = registry.names(models)
    add_member(models, "toy", "PARAMS = {}\n")
    add_member(models, "_helper", "raise RuntimeError('nobody asked for this file')\n")
    # Law: a file is all that a new model needs, and a leading _ says that it is none.
    assert registry.names(models) == sorted([*known, "toy"])
    assert registry.load(models, "toy").PARAMS == {}


def test_unknown_model() -> None:
    known = ", ".join(registry.names(models))
    # Law: an unknown name is answered with what came and what there is.
    with pytest.raises(UserError, match=rf"^model must be one of {known}, but 'mlp' came: pass -P"):
        registry.load(models, "mlp")
