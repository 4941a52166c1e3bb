"""``reproduce``: runs whose code lies in a git repository of the tests' own."""

import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import mlflow
import numpy as np
import pandas as pd
import pytest
from archives import write_archive
from mlflow.entities import Metric, Param, RunTag
from steps import alive, arguments, artifacts, runs, toy, wait
from stores import N_TRAIN, ROOT, open_store

from pipeline import checkout, environment, reproduce, tracking
from pipeline.spec import UserError

pytestmark = pytest.mark.skipif(not shutil.which("git"), reason="there is no git")
SLOW = 1.0  # quality of a toy that never ends


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=someone", "-c", "user.email=someone@example.org"]
    command = ["git", "-C", str(folder), *identity, "-c", "commit.gpgsign=false", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clone of the project: its first commit has a toy model, which its last one has not."""
    folder = tmp_path_factory.mktemp("clone") / "project"
    ignored = shutil.ignore_patterns("__pycache__")
    for name in ("pipeline", "sweeps"):
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    for name in ("MLproject", "conda.yaml", "requirements.txt", ".gitignore"):
        shutil.copy(ROOT / name, folder)
    source = toy(before=f"time.sleep(120 if quality == {SLOW} else 0)")
    source = source.replace('("toys",)', "()")
    (folder / "pipeline/models/toy.py").write_text(source)
    git(folder, "init", "--quiet")
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "--message", "With a toy")
    git(folder, "rm", "--quiet", "pipeline/models/toy.py")
    git(folder, "commit", "--quiet", "--message", "Without it")
    return folder


@pytest.fixture(scope="module")
def trained(
    project: Path, fresh_store: Path, archive: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Path]:
    """A tracking store with a train run of a toy and one of KNN, made by the first commit."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        store = open_store(fresh_store, folder, patch)
        git(project, "checkout", "--quiet", "HEAD~1")
        data = {"dataset": "emnist_letters", "archive": archive, "n_train": N_TRAIN}
        for model in ("toy", "knn"):
            options = {"model": model, "seed": 0, "precision": "auto", "data_dir": folder / "data"}
            command = [sys.executable, "-m", "pipeline.train", *arguments(data | options)]
            subprocess.run(command, cwd=project, check=True, stdout=subprocess.DEVNULL)
            run = runs(store, "train")[-1]
            # As `mlflow run` does.
            store.log_batch(run.info.run_id, params=[Param(k, str(v)) for k, v in data.items()])
        git(project, "checkout", "--quiet", "-")
        yield folder


class Desk(NamedTuple):
    """A tracking store and a clone that one test works with."""

    store: mlflow.MlflowClient
    project: Path
    data_dir: Path

    def recorded(self, model: str) -> Any:
        return next(run for run in runs(self.store, "train") if run.data.tags["model"] == model)

    def again(self, run_id: str, archive: object = "recorded") -> Any:
        """Reproduce a run; gives the run of the step."""
        options = {"run_id": run_id, "archive": archive, "data_dir": self.data_dir}
        reproduce.main(arguments(options))
        return runs(self.store, "reproduce")[-1]

    def like(
        self,
        source: Any,
        values: dict[int, float] | None = None,
        params: dict[str, Any] | None = None,
        **tags: object,
    ) -> str:
        """A run that has recorded what ``source`` has, but for what is given; gives its id."""
        texts = {k: v for k, v in source.data.tags.items() if not k.startswith("mlflow.")}
        run = self.store.create_run("0", run_name=source.info.run_name)
        run_id = str(run.info.run_id)
        curve = self.curve(source.info.run_id) if values is None else values
        self.store.log_batch(
            run_id,
            metrics=[Metric("val_accuracy", v, 0, step) for step, v in curve.items()],
            params=[Param(k, str(v)) for k, v in (source.data.params | (params or {})).items()],
            tags=[RunTag(k, str(v)) for k, v in (texts | tags).items()],
        )
        self.store.log_inputs(run_id, source.inputs.dataset_inputs)
        self.store.set_terminated(run_id)
        return run_id

    def curve(self, run_id: str) -> dict[int, float]:
        points = self.store.get_metric_history(run_id, "val_accuracy")
        return {point.step: point.value for point in points}

    def leftovers(self) -> list[Any]:
        """What is left of checkouts, and the runs that are RUNNING."""
        left = list(self.data_dir.glob(".reproduce-*"))
        checkouts = git(self.project, "worktree", "list").splitlines()[1:]
        running = self.store.search_runs(["0"], "attributes.status = 'RUNNING'")
        return [*left, *checkouts, *(run.data.tags for run in running)]


@pytest.fixture
def desk(
    trained: Path, project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Desk]:
    store = open_store(trained / "mlflow.db", tmp_path, monkeypatch)
    monkeypatch.setattr(checkout, "PROJECT", project)
    desk = Desk(store, project, tmp_path / "data")
    yield desk
    assert desk.leftovers() == []


def test_knn_agrees_bit_for_bit(desk: Desk, capfd: pytest.CaptureFixture[str]) -> None:
    source = desk.recorded("knn")
    run = desk.again(source.info.run_id)
    assert "agrees bit for bit: val_accuracy" in capfd.readouterr().out.splitlines()[-1]
    assert (run.info.status, run.info.run_name) == ("FINISHED", "reproduce knn · agrees")
    assert run.data.tags["agrees"] == "true"
    assert run.data.tags["reproduced_run_id"] == source.info.run_id
    values = run.data.metrics
    assert values["val_accuracy"] == values["recorded_val_accuracy"] > 0
    assert desk.curve(run.info.run_id) == desk.curve(source.info.run_id)
    assert artifacts(desk.store, run.info.run_id) == {"environment.csv"}
    # Letters and fit are runs below it, made by the code of that commit.
    (retrained,) = runs(desk.store, "retrain")
    made = runs(desk.store, "prep")[-1]
    for child in (made, retrained):
        assert child.info.status == "FINISHED"
        assert child.data.tags["mlflow.parentRunId"] == run.info.run_id
        assert child.data.tags["git_commit"] == source.data.tags["git_commit"]
        assert child.data.tags["git_dirty"] == "false"
        assert child.data.tags["dataset_digest"] == source.data.tags["dataset_digest"]
    assert retrained.info.run_id == run.data.tags["retrained_run_id"]


def test_the_code_is_that_of_the_commit_and_another_metric_is_exit_code_2(desk: Desk) -> None:
    source = desk.recorded("toy")  # a model that the present code does not know
    curve = desk.curve(source.info.run_id)
    tampered = desk.like(source, curve | {3: curve[3] + 1e-6})
    with pytest.raises(UserError, match="does not agree: .* equal bit for bit: see the table of"):
        desk.again(tampered)
    (run,) = runs(desk.store, "reproduce")
    # It did what it was asked for, and says so.
    assert (run.info.status, run.info.run_name) == ("FINISHED", "reproduce toy · disagrees")
    assert run.data.tags["agrees"] == "false"
    assert "**: does not agree" in run.data.tags["mlflow.note.content"]


def test_a_pruned_trial_of_changed_files_in_another_environment(
    desk: Desk, capfd: pytest.CaptureFixture[str]
) -> None:
    """Compared up to its last step, within a tolerance; what has changed is listed."""
    source = desk.recorded("toy")
    versions = source.data.tags["versions"].replace("keras=", "keras=0.")
    curve = {1: 0.1, 2: 0.22}  # of the three that the fit has; 0.2 is what it reports again
    pruned = desk.like(source, curve, versions=versions, git_dirty="true", state="pruned")
    run = desk.again(pruned)
    out = capfd.readouterr().out
    assert "its exact code is unknown" in out
    assert "it was pruned, and is compared up to its last step" in out
    assert "| keras " in out
    assert "agrees within the tolerance of 0.1" in out.splitlines()[-1]
    assert "0.200000 after step 2, recorded 0.220000" in out.splitlines()[-1]
    note = run.data.tags["mlflow.note.content"]
    assert note.index("| keras ") < note.index("| 3    | –                     | 0.300000     |")
    path = mlflow.artifacts.download_artifacts(f"runs:/{run.info.run_id}/environment.csv")
    packages = pd.read_csv(path).set_index("package")
    assert packages.loc["keras", "recorded"] == f"0.{packages.loc['keras', 'now']}"
    assert packages.loc["scipy", "recorded_by"] == "lock"
    assert len(packages) > 100


def test_other_letters_are_not_trained_on(desk: Desk, tmp_path: Path) -> None:
    other = tmp_path / "other.zip"
    write_archive(other, n_train=1040, n_test=260, seed=1)
    with pytest.raises(UserError, match="the letters must have the digest"):
        desk.again(desk.recorded("toy").info.run_id, archive=other)
    (run,) = runs(desk.store, "reproduce")
    assert run.info.status == "FAILED"
    assert "the letters must have the digest" in run.data.tags["error"]
    assert runs(desk.store, "retrain") == []


def test_a_step_that_fails_is_a_sentence(desk: Desk, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match="prep of commit .* exit code 2: its own message is above"):
        desk.again(desk.recorded("toy").info.run_id, archive="missing.zip")
    assert "there is no file missing.zip" in capfd.readouterr().err


def test_an_interrupt_ends_the_fit_and_leaves_nothing(desk: Desk) -> None:
    slow = desk.like(desk.recorded("toy"), params={"quality": SLOW})
    options = {"run_id": slow, "archive": "recorded", "data_dir": desk.data_dir}
    command = [sys.executable, "-m", "pipeline.reproduce", *arguments(options)]
    process = subprocess.Popen(
        command, cwd=desk.project, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )

    def fitting() -> list[Any]:
        # Its params are complete when the letters are there and the fit begins.
        begun = [run for run in runs(desk.store, "train") if "mlflow.parentRunId" in run.data.tags]
        return [run for run in begun if "steps" in run.data.params]

    assert wait(lambda: bool(fitting()), 120)
    pid = int(fitting()[0].data.tags["process"].split()[3])
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert wait(lambda: not alive(pid), 10)
    (run,) = runs(desk.store, "reproduce")
    assert run.info.status == "KILLED"


# ---- which run, which letters


def test_a_sweep_means_its_best_trial_and_a_trial_has_its_sweeps_archive(desk: Desk) -> None:
    source = desk.recorded("knn")
    trial = desk.like(source, step="trial")
    desk.store.set_terminated(trial)
    sweep = desk.like(source, step="sweep", best_run_id=trial)
    found = reproduce.find(desk.store, sweep)
    assert found.info.run_id == trial
    assert reproduce.find(desk.store, trial).info.run_id == trial
    # A trial says neither archive nor number of letters.
    bare = desk.store.create_run("0", tags={"mlflow.parentRunId": sweep, "dataset": "strokes"})
    desk.store.log_inputs(bare.info.run_id, source.inputs.dataset_inputs)
    data = reproduce.letters(desk.store, desk.store.get_run(bare.info.run_id), "recorded")
    assert data == {
        "dataset": "strokes",
        "archive": source.data.params["archive"],
        "n_train": str(N_TRAIN),
    }
    data = reproduce.letters(desk.store, desk.store.get_run(bare.info.run_id), "mine.zip")
    assert data["archive"] == "mine.zip"
    desk.store.set_terminated(bare.info.run_id)


@pytest.mark.parametrize("name", ["my letters.zip", "it's.zip", "~/x.zip", "a.zip?download=1", "x"])
def test_an_archive_is_recorded_as_a_shell_was_given_it(name: str) -> None:
    assert reproduce.typed(shlex.quote(name)) == name  # by `mlflow run`
    assert reproduce.typed(name) == name


def test_a_run_without_an_archive_needs_one(desk: Desk) -> None:
    source = desk.recorded("knn")
    bare = desk.store.create_run("0", tags={"dataset": "strokes"})
    desk.store.log_inputs(bare.info.run_id, source.inputs.dataset_inputs)
    desk.store.set_terminated(bare.info.run_id)
    bare = desk.store.get_run(bare.info.run_id)
    with pytest.raises(UserError, match="the archive must be given .* pass -P archive=PATH"):
        reproduce.letters(desk.store, bare, "recorded")
    data = reproduce.letters(desk.store, bare, "default")
    assert data == {"dataset": "strokes", "archive": "default", "n_train": str(N_TRAIN)}


def test_what_a_fit_has_found_is_left_to_it_again(desk: Desk) -> None:
    source = desk.recorded("knn")
    found = desk.like(source, params={"found_n_neighbors": 7})
    params = reproduce.hyperparameters(desk.store.get_run(found))
    assert params == source.data.params
    # But for how far its CPU-seconds have let it come: another machine's are not the same.
    short = {"late_letters": 0, "found_late_letters": 96, "tta": 5, "found_tta": 1}
    found = desk.like(source, params=short)
    params = reproduce.hyperparameters(desk.store.get_run(found))
    assert params == source.data.params | {"late_letters": "96", "tta": "1"}


@pytest.mark.parametrize(
    ("options", "rule"),
    [
        ({"run_id": "0123"}, "run_id must name a run"),
        ({"run_id": ""}, "run_id must not be empty"),
        ({"archive": ""}, "archive must not be empty"),
        ({"data_dir": ""}, "data_dir must not be empty"),
        ({"data_dir": "a_file"}, "reproduce must be able to write to its folder"),
        ({"speed": "fast"}, "reproduce knows the parameters run_id, archive, data_dir, but"),
    ],
)
def test_bad_values_are_a_sentence(options: dict[str, str], rule: str, desk: Desk) -> None:
    Path("a_file").touch()
    good = {"run_id": "latest", "archive": "recorded", "data_dir": "data"}
    with pytest.raises(UserError, match=rule):
        reproduce.main(arguments(good | options))


def test_a_run_without_a_model_is_a_sentence(desk: Desk) -> None:
    (prep, *_) = runs(desk.store, "prep")
    with pytest.raises(UserError, match="run_id must name a run with a model"):
        desk.again(prep.info.run_id)


# ---- which code


def test_a_commit_that_is_unknown_is_a_sentence(desk: Desk) -> None:
    unknown = desk.like(desk.recorded("toy"), git_commit="0123456789" * 4)
    with pytest.raises(UserError, match="commit 01234567 must be in the git repo.*`git fetch`"):
        desk.again(unknown)
    nowhere = desk.like(desk.recorded("toy"), git_commit="none")
    with pytest.raises(UserError, match="the run must have recorded the commit of its code"):
        desk.again(nowhere)


def test_a_shallow_clone_can_be_deepened(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shallow = tmp_path / "shallow"
    git(tmp_path, "clone", "--quiet", "--depth=1", project.as_uri(), str(shallow))
    monkeypatch.setattr(checkout, "PROJECT", shallow)
    checkout.check(git(project, "rev-parse", "HEAD"))
    with pytest.raises(UserError, match="is a shallow clone, .* run `git fetch --unshallow`"):
        checkout.check(git(project, "rev-parse", "HEAD~1"))


def test_without_a_repository_or_without_git_there_is_no_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkout, "PROJECT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    with pytest.raises(UserError, match="must come from a git repository, .*not a git repository"):
        checkout.check("0123456789" * 4)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="reproduce needs git .*: install it"):
        checkout.check("0123456789" * 4)


def test_a_project_may_be_a_folder_of_a_repository(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(project, tmp_path / "all/letters", ignore=shutil.ignore_patterns(".git"))
    git(tmp_path / "all", "init", "--quiet")
    git(tmp_path / "all", "add", "--all")
    git(tmp_path / "all", "commit", "--quiet", "--message", "All")
    monkeypatch.setattr(checkout, "PROJECT", tmp_path / "all/letters")
    commit = git(tmp_path / "all", "rev-parse", "HEAD")
    with checkout.checkout(commit, tmp_path / "data") as (code, _):
        assert (code / "pipeline/train.py").is_file()
        assert git(code, "rev-parse", "HEAD") == commit
    assert list((tmp_path / "data").iterdir()) == []


def test_what_a_kill_has_left_is_removed_after_a_day(
    desk: Desk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = git(desk.project, "rev-parse", "HEAD")
    left, live = (desk.data_dir / f".reproduce-{name}" for name in ("left", "live"))
    for folder in (left, live):
        git(desk.project, "worktree", "add", "--quiet", "--detach", str(folder / "code"), commit)
    os.utime(left, (0, 0))
    with checkout.checkout(commit, desk.data_dir) as (code, _):
        assert code.is_dir()
        assert not left.exists()
        assert live.exists()
    assert len(git(desk.project, "worktree", "list").splitlines()) == 2
    os.utime(live, (0, 0))
    with checkout.checkout(commit, desk.data_dir):
        pass


# ---- the verdict


@pytest.mark.parametrize(
    ("change", "strict"),
    [
        ({}, True),
        ({"git_dirty": "true"}, False),
        ({"precision": "bfloat16"}, False),
        ({"cpu_model": "Abacus"}, False),
    ],
)
def test_bit_for_bit_is_asked_of_float32_where_nothing_has_changed(
    change: dict[str, str], strict: bool
) -> None:
    tags = tracking.environment_tags() | {"git_dirty": "false"} | change
    assert reproduce.is_strict(tags, environment.compare(tags, "")) is strict


def judged(recorded: dict[int, float], reproduced: dict[int, float], strict: bool) -> Any:
    return reproduce.judge(recorded, reproduced, strict, n_val=10_000)


def test_the_verdict() -> None:
    same, off, far = {1: 0.8, 2: 0.9}, {1: 0.8, 2: 0.9 + 1e-12}, {1: 0.8, 2: 0.95}
    assert judged(same, same, strict=True).agrees
    assert not judged(same, off, strict=True).agrees
    # A difference on the way is one, too.
    assert not judged(same, {1: 0.8001, 2: 0.9}, strict=True).agrees
    verdict = judged(same, off, strict=False)
    assert verdict.agrees
    assert not verdict.exact
    assert not judged(same, far, strict=False).agrees
    # A trial that was stopped is compared at its last step.
    assert judged({1: 0.8}, far, strict=True).exact
    # A fit that ends before that step is another one.
    short = judged(same, {1: 0.8}, strict=False)
    assert not short.agrees
    assert "it ends before step 2" in short.words()


def test_the_tolerance_covers_what_chance_does_to_two_accuracies() -> None:
    rng = np.random.default_rng(0)
    for share, n in ((0.9, 7_235), (0.5, 260), (0.03, 10_000)):
        pairs = rng.binomial(n, share, (2, 20_000)) / n
        within = abs(pairs[0] - pairs[1]) <= reproduce.tolerance(share, n)
        assert within.mean() == pytest.approx(0.9973, abs=0.002)
    assert 0 < reproduce.tolerance(1.0, 260) < 0.02
