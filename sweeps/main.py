"""The step ``main``: prep, a sweep of each model, evaluate and compare, promote.

    mlflow run . -P dataset=strokes -P cpu_minutes=2

Every step is an ``mlflow run`` of its own, as a user would type it: a sweep starts in a fresh
process, whose CPU-seconds are its own, and stands in the MLflow UI beside the others.
"""

import re
from collections.abc import Sequence
from pathlib import Path

import mlflow
from mlflow.exceptions import ExecutionException

from pipeline import cli, models, precision, promote, registry, tracking
from pipeline.spec import UserError
from sweeps.sweep import OPTIONS as SWEEP_OPTIONS

OPTIONS: dict[str, cli.Convert] = {
    name: convert
    for name, convert in SWEEP_OPTIONS.items()
    if name not in ("model", "study", "plan")
} | {"models": cli.text}
PROJECT = Path(__file__).parent.parent


def parse_models(names: str) -> list[str]:
    """Names of models, separated by commas, or ``all``."""
    if names == "all":
        return registry.names(models)
    for name in names.split(","):
        registry.load(models, name)
    return names.split(",")


def step(entry_point: str, **parameters: object) -> str:
    """Run one step to its end; gives the id of its run.

    A refused promotion exits with 2, yet the step has done its work: it is a decision, no failure.
    """
    print(f"\n== {entry_point} {parameters.get('model', '')}", flush=True)
    given = {name: str(value) for name, value in parameters.items()}
    try:
        # The environment is the one that we run in: MLflow would make a new one otherwise.
        done = mlflow.projects.run(  # type: ignore[no-untyped-call]
            str(PROJECT), entry_point, parameters=given, env_manager="local"
        )
    except ExecutionException as error:
        found = re.search(r"Run \(ID '(\w+)'\) failed", str(error))  # MLflow gives the id only here
        if found and _refused(found[1]):
            return found[1]
        raise UserError(
            f"every step must succeed, but {entry_point} failed: its own message is above"
        ) from error
    return str(done.run_id)


def _refused(run_id: str) -> bool:
    """Whether a run is a promotion that was refused, for which MLflow's FAILED is not the word."""
    client = mlflow.MlflowClient()
    run = client.get_run(run_id)
    refused = run.data.tags.get("decision") == promote.REFUSED
    if refused:
        tracking.Run(client, run_id, run.info.experiment_id).close("FINISHED")
    return refused


def main(argv: Sequence[str]) -> None:
    options = cli.parse_all("main", argv, OPTIONS)
    # As they were typed: they are checked, and the steps parse them themselves.
    options = dict(zip((word[2:] for word in argv[::2]), argv[1::2], strict=True))
    names = parse_models(options.pop("models"))
    data_dir = options["data_dir"]
    data = {name: options[name] for name in ("dataset", "archive", "n_train", "data_dir")}
    with tracking.start("main") as run:
        run.name("main · " + ", ".join(names))
        # Somebody may sweep other letters meanwhile: what is compared is what was swept here.
        digest = run.client.get_run(step("prep", **data)).data.tags["dataset_digest"]
        for name in names:
            # What one model does not know is no reason to stop the others.
            known = precision.HYPERPARAMETER in registry.load(models, name).PARAMS
            step("sweep", model=name, **options | ({} if known else {"precision": precision.AUTO}))
        comparison = step("compare", dataset_digest=digest, data_dir=data_dir)
        best = promote.best(run.client, digest).info.run_id
        promotion = run.client.get_run(step("promote", run_id=best, data_dir=data_dir))
        table = run.client.get_run(comparison).data.tags[tracking.NOTE]
        decision = f"{promotion.data.tags['decision']}: {promotion.data.tags['sentence']}"
        run.describe(f"{table}\n\n{decision}")
    print(f"\n{table}\n\n{decision}\n{tracking.ui_hint(run.experiment_id)}")


if __name__ == "__main__":
    cli.run(main)
