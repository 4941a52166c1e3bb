"""The step ``train``: fit one model with given hyperparameters, the others at their defaults.

mlflow run . -e train -P model=cnn -P learning_rate=0.002
"""

import resource
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from pipeline import cli, models, precision, prep, registry, tracking
from pipeline.bill import METER, charge, completed, metrics
from pipeline.spec import LETTERS, Dataset, Images, Params, Part, Report

OPTIONS = prep.OPTIONS | {"model": cli.text, "seed": cli.seed, "precision": precision.option}


class Trained(NamedTuple):
    """What a fit left behind; ``val_accuracy`` and ``step`` are those of the logged model.

    ``costs`` has wall_seconds, peak_rss_mb and model_mb; ``found`` are hyperparameters that were
    left to the fit.
    """

    val_accuracy: float
    step: int
    whole: bool  # no step was left to do
    model_uri: str
    costs: dict[str, float]
    found: Params


def train(
    run: tracking.Run, model: str, params: Params, data: Dataset, seed: int, report: Report
) -> Trained:
    """Fit a model and log it. What it reports and costs is for the caller to log.

    ``report`` is asked after every step whether to stop; the model that is kept is the last one.
    Raises whatever the model's ``fit`` raises.
    """
    began = time.perf_counter()
    curve: dict[int, float] = {}

    def note(step: int, val_accuracy: float) -> bool:
        curve[step] = val_accuracy
        return report(step, val_accuracy)

    with charge("data"):
        train_part, val = data.part("train"), data.part("val")
        example = one_of_each(train_part)
    member = registry.load(models, model)
    with charge("import"):  # in a sweep that is done
        registry.preload(member)
    with charge("fit"):
        fitted = member.fit(params, train_part, val, seed, note)
    if not curve:
        raise RuntimeError(f"the model {model} must report at least one step, but reported none")
    last = max(curve)
    logged = run.log_model(fitted, example, step=last)
    costs = {
        "wall_seconds": time.perf_counter() - began,
        "peak_rss_mb": peak_rss_mb(),
        "model_mb": logged.mb,
    }
    return Trained(curve[last], last, last == fitted.n_steps, logged.uri, costs, fitted.found)


def found(params: Mapping[str, Any]) -> Params:
    """Hyperparameters that a fit has found, as the params of its run."""
    return {f"found_{name}": value for name, value in params.items()}


def peak_rss_mb() -> float:
    """Largest resident memory of this process so far, in megabytes (10^6 bytes)."""
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes there, else in KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def one_of_each(part: Part) -> Images:
    """The first letter of each kind: A to Z, (26, 28, 28)."""
    return np.stack([part.images[np.argmax(part.labels == i)] for i in range(len(LETTERS))])


def main(argv: Sequence[str]) -> None:
    from pipeline import plots  # a sweep's trials, which import this module, draw nothing

    options, given = cli.parse("train", argv, OPTIONS)
    model, seed = options.pop("model"), options.pop("seed")
    wanted, space = options.pop("precision"), registry.load(models, model).PARAMS
    precision.check(wanted, model, space)
    params = cli.hyperparameters(model, space, given)
    curve: list[tracking.Point] = []

    def report(step: int, val_accuracy: float) -> bool:
        values = {"val_accuracy": val_accuracy, "fit_cpu_seconds": METER.seconds()["fit"]}
        curve.append(tracking.Point(step, time.time(), values))
        print(f"{model}  step {step}  val_accuracy {val_accuracy:.4f}", flush=True)
        return False

    with tracking.start("train") as run:
        data = prep.ensure(**options)
        run.use_dataset(data, "train")
        if precision.HYPERPARAMETER not in given:
            params |= precision.params(precision.resolve(wanted, space), space)
        run.tags({"precision": precision.of(params)})
        run.params(params | {"model": model, "seed": seed})
        result = train(run, model, params, data, seed, report)
        bill = metrics(completed(METER.seconds(), time.process_time()))
        costs = tracking.Point(result.step, time.time(), bill | result.costs)
        curve[-1] = curve[-1]._replace(model_uri=result.model_uri)
        run.write([*curve, costs], tags={"model": model, "model_uri": result.model_uri})
        run.params(found(result.found))
        run.name(f"{model} · {result.val_accuracy:.1%}")
        title = f"{model} on {data.title}"
        accuracies = {point.step: point.values["val_accuracy"] for point in curve}
        run.figure("learning_curve.png", plots.learning_curve(accuracies, title))
        example = one_of_each(data.part("train"))
        run.figure("input_example.png", plots.letters(example, list(LETTERS), data.title))
        table = tracking.markdown(
            ["hyperparameter", "value"], list((params | result.found).items())
        )
        run.describe(
            f"**{title}**: {result.val_accuracy:.2%} on val after step {result.step}\n\n{table}"
        )
    print(f"{model}: val_accuracy {result.val_accuracy:.4f}, run {run.id}, {result.model_uri}")
    print(tracking.ui_hint(run.experiment_id))


if __name__ == "__main__":
    cli.run(main)
