"""What every run records, said once; the only place that writes runs.

Runs are written through ``MlflowClient`` with explicit run ids, never through the fluent API, so
that several runs can be open at once.
"""

import functools
import importlib.metadata
import json
import logging
import os
import platform
import re
import shutil
import subprocess
import tempfile
import time
import traceback
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import parse_qs, urlsplit

import mlflow
import numpy as np
import pandas as pd
import requests
from mlflow.entities import Dataset as DatasetEntity
from mlflow.entities import (
    DatasetInput,
    InputTag,
    LoggedModelOutput,
    LoggedModelStatus,
    Metric,
    Param,
    RunTag,
)
from mlflow.entities import Run as RunEntity
from mlflow.models import Model, ModelSignature
from mlflow.types.schema import Schema, TensorSpec
from mlflow.utils import requirements_utils
from requests.adapters import HTTPAdapter
from urllib3.util import Retry

from pipeline import disk, owner, quiet, served_letters, views
from pipeline.bill import charge
from pipeline.spec import LETTERS, SIDE, Dataset, Fitted, Images, UserError

if TYPE_CHECKING:  # trials write runs too, and draw nothing
    from matplotlib.figure import Figure

STORES = ("http", "https", "sqlite", "postgresql", "mysql", "mssql")  # what MLflow writes to
BUSY = (429, 500, 502, 503, 504)  # what a server answers that may do better soon
LONGEST_NAME = 250  # characters of a run's name; a database may refuse more
PATIENCE = 5  # times that it is asked again, after 0, 2, 4, 8 and 16 seconds
ATTEMPTS = 5  # to log a model with a server that breaks down
CPUINFO = Path("/proc/cpuinfo")
# There: what it calls the numbers that tell processors of one name apart.
CPU_NUMBERS = {"family": "cpu family", "model": "model"}
BROKEN_OFF = "IncompleteRead"  # in what requests says of half an answer
REQUEST = "request"  # tag: what tells one run that was asked for twice from two runs
NOTE = "mlflow.note.content"  # the tag that the MLflow UI shows as description
# Unnamed: MLflow would hand named tensors on as a dict.
SIGNATURE = ModelSignature(
    inputs=Schema([TensorSpec(np.dtype(np.uint8), (-1, SIDE, SIDE))]),
    outputs=Schema([TensorSpec(np.dtype(np.float32), (-1, len(LETTERS)))]),
)


class Point(NamedTuple):
    """Metrics of one step, and when they were measured (seconds since 1970).

    With a ``model_uri`` they are that model's, as well as the run's.
    """

    step: int
    time: float
    values: Mapping[str, float]
    model_uri: str | None = None


class LoggedModel(NamedTuple):
    """A model in the tracking store: its ``models:/`` address, its megabytes (10^6 bytes)."""

    uri: str
    mb: float


def _again(call: Callable[..., Any], *given: Any, **named: Any) -> Any:
    """Call a server, and once more where it died in the midst of its answer.

    MLflow asks again in other cases, but not then. What was written already is not written twice;
    a run that was made twice, as where MLflow itself asks again, is deleted later.
    """
    try:
        return call(*given, **named)
    except mlflow.MlflowException as error:
        if BROKEN_OFF not in str(error):
            raise
        return call(*given, **named)


@dataclass(frozen=True)
class Run:
    """One open MLflow run."""

    client: mlflow.MlflowClient
    id: str
    experiment_id: str

    @charge("tracking")
    def name(self, name: str) -> None:
        if len(name) > LONGEST_NAME:
            name = f"{name[: LONGEST_NAME - 1]}…"
        _again(self.client.update_run, self.id, name=name)

    def describe(self, markdown: str) -> None:
        """Set the description, which the MLflow UI shows on the run's page."""
        self.tags({NOTE: markdown})

    @charge("tracking")
    def write(
        self,
        points: Sequence[Point] = (),
        params: Mapping[str, Any] | None = None,
        tags: Mapping[str, Any] | None = None,
    ) -> None:
        """Log metrics of several steps, params and tags in one write."""
        batch: dict[str, Any] = {
            "metrics": [
                Metric(
                    key,
                    float(value),
                    int(point.time * 1000),
                    point.step,
                    model_id=point.model_uri and _model_id(point.model_uri),
                )
                for point in points
                for key, value in point.values.items()
            ],
            "params": [Param(key, str(value)) for key, value in (params or {}).items()],
            "tags": [RunTag(key, str(value)) for key, value in (tags or {}).items()],
        }
        _again(self.client.log_batch, self.id, **batch)

    def tags(self, tags: Mapping[str, Any]) -> None:
        self.write(tags=tags)

    def params(self, params: Mapping[str, Any]) -> None:
        """Log params, but for those that ``mlflow run`` has logged before us as they were typed."""
        there = _again(self.client.get_run, self.id).data.params
        self.write(params={key: value for key, value in params.items() if key not in there})

    def metrics(self, metrics: Mapping[str, float], step: int = 0) -> None:
        self.write([Point(step, time.time(), metrics)])

    @charge("tracking")
    def close(self, status: str) -> None:
        _again(self.client.set_terminated, self.id, status)

    @charge("tracking")
    def delete(self) -> None:
        self.client.delete_run(self.id)

    @charge("tracking")
    def figure(self, name: str, figure: "Figure") -> None:
        self.client.log_figure(self.id, figure, name, save_kwargs={"dpi": 110})

    @charge("tracking")
    def json(self, name: str, value: Mapping[str, Any]) -> None:
        self.client.log_dict(self.id, dict(value), name)

    @charge("tracking")
    def csv(self, name: str, frame: pd.DataFrame) -> None:
        self.client.log_text(self.id, frame.to_csv(index=False), name)

    @charge("tracking")
    def read_csv(self, run_id: str, name: str) -> pd.DataFrame | None:
        """A table that some run has logged; None where it has not."""
        if name not in {item.path for item in self.client.list_artifacts(run_id)}:
            return None
        with tempfile.TemporaryDirectory() as folder:
            path = self.client.download_artifacts(run_id, name, folder)
            return pd.read_csv(path, keep_default_na=False, na_values=[""])

    @charge("tracking")
    def text(self, name: str, text: str) -> None:
        self.client.log_text(self.id, text, name)

    @charge("tracking")
    def file(self, path: Path, folder: str) -> None:
        self.client.log_artifact(self.id, str(path), folder)

    def use_dataset(self, data: Dataset, part: str | None = None) -> None:
        """Record the data set as the run's input, with the digest of all its content."""
        self.input(data, part)
        self.tags(dataset_tags(data))

    @charge("tracking")
    def input(self, data: Dataset, part: str | None) -> None:
        entity = DatasetEntity(
            name=data.name,
            digest=data.digest,  # MLflow's own digest of an array sees a few images only
            source_type="local",
            source=json.dumps({"uri": str(data.root)}),
            profile=json.dumps(data.facts["counts"]),
        )
        context = [InputTag("mlflow.data.context", part)] if part else []
        inputs = [DatasetInput(entity, context)]
        try:
            self.client.log_inputs(self.id, inputs)
        except mlflow.MlflowException:  # another process noted the same new data set meanwhile
            self.client.log_inputs(self.id, inputs)

    @charge("tracking")
    def log_model(self, fitted: Fitted, example: Images, step: int) -> LoggedModel:
        """Log a model, once, though MLflow asks again where a server's answer was lost.

        The server then makes a second model, and the first stays PENDING; or it refuses to note
        twice whose output a model is, and the model has FAILED.
        """
        for _ in range(ATTEMPTS - 1):
            try:
                model = self._log_model(fitted, example, step)
                break
            except mlflow.MlflowException:
                if not self._drop_half_made():
                    raise
        else:
            model = self._log_model(fitted, example, step)
        self._drop_half_made()
        return model

    def _drop_half_made(self) -> int:
        """Delete the models of this run that are not whole; gives how many there were."""
        if not mlflow.get_tracking_uri().startswith("http"):
            return 0  # no answer is lost where there is no server
        mine = f"source_run_id = '{self.id}'"
        found = _again(self.client.search_logged_models, [self.experiment_id], mine)
        half_made = [one for one in found if one.status != LoggedModelStatus.READY]
        for one in half_made:
            self.client.delete_logged_model(one.model_id)
        return len(half_made)

    def _log_model(self, fitted: Fitted, example: Images, step: int) -> LoggedModel:
        """Log a model with signature and pinned requirements.

        Requirements are given, since MLflow would import the model anew in a process of its own to
        infer them: 5 to 8 CPU-seconds, against 0.1.
        """

        # It says for each model that it validates the example, on a line of its own.
        logging.getLogger("mlflow.pyfunc").setLevel(logging.WARNING)
        sizes: list[int] = []  # bytes

        class Flavor:
            """What ``Model.log`` wants of a flavour, less the option that flavours refuse."""

            @staticmethod
            def save_model(validate_serving_input: bool, **arguments: Any) -> None:
                fitted.save_model(**arguments)
                _guard(Path(arguments["path"]), arguments["mlflow_model"])
                sizes.append(arguments["mlflow_model"].model_size_bytes or 0)

        info = Model.log(
            artifact_path=None,
            name="model",
            flavor=Flavor,
            run_id=self.id,
            step=step,
            signature=SIGNATURE,
            input_example=example,
            validate_serving_input=False,  # it would load the model anew, at each trial's cost
            pip_requirements=requirements(fitted.requirements),
        )
        return LoggedModel(str(info.model_uri), sum(sizes) / 1e6)

    @charge("tracking")
    def link_model(self, model_uri: str) -> None:
        """Show a model that another run logged as an output of this one too."""
        model_id = _model_id(model_uri)
        if model_id not in self._outputs():  # else MLflow would refuse it
            try:
                self.client.log_outputs(self.id, [LoggedModelOutput(model_id, step=0)])
            except mlflow.MlflowException:  # the answer was lost, and MLflow has asked again
                if model_id not in self._outputs():
                    raise
        self.tags({"model_uri": model_uri})

    def _outputs(self) -> list[str]:
        """Ids of the models that are this run's."""
        outputs = _again(self.client.get_run, self.id).outputs
        return [one.model_id for one in outputs.model_outputs] if outputs else []


@contextmanager
def start(
    step: str, parent: Run | None = None, adopt: bool = True, again: RunEntity | None = None
) -> Iterator[Run]:
    """Open a run for one step and close it whatever happens: none is left RUNNING.

    FINISHED where the block ends, KILLED where it is interrupted, FAILED, with the error as tag and
    the traceback as artifact, where it raises. The run that ``mlflow run`` made is adopted; or the
    run ``again``, which an earlier process left, is opened once more.
    """
    client = connect() if parent is None else parent.client
    given = os.environ.pop("MLFLOW_RUN_ID", None) if parent is None and adopt else None
    if again:
        run = Run(client, again.info.run_id, again.info.experiment_id)
        client.update_run(run.id, status="RUNNING")
    elif given:
        run = Run(client, given, client.get_run(given).info.experiment_id)
    else:
        run = create(client, step, parent, tags={REQUEST: uuid.uuid4().hex})
    if parent is None:
        reconcile(run)
    status = "KILLED"
    try:
        run.tags({"step": step, "process": owner.me()} | environment_tags())
        if parent is None:
            show(run)
        yield run
        status = "FINISHED"
    except Exception as error:
        status = "FAILED"
        run.tags({"error": f"{type(error).__name__}: {error}"[:500]})
        run.text("traceback.txt", traceback.format_exc())
        raise
    finally:
        run.close(status)


@charge("tracking")
def reconcile(run: Run) -> None:
    """Close the runs that processes of this machine left RUNNING when they were killed.

    Delete that which a server made, and whose answer was lost, so that it was asked for another.
    """
    left = run.client.search_runs(
        [run.experiment_id],
        f"attributes.status = 'RUNNING' and tags.process LIKE '{owner.machine()} %'",
    )
    request = {other.info.run_id: other.data.tags.get(REQUEST) for other in left}
    for other in left:
        if other.info.run_id == run.id:
            continue
        if request.get(run.id) and request[run.id] == request[other.info.run_id]:
            run.client.delete_run(other.info.run_id)
        elif owner.is_dead(other.data.tags["process"]):
            run.client.set_terminated(other.info.run_id, "KILLED")


@charge("tracking")
def show(run: Run) -> None:
    """Give the run's experiment its views, and a description where it has none."""
    there = run.client.get_experiment(run.experiment_id).tags
    wanted = views.tags()
    if NOTE not in there:
        wanted[NOTE] = views.DESCRIPTION
    for key, value in wanted.items():
        if there.get(key) != value:
            try:
                run.client.set_experiment_tag(run.experiment_id, key, value)
            except mlflow.MlflowException:  # another process was faster
                if key not in run.client.get_experiment(run.experiment_id).tags:
                    raise


@charge("tracking")
def create(
    client: mlflow.MlflowClient,
    step: str,
    parent: Run | None,
    name: str = "",
    tags: Mapping[str, Any] | None = None,
) -> Run:
    """A new run, which the caller closes."""
    home = parent.experiment_id if parent else experiment_id(client)
    texts = {key: str(value) for key, value in (tags or {}).items()}
    texts |= {"mlflow.parentRunId": parent.id} if parent else {}
    texts |= {"step": step, "mlflow.source.name": step, "mlflow.source.type": "LOCAL"}
    texts |= {"process": owner.me()}
    entity = _again(client.create_run, home, tags=texts, run_name=name or step)
    return Run(client, entity.info.run_id, entity.info.experiment_id)


@charge("tracking")
def connect() -> mlflow.MlflowClient:
    """A client of the tracking store; one sentence where a server does not answer or let us in."""
    uri = mlflow.get_tracking_uri()
    _check(uri)
    if uri.startswith("http"):
        _wait_for(uri)
        client = mlflow.MlflowClient()
        _knock(client, uri)
        return client
    # Two processes that make one store at once break it: MLflow has no lock for that.
    folder = Path(uri.removeprefix("sqlite:///")).parent if uri.startswith("sqlite") else Path()
    with disk.locked(folder if folder.is_dir() else Path()):
        client = mlflow.MlflowClient()
        experiment_id(client)
    return client


def _check(uri: str) -> None:
    """One sentence for what is neither a server nor a database, where MLflow has a traceback.

    A URI is shown in messages and by MLflow itself: a password in it would be too.
    """
    rule = f"MLFLOW_TRACKING_URI must be an address that begins with one of {', '.join(STORES)}"
    cure = "set it to a server's address or a database's such as sqlite:///mlflow.db, or unset it"
    try:
        place = urlsplit(uri)
    except ValueError as error:
        raise UserError(f"{rule}, but what came is none ({error}): {cure}") from None
    query = [name.lower() for name in parse_qs(place.query)]
    # One with a / in it is no password to urllib, but is shown all the same.
    hidden = place.scheme != "sqlite" and re.match(r"[^:]+://[^@/]*:(?!\d+/)[^@]*@", uri)
    if place.password or hidden or any("password" in name for name in query):
        raise UserError(
            "MLFLOW_TRACKING_URI must hold no password, but one came in it: take it out, and pass "
            "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD for a server, PGPASSFILE for a "
            "database"
        )
    if place.scheme.split("+")[0] not in STORES:
        raise UserError(f"{rule}, but {uri!r} came: {cure}")


def _wait_for(uri: str) -> None:
    """See that a server is there; one that is starting or overrun has half a minute to come."""
    # MLflow itself would retry for minutes before it says so.
    patience = Retry(
        total=PATIENCE,
        connect=0,
        read=0,
        backoff_factor=1,
        status_forcelist=BUSY,
        raise_on_status=False,
    )
    with requests.Session() as session:
        for scheme in ("http://", "https://"):
            session.mount(scheme, HTTPAdapter(max_retries=patience))
        try:
            session.get(f"{uri.rstrip('/')}/health", timeout=30).raise_for_status()
        except requests.RequestException as error:
            gave = type(error).__name__ if error.response is None else error.response.status_code
            raise UserError(
                f"the tracking server must answer, but {uri} gave {gave}: "
                "start it, correct MLFLOW_TRACKING_URI, or unset it to track in ./mlflow.db"
            ) from error


def _knock(client: mlflow.MlflowClient, uri: str) -> None:
    """See that the server lets us in, which it does not ask for its health."""
    try:
        client.search_experiments(max_results=1)
    except mlflow.MlflowException as error:
        status = error.get_http_status_code()  # type: ignore[no-untyped-call]
        if status not in (401, 403):
            raise
        name = os.environ.get("MLFLOW_TRACKING_USERNAME")
        raise UserError(
            "the tracking server must know who asks, but "
            f"{uri} does not let {repr(name) if name else 'the nameless'} in: set "
            "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD as its administrator gave them"
        ) from error


def experiment_id(client: mlflow.MlflowClient) -> str:
    """The experiment that ``mlflow run`` would use: by id, by name, else the default one."""
    if given := os.environ.get("MLFLOW_EXPERIMENT_ID"):
        return given
    name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "Default")
    if found := client.get_experiment_by_name(name):
        return str(found.experiment_id)
    try:
        return str(client.create_experiment(name))
    except mlflow.MlflowException:  # another process was faster
        if found := client.get_experiment_by_name(name):
            return str(found.experiment_id)
        raise


def dataset_tags(data: Dataset) -> dict[str, str]:
    """The data set of a run, to search runs by."""
    return {
        "dataset": data.name,
        "dataset_title": data.title,
        "dataset_digest": data.digest,
        "dataset_official": str(data.facts["official"]).lower(),
    }


@functools.cache
def environment_tags() -> dict[str, str]:
    """What a figure depends on beside params and data: code, versions, processor, threads."""
    libraries = ("tensorflow", "keras", "scikit-learn", "numpy", "mlflow", "optuna")
    versions = " ".join(f"{name}={version(name)}" for name in libraries)
    return {
        "git_commit": _git("rev-parse", "HEAD") or "none",
        "git_dirty": str(bool(_git("status", "--porcelain"))).lower(),
        "versions": f"python={platform.python_version()} {versions}",
        "cpu_model": cpu_model(),
        "threads": "1",
        "precision": "float32",
    }


def version(name: str) -> str:
    """Installed version of a distribution."""
    return importlib.metadata.version(_distribution(name))


def requirements(names: Sequence[str]) -> list[str]:
    """Exact pip requirements of these distributions, as installed, which is as locked."""
    return [f"{_distribution(name)}=={version(name)}" for name in names]


def know_packages() -> None:
    """Have MLflow look through all that is installed, as it does when it first logs a model."""
    requirements_utils.warn_dependency_requirement_mismatches(requirements(["numpy"]))


def get_run(client: mlflow.MlflowClient, run_id: str) -> RunEntity:
    """The run with this id; an unknown id is a ``UserError``."""
    try:
        return client.get_run(run_id)
    except mlflow.MlflowException as error:
        raise UserError(
            f"run_id must name a run of the tracking store, but {run_id!r} came: "
            "copy the id from the run's page in the MLflow UI"
        ) from error


def latest_runs(client: mlflow.MlflowClient, step: str, **tags: str) -> list[RunEntity]:
    """Finished runs of a step with these tags, first the one that ended last.

    One that was interrupted, and opened once more, has the start that it had.
    """
    conditions = [f"tags.{key} = '{value}'" for key, value in {"step": step, **tags}.items()]
    return list(
        client.search_runs(
            [experiment_id(client)],
            " and ".join(["attributes.status = 'FINISHED'", *conditions]),
            order_by=["attributes.end_time DESC"],
        )
    )


def latest_sweeps(client: mlflow.MlflowClient, digest: str) -> dict[str, RunEntity]:
    """The latest finished sweep of each model on one data set, ``latest`` being the last one's."""
    if digest == "latest":
        runs = latest_runs(client, "sweep")
        digest = runs[0].data.tags["dataset_digest"] if runs else digest
    runs = latest_runs(client, "sweep", dataset_digest=digest)
    if not runs:
        raise UserError(
            f"a finished sweep is needed first, but none on data set {digest!r} was found: "
            "run `mlflow run . -e sweep -P model=knn`"
        )
    return {run.data.tags["model"]: run for run in reversed(runs)}


@contextmanager
def readable(rule: str, cure: str) -> Iterator[None]:
    """A model that is not to be had is a sentence: ``rule``, with its address, and ``cure``."""
    try:
        yield
    except (mlflow.MlflowException, OSError, requests.RequestException) as error:
        if disk.is_full(error):  # which every step says in its own way
            raise
        raise UserError(f"{rule} gave: {str(error).partition(chr(10))[0]}: {cure}") from error


def load_model(model_uri: str) -> Any:
    """A logged model as MLflow's pyfunc: letters (n, 28, 28) in, probabilities (n, 26) out."""
    if "keras" in Model.load(model_uri).flavors:
        quiet.import_keras()
    return mlflow.pyfunc.load_model(model_uri)


def model_mb(model_uri: str) -> float:
    """Megabytes (10^6 bytes) of the files of a model that was logged before."""
    size = Model.load(model_uri).model_size_bytes or 0
    return float(size / 1e6)


def markdown(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A markdown table, padded so that it reads well in a terminal too."""
    cells = [[str(cell) for cell in row] for row in [columns, *rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(columns))]
    lines = [
        " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) for row in cells
    ]
    rule = " | ".join("-" * width for width in widths)
    return "\n".join(f"| {line} |" for line in [lines[0], rule, *lines[1:]])


def ui_hint(experiment: str) -> str:
    """How to look at the runs."""
    return f"look at the runs: {_ui()}{views.address(experiment)}"


def artifact_hint(run: Run, name: str) -> str:
    """Where the MLflow UI shows an artifact of a run."""
    return f"{_ui()}/#/experiments/{run.experiment_id}/runs/{run.id}/artifacts/{name}"


def _ui() -> str:
    """Where the MLflow UI is: the tracking server's, else one that is still to be started."""
    uri = mlflow.get_tracking_uri()
    if uri.startswith(("http://", "https://")):
        return uri.rstrip("/")
    return "`mlflow ui`, then http://127.0.0.1:5000"


def _guard(folder: Path, model: Model) -> None:
    """Have a saved model loaded by ``served_letters``, a copy of which goes with it."""
    flavor = model.flavors["python_function"]
    code = folder / (flavor.get("code") or "code")
    code.mkdir(exist_ok=True)
    shutil.copy(served_letters.__file__, code)
    flavor[served_letters.INNER] = flavor["loader_module"]
    flavor |= {"loader_module": served_letters.__name__.rpartition(".")[2], "code": code.name}
    model.save(str(folder / "MLmodel"))


def _model_id(model_uri: str) -> str:
    return model_uri.removeprefix("models:/")


def _distribution(name: str) -> str:
    """TensorFlow is installed as its CPU build where there is one."""
    if name != "tensorflow":
        return name
    try:
        importlib.metadata.distribution("tensorflow-cpu")
    except importlib.metadata.PackageNotFoundError:
        return name
    return "tensorflow-cpu"


def _git(*arguments: str) -> str:
    """Output of a git command in the project's folder; empty where there is no repository."""
    command = ["git", "-C", str(Path(__file__).parent), *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def cpu_model() -> str:
    """The processor's name, and numbers that tell it from others of that name.

    A virtual machine may call all of a maker's by one name, such as AMD EPYC.
    """
    cpuinfo = CPUINFO.read_text() if CPUINFO.exists() else ""
    first = [line.partition(":") for line in cpuinfo.partition("\n\n")[0].splitlines()]
    facts = {name.strip(): value.strip() for name, _, value in first}
    name = facts.get("model name") or platform.processor() or platform.machine()
    numbers = [f"{what} {facts[key]}" for what, key in CPU_NUMBERS.items() if key in facts]
    return f"{name} ({', '.join(numbers)})" if numbers else name
