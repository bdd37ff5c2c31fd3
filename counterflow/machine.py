"""What of a machine this process may use: cores and memory, as its affinity and its control groups leave them.

A container or a scheduler's job often has a small part of what the machine has, and more threads than cores wait for
each other. Read are control groups of version 2 and of version 1, this process's own and those around it.
"""

import math
import os
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

ROOT = Path("/")


def cores(root: Path = ROOT) -> int:
    """Cores this process may use: on Linux those of its affinity, as far as its control groups give it time on them;
    elsewhere the machine's."""
    if sys.platform != "linux":
        return os.cpu_count() or 1
    most = float(len(os.sched_getaffinity(0)))
    for group in _groups(root, "cpu"):
        with suppress(OSError, ValueError):  # none of version 2, or no limit
            quota, period = map(int, (group / "cpu.max").read_text().split())
            most = min(most, quota / period)
        with suppress(OSError, ValueError):
            quota = int((group / "cpu.cfs_quota_us").read_text())
            if quota > 0:
                most = min(most, quota / int((group / "cpu.cfs_period_us").read_text()))
    return max(1, math.ceil(most))


def free_memory(root: Path = ROOT) -> int:
    """Bytes that this host, and this process's control groups, can still give; 0 where that is not known."""
    information = root / "proc/meminfo"
    if not information.is_file():
        return 0
    lines = dict(line.split(":", 1) for line in information.read_text().splitlines())
    free = int(lines["MemAvailable"].split()[0]) * 1024
    names = (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    )
    for group in _groups(root, "memory"):
        for limit, usage, inactive in names:
            with suppress(OSError, ValueError):  # none of that version, or no limit
                most = int((group / limit).read_text())
                cached = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
                free = min(free, most - int((group / usage).read_text()) + int(cached.get(inactive, 0)))
    return free


def _groups(root: Path, controller: str) -> Iterator[Path]:
    """Where this process's control groups lie that may limit it, from its own outwards."""
    mounted, own = root / "sys/fs/cgroup", root / "proc/self/cgroup"
    for line in own.read_text().splitlines() if own.is_file() else ():
        _, names, path = line.split(":", 2)
        if names and controller not in names.split(","):
            continue
        top = mounted / controller if names else mounted
        inner = Path(path.lstrip("/"))
        yield from (top / part for part in (inner, *inner.parents))
