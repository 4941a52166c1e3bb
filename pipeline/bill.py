"""What this process has spent its CPU-seconds on, by cause, and what it may spend."""

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

# Beside "fit", which is training and validation: what a sweep pays for not being a plain fit.
OVERHEAD = {
    "import": "loading Python and libraries",
    "data": "reading or drawing the letters",
    "tracing": "building a network's graphs",
    "search": "proposing and judging trials",
    "tracking": "writing to MLflow, models included",
    "engine": "starting, watching and ending processes",
    "lost": "work that died before it was reported",
}


class OverBudget(BaseException):
    """Ends a fit that what it may spend does not pay for; says why, where it is the fit that knows.

    No ``Exception``, so that no fit swallows it by accident.
    """


class Meter:
    """User and system time of this process, all its threads included, by cause.

    One at a time: what is charged inside of another charge is taken from that one. What belongs to
    no charge is not kept: the kernel's account minus this one is the rest.
    """

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._open = ["import"]  # until the process has loaded what it starts with
        self._booked = 0.0  # process time up to which all is booked
        self._until = math.inf

    def restart(self, until: float = math.inf) -> None:
        """Begin at nothing: in a fork, whose process time begins at nothing too.

        A fit must end before ``until`` CPU-seconds.
        """
        self._seconds, self._open, self._booked = {}, [], time.process_time()
        self._until = until

    def left(self) -> float:
        """CPU-seconds that a fit may still take; without end where nothing limits it."""
        return self._until - time.process_time()

    def loaded(self) -> None:
        """What was spent up to here was spent on imports."""
        self._book()
        self._open.clear()

    @contextmanager
    def charge(self, cause: str) -> Iterator[None]:
        """Charge what the block spends; also a decorator."""
        self._book()
        depth = len(self._open)
        self._open.append(cause)
        try:
            yield
        finally:
            self._book()
            del self._open[depth:]

    def seconds(self) -> dict[str, float]:
        """CPU-seconds by cause so far."""
        self._book()
        return dict(self._seconds)

    def _book(self) -> None:
        now = time.process_time()
        if self._open:
            cause = self._open[-1]
            self._seconds[cause] = self._seconds.get(cause, 0.0) + now - self._booked
        self._booked = now


METER = Meter()  # one a process, as the clock that it reads
charge = METER.charge


def metrics(bill: Mapping[str, float]) -> dict[str, float]:
    """A bill, in CPU-seconds by cause, as the metrics of a run; ``fit`` and the causes sum up."""
    total, fit = sum(bill.values()), bill.get("fit", 0.0)
    parts = {f"overhead/{cause}_cpu_seconds": bill[cause] for cause in OVERHEAD if cause in bill}
    return {
        "cpu_seconds": total,
        "fit_cpu_seconds": fit,
        "overhead_cpu_seconds": total - fit,
    } | parts


def added(*bills: Mapping[str, float]) -> dict[str, float]:
    """The sum of bills, by cause."""
    causes = {cause: None for bill in bills for cause in bill}  # as a set that keeps the order
    return {cause: sum(bill.get(cause, 0.0) for bill in bills) for cause in causes}


def completed(bill: Mapping[str, float], total: float) -> dict[str, float]:
    """A meter's bill and the kernel's ``total``: what the meter did not charge is the engine's."""
    return dict(bill) | {"engine": total - sum(bill.values()) + bill.get("engine", 0.0)}
