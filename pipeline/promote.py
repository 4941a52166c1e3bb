"""The step ``promote``: register a run's model as ``letters`` with the alias ``champion``.

mlflow run . -e promote -P run_id=...
"""

from collections.abc import Sequence
from typing import Any

import mlflow
from mlflow.entities import Run as RunEntity

from pipeline import cli, evaluate, tracking
from pipeline.tracking import REGISTERED_MODEL

OPTIONS: dict[str, cli.Convert] = {"run_id": cli.text}
ALIAS = "champion"


def find(client: Any, run_id: str) -> RunEntity:
    """The run whose model is meant; ``best`` is the sweep with the best ``val_accuracy``.

    Only the latest sweeps of the data set that was swept last take part.
    """
    if run_id != "best":
        return evaluate.find(client, run_id)
    sweeps = tracking.latest_sweeps(client, "latest")
    return max(sweeps.values(), key=lambda sweep: float(sweep.data.metrics["val_accuracy"]))


def promote(run: tracking.Run, source: RunEntity) -> str:
    """Register the model of the run ``source``, move the alias; gives a sentence on it."""
    tags = source.data.tags
    version = _version(run.client, tags["model_uri"])
    if version is None:
        version = mlflow.register_model(tags["model_uri"], REGISTERED_MODEL).version
        keys = ("model_uri", "model", "dataset_title", "dataset_digest", "git_commit")
        note = {key: tags[key] for key in keys}
        note |= {"run_id": source.info.run_id, "val_accuracy": _val_accuracy(source)}
        for key, value in note.items():
            run.client.set_model_version_tag(REGISTERED_MODEL, version, key, value)
    run.client.set_registered_model_alias(REGISTERED_MODEL, ALIAS, version)
    sentence = (
        f"{REGISTERED_MODEL} version {version} is the {ALIAS}: {tags['model']}, "
        f"{_val_accuracy(source)} on val of {tags['dataset_title']}"
    )
    run.name(f"promote {tags['model']} to {ALIAS}")
    run.tags({"model": tags["model"], "model_uri": tags["model_uri"], "model_version": version})
    run.describe(f"{sentence}; from run `{source.info.run_id}`")
    return sentence


def _val_accuracy(source: RunEntity) -> str:
    return f"{source.data.metrics['val_accuracy']:.4f}"


def _version(client: Any, model_uri: str) -> str | None:
    """The version under which this very model is registered already."""
    for version in client.search_model_versions(f"name = '{REGISTERED_MODEL}'"):
        if version.tags.get("model_uri") == model_uri:
            return str(version.version)
    return None


def main(argv: Sequence[str]) -> None:
    options = cli.parse_all("promote", argv, OPTIONS)
    with tracking.start("promote") as run:
        sentence = promote(run, find(run.client, options["run_id"]))
    print(sentence)
    print(
        f"serve it: mlflow models serve -m models:/{REGISTERED_MODEL}@{ALIAS} --env-manager local"
    )


if __name__ == "__main__":
    cli.run(main)
