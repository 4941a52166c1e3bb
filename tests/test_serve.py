"""Logged models behind a real ``mlflow models serve``, and in an environment of their own."""

import functools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import mlflow
import numpy as np
import pytest
import requests
from servers import ModelServer
from steps import arguments, runs
from stores import N_TRAIN, open_store

from pipeline import models, registry, served_letters, train
from pipeline.served_letters import MAX_BYTES, MAX_LETTERS

JSON = {"Content-Type": "application/json"}
LETTER = [[0] * 28] * 28
OUTSIDE = """
import importlib.util, sys
import mlflow.pyfunc
import numpy as np
assert importlib.util.find_spec("pipeline") is None
letters = np.load("letters.npy")
np.save("answer.npy", mlflow.pyfunc.load_model(sys.argv[1]).predict(letters))
"""


class Logged(NamedTuple):
    """A logged model of one family, the champion of a store of its own, and its folder."""

    client: mlflow.MlflowClient
    folder: Path
    uri: str


@pytest.fixture(scope="module", params=registry.names(models))
def logged(
    request: pytest.FixtureRequest,
    fresh_store: Path,
    archive: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Logged]:
    folder = tmp_path_factory.mktemp(request.param)
    options = {"dataset": "emnist_letters", "archive": archive, "n_train": N_TRAIN, "seed": 0}
    options |= {"data_dir": folder / "data", "model": request.param, "precision": "float32"}
    short = {"epochs": 1} if "epochs" in registry.load(models, request.param).PARAMS else {}
    with pytest.MonkeyPatch.context() as patch:
        client = open_store(fresh_store, folder, patch)
        train.main(arguments(options | short))
        uri = runs(client, "train")[0].data.tags["model_uri"]
        version = mlflow.register_model(uri, "letters").version
        client.set_registered_model_alias("letters", "champion", version)
        yield Logged(client, Path(mlflow.artifacts.download_artifacts(uri)), uri)


def pixel(value: Any) -> dict[str, Any]:
    """A request for a blank letter with one pixel of another value."""
    letter = [list(row) for row in LETTER]
    letter[9][9] = value
    return {"inputs": [letter]}


NESTED = functools.reduce(lambda inner, _: [inner], range(40), 0)
# What is wrong: the request, the status, and words of the sentence that answers it.
BAD: dict[str, tuple[Any, int, str]] = {
    "27 rows": ({"inputs": [LETTER[:27]]}, 400, "(1, 27, 28) came"),
    "flat": ({"inputs": [[0] * 784]}, 400, "(1, 784) came"),
    "one letter bare": ({"inputs": LETTER}, 400, "(28, 28) came"),
    "ragged": ({"inputs": [[*LETTER[1:], [0]]]}, 400, "lists of unequal lengths"),
    "nested": ({"inputs": NESTED}, 400, "lists 40 deep came"),
    "text": (pixel("7"), 400, 'but "7" came'),
    "fraction": (pixel(0.5), 400, "but 0.5 came"),
    "negative": (pixel(-1), 400, "but -1 came"),
    "too high": (pixel(256), 400, "but 256 came"),
    "endless": (pixel(float("inf")), 400, "but Infinity came"),
    "no number": (pixel(float("nan")), 400, "but NaN came"),
    "null": (pixel(None), 400, "but null came"),
    "true": (pixel(True), 400, "but true came"),
    "no letters": ({"inputs": []}, 400, "at least, but none came"),
    "a word": ({"inputs": "A"}, 400, "at least, but none came"),
    "no key": ({}, 400, "the one key inputs, but [] came"),
    "both keys": ({"inputs": [], "instances": []}, 400, "the one key inputs"),
    "a list": ([LETTER], 400, "the one key inputs, but a list came"),
    "empty": (b"", 400, "must be JSON, but nothing came"),
    "half": (b'{"inputs": [[', 400, "must be JSON"),
    "no UTF-8": (b"\xff\xfe\xff", 400, "must be JSON"),
    "deep": (b"[" * 100_000, 400, "must be JSON"),
    "long number": (b"9" * 5_000, 400, "must be JSON"),
    "many letters": ({"inputs": [LETTER] * (MAX_LETTERS + 1)}, 413, "at most 1000 letters"),
    "huge": (b"x" * 40_000_000, 413, "at most 8 MB, but 40.0 MB came"),
}


@pytest.mark.timeout(600)  # a server is up after ten CPU-seconds
def test_the_champion_is_served(logged: Logged) -> None:
    with ModelServer("models:/letters@champion") as server:
        url = f"{server.uri}/invocations"
        example = json.loads((logged.folder / "serving_input_example.json").read_text())
        letters = np.array(example["inputs"], np.uint8)
        expected = mlflow.pyfunc.load_model(logged.uri).predict(letters)
        answer = requests.post(url, json=example, timeout=60)
        assert answer.status_code == 200, answer.text
        # Law: it answers as the model does, 26 probabilities for each letter.
        np.testing.assert_allclose(answer.json()["predictions"], expected, atol=1e-5)
        assert expected.shape == (26, 26)
        one = requests.post(url, json={"instances": [LETTER]}, timeout=60)
        assert [len(row) for row in one.json()["predictions"]] == [26]
        for what, (request, status, words) in BAD.items():
            body = request if isinstance(request, bytes) else json.dumps(request).encode()
            refused = requests.post(url, data=body, headers=JSON, timeout=60)
            # Law: a bad request is refused with one sentence, which does not repeat it.
            assert refused.status_code == status, f"{what}: {refused.text}"
            (sentence,) = refused.json()["message"].splitlines()
            assert words in sentence, what
            assert len(sentence) < 250, what
        for headers in ({}, {"Content-Type": "text/csv"}):
            refused = requests.post(url, data=b"1,2", headers=headers, timeout=60)
            assert refused.status_code == 415
            assert "must be application/json" in refused.json()["message"]
        assert requests.post(f"{server.uri}/predict", json={}, timeout=60).status_code == 404
        # Law: after all that it still answers.
        assert requests.post(url, json=example, timeout=60).json() == answer.json()


def test_the_largest_request_is_within_the_limit_of_bytes() -> None:
    body = json.dumps({"inputs": [[[255] * 28] * 28] * MAX_LETTERS}).encode()
    assert len(body) < MAX_BYTES
    served_letters.check(body, "application/json; charset=utf-8")


def test_a_logged_model_keeps_its_flavour_and_its_signature(logged: Logged) -> None:
    info = mlflow.models.get_model_info(logged.uri)
    assert info.flavors["python_function"]["loader_module"] == "served_letters"
    assert ("keras" in info.flavors) == (
        "keras" in (logged.folder / "requirements.txt").read_text()
    )
    # Law: outside of a server MLflow's own signature guards predict.
    with pytest.raises(mlflow.MlflowException, match="does not match expected shape"):
        mlflow.pyfunc.load_model(logged.uri).predict(np.zeros((1, 27, 28), np.uint8))


@pytest.fixture(scope="module")
def python_with(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The Python of an environment of such requirements alone; the same for the same ones."""

    @functools.cache
    def make(requirements: str) -> Path:
        folder = tmp_path_factory.mktemp("environment")
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        uv = shutil.which("uv", path=path)
        if uv is None:
            pytest.skip("uv, which `make venv` installs, is not here")
        (folder / "requirements.txt").write_text(requirements)
        venv = [uv, "venv", "--quiet", "--python", sys.executable, "venv"]
        subprocess.run(venv, cwd=folder, check=True)
        python = folder / "venv/bin/python"
        install = [uv, "pip", "install", "--quiet", "--offline", "--python", str(python)]
        done = subprocess.run(
            [*install, "-r", "requirements.txt"], cwd=folder, capture_output=True, text=True
        )
        if done.returncode:
            # Law: what is missing is missing in uv's cache alone; any other failure is ours.
            words = ("network was disabled", "not found in the cache")
            assert any(each in done.stderr for each in words), done.stderr
            pytest.skip(f"uv's cache lacks a package of {requirements.split()}")
        return python

    return make


@pytest.mark.timeout(900)  # every library's first import compiles it
def test_it_loads_in_an_environment_of_its_own_requirements(
    logged: Logged, python_with: Callable[[str], Path], tmp_path: Path
) -> None:
    python = python_with((logged.folder / "requirements.txt").read_text())
    letters = np.array(mlflow.pyfunc.load_model(logged.uri).input_example, np.uint8)
    np.save(tmp_path / "letters.npy", letters)
    command = [str(python), "-I", "-c", OUTSIDE, str(logged.folder)]
    answered = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=280)
    assert answered.returncode == 0, answered.stderr
    # Law: a model answers there as it does here.
    expected = mlflow.pyfunc.load_model(logged.uri).predict(letters)
    np.testing.assert_allclose(np.load(tmp_path / "answer.npy"), expected, atol=1e-5)
