import errno
import gc
import math
import signal
import sqlite3
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlflow
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from pipeline import cli
from pipeline.spec import Param, Refused, UserError

SPACE = {
    "k": Param(5, IntDistribution(1, 25)),
    "rate": Param(1e-3, FloatDistribution(1e-4, 1e-1, log=True)),
    "weights": Param("distance", CategoricalDistribution(("uniform", "distance"))),
    "deskew": Param(False, CategoricalDistribution((False, True))),
}


@pytest.mark.parametrize(
    ("convert", "text", "value"),
    [
        (cli.positive, "10", 10.0),
        (cli.positive, "1e-2", 0.01),
        (cli.seed, "0", 0),
        (cli.seed, "4294967295", 2**32 - 1),
        (cli.n_train, "40000", 40_000),
        (cli.n_train, "all", None),
        (cli.text, "data", "data"),
        (cli.limit, "none", math.inf),
        (cli.limit, "2.5", 2.5),
        (cli.share, "0", 0.0),
        (cli.share, "0.01", 0.01),
        (cli.folder, "data", "data"),
        (cli.folder, "~/data", str(Path.home() / "data")),
        (cli.digest, "latest", "latest"),
        (cli.digest, "0977015cf123", "0977015cf123"),
        (cli.run_ids, "latest", []),
        (cli.run_ids, "0a1b", ["0a1b"]),
        (cli.run_ids, "0a1b, 2c3d", ["0a1b", "2c3d"]),
    ],
)
def test_good_values_are_converted(convert: cli.Convert, text: str, value: Any) -> None:
    assert convert("name", text) == value


@pytest.mark.parametrize(
    ("convert", "text"),
    [
        (cli.positive, "abc"),
        (cli.positive, "0"),
        (cli.positive, "-5"),
        (cli.positive, "nan"),
        (cli.positive, "inf"),
        (cli.seed, "-1"),
        (cli.seed, "1.5"),
        (cli.seed, "4294967296"),
        (cli.n_train, "many"),
        (cli.n_train, "-40000"),
        (cli.n_train, "259"),
        (cli.text, " "),
        (cli.limit, "0"),
        (cli.limit, "-1"),
        (cli.share, "-0.01"),
        (cli.share, "1.1"),
        (cli.share, "nan"),
        (cli.run_ids, ""),
        (cli.run_ids, "0a1b,"),
        (cli.run_ids, "0a1b,0a1b"),
        (cli.run_ids, "0a1b;2c3d"),
        (cli.run_ids, "0a1b,latest"),
        (cli.folder, "''"),
        (cli.folder, "~nosuchuser/data"),
        (cli.digest, "0977015cf12"),
        (cli.digest, "a'b"),
    ],
)
def test_bad_values_are_one_sentence_with_name_and_value(convert: cli.Convert, text: str) -> None:
    with pytest.raises(UserError) as error:
        convert("cpu_minutes", text)
    # The sentence names the parameter and the cure, and stays on one line.
    assert "cpu_minutes must" in str(error.value)
    assert "pass " in str(error.value)
    assert "\n" not in str(error.value)


def test_undeclared_names_are_hyperparameters_and_typed_by_their_distributions() -> None:
    values, given = cli.parse(
        "train", ["--seed", "1", "--k", "7", "--rate", "2e-3"], {"seed": cli.seed}
    )
    assert values == {"seed": 1}
    # What is given replaces the default, in the type of the distribution.
    params = cli.hyperparameters("knn", SPACE, given | {"deskew": "true"})
    assert params == {"k": 7, "rate": 0.002, "weights": "distance", "deskew": True}
    assert isinstance(params["k"], int)


@pytest.mark.parametrize(
    ("given", "rule"),
    [
        ({"k": "0"}, "k must be a whole number from 1 to 25, but '0' came"),
        ({"k": "2.5"}, "k must be a whole number from 1 to 25, but '2.5' came"),
        ({"k": "nan"}, "k must be a whole number from 1 to 25, but 'nan' came"),
        ({"k": "few"}, "k must be a whole number from 1 to 25, but 'few' came"),
        ({"rate": "1"}, "rate must be a number from 0.0001 to 0.1, but '1' came"),
        ({"weights": "none"}, "weights must be one of uniform, distance, but 'none' came"),
        ({"depth": "3"}, "the hyperparameters of knn are k, rate, weights, deskew, but 'depth'"),
    ],
)
def test_hyperparameters_outside_the_space_are_refused(given: dict[str, str], rule: str) -> None:
    with pytest.raises(UserError) as error:
        cli.hyperparameters("knn", SPACE, given)
    assert rule in str(error.value)


@pytest.mark.parametrize(
    "argv",
    [[], ["--seed"], ["--seed", "1", "stray"], ["--seed", "1", "--k"], ["--seed", "--k", "1"]],
)
def test_a_broken_command_line_is_a_sentence(argv: list[str]) -> None:
    with pytest.raises(UserError, match="train takes --name value pairs"):
        cli.parse("train", argv, {"seed": cli.seed})


def test_steps_without_hyperparameters_refuse_undeclared_names() -> None:
    with pytest.raises(UserError, match="prep knows the parameters seed, but 'sed' came"):
        cli.parse_all("prep", ["--seed", "1", "--sed", "1"], {"seed": cli.seed})


def _raise(error: BaseException) -> Any:
    def main(argv: Sequence[str]) -> None:
        raise error

    return main


def _ended(main: Any) -> SystemExit:
    """How a step ends; what it has set for its process is undone."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit) as ended:
            cli.run(main)
        assert gc.get_freeze_count() > 0  # its end does not search all modules for garbage
    finally:
        signal.signal(signal.SIGTERM, before)
        gc.unfreeze()
    return ended.value


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (
            UserError("n must be 1, but 2 came: pass 1"),
            2,
            "error: n must be 1, but 2 came: pass 1\n",
        ),
        (Refused("1 is no better than 2"), 2, "refused: 1 is no better than 2\n"),
        (KeyboardInterrupt(), 130, "stopped: the open runs are marked KILLED\n"),
    ],
)
def test_run_turns_errors_into_exit_codes(
    error: BaseException, code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    ended = _ended(_raise(error))
    # One sentence on stderr, nothing else, and an exit code that is not 0.
    assert ended.code == code
    assert capsys.readouterr() == ("", said)


def test_a_full_disk_is_told_and_no_other_fault_is_hidden(
    capsys: pytest.CaptureFixture[str],
) -> None:
    # As MLflow raises what SQLite says.
    store = mlflow.MlflowException("(sqlite3.OperationalError) database or disk is full")
    store.__cause__ = sqlite3.OperationalError("database or disk is full")
    for full in (OSError(errno.ENOSPC, "No space left on device"), store):
        assert _ended(_raise(full)).code == 2
        (sentence,) = capsys.readouterr().err.splitlines()
        assert "their disk is full: make room" in sentence
    for other in (OSError(errno.EIO, "Input/output error"), sqlite3.OperationalError("no table")):
        with pytest.raises(type(other)):
            _ended(_raise(other))


def test_run_passes_the_command_line_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["step", "--a", "b"])
    seen: list[str] = []
    assert _ended(seen.extend).code == 0
    assert seen == ["--a", "b"]
