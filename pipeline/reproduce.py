"""The step ``reproduce``: a run's letters, code and fit again, and whether its metric agrees.

mlflow run . -e reproduce -P run_id=...
"""

import json
import math
import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import mlflow
import pandas as pd
from mlflow.entities import Run as RunEntity

from pipeline import cli, environment, evaluate, tracking
from pipeline.checkout import checkout, step_of
from pipeline.spec import LATE_LETTERS, TTA, UserError

OPTIONS: dict[str, cli.Convert] = {
    "run_id": cli.text,
    "archive": cli.text,
    "data_dir": cli.folder,
}
RECORDED = "recorded"  # the archive that the run was given
N_ERRORS = 3  # standard errors by which two fits of one kind may differ
DIRTY = " (the run was made from changed files on top of it: its exact code is unknown)"
STOPPED = {  # states of a trial whose fit was not a whole one
    "pruned": "; it was pruned, and is compared up to its last step",
    "over_budget": "; its grant ended it, and it is compared up to its last step",
}

Curve = dict[int, float]  # step: val_accuracy


class Verdict(NamedTuple):
    """How a fit compares with the recorded one, at the last step that both have.

    Attributes:
        exact: equal bit for bit at every recorded step.
        strict: whether that is asked for; else a difference up to ``tolerance`` agrees.
        last: the last recorded step.
    """

    exact: bool
    strict: bool
    step: int
    last: int
    recorded: float
    reproduced: float
    tolerance: float

    @property
    def agrees(self) -> bool:
        near = self.step == self.last and abs(self.reproduced - self.recorded) <= self.tolerance
        return self.exact or (near and not self.strict)

    def words(self) -> str:
        if self.exact:
            return f"agrees bit for bit: val_accuracy {self.recorded:.4f} after step {self.last}"
        values = f"{self.reproduced:.6f} after step {self.step}, recorded {self.recorded:.6f}"
        if self.agrees:
            return f"agrees within the tolerance of {self.tolerance:.4f}: val_accuracy {values}"
        if self.step < self.last:
            return f"does not agree, it ends before step {self.last}: val_accuracy {values}"
        if self.strict:
            return (
                f"does not agree: val_accuracy {values}; in float32 on one thread, with nothing "
                "changed in code and environment, they must be equal bit for bit"
            )
        return f"does not agree: val_accuracy {values}; the tolerance is {self.tolerance:.4f}"


def reproduce(run: tracking.Run, source: RunEntity, archive: str, data_dir: Path) -> Verdict:
    """Do again what the run ``source`` did, and log how that compares."""
    tags, label = source.data.tags, str(source.info.run_name).partition(" · ")[0]
    dirty, state = tags["git_dirty"] == "true", tags.get("state", "complete")
    data, params = letters(run.client, source, archive), hyperparameters(source)
    run.name(f"reproduce {label}")
    keys = ("model", "dataset", "dataset_title", "dataset_digest")
    run.tags({key: tags[key] for key in keys} | {"reproduced_run_id": source.info.run_id})
    run.params(params | data)
    with checkout(tags["git_commit"], data_dir) as (code, scratch):
        lock = code / "requirements.txt"
        packages = environment.compare(tags, lock.read_text() if lock.exists() else "")
        origin = f"commit {tags['git_commit'][:8]}" + (DIRTY if dirty else "")
        heading = f"{label}, code of {origin}" + STOPPED.get(state, "")
        print(f"{heading}\n\n{environment.described(packages)}\n", flush=True)
        run.csv("environment.csv", packages)
        place = {"data_dir": str(scratch)}
        made = step_of(code, origin, run, "prep", data | place)
        check_digest(source, made, data["archive"])
        again = step_of(code, origin, run, "train", params | data | place)
    # Else it would be the latest train run, which other steps ask for.
    replace(run, id=again.info.run_id).tags({"step": "retrain"})
    recorded, reproduced = curve(run.client, source), curve(run.client, again)
    curves = {"recorded_val_accuracy": recorded, "val_accuracy": reproduced}
    verdict = judge(recorded, reproduced, is_strict(tags, packages), _counts(source)["val"])
    agrees = "agrees" if verdict.agrees else "disagrees"
    run.write(
        [
            tracking.Point(step, time.time(), {name: value})
            for name, points in curves.items()
            for step, value in points.items()
        ],
        tags={"agrees": str(verdict.agrees).lower(), "retrained_run_id": again.info.run_id},
    )
    run.metrics({"val_accuracy_tolerance": verdict.tolerance})
    run.name(f"reproduce {label} · {agrees}")
    table = tracking.markdown(
        ["step", *curves], [[step, *_cells(curves, step)] for step in reproduced]
    )
    run.describe(
        f"**{heading}**: {verdict.words()}\n\n{environment.described(packages)}\n\n{table}"
    )
    return verdict


def letters(client: mlflow.MlflowClient, source: RunEntity, archive: str) -> dict[str, str]:
    """The options by which ``prep`` makes a run's letters again."""
    params = dict(source.data.params)
    if sweep := source.data.tags.get("mlflow.parentRunId"):  # a trial's archive is its sweep's
        params = tracking.get_run(client, sweep).data.params | params
    if archive == RECORDED and "archive" not in params:
        raise UserError(
            "the archive must be given for a run that has recorded none, and "
            f"{source.info.run_id!r} has not: pass -P archive=PATH or URL, or -P archive=default"
        )
    return {
        "dataset": source.data.tags["dataset"],
        "archive": typed(params["archive"]) if archive == RECORDED else archive,
        "n_train": params.get("n_train", str(_counts(source)["train"])),
    }


def typed(value: str) -> str:
    """A param as it was typed: ``mlflow run`` logs it with the quotes that a shell needs."""
    try:
        words = shlex.split(value)
    except ValueError:
        return value
    return words[0] if len(words) == 1 and shlex.quote(words[0]) == value else value


def hyperparameters(source: RunEntity) -> dict[str, str]:
    """A run's hyperparameters, model and seed, as ``train`` takes them.

    What was left to the fit is left to it again, but for where its grant has shortened it.
    """
    params = source.data.params
    left = {name: value for name, value in params.items() if not name.startswith("found_")}
    short = {name: params.get(f"found_{name}") for name in (LATE_LETTERS, TTA)}
    return left | {name: value for name, value in short.items() if value}


def check_digest(source: RunEntity, made: RunEntity, archive: str) -> None:
    """Refuse other letters than those of the run ``source``."""
    wanted, came = (one.data.tags["dataset_digest"] for one in (source, made))
    if wanted != came:
        raise UserError(
            f"the letters must have the digest {wanted}, as those of the run had, but those of "
            f"archive={archive} have {came}: pass -P archive=PATH of the archive that the run read"
        )


def is_strict(tags: Mapping[str, str], packages: pd.DataFrame) -> bool:
    """Whether a fit like that of a run with these tags must give the same bits again.

    In bfloat16 it has done so too wherever it was tried, which is on one kind of processor.
    """
    known = tags["git_dirty"] == "false" and environment.changes(packages).empty
    return known and tags["precision"] == "float32"


def judge(recorded: Curve, reproduced: Curve, strict: bool, n_val: int) -> Verdict:
    """Compare two fits by their accuracies on ``n_val`` letters after each step."""
    last = max(recorded)
    step = max(recorded.keys() & reproduced.keys())
    return Verdict(
        exact=all(reproduced.get(step) == value for step, value in recorded.items()),
        strict=strict,
        step=step,
        last=last,
        recorded=recorded[step],
        reproduced=reproduced[step],
        tolerance=tolerance(recorded[step], n_val),
    )


def tolerance(accuracy: float, n: int) -> float:
    """Three standard errors of the difference between two accuracies on ``n`` letters.

    Another processor or library rounds otherwise, and a fit makes of that what another seed makes
    of it. As the two fits answer the same letters, they differ by less than two draws of letters.
    """
    share = (accuracy * n + 1) / (n + 2)  # never 0 or 1, where a standard error would be 0
    return N_ERRORS * math.sqrt(2 * share * (1 - share) / n)


def curve(client: mlflow.MlflowClient, source: RunEntity) -> Curve:
    """A run's accuracy on val after each step."""
    points = client.get_metric_history(source.info.run_id, "val_accuracy")
    return {point.step: point.value for point in points}


def find(client: mlflow.MlflowClient, run_id: str) -> RunEntity:
    """The run whose fit is meant: of a sweep its best trial."""
    source = evaluate.find(client, run_id)
    return tracking.get_run(client, source.data.tags.get("best_run_id", source.info.run_id))


def _counts(source: RunEntity) -> dict[str, int]:
    """Letters of each part of a run's data set."""
    inputs = source.inputs.dataset_inputs if source.inputs else []
    counts: dict[str, int] = json.loads(str(inputs[0].dataset.profile))
    return counts


def _cells(curves: Mapping[str, Curve], step: int) -> list[str]:
    return [f"{points[step]:.6f}" if step in points else "–" for points in curves.values()]


def main(argv: Sequence[str]) -> None:
    options = cli.parse_all("reproduce", argv, OPTIONS)
    with tracking.start("reproduce") as run:
        source = find(run.client, options["run_id"])
        verdict = reproduce(run, source, options["archive"], Path(options["data_dir"]))
    print(tracking.ui_hint(run.experiment_id))
    sentence = f"{source.info.run_name}, run {source.info.run_id}, {verdict.words()}"
    if not verdict.agrees:
        raise UserError(f"{sentence}: see the table of run {run.id}")
    print(sentence)


if __name__ == "__main__":
    cli.run(main)
