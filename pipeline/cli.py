"""The command line of every step: parsed and checked before any CPU is spent.

MLproject holds the defaults, so every option is required here. MLflow checks no types and hands
undeclared ``-P name=value`` on as ``--name value``.
"""

import argparse
import gc
import math
import os
import re
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from pipeline import disk
from pipeline.bill import METER
from pipeline.spec import Param, Params, Refused, UserError

Convert = Callable[[str, str], Any]  # (name, text) -> value


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{self.prog} takes --name value pairs, but {message}: see MLproject")


def parse(
    step: str, argv: Sequence[str], options: Mapping[str, Convert]
) -> tuple[dict[str, Any], dict[str, str]]:
    """Parse ``--name value`` pairs: the declared ones converted, and the others as text."""
    parser = _Parser(prog=step, allow_abbrev=False, add_help=False)
    for name in options:
        parser.add_argument(f"--{name}", required=True)
    known, rest = parser.parse_known_args(argv)
    values = {name: convert(name, getattr(known, name)) for name, convert in options.items()}
    names, texts = rest[::2], rest[1::2]
    if len(names) != len(texts) or not all(name.startswith("--") for name in names):
        raise UserError(f"{step} takes --name value pairs, but {' '.join(rest)!r} came")
    return values, dict(zip((name[2:] for name in names), texts, strict=True))


def parse_all(step: str, argv: Sequence[str], options: Mapping[str, Convert]) -> dict[str, Any]:
    """Parse as ``parse`` does, and refuse names that are not declared."""
    values, extra = parse(step, argv, options)
    for name in extra:
        known = ", ".join(options)
        raise UserError(f"{step} knows the parameters {known}, but {name!r} came: leave it out")
    return values


def text(name: str, value: str) -> str:
    """Any text but an empty one."""
    if not value.strip() or value == "''":  # MLflow passes an empty -P value on as ''
        raise UserError(f"{name} must not be empty: pass -P {name}=VALUE, or leave it out")
    return value


def folder(name: str, value: str) -> str:
    """A folder's path; ``~`` is the user's own, which not every shell says to a step."""
    try:
        return str(Path(text(name, value)).expanduser())
    except RuntimeError as error:
        raise UserError(
            f"{name} must name a folder, but {value!r} came, and there is no such user: "
            f"pass -P {name}=FOLDER"
        ) from error


def digest(name: str, value: str) -> str:
    """The digest of a data set, or ``latest``."""
    if value != "latest" and not re.fullmatch(r"[0-9a-f]{12}", value):
        raise UserError(
            f"{name} must be 'latest' or the 12 hexadecimal digits of a data set, but {value!r} "
            f"came: pass -P {name}=DIGEST, the tag 'dataset_digest' of a run, or leave it out"
        )
    return value


def run_ids(name: str, value: str) -> list[str]:
    """Ids of runs separated by commas, or ``latest`` (none)."""
    if value == "latest":
        return []
    ids = [part.strip() for part in value.split(",")]
    good = all(re.fullmatch(r"\w+", part) and part != "latest" for part in ids)
    if not good or len(set(ids)) < len(ids):
        raise UserError(
            f"{name} must be 'latest' or different ids of runs, separated by commas, "
            f"but {value!r} came: pass -P {name}=ID,ID with ids from the runs' pages"
        )
    return ids


def positive(name: str, value: str) -> float:
    """A number above 0."""
    number = _number(value)
    if not (math.isfinite(number) and number > 0):
        raise UserError(f"{name} must be a number above 0, but {value!r} came: pass -P {name}=10")
    return number


def seed(name: str, value: str) -> int:
    """A whole number from 0 to 2^32 - 1."""
    if not re.fullmatch(r"\d{1,10}", value) or int(value) >= 2**32:
        raise UserError(
            f"{name} must be a whole number from 0 to {2**32 - 1}, but {value!r} came: "
            f"pass -P {name}=0"
        )
    return int(value)


def n_train(name: str, value: str) -> int | None:
    """A number of letters, at least 260, or ``all`` (None)."""
    if value == "all":
        return None
    if not re.fullmatch(r"\d{1,9}", value) or int(value) < 260:
        raise UserError(
            f"{name} must be 'all' or a whole number of at least 260 letters, "
            f"but {value!r} came: pass -P {name}=40000"
        )
    return int(value)


def workers(name: str, value: str) -> int:
    """A number of processes side by side, or ``auto`` (0): as many as there are usable cores."""
    if value == "auto":
        return 0
    if not re.fullmatch(r"\d{1,4}", value) or int(value) == 0:
        raise UserError(
            f"{name} must be 'auto' or a whole number above 0, but {value!r} came: "
            f"pass -P {name}=2, or leave it out"
        )
    return int(value)


def flag(name: str, value: str) -> bool:
    """true or false."""
    if value not in ("true", "false"):
        raise UserError(f"{name} must be true or false, but {value!r} came: pass -P {name}=true")
    return value == "true"


def limit(name: str, value: str) -> float:
    """A number above 0, or ``none`` (inf): no limit."""
    return math.inf if value == "none" else positive(name, value)


def share(name: str, value: str) -> float:
    """A number from 0 to 1."""
    number = _number(value)
    if not 0 <= number <= 1:
        raise UserError(
            f"{name} must be a number from 0 to 1, but {value!r} came: pass -P {name}=0.01"
        )
    return number


def hyperparameters(model: str, space: Mapping[str, Param], given: Mapping[str, str]) -> Params:
    """Every hyperparameter of ``space``: the given text converted and checked, else the default."""
    for name in given:
        if name not in space:
            raise UserError(
                f"the hyperparameters of {model} are {', '.join(space)}, "
                f"but {name!r} came: pass one of these, or leave it out"
            )
    return {
        name: _within(name, param, given[name]) if name in given else param.default
        for name, param in space.items()
    }


def _number(value: str) -> float:
    """``value``, or not-a-number, which lies in no range: the caller then states its own rule."""
    try:
        return float(value)
    except ValueError:
        return math.nan


def _within(name: str, param: Param, value: str) -> Any:
    """Convert ``value`` by the type of its distribution, and refuse what lies outside."""
    space = param.distribution
    if isinstance(space, CategoricalDistribution):
        for choice in space.choices:
            if str(choice).lower() == value.lower():
                return choice
        rule = f"one of {', '.join(map(str, space.choices))}"
    else:
        assert isinstance(space, IntDistribution | FloatDistribution)
        number = _number(value)
        whole = isinstance(space, IntDistribution)
        if space.low <= number <= space.high and (not whole or number == int(number)):
            return int(number) if whole else number
        rule = f"a {'whole ' if whole else ''}number from {space.low} to {space.high}"
    raise UserError(
        f"{name} must be {rule}, but {value!r} came: pass -P {name}={param.default}, its default"
    )


def run(main: Callable[[Sequence[str]], None]) -> NoReturn:
    """Run a step's ``main`` on the command line: a user's mistake is one sentence and exit code 2.

    So is a refusal, in words of its own, and a full disk.

    SIGTERM ends the step as Ctrl-C does, so that its runs are closed as KILLED.
    """
    # Set before TensorFlow is imported: without it every start prints a page of remarks.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    # Two lines at the end of each trial, where the store is a server.
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    signal.signal(signal.SIGTERM, _terminate)
    METER.loaded()
    try:
        main(sys.argv[1:])
    except UserError as error:
        print(f"{'refused' if isinstance(error, Refused) else 'error'}: {error}", file=sys.stderr)
        sys.exit(2)
    except Exception as error:
        if not disk.is_full(error):
            raise
        print(
            "error: a step needs room for its records, but their disk is full: make room, and "
            "type the same command again",
            file=sys.stderr,
        )
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped: the open runs are marked KILLED", file=sys.stderr)
        sys.exit(130)
    finally:
        # An interpreter that ends searches all that is loaded for garbage, more than once.
        gc.freeze()
    sys.exit(0)


def _terminate(signum: int, frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt
