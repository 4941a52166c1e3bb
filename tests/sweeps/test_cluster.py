"""Trials on a real Dask cluster of processes on this machine, at a real MLflow server."""

import datetime
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlflow
import pytest
from servers import Server, faulty
from steps import SWEEP, alive, arguments, runs, toy, wait
from stores import N_TRAIN, ROOT, members, open_store

from pipeline import models, prep, shared
from pipeline.spec import UserError
from sweeps import cluster, host, processes, sweep
from sweeps.budget import Ledger
from sweeps.sweep import scheduler

Workers = pytest.importorskip(
    "benchmarks.workers", reason="needs Dask: pip install -r sweeps/requirements.txt"
).Workers

# A quarter of a CPU-second a step; a test can hold trials in the midst of it.
BURN = """end = time.process_time() + 0.25
        while time.process_time() < end: pass
        while os.path.exists(os.environ["HOLD"]): time.sleep(0.01)"""


class Site:
    """A tracking server, a cluster, and someone who types sweeps."""

    def __init__(self, store: mlflow.MlflowClient, folder: Path, archive: Path) -> None:
        self.store, self.folder, self.archive = store, folder, archive
        self.workers: Any = None
        self.hold = folder / "hold"

    def held(self, name: str) -> int:
        """Wait for a trial of a worker, which waits in its first step; its process."""
        seen: list[int] = []

        def lasts() -> bool:
            seen[:] = self.workers.trials(name)
            time.sleep(2 * host.BEAT_SECONDS)  # so that it has told of itself
            return bool(seen) and seen == self.workers.trials(name)

        assert wait(lasts, 120)
        return seen[0]

    def options(self, model: str = "toy", **more: object) -> list[str]:
        data = {"dataset": "emnist_letters", "archive": self.archive, "n_train": N_TRAIN}
        data |= {"data_dir": self.folder / "data"}
        more = {"scheduler": self.workers.address, "cpu_minutes": 10, "workers": "auto"} | more
        return arguments(data | SWEEP | {"model": model} | more)

    def type(
        self, n_trials: int, environment: Mapping[str, str] = os.environ
    ) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            [sys.executable, "-c", "import drivers; drivers.step()", *self.options()],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**environment, "N_TRIALS": str(n_trials)},
        )

    def sweep(self) -> Any:
        """The latest finished sweep's run."""
        return [run for run in runs(self.store, "sweep") if run.info.status == "FINISHED"][-1]

    def trials(self, parent: Any) -> dict[int, Any]:
        """A sweep's child runs by number; a number twice fails."""
        study = f"tags.step = 'trial' and tags.study = '{parent.data.tags['study']}'"
        found = self.store.search_runs(["0"], study)
        numbers = [int(run.data.tags["trial"]) for run in found]
        assert sorted(numbers) == list(range(len(numbers)))
        return dict(sorted(zip(numbers, found, strict=True)))

    def ledger(self, parent: Any, kind: str) -> list[dict[str, Any]]:
        path = self.folder / "data" / "studies" / parent.data.tags["study"] / "ledger.jsonl"
        records = map(json.loads, path.read_text().splitlines())
        return [record for record in records if record["kind"] == kind]


@pytest.fixture(scope="module")
def site(
    fresh_store: Path, archive: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Site]:
    """The server and the scheduler; each test brings workers of its own."""
    folder = tmp_path_factory.mktemp("site")
    with pytest.MonkeyPatch.context() as patch, members(folder, patch) as add:
        store = open_store(fresh_store, folder, patch)
        add(models, "toy", toy(before=BURN))
        patch.setenv("HOLD", str(folder / "hold"))
        with Server(store.tracking_uri) as server:
            patch.setenv("MLFLOW_TRACKING_URI", server.uri)
            site = Site(mlflow.MlflowClient(server.uri), folder, archive)
            site.workers = Workers(folder, os.environ)
            try:
                yield site
            finally:
                site.workers.stop()


@pytest.fixture
def names(site: Site, request: pytest.FixtureRequest) -> Iterator[list[str]]:
    """Two workers, ended with the test; of these a test may want fewer to run when it begins."""
    found = [f"{request.node.name}-{i}" for i in range(2)]
    for name in found[: getattr(request, "param", 2)]:
        site.workers.add(name)
    yield found
    site.hold.unlink(missing_ok=True)
    for name in list(site.workers.nannies):
        site.workers.remove(name)


def _end(driver: "subprocess.Popen[str]") -> str:
    text, _ = driver.communicate(timeout=240)
    assert driver.returncode == 0, text
    return text


def _kill_in_a_fit(site: Site, name: str) -> None:
    site.held(name)
    site.workers.kill(name)
    site.hold.unlink()


def test_a_worker_may_know_the_server_by_another_name(site: Site, names: list[str]) -> None:
    seen: list[str] = []

    def note(method: str, path: str, body: bytes) -> str:
        seen.append(f"{method} {path}")
        return ""

    with faulty(os.environ["MLFLOW_TRACKING_URI"], note) as other:
        _end(site.type(n_trials=2, environment={**os.environ, "MLFLOW_TRACKING_URI": other}))
    assert len(site.trials(site.sweep())) == 2
    # Law: the driver's name of it is the driver's alone; the workers log models under theirs.
    assert any("runs/create" in one for one in seen)
    assert not any("logged-models" in one for one in seen if one.startswith("POST"))


@pytest.mark.parametrize("names", [1], indirect=True)  # and none until its nanny starts another
def test_a_killed_worker_s_trial_is_billed_and_tried_once_more(
    site: Site, names: list[str]
) -> None:
    start_up = processes.cpu_seconds(site.workers.process(names[0]))
    site.hold.touch()
    driver = site.type(n_trials=8)
    killer = threading.Thread(target=_kill_in_a_fit, args=(site, names[0]))
    killer.start()
    spent = site.workers.used(driver, lambda _: None)
    killer.join()
    text = _end(driver)
    parent = site.sweep()
    trials = site.trials(parent)
    assert len(trials) == 8
    killed = [number for number, run in trials.items() if run.data.tags["state"] == "killed"]
    again = {
        int(run.data.tags["retry_of"]): run.data
        for run in trials.values()
        if "retry_of" in run.data.tags
    }
    assert len(killed) == 1, text
    assert list(again) == killed
    first, second = trials[killed[0]].data, again[killed[0]]
    assert trials[killed[0]].info.status == "KILLED"
    assert "died" in first.tags["error"]
    assert second.tags["state"] in ("complete", "pruned")
    assert {"quality", "steps", "seed"} < first.params.keys()
    assert second.params.items() >= first.params.items()
    # Every trial has one grant and one debit, whatever became of its worker.
    for kind in ("grant", "debit"):
        assert sorted(record["trial"] for record in site.ledger(parent, kind)) == list(trials)
    # The worker, and the one that the nanny has started anew.
    assert len({run.data.tags["worker"] for run in trials.values()}) == 2
    # The kernel's account of driver and workers, and the ledger's, which begins where a worker,
    # the new one too, has joined the cluster.
    billed = parent.data.metrics["cpu_seconds"]
    assert billed == pytest.approx(spent - start_up, rel=0.01, abs=2.0)
    # Letters are kept on the server once; nobody needs gate or test there.
    (kept,) = runs(site.store, "publish")
    files = {item.path for item in site.store.list_artifacts(kept.info.run_id, "letters")}
    assert files == {f"letters/{name}.npy" for name in shared.ARRAYS}


@pytest.mark.parametrize("names", [1], indirect=True)
def test_a_worker_that_comes_late_has_trials(site: Site, names: list[str]) -> None:
    site.hold.touch()
    driver = site.type(n_trials=6)
    site.held(names[0])
    site.workers.add(names[1])
    site.held(names[1])
    site.hold.unlink()
    _end(driver)
    trials = site.trials(site.sweep())
    assert len(trials) == 6
    assert {run.info.status for run in trials.values()} == {"FINISHED"}
    assert len({run.data.tags["worker"] for run in trials.values()}) == 2


def test_a_silent_worker_is_given_up_and_ends_its_trial_itself(
    site: Site, names: list[str]
) -> None:
    site.hold.touch()
    driver = site.type(n_trials=5)
    trial, worker = site.held(names[0]), site.workers.process(names[0])
    os.kill(worker, signal.SIGSTOP)
    try:
        assert wait(lambda: not alive(trial), 2 * host.SILENCE_SECONDS)
        site.hold.unlink()
        text = _end(driver)
    finally:
        os.kill(worker, signal.SIGCONT)
    parent = site.sweep()
    trials = site.trials(parent)
    lost = [run.data.tags for run in trials.values() if run.data.tags["state"] == "killed"]
    assert len(lost) == 1, text
    assert "was silent" in lost[0]["error"]
    debits = {record["trial"]: record for record in site.ledger(parent, "debit")}
    assert sorted(debits) == list(trials)
    # It is billed what it may have spent at most, since nobody saw.
    assert debits[int(lost[0]["trial"])]["cpu_seconds"] > host.SILENCE_SECONDS


def test_a_driver_that_dies_leaves_no_trial_and_its_sweep_is_continued(
    site: Site, names: list[str]
) -> None:
    before = site.workers.cpu_seconds()
    site.hold.touch()
    driver = site.type(n_trials=6)
    trial = site.held(names[0])
    driver.kill()
    driver.communicate()
    assert wait(lambda: not alive(trial), 2 * host.SILENCE_SECONDS)
    site.hold.unlink()
    n_sweeps = len(runs(site.store, "sweep"))
    text = _end(site.type(n_trials=6))
    assert "continuing" in text
    assert len(runs(site.store, "sweep")) == n_sweeps
    parent = site.sweep()
    assert len(site.trials(parent)) == 6
    assert parent.data.metrics["cpu_seconds"] > site.workers.cpu_seconds() - before


@pytest.mark.parametrize("names", [0], indirect=True)
def test_a_worker_with_other_code_is_refused(site: Site, names: list[str], tmp_path: Path) -> None:
    for package in ("pipeline", "sweeps"):
        shutil.copytree(ROOT / package, tmp_path / package)
    with (tmp_path / "sweeps" / "trial.py").open("a") as file:
        file.write("# another version\n")
    site.workers.add(names[0], PYTHONPATH=f"{tmp_path}{os.pathsep}{ROOT / 'tests'}")
    site.workers.add(names[1], PYTHONPATH="")  # has no code at all
    driver = site.type(n_trials=3)
    text, _ = driver.communicate(timeout=120)
    assert driver.returncode == 2
    assert re.search(r"has this project's code \w{12} where the driver has \w{12}", text)
    assert "No module named 'sweeps'" in text
    assert "error: every worker must have the driver's Python, packages and code" in text


def test_a_cluster_without_workers_or_at_a_wrong_address_is_refused(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "GATHER_SECONDS", 0.5)
    with pytest.raises(UserError, match=r"needs a worker, but tcp://.* had none"):
        cluster.Cluster(site.workers.address, "toys:body", [])
    monkeypatch.setattr(cluster, "CONNECT_SECONDS", 0.5)
    with pytest.raises(UserError, match="scheduler must be 'local' or the address"):
        cluster.Cluster("tcp://127.0.0.1:9", "toys:body", [])
    with pytest.raises(UserError, match="a plan is timed on this machine"):
        sweep.main(site.options("knn", plan="true"))


def test_who_is_there_is_what_the_scheduler_says_now() -> None:
    answers: list[Any] = [
        {"workers": {"a": {"nthreads": 2}}},
        OSError("reconnecting"),
        {"workers": {}},
    ]

    def sync(function: str, n_workers: int) -> Any:
        assert (function, n_workers) == ("identity", -1)
        if isinstance(answer := answers.pop(0), OSError):
            raise answer
        return answer

    driver: Any = SimpleNamespace(threads={}, good={"a"}, refused={}, checks={}, looked=0.0)
    driver.client = SimpleNamespace(scheduler=SimpleNamespace(identity="identity"), sync=sync)
    seen = []
    for _ in range(3):
        driver.looked = -cluster.LOOK_SECONDS
        cluster.Cluster._look(driver)
        seen.append(driver.threads)
    # Law: while the scheduler is sought nobody is dead.
    assert seen == [{"a": 2}, {"a": 2}, {}]
    driver.client.scheduler, driver.looked = None, -cluster.LOOK_SECONDS
    with pytest.raises(ConnectionError, match="the Dask scheduler is gone"):
        cluster.Cluster._look(driver)


@pytest.mark.parametrize("name", ["tensorflow-cpu", "keras"])
def test_a_worker_with_another_package_is_refused(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = name.removesuffix("-cpu")
    assert host.facts()[package]
    theirs = host.facts() | {package: "9.9"}
    ask: Future[Any] = Future()
    ask.set_result({"w": theirs})
    driver: Any = SimpleNamespace(good=set(), refused={})
    cluster.Cluster._judge(driver, "w", ask)
    assert f"has {package} 9.9 where the driver has {host.facts()[package]}" in driver.refused["w"]


def test_nobody_is_waited_for_by_who_was_interrupted() -> None:
    looks: list[int] = []
    driver: Any = SimpleNamespace(good=set(), threads={}, refused={}, live={}, address="tcp://x:1")
    driver.stop, driver._look = lambda: len(looks) == 2, lambda: looks.append(0)
    driver._gather = lambda: cluster.Cluster._gather(driver)
    assert cluster.Cluster.capacity(driver) == 0
    assert len(looks) == 2


def test_the_option_scheduler_is_checked() -> None:
    for good in ("local", "tcp://host:8786", "tls://10.0.0.1:8786"):
        assert scheduler("scheduler", good) == good
    for bad in ("dask", "host:8786", "tcp://host", "tcp://me:secret@host:8786", ""):
        with pytest.raises(UserError, match="scheduler must be 'local' or the address"):
            scheduler("scheduler", bad)


# ---- TLS


@pytest.fixture
def certificates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One certificate for scheduler, workers and driver, in Dask's configuration."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "letters")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    (tmp_path / "mine.pem").write_bytes(certificate.public_bytes(pem))
    private = serialization.PrivateFormat.PKCS8
    (tmp_path / "mine.key").write_bytes(
        key.private_bytes(pem, private, serialization.NoEncryption())
    )
    comm = "DASK_DISTRIBUTED__COMM__"
    monkeypatch.setenv(f"{comm}REQUIRE_ENCRYPTION", "true")
    monkeypatch.setenv(f"{comm}TLS__CA_FILE", str(tmp_path / "mine.pem"))
    for role in ("SCHEDULER", "WORKER", "CLIENT"):
        monkeypatch.setenv(f"{comm}TLS__{role}__CERT", str(tmp_path / "mine.pem"))
        monkeypatch.setenv(f"{comm}TLS__{role}__KEY", str(tmp_path / "mine.key"))


def test_a_cluster_with_tls_serves_who_has_a_certificate(
    site: Site, certificates: None, tmp_path: Path
) -> None:
    workers, plain = Workers(tmp_path, os.environ, tls=True), site.workers
    try:
        assert workers.address.startswith("tls://")
        workers.add("guarded")
        site.workers = workers
        _end(site.type(n_trials=3))
        assert len(site.trials(site.sweep())) == 3
        bare = {name: text for name, text in os.environ.items() if "__TLS__" not in name}
        stranger = site.type(n_trials=3, environment=bare)
        text, _ = stranger.communicate(timeout=120)
        assert stranger.returncode == 2
        assert "error: scheduler must be 'local' or the address of a Dask scheduler" in text
    finally:
        site.workers = plain
        workers.stop()


# ---- the letters, on the workers


@pytest.fixture
def published(
    server: Server,
    data_options: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> dict[str, Any]:
    """Letters on a tracking server, of a driver whose folder is out of reach."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    monkeypatch.setenv("LETTERS_CACHE", str(tmp_path / "cache"))
    data_options["data_dir"] = str(data_options["data_dir"])
    data_options["archive"] = str(data_options["archive"])
    data = prep.prepare(**data_options)
    client = mlflow.MlflowClient()
    found = shared.publish(client, data)
    assert shared.publish(client, data) == found  # not twice
    return found | {"root": str(tmp_path / "elsewhere")}


def test_letters_are_fetched_once_and_checked(
    published: dict[str, Any], data_options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = shared.fetch(published)
    real = prep.prepare(**data_options)
    for part in ("train", "val"):
        assert (data.part(part).images == real.part(part).images).all()
    assert not list(data.root.glob("gate*")) + list(data.root.glob("test*"))
    # A cache that has been changed is not used, but fetched anew.
    path = data.root / "train_images.npy"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert shared.fetch(published).root == data.root
    assert path.read_bytes() == whole
    # Then nothing is asked of the server.
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    assert shared.fetch(published).root == data.root
    assert [item.name for item in data.root.parent.iterdir()] == [data.root.name]


def test_trials_that_need_letters_at_once_fetch_them_once(
    published: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def download(client: mlflow.MlflowClient, run_id: str, *where: str) -> Any:
        asked.append(run_id)
        time.sleep(0.5)  # the other one comes meanwhile
        return real(client, run_id, *where)

    real = mlflow.MlflowClient.download_artifacts
    monkeypatch.setattr(mlflow.MlflowClient, "download_artifacts", download)
    with ThreadPoolExecutor() as pool:
        one, other = pool.map(shared.fetch, [published, published])
    assert asked == [published["run_id"]]
    # Law: what a trial has been given stays where it is.
    for data in (one, other):
        assert len(data.part("val").images) == len(data.part("val").labels) > 0


def test_letters_that_differ_on_the_server_are_refused(published: dict[str, Any]) -> None:
    facts = published["facts"]
    wrong = hashlib.sha256(b"other letters").hexdigest()
    facts["sha256"] = facts["sha256"] | {"val_labels": wrong}
    with pytest.raises(UserError, match="must have the digest .* that the driver prepared"):
        shared.fetch(published)


def test_a_cluster_needs_a_tracking_server(
    store: mlflow.MlflowClient, data_options: dict[str, Any]
) -> None:
    options = {name: str(value) for name, value in data_options.items()}
    options |= {"n_train": data_options["n_train"]}
    with pytest.raises(UserError, match=r"must reach the tracking server, but .* is 'sqlite:"):
        shared.publish(store, prep.prepare(**options))


def test_what_a_dead_driver_s_cluster_may_have_spent_is_billed(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    ledger = Ledger(path, 100.0, "key", "run", unseen=cluster.SILENT_CPU_SECONDS)
    ledger.grant(0, 50.0)
    ledger.beat({}, {0: 5.0})
    ledger.close()
    again = Ledger(path, 100.0, "key", "run")
    again.close()
    assert sum(again.past.values()) == pytest.approx(5.0 + cluster.SILENT_CPU_SECONDS)


def test_a_local_sweep_needs_no_dask(tmp_path: Path) -> None:
    (tmp_path / "distributed.py").write_text("raise ImportError('not here')")
    code = "import sweeps.sweep, sys; assert 'distributed' not in sys.modules"
    path = f"{tmp_path}{os.pathsep}{ROOT}"
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"PYTHONPATH": path})
    code = "from sweeps.cluster import Cluster; Cluster('tcp://127.0.0.1:9', 'x:y', [])"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert "needs Dask, which is not installed: pip install" in done.stderr
