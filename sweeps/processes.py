"""What the kernel knows of processes: who descends from whom, what a tree of them has spent."""

import ctypes
import os
import signal
import sys
from contextlib import suppress
from pathlib import Path

from pipeline import owner

_TICK = os.sysconf("SC_CLK_TCK")
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
_GONE = (FileNotFoundError, ProcessLookupError)


def usable_cores() -> int:
    """Cores that this process may use: by affinity, and by its control group's quota."""
    n_cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    with suppress(OSError, ValueError):  # no quota: 'max', or no control groups at all
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        n_cores = min(n_cores, max(1, int(quota) // int(period)))
    return n_cores


def cpu_seconds(pid: int) -> float:
    """User and system time of a process and of its ended children; 0 where it is gone."""
    return sum(own_and_waited(pid))


def own_and_waited(pid: int) -> tuple[float, float]:
    """CPU-seconds of a process, and of those of its ended children that it has waited for."""
    ticks = [*map(int, owner.stat(pid)[11:15])]
    return sum(ticks[:2]) / _TICK, sum(ticks[2:]) / _TICK


def parent(pid: int) -> int:
    """The parent of a process; 0 where it is gone."""
    fields = owner.stat(pid)
    return int(fields[1]) if fields else 0


def launchers() -> tuple[int, ...]:
    """The process that started this one; where that is a shell, what started the shell too."""
    above = os.getppid()
    with suppress(*_GONE):
        if Path(f"/proc/{above}/comm").read_text().strip() in ("bash", "sh"):
            return above, parent(above)
    return (above,)


def children(pid: int) -> list[int]:
    """The children of a process, of all its threads."""
    found: list[int] = []
    with suppress(*_GONE):
        for task in Path(f"/proc/{pid}/task").iterdir():
            with suppress(*_GONE):  # a thread that has just ended hides no other's children
                found += map(int, (task / "children").read_text().split())
    return found


def tree(pid: int) -> list[int]:
    """A process and all that descend from it."""
    found = [pid]
    for one in found:
        found += children(one)
    return found


def kill_tree(pid: int) -> None:
    """Kill a process and all that descend from it; twice, since some may be born meanwhile."""
    for _ in range(2):
        for one in tree(pid):
            with suppress(ProcessLookupError):
                os.kill(one, signal.SIGKILL)


def die_with_parent(parent_pid: int) -> None:
    """Have the kernel kill this process when its parent dies; end at once where it is dead."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:
        os._exit(1)


def adopt_orphans() -> None:
    """Make orphans among this process's descendants its children, so that none gets away."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0)
