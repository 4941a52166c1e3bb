"""The step ``predict``: which letter a picture shows, and what the model saw of it.

mlflow run . -e predict -P image=letter.png
"""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from mlflow.models import Model

from pipeline import cli, disk, plots, scan, tracking
from pipeline.spec import LETTERS, UserError

OPTIONS: dict[str, cli.Convert] = {"image": cli.text, "model": cli.text, "output": cli.text}


class Guess(NamedTuple):
    """A letter and its probability."""

    letter: str
    probability: float


def predict(model: Any, seen: scan.Seen) -> list[Guess]:
    """All letters, the likeliest first."""
    (probabilities,) = model.predict(seen.letter[None])
    order = np.argsort(-probabilities, kind="stable")
    return [Guess(LETTERS[i], float(probabilities[i])) for i in order]


def load(uri: str) -> Any:
    """The model at this address, in MLflow's terms; one that is not there is a ``UserError``."""
    rule = f"model must be the address of a logged model, but {uri!r}"
    cure = "run `mlflow run . -e promote` first, or pass -P model=models:/NAME/VERSION"
    with tracking.readable(rule, cure):
        if Model.load(uri).signature != tracking.SIGNATURE:
            raise UserError(
                f"model must take letters as {tracking.SIGNATURE.inputs} and give 26 "
                f"probabilities, but {uri!r} does not: name a model that this project has logged"
            )
        return tracking.load_model(uri)


def destination(output: str, image: Path) -> Path:
    """Where the picture of what the model saw goes; ``auto`` is beside the image."""
    path = image.with_name(f"{image.stem}-seen.png") if output == "auto" else Path(output)
    try:
        good = path.suffix == ".png" and path.parent.is_dir() and not path.is_dir()
        good = good and not (path.exists() and path.samefile(image))
    except OSError:  # a folder that is not ours
        good = False
    if not good:
        raise UserError(
            "output must name a .png file in a folder that exists, and not the image itself, but "
            f"{output!r} came: pass -P output=seen.png, or leave it out"
        )
    return path


def main(argv: Sequence[str]) -> None:
    options = cli.parse_all("predict", argv, OPTIONS)
    image = Path(options["image"])
    seen = scan.find(scan.read(image))
    path = destination(options["output"], image)
    with tracking.start("predict") as run:
        guesses = predict(load(options["model"]), seen)
        best, second = guesses[:2]
        sentence = (
            f"{best.letter} {best.probability:.1%}, then {second.letter} {second.probability:.1%}"
        )
        figure = plots.seen(seen, dict(guesses[:5]), f"{image.name}: {sentence}")
        picture = io.BytesIO()
        figure.savefig(picture, dpi=110)
        disk.write(path, picture.getvalue())
        run.params(options)
        run.name(f"predict {image.name} · {best.letter} {best.probability:.0%}")
        run.tags({"letter": best.letter, "runner_up": second.letter, "model_uri": options["model"]})
        run.metrics({"probability": best.probability, "runner_up_probability": second.probability})
        run.figure("seen.png", figure)
        run.describe(f"{image.name}: **{sentence}**, by `{options['model']}`")
    print(f"{sentence}  (by {options['model']}; what it saw: {path})")


if __name__ == "__main__":
    cli.run(main)
