"""``promote``, on models that have read nothing and answer as a test wants."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlflow
import numpy as np
import pytest
from mlflow.exceptions import ExecutionException, MlflowException
from mlflow.protos.databricks_pb2 import BAD_REQUEST
from scipy.stats import binomtest
from servers import Server
from steps import SWEEP, arguments, artifacts, gone, runs
from stores import CODE, N_TRAIN, open_store

from pipeline import champion, promote, tracking, verdict
from pipeline.models import knn
from pipeline.prep import prepare
from pipeline.spec import Dataset, Part, Refused, UserError
from pipeline.verdict import Limits
from sweeps import main

DEFAULTS = {
    "run_id": "best",
    "max_latency_us": "none",
    "max_model_mb": "none",
    "min_gain": 0,
    "dry_run": "false",
    "rollback": "false",
    "history": "false",
}
Promote = Callable[..., None]


@pytest.fixture(scope="module")
def trained(
    fresh_store: Path, archive: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Path]:
    """A tracking store with sweeps by name: ``good``, ``bad`` and ``alike``, who is as ``good``.

    All are nearest neighbours; ``bad`` was told wrong letters for six out of ten.
    """
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        open_store(fresh_store, folder, patch)
        data = prepare("emnist_letters", str(archive), N_TRAIN, str(folder / "data"))
        for name, share in (("bad", 0.6), ("alike", 0.0), ("good", 0.0)):
            _train(name, data, share)
            time.sleep(0.01)  # start times are in milliseconds
        yield folder


def _train(name: str, data: Dataset, share: float) -> None:
    """Log a model that learned a ``share`` of the letters under wrong names, as a sweep's."""
    train, rng = data.part("train"), np.random.default_rng(0)
    labels = np.array(train.labels)
    wrong = rng.choice(len(labels), int(share * len(labels)), replace=False)
    labels[wrong] = (labels[wrong] + 1) % 26
    params = {key: param.default for key, param in knn.PARAMS.items()}
    fitted = knn.fit(params, Part(train.images, labels), data.part("val"), 0, lambda *_: False)
    with tracking.start("sweep") as run:
        logged = run.log_model(fitted, train.images[:1], step=10)
        run.use_dataset(data, "train")
        run.name(name)
        run.tags({"model": name, "model_uri": logged.uri})
        run.metrics({"val_accuracy": {"good": 0.9, "alike": 0.8, "bad": 0.5}[name]})


@pytest.fixture
def store(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> mlflow.MlflowClient:
    """A client of a copy of that store, which this test alone uses; ``server`` serves it too."""
    return open_store(trained / "mlflow.db", tmp_path, monkeypatch)


@pytest.fixture
def step(trained: Path) -> Promote:
    """step(name=value, ...) types the step, with the defaults of MLproject."""

    def type_it(**options: object) -> None:
        promote.main(arguments(DEFAULTS | {"data_dir": trained / "data"} | options))

    return type_it


def _id(store: mlflow.MlflowClient, name: str) -> str:
    (run,) = [run for run in runs(store, "sweep") if run.info.run_name == name]
    return str(run.info.run_id)


def _alias(store: mlflow.MlflowClient, alias: str) -> str:
    """Which model has an alias; empty where none has it."""
    (letters,) = store.search_registered_models("name = 'letters'")
    version = letters.aliases.get(alias)
    return str(store.get_model_version("letters", version).tags["model"]) if version else ""


def _evidence(run: Any) -> Any:
    return mlflow.artifacts.load_dict(f"runs:/{run.info.run_id}/evidence.json")


def test_the_first_champion_needs_no_other(
    store: mlflow.MlflowClient, step: Promote, capsys: pytest.CaptureFixture[str]
) -> None:
    step()
    assert (_alias(store, "champion"), _alias(store, "challenger")) == ("good", "good")
    assert _alias(store, "previous") == ""
    assert "letters version 1 (good, " in capsys.readouterr().out
    version = store.get_model_version_by_alias("letters", "champion")
    # The version says of itself what it is, how good, and who decided so.
    assert version.tags["run_id"] == _id(store, "good")
    assert version.tags["val_accuracy"] == "0.9000"
    assert version.tags["decision"] == "promoted"
    assert "@" in version.tags["decided_by"]
    assert mlflow.pyfunc.load_model("models:/letters@champion") is not None


def test_the_champion_itself_is_refused_and_stays_one_version(
    store: mlflow.MlflowClient, step: Promote
) -> None:
    step()
    with pytest.raises(Refused, match="letters version 1 .* it is the champion already"):
        step()
    assert len(store.search_model_versions("name = 'letters'")) == 1
    assert _alias(store, "champion") == "good"
    # A refusal is a decision and no failure: its run is closed as one that did its work.
    first, run = runs(store, "promote")
    assert (run.info.status, run.data.tags["decision"]) == ("FINISHED", "refused")
    # What made it champion can still be read there.
    description = store.get_model_version("letters", "1").description
    assert description.index(run.info.run_id) < description.index(first.info.run_id)
    assert "traceback.txt" not in artifacts(store, run.info.run_id)


def _fail(client: mlflow.MlflowClient, tags: dict[str, str]) -> Any:
    """What ``mlflow.projects.run`` does where a step ends with another exit code than 0."""

    def run(*given: Any, **named: Any) -> None:
        with tracking.start("promote") as made:
            made.tags(tags)
        client.set_terminated(made.id, "FAILED")
        raise ExecutionException(f"Run (ID '{made.id}') failed")

    return run


def test_a_refusal_does_not_fail_main_but_an_error_does(
    store: mlflow.MlflowClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mlflow.projects, "run", _fail(store, {"decision": "refused"}))
    run_id = main.step("promote", run_id="best")
    assert store.get_run(run_id).info.status == "FINISHED"
    monkeypatch.setattr(mlflow.projects, "run", _fail(store, {}))
    with pytest.raises(UserError, match="every step must succeed, but promote failed"):
        main.step("promote", run_id="best")
    assert runs(store, "promote")[-1].info.status == "FAILED"


def test_main_keeps_to_the_letters_that_it_has_swept(
    store: mlflow.MlflowClient, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    good, given = store.get_run(_id(store, "good")), {}
    digest = good.data.tags["dataset_digest"]

    def run(uri: str, entry_point: str, parameters: dict[str, str], env_manager: str) -> Any:
        given[entry_point] = parameters
        with tracking.start(entry_point) as made:
            made.tags({"decision": "promoted", "sentence": "it becomes the champion"})
            made.tags({"dataset_digest": digest} if entry_point == "prep" else {})
            made.describe(f"what {entry_point} says")
        return SimpleNamespace(run_id=made.id)

    monkeypatch.setattr(mlflow.projects, "run", run)
    with tracking.start("sweep") as other:  # of other letters, and better, that ends meanwhile
        other.tags({"model": "cnn", "dataset_digest": "0123456789ab"})
        other.metrics({"val_accuracy": 1.0})
    data = {"dataset": "strokes", "archive": "default", "n_train": "all", "data_dir": "data"}
    swept = {name: value for name, value in SWEEP.items() if name in main.OPTIONS}
    main.main(arguments(swept | data | {"models": "knn"}))
    assert given["compare"]["dataset_digest"] == digest
    assert given["promote"]["run_id"] == good.info.run_id
    said = capsys.readouterr().out
    assert "what compare says\n\npromoted: it becomes the champion" in said


def test_a_worse_challenger_is_refused_with_the_figures(
    store: mlflow.MlflowClient, step: Promote, trained: Path
) -> None:
    step()
    with pytest.raises(Refused) as error:
        step(run_id=_id(store, "bad"))
    run = runs(store, "promote")[-1]
    evidence, test = _evidence(run), _evidence(run)["test"]
    assert f"but is {100 * test['gain']:.2f} (95 % interval" in str(error.value)
    assert (_alias(store, "champion"), _alias(store, "challenger")) == ("good", "bad")
    # The figures are those of the served models on gate.
    gate = Dataset.open(next((trained / "data").glob("emnist_letters-*"))).part("gate")
    right = {}
    for who, version in (("challenger", 2), ("champion", 1)):
        model = mlflow.pyfunc.load_model(f"models:/letters/{version}")
        right[who] = model.predict(np.array(gate.images)).argmax(axis=1) == gate.labels
        assert evidence[who]["gate_accuracy"] == right[who].mean()
        assert evidence[who]["dataset_digest"] == run.data.tags["dataset_digest"]
    won = int((right["challenger"] & ~right["champion"]).sum())
    lost = int((right["champion"] & ~right["challenger"]).sum())
    assert (test["n_won"], test["n_lost"]) == (won, lost)
    assert test["p_value"] == binomtest(won, won + lost).pvalue
    assert test["gain_low"] < test["gain"] < test["gain_high"] < 0
    # They stand on the run, on the version, and in its description.
    version = store.get_model_version("letters", "2")
    assert run.data.metrics["gain"] == float(version.tags["gain"]) == test["gain"]
    assert {"evidence.json", "evidence.md", "won_and_lost.png"} == artifacts(store, run.info.run_id)
    assert version.tags["evidence"] == f"runs:/{run.info.run_id}/evidence.json"
    for word in (
        "accuracy on gate",
        "McNemar",
        evidence["decided_by"],
        evidence["git_commit"][:12],
    ):
        assert word in version.description
    assert evidence["challenger"]["model_digest"] != evidence["champion"]["model_digest"]


def test_a_better_challenger_wins_and_rollback_restores(
    store: mlflow.MlflowClient, step: Promote, capsys: pytest.CaptureFixture[str]
) -> None:
    step(run_id=_id(store, "bad"))
    step(run_id=_id(store, "good"))
    assert (_alias(store, "champion"), _alias(store, "previous")) == ("good", "bad")
    step(rollback="true")
    assert (_alias(store, "champion"), _alias(store, "previous")) == ("bad", "good")
    step(rollback="true")
    assert (_alias(store, "champion"), _alias(store, "previous")) == ("good", "bad")
    with pytest.raises(Refused):
        step(run_id=_id(store, "bad"))
    capsys.readouterr()
    step(history="true")
    rows = capsys.readouterr().out.splitlines()[2:]
    # All decisions are there, also the several on one version, in their order.
    told = [[cell.strip() for cell in row.split("|")[3:6]] for row in rows]
    assert told == [
        ["promoted", "1 bad", "–"],
        ["promoted", "2 good", "1 bad"],
        ["restored", "1 bad", "2 good"],
        ["restored", "2 good", "1 bad"],
        ["refused", "1 bad", "2 good"],
    ]
    assert runs(store, "history")[-1].data.tags["mlflow.note.content"].splitlines()[2:] == rows


def test_a_challenger_that_does_alike_is_refused(store: mlflow.MlflowClient, step: Promote) -> None:
    step()
    with pytest.raises(Refused, match="p of McNemar's exact test must be below 0.05, but is 1 "):
        step(run_id=_id(store, "alike"))
    assert _alias(store, "champion") == "good"


@pytest.mark.parametrize(
    ("limit", "rule"),
    [
        ({"max_latency_us": 0.001}, "µs a letter must be at most 0.001, but is"),
        ({"max_model_mb": 0.001}, "MB of model must be at most 0.001, but is"),
        ({"min_gain": 0.99}, "the gain must be at least 99.00 points, but is"),
    ],
)
def test_a_limit_that_is_broken_refuses_and_one_that_is_kept_does_not(
    limit: dict[str, float], rule: str, store: mlflow.MlflowClient, step: Promote
) -> None:
    step(run_id=_id(store, "bad"))
    with pytest.raises(Refused, match=rule):
        step(run_id=_id(store, "good"), **limit)
    assert _alias(store, "champion") == "bad"
    step(run_id=_id(store, "good"), max_latency_us=1e9, max_model_mb=1e6, min_gain=0.01)
    assert _alias(store, "champion") == "good"


def test_a_dry_run_decides_and_changes_nothing(
    store: mlflow.MlflowClient, step: Promote, capsys: pytest.CaptureFixture[str]
) -> None:
    step(dry_run="true")
    assert store.search_registered_models() == []
    assert "would become the champion" in capsys.readouterr().out
    step()
    before = store.get_model_version("letters", "1")
    with pytest.raises(Refused, match="nothing is changed: .* would not become the champion"):
        step(run_id=_id(store, "bad"), dry_run="true")
    assert len(store.search_model_versions("name = 'letters'")) == 1
    assert store.get_model_version("letters", "1").tags == before.tags
    assert len(champion.history(store)) == 1


def test_a_champion_of_another_data_set_is_not_compared(
    store: mlflow.MlflowClient, step: Promote, monkeypatch: pytest.MonkeyPatch
) -> None:
    step()
    store.set_model_version_tag("letters", "1", "dataset_digest", "feedfeedfeed")
    rule = "it is of .* and the champion, version 1, of feedfeedfeed"
    with monkeypatch.context() as patch:
        patch.setattr(Dataset, "part", None)  # calling it would be a TypeError
        with pytest.raises(Refused, match=rule):
            step(run_id=_id(store, "alike"))
    assert _alias(store, "champion") == "good"
    # The cure that the sentence names.
    store.delete_registered_model_alias("letters", "champion")
    step(run_id=_id(store, "alike"))
    assert _alias(store, "champion") == "alike"


def test_promote_reads_the_gate_alone(
    store: mlflow.MlflowClient, step: Promote, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, part = [], Dataset.part
    monkeypatch.setattr(Dataset, "part", lambda self, name: seen.append(name) or part(self, name))
    step()
    with pytest.raises(Refused):
        step(run_id=_id(store, "bad"))
    assert seen == ["gate", "gate"]


def test_who_was_overtaken_between_decision_and_move_is_refused(
    store: mlflow.MlflowClient, step: Promote, monkeypatch: pytest.MonkeyPatch
) -> None:
    step(run_id=_id(store, "bad"))
    register = champion.register

    def slowly(*given: Any) -> Any:
        monkeypatch.setattr(champion, "register", register)
        step(run_id=_id(store, "good"))  # another promotion, from its first line to its last
        return register(*given)

    monkeypatch.setattr(champion, "register", slowly)
    with pytest.raises(Refused, match="another promotion has moved the champion meanwhile"):
        step(run_id=_id(store, "alike"))
    assert (_alias(store, "champion"), _alias(store, "previous")) == ("good", "bad")
    told = [(row["decision"], row["model"]) for row in champion.history(store)]
    assert told == [("promoted", "bad"), ("promoted", "good"), ("refused", "alike")]


def test_who_finds_the_alias_moved_by_hand_is_refused(
    store: mlflow.MlflowClient, step: Promote, monkeypatch: pytest.MonkeyPatch
) -> None:
    step(run_id=_id(store, "bad"))
    step(run_id=_id(store, "good"))
    seen = champion.stand(store)
    store.set_registered_model_alias("letters", "champion", "1")
    version = store.get_model_version("letters", "2")
    assert not champion.crown(store, seen, version, "a run")
    assert _alias(store, "champion") == "bad"


def test_an_alias_that_two_set_first_at_once_is_set_by_both(
    store: mlflow.MlflowClient, step: Promote, monkeypatch: pytest.MonkeyPatch
) -> None:
    step(run_id=_id(store, "bad"))
    step(run_id=_id(store, "good"))
    store.delete_registered_model_alias("letters", "challenger")
    point, asked = store.set_registered_model_alias, []

    def refused_once(*given: str) -> None:
        asked.append(given)
        if len(asked) == 1:
            point("letters", "challenger", "1")  # another promotion, in this very moment
            raise MlflowException("UNIQUE constraint failed", error_code=BAD_REQUEST)
        point(*given)

    monkeypatch.setattr(store, "set_registered_model_alias", refused_once)
    champion._point(store, "challenger", "2")
    assert _alias(store, "challenger") == "good"


def test_an_alias_that_the_store_does_not_take_is_told(
    store: mlflow.MlflowClient, step: Promote
) -> None:
    step(run_id=_id(store, "bad"))
    with pytest.raises(MlflowException, match="version"):
        champion._point(store, "another", "99")


RACER = """
import sys, time
from pipeline import champion, promote
crown = champion.crown
def together(*given):
    print("decided", flush=True)
    sys.stdin.readline()
    return crown(*given)
champion.crown = together
promote.cli.run(promote.main)
"""


def _race(store: mlflow.MlflowClient, uri: str, data_dir: Path, names: list[str]) -> list[int]:
    """Exit codes of promotions that have all decided before the first of them moves."""
    environment = os.environ | {"MLFLOW_TRACKING_URI": uri, "PYTHONPATH": CODE}
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", RACER]
            + arguments(DEFAULTS | {"data_dir": data_dir, "run_id": _id(store, name)}),
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for name in names
    ]
    for racer in racers:
        assert racer.stdout is not None
        if racer.stdout.readline() != "decided\n":
            said = [one.communicate(timeout=120) for one in racers]  # else a pipe is left open
            pytest.fail(f"not all have decided: {said}")
    for racer in racers:
        assert racer.stdin is not None
        racer.stdin.write("\n")
        racer.stdin.flush()
    said = [racer.communicate(timeout=120) for racer in racers]
    for racer, (_, errors) in zip(racers, said, strict=True):
        assert racer.returncode == 0 or "has moved the champion meanwhile" in errors, errors
    return [racer.returncode for racer in racers]


@pytest.mark.parametrize("first", [True, False])
def test_of_processes_that_decide_at_once_one_wins(
    first: bool, store: mlflow.MlflowClient, step: Promote, trained: Path
) -> None:
    if not first:
        step(run_id=_id(store, "bad"))
    names = ["good", "alike"]
    codes = _race(store, store.tracking_uri, trained / "data", names)
    assert sorted(codes) == [0, 2]
    assert _alias(store, "champion") == names[codes.index(0)]
    decisions = [row["decision"] for row in champion.history(store)]
    assert decisions.count("promoted") == (1 if first else 2)
    assert decisions.count("refused") == 1


def test_of_processes_at_a_server_one_wins(
    store: mlflow.MlflowClient, server: Server, trained: Path
) -> None:
    codes = _race(store, server.uri, trained / "data", ["good", "alike"])
    assert sorted(codes) == [0, 2]
    client = mlflow.MlflowClient(server.uri)
    assert sorted(row["decision"] for row in champion.history(client)) == ["promoted", "refused"]


def test_a_move_under_way_is_waited_for_and_one_cut_short_is_told(
    store: mlflow.MlflowClient, step: Promote, monkeypatch: pytest.MonkeyPatch
) -> None:
    step(run_id=_id(store, "bad"))
    other = tracking.create(store, "promote", None)
    assert champion._take(store, runs(store, "promote")[0], 2, other.id)
    with pytest.raises(UserError, match=f"but run {other.id} .* is at it"):
        step(run_id=_id(store, "good"))
    assert _alias(store, "champion") == "bad"
    # It died after it had taken its number: the next one goes on, and the history says so.
    other.close("KILLED")
    step(run_id=_id(store, "good"))
    assert _alias(store, "champion") == "good"
    told = [row["decision"] for row in champion.history(store)]
    assert sorted(told) == ["cut short", "promoted", "promoted"]
    assert "KILLED" in verdict.table(champion.history(store))


def test_a_champion_that_was_registered_by_hand_is_not_compared_but_can_be_followed(
    store: mlflow.MlflowClient, step: Promote
) -> None:
    uri = store.get_run(_id(store, "bad")).data.tags["model_uri"]
    mlflow.register_model(uri, "letters")
    store.set_registered_model_alias("letters", "champion", "1")
    with pytest.raises(Refused, match="and the champion, version 1, of unknown"):
        step()
    store.delete_registered_model_alias("letters", "champion")
    step()
    # The run that trained the first version has kept the number.
    params = store.get_run(_id(store, "bad")).data.params
    assert params["champion_change_1"] == runs(store, "promote")[-1].info.run_id


def test_a_description_keeps_to_what_a_store_holds(
    store: mlflow.MlflowClient, step: Promote
) -> None:
    step()
    for _ in range(4):
        with pytest.raises(Refused):
            step()
    version = store.get_model_version("letters", "1")
    assert len(version.description) <= champion.LONGEST
    assert version.description.count("it is the champion already") >= 2
    assert len(champion.history(store)) == 5


def test_numbers_are_kept_where_the_first_promotion_was_deleted(
    store: mlflow.MlflowClient, step: Promote
) -> None:
    step(run_id=_id(store, "bad"))
    store.delete_run(runs(store, "promote")[0].info.run_id)
    step(run_id=_id(store, "good"))
    assert _alias(store, "champion") == "good"


def test_a_decision_outlives_the_version_that_a_user_deletes(
    store: mlflow.MlflowClient, step: Promote
) -> None:
    for name in ("bad", "good"):
        step(run_id=_id(store, name))
    before = champion.history(store)
    store.delete_registered_model_alias("letters", "champion")
    store.delete_model_version("letters", "2")
    after = champion.history(store)
    assert [row["decision"] for row in after] == ["promoted", "promoted"]
    kept = ("decision", "reason", "decided_at", "decided_by", "decision_run_id", "version", "model")
    for name in kept:
        assert after[1][name] == before[1][name], name
    assert verdict.table(after)


def test_a_champion_whose_files_are_gone_is_a_sentence(
    store: mlflow.MlflowClient, step: Promote
) -> None:
    step()
    champion = store.get_model_version_by_alias("letters", "champion")
    with gone(champion.tags["model_uri"]):
        with pytest.raises(UserError, match="champion's model must be there, but version 1 gave"):
            step(run_id=_id(store, "bad"))
    # Law: the run is closed, and nothing has moved.
    assert [run.info.status for run in runs(store, "promote")] == ["FINISHED", "FAILED"]
    assert _alias(store, "champion") == "good"


def test_rollback_without_a_previous_is_a_sentence(
    store: mlflow.MlflowClient, step: Promote
) -> None:
    with pytest.raises(UserError, match="letters has none: promote a model first"):
        step(rollback="true")
    step()
    with pytest.raises(UserError, match="letters has none: promote a model first"):
        step(rollback="true")
    assert store.search_runs(["0"], "attributes.status = 'RUNNING'") == []


def test_a_dry_rollback_changes_nothing(
    store: mlflow.MlflowClient, step: Promote, capsys: pytest.CaptureFixture[str]
) -> None:
    step(run_id=_id(store, "bad"))
    step(run_id=_id(store, "good"))
    step(rollback="true", dry_run="true")
    assert "letters version 1 (bad) would become the champion" in capsys.readouterr().out
    assert (_alias(store, "champion"), _alias(store, "previous")) == ("good", "bad")


def test_history_before_any_decision(
    store: mlflow.MlflowClient, step: Promote, capsys: pytest.CaptureFixture[str]
) -> None:
    step(history="true")
    assert capsys.readouterr().out == "no decision on letters yet\n"


@pytest.mark.parametrize(
    ("options", "rule"),
    [
        ({"history": "true", "rollback": "true"}, "but history and rollback came"),
        ({"run_id": "0123", "rollback": "true"}, "but rollback and run_id came"),
        ({"dry_run": "maybe"}, "dry_run must be true or false"),
        ({"rollback": "1"}, "rollback must be true or false"),
        ({"history": "yes"}, "history must be true or false"),
        ({"max_latency_us": "0"}, "max_latency_us must be a number above 0"),
        ({"max_model_mb": "small"}, "max_model_mb must be a number above 0"),
        ({"min_gain": "abc"}, "min_gain must be a number from 0 to 1, .* pass -P min_gain=0.01"),
        ({"min_gain": "-0.1"}, "min_gain must be a number from 0 to 1"),
        ({"min_gain": "2"}, "min_gain must be a number from 0 to 1"),
    ],
)
def test_bad_options_are_a_sentence(options: dict[str, Any], rule: str, step: Promote) -> None:
    with pytest.raises(UserError, match=rule):
        step(**options)


def test_a_run_without_a_model_is_a_sentence(store: mlflow.MlflowClient, step: Promote) -> None:
    with tracking.start("prep") as run:
        pass
    with pytest.raises(UserError, match="run_id must name a run with a model"):
        step(run_id=run.id)
    with pytest.raises(UserError, match="run_id must name a run of the tracking store"):
        step(run_id="0123")
    assert store.search_runs(["0"], "attributes.status = 'RUNNING'") == []


def test_before_any_sweep_the_cure_is_named(
    fresh_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: Promote
) -> None:
    open_store(fresh_store, tmp_path, monkeypatch)
    with pytest.raises(UserError, match="run `mlflow run . -e sweep -P model=knn`"):
        step()


def test_letters_that_are_gone_leave_nothing_registered(
    store: mlflow.MlflowClient, step: Promote, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="run `mlflow run . -e prep`"):
        step(data_dir=tmp_path / "gone")
    assert store.search_registered_models() == []


def _hits(both: int, won: int, lost: int, neither: int) -> tuple[Any, Any]:
    """Which letters a challenger and a champion have read right, so many of each kind."""
    kinds = [[True, True], [True, False], [False, True], [False, False]]
    challenger, holder = np.repeat(np.array(kinds), [both, won, lost, neither], axis=0).T
    return challenger, holder


@pytest.mark.parametrize(
    ("won", "lost", "p_value"),
    # Two sides of so many throws of a coin: 2 / 2^5, 2 / 2^6, 2 (1 + 10) / 2^10.
    [(0, 0, 1.0), (5, 0, 1 / 16), (6, 0, 1 / 32), (9, 1, 22 / 1024), (1, 9, 22 / 1024)],
)
def test_a_paired_test_knows_chance_from_gain(won: int, lost: int, p_value: float) -> None:
    test = verdict.paired_test(*_hits(700, won, lost, 300 - won - lost))
    assert test["p_value"] == pytest.approx(p_value)
    assert test["gain"] == (won - lost) / 1000
    assert test["gain_low"] <= test["gain"] <= test["gain_high"]
    kept = [check.passed for check in verdict.checks({}, test, Limits(np.inf, np.inf, 0.0))]
    assert kept == [won >= lost, p_value < 0.05]


def test_the_interval_is_that_of_a_bootstrap_of_the_letters() -> None:
    challenger, holder = _hits(1500, 120, 80, 300)
    test = verdict.paired_test(challenger, holder)
    difference = challenger.astype(int) - holder
    means = np.random.default_rng(1).choice(difference, (4000, 2000)).mean(axis=1)
    found = [test["gain_low"], test["gain_high"]]
    # But for the chance of either, and that gains come in steps of a letter.
    assert found == pytest.approx(list(np.percentile(means, [2.5, 97.5])), abs=1.1e-3)


def test_limits_without_a_champion_are_checked_all_the_same() -> None:
    figures = {"predict_us_per_letter": 10.0, "model_mb": 2.0}
    kept, broken = verdict.checks(figures, None, Limits(10.0, 1.0, 0.5))
    assert kept.passed
    assert not broken.passed
    assert verdict.why([kept, broken], None) == "MB of model must be at most 1, but is 2"
