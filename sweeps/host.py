"""What a Dask worker does for a sweep: each of its threads hosts trials in a nursery of its own.

Imported by workers, so it is light: what is heavy is loaded by the nursery alone. A trial needs a
driver that lives: where nothing is heard of it for ``SILENCE_SECONDS``, the trial is ended, by this
worker or, should that hang, by the nursery.
"""

import hashlib
import importlib.metadata
import platform
import queue
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from sweeps.nursery import Message, Nursery

SILENCE_SECONDS = 10.0
IDLE_SECONDS = 120.0  # after which a nursery without a trial gives its memory back
BEAT_SECONDS = 0.5
# Where they differ a trial's figures do, or its model does not load.
PACKAGES = (
    "distributed",
    "keras",
    "mlflow",
    "numpy",
    "optuna",
    "scikit-learn",
    "scipy",
    "tensorflow",
    "tensorflow-cpu",  # another build of the same
)

_inboxes: dict[str, "queue.SimpleQueue[Message]"] = {}  # of the attempts that this worker hosts
_heard: dict[str, float] = {}  # sweep: when its driver was heard last
_claimed = 0.0  # CPU-seconds of this process that are charged already, or were spent before
_mine = threading.local()  # of each thread: its nursery, and when it was used last


# ---- called by the driver, in the worker's event loop


def enlist(sweep: str) -> dict[str, str]:
    """From here on this worker is a sweep's, and what it spends too; its facts."""
    if not _served():
        _claim()  # what was spent up to here is no sweep's
    _heard[sweep] = time.monotonic()
    return facts()


def facts() -> dict[str, str]:
    """What must be the same in driver and workers: Python, packages, this project's code."""
    found = {"Python": ".".join(platform.python_version_tuple()[:2])}
    for name in PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name.removesuffix("-cpu")] = importlib.metadata.version(name)
    code = hashlib.sha256()
    for package in ("pipeline", "sweeps"):
        folder = Path(__file__).parents[1] / package
        for path in sorted(folder.rglob("*.py")):
            code.update(path.relative_to(folder).as_posix().encode() + path.read_bytes())
    return found | {"this project's code": code.hexdigest()[:12]}


def deliver(attempt: str, message: Message) -> None:
    """Hand on what the driver has to say to an attempt; nothing where that has ended."""
    if inbox := _inboxes.get(attempt):
        inbox.put(message)


def _served() -> bool:
    """Whether this worker is some sweep's."""
    return any(map(_lives, list(_heard)))


def hear(sweep: str) -> float:
    """The driver of a sweep lives; gives what this process has spent since this was asked last.

    In CPU-seconds; of several sweeps that a worker serves, the one that asks is charged.
    """
    _heard[sweep] = time.monotonic()
    return _claim()


def _claim() -> float:
    global _claimed
    now = time.process_time()
    spent, _claimed = now - _claimed, now
    return spent


# ---- a task of the cluster, in a thread of a worker


def host(sweep: str, order: Message) -> None:
    """Host one trial (``order``: trial, spec, grant, body, preload), until its end.

    The driver is asked first: a cluster starts a task anew where a worker has died, and only the
    driver knows what that one did. What follows is told under the topic ``sweep``.
    """
    from distributed import get_worker

    attempt, inbox = uuid.uuid4().hex, queue.SimpleQueue[Message]()
    named = {"trial": order["trial"], "attempt": attempt, "worker": get_worker().address}
    say = partial(_say, get_worker().log_event, sweep, named)
    _inboxes[attempt] = inbox
    _heard[sweep] = time.monotonic()
    try:
        say({"asks": True})
        if _admitted(sweep, inbox):
            _watch(sweep, order, inbox, say)
    finally:
        del _inboxes[attempt]


def _say(log: Callable[[str, Message], None], sweep: str, named: Message, message: Message) -> None:
    log(sweep, named | message)


def _lives(sweep: str) -> bool:
    """Whether the driver of a sweep has been heard lately."""
    return time.monotonic() - _heard[sweep] < SILENCE_SECONDS


def _admitted(sweep: str, inbox: "queue.SimpleQueue[Message]") -> bool:
    """The driver's word, which may take long where it waits for a server; no, where it is gone."""
    while _lives(sweep):
        with suppress(queue.Empty):
            return bool(inbox.get(timeout=BEAT_SECONDS).get("go"))
    return False


def _watch(
    sweep: str,
    order: Message,
    inbox: "queue.SimpleQueue[Message]",
    say: Callable[[Message], None],
) -> None:
    """Relay between the driver and a trial until that has ended, or the driver ends or is gone."""
    nursery, number = _nursery(order["body"], order["preload"]), order["trial"]
    meter = _Meter(nursery)
    waiting, beaten = False, 0.0
    try:
        nursery.start(number, order["spec"], order["grant"])
        while _lives(sweep):
            nursery.hear()
            with suppress(queue.Empty):
                message = inbox.get(waiting, BEAT_SECONDS)
                if "answer" not in message:
                    break
                nursery.answer(number, message["answer"])
                waiting = False
            for event in nursery.events(0.0 if waiting else BEAT_SECONDS):
                if "end" in event:
                    say(event | {"own": meter.bill(event["cpu_seconds"])})
                    _mine.used = time.monotonic()
                    return
                say(event)
                waiting = True
            if time.monotonic() - beaten > BEAT_SECONDS:
                beaten = time.monotonic()
                say({"spent": nursery.live[number], "own": meter.bill(0.0)})
    except ConnectionError:
        say({"lost": "its nursery died"})
    nursery.close()
    del _mine.nursery


def _nursery(body: str, preload: Sequence[str]) -> Nursery:
    """This thread's nursery; a new one where there is none that serves."""
    found: Nursery | None = getattr(_mine, "nursery", None)
    # One that has been idle for long may be about to end.
    fresh = time.monotonic() - getattr(_mine, "used", 0.0) < IDLE_SECONDS / 2
    if found and fresh and _mine.kind == (body, *preload) and found.process.poll() is None:
        return found
    if found:
        found.close()
    _mine.nursery = Nursery(body, preload, silence=SILENCE_SECONDS, idle=IDLE_SECONDS)
    _mine.kind = (body, *preload)
    return _mine.nursery  # type: ignore[no-any-return]


class _Meter:
    """CPU-seconds of an attempt beside its trial: those of the nursery."""

    def __init__(self, nursery: Nursery) -> None:
        """Count a nursery from here on; a new one from its beginning."""
        self.nursery = nursery
        self.before, self.imported_before = nursery.cpu_seconds(), nursery.imported

    def bill(self, trial: float) -> dict[str, Any]:
        """So far, by cause; an ended trial's CPU-seconds are in the nursery's and taken out."""
        own = self.nursery.cpu_seconds() - self.before - trial
        imported = min(self.nursery.imported - self.imported_before, own)
        return {"import": imported, "engine": own - imported}
