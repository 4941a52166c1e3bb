"""Which process a run belongs to, so that a later one can tell whether it still lives."""

import os
import platform
from pathlib import Path

_BOOT = Path("/proc/sys/kernel/random/boot_id")


def me() -> str:
    """This process: machine, boot, process namespace, pid and when it began; empty without /proc.

    A pid alone would not do: the kernel gives it to another process later.
    """
    if not _BOOT.exists():
        return ""
    return f"{machine()} {_boot()} {os.readlink('/proc/self/ns/pid')} {os.getpid()} {_began()}"


def machine() -> str:
    """The machine's name, without spaces."""
    return platform.node().replace(" ", "-") or "unnamed"


def is_dead(owner: str) -> bool:
    """Whether ``owner``, as ``me`` gave it on this machine, runs no longer; False if unknown."""
    where, boot, namespace, pid, began = owner.split()
    if where != machine() or not _BOOT.exists():
        return False
    if boot != _boot():
        return True
    seen = namespace == os.readlink("/proc/self/ns/pid")
    return seen and _began(pid) != began


def stat(pid: int | str) -> list[str]:
    """The kernel's fields of a process, from its state on; empty where it is gone."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return []
    return text.rpartition(")")[2].split()  # before that comes its name, which may hold spaces


def _boot() -> str:
    return _BOOT.read_text().strip()


def _began(pid: str = "self") -> str:
    """Clock ticks from boot to the start of a process; empty where it is gone."""
    fields = stat(pid)
    return fields[19] if fields and fields[0] != "Z" else ""
