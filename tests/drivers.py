"""Drivers of sweeps, each forked from a process that has loaded what they need.

Tests that start dozens of drivers would else take most of their time to load MLflow.
"""

import multiprocessing
import os
import select
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

# What a driver loads, but for the toy model, which is another one in each test.
LOADED = [
    "steps",
    "sweeps.sweep",
    "mlflow.store.tracking.sqlalchemy_store",
    "mlflow.store.model_registry.sqlalchemy_store",
]


class Driver:
    """The step ``sweep`` in a process of its own, with what a ``subprocess.Popen`` has.

    ``environment`` has N_TRIALS, after which the sweep has no budget left, and may have DIE_AFTER,
    a moment as ``toys.die_after`` takes it.
    """

    def __init__(self, words: Sequence[str], environment: Mapping[str, str], folder: Path) -> None:
        said = Path(tempfile.mkdtemp(dir=folder)) / "said"
        os.mkfifo(said)
        # As with a pipe, its end is that of all that the driver has started.
        self._said = os.open(said, os.O_RDONLY | os.O_NONBLOCK)
        os.close(os.open(said, os.O_WRONLY))  # a driver may be killed before it has opened it
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(LOADED)
        given = (list(words), dict(environment), str(folder), str(said))
        self._process = context.Process(target=_drive, args=given)
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout: float) -> bytes:
        """Wait for its end, and that of all that it has started; what they have said."""
        self._process.join(timeout)
        said = b""
        while self.returncode is not None and select.select([self._said], [], [], timeout)[0]:
            if not (some := os.read(self._said, 1 << 16)):
                os.close(self._said)
                return said
            said += some
        raise subprocess.TimeoutExpired("sweep", timeout, said)


def _drive(words: list[str], environment: dict[str, str], folder: str, said: str) -> None:
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    out = os.open(said, os.O_WRONLY)
    os.dup2(out, 1)
    os.dup2(out, 2)
    os.close(out)
    sys.argv = ["sweep", *words]
    step()


def step() -> None:
    """The step ``sweep`` in this process, which has the toy model, and a driver's environment."""
    import toys
    from matplotlib.figure import Figure
    from steps import blank, left_until

    from pipeline import cli
    from sweeps import engine, sweep

    engine.Engine.left = left_until(int(os.environ["N_TRIALS"]))  # type: ignore[method-assign]
    Figure.savefig = blank  # type: ignore[method-assign]
    if moment := os.environ.get("DIE_AFTER"):
        toys.die_after(moment, n_calls=3)
    cli.run(sweep.main)
