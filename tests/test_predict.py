import errno
import os
from pathlib import Path
from typing import IO, Any

import mlflow
import numpy as np
import pytest
from mlflow.models import ModelSignature
from PIL import Image
from steps import arguments, artifacts, runs
from test_scan import drawn, page

from pipeline import disk, predict, scan, train
from pipeline.spec import LETTERS, UserError

OPTIONS = {"model": "models:/letters@champion", "output": "auto"}


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """A picture of a printed F."""
    path = tmp_path / "letter.png"
    page(drawn()).save(path)
    return path


@pytest.fixture
def champion(store: mlflow.MlflowClient, data_options: dict[str, Any]) -> mlflow.MlflowClient:
    """A store whose champion are nearest neighbours of the tiny archive."""
    train.main(arguments(data_options | {"model": "knn", "seed": 0, "precision": "auto"}))
    (run,) = runs(store, "train")
    version = mlflow.register_model(run.data.tags["model_uri"], "letters").version
    store.set_registered_model_alias("letters", "champion", version)
    return store


def test_the_letter_and_the_runner_up_are_the_models(
    champion: mlflow.MlflowClient,
    image: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    predict.main(arguments({"image": image, **OPTIONS}))
    (run,) = runs(champion, "predict")
    assert run.info.status == "FINISHED"
    # The sentence names the likeliest letter and the runner-up, as the model has them.
    seen = scan.find(scan.read(image)).letter
    (probabilities,) = mlflow.pyfunc.load_model("models:/letters@champion").predict(seen[None])
    second, best = np.argsort(probabilities, kind="stable")[-2:]
    out = capsys.readouterr().out.splitlines()[-1]
    assert out.startswith(f"{LETTERS[best]} {probabilities[best]:.1%}, then ")
    assert f" {probabilities[second]:.1%}  (by models:/letters@champion" in out
    assert run.data.tags["letter"] == LETTERS[best]
    assert run.data.metrics["probability"] == pytest.approx(float(probabilities[best]), abs=1e-6)
    # What the model saw lies beside the image, and in the run.
    assert artifacts(champion, run.info.run_id) == {"seen.png"}
    with Image.open(tmp_path / "letter-seen.png") as picture:
        assert min(picture.size) > 280


def test_the_picture_goes_where_it_is_wanted(
    champion: mlflow.MlflowClient, image: Path, tmp_path: Path
) -> None:
    predict.main(arguments({"image": image, **OPTIONS, "output": tmp_path / "here.png"}))
    assert (tmp_path / "here.png").exists()
    assert not (tmp_path / "letter-seen.png").exists()


def test_a_full_disk_leaves_no_half_a_picture(
    champion: mlflow.MlflowClient, image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(file: IO[Any]) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(disk, "keep", full)
    (tmp_path / "letter-seen.png").write_bytes(b"an earlier one")
    before = set(tmp_path.iterdir())
    with pytest.raises(
        UserError, match=r"letter-seen\.png' must be writable, but its disk answered"
    ):
        predict.main(arguments({"image": image, **OPTIONS}))
    assert (tmp_path / "letter-seen.png").read_bytes() == b"an earlier one"
    assert set(tmp_path.iterdir()) == before
    (run,) = runs(champion, "predict")
    assert run.info.status == "FAILED"


@pytest.mark.parametrize("output", ["seen.jpg", "nowhere/seen.png"])
def test_a_bad_output(output: str, store: mlflow.MlflowClient, image: Path) -> None:
    with pytest.raises(UserError, match=r"^output must name a \.png file in a folder that exists"):
        predict.main(arguments({"image": image, **OPTIONS, "output": output}))
    assert runs(store, "predict") == []


def test_the_image_itself_is_not_written_over(store: mlflow.MlflowClient, image: Path) -> None:
    before = image.read_bytes()
    image.with_name("link.png").symlink_to(image)
    for name in ("letter.png", "link.png"):
        with pytest.raises(UserError, match="and not the image itself, but"):
            predict.main(arguments({"image": image, **OPTIONS, "output": image.with_name(name)}))
    assert image.read_bytes() == before
    assert runs(store, "predict") == []


@pytest.mark.parametrize("model", ["models:/letters@champion", "models:/x/9", "nowhere", "runs:/1"])
def test_a_model_that_is_not_there(model: str, store: mlflow.MlflowClient, image: Path) -> None:
    with pytest.raises(UserError, match=r"^model must be the address of a logged model, but ") as e:
        predict.main(arguments({"image": image, **OPTIONS, "model": model}))
    assert len(str(e.value).splitlines()) == 1
    # Law: the run is closed, and no picture is left.
    assert [run.info.status for run in runs(store, "predict")] == ["FAILED"]
    assert not image.with_name("letter-seen.png").exists()


def test_a_model_of_another_kind(store: mlflow.MlflowClient, image: Path, tmp_path: Path) -> None:
    class Doubles(mlflow.pyfunc.PythonModel):  # type: ignore[misc]
        def predict(self, context: Any, model_input: np.ndarray, params: Any = None) -> Any:
            return model_input

    other = tmp_path / "other"
    signature = mlflow.models.infer_signature(np.zeros((2, 3)), np.zeros((2, 3)))
    assert isinstance(signature, ModelSignature)
    mlflow.pyfunc.save_model(
        other, python_model=Doubles(), signature=signature, pip_requirements=["numpy"]
    )
    with pytest.raises(UserError, match="model must take letters as .*uint8"):
        predict.main(arguments({"image": image, **OPTIONS, "model": other}))


def test_a_bad_image_costs_no_run(store: mlflow.MlflowClient, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="image must name a file"):
        predict.main(arguments({"image": tmp_path / "missing.png", **OPTIONS}))
    assert runs(store, "predict") == []
