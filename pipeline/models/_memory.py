"""What memory this process may still take."""

import os
from pathlib import Path

MEMINFO = Path("/proc/meminfo")
CGROUP = Path("/sys/fs/cgroup")  # where a container sees its own limits
# By version: the limit, what is used of it, and what of that the kernel would give back.
LAYOUTS = (
    ("memory.max", "memory.current", ("inactive_file", "active_file")),
    (
        "memory/memory.limit_in_bytes",
        "memory/memory.usage_in_bytes",
        ("total_inactive_file", "total_active_file"),
    ),
)


def available() -> int:
    """Bytes that the machine has free, and the container where this runs in one.

    Where there is no ``/proc``, as on macOS, it is all that the machine has.
    """
    if not MEMINFO.exists():
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    free = [1024 * int(_table(MEMINFO)["MemAvailable:"])]
    for limit, used, caches in LAYOUTS:
        most = (CGROUP / limit).read_text().strip() if (CGROUP / limit).exists() else "max"
        if most != "max":
            stat = _table((CGROUP / limit).parent / "memory.stat")
            taken = int((CGROUP / used).read_text()) - sum(int(stat[cache]) for cache in caches)
            free.append(int(most) - taken)
    return min(free)


def _table(path: Path) -> dict[str, str]:
    return {name: value for name, value, *_ in map(str.split, path.read_text().splitlines())}
