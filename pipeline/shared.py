"""The letters of a sweep whose trials run on other machines: fetched once, checked by SHA-256.

The driver keeps ``train`` and ``val`` as artifacts of the tracking server, once for each data set.
A worker takes them from the driver's own folder where it sees that (a shared disk), else from its
cache, else from the server. ``gate`` and ``test`` stay where they are: no trial reads them.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlflow
from platformdirs import user_cache_path

from pipeline import disk, tracking
from pipeline.bill import charge
from pipeline.spec import Dataset, UserError

ARRAYS = ("train_images", "train_labels", "val_images", "val_labels")
_FOLDER = "letters"  # of the run's artifacts


@charge("data")
def publish(client: mlflow.MlflowClient, data: Dataset) -> dict[str, Any]:
    """Where workers find a data set, as JSON; kept on the tracking server unless it is there.

    Raises:
        UserError: the tracking store is no server, so that no other machine can reach it.
    """
    uri = mlflow.get_tracking_uri()
    if not uri.startswith(("http://", "https://")):
        raise UserError(
            "a cluster's workers must reach the tracking server, but MLFLOW_TRACKING_URI is "
            f"{uri!r}: start `mlflow server` and set MLFLOW_TRACKING_URI=http://HOST:PORT"
        )
    condition = (
        f"tags.step = 'publish' and tags.dataset_digest = '{data.digest}' "
        "and attributes.status = 'FINISHED'"
    )
    home = tracking.experiment_id(client)
    found = client.search_runs([home], condition, max_results=1)
    run_id = found[0].info.run_id if found else _publish(data)
    return {"root": str(data.root.absolute()), "run_id": run_id, "facts": dict(data.facts)}


def _publish(data: Dataset) -> str:
    with tracking.start("publish", adopt=False) as run:
        run.name(f"letters · {data.name}")
        run.use_dataset(data)
        run.describe(f"**{data.title}**, digest `{data.digest}`: train and val, for the cluster")
        for name in ARRAYS:
            run.file(data.root / f"{name}.npy", _FOLDER)
    return run.id


@charge("data")
def fetch(letters: Mapping[str, Any]) -> Dataset:
    """The data set that ``publish`` told of, on this machine.

    Raises:
        UserError: what the server sent is not what the driver prepared.
    """
    facts = letters["facts"]
    there = Path(letters["root"])
    if _holds(there, facts):
        return Dataset(there, facts)
    cache = Path(os.environ.get("LETTERS_CACHE") or user_cache_path("letters")).expanduser()
    root = cache / "shared" / f"{facts['name']}-{facts['digest']}"
    if not _holds(root, facts):
        root.parent.mkdir(parents=True, exist_ok=True)
        with disk.locked(root.parent):  # a second trial waits, then finds all done
            if not _holds(root, facts):
                _download(letters, root)
    return Dataset(root, facts)


def _holds(root: Path, facts: Mapping[str, Any]) -> bool:
    """Whether a folder has the arrays, with the digests that they must have."""
    paths = {name: root / f"{name}.npy" for name in ARRAYS}
    return all(path.is_file() for path in paths.values()) and all(
        _sha256(path) == facts["sha256"][name] for name, path in paths.items()
    )


def _download(letters: Mapping[str, Any], root: Path) -> None:
    """Fetch beside the folder's final place, check, then move there in one step."""
    facts = letters["facts"]
    scratch = Path(tempfile.mkdtemp(prefix=".fetch-", dir=root.parent))
    try:
        client = mlflow.MlflowClient()
        client.download_artifacts(letters["run_id"], _FOLDER, str(scratch))
        found = scratch / _FOLDER
        if not _holds(found, facts):
            raise UserError(
                f"the letters on the tracking server must have the digest {facts['digest']} that "
                f"the driver prepared, but those of run {letters['run_id']} differ: delete that "
                "run, so that the next sweep keeps them anew"
            )
        (found / "dataset.json").write_text(json.dumps(facts, indent=2) + "\n")
        shutil.rmtree(root, ignore_errors=True)  # what is there is not what it must be
        os.replace(found, root)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
