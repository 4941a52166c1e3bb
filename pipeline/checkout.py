"""The project's code as it was at a commit, beside the code that runs."""

import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlflow
from mlflow.entities import Run as RunEntity
from mlflow.projects.utils import load_project

from pipeline import tracking
from pipeline.spec import UserError

PROJECT = Path(__file__).parent.parent
SCRATCH = ".reproduce-"


@contextmanager
def checkout(commit: str, data_dir: Path) -> Iterator[tuple[Path, Path]]:
    """The project at ``commit``, and a folder for what it makes; both removed whatever happens.

    They lie in ``data_dir``, where prepared letters do: a folder for temporary files may be small.
    """
    check(commit)
    with _scratch(data_dir.absolute()) as scratch:
        code = scratch / "code"
        try:
            added = _git("worktree", "add", "--detach", str(code), commit)
            if added.returncode:
                raise UserError(
                    f"the code of commit {commit[:8]} must be checked out, but `git worktree add` "
                    f"said {_last_words(added)!r}: mend that in {PROJECT}"
                )
            # The project may be a folder of a repository that holds more.
            yield code / _git("rev-parse", "--show-prefix").stdout.strip(), scratch / "data"
        finally:
            _remove(code)


def check(commit: str) -> None:
    """Refuse a commit that this repository does not have."""
    if commit == "none":
        raise UserError(
            "the run must have recorded the commit of its code, but it was made where git knew of "
            "none: clone the project with git, and train there what is to be reproduced"
        )
    inside = _git("rev-parse", "--is-shallow-repository")
    if inside.returncode:
        raise UserError(
            f"the code of commit {commit[:8]} must come from a git repository, but in {PROJECT} "
            f"git said {_last_words(inside)!r}: clone the project with git, and reproduce there"
        )
    if _git("cat-file", "-e", f"{commit}^{{commit}}").returncode:
        shallow = inside.stdout.strip() == "true"
        cure = "git fetch --unshallow" if shallow else "git fetch"
        kind = "a shallow clone, which does not have it" if shallow else "a clone without it"
        raise UserError(
            f"the run's commit {commit[:8]} must be in the git repository, but {PROJECT} is "
            f"{kind}: run `{cure}` there, or fetch from the clone where the run was made"
        )


def step_of(
    code: Path, origin: str, run: tracking.Run, entry_point: str, parameters: Mapping[str, str]
) -> RunEntity:
    """Run a step of the code in the folder ``code`` to its end, in a child run; gives that.

    ``origin`` names the code in an error. Its own MLproject has the command, and the defaults of
    what is not given.
    """
    child = tracking.create(run.client, entry_point, run)
    child.write(params=parameters)
    project: Any = load_project(str(code))  # type: ignore[no-untyped-call]
    command = project.get_entry_point(entry_point).compute_command(dict(parameters), None)
    variables = {
        "MLFLOW_TRACKING_URI": mlflow.get_tracking_uri(),
        "MLFLOW_EXPERIMENT_ID": run.experiment_id,
        "MLFLOW_RUN_ID": child.id,  # which the step adopts, as that of `mlflow run`
        # Modules come from there alone, and paths still mean what they mean here.
        "PYTHONPATH": str(code),
        "PYTHONSAFEPATH": "1",
    }
    status = "KILLED"
    try:
        # Ends the process where this one is interrupted.
        done = subprocess.run(
            [sys.executable, *shlex.split(command)[1:]], env=os.environ | variables, check=False
        )
        status = "FAILED"
    finally:
        if run.client.get_run(child.id).info.status == "RUNNING":
            child.close(status)
    if done.returncode:
        raise UserError(
            f"{entry_point} of {origin} must succeed in this environment, but it ended with exit "
            f"code {done.returncode}: its own message is above, and so is what has changed"
        )
    return run.client.get_run(child.id)


@contextmanager
def _scratch(data_dir: Path) -> Iterator[Path]:
    """A folder that is removed whatever happens; one that a kill has left is, after a day."""
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        for left in data_dir.glob(f"{SCRATCH}*"):
            if time.time() - left.stat().st_mtime > 24 * 3600:
                _remove(left / "code")
                shutil.rmtree(left, ignore_errors=True)
        folder = tempfile.TemporaryDirectory(prefix=SCRATCH, dir=data_dir)
    except OSError as error:
        raise UserError(
            f"reproduce must be able to write to its folder, but {str(data_dir)!r} answered "
            f"'{error.strerror}': make room or pass -P data_dir=FOLDER"
        ) from error
    with folder as scratch:
        yield Path(scratch)


def _remove(code: Path) -> None:
    """Remove a checkout, if there is one in the folder ``code``."""
    _git("worktree", "remove", "--force", str(code))


def _git(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = ["git", "-C", str(PROJECT), *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise UserError(
            "reproduce needs git to check out a run's code, but there is no command git: install it"
        ) from error


def _last_words(done: subprocess.CompletedProcess[str]) -> str:
    return (done.stderr.strip().splitlines() or ["nothing"])[-1]
