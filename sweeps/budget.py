"""The ledger of a sweep's CPU-seconds: grants before, debits after, both on disk."""

import fcntl
import json
import os
import resource
from pathlib import Path
from typing import Any, TextIO

# For closing the sweep: figures, description, and what the nursery takes to end.
RESERVE_CPU_SECONDS = 4.0
# No trial gets more than this share, so that even a small budget sees several trials.
GRANT_SHARE = 0.25
# What a trial may have spent between its last beat and its death.
UNSEEN_CPU_SECONDS = 1.0


class Busy(Exception):
    """Another process has this ledger open: its sweep is alive."""


class Ledger:
    """What a sweep spent and promised, in a file that a crash cannot make forget.

    A line is a JSON object: ``open`` (a driver begins; ``total`` CPU-seconds), ``grant`` (before a
    trial starts), ``beat`` (what driver and trials have spent so far), ``debit`` (a trial's bill).
    User and system time of every process count. Where a driver died its last beat is what it
    spent, and a grant without a debit counts at its last beat, or in full.
    """

    def __init__(self, path: Path, cpu_seconds: float) -> None:
        """Open the ledger at ``path``, adding ``cpu_seconds`` to a budget that is there already.

        Raises:
            Busy: another process has it open.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file: TextIO = path.open("a+")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._file.close()
            raise Busy(path) from error
        self._file.seek(0)
        text = self._file.read()
        if text and not text.endswith("\n"):
            self._file.write("\n")  # a line that a power cut has torn must not spoil the next
        self.total, self.past = _read(text)
        self.total += cpu_seconds
        self.granted: dict[int, float] = {}  # trial: CPU-seconds; of trials that run now
        self.debited = 0.0  # CPU-seconds, since this was opened
        self._write({"kind": "open", "pid": os.getpid(), "total": self.total})

    def grant(self, trial: int, cpu_seconds: float) -> None:
        """Promise CPU-seconds to a trial; on disk before the trial begins."""
        self.granted[trial] = cpu_seconds
        self._write({"kind": "grant", "trial": trial, "cpu_seconds": cpu_seconds})

    def debit(self, trial: int, cpu_seconds: float) -> None:
        """Book what a trial and its children have spent, by the kernel's own account."""
        del self.granted[trial]
        self.debited += cpu_seconds
        self._write({"kind": "debit", "trial": trial, "cpu_seconds": cpu_seconds})

    def beat(self, own: float, trials: dict[int, float]) -> None:
        """Note what driver and nursery (``own``) and the running trials have spent so far."""
        record = {"kind": "beat", "own": own, "trials": trials}
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()  # outlives a kill; a power cut may cost a few beats

    def close(self) -> None:
        """Give the ledger free for a later process."""
        self._file.close()

    def _write(self, record: dict[str, Any]) -> None:
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())


def _read(text: str) -> tuple[float, float]:
    """Budget and spending of the drivers before this one, in CPU-seconds."""
    total = past = own = 0.0
    open_grants: dict[int, float] = {}
    beats: dict[int, float] = {}
    for line in text.splitlines():
        try:
            record = json.loads(line)
        except ValueError:  # torn by a power cut
            continue
        if record["kind"] == "open":
            past += own + _unpaid(open_grants, beats)
            total, own, open_grants, beats = record["total"], 0.0, {}, {}
        elif record["kind"] == "grant":
            open_grants[record["trial"]] = record["cpu_seconds"]
        elif record["kind"] == "beat":
            own = record["own"]
            beats |= {int(trial): spent for trial, spent in record["trials"].items()}
        else:
            open_grants.pop(record["trial"], None)
            past += record["cpu_seconds"]
    return total, past + own + _unpaid(open_grants, beats)


def _unpaid(grants: dict[int, float], beats: dict[int, float]) -> float:
    """What trials without a debit have spent: what their last beats say, and a little more."""
    return sum(
        min(grant, beats[trial] + UNSEEN_CPU_SECONDS) if trial in beats else grant
        for trial, grant in grants.items()
    )


def own_cpu_seconds() -> float:
    """User and system time of this process and of its ended children."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)
