"""The ledger of a sweep's CPU-seconds: grants before, debits after, both on disk."""

import fcntl
import json
import os
import resource
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from pipeline.bill import added
from pipeline.spec import UserError

# For closing the sweep: figures, description, and what the nursery takes to end.
RESERVE_CPU_SECONDS = 4.0
# No trial gets more than this share, so that even a small budget sees several trials.
GRANT_SHARE = 0.25
# What a trial may have spent between its last beat and its death, on this machine.
UNSEEN_CPU_SECONDS = 1.0

Bill = Mapping[str, float]  # CPU-seconds by cause


class Busy(UserError):
    """Another process has a study's ledger open: its sweep is alive."""

    def __init__(self, path: Path) -> None:
        super().__init__(
            f"a study has one sweep at a time, but one of {path.parent.name!r} is running: "
            "wait for its end, or stop it"
        )


class Opening(NamedTuple):
    """The last opening of a ledger: by which command, for which run, and how far that has come."""

    key: str
    run_id: str
    searched: bool = False
    ended: bool = False


class Ledger:
    """What a sweep spent and promised, in a file that a crash cannot make forget.

    A line is a JSON object: ``open`` (a driver begins; ``total`` CPU-seconds), ``grant`` (before a
    trial starts), ``beat`` (what driver and trials have spent so far), ``debit`` (a trial's bill),
    ``searched`` (no trial will follow), ``end`` (nor anything else; with a ``total`` where the
    command was refused, so that its budget is what it was). User and system time of every
    process count, by cause. Where a driver died its last beat is what it spent, and a grant without
    a debit counts as ``lost``, at its last beat or in full.
    """

    def __init__(
        self,
        path: Path,
        cpu_seconds: float,
        key: str,
        run_id: str,
        unseen: float = UNSEEN_CPU_SECONDS,
    ) -> None:
        """Open the ledger at ``path`` for the command ``key`` and a run.

        Adds ``cpu_seconds`` to the budget, unless the same command has done so and not ended yet:
        then its budget is what is left of it. ``unseen`` CPU-seconds are what a trial may spend
        after its last beat, should this driver die.

        Raises:
            Busy: another process has it open.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file: TextIO = path.open("a+")
        try:
            _lock(self._file, path)
        except Busy:
            self._file.close()
            raise
        self._file.seek(0)
        text = self._file.read()
        if text and not text.endswith("\n"):
            self._file.write("\n")  # a line that a power cut has torn must not spoil the next
        self.total, self.past, last = _read(text)
        again = last is not None and last.key == key and not last.ended
        self.total += 0.0 if again else cpu_seconds
        self.before = self.total if again else self.total - cpu_seconds
        self.searched = again and last is not None and last.searched
        self.granted: dict[int, float] = {}  # trial: CPU-seconds; of trials that run now
        self.debited: Bill = {}  # since this was opened
        record = {"kind": "open", "key": key, "run_id": run_id, "total": self.total}
        self._write(record | {"unseen": unseen})
        if self.searched:
            self._write({"kind": "searched", "own": {}})

    def grant(self, trial: int, cpu_seconds: float) -> None:
        """Promise CPU-seconds to a trial; on disk before the trial begins."""
        self.granted[trial] = cpu_seconds
        self._write({"kind": "grant", "trial": trial, "cpu_seconds": cpu_seconds})

    def debit(self, trial: int, bill: Bill) -> None:
        """Book what a trial and its children have spent, by the kernel's own account."""
        del self.granted[trial]
        self.debited = added(self.debited, bill)
        total = sum(bill.values())
        self._write({"kind": "debit", "trial": trial, "cpu_seconds": total, "bill": bill})

    def beat(self, own: Bill, trials: dict[int, float]) -> None:
        """Note what driver and nursery (``own``) and the running trials have spent so far."""
        record = {"kind": "beat", "own": own, "trials": trials}
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()  # outlives a kill; a power cut may cost a few beats

    def search_ends(self, own: Bill) -> None:
        """No trial will follow, also where this command is interrupted now and typed again."""
        self.searched = True
        self._write({"kind": "searched", "own": own})

    def end(self, own: Bill) -> None:
        """The command that opened this has done what it had to; its bill so far."""
        self._write({"kind": "end", "own": own})

    def refuse(self) -> None:
        """The command is refused before it has done anything: what it adds is taken back.

        That of one that is continued stays: it may be typed again.
        """
        if self.before < self.total:
            self._write({"kind": "end", "own": {}, "total": self.before})

    def close(self) -> None:
        """Give the ledger free for a later process."""
        self._file.close()

    def _write(self, record: dict[str, Any]) -> None:
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())


def last_opening(path: Path) -> Opening | None:
    """Who opened a ledger last; None where there is none that tells.

    Raises:
        Busy: a process has it open.
    """
    with path.open() as file:
        _lock(file, path)
        return _read(file.read())[2]


def _lock(file: TextIO, path: Path) -> None:
    """Lock a ledger until its file is closed; a process that only looks at it is soon done."""
    for _ in range(10):
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            time.sleep(0.05)
    raise Busy(path)


def _read(text: str) -> tuple[float, Bill, Opening | None]:
    """Budget and spending of the drivers before this one, and the last of them."""
    total = 0.0
    opening: Opening | None = None
    before: Opening | None = None
    past: Bill = {}
    own: Bill = {}
    open_grants: dict[int, float] = {}
    beats: dict[int, float] = {}
    unseen = 0.0
    for line in text.splitlines():
        try:
            record = json.loads(line)
        except ValueError:  # torn by a power cut
            continue
        if record["kind"] == "open":
            past = added(past, own, _unpaid(open_grants, beats, unseen))
            total, own, open_grants, beats = record["total"], {}, {}, {}
            unseen = record.get("unseen", UNSEEN_CPU_SECONDS)
            before, opening = opening, Opening(record["key"], record["run_id"])
        elif record["kind"] == "grant":
            open_grants[record["trial"]] = record["cpu_seconds"]
        elif record["kind"] == "debit":
            open_grants.pop(record["trial"], None)
            past = added(past, record["bill"])
        else:
            own = record["own"]
            beats |= {int(trial): spent for trial, spent in record.get("trials", {}).items()}
            if "total" in record:  # it was refused: as if it had not been
                total, opening = record["total"], before
            elif record["kind"] == "end" and opening:
                opening = opening._replace(ended=True)
            elif record["kind"] == "searched" and opening:
                opening = opening._replace(searched=True)
    return total, added(past, own, _unpaid(open_grants, beats, unseen)), opening


def _unpaid(grants: dict[int, float], beats: dict[int, float], unseen: float) -> Bill:
    """What trials without a debit have spent: what their last beats say, and a little more."""
    spent = [
        min(grant, beats[trial] + unseen) if trial in beats else grant
        for trial, grant in grants.items()
    ]
    return {"lost": sum(spent)} if spent else {}


def own_cpu_seconds() -> float:
    """User and system time of this process and of its ended children."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)
