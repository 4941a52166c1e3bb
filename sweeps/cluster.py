"""A Dask cluster in the place of the local nursery: the same calls, trials on other machines.

Each trial is a task of the cluster, which a worker hosts in a nursery of its own (``host``). Dask
says where; what is said of it, and what it costs, only the driver knows: it admits each attempt,
bills the one whose worker has died, and proposes that trial again, once, as a new one.
"""

import queue
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from pipeline.spec import UserError
from sweeps import host
from sweeps.budget import UNSEEN_CPU_SECONDS
from sweeps.nursery import GRACE_CPU_SECONDS, Message, lost

CONNECT_SECONDS = 10.0
GATHER_SECONDS = 60.0  # for a first worker to come
LOOK_SECONDS = 1.0  # between two looks at who is there
HEAR_SECONDS = 2.0  # between two signs of life to the workers
# Of a worker: then it is given up. Until then it has ended its trial itself, for want of ours.
SILENCE_SECONDS = host.SILENCE_SECONDS + 5.0
# What a trial may spend when its worker, or its driver, is heard no more.
SILENT_CPU_SECONDS = host.SILENCE_SECONDS + 2.0


@dataclass
class _Attempt:
    """A trial that the cluster has, and the one attempt at it that counts."""

    order: Message
    allowed: Sequence[str]
    future: "Future[None]"
    token: str | None = None
    worker: str = ""
    heard: float = 0.0
    told: bool = False  # whether it has a nursery, so that its silence means something


class Cluster:
    """The driver's handle on a cluster; as ``Nursery``, whose calls it has."""

    def __init__(
        self,
        address: str,
        body: str,
        preload: Sequence[str],
        stop: Callable[[], bool] = lambda: False,
    ) -> None:
        """Connect, and wait for a worker that fits; no longer where ``stop`` says so.

        Raises:
            UserError: no scheduler answers, or no worker has the versions that are here.
        """
        self.kind = {"body": body, "preload": list(preload)}
        self.sweep = f"sweep-{uuid.uuid4().hex}"
        self.live: dict[int, float] = {}  # trial: CPU-seconds so far
        self.attempts: dict[int, _Attempt] = {}
        self.owns: dict[str, Mapping[str, float]] = {}  # attempt: what it cost beside its trial
        self.ended = 0.0  # CPU-seconds of ended trials
        self.hosting = 0.0  # CPU-seconds of the workers themselves
        self.threads: dict[str, int] = {}  # of the workers that are there
        self.checks: dict[str, Future[Any]] = {}  # what they answered, asked for their facts
        self.good: set[str] = set()
        self.refused: dict[str, str] = {}
        self.looked = 0.0
        self.heard: queue.SimpleQueue[tuple[float, Message]] = queue.SimpleQueue()
        self.address, self.stop = address, stop
        self.client = _connect(address)
        # A worker that hangs keeps a thread waiting, and must not keep the driver.
        self.senders = ThreadPoolExecutor(max_workers=32)
        self.client.subscribe_topic(self.sweep, self._note)
        self.executor = self.client.get_executor(pure=False)
        self.closed = threading.Event()
        self.pulse = threading.Thread(target=self._live, daemon=True)
        self.pulse.start()
        try:
            self._gather()
        except UserError:
            self.close()
            raise

    # ---- as a nursery

    def start(self, trial: int, spec: Message, grant: float) -> None:
        """Have a worker fork a trial that may spend ``grant`` CPU-seconds."""
        self.live[trial] = 0.0
        order = {"trial": trial, "spec": spec, "grant": grant} | self.kind
        self.attempts[trial] = self._submit(order)

    def answer(self, trial: int, answer: Message) -> None:
        """Answer a trial's message."""
        attempt = self.attempts.get(trial)
        if attempt and attempt.token:
            self._deliver(attempt.worker, attempt.token, {"answer": answer})

    def events(self, timeout: float) -> Iterator[Message]:
        """As a nursery's, which see; ``end`` of a trial that was lost has ``lost``, the reason.

        Raises:
            ConnectionError: the scheduler is gone.
            UserError: a worker cannot host a trial.
        """
        self._look()
        try:
            heard = [self.heard.get(timeout=timeout)]
        except queue.Empty:
            heard = []
        while not self.heard.empty():
            heard.append(self.heard.get())
        for when, message in heard:
            yield from self._take(when, message)
        for trial in list(self.attempts):
            yield from self._miss(trial)

    def capacity(self) -> int:
        """Trials that the workers that are there can have side by side.

        Where none is there, and no trial that would show when one is, it waits for the next.

        Raises:
            UserError: none comes within a minute, or none that may be used.
        """
        if not self.live:
            self._gather()
        return sum(self.threads[worker] for worker in self.good & set(self.threads))

    def cpu_seconds(self) -> float:
        """What workers and their nurseries have spent on this sweep, ended trials included."""
        return self.ended + self.hosting + sum(sum(own.values()) for own in self.owns.values())

    def elsewhere(self) -> float:
        """All that: none of it is in the kernel's account of this process."""
        return self.cpu_seconds()

    @property
    def imported(self) -> float:
        """CPU-seconds that the workers' nurseries took to load."""
        return sum(own["import"] for own in self.owns.values())

    def close(self) -> None:
        """End what runs, and leave the cluster to others."""
        self.closed.set()
        self.pulse.join(2 * HEAR_SECONDS)
        for trial, attempt in self.attempts.items():
            attempt.future.cancel()
            if attempt.token:
                self._deliver(attempt.worker, attempt.token, {"end": True})
                self.live[trial] = _unseen(attempt, self.live[trial], UNSEEN_CPU_SECONDS)
        if self.attempts:
            time.sleep(host.BEAT_SECONDS)  # for the last messages to get away
        self.senders.shutdown(wait=False, cancel_futures=True)  # a worker may hang
        self.client.close(timeout=CONNECT_SECONDS)

    # ---- who is there

    def _gather(self) -> None:
        until = time.monotonic() + GATHER_SECONDS
        while not self.good and not self.stop():
            self._look()
            if self.refused and len(self.refused) == len(self.threads):
                raise UserError(next(iter(self.refused.values())))
            if time.monotonic() > until:
                raise UserError(
                    f"a sweep on a cluster needs a worker, but {self.address} had none within "
                    f"{GATHER_SECONDS:.0f} s: start one with `dask worker {self.address} "
                    "--nthreads 1`"
                )
            time.sleep(0.1)

    def _look(self) -> None:
        """Who came and who went; a worker that comes is asked for its versions first."""
        if time.monotonic() - self.looked > LOOK_SECONDS:
            self.looked = time.monotonic()
            if self.client.scheduler is None:  # after ten seconds in which the client sought it
                raise ConnectionError("the Dask scheduler is gone")
            # ``scheduler_info`` gives what the client keeps, which names no worker now and then.
            ask_scheduler = self.client.scheduler.identity
            with suppress(OSError):  # it is being sought
                workers = self.client.sync(ask_scheduler, n_workers=-1)["workers"]
                self.threads = {name: worker["nthreads"] for name, worker in workers.items()}
            self.good &= set(self.threads)
            self.refused = {w: why for w, why in self.refused.items() if w in self.threads}
            for worker in set(self.threads) - self.good - set(self.refused) - set(self.checks):
                ask = self.senders.submit(
                    self.client.run, host.enlist, self.sweep, workers=[worker]
                )
                self.checks[worker] = ask
        for worker, ask in list(self.checks.items()):
            if ask.done():
                del self.checks[worker]
                if worker in self.threads:
                    self._judge(worker, ask)

    def _judge(self, worker: str, ask: "Future[Any]") -> None:
        error = ask.exception()
        ours = host.facts()
        theirs = ours if error else ask.result().get(worker, {})
        differ = [name for name in sorted(ours) if theirs.get(name) != ours[name]]
        if error:
            why = f"answered '{type(error).__name__}: {error}'"
        elif differ:
            name = differ[0]
            why = f"has {name} {theirs.get(name, 'not at all')} where the driver has {ours[name]}"
        else:
            self.good.add(worker)
            return
        self.refused[worker] = (
            f"every worker must have the driver's Python, packages and code, but {worker} {why}: "
            "install requirements.txt and sweeps/requirements.txt there, check out the same "
            "commit, and start the worker in that folder"
        )
        print(f"refused: {self.refused[worker]}", flush=True)

    # ---- what is said

    def _submit(self, order: Message) -> _Attempt:
        allowed = sorted(self.good)
        future = self.executor.submit(
            host.host, self.sweep, order, workers=allowed, allow_other_workers=False
        )
        return _Attempt(order, allowed, future)

    def _deliver(self, worker: str, token: str, message: Message) -> None:
        self.senders.submit(
            self.client.run, host.deliver, token, message, workers=[worker], on_error="ignore"
        )

    def _live(self) -> None:
        """Tell the workers that this driver lives, as long as it does, and what they spend."""
        pending: dict[str, Future[Any]] = {}
        going = True
        while going:
            going = not self.closed.wait(HEAR_SECONDS)  # once more in the end
            for worker in list(self.good):
                if worker not in pending:
                    pending[worker] = self.senders.submit(
                        self.client.run, host.hear, self.sweep, workers=[worker]
                    )
            done, _ = wait(pending.values(), timeout=HEAR_SECONDS)
            for worker in [name for name, asked in pending.items() if asked in done]:
                asked = pending.pop(worker)
                if not asked.exception():  # it has died meanwhile
                    self.hosting += sum(asked.result().values())

    def _note(self, event: tuple[float, Message]) -> None:
        self.heard.put((time.monotonic(), event[1]))

    def _take(self, when: float, message: Message) -> Iterator[Message]:
        """What a message of an attempt says; one that does not count any longer is billed only."""
        trial, token = message["trial"], message["attempt"]
        if "own" in message:
            self.owns[token] = message["own"]
        attempt = self.attempts.get(trial)
        if "asks" in message:
            yield from self._admit(when, message, attempt)
        elif attempt and attempt.token == token:
            attempt.heard = when
            if "spent" in message:
                attempt.told = True
                self.live[trial] = max(self.live[trial], message["spent"])
            elif "end" in message:
                yield self._end(trial, message)
            elif "lost" in message:
                yield self._lose(trial, message["lost"], UNSEEN_CPU_SECONDS)
            else:
                yield {"trial": trial, "message": message["message"]}

    def _admit(self, when: float, message: Message, attempt: _Attempt | None) -> Iterator[Message]:
        """Say whether an attempt may begin: the first one of a trial that is still wanted."""
        token, worker = message["attempt"], message["worker"]
        wanted = attempt is not None and attempt.token is None
        self._deliver(worker, token, {"go": wanted})
        if attempt and wanted:
            attempt.token, attempt.worker, attempt.heard = token, worker, when
        elif attempt:  # Dask starts a task anew only where its worker has died
            yield self._lose(message["trial"], "its worker died", UNSEEN_CPU_SECONDS)

    # ---- how it ends

    def _end(self, trial: int, message: Message) -> Message:
        del self.live[trial], self.attempts[trial]
        self.ended += message["cpu_seconds"]
        return message

    def _miss(self, trial: int) -> Iterator[Message]:
        """Give up a trial whose worker is gone, and put one that none has taken to others."""
        attempt = self.attempts[trial]
        silent = time.monotonic() - attempt.heard
        if attempt.token is None:
            stranded = self.good and not set(attempt.allowed) & self.good
            if stranded or attempt.future.cancelled():
                attempt.future.cancel()
                self.attempts[trial] = self._submit(attempt.order)
            elif attempt.future.done() and (error := attempt.future.exception()):
                raise UserError(
                    "a worker must be able to host a trial, but the cluster answered "
                    f"'{type(error).__name__}: {error}': see the worker's log"
                )
        elif attempt.worker not in self.threads:
            yield self._lose(trial, f"its worker {attempt.worker} died", UNSEEN_CPU_SECONDS)
        elif attempt.told and silent > SILENCE_SECONDS:
            why = f"its worker {attempt.worker} was silent for {silent:.0f} s"
            # Else the scheduler, who takes minutes to miss it, may give it the next trial. It is
            # asked anew, and good again once it answers.
            self.good.discard(attempt.worker)
            yield self._lose(trial, why, SILENT_CPU_SECONDS)
        elif attempt.future.done() and silent > SILENCE_SECONDS:
            yield self._lose(trial, "its task ended without a word", UNSEEN_CPU_SECONDS)

    def _lose(self, trial: int, why: str, unseen: float) -> Message:
        attempt = self.attempts[trial]
        attempt.future.cancel()
        if attempt.token:
            self._deliver(attempt.worker, attempt.token, {"end": True})
        spent = _unseen(attempt, self.live[trial], unseen)
        message = lost(trial, spent, why) | {"worker": attempt.worker}
        return self._end(trial, message)


def _unseen(attempt: _Attempt, spent: float, unseen: float) -> float:
    """What a trial has spent at most, ``unseen`` CPU-seconds after it was heard last."""
    return min(spent + unseen, float(attempt.order["grant"]) + GRACE_CPU_SECONDS)


def _connect(address: str) -> Any:
    """A client of the scheduler, which is given ten seconds. TLS is Dask's configuration."""
    try:
        from distributed import Client
    except ImportError:
        raise UserError(
            f"scheduler={address} needs Dask, which is not installed: "
            "pip install -r sweeps/requirements.txt, or leave scheduler out"
        ) from None
    try:
        return Client(  # type: ignore[no-untyped-call]
            address, timeout=CONNECT_SECONDS, set_as_default=False, name="letters"
        )
    except (OSError, ValueError, TypeError, RuntimeError) as error:
        raise UserError(
            f"scheduler must be 'local' or the address of a Dask scheduler, but {address!r} "
            f"answered '{error}': start `dask scheduler`, and pass the address that it prints"
        ) from error
