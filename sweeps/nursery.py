"""A process that has loaded all that trials need and run no op, and forks each trial.

A trial forked from it starts in 0.01 CPU-seconds instead of 5. It takes its trials' bills from the
kernel (``wait4``), and stops a trial whose grant is spent: SIGXCPU first, then SIGKILL for all of
its processes, whatever they do: loop in native code, fork, ignore signals.
"""

import gc
import importlib
import json
import math
import os
import resource
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from socket import socketpair
from typing import Any, NoReturn

from pipeline.bill import OverBudget
from sweeps import processes

POLL_SECONDS = 0.25  # between two looks at the trials' meters; each look costs 1 ms a trial
GRACE_CPU_SECONDS = 0.3  # between SIGXCPU and SIGKILL
# A share of the grant: Linux counts RLIMIT_CPU in clock ticks, which can run ahead of the bill.
TICKS_AHEAD = 0.1 if sys.platform == "linux" else 0.0
MAX_MESSAGE = 1 << 20  # bytes; a trial that sends more sends garbage
ONE_THREAD = {
    name: "1"
    for name in (
        "OMP_NUM_THREADS",
        "OPENBLAS_NUM_THREADS",
        "MKL_NUM_THREADS",
        "TF_NUM_INTRAOP_THREADS",
        "TF_NUM_INTEROP_THREADS",
    )
}  # read by the libraries when they are imported

Message = dict[str, Any]
# body(spec, call) runs in the trial's process; call(message) sends a message and gives the answer.
Body = Callable[[Message, Callable[[Message], Message]], Message]


# ---- the driver's side


class Nursery:
    """The driver's handle: starts the process, sends it trials, yields what comes of them."""

    def __init__(
        self,
        body: str,
        preload: Sequence[str],
        silence: float = math.inf,
        idle: float = math.inf,
    ) -> None:
        """``body`` is ``module:function``; ``preload`` are modules imported once, before forks.

        So is the module of ``body``; where it has a function ``prepare``, that is called then.
        A nursery that does not ``hear`` of its driver ends after ``silence`` seconds where it has a
        trial, and after ``idle`` where it has none.
        """
        ours, theirs = socketpair()
        limits = f"{silence}:{idle}"
        words = ["-m", "sweeps.nursery", str(theirs.fileno()), limits, body, *preload]
        command = [sys.executable, *words]
        self.process = subprocess.Popen(
            command,
            pass_fds=[theirs.fileno()],
            env=os.environ | ONE_THREAD,
            start_new_session=True,  # Ctrl-C in a terminal is for the driver alone
        )
        theirs.close()
        self._connection = Connection(ours.detach())
        self.live: dict[int, float] = {}  # trial: CPU-seconds so far
        self.imported = 0.0  # CPU-seconds that it took to load

    def start(self, trial: int, spec: Message, grant: float) -> None:
        """Fork a trial that may spend ``grant`` CPU-seconds."""
        self.live[trial] = 0.0
        _send(self._connection, {"trial": trial, "spec": spec, "grant": grant})

    def answer(self, trial: int, answer: Message) -> None:
        """Answer a trial's message."""
        _send(self._connection, {"trial": trial, "answer": answer})

    def hear(self) -> None:
        """Tell the nursery that its driver lives."""
        _send(self._connection, {})

    def events(self, timeout: float) -> Iterator[Message]:
        """What has come of the trials; waits up to ``timeout`` seconds for the first.

        ``{"trial", "message"}`` is a message of a trial, which waits for the answer. ``{"trial",
        "end", "cpu_seconds", "peak_rss_mb", "signal", "over_budget"}`` is the end of one; ``end``
        is what its body returned, or None.

        Raises:
            ConnectionError: the nursery is dead.
        """
        while self._connection.poll(timeout):
            try:
                event = _receive(self._connection)
            except EOFError as error:
                raise ConnectionError("the nursery died") from error
            timeout = 0.0
            if "live" in event:
                self.live |= {int(trial): spent for trial, spent in event["live"].items()}
                self.imported = event["imported"]
                continue
            if "end" in event:
                del self.live[event["trial"]]
            yield event

    def cpu_seconds(self) -> float:
        """What the nursery itself and its ended trials have spent so far."""
        return processes.cpu_seconds(self.process.pid)

    def capacity(self) -> int:
        """Trials that this machine can have side by side."""
        return processes.usable_cores()

    def elsewhere(self) -> float:
        """CPU-seconds that the kernel does not charge to this process in the end: none."""
        return 0.0

    def close(self) -> None:
        """End the nursery and every trial; then the kernel has the driver's whole bill."""
        self._connection.close()
        try:
            self.process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            processes.kill_tree(self.process.pid)
            self.process.wait()


def lost(trial: int, cpu_seconds: float, why: str) -> Message:
    """The end of a trial that could not tell of it: what forked it, or had it forked, is gone."""
    return {
        "trial": trial,
        "end": None,
        "cpu_seconds": cpu_seconds,
        "peak_rss_mb": 0.0,
        "signal": 0,
        "over_budget": False,
        "lost": why,
    }


# ---- the nursery's side


@dataclass
class _Trial:
    number: int
    pid: int
    grant: float
    connection: Connection | None
    spent: float = 0.0
    end: Message | None = None
    warned: bool = False
    strays: float = 0.0  # CPU-seconds of descendants that outlived their parents
    family: set[int] = field(default_factory=set)


def serve(
    driver: Connection, body: Body, silence: float = math.inf, idle: float = math.inf
) -> None:
    """Fork trials and watch over them until the driver hangs up, dies or is silent for too long."""
    trials: dict[int, _Trial] = {}
    told, imported, heard = 0.0, time.process_time(), time.monotonic()
    while time.monotonic() - heard < (silence if trials else idle):
        connections = [trial.connection for trial in trials.values() if trial.connection]
        ending = len(connections) < len(trials)  # one has hung up: its bill comes in a moment
        ready = wait([driver, *connections], 0.01 if ending else POLL_SECONDS)
        for trial in trials.values():
            if trial.connection in ready:
                _relay(driver, trial)
        if driver in ready:
            try:
                order = _receive(driver)
            except (EOFError, OSError):
                break
            heard = time.monotonic()
            if "spec" in order:
                trials[order["trial"]] = _fork(driver, trials, body, order)
            elif "answer" in order:
                _answer(trials.get(order["trial"]), order["answer"])
        _adopt(trials)
        for trial in list(trials.values()):
            if ended := _look(trial):
                del trials[trial.number]
                _send(driver, ended)
        if time.monotonic() - told > 2 * POLL_SECONDS:
            told = time.monotonic()
            live = {trial.number: trial.spent for trial in trials.values()}
            _send(driver, {"live": live, "imported": imported})
    for trial in trials.values():
        processes.kill_tree(trial.pid)


def _fork(driver: Connection, trials: Mapping[int, _Trial], body: Body, order: Message) -> _Trial:
    ours, theirs = socketpair()
    nursery = os.getpid()
    pid = os.fork()
    if pid == 0:
        ours.close()
        driver.close()
        for other in trials.values():
            if other.connection:
                other.connection.close()
        try:
            _live(nursery, Connection(theirs.detach()), body, order)
        finally:
            os._exit(1)  # whatever happens: this process must not go on as a second nursery
    theirs.close()
    return _Trial(order["trial"], pid, order["grant"], Connection(ours.detach()))


def _live(nursery: int, connection: Connection, body: Body, order: Message) -> None:
    """The life of a trial's process: limits, the body, its end as the last message."""
    processes.die_with_parent(nursery)
    os.setsid()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGXCPU, _over_budget)
    # The kernel's own line, should the nursery not look in time; in whole seconds.
    limit = math.ceil(order["grant"] * (1 + TICKS_AHEAD) + GRACE_CPU_SECONDS) + 1
    resource.setrlimit(resource.RLIMIT_CPU, (limit, limit + 1))

    def call(message: Message) -> Message:
        _send(connection, {"message": message})
        return _receive(connection)

    try:
        end = body(order["spec"], call)
    except OverBudget as over:  # by SIGXCPU, or the fit has seen it come
        end = {"over_budget": True, "error": str(over)}
    except MemoryError as error:
        end = {"failure": "out_of_memory", **_told(error)}
    except FloatingPointError as error:
        end = {"failure": "nan_loss", **_told(error)}
    except Exception as error:  # noqa: BLE001  whatever a fit raises is that trial's alone
        kind = "out_of_memory" if "ResourceExhausted" in type(error).__name__ else "error"
        end = {"failure": kind, **_told(error)}
    signal.signal(signal.SIGXCPU, signal.SIG_IGN)
    _send(connection, {"end": end})
    os._exit(0)  # without the exit handlers that the nursery's libraries have registered


def _told(error: BaseException) -> Message:
    return {"error": f"{type(error).__name__}: {error}"[:500], "traceback": traceback.format_exc()}


def _over_budget(signum: int, frame: object) -> NoReturn:
    raise OverBudget


def _relay(driver: Connection, trial: _Trial) -> None:
    """Pass a trial's message on; one that sends garbage is not listened to any longer."""
    assert trial.connection is not None
    try:
        message = _receive(trial.connection)
        if "end" in message:
            trial.end = message["end"]
        else:
            _send(driver, {"trial": trial.number, "message": message["message"]})
    except (EOFError, OSError, ValueError, TypeError, KeyError) as error:
        trial.connection.close()
        trial.connection = None
        if trial.end is None and not isinstance(error, EOFError | ConnectionError):
            trial.end = {"failure": "error", "error": f"the trial sent garbage ({error})"[:500]}
            processes.kill_tree(trial.pid)


def _answer(trial: _Trial | None, answer: Message) -> None:
    if trial and trial.connection:
        with suppress(OSError):  # it died while the driver thought
            _send(trial.connection, answer)


def _look(trial: _Trial) -> Message | None:
    """Read a trial's meter, enforce its grant; its bill where it has ended."""
    family = processes.tree(trial.pid)
    trial.family |= set(family)
    pid, status, usage = os.wait4(trial.pid, os.WNOHANG)
    if pid == 0:
        trial.spent = sum(map(processes.cpu_seconds, family)) + trial.strays
        if trial.spent > trial.grant + GRACE_CPU_SECONDS:
            processes.kill_tree(trial.pid)
        elif trial.spent > trial.grant and not trial.warned:
            trial.warned = True
            os.kill(trial.pid, signal.SIGXCPU)
        return None
    for stray in set(processes.children(os.getpid())) & trial.family:
        trial.strays += _bury(stray)
    if trial.connection:
        while trial.end is None and trial.connection.poll(0):
            try:
                trial.end = _receive(trial.connection).get("end")
            except (EOFError, OSError, ValueError):
                break
        trial.connection.close()
    died_of = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
    spent = usage.ru_utime + usage.ru_stime + trial.strays
    end = trial.end or {}
    over = end.get("over_budget") or (not end and spent > trial.grant)
    unit = 1e6 if sys.platform == "darwin" else 1e6 / 1024  # ru_maxrss is in bytes there
    return {
        "trial": trial.number,
        "end": trial.end,
        "cpu_seconds": spent,
        "peak_rss_mb": usage.ru_maxrss / unit,
        "signal": died_of,
        "over_budget": bool(over),
    }


def _adopt(trials: Mapping[int, _Trial]) -> None:
    """Kill and bill descendants of trials whose parents have died: they are our children now."""
    mine = {trial.pid for trial in trials.values()}
    for pid in set(processes.children(os.getpid())) - mine:
        owners = [trial for trial in trials.values() if pid in trial.family]
        spent = _bury(pid)
        for owner in owners[:1]:
            owner.strays += spent


def _bury(pid: int) -> float:
    """Kill a child with its family and wait for it; its CPU-seconds."""
    processes.kill_tree(pid)
    with suppress(ChildProcessError):
        usage = os.wait4(pid, 0)[2]
        return usage.ru_utime + usage.ru_stime
    return 0.0


def _send(connection: Connection, message: Message) -> None:
    connection.send_bytes(json.dumps(message).encode())


def _receive(connection: Connection) -> Message:
    """The next message. Nothing is unpickled: a trial may send what it likes."""
    message = json.loads(connection.recv_bytes(MAX_MESSAGE))
    if not isinstance(message, dict):
        raise ValueError(f"a message must be an object, but {type(message).__name__} came")
    return message


def main(argv: Sequence[str]) -> None:
    descriptor, limits, body, *preload = argv
    silence, idle = map(float, limits.split(":"))
    processes.die_with_parent(os.getppid())
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    driver = Connection(int(descriptor))
    gc.disable()  # imports leave next to no garbage, and searching them for it costs a quarter
    for name in preload:
        importlib.import_module(name)
    module, _, function = body.partition(":")
    trial = importlib.import_module(module)
    getattr(trial, "prepare", lambda: None)()
    processes.adopt_orphans()
    gc.enable()
    gc.freeze()  # so that collections in trials do not copy the pages that they share
    serve(driver, getattr(trial, function), silence, idle)


if __name__ == "__main__":
    main(sys.argv[1:])
